"""Text to ids and back: openai-gpt's two ways of cutting words, special tokens, detokenising, learned vocabularies."""

import json
import string
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cli import UserError
from configs import load_config_dict
from model_files import ModelFiles
from utils import DialogTokenizer, learn_bpe, load_tokenizer
from words import detokenize, spacy_words

OURS = ["<bos>", "<eos>", "<pad>", "<speaker1>", "<speaker2>"]
CHARACTERS = string.ascii_lowercase + string.digits + "é'<>?!.,-"
WHOLE_WORDS = ["i'm", "do", "don", "n't", "ca", "can", "'m", "eos"]  # the words that the merges put together


def write_openai_gpt(folder: Path) -> Path:
    """A folder with a vocabulary as openai-gpt has it: characters, the same at a word's end, a few merged words."""
    vocab = [*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)]
    merges = []
    for word in WHOLE_WORDS:
        left, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for right in rest:
            merges.append(f"{left} {right}")
            left += right
            vocab.append(left)
    vocab = list(dict.fromkeys(["<unk>", *vocab]))
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "openai-gpt", "vocab_size": len(vocab)}))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_openai_gpt(tmp_path / "openai-gpt")


def load(folder: Path, pre_tokenizer: str | None = None) -> DialogTokenizer:
    return load_tokenizer(ModelFiles(folder), pre_tokenizer)


def saved(tokenizer: DialogTokenizer, folder: Path, model_type: str = "openai-gpt") -> Path:
    """The folder a tokenizer was saved into, as train.py does it, beside a config.json."""
    folder.mkdir()
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def words(tokenizer: DialogTokenizer, text: str) -> list[str]:
    """The tokens of a text, without the mark of a word's end."""
    (ids,) = tokenizer.encode([text])
    return [token.removesuffix("</w>") for token in tokenizer.hf.convert_ids_to_tokens(ids)]


# ------------------------------------------------------------------------------------------------------------
# openai-gpt: spacy and basic
# ------------------------------------------------------------------------------------------------------------

CUTS = [
    ("spacy", "don't", ["do", "n't"]),
    ("spacy", "DON\u2019T", ["do", "n't"]),  # an apostrophe as word processors write it
    ("spacy", "I'm", ["i", "'m"]),
    ("spacy", "can't?", ["ca", "n't", "?"]),
    ("spacy", "\u00c9", ["é"]),  # a small é, with its accent
    ("basic", "\u00c9", ["e"]),
    ("basic", "don't", ["don", "'", "t"]),
    ("basic", "I'm", ["i", "'", "m"]),
    ("basic", "can't?", ["can", "'", "t", "?"]),
]


@pytest.mark.parametrize(("pre_tokenizer", "text", "expected"), CUTS)
def test_words_are_cut_the_same_before_and_after_saving(pre_tokenizer, text, expected, folder, tmp_path):
    first = load(folder, pre_tokenizer)
    second = load(saved(first, tmp_path / "once"))
    third = load(saved(second, tmp_path / "twice"))
    for tokenizer in (first, second, third):
        assert tokenizer.pre_tokenizer == pre_tokenizer
        assert words(tokenizer, text) == expected
        assert tokenizer.fingerprint() == first.fingerprint()
        assert tokenizer.ids == first.ids


def test_spacy_is_the_default_and_the_two_have_caches_of_their_own(folder):
    assert load(folder).pre_tokenizer == "spacy"
    assert load(folder).fingerprint() == load(folder, "spacy").fingerprint() != load(folder, "basic").fingerprint()


@pytest.mark.parametrize(("first", "then"), [("spacy", "basic"), ("basic", "spacy")])
def test_the_option_wins_over_what_a_folder_says_and_is_saved(first, then, folder, tmp_path):
    changed = load(saved(load(folder, first), tmp_path / "first"), then)
    reloaded = load(saved(changed, tmp_path / "second"))
    for pre_tokenizer, text, expected in CUTS:
        if pre_tokenizer == then:
            assert words(changed, text) == words(reloaded, text) == expected


@pytest.mark.parametrize(("asked", "expected"), [(None, "basic"), ("spacy", "spacy")])
def test_a_legacy_fine_tuned_folder_is_basic_unless_told_otherwise(asked, expected, folder):
    size = len(json.loads((folder / "vocab.json").read_text()))
    (folder / "added_tokens.json").write_text(json.dumps({token: size + i for i, token in enumerate(OURS)}))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings["additional_special_tokens"] = ["<speaker1>", "<speaker2>"]
    (folder / "special_tokens_map.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"afn": "gelu"}')  # as it was in 2019: without a model type
    tokenizer = load(folder, asked)
    assert tokenizer.pre_tokenizer == expected
    assert words(tokenizer, "don't") == next(cut for how, text, cut in CUTS if (how, text) == (expected, "don't"))
    assert tokenizer.hf.convert_tokens_to_ids(OURS) == list(range(size, size + 5))
    assert len(tokenizer) == size + 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't you?", "do n't you ?"),
        ("It\u2019s fine,ok", "it 's fine , ok"),
        ("i can't, i won't", "i ca n't , i wo n't"),
        ("wait\u2026 no \u2014 yes", "wait ... no - yes"),
        ("don\u00e2\u20ac\u2122t", "do n't"),  # UTF-8 that was once read as another encoding
        ("one\n  two", "one two"),
        ("(a/b)", "( a / b )"),
        ("", ""),
    ],
)
def test_spacy_words(text, expected):
    assert spacy_words(text) == expected


def test_the_option_is_refused_for_other_vocabularies():
    with pytest.raises(UserError, match="--pre_tokenizer is for openai-gpt's vocabulary only"):
        DialogTokenizer(learn_bpe(["hello"], 270), "spacy")


# ------------------------------------------------------------------------------------------------------------
# Special tokens
# ------------------------------------------------------------------------------------------------------------


def openai_gpt_and_learned(folder: Path) -> dict[str, DialogTokenizer]:
    learned = DialogTokenizer(learn_bpe(["hello <eos> <speaker1>"] * 9, 300))
    return {"spacy": load(folder, "spacy"), "basic": load(folder, "basic"), "learned": learned}


def test_special_tokens_stand_behind_the_vocabulary_in_the_original_order(folder):
    for tokenizer in openai_gpt_and_learned(folder).values():
        ids = tokenizer.ids
        size = len(tokenizer) - 5
        assert [ids.bos, ids.eos, ids.pad, ids.speaker1, ids.speaker2] == list(range(size, size + 5))
        assert tokenizer.hf.convert_ids_to_tokens(list(range(size, size + 5))) == OURS
        assert ids.all >= set(range(size, size + 5))


def test_a_base_models_own_special_tokens_end_a_reply_too(tiny, tmp_path):
    """Also those whose roles ours take, such as an instruct model's <|im_end|>; and those without a role."""
    hf = AutoTokenizer.from_pretrained(tiny("llama"))
    hf.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]})
    own = hf.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
    tokenizer = DialogTokenizer(hf)
    tokenizer.save(tmp_path)
    for each in (tokenizer, DialogTokenizer(AutoTokenizer.from_pretrained(tmp_path))):
        assert each.ids.all == {*own, *each.hf.convert_tokens_to_ids(OURS)}
        assert each.decode([*own, *each.encode(["hi"])[0]]) == "hi"


@pytest.mark.parametrize("typed", OURS)
def test_a_typed_special_token_is_text(typed, folder):
    for name, tokenizer in openai_gpt_and_learned(folder).items():
        (ids,) = tokenizer.encode([f"hi {typed} you"])
        assert not tokenizer.ids.all & set(ids), name
        # The openai-gpt vocabulary ends every word with a space.
        assert tokenizer.hf.decode(ids).replace(" ", "") == f"hi{typed}you", name


def test_nothing_and_empty_texts_have_no_ids(folder):
    for tokenizer in openai_gpt_and_learned(folder).values():
        assert tokenizer.encode([]) == []
        assert tokenizer.encode(["", "hi", ""])[::2] == [[], []]


def test_words_behind_another_one_carry_their_space_where_a_vocabulary_has_it(folder):
    for name, tokenizer in openai_gpt_and_learned(folder).items():
        inside = [tokenizer.hf.decode(ids) for ids in tokenizer.encode_inside(["hello", "do", "?"])]
        assert inside == ([" hello", " do", " ?"] if name == "learned" else ["hello", "do", "?"])


@pytest.mark.parametrize("pre_tokenizer", ["spacy", "basic"])
def test_a_word_that_is_merged_as_it_stands_may_begin_with_another_token(pre_tokenizer, folder):
    """As in the original toolkit's word table, which looks for "i'm" where no text has it."""
    tokenizer = load(folder, pre_tokenizer)
    first = {word: tokenizer.hf.convert_ids_to_tokens(tokenizer.first_bare_token(word)) for word in ("i'm", "i", "ix")}
    assert first == {"i'm": "i'm</w>", "i": "i</w>", "ix": "i"}
    assert words(tokenizer, "i'm")[0] == "i"
    assert [tokenizer.first_bare_token(word) for word in ("☃", "☃i")] == [tokenizer.hf.unk_token_id] * 2


def test_a_bare_word_of_a_vocabulary_with_bytes_has_no_space(folder):
    tokenizer = openai_gpt_and_learned(folder)["learned"]
    assert tokenizer.first_bare_token("don") == tokenizer.encode(["don"])[0][0]
    assert tokenizer.first_bare_token("☃") == tokenizer.encode(["☃"])[0][0]  # it has characters for bytes, not this


def test_decode_leaves_special_tokens_out_and_writes_as_people_do(folder):
    for tokenizer in openai_gpt_and_learned(folder).values():
        (ids,) = tokenizer.encode(["i'm 5, don't you ?"])
        special = tokenizer.ids
        assert tokenizer.decode([special.bos, special.speaker2, *ids, special.eos, special.pad]) == "i'm 5, don't you?"


# ------------------------------------------------------------------------------------------------------------
# Text as people write it
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("i 'm fine , thanks .", "i'm fine, thanks."),
        ("do n't", "don't"),
        ("don ' t", "don't"),
        ("ca n't you ?", "can't you?"),
        ("ca n ' t you ?", "can't you?"),
        ("can ' t", "can't"),
        ("i ' ve and she ' s", "i've and she's"),
        ("we 'd , they 'll , you 're", "we'd, they'll, you're"),
        ("I 'M HERE , DO N'T", "I'M HERE, DON'T"),
        ("what ? !", "what?!"),
        ("well . . . yes", "well... yes"),
        ("well ... yes", "well... yes"),
        ('" hi there " , he said', '"hi there", he said'),
        ("( so they say )", "(so they say)"),
        ("50 % off ;", "50% off;"),
        ("  a   b ", "a b"),
        ("it's as it should be, isn't it?", "it's as it should be, isn't it?"),
        ("the dogs ' bowl", "the dogs ' bowl"),
        ("", ""),
    ],
)
def test_detokenize(text, expected):
    assert detokenize(text) == expected


# ------------------------------------------------------------------------------------------------------------
# A vocabulary learned from the dataset
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["openai-gpt", "gpt2", "llama"])
@pytest.mark.parametrize(
    "text",
    [
        "Hello there, my friend",
        "Grüß Gott, schöne große Welt",
        "私は猫がとても好きです",
        "مرحبا بالعالم الجميل",
        "สวัสดีชาวโลก",
        "🙂👍🏽 ﷽ \u0301 <bos>",
        " two  spaces\tand\na line ",
    ],
)
def test_a_learned_vocabulary_gives_back_any_text(text, model_type, tmp_path):
    tokenizer = DialogTokenizer(learn_bpe(["hello there", text[: len(text) // 2]] * 3, 300))
    reloaded = load(saved(tokenizer, tmp_path / "saved", model_type))
    for one in (tokenizer, reloaded):
        (ids,) = one.encode([text])
        assert one.hf.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.encode([text]) == reloaded.encode([text])
    assert tokenizer.fingerprint() == reloaded.fingerprint()
    assert tokenizer.pre_tokenizer is reloaded.pre_tokenizer is None


def test_a_learned_vocabulary_is_as_large_as_the_config_says_and_learned_from_the_texts(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 270}')
    tokenizer = load_tokenizer(ModelFiles(tmp_path), texts=["a banana in a bandana"] * 9)
    assert len(tokenizer) == 270  # 256 bytes, 9 merges, 5 special tokens
    assert len(tokenizer.encode(["banana"])[0]) < 6 == len(tokenizer.encode(["xyzxyz"])[0])


# ------------------------------------------------------------------------------------------------------------
# Folders that cannot be used
# ------------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=f"{tmp_path} holds no tokenizer; train it first: python train.py --model"):
        load(tmp_path)


def test_a_broken_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match=f"cannot read the tokenizer in {tmp_path}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        ({"afn": "gelu", "n_embd": 8}, "openai-gpt"),
        ({"activation_function": "gelu_new"}, "gpt2"),
        ({"model_type": "llama", "afn": "gelu"}, "llama"),
    ],
)
def test_the_model_type_that_old_configs_lack(config, model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config_dict(ModelFiles(tmp_path)) == config | {"model_type": model_type}


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff"])
def test_a_config_that_cannot_be_read_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/config.json"):
        load_config_dict(ModelFiles(tmp_path))
