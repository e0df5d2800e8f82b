"""Dataset files: every format, every mistake in one, distractors, the validation split and the cache."""

import gzip
import json
import logging
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import dialogs
from cli import UserError
from dialogs import Dialogs, read_dataset
from helpers import DIALOG, TURNS, CountingTokenizer, json_lines, read
from splits import Ragged, Split, with_distractors
from turns import Dialog, Message, Utterance, replies_of
from utils import load_dataset


def dialog_lines(count: int, reply: str = "a{}") -> str:
    """JSON lines of that many dialogs: q0 a0, q1 a1, ..."""
    return json_lines(*({"personality": [f"p{i}"], "dialog": [f"q{i}", reply.format(i)]} for i in range(count)))


def texts(split: Split, name: str, index: int) -> list[str]:
    return [split.text(string) for string in getattr(split, name)[index]]


# ------------------------------------------------------------------------------------------------------------
# Formats
# ------------------------------------------------------------------------------------------------------------

RECORD = {
    "personality": ["i like cats.", "é"],
    "utterances": [
        {"history": ["hi"], "candidates": ["hello"]},
        {"history": ["hi", "hello", "bye"], "candidates": ["see you"]},
    ],
}
MESSAGES = {
    "messages": [
        {"role": "system", "content": "i like cats. é"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "see you"},
    ]
}
PARLAI = "1 your persona: i like cats.\n2 your persona: é\n3 hi\thello\n4 bye\tsee you\n"

FORMATS = {
    "personachat": (json.dumps({"train": [RECORD, RECORD], "valid": [RECORD]}), {"train": 2, "valid": 1}),
    "personachat-indented": (json.dumps({"train": [RECORD, RECORD], "valid": []}, indent=1), {"train": 2, "valid": 0}),
    "list": (json.dumps([RECORD, TURNS, MESSAGES], ensure_ascii=False), {"all": 3}),
    "lines-of-utterances": (json_lines(RECORD, RECORD), {"all": 2}),
    "lines-of-turns": (json_lines(TURNS, TURNS), {"all": 2}),
    "lines-of-messages": (json_lines(MESSAGES, MESSAGES), {"all": 2}),
    "lines-of-each": (json_lines(TURNS, MESSAGES, RECORD), {"all": 3}),
    "one-line": (json_lines(TURNS).strip(), {"all": 1}),
    "parlai": (PARLAI * 2, {"all": 2}),
}
WRAPPINGS = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "bom": lambda data: b"\xef\xbb\xbf" + data,
    "crlf": lambda data: data.replace(b"\n", b"\r\n"),
    "blank-lines": lambda data: b"\n \n" + data + b"\n\n",
    "all": lambda data: gzip.compress(b"\xef\xbb\xbf\r\n" + data.replace(b"\n", b"\r\n")),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_told_apart_by_content(name, wrapping, write):
    content, counts = FORMATS[name]
    found = read(write(WRAPPINGS[wrapping](content.encode())))
    assert found == {split: [DIALOG] * count for split, count in counts.items()}


@pytest.mark.parametrize(
    ("speakers", "expected"),
    [
        ("", []),
        ("u", []),
        ("ub", [(["0"], "1")]),
        ("b", [([], "0")]),
        ("bub", [([], "0"), (["0", "1"], "2")]),
        ("uub", [(["0 1"], "2")]),
        ("ubbu", [(["0"], "1 2")]),
        ("bbuub", [([], "0 1"), (["0 1", "2 3"], "4")]),
    ],
)
def test_turns_of_one_speaker_in_a_row_are_one_utterance(speakers, expected):
    messages = [Message({"u": "user", "b": "assistant"}[speaker], str(i)) for i, speaker in enumerate(speakers)]
    assert replies_of(messages) == [Utterance(history, [reply]) for history, reply in expected]


def test_messages_system_texts_are_cut_into_persona_sentences(write):
    messages = [
        {"role": "system", "content": "I am Bo. I'm 30!\nDo I like tea?  Yes"},
        {"role": "user", "content": "hi"},
        {"role": "user", "content": "there"},
        {"role": "assistant", "content": "hello"},
        {"role": "developer", "content": "I own 1.5 boats."},
    ]
    (dialog,) = read(write(json_lines({"personality": ["first"], "messages": messages})))["all"]
    assert dialog.personality == ["first", "I am Bo.", "I'm 30!", "Do I like tea?", "Yes", "I own 1.5 boats."]
    assert dialog.utterances == [Utterance(["hi there"], ["hello"])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("1 __SILENCE__\thello\n2 hi\tbye\n", [([], ["hello"]), (["hello", "hi"], ["bye"])], id="silence"),
        pytest.param("1 hi\tgold\t\tx|gold|y\n", [(["hi"], ["x", "y", "gold"])], id="gold-reply-moved-last"),
        pytest.param("1 hi\tgold\t\tx|y\n", [(["hi"], ["x", "y", "gold"])], id="gold-reply-added"),
        pytest.param("1 hi\tgold\t1.0\tgold|x\n", [(["hi"], ["x", "gold"])], id="reward"),
        pytest.param("1 hi\tgold\t\t\n", [(["hi"], ["gold"])], id="no-candidates"),
        pytest.param("1 one\\ntwo\tgold\n", [(["one\ntwo"], ["gold"])], id="line-break-in-a-text"),
        pytest.param("1 hi\thello\n2 bye\n", [(["hi"], ["hello"])], id="last-turn-without-a-reply"),
        pytest.param("1 lost\n2 turns\n1 hi\thello\n", [(["hi"], ["hello"])], id="dialog-without-a-reply"),
        # Speakers alternate backwards from the reply, so two turns of the other person must be one utterance.
        pytest.param("1 hi\n2 you there?\tyes\n", [(["hi you there?"], ["yes"])], id="turn-without-a-reply"),
    ],
)
def test_parlai_turns(text, expected, write):
    (dialog,) = read(write(text))["all"]
    assert dialog.utterances == [Utterance(*utterance) for utterance in expected]


def test_parlai_begins_a_dialog_where_numbers_fall_back_and_keeps_the_bots_persona_only(write):
    text = (
        "1 your persona: i am bo.\n2 partner's persona: i am al.\n3 hi\thello\n"
        "1 partner's persona: i am cy.\n2 your persona: i am di.\n3 hey\tyo\n"
        "1 good day\tgood night\n1 one\ttwo\n"
    )
    assert read(write(text))["all"] == [
        Dialog(["i am bo."], [Utterance(["hi"], ["hello"])]),
        Dialog(["i am di."], [Utterance(["hey"], ["yo"])]),
        Dialog([], [Utterance(["good day"], ["good night"])]),
        Dialog([], [Utterance(["one"], ["two"])]),
    ]


def test_personas_of_all_splits_are_read_without_the_empty_ones(write):
    path = write(json.dumps({"train": [RECORD, {"dialog": ["a", "b"]}], "valid": [RECORD | {"personality": ["x"]}]}))
    assert Dialogs(path).personas == [["i like cats.", "é"], ["x"]]


def test_a_dataset_without_personas_says_so(write):
    with pytest.raises(UserError, match="holds no persona; pass --personality"):
        Dialogs(write(json_lines({"dialog": ["a", "b"]}))).personas  # noqa: B018


# ------------------------------------------------------------------------------------------------------------
# Mistakes: file, line or JSON path, what was expected, what was found
# ------------------------------------------------------------------------------------------------------------

GOOD = json_lines(TURNS)


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        pytest.param("hello there", ":", "begins with b'hello there'; expected PersonaChat JSON", id="prose"),
        pytest.param("", " is empty", "expected PersonaChat JSON", id="empty"),
        pytest.param(" \n\n", ":", "begins with b''; expected", id="blank"),
        pytest.param(gzip.compress(b""), ":", "begins with b''; expected", id="empty-gzip"),
        pytest.param("\ufeff{}".encode("utf-16"), ":", "expected PersonaChat JSON", id="utf-16"),
        pytest.param('[]\n{"test": []}', ":", "JSON is malformed: trailing characters", id="more-than-one"),
        pytest.param("{}", ":", "has the keys (none), expected train and valid", id="empty-object"),
        pytest.param('{"train": 3}', ", $.train:", "Expected `array`, got `int`", id="split-not-a-list"),
        pytest.param("[1]", ", $[0]:", "Expected `object | array`, got `int`", id="dialog-not-an-object"),
        pytest.param("[{}]", ", $[0]:", "one of the keys utterances, dialog or messages", id="no-dialog"),
        pytest.param(
            json.dumps({"train": [RECORD], "valid": [RECORD, RECORD | {"personality": 3}]}),
            ", $.valid[1]:",
            "Expected `array`, got `int` - at `$.personality`",
            id="persona-not-a-list",
        ),
        pytest.param(
            '{"train": [{"personality": [], "utterances": [{"history": []}]}]}',
            ", $.train[0]:",
            "missing required field `candidates` - at `$.utterances[0]`",
            id="no-candidates",
        ),
        pytest.param(
            '[{"utterances": [{"history": [], "candidates": ["a"]}, {"history": [], "candidates": []}]}]',
            ", $[0]:",
            "Expected `array` of length >= 1 - at `$.utterances[1].candidates`",
            id="empty-candidates",
        ),
        pytest.param(json.dumps({"train": [RECORD]})[:-9], ":", "Input data was truncated", id="truncated-json"),
        pytest.param(
            GOOD + '{"dialog": ["x", 3]}\n',
            ", line 2:",
            "Expected `str | object`, got `int` - at `$.dialog[1]`",
            id="line-with-a-wrong-type",
        ),
        pytest.param(
            GOOD + "\n\n" + '{"dialog": ["x"\n' + GOOD,
            ", line 4:",
            "Input data was truncated",
            id="truncated-line-behind-blank-ones",
        ),
        pytest.param(GOOD + "1\n", ", line 2:", "Expected `object | array`, got `int`", id="line-not-an-object"),
        pytest.param(
            '{"personality": ["x"], "lines": ["a", "b"]}\n' + GOOD,
            ", line 1:",
            "has the keys personality, lines; a dialog needs one of the keys utterances, dialog or messages",
            id="first-line-with-a-wrong-key",
        ),
        pytest.param(
            GOOD + '{"messages": [{"role": "user"}]}',
            ", line 2:",
            "a message has the keys role, expected role and content - at `$.messages[0]`",
            id="no-content",
        ),
        pytest.param(GOOD.encode() + b'{"dialog": ["\xff", "x"]}', ", line 2:", "0xff", id="line-not-utf-8"),
        pytest.param(b'{"train": [{"dialog": ["\xff", "x"]}]}', ", $.train[0]:", "0xff", id="json-not-utf-8"),
        pytest.param(b"1 hi\thello\n2 \xff\tx\n", ", line 2:", "not UTF-8", id="parlai-not-utf-8"),
        pytest.param(
            "1 hi\thello\n\nfoo\tbar\n",
            ", line 3:",
            "expected a line number first, found 'foo",
            id="parlai-without-a-number",
        ),
    ],
)
def test_a_wrong_file_is_one_clear_line(content, where, what, write):
    path = write(content)
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(path + where)
    assert what in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("names", "expected", "said"),
    [
        (["train.jsonl", "valid.jsonl"], {"train": ["train.jsonl"], "valid": ["valid.jsonl"]}, None),
        (
            ["data/dev.json", "data/train.json", "data/train.gz"],
            None,
            "holds data/dev.json, data/train.gz, data/train.json;",
        ),
        (
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "README.md"],
            {"train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]},
            None,
        ),
        (["chats.jsonl"], {"all": ["chats.jsonl"]}, None),
        (["a.jsonl", "b.jsonl"], None, "holds a.jsonl, b.jsonl; expected one file for each split"),
        (["notes.txt", "train.jsonl"], {"train": ["train.jsonl"]}, "notes.txt are not"),
        (
            ["test.jsonl", "train.jsonl", "valid.jsonl"],
            {"train": ["train.jsonl"], "valid": ["valid.jsonl"]},
            "test are not",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_folder_is_read_where_it_holds_a_file_for_each_split(names, expected, said, tmp_path, caplog):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"dialog": [name, "hello"]}) + "\n")
    if expected is None:
        with pytest.raises(UserError, match=re.escape(said)):
            read_dataset(str(tmp_path))
        return
    splits = read_dataset(str(tmp_path))
    found = {split: [dialog.turns[0] for dialog in dialogs] for split, dialogs in splits.items()}
    assert found == expected
    assert (said or "") in caplog.text and bool(said) == bool(caplog.text)


def test_a_missing_file_a_folder_and_a_cut_gzip_are_named(tmp_path, write):
    with pytest.raises(UserError, match=re.escape(f"no such dataset: {tmp_path}/absent; pass --dataset_path")):
        read(str(tmp_path / "absent"))
    with pytest.raises(
        UserError, match=re.escape(f"the folder {tmp_path} holds (none); expected one file for each split")
    ):
        read(str(tmp_path))
    path = write(gzip.compress(GOOD.encode() * 9)[:-12])
    with pytest.raises(UserError, match=re.escape(f"cannot read {path}: ")):
        read(path)


# ------------------------------------------------------------------------------------------------------------
# Distractors
# ------------------------------------------------------------------------------------------------------------


def load(path: str, cache: Path, tokenizer: CountingTokenizer | None = None, valid: str = "") -> dict[str, Split]:
    return load_dataset(Dialogs(path, valid), tokenizer or CountingTokenizer(), str(cache), progress=False)


# 10 of 100 dialogs are held out: the other 90 replies are enough for 19 distractors, and the 10 for 9.
@pytest.mark.parametrize(("split", "replies", "candidates"), [("train", 90, 20), ("valid", 10, 10)])
def test_distractors_are_other_gold_replies_and_distinct(split, replies, candidates, write, tmp_path):
    loaded = load(write(dialog_lines(100)), tmp_path / "cache.bin")[split]
    assert len(loaded) == replies
    pool = {texts(loaded, "candidates", i)[-1] for i in range(replies)}
    for i in range(replies):
        (question,), found = texts(loaded, "history", i), texts(loaded, "candidates", i)
        assert found[-1] == question.replace("q", "a")
        assert len(found) == len(set(found)) == candidates
        assert set(found) <= pool


def test_distractors_are_the_same_every_time_and_differ_between_utterances(write, tmp_path):
    path = write(dialog_lines(100))
    first, again = (load(path, tmp_path / name)["train"] for name in ("one.bin", "two.bin"))
    drawn = [texts(first, "candidates", i) for i in range(len(first))]
    assert drawn == [texts(again, "candidates", i) for i in range(len(again))]
    assert len({tuple(found[:-1]) for found in drawn}) == len(drawn)


@pytest.mark.parametrize("replies", [1, 2, 3, 19, 20, 21, 75, 76, 77])
def test_distractors_from_pools_of_every_size(replies):
    golds = np.arange(replies, dtype=np.int32).repeat(2)  # every reply is given twice
    found = with_distractors(Ragged(np.arange(len(golds) + 1), golds))
    rows = [found[i] for i in range(len(golds))]
    assert [row[-1] for row in rows] == golds.tolist()
    assert {len(row) for row in rows} == {min(replies - 1, 19) + 1}
    assert all(len(set(row.tolist())) == len(row) for row in rows)


def test_candidates_that_are_given_are_kept():
    # Of four utterances the first and the last have candidates: 5 6 7 and 8 9. Gold replies: 7 1 2 9.
    found = with_distractors(Ragged(np.array([0, 3, 4, 5, 7]), np.array([5, 6, 7, 1, 2, 8, 9], np.int32)))
    assert found.offsets.tolist() == [0, 3, 7, 11, 13]
    rows = [found[i].tolist() for i in range(4)]
    assert (rows[0], rows[3]) == ([5, 6, 7], [8, 9])
    assert (sorted(rows[1][:-1]), rows[1][-1]) == ([2, 7, 9], 1)
    assert (sorted(rows[2][:-1]), rows[2][-1]) == ([1, 7, 9], 2)


# ------------------------------------------------------------------------------------------------------------
# The validation split
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dialogs", "held_out"), [(2, 1), (9, 1), (30, 3), (99, 9)])
def test_a_tenth_of_the_dialogs_is_held_out_whole(dialogs, held_out, write, tmp_path):
    record = '{{"dialog": ["a{0}", "b{0}", "c{0}", "d{0}"]}}\n'
    path = write("".join(record.format(i) for i in range(dialogs)))
    found = {}
    for cache in ("one", "two"):  # the same dialogs every time
        loaded = load(path, tmp_path / cache)
        found[cache] = {
            name: [texts(split, "history", i)[0] for i in range(len(split))] for name, split in loaded.items()
        }
    assert found["one"] == found["two"]
    train, valid = found["one"]["train"], found["one"]["valid"]
    assert (len(train), len(valid)) == (2 * (dialogs - held_out), 2 * held_out)
    assert not set(train) & set(valid)


def test_at_most_500_dialogs_are_held_out(write):
    splits = Dialogs(write(dialog_lines(6000))).splits
    assert {name: len(dialogs) for name, dialogs in splits.items()} == {"train": 5500, "valid": 500}


def test_a_validation_split_that_is_there_is_kept(write):
    path = write(json.dumps({"valid": [RECORD], "train": [TURNS] * 20}))
    assert {name: len(list(dialogs)) for name, dialogs in Dialogs(path).splits.items()} == {
        "train": 20,
        "valid": 1,
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (json.dumps({"train": [RECORD] * 3, "valid": [RECORD]}), 1),
        (json.dumps({"train": [RECORD] * 3}), 3),
        (json_lines(RECORD, RECORD), 2),
    ],
)
def test_a_validation_file_of_its_own(content, expected, write):
    train, valid = write(dialog_lines(20)), write(content, "valid")
    splits = {name: list(dialogs) for name, dialogs in Dialogs(train, valid).splits.items()}
    assert splits["valid"] == [DIALOG] * expected
    assert len(splits["train"]) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dialog_lines(1), "holds 1 dialog; expected one to train on and one to validate on, or --valid_path"),
        ("[]", "holds 0 dialog"),
        (json.dumps({"train": [RECORD], "valid": []}), "holds no reply"),
        (json.dumps({"train": [RECORD], "valid": [{"dialog": ["hi"]}]}), "holds no reply"),
    ],
)
def test_too_little_to_validate_on(content, message, write, tmp_path):
    with pytest.raises(UserError, match=message):
        load(write(content), tmp_path / "cache.bin")


def test_what_is_held_out_is_parsed_and_told_once(write, tmp_path, caplog, monkeypatch):
    parsed, parse = [], read_dataset
    monkeypatch.setattr(dialogs, "read_dataset", lambda name: parsed.append(name) or parse(name))
    path = write(dialog_lines(20))
    with caplog.at_level(logging.INFO, logger="improvedflend"):
        dataset = Dialogs(path)
        assert not parsed
        texts = set(dataset.training_texts())
        splits = load_dataset(dataset, CountingTokenizer(), str(tmp_path / "cache.bin"), progress=False)
        assert texts.isdisjoint(splits["valid"].history_texts(0))
    told = [f"{path} has no validation split: 2 of its 20 dialogs are held out for it"]
    assert (parsed, caplog.messages[:-1]) == ([path], told)
    assert "tokenised" in caplog.messages[-1]


def test_a_tokenised_dataset_is_not_parsed(write, tmp_path, monkeypatch):
    path, valid = write(dialog_lines(20)), write(json_lines(TURNS), "valid")
    first = contents(load(path, tmp_path / "cache.bin", valid=valid))
    monkeypatch.setattr(dialogs, "read_dataset", lambda name: pytest.fail(f"parsed {name}"))
    assert contents(load(path, tmp_path / "cache.bin", valid=valid)) == first


def test_validation_data_alone(write, tmp_path):
    path = write(json_lines(TURNS))
    assert Dialogs(None, path).digest == ("", Dialogs(path).digest[0])
    splits = load_dataset(Dialogs(None, path), CountingTokenizer(), str(tmp_path / "cache.bin"), progress=False)
    assert {name: len(split) for name, split in splits.items()} == {"train": 0, "valid": 2}


@pytest.mark.parametrize(
    ("content", "is_valid_path", "whole", "split"),
    [
        (dialog_lines(20), False, False, "held out"),
        (dialog_lines(20), False, True, "all"),
        (dialog_lines(20), True, True, "all"),
        (json.dumps({"training": [TURNS]}), False, True, "training"),
        (json.dumps({"train": [TURNS], "dev": [TURNS]}), True, True, "dev"),
    ],
)
def test_it_is_known_where_the_validation_split_is_from(content, is_valid_path, whole, split, write):
    path = write(content)
    assert Dialogs(*((None, path) if is_valid_path else (path, "")), whole=whole).valid_source == (path, split)


def test_a_vocabulary_is_learned_from_the_training_split_alone(write):
    path = write(json.dumps({"train": [TURNS], "valid": [{"personality": ["secret"], "dialog": ["x", "y"]}]}))
    assert set(Dialogs(path).training_texts()) == {"i like cats.", "é", "hi", "hello", "bye", "see you"}


# ------------------------------------------------------------------------------------------------------------
# The cache
# ------------------------------------------------------------------------------------------------------------


def cache_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock")


def contents(splits: dict[str, Split]) -> dict[tuple[str, int, str], list[tuple[str, list[int]]]]:
    """Every list of a dataset by split, utterance and name, as texts and their ids."""
    return {
        (name, i, part): [(split.text(s), split.ids(s)) for s in getattr(split, part)[index]]
        for name, split in splits.items()
        for i in range(len(split))
        for part, index in (("persona", split.dialogs[i]), ("history", i), ("candidates", i))
    }


def test_every_distinct_text_is_tokenised_once_and_never_again(write, tmp_path):
    path = write(
        json.dumps({"train": [RECORD, TURNS], "valid": [RECORD, {"personality": [""], "dialog": ["bye", "hi"]}]})
    )
    tokenizer = CountingTokenizer()
    first = contents(load(path, tmp_path / "cache" / "of.bin", tokenizer))
    assert sorted(tokenizer.seen) == sorted(["i like cats.", "é", "hi", "hello", "bye", "see you", ""])
    again = contents(load(path, tmp_path / "cache" / "of.bin", tokenizer))
    assert len(tokenizer.seen) == 7
    assert first == again
    hi, hello, bye = ("hi", [104, 105]), ("hello", [104, 101, 108, 108, 111]), ("bye", [98, 121, 101])
    assert first["train", 3, "persona"][1] == ("é", [233])
    assert first["valid", 1, "history"] == [hi, hello, bye]
    assert (first["valid", 2, "persona"], first["valid", 2, "history"]) == ([("", [])], [bye])
    assert first["valid", 2, "candidates"][-1] == hi
    (file,) = cache_files(tmp_path / "cache")  # and no temporary file is left
    assert re.fullmatch(r"of_[0-9a-f]{12}\.bin", file.name)


def test_datasets_models_and_contents_do_not_evict_each_other(write, tmp_path):
    one, two = write(dialog_lines(3), "one"), write(dialog_lines(3, "b{}"), "two")
    tokenizer, other = CountingTokenizer(), CountingTokenizer("other")
    cache = tmp_path / "cache" / "of.bin"
    cases = [(one, tokenizer, ""), (two, tokenizer, ""), (one, other, ""), (one, tokenizer, two)]
    first = [contents(load(path, cache, t, valid)) for path, t, valid in cases]
    assert len(cache_files(tmp_path / "cache")) == 4
    seen = len(tokenizer.seen), len(other.seen)
    assert [contents(load(path, cache, t, valid)) for path, t, valid in cases] == first
    assert (len(tokenizer.seen), len(other.seen)) == seen
    write(dialog_lines(3, "c{}"), "one")  # the same path with another content
    load(one, cache, tokenizer)
    assert "c0" in tokenizer.seen


def test_a_cache_may_be_read_by_whom_new_files_may_be(write, tmp_path):
    (tmp_path / "other").touch()
    load(write(dialog_lines(3)), tmp_path / "cache" / "of.bin")
    (file,) = cache_files(tmp_path / "cache")
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


class Unpickled:
    """Leaves a mark where it is unpickled."""

    mark = "unpickled"

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


def header_of(**entries) -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(64)


DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "a-byte-short": lambda data: data[:-1],
    "last-byte-changed": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "first-token-changed": lambda data: data.replace(token := np.int32(ord("p")).tobytes(), bytes(len(token)), 1),
    "a-pickle": lambda data: pickle.dumps({"train": [1, 2], "x": Unpickled()}),
    "text": lambda data: b"nothing of the kind",
    "zeros": lambda data: bytes(1000),
    "no-key": lambda data: header_of(tokens={"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}),
    "unknown-type": lambda data: header_of(
        tokens={"dtype": "F8", "shape": [1], "data_offsets": [0, 4]}, __metadata__={"key": "", "checksum": ""}
    ),
    "header-is-a-list": lambda data: (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_built_anew_with_a_warning(damage, write, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, tokenizer, cache = write(dialog_lines(3)), CountingTokenizer(), tmp_path / "cache" / "of.bin"
    first = contents(load(path, cache, tokenizer))
    (file,) = cache_files(cache.parent)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="improvedflend"):
        again = contents(load(path, cache, tokenizer))
    assert [str(file) in message and "it is built anew" in message for message in caplog.messages] == [True]
    assert len(tokenizer.seen) == 2 * 9
    assert again == first
    assert contents(load(path, cache, tokenizer)) == first  # and what was built anew is whole
    assert (len(tokenizer.seen), len(caplog.messages)) == (2 * 9, 1)
    assert not (tmp_path / Unpickled.mark).exists()


def test_a_cache_of_another_dataset_under_this_ones_name_is_built_anew(write, tmp_path, caplog):
    one, two = write(dialog_lines(3), "one"), write(dialog_lines(3, "b{}"), "two")
    load(one, tmp_path / "cache" / "of.bin")
    (other,) = cache_files(tmp_path / "cache")
    expected = contents(load(two, tmp_path / "cache" / "of.bin"))
    (mine,) = set(cache_files(tmp_path / "cache")) - {other}
    mine.write_bytes(other.read_bytes())
    tokenizer = CountingTokenizer()
    assert contents(load(two, tmp_path / "cache" / "of.bin", tokenizer)) == expected
    assert "b0" in tokenizer.seen
    assert "does not match its key" in caplog.text


@pytest.mark.parametrize("cache", ["", "file/cache.bin"])
def test_a_cache_that_cannot_be_written_is_an_error_of_the_user(cache, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("", "file")
    with pytest.raises(UserError):
        load_dataset(Dialogs(write(dialog_lines(3))), CountingTokenizer(), cache, progress=False)


def test_what_a_killed_process_left_beside_the_cache_goes(write, tmp_path):
    """Where it is of this cache; another one may be written at this moment."""
    path, cache = write(dialog_lines(3)), tmp_path / "cache" / "of.bin"
    load(path, cache)
    (file,) = cache_files(cache.parent)
    mine, other = (file.with_name(f".saving-{name}.x") for name in (file.name, "other.bin"))
    mine.mkdir(), other.mkdir()
    load(path, cache)
    assert (mine.exists(), other.exists()) == (False, True)


def test_of_two_at_once_one_tokenises(write, tmp_path, lock_asked):
    class Patient(CountingTokenizer):
        def encode(self, texts: list[str]) -> list[list[int]]:
            for _ in range(2):  # until the other one waits
                lock_asked.acquire()
            return super().encode(texts)

    path, tokenizers = write(dialog_lines(3)), [Patient(), Patient()]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda tokenizer: contents(load(path, tmp_path / "cache.bin", tokenizer)), tokenizers)
    assert sorted(len(tokenizer.seen) for tokenizer in tokenizers) == [0, 9]
    assert first == second
    assert len(list(tmp_path.glob("cache_*.bin"))) == 1
