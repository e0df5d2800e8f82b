"""What people bring: files as other tools write them, each with what is read of it, and what is said to be left out."""

import base64
import json
import logging
import os
import re
import struct
import zlib
from pathlib import Path

import pytest

from cli import UserError
from dialogs import Dialogs, read_dataset
from personas import read_persona

PERSONA = ["i bake bread.", "i live by the sea."]


def lines(*records: dict) -> str:
    return "\n".join(map(json.dumps, records))


def read(path: Path) -> dict[str, list]:
    """Of each split, of each dialog: persona, and history, candidates and further right replies of each utterance."""
    return {
        split: [
            (dialog.personality, [(list(u.history), u.candidates, u.alternatives) for u in dialog.utterances])
            for dialog in dialogs
        ]
        for split, dialogs in read_dataset(str(path)).items()
    }


def chat(role: str, content: str) -> list[dict]:
    return [{role: "user", content: "hi"}, {role: "assistant", content: "hello"}]


HELLO = (["hi"], ["hello"], [])
READ = {
    # ParlAI text
    "labels": ("1 hi\thello|hey there", [([], [(["hi"], ["hello"], ["hey there"])])]),
    "labels and candidates": ("1 hi\thello|hey\t\tno|hey|hello", [([], [(["hi"], ["no", "hello"], ["hey"])])]),
    "the other side is silent": (
        "1 hi\thello\n2 __SILENCE__\tare you there ?",
        [([], [(["hi"], ["hello are you there ?"], [])])],
    ),
    "persona in the first turn": ("1 your persona: i bake.\\nhi\thello", [(["i bake."], [HELLO])]),
    "capitals and spaces": ("1 Your  Persona :  i bake.\n2 hi\thello", [(["i bake."], [HELLO])]),
    "text: and labels:": ("text:hi\tlabels:hello\tepisode_done:True", [([], [HELLO])]),
    # keys
    "persona": (lines({"persona": PERSONA, "dialog": ["hi", "hello"]}), [(PERSONA, [HELLO])]),
    "personas": (lines({"personas": PERSONA, "dialog": ["hi", "hello"]}), [(PERSONA, [HELLO])]),
    "system": (lines({"system": "i bake.", "messages": chat("role", "content")}), [(["i bake."], [HELLO])]),
    "weight 0 is context": (
        lines({"messages": [*chat("role", "content")[:1], {"role": "assistant", "content": "bad", "weight": 0},
                            {"role": "user", "content": "so ?"}, {"role": "assistant", "content": "good"}]}),
        [([], [(["hi", "bad", "so ?"], ["good"], [])])],
    ),
    # messages that are none
    "a lone surrogate": ('{"dialog": ["look \\ud83d", "nice !"]}', [([], [(["look \ufffd"], ["nice !"], [])])]),
    "content parts": (
        lines({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]}, *chat("role", "content")[1:],
        ]}),
        [([], [HELLO])],
    ),
    # datasets that are well known
    "ShareGPT": (
        lines({"conversations": [
            {"from": "system", "value": "i bake."}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"},
        ]}),
        [(["i bake."], [HELLO])],
    ),
    "conversations of roles": (lines({"conversations": chat("role", "content")}), [([], [HELLO])]),
    "prompt and completion": (lines({"prompt": "hi", "completion": "hello"}), [([], [HELLO])]),
    "instruction and output": (lines({"instruction": "hi", "input": "", "output": "hello"}), [([], [HELLO])]),
    "rows of utterances": (
        lines(
            {"conv_id": 1, "personality": PERSONA, "history": ["hi"], "candidates": ["no", "hello"]},
            {"conv_id": 1, "personality": PERSONA, "history": ["hi", "hello", "so ?"], "candidates": ["no", "yes"]},
        ),
        [(PERSONA, [(["hi"], ["no", "hello"], []), (["hi", "hello", "so ?"], ["no", "yes"], [])])],
    ),
    "a table": ("prompt,response\nhi,hello\n", [([], [HELLO])]),
}  # fmt: skip
# What looks like something else, lacks something, or is written in an unusual way.
ODD = {
    "ShareGPT's items": (
        lines({"items": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}),
        [([], [HELLO])],
    ),
    "the lists that numpy prints": (
        "persona,dialog\n\"['i bake.' 'i fish.']\",\"['hi' 'hello']\"\n",
        [(["i bake.", "i fish."], [HELLO])],
    ),
    # texts that look like something else
    "an answer that is JSON": (lines({"prompt": "hi", "completion": '{"a": 1}'}), [([], [(["hi"], ['{"a": 1}'], [])])]),
    "an answer that is a list": (lines({"prompt": "[1, 2]", "completion": "[3]"}), [([], [(["[1, 2]"], ["[3]"], [])])]),
    "a prompt that is Python": (
        lines({"prompt": "[{1: 2}]", "completion": "hello"}),
        [([], [(["[{1: 2}]"], ["hello"], [])])],
    ),
    "numbers": (lines({"instruction": "add", "input": 3, "output": 4}), [([], [(["add\n3"], ["4"], [])])]),
    "a number in a message": (
        lines({"messages": [*chat("role", "content")[:1], {"role": "assistant", "content": 3}]}),
        [([], [(["hi"], ["3"], [])])],
    ),
    "speakers that are true and false": (
        lines({"dialog": [{"speaker": False, "text": "hi"}, {"speaker": True, "text": "hello"}]}),
        [([], [HELLO])],
    ),
    "speakers by the numbers of people": (
        lines({"dialog": [{"speaker_id": 12, "text": "hi"}, {"speaker_id": 7, "text": "hello"}]}),
        [([], [HELLO])],
    ),
    # nothing in a list is nothing
    "a null among turns that alternate": (
        lines({"dialog": ["hi", None, "there", "hello"]}),
        [([], [(["hi there"], ["hello"], [])])],
    ),
    "a null among pairs": (lines({"dialog": [["user", "hi"], None, ["bot", "hello"]]}), [([], [HELLO])]),
    "a null in messages": (
        lines({"messages": [*chat("role", "content")[:1], None, *chat("role", "content")[1:]]}),
        [([], [HELLO])],
    ),
    "a null in a persona": (lines({"persona": ["i bake.", None], "dialog": ["hi", "hello"]}), [(["i bake."], [HELLO])]),
    "a null history": (lines({"history": None, "response": "hello"}), [([], [([], ["hello"], [])])]),
    # what is before a reply
    "a history of messages": (
        lines({"history": chat("role", "content")[:1], "candidates": ["no", "hello"]}),
        [([], [(["hi"], ["no", "hello"], [])])],
    ),
    "a history in one text": (
        lines({"history": "hi\nhello", "prompt": "so ?", "response": "yes"}),
        [([], [HELLO, (["hi", "hello", "so ?"], ["yes"], [])])],
    ),
    "a history before an input": (
        lines({"history": ["hi", "hello"], "input": "so ?", "output": "yes"}),
        [([], [HELLO, (["hi", "hello", "so ?"], ["yes"], [])])],
    ),
    "a persona in the histories": (
        lines({"utterances": [{"history": ["your persona: i bake.\nyour persona: i fish.", "hi"], "reply": "hello"}]}),
        [(["i bake.", "i fish."], [HELLO])],
    ),
    "a context beside an instruction": (
        lines({"instruction": "hi", "context": "at sea", "response": "hello"}),
        [([], [(["hi\nat sea"], ["hello"], [])])],
    ),
    "a context beside messages": (
        lines({"prompt": chat("role", "content")[:1], "context": "at sea", "completion": "hello"}),
        [([], [(["hi\nat sea"], ["hello"], [])])],
    ),
    "preferred messages that hold the prompt": (
        lines({"prompt": "hi", "chosen": chat("role", "content")}),
        [([], [HELLO])],
    ),
    "several answers": (lines({"question": "hi", "answer": ["hello", "hey"]}), [([], [(["hi"], ["hello"], ["hey"])])]),
    # both sides in one object, dialogs that are lists, sides by other names
    "objects of both sides": (
        lines({"conversation": [{"human": "hi", "assistant": "hello"}, {"human": "so ?", "assistant": None}]}),
        [([], [HELLO])],
    ),
    "objects of one side": (lines({"messages": [{"user": "hi"}, {"bot": "hello"}]}), [([], [HELLO])]),
    "XTuner": (
        lines({"conversation": [{"system": "i bake.", "input": "hi", "output": "hello"}]}),
        [(["i bake."], [HELLO])],
    ),
    "a record of both sides": (
        lines({"system": "i bake.", "user": "hi", "assistant": "hello"}),
        [(["i bake."], [HELLO])],
    ),
    "a table of both sides": ("user,assistant\nhi,hello\n", [([], [HELLO])]),
    "a list of messages for each dialog": (json.dumps([chat("role", "content")] * 2), [([], [HELLO])] * 2),
    "a list of texts for each dialog": (json.dumps([["hi", "hello"], ["hi"]]), [([], [HELLO]), ([], [])]),
    "turns of utterances": (lines({"dialog": [{"utterance": "hi"}, {"utterance": "hello"}]}), [([], [HELLO])]),
    "a system that answers": (
        lines({"turns": [{"speaker": "USER", "utterance": "hi"}, {"speaker": "SYSTEM", "utterance": "hello"}]}),
        [([], [HELLO])],
    ),
    "a system that begins": (
        lines({"turns": [["system", "well ?"], ["user", "hi"], ["system", "hello"]]}),
        [([], [([], ["well ?"], []), (["well ?", "hi"], ["hello"], [])])],
    ),
    "Gemini's tuning data": (
        lines({"systemInstruction": {"role": "system", "parts": [{"text": "i bake."}]},
               "contents": [{"role": "user", "parts": [{"text": "hi"}]},
                            {"role": "model", "parts": [{"text": "hello"}]}]}),
        [(["i bake."], [HELLO])],
    ),
    "EmpatheticDialogues": (
        "conv_id,utterance_idx,prompt,speaker_idx,utterance\nc,2,sad,2,hello\nc,1,sad,1,hi\n",
        [([], [HELLO])],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), (READ | ODD).values(), ids=READ | ODD)
def test_is_read(content, expected, tmp_path):
    path = tmp_path / "file"
    path.write_text(content, encoding="utf-8")
    assert read(path) == {"all": expected}


@pytest.mark.parametrize(
    ("names", "held_out"),
    [(["validation"], "validation"), (["val"], "val"), (["dev"], "dev"), (["test"], "test"), (["dev", "test"], "dev")],
)
def test_splits_by_other_names(names, held_out, tmp_path, caplog):
    """One of them is the validation split; of two, the first, and that is said."""
    path = tmp_path / "file.json"
    path.write_text(
        json.dumps({"train": [{"dialog": ["a", "b"]}]} | {name: [{"dialog": [name, "c"]}] for name in names})
    )
    splits = Dialogs(str(path)).splits
    assert [dialog.utterances[0].history[:] for dialog in splits["valid"]] == [[held_out]]
    assert (len(names) == 1) or any(names[1] in message for message in caplog.messages)
    assert Dialogs(str(path)).valid_source == (str(path), held_out)


def test_what_is_left_out_is_counted(tmp_path, caplog):
    path = tmp_path / "chats.jsonl"
    messages = [*chat("role", "content"), {"role": "tool", "content": "12"}, {"role": "assistant", "content": None}]
    path.write_text(lines({"messages": messages}, {"messages": messages, "bot_persona_id": 3}))
    assert [utterances for _, utterances in read(path)["all"]] == [[HELLO]] * 2
    (said,) = [message for message in caplog.messages if "not read" in message]
    assert "role tool (2)" in said and "without text (2)" in said and "bot_persona_id (1)" in said


def test_turns_of_one_chat_on_lines_of_their_own_are_held_out_together(tmp_path):
    rows = [
        {"personality": PERSONA, "utterances": [{"history": history, "candidates": [reply]}]}
        for history, reply in [(["hi"], "hello"), (["hi", "hello", "so ?"], "yes"), (["hey"], "you"), (["yo"], "oh")]
    ]
    path = tmp_path / "transcript.jsonl"
    path.write_text(lines(*rows))
    assert [len(utterances) for _, utterances in read(path)["all"]] == [2, 1, 1]


def test_keys_that_are_not_known_are_named_with_those_that_are(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(lines({"foo": 1, "bar": 2}))
    with pytest.raises(UserError, match="foo.*bar"):
        read(path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("prompt,completion\na,b\nhi,hello,you\n", "line 3: has more cells than there are columns"),
        (lines({"prompt": ["hi", "a"], "completion": ["hello", "b"]}), "got `array` - at `$.completion`"),
        (lines({"dialog": "[{1: 'hi'}]"}), "Expected `str`, got `int`"),
    ],
)
def test_what_would_be_read_wrong_is_an_error(content, line, tmp_path):
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(line)):
        read(path)


@pytest.mark.parametrize(
    ("record", "note"),
    [
        ({"messages": chat("role", "content")[:1]}, "dialogs without a reply to learn (1)"),
        ({"messages": [{"is_bot": False, "text": "hi"}, {"is_bot": True, "text": "hello"}]}, "the key is_bot (2)"),
        ({"prompt": "hi", "chosen": "hello", "rejected": "no"}, "the key rejected (1)"),
        ({"prompt": "hi", "messages": chat("role", "content")}, "the key prompt (1)"),
    ],
)
def test_what_is_lost_is_said(record, note, tmp_path, caplog):
    path = tmp_path / "file.jsonl"
    path.write_text(lines(record))
    read(path)
    assert caplog.messages == [f"warning: {path}: not read: {note}"]


@pytest.mark.parametrize("key", ["bio", "user_persona", "Character Description", "traits", "test_split"])
def test_a_key_that_is_not_read_is_named_once(key, tmp_path, caplog):
    caplog.set_level(logging.INFO, "improvedflend")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = tmp_path / "file.jsonl"
    path.write_text(lines(*[{key: "i bake.", "messages": turns}] * 3))
    read(path)
    assert [message for message in caplog.messages if f"the key {key} (3)" in message] == caplog.messages[:1]


# ------------------------------------------------------------------------------------------------------------
# Personas
# ------------------------------------------------------------------------------------------------------------

CARD = {"spec": "chara_card_v2", "data": {"name": "Bruno", "personality": "kind", "scenario": "a shop"}}
PERSONAS = {
    "lines": ("i bake bread.\n\ni live by the sea.\n", PERSONA),
    "JSON list": (json.dumps(PERSONA), PERSONA),
    "JSON object": (json.dumps({"personality": PERSONA}), PERSONA),
    "Markdown": ("# Bruno\n\n- i bake bread.\n- i live by the sea.\n", PERSONA),
    "YAML": ("personality:\n  - i bake bread.\n  - i live by the sea.\n", PERSONA),
    "a card in YAML": (
        "name: Bruno\ngreeting: |-\n  Hi there!\n  I am: Bruno\n"
        "context: |-\n  {{char}} bakes for {{user}}.\n  i bake bread.\n  i live by the sea.\n",
        ["My name is Bruno.", "Bruno bakes for you.", *PERSONA],
    ),
    "a card in YAML, by other names": (
        "char_name: Bruno\nexample_dialogue: |\n  You: hi\nchar_persona: i bake bread.\n",
        ["My name is Bruno.", "i bake bread."],
    ),
    "Pygmalion's card": (
        json.dumps(
            {"char_name": "Bruno", "char_persona": "i bake bread.", "char_greeting": "hi", "world_scenario": ""}
        ),
        ["My name is Bruno.", "i bake bread."],
    ),
    "a sentence with a colon": ("i bake two things: bread and rolls.\n", ["i bake two things: bread and rolls."]),
    "ParlAI": ("your persona: i bake bread.\nyour persona: i live by the sea.\n", PERSONA),
    "card": (json.dumps(CARD), ["My name is Bruno.", "kind", "a shop"]),
}


@pytest.mark.parametrize(("content", "expected"), PERSONAS.values(), ids=PERSONAS)
def test_persona_file(content, expected, tmp_path):
    path = tmp_path / "persona"
    path.write_text(content)
    assert read_persona(str(path), "--personality_file") == expected


def test_persona_in_a_picture(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    text = b"chara\0" + base64.b64encode(json.dumps(CARD).encode())
    path = tmp_path / "card.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0" * 13) + chunk(b"tEXt", text) + chunk(b"IEND", b""))
    assert read_persona(str(path), "--personality_file") == ["My name is Bruno.", "kind", "a shop"]


def test_a_card_whose_name_is_no_text_is_one_line(tmp_path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"name": ["Bruno"], "description": "{{char}} bakes."}))
    with pytest.raises(UserError, match=re.escape("got `array` - at `$.name`")):
        read_persona(str(path), "--personality_file")


def test_a_persona_in_a_dataset_that_comes_through_a_pipe():
    reader, writer = os.pipe()
    with open(writer, "w") as file:
        file.write(lines({"persona": PERSONA, "dialog": ["hi", "hello"]}))
    try:
        assert read_persona(f"/dev/fd/{reader}", "--personality_file") == PERSONA
    finally:
        os.close(reader)


@pytest.mark.parametrize("content", ["", "\n \n", "[]", "{}"])
def test_persona_file_that_holds_none(content, tmp_path):
    path = tmp_path / "persona"
    path.write_text(content)
    with pytest.raises(UserError, match=str(path)):
        read_persona(str(path), "--personality_file")
