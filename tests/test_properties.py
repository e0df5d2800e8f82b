"""What holds for whatever hypothesis thinks of: input building, text to ids and back, the parsers, the sampler."""

import gzip
import json
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from batches import collate
from cli import UserError
from decoding import draw, filtered_probabilities
from dialogs import read_dataset
from helpers import IDS, make_split
from inputs import Instances, build_prefix, truncate
from options import Decoding
from turns import Dialog, Utterance
from utils import DialogTokenizer, learn_bpe
from words import detokenize, spacy_words

settings.register_profile(
    "same every time, however slow",
    derandomize=True,
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("same every time, however slow")

# ------------------------------------------------------------------------------------------------------------
# Input building
# ------------------------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, 80), max_size=12)
sentences = st.lists(tokens, max_size=6)
candidates = st.lists(tokens, min_size=1, max_size=4)
dialogs = st.lists(
    st.tuples(sentences, st.lists(st.tuples(sentences, candidates), min_size=1, max_size=3)), min_size=1, max_size=3
)
limits = st.integers(4, 120)


@given(sentences, sentences, st.integers(0, 40), limits)
def test_what_is_cut_is_as_little_as_can_be(persona, history, reply, limit):
    kept_persona, kept_history, room = truncate(persona, history, reply, limit)
    prefix, types = build_prefix(kept_persona, kept_history, IDS)
    assert len(prefix) + room + 1 <= limit
    assert 1 <= room or room == reply == 0

    assert kept_persona == persona[: len(kept_persona)]
    if kept_persona != persona:  # nor would its next sentence have gone in beside the newest utterance
        beside = [*persona[: len(kept_persona) + 1], *history[-1:]]
        assert 3 + sum(map(len, beside)) + len(history[-1:]) + reply > limit

    whole = [token for utterance in history for token in utterance]
    kept = [token for utterance in kept_history for token in utterance]
    assert kept == whole[len(whole) - len(kept) :]
    assert kept_history[1:] == history[len(history) - len(kept_history) :][1:]
    full, n = len(prefix) + reply + 1, len(kept_history)
    if n and kept_history[0] != history[-n]:
        assert full == limit and not kept_persona  # it was cut no further than needed, and after the persona
    elif n < len(history):  # nor would the one before have gone in: the last one in part, others whole
        dropped = len(history[-n - 1])
        assert full + 1 + (dropped if n else min(dropped, 1)) > limit
        assert n or not kept_persona
    assert room == reply or not kept_history and not kept_persona  # a reply is cut only where nothing else is left


@given(dialogs, st.integers(0, 3), st.integers(0, 5), st.integers(1, 3), limits)
def test_instances_fit_and_speakers_alternate(dialogs, max_history, num_candidates, permutations, limit):
    split = make_split(dialogs)
    instances = Instances(split, IDS, max_history, limit, num_candidates, permutations)
    lengths = instances.lengths()
    for index in range(len(instances)):
        instance, utterance = instances[index], index % len(split)
        row = max(map(len, instance.candidates))
        assert len(instance.prefix) + row <= limit
        assert len(instance.prefix) == len(instance.token_types)
        assert (instance.prefix[0], instance.prefix[-1]) == (IDS.bos, IDS.speaker1)
        assert all(reply[-1] == IDS.eos for reply in instance.candidates)
        given_replies = [split.ids(string) for string in split.candidates[utterance]][-num_candidates:]
        assert all(
            reply[:-1] == full[: len(reply) - 1] for reply, full in zip(instance.candidates, given_replies, strict=True)
        )
        starts = [at for at, token in enumerate(instance.prefix) if token in (IDS.speaker1, IDS.speaker2)]
        speakers = [instance.prefix[at] for at in starts]
        assert len(speakers) <= 2 * max_history + 2
        assert all(one != other for one, other in zip(speakers, speakers[1:], strict=False))
        for start, end in zip([0, *starts], [*starts, len(instance.prefix)], strict=True):
            speaker = instance.prefix[start] if start else IDS.speaker1
            assert instance.token_types[start:end] == [speaker] * (end - start)
        if lengths[utterance] < limit and num_candidates == 0:  # with a token to spare, for an empty reply
            assert len(instance.prefix) + row == lengths[utterance]  # what fits is whole


@given(dialogs, st.integers(0, 3), limits)
def test_a_batch_is_its_rows_side_by_side(dialogs, max_history, limit):
    instances = list(Instances(make_split(dialogs), IDS, max_history, limit))
    together = collate(instances, IDS)
    height, width = together.input_ids.shape
    assert width == max(len(i.prefix) + sum(map(len, i.candidates)) for i in instances)
    paddings = {"input_ids": IDS.pad, "token_types": IDS.pad, "positions": 0, "segments": -1, "forks": 0}
    positions, labels = [], []
    for row, instance in enumerate(instances):
        alone = collate([instance], IDS)
        for name, padding in paddings.items():
            expected, found = getattr(alone, name)[0].tolist(), getattr(together, name)[row].tolist()
            assert found == expected + [padding] * (len(found) - len(expected))
        assert together.n_candidates[row] == len(instance.candidates)
        positions += [row * width + position for position in alone.lm_positions.tolist()]
        labels += alone.lm_labels.tolist()
        for n, reply in enumerate(instance.candidates, 1):  # a candidate read out of the packed row
            own = together.segments[row] == n
            assert together.input_ids[row][own].tolist() == reply
            start = len(instance.prefix)
            assert together.positions[row][own].tolist() == list(range(start, start + len(reply)))
            assert together.input_ids.flatten()[together.ends[row, n - 1]] == IDS.eos
    assert together.lm_positions.tolist() == positions
    assert together.lm_labels.tolist() == labels == [t for i in instances for t in i.candidates[-1]]
    assert {getattr(together, field.name).dtype for field in fields(together)} == {torch.int64}
    assert height == len(instances)


# ------------------------------------------------------------------------------------------------------------
# Text to ids and back
# ------------------------------------------------------------------------------------------------------------

LEARNED = DialogTokenizer(learn_bpe(["hello there, how are you <eos>?", "你好 🙂"] * 3, 300))
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WORDS = [
    "i",
    "you",
    "we",
    "it",
    "don't",
    "can't",
    "i'm",
    "she's",
    "they'll",
    "we've",
    "fine",
    "dogs",
    "3",
    "ok",
    "well",
]
ends = st.sampled_from([".", "?", "!", "..."])
sentence = st.builds(
    lambda parts, end: ", ".join(" ".join(words) for words in parts) + end,
    st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4), min_size=1, max_size=3),
    ends,
)


@given(any_text)
def test_a_learned_vocabulary_gives_back_any_text(text):
    (ids,) = LEARNED.encode([text])
    assert LEARNED.hf.decode(ids, clean_up_tokenization_spaces=False) == text
    assert not LEARNED.ids.all & set(ids)


@given(st.lists(any_text, max_size=4))
def test_texts_do_not_change_each_others_ids(texts):
    assert LEARNED.encode(texts) == [LEARNED.encode([text])[0] for text in texts]


@given(st.lists(sentence, min_size=1, max_size=3).map(" ".join))
def test_english_that_spacy_has_cut_is_put_together_again(text):
    assert detokenize(spacy_words(text)) == text


@given(any_text, st.lists(st.integers(0, len(LEARNED) - 1), max_size=30))
def test_what_is_shown_of_a_reply_stays(text, more):
    (ids,) = LEARNED.encode([text])
    whole = LEARNED.decode(ids + more)
    assert "\x1b" not in whole and not set(map(chr, range(32))) & set(whole)
    for end in range(len(ids) + 1):
        assert whole.startswith(LEARNED.decode_start(ids[:end]).rstrip()) or LEARNED.hf.decode(ids + more).count(
            "\ufffd"
        )


@given(any_text)
def test_detokenizing_is_done_after_one_time(text):
    once = detokenize(text)
    assert once == once.strip() and "  " not in once


# ------------------------------------------------------------------------------------------------------------
# Parsers
# ------------------------------------------------------------------------------------------------------------

FOLDER = tempfile.TemporaryDirectory()


def parse(data: bytes) -> dict[str, list[Dialog]]:
    path = Path(FOLDER.name, "dataset")
    path.write_bytes(data)
    return {split: list(dialogs) for split, dialogs in read_dataset(str(path)).items()}


keys = st.sampled_from(
    [
        "personality",
        "utterances",
        "dialog",
        "messages",
        "history",
        "candidates",
        "role",
        "content",
        "train",
        "valid",
        "x",
    ]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["user", "assistant", "system"])
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
pieces = st.sampled_from(
    [b"1 ", b"2 ", b"\t", b"|", b"\n", b"\r\n", b"your persona: ", b"\xff", b"\0", b"__SILENCE__", b"\\n"]
)
files = st.one_of(
    st.binary(max_size=200),
    st.lists(pieces | st.binary(max_size=5), max_size=20).map(lambda parts: b"1 " + b"".join(parts)),
    values.map(lambda value: json.dumps(value).encode()),
    st.lists(values, max_size=4).map(lambda lines: "\n".join(map(json.dumps, lines)).encode()),
    values.map(lambda value: json.dumps(value).encode()[:-2]),
)


@given(files, st.booleans())
@settings(max_examples=400)
def test_any_bytes_give_dialogs_or_one_line(data, zipped):
    try:
        splits = parse(gzip.compress(data, 1) if zipped else data)
    except UserError as error:
        assert FOLDER.name in str(error) and len(str(error).splitlines()) <= 1
        return
    for dialog in (dialog for split in splits.values() for dialog in split):
        for utterance in dialog.utterances:
            assert utterance.candidates and all(
                type(text) is str for text in [*utterance.history, *utterance.candidates]
            )


# Text that every format can hold: ParlAI strips it, and cuts at tabs, bars and line ends.
line = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp", "Zs"], exclude_characters="|\\"), min_size=1, max_size=20
)
text = st.lists(line, min_size=1, max_size=3).map(" ".join).filter(lambda text: text != "__SILENCE__")
turns = st.lists(text, min_size=1, max_size=4).map(lambda texts: texts[: len(texts) // 2 * 2])
dialog = st.tuples(st.lists(text, max_size=3), turns).filter(lambda dialog: dialog[1])


def parlai(persona: list[str], turns: list[str]) -> str:
    lines = [f"your persona: {sentence}" for sentence in persona]
    lines += [f"{said}\t{reply}" for said, reply in zip(turns[::2], turns[1::2], strict=True)]
    return "".join(f"{number} {line}\n" for number, line in enumerate(lines, 1))


@given(st.lists(dialog, min_size=1, max_size=4))
def test_a_dialog_is_the_same_in_every_format(dialogs):
    expected = [
        Dialog(persona, [Utterance(turns[:i], [turns[i]]) for i in range(1, len(turns), 2)])
        for persona, turns in dialogs
    ]
    records = [
        {
            "personality": d.personality,
            "utterances": [{"history": u.history, "candidates": u.candidates} for u in d.utterances],
        }
        for d in expected
    ]
    plain = [{"personality": persona, "dialog": turns} for persona, turns in dialogs]
    chats = [
        {
            "personality": persona,
            "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)],
        }
        for persona, turns in dialogs
    ]
    for lines in (records, plain, chats):
        assert parse("\n".join(map(json.dumps, lines)).encode()) == {"all": expected}
        assert parse(json.dumps(lines, indent=1, ensure_ascii=False).encode()) == {"all": expected}
        assert parse(json.dumps({"train": lines, "valid": lines[:1]}).encode()) == {
            "train": expected,
            "valid": expected[:1],
        }
    assert parse("".join(parlai(*dialog) for dialog in dialogs).encode()) == {"all": expected}


# ------------------------------------------------------------------------------------------------------------
# The sampler
# ------------------------------------------------------------------------------------------------------------

logits = st.lists(st.floats(-8, 8, width=32) | st.sampled_from([0.0, 1.0, 1.0]), min_size=1, max_size=12)
decodings = st.builds(
    Decoding,
    temperature=st.floats(0.05, 4),
    top_k=st.integers(-1, 14),
    top_p=st.floats(1e-6, 1) | st.sampled_from([0.0, -1.0]),
)


def plainly_filtered(logits: list[float], decoding: Decoding) -> np.ndarray:
    """What `filtered_probabilities` says, in the words of Holtzman et al., one token at a time, in float64."""
    scaled = np.array(logits, np.float32).astype(np.float64) / decoding.temperature
    if decoding.top_k > 0:
        least = sorted(scaled)[::-1][: decoding.top_k][-1]
        scaled = np.where(scaled < least, -np.inf, scaled)
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    if 0 < decoding.top_p < 1:
        total, nucleus = 0.0, []
        for token in np.argsort(-weights, kind="stable"):
            if total >= decoding.top_p:
                break
            nucleus.append(token)
            total += weights[token]
        weights = np.array([weight if token in nucleus else 0.0 for token, weight in enumerate(weights)])
    return weights / weights.sum()


@given(logits, decodings)
def test_probabilities_are_those_of_the_plain_definition(logits, decoding):
    found = filtered_probabilities(torch.tensor([logits]), decoding)[0].double().numpy()
    expected = plainly_filtered(logits, decoding)
    assert found.sum() == pytest.approx(1, abs=1e-5)
    # Of equal tokens any may be in the nucleus, and rounding decides where its probability is reached to a hair.
    ordered, plain = np.sort(found), np.sort(expected)
    reached = np.cumsum(np.sort(np.exp((np.array(logits) - max(logits)) / decoding.temperature))[::-1])
    assume(0 >= decoding.top_p or np.abs(reached / reached[-1] - decoding.top_p).min() > 1e-5)
    np.testing.assert_allclose(ordered, plain, atol=2e-5)
    assert logits[int(found.argmax())] == pytest.approx(max(logits), abs=1e-6)


@given(st.lists(logits, min_size=1, max_size=4), decodings, st.integers(0, 2**31))
def test_what_is_drawn_can_be_and_does_not_depend_on_its_batch(rows, decoding, seed):
    width = max(map(len, rows))
    table = torch.tensor([row + [-float("inf")] * (width - len(row)) for row in rows])
    probabilities = filtered_probabilities(table, decoding)
    drawn = draw(probabilities, [torch.Generator().manual_seed(seed + n) for n in range(len(rows))])
    assert (probabilities.gather(1, drawn[:, None]) > 0).all()
    for n, token in enumerate(drawn.tolist()):
        assert token == draw(probabilities[n : n + 1], [torch.Generator().manual_seed(seed + n)]).item()
