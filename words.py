"""How openai-gpt reads English: cut into words as in its pretraining, and put back as people write it."""

import re

# openai-gpt's pretraining text was standardised like this (Radford et al. 2018, section 4.1: ftfy and spaCy).
STANDARD_CHARACTERS = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})


SPACED_OUT = re.compile(r"""(-+|~+|!+|"+|;+|\?+|\++|,+|\)+|\(+|\\+|/+|\*+|\[+|\]+|\}+|\{+|\|+|_+)""")


_spacy_english = None


def spacy_words(text: str) -> str:
    """Text split into words as openai-gpt's pretraining text was: `i'm` is `i 'm`, `don't` is `do n't`."""
    global _spacy_english
    import ftfy

    if _spacy_english is None:  # a second to import, so only where openai-gpt is used
        import spacy

        _spacy_english = spacy.blank("en").tokenizer
    text = ftfy.fix_text(text).translate(STANDARD_CHARACTERS)
    text = " ".join(SPACED_OUT.sub(r" \1 ", text).split())
    return " ".join(word.text for word in _spacy_english(text)).lower()


DETOKENIZE = [
    (re.compile(r"(\w) ?n ' t\b"), r"\1n't"),  # don ' t, ca n ' t
    (re.compile(r"(\w) ' (s|m|t|d|re|ve|ll)\b", re.I), r"\1'\2"),  # i ' m
    (re.compile(r"(\w) (n't|'(?:s|m|t|d|re|ve|ll))\b", re.I), r"\1\2"),  # do n't, i 'm
    (re.compile(r"\b(gon|wan|got) (na|ta)\b"), r"\1\2"),  # as spaCy splits gonna, wanna, gotta
    (re.compile(r"(?<=\.) (?=\.)"), ""),  # . . .
    (re.compile(r" ([.,!?;:%]+)(?=\s|$)"), r"\1"),
    (re.compile(r'(^|\s)" ([^"]+?) "(?=\W|$)'), r'\1"\2"'),
    (re.compile(r"([(\[]) (.*?) ([)\]])"), r"\1\2\3"),
    (re.compile(r"\s+"), " "),
]


def detokenize(text: str) -> str:
    """Tokenised English put back as people write it: `i 'm fine , thanks .` becomes `i'm fine, thanks.`"""
    for pattern, replacement in DETOKENIZE:
        text = pattern.sub(replacement, text)
    return text.strip()


# What a text may go on with so that each rule of DETOKENIZE applies. A start that reads the same with all of them is
# settled and can be shown.
CONTINUATIONS = ["", "x", " x", "t", " t", "'t", "' t", " ' t", "n't", " n't", "n ' t", " n ' t"]
CONTINUATIONS += ["s", " 's", " ' s", "m", "e", "l", ".", " .", '"', ' "', ' x "', ")", " )", "]", " ]"]
