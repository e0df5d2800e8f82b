"""The chat: a conversation's replies, the terminal driven through a pseudo-terminal, and pipes."""

import functools
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import interact
from cli import UserError, printable
from conversation import Conversation
from decoding import Reply, rank_replies, repeating, sample
from dialogs import MAX_MESSAGE, Dialogs, check_message, read_dataset
from generation import PrefixCache, generate_replies
from helpers import run_python
from inputs import build_prefix
from options import Decoding
from terminal import GREEN, History, Prompt, Wrapper, box, coloured, text_width, wrapped
from transcript import SavedChat, Transcript, last_dialog

ROOT = Path(interact.__file__).parent
PERSONA = ["i teach music to children .", "my favorite color is green ."]
MESSAGES = ["hello , how are you ?", "what do you do ?", "i like fish .", "do you like rain ?", "my sister has cats ."]


@pytest.fixture(scope="module")
def loaded(dialog_model, load):
    """`loaded(kind)` is a tiny model and its tokenizer, loaded once."""
    return functools.cache(lambda kind: load(dialog_model(kind)))


@pytest.fixture
def converse(loaded):
    """`converse(kind, max_history=2, prefix_cache=None, **decoding)` is a conversation with a tiny model."""

    def start(kind: str, max_history: int = 2, prefix_cache: PrefixCache | None = None, **decoding) -> Conversation:
        return Conversation(*loaded(kind), PERSONA, Decoding(**decoding), max_history, 1, prefix_cache)

    return start


# ------------------------------------------------------------------------------------------------------------
# The cache that is kept across turns
# ------------------------------------------------------------------------------------------------------------


class NothingKept(PrefixCache):
    """Every prefix is computed whole."""

    def keep(self, *_) -> None:
        pass


@pytest.mark.parametrize("kind", ["openai-gpt", "gpt2", "llama", "qwen3", "gemma2", "opt", "bloom"])
@pytest.mark.parametrize("max_history", [1, 9])
@pytest.mark.parametrize("decoding", [{"no_sample": True}, {"n_replies": 3, "temperature": 1.5}])
def test_kept_cache_gives_the_replies_of_a_whole_computation(converse, kind: str, max_history: int, decoding) -> None:
    kept = converse(kind, max_history, max_length=8, **decoding)
    anew = converse(kind, max_history, NothingKept(), max_length=8, **decoding)
    for message in MESSAGES:
        assert kept.reply(message) == anew.reply(message)
        # The replies of a random model may be alike whatever it saw; their scores are not.
        for (_, one), (_, other) in zip(kept.turns[-1].candidates, anew.turns[-1].candidates, strict=True):
            assert (one.log_likelihood, one.mc_score) == pytest.approx((other.log_likelihood, other.mc_score), abs=1e-4)
    assert len({turn.candidates[0][1].mc_score for turn in kept.turns}) == len(MESSAGES)


@pytest.mark.parametrize("n_replies", [1, 4])
def test_only_the_new_part_of_a_conversation_is_computed(converse, n_replies: int) -> None:
    chat = converse("openai-gpt", max_history=9, max_length=6, n_replies=n_replies)
    widths: list[int] = []
    hook = chat.model.body.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for message in MESSAGES:
        del widths[:]
        chat.reply(message)
        new = len(chat.tokenizer.encode([message])[0]) + 2 + 1  # two speakers, and the last token drawn before
        assert len(chat.turns) == 1 or widths[0] <= new
        # a token at a time, at the end perhaps the last one with the <eos> that is scored
        assert set(widths[1:-1]) == {1} and widths[-1] <= 2 and len(widths) <= 7
    hook.remove()


def test_kept_rows_are_shared_by_beginning_not_by_conversation(converse) -> None:
    shared = PrefixCache(2)
    one = converse("gpt2", 9, shared, no_sample=True, max_length=6)
    two = converse("gpt2", 9, shared, no_sample=True, max_length=6)
    two.persona = ["i love the sea ."]
    alone = converse("gpt2", 9, NothingKept(), no_sample=True, max_length=6)
    alone.persona = two.persona
    for message in MESSAGES:
        one.reply(message)
        assert two.reply(message[::-1]) == alone.reply(message[::-1])
        assert two.turns[-1].candidates[0][1].mc_score == pytest.approx(
            alone.turns[-1].candidates[0][1].mc_score, abs=1e-4
        )
    assert len(shared.rows) == 2


def test_cache_is_not_used_beyond_an_edited_persona_or_an_undone_turn(converse) -> None:
    chat = converse("llama", 9, no_sample=True, max_length=6)
    for message in MESSAGES[:3]:
        chat.reply(message)
    chat.turns.pop()
    chat.persona = ["i love the sea .", *PERSONA]
    anew = converse("llama", 9, NothingKept(), no_sample=True, max_length=6)
    anew.turns, anew.persona = list(chat.turns), chat.persona
    assert chat.reply(MESSAGES[3]) == anew.reply(MESSAGES[3])
    assert chat.turns[-1].candidates[0][1].mc_score == pytest.approx(anew.turns[-1].candidates[0][1].mc_score, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Better replies
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["openai-gpt", "llama", "bloom"])
@torch.no_grad()
def test_scores_are_those_of_the_two_heads(converse, kind: str) -> None:
    chat = converse(kind, n_replies=5, max_length=7, temperature=1.5)
    chat.reply(MESSAGES[0])
    generation = chat.generation(*chat.tokenizer.encode([MESSAGES[1]]))
    for _ in generation:
        pass
    (tokens, types), (replies,) = generation.prefixes[0], generation.finish()
    eos = chat.model.ids.eos
    for reply in replies:
        row = [*tokens, *reply.tokens, eos]
        speakers = [*types, *[chat.model.ids.speaker1] * (len(reply.tokens) + 1)]
        hidden = chat.model.body(
            inputs_embeds=chat.model.embed(torch.tensor([row]), torch.tensor([speakers])), use_cache=False
        )[0][0]
        assert float(chat.model.lm.multiple_choice_head(hidden[-1])) == pytest.approx(reply.mc_score, abs=1e-4)
        likelihoods = chat.model.lm_logits(hidden).log_softmax(-1)
        labels = [*reply.tokens, *[eos] * reply.complete]
        at = torch.arange(len(tokens) - 1, len(tokens) - 1 + len(labels))
        if not reply.complete:  # one that ended did so at any special token
            assert float(likelihoods[at, labels].mean()) == pytest.approx(reply.token_log_likelihood, abs=1e-4)


def test_best_reply_is_given_and_alternatives_are_remembered(converse) -> None:
    chat = converse("openai-gpt", n_replies=8, rerank="mc", max_length=5, temperature=1.5)
    pieces = list(chat.stream(MESSAGES[0]))
    (turn,) = chat.turns
    assert "".join(pieces) == turn.reply == turn.candidates[0][0]
    scores = [reply.mc_score for _, reply in turn.candidates]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    assert len({text for text, _ in turn.candidates}) == len(turn.candidates)


def test_generate_replies_takes_the_best_of_each_prefix(converse) -> None:
    """A row's reply depends on its own prefix and generator, not on what else is in the batch."""
    chat = converse("gpt2")
    ids = chat.model.ids
    encode = chat.tokenizer.encode
    prefixes = [build_prefix(encode(chat.persona), encode(MESSAGES[:n]), ids) for n in (1, 3, 2)]
    decoding = Decoding(n_replies=6, max_length=6, temperature=1.5, min_length=6)

    def generators(seeds: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = generate_replies(chat.model, prefixes, decoding, generators([1, 2, 3]))
    alone = [generate_replies(chat.model, [prefixes[i]], decoding, generators([i + 1]))[0] for i in range(3)]
    assert together == alone
    first = [
        generate_replies(chat.model, [prefixes[i]], replace(decoding, n_replies=1), generators([i + 1]))[0]
        for i in range(3)
    ]
    assert together != first


def test_rank_replies() -> None:
    scores = [(-1.0, 0.5), (-3.0, 2.0), (-0.5, 0.5)]
    a, b, c = (Reply([i], True, 2 * likelihood, score) for i, (likelihood, score) in enumerate(scores))
    assert rank_replies([a, b, c], "mc") == [b, c, a]
    assert rank_replies([a, b, c], "lm") == [c, a, b]
    assert rank_replies([a, b, c], "both") == [c, a, b]
    assert rank_replies([a, replace(b, mc_score=4.0), c], "both")[0].mc_score == 4.0
    assert rank_replies([Reply(log_likelihood=-1.0), Reply(log_likelihood=-0.5)], "lm")[0].mc_score is None


def test_repeating() -> None:
    assert repeating([1, 2, 3, 1, 2, 4], [9, 1, 2], 3) == {3, 4}
    assert repeating([1, 2, 3], [1], 3) == set(), "a sequence is not counted across the start of the reply"
    assert repeating([1, 2], [3, 4, 3], 2) == {4}
    assert repeating([1, 2], [3], 1) == {1, 2, 3}
    assert repeating([7], [1, 1], 3) == set()
    assert repeating([7], [1, 1, 1], 3) == {1}


def sequences(tokens: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def test_no_repeat_ngram_counts_reply_and_history_but_not_the_persona(converse) -> None:
    plain = converse("gpt2", no_sample=True, max_length=20, min_length=20)
    barred = converse("gpt2", no_sample=True, max_length=20, min_length=20, no_repeat_ngram=2)
    for chat in (plain, barred):
        chat.resume(["my sister has two cats", "i like the sea and the sea likes me"])
        chat.reply("i like the sea")
    history = [sequences(ids, 2) for turn in barred.turns for ids in turn.ids]
    own = history.pop()
    assert len(own) == len(set(own)) and not set(own) & {pair for pairs in history for pair in pairs}
    own = sequences(plain.turns[-1].ids[-1], 2)
    assert len(own) > len(set(own)), "the model does not repeat itself, so this test shows nothing"
    # The persona may be said: the model, made to say it, still can.
    generation = barred.generation(*barred.tokenizer.encode(["hi"]))
    persona = [token for sentence in barred.tokenizer.encode(barred.persona) for token in sentence]
    assert not set(sequences(persona, 3)) & set(sequences(generation.rows[0].history(), 3))


def test_repetition_penalty_makes_used_tokens_less_likely(converse) -> None:
    chat = converse("gpt2", repetition_penalty=2.0, no_sample=True)
    used = chat.tokenizer.encode(["i like the sea"])[0]
    (row,) = chat.generation(used).rows
    logits = torch.zeros(1, len(chat.tokenizer))
    logits[0, used[0]], logits[0, used[1]], logits[0, 5] = 3.0, -1.0, 2.0
    assert 5 not in used
    assert sample(logits, [row], chat.decoding, chat.model.ids.all).tolist() == [5]
    assert logits[0, used[0]] == 3.0, "the model's own logits, which scores are made of, are changed"


def test_greedy_decoding_of_several_replies_is_refused() -> None:
    with pytest.raises(UserError, match="n_replies"):
        Decoding(no_sample=True, n_replies=2)
    with pytest.raises(UserError, match="n_replies 5 with num_beams 4"):
        Decoding(num_beams=4, n_replies=5)
    assert Decoding(num_beams=4, no_sample=True, n_replies=4)


# ------------------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------------------


def test_streamed_pieces_are_the_whole_text(converse) -> None:
    """Over real sentences, quotes and brackets: what was shown is never taken back."""
    texts = [
        text
        for dialogs in read_dataset(str(ROOT / "data" / "sample.json")).values()
        for dialog in dialogs
        for text in dialog.personality + [utterance.candidates[-1] for utterance in dialog.utterances]
    ]
    texts = random.Random(0).sample(texts, 150) + [
        "i don't , i 'm , they ' ll , do n ' t . . . can't ! ? 50 %",
        'he said " yes " , ( not no ) and [ so ] on " open',
        "it 's x 'sad n 'to n ' to ' twas ' re",
    ]
    for kind in ("openai-gpt", "gpt2"):
        chat = converse(kind)
        for text in texts:
            ids = chat.tokenizer.encode([text])[0]
            starts = [chat.tokenizer.decode_start(ids[:i]) for i in range(len(ids) + 1)]
            whole = chat.tokenizer.decode(ids)
            assert all(whole.startswith(start) for start in starts), (kind, text)
            if not set(text) & set("\"(['"):
                assert len(starts[-1]) >= len(whole) - 2, "text is held back for no reason"


def test_replies_come_piece_by_piece(converse) -> None:
    chat = converse("gpt2", max_length=12, min_length=12)
    pieces = list(chat.stream(MESSAGES[0]))
    assert len(pieces) == 13 and sum(bool(piece) for piece in pieces) > 3
    assert "".join(pieces) == chat.turns[0].reply


def test_stopped_reply_is_kept_as_far_as_it_came(converse) -> None:
    chat = converse("openai-gpt", max_length=12, min_length=12)
    whole = converse("openai-gpt", max_length=12, min_length=12)
    whole.reply(MESSAGES[0])
    count = iter(range(100))
    "".join(chat.stream(MESSAGES[0], lambda: next(count) == 4))
    assert chat.turns[0].ids[1] == whole.turns[0].ids[1][:5]
    chat.reply(MESSAGES[1])
    assert len(chat.turns) == 2


def test_stopped_before_the_first_word_is_no_turn(converse, monkeypatch) -> None:
    chat = converse("gpt2", max_length=12, min_length=12)
    # as if only the first byte of a character were there
    monkeypatch.setattr(chat.tokenizer, "decode", lambda tokens: "")
    monkeypatch.setattr(chat.tokenizer, "decode_start", lambda tokens: "")
    assert chat.reply(MESSAGES[0]) == "" and len(chat.turns) == 1
    assert "".join(chat.stream(MESSAGES[0], lambda: True)) == ""
    assert len(chat.turns) == 1


@pytest.mark.parametrize("kind", ["openai-gpt", "bloom"])
def test_a_generation_may_be_given_up_taken_up_and_finished_twice(converse, kind: str) -> None:
    """Every way gives the same replies, whose scores do not depend on when they were asked for."""

    def start():
        return converse(kind, n_replies=3, max_length=8, temperature=1.5).generation([50, 51])

    whole, resumed, stopped = start(), start(), start()
    steps = list(whole)
    assert all(reply.mc_score is None for step in steps for reply in step[0])
    next(iter(resumed))
    assert list(resumed) == steps[1:] and list(resumed) == []
    ranked = whole.finish()
    assert ranked == whole.finish() == resumed.finish() and list(whole) == []
    assert sorted(ranked[0], key=whole.replies[0].index) == whole.replies[0]
    next(iter(stopped))
    (replies,) = stopped.finish()
    assert {len(reply.tokens) + reply.complete for reply in replies} == {1} and list(stopped) == []
    assert all(reply.mc_score is not None for reply in start().finish()[0]), "finished before its first token"


def test_the_multiple_choice_head_runs_once_and_only_where_it_chooses(converse) -> None:
    chat, calls = converse("gpt2", max_length=6), []
    hook = chat.model.lm.multiple_choice_head.register_forward_hook(lambda *_: calls.append(1))
    prefix = build_prefix([], [chat.tokenizer.encode(["hi"])[0]], chat.model.ids)
    for n_replies, expected in ((1, 0), (4, 1)):
        decoding = replace(chat.decoding, n_replies=n_replies)
        generate_replies(chat.model, [prefix, prefix], decoding, [torch.Generator() for _ in range(2)])
        assert len(calls) == expected
    hook.remove()


def test_a_message_is_tokenised_once(converse, monkeypatch) -> None:
    chat, texts = converse("gpt2", max_length=4), []
    encode = chat.tokenizer.encode
    monkeypatch.setattr(chat.tokenizer, "encode", lambda batch: texts.extend(batch) or encode(batch))
    chat.reply(MESSAGES[0])
    assert texts.count(MESSAGES[0]) == 1


def test_control_characters_are_not_printed() -> None:
    assert printable("a\x1b[2Jb\x07\x9b1m\u202ec\x00\x7f") == "a[2Jb1mc"
    assert printable("caf\u00e9 \U0001f469\u200d\U0001f373 \u4f60\n") == "caf\u00e9 \U0001f469\u200d\U0001f373 \u4f60\n"


def test_control_characters_of_a_reply_are_stripped(converse) -> None:
    chat = converse("gpt2")
    ids = chat.tokenizer.encode(["a \x1b]0;title\x07 b"])[0]
    assert chat.tokenizer.decode(ids) == "a ]0;title b"


def test_typed_special_tokens_are_text(converse) -> None:
    chat = converse("openai-gpt")
    generation = chat.generation(*chat.tokenizer.encode(["<eos> <speaker1> hi"]))
    tokens = generation.prefixes[0][0]
    assert chat.model.ids.eos not in tokens
    assert tokens.count(chat.model.ids.speaker1) == 1


def test_messages_are_bounded() -> None:
    assert check_message(" a ") == "a"
    with pytest.raises(UserError, match=f"{MAX_MESSAGE + 1} characters.*{MAX_MESSAGE}"):
        check_message("x" * (MAX_MESSAGE + 1))
    with pytest.raises(UserError, match="empty"):
        check_message("  ")


def test_decoding_options_typed_in_the_chat() -> None:
    assert Decoding().changed("temperature", "0.5") == Decoding(temperature=0.5)
    assert Decoding().changed("no_sample", "on") == Decoding(no_sample=True)
    assert Decoding(no_sample=True).changed("no_sample", "off") == Decoding()
    assert Decoding().changed("top_k", "-1").top_k == -1
    for name, text, said in [
        ("temperature", "hot", "number"),
        ("temperature", "", "number"),
        ("top_p", "2", "at most 1"),
        ("no_sample", "maybe", "on or off"),
        ("rerank", "dice", "mc.*lm.*both"),
        ("heat", "1", "temperature"),
        ("temp", "1", "no option"),
    ]:
        with pytest.raises(UserError, match=said):
            Decoding().changed(name, text)
    assert Decoding().changed("n_replies", "8").n_replies == 8


def test_completion() -> None:
    assert interact.completions([], "/re") == ["/reset ", "/retry "]
    assert interact.completions([], "//") == interact.completions([], "he") == []
    assert "temperature " in interact.completions(["/set"], "t")
    assert interact.completions(["/set", "rerank"], "") == ["mc ", "lm ", "both "]
    assert interact.completions(["/persona"], "r") == ["random "]


def test_completion_of_files(tmp_path: Path) -> None:
    (tmp_path / "a1.txt").touch()
    (tmp_path / "a2").mkdir()
    assert interact.completions(["/load"], f"{tmp_path}/a") == [f"{tmp_path}/a1.txt", f"{tmp_path}/a2/"]


def test_persona_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    lines = box("Persona", ["i like cats.", "a long sentence of many more words than fit \x1b[2J."]).splitlines()
    assert "Persona" in lines[0] and all(len(line) <= 30 for line in lines) and "\x1b" not in "".join(lines)
    text = " ".join(line[2:] for line in lines[1:-1])
    assert text == "i like cats. a long sentence of many more words than fit [2J."


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("", 9, [""]),
        ("one two three", 9, ["one two", "three"]),
        ("one two\nthree", 20, ["one two", "three"]),
        ("one  incomprehensibilities", 9, ["one  inco", "mprehensi", "bilities"]),
        ("\u4f60\u597d\u4e16\u754c x", 5, ["\u4f60\u597d", "\u4e16\u754c", "x"]),
        ("cafe\u0301 bar", 4, ["cafe\u0301", "bar"]),
        ("ab cd", 0, ["ab", "cd"]),
    ],
)
def test_words_are_not_broken_in_whatever_pieces_they_come(text: str, width: int, lines: list[str]) -> None:
    assert [line for line in wrapped(text, width) if line or not text] == lines
    wrapper = Wrapper(lambda: max(width, 2))
    streamed = "".join(map(wrapper.feed, text)) + wrapper.finish()
    assert [line.rstrip() for line in streamed.split("\n")] == wrapped(text, width)


def test_persona_box_counts_the_columns_of_wide_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    lines = box("Persona", ["\u6211\u559c\u6b22\u732b" * 5, "cats"]).splitlines()
    assert len(lines) > 4 and all(text_width(line) <= 20 for line in lines)


@pytest.mark.parametrize(
    ("environment", "terminal", "colours"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({}, True, False),
        ({"TERM": "xterm"}, False, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(environment, terminal, colours, monkeypatch) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert coloured("x", GREEN) == ("\x1b[32mx\x1b[0m" if colours else "x")


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        (["hi"], ["hi"]),
        (["one\ntwo\n\nthree"], ["one\ntwo\n\nthree"]),
        (["one\r\ntwo\n/undo\nthree"], ["one\n\ntwo", "/undo", "three"]),
        (["/persona add x\nhi"], ["/persona add x", "hi"]),
        (['"""one', "", '/two"""'], ["one\n\n/two"]),
        (['"""', "/one", '"""'], ["//one"]),
        (['"""one'], ["one"]),
        (['"""one"""', "  "], ["one", ""]),
    ],
)
def test_what_is_one_message(typed: list[str], messages: list[str], monkeypatch) -> None:
    """typed: what input() gives, each a line or several pasted ones, until Ctrl-D."""
    lines = iter(typed)

    def type_next(_: str) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", type_next)
    prompt = Prompt(interact.is_command, interact.completions)
    assert [prompt.message() for _ in messages] == messages
    with pytest.raises(EOFError):
        prompt.message()


# ------------------------------------------------------------------------------------------------------------
# The history of what was typed
# ------------------------------------------------------------------------------------------------------------


def test_history_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    History(path).append("one", "two\nlines", "\u00e9\udc80")
    assert History(path).read() == ["one", "two\nlines", "\u00e9\udc80"]
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    with open(path, "ab") as file:
        file.write(b"\xff\x00\n[1]\n" + b"[" * 100_000 + b'\n"three"\n"fo')
    assert History(path).read() == ["one", "two\nlines", "\u00e9\udc80", "three"]


def test_a_long_history_is_shortened(tmp_path: Path) -> None:
    path = tmp_path / "history"
    History(path).append(*["x" * 1000] * 2000, "last")
    assert len(History(path).read()) == 1000
    assert path.stat().st_size < 2**20 and History(path).read()[-1] == "last"


@pytest.mark.parametrize("place", ["file/history", "folder", "pipe", "loop/history"])
def test_where_no_history_can_be_kept_there_is_none(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    history = History(tmp_path / place)
    history.append("one")
    assert history.read() == [] and History(Path("~/history")).path == Path(os.devnull)


# ------------------------------------------------------------------------------------------------------------
# What is kept
# ------------------------------------------------------------------------------------------------------------


def test_transcript_is_training_data(converse, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"dialog": ["hi", "hello"]}')  # an earlier dialog, without an end of line
    chat = converse("gpt2", max_length=4)
    transcript = Transcript(str(path))
    for message in ["one", "two", "three"]:
        chat.reply(message)
        transcript.add(chat)
    transcript.take_back()
    chat.turns.pop()
    dialogs = list(read_dataset(str(path))["all"])
    assert [len(dialog.utterances) for dialog in dialogs] == [1, 2]  # the turns of one chat are one dialog
    utterance = dialogs[-1].utterances[-1]
    assert [*utterance.history, *utterance.candidates] == chat.history
    assert dialogs[-1].personality == PERSONA
    assert last_dialog(str(path)) == (PERSONA, chat.history)


def test_an_undone_turn_stays_where_another_chat_has_written_after_it(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    one, other = Transcript(str(path)), Transcript(str(path))
    one.add(SimpleNamespace(persona=[], history=["a", "b"]))
    other.add(SimpleNamespace(persona=[], history=["c", "d"]))
    one.take_back()
    assert len(path.read_text().splitlines()) == 2
    other.take_back()
    assert last_dialog(str(path)) == ([], ["a", "b"])


def test_turns_of_one_chat_are_held_out_together(tmp_path: Path) -> None:
    """Also where the persona was changed in it, and where two chats wrote into one transcript by turns."""
    path = tmp_path / "chats.jsonl"
    transcript = Transcript(str(path))
    for turn in range(1, 5):
        for chat in range(9):
            said = [f"{chat} says {number}" for number in range(2 * turn)]
            transcript.add(SimpleNamespace(persona=["i am old ."] * (turn > 2), history=said))
    splits = Dialogs(str(path)).splits
    train, valid = ({each.utterances[-1].history[0] for each in splits[split]} for split in ("train", "valid"))
    assert train and valid and not train & valid


def test_a_saved_chat_is_added_to_a_file_of_chats(tmp_path: Path) -> None:
    path, record = tmp_path / "a.jsonl", {"personality": ["x"], "messages": []}
    path.write_text('{"dialog": ["hi", "hello"]}')
    file = SavedChat(str(path))
    for _ in range(2):
        record["messages"] += [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        file.write(record)
    SavedChat(str(path)).write(record)
    assert [len(dialog.utterances) for dialog in read_dataset(str(path))["all"]] == [1, 2, 2]
    file.write(record)
    assert len(path.read_text().splitlines()) == 4, "another chat was written after it"


@pytest.mark.parametrize(
    ("name", "said"), [("none/a.jsonl", "no such folder: .*none; make"), ("", "not a file"), ("pipe", "not a file")]
)
def test_a_chat_is_saved_in_a_file(name: str, said: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=said):
        SavedChat(str(tmp_path / name))


def test_a_saved_chat_holds_out_its_last_reply(tmp_path: Path) -> None:
    SavedChat(str(tmp_path / "a.jsonl")).write({"dialog": ["hi", "hello", "and you ?", "fine ."]})
    train, valid = (list(dialogs) for dialogs in Dialogs(str(tmp_path / "a.jsonl")).splits.values())
    assert [[each.candidates[-1] for each in dialog.utterances] for dialog in train + valid] == [["hello"], ["fine ."]]


def test_an_alternative_takes_the_place_of_the_reply(converse, tmp_path: Path, capsys) -> None:
    chat = converse("openai-gpt", n_replies=4, max_length=5, temperature=1.5)
    transcript = Transcript(str(tmp_path / "a.jsonl"))
    terminal = interact.TerminalChat(chat, transcript, Dialogs(""))
    with pytest.raises(UserError, match="no reply"):
        terminal.do_candidates("1")
    terminal.say("hello")
    (turn,) = chat.turns
    text, reply = turn.candidates[1]
    terminal.do_candidates("2")
    assert (turn.reply, turn.ids[1]) == (text, reply.tokens) and last_dialog(str(transcript.path))[1] == ["hello", text]
    for number in ("0", "9" * 5000, "x", "-1", "\u00b2"):
        with pytest.raises(UserError, match="expected a number from 1 to"):
            terminal.do_candidates(number)
    chat.reply("and now ?")


def test_transcript_is_not_written_into_another_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("buy milk\n")
    with pytest.raises(UserError, match="something else"):
        Transcript(str(path))
    assert path.read_text() == "buy milk\n"
    with pytest.raises(UserError, match="cannot write"):
        Transcript(str(tmp_path / "none" / "chats.jsonl"))


@pytest.mark.parametrize("dialog", [["hi", "hello", "how are you", "fine"], ["hello", "hi", "how are you"], []])
def test_record_and_resume(converse, tmp_path: Path, dialog: list[str]) -> None:
    chat = converse("gpt2")
    chat.resume(dialog)
    assert chat.history == dialog
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(chat.record()) + "\n")
    assert last_dialog(str(path)) == (PERSONA, dialog)
    generation = chat.generation(*chat.tokenizer.encode(["next"]))
    assert generation.prefixes[0] == build_prefix(
        chat.tokenizer.encode(chat.persona), chat.tokenizer.encode([*dialog, "next"]), chat.model.ids
    )


# ------------------------------------------------------------------------------------------------------------
# The program itself
# ------------------------------------------------------------------------------------------------------------


class Screen:
    """interact.py at a pseudo-terminal."""

    def __init__(self, *args: str | Path, **environment: str):
        import pty

        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background of a shell ignores it
            os.environ.update({"TERM": "dumb", "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""} | environment)
            os.execv(sys.executable, [sys.executable, str(ROOT / "interact.py"), *map(str, args)])
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def read(self) -> bool:
        """Wait for more to be shown, and add it to `text`; whether there was more before the program ended."""
        try:
            new = os.read(self.terminal, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            new = b""
        self.text += new.decode(errors="replace").replace("\r", "")
        return bool(new)

    def until(self, pattern: str) -> str:
        """What is shown up to and with `pattern`; the next call goes on behind it."""
        while not (match := re.search(pattern, self.text)):
            assert self.read(), f"ended without {pattern!r}: {self.text!r}"
        shown, self.text = self.text[: match.end()], self.text[match.end() :]
        return shown

    def say(self, text: str) -> str:
        """Type a line; what is shown before the next prompt."""
        self.type(text + "\n")
        self.until(re.escape(text) + r"\n")
        return self.until(">>> ")[: -len("\n>>> ")]

    def end(self) -> int:
        """The exit status."""
        while self.read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
def test_chat_at_a_terminal(dialog_model, tmp_path: Path) -> None:
    transcript, saved, persona = tmp_path / "chats.jsonl", tmp_path / "saved.jsonl", tmp_path / "persona.txt"
    persona.write_text("i live on a boat .\nmy cat can swim .\n")
    options = ["--model", dialog_model("gpt2"), "--dataset_path", ROOT / "data" / "sample.json", "--max_length", "8"]
    screen = Screen(*options, "--personality", "i like tea .", "--transcript", transcript, "--temperature", "1.5")
    shown = screen.until(">>> ")
    assert re.search(r"─ Persona ─.*\n│ i like tea \.\n╰─", shown) and "/help" in shown

    assert all(command in screen.say("/help") for command in interact.COMMANDS)
    assert "i am tall ." in screen.say("/persona add i am tall .")
    assert re.search(r"no command /dance; there are .*/candidates.*/undo", screen.say("/dance"))
    assert "expected" in screen.say("/persona paint")
    assert "no message yet" in screen.say("/retry")
    assert "no such file" in screen.say(f"/load {tmp_path}/none")

    first = screen.say("hello")
    again = screen.say("/retry")
    assert first and again and first != again
    assert screen.say("/undo") == "Taken back: hello"
    assert transcript.read_bytes() == b""
    slash = screen.say("//etc is a folder")
    assert "no command" not in slash
    assert json.loads(transcript.read_text())["utterances"] == [
        {"history": ["/etc is a folder"], "candidates": [slash]}
    ]

    assert screen.say("/set temperature 0.9") == "temperature 0.9"
    assert "found 'hot'" in screen.say("/set temperature hot")
    assert "min_length" in screen.say("/set heat 1")
    assert "temperature 0.9" in screen.say("/set")
    assert "/set n_replies 8" in screen.say("/candidates")
    screen.say("/set n_replies 4")
    best = screen.say("how are you ?")
    candidates = screen.say("/candidates").splitlines()[1:]
    assert 1 < len(candidates) <= 4
    assert re.fullmatch(r" 1 +-?\d+\.\d\d +-\d+\.\d\d  (.*)", candidates[0]).group(1).strip() == best.strip()

    assert "4 utterances" in screen.say(f"/save {saved}")
    assert "something else" in screen.say(f"/save {persona}")
    assert "Forgotten" in screen.say("/reset")
    assert "my cat can swim ." in screen.say(f"/persona set {persona}")
    sample = {sentence for each in Dialogs(str(ROOT / "data" / "sample.json")).personas for sentence in each}
    drawn = [line[2:] for line in screen.say("/persona random").splitlines()[1:-1]]
    assert drawn and set(drawn) <= sample
    shown = screen.say(f"/load {saved}")
    assert "i am tall ." in shown and "> /etc is a folder" in shown and slash in shown and best in shown

    screen.type("/cand\t")
    screen.until("/candidates ")
    screen.type("\n")
    assert "no reply with alternatives" in screen.until(">>> ")
    screen.type("/quit\n")
    assert screen.end() == 0
    assert len(transcript.read_text().splitlines()) == 2


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
def test_ctrl_c_stops_a_reply_and_clears_the_line_at_the_prompt(make_model, load, tmp_path: Path) -> None:
    model, tokenizer = load(make_model(tmp_path / "base", "llama", max_position_embeddings=12000))
    model.save(tmp_path)
    tokenizer.save(tmp_path)
    long = ["--max_length", "20000", "--min_length", "20000"]
    screen = Screen("--model", tmp_path, "--personality", "i talk .", *long, XDG_STATE_HOME=str(tmp_path / "state"))
    screen.until(">>> ")
    screen.type("hello\n")
    screen.until(r"hello\n.{20}")  # it streams: this is long before the end
    screen.type("\x03")
    assert "^C" not in screen.until(r"\n>>> ")
    assert len(screen.say("/candidates").splitlines()) >= 2
    assert re.search(
        r"last reply: \d+ tokens in .* tokens/s.*\ncontext: \d+ of the model's 12000", screen.say("/stats")
    )
    screen.type("x" * (MAX_MESSAGE + 1) + "\n")  # its echo is wrapped
    screen.until(r"characters; expected at most[^\n]*\n>>> ")
    assert "type something" in screen.say("").lower()
    screen.type("/sta\t")
    screen.until("/stats")  # completed: readline waits for a key, and overlooks a signal that comes earlier
    screen.type(" half a line\x03\n")
    screen.until(r"Ctrl-D or /bye ends the chat\.\n>>> ")
    screen.type("/bye\n")
    assert screen.end() == 0
    assert (
        "Traceback" not in screen.text
        and "half a line" not in (tmp_path / "state/improvedflend/chat_history").read_text()
    )


def test_scripted_chat_has_a_line_for_each_line(dialog_model, tmp_path: Path) -> None:
    """Commands are for terminals: in a pipe every line is text, and only replies are written."""
    transcript = tmp_path / "chats.jsonl"
    options = ["--model", dialog_model("gpt2"), "--personality", "i like tea .", "--n_replies", "3"]
    lines = "hello\n\n/quit\n//x\n"
    options += ["--no_repeat_ngram", "3", "--transcript", transcript]
    ended = run_python("interact.py", *options, input=lines)
    assert ended.returncode == 0, ended.stderr
    replies = ended.stdout.splitlines()
    assert len(replies) == 4 and replies[1] == "" and all(replies[i] for i in (0, 2, 3))
    assert "Persona: i like tea ." in ended.stderr
    histories = [json.loads(line)["utterances"][0]["history"] for line in transcript.read_text().splitlines()]
    assert histories[-1] == ["hello", replies[0], "/quit", replies[2], "//x"]


def test_a_reader_that_leaves_ends_a_scripted_chat_in_silence(dialog_model) -> None:
    command = f"yes hi | {sys.executable} interact.py --model {dialog_model('gpt2')} --personality hi | head -n 2"
    ended = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert len(ended.stdout.splitlines()) == 2 and ended.stderr == "Persona: hi\n"


def test_a_line_too_long_ends_a_scripted_chat(dialog_model) -> None:
    options = ["--model", dialog_model("gpt2"), "--personality", "hi"]
    ended = run_python("interact.py", *options, input="hi\n" + "x" * (MAX_MESSAGE + 1) + "\nhi\n")
    assert ended.returncode == 2 and len(ended.stdout.splitlines()) == 1
    assert f"error: the message has {MAX_MESSAGE + 1} characters" in ended.stderr


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
def test_a_terminal_with_colours(dialog_model, tmp_path: Path) -> None:
    """Bracketed paste, a status line while several replies are drawn, odd bytes, and the history of the chat before."""
    options = ["--model", dialog_model("gpt2"), "--personality", "hi", "--n_replies", "3", "--max_length", "30"]
    screen = Screen(*options, TERM="xterm", XDG_STATE_HOME=str(tmp_path))
    assert "loading" in screen.until(r"\x1b\[32m>>> \x1b\[0m")
    screen.type("\x1b[200~one\rtwo\x1b[201~\n")
    assert "3 replies, of which the best is given: 1 of at most 30 tokens" in screen.until(r"\x1b\[32m>>> \x1b\[0m")
    os.write(screen.terminal, b"\xff\xfe\n")
    screen.until(r"\x1b\[32m>>> \x1b\[0m")
    screen.type("\x04")
    assert screen.end() == 0 and "Traceback" not in screen.text
    assert "one\ntwo" in History(tmp_path / "improvedflend" / "chat_history").read()
    screen = Screen(*options, TERM="dumb", HOME="/proc/none", XDG_STATE_HOME="/proc/none")
    screen.until(">>> ")
    screen.type("three\nfour\n")
    assert "\x1b" not in screen.until(r"\.\.\. four\n(.|\n)*?\n>>> ")
    screen.say("/stats")
    screen.type('"""five\n\x04')
    screen.until(">>> ")
    screen.type("/exit\n")
    assert screen.end() == 0 and "Traceback" not in screen.text


LONG = "like tea " * 80  # more than the tiny model's 128 tokens


@pytest.mark.parametrize(
    ("persona", "messages", "parts"),
    [
        (["i like tea ."], ["hi"], []),
        (["i like tea .", LONG], ["hi", "you ?"], [["persona"]]),
        (["i like tea ."], ["hi", LONG, LONG], [["earlier messages", "persona", "message"]]),
        (
            ["i like tea ."],
            ["hi you " * 9] * 5 + [LONG],
            [["earlier messages"], ["earlier messages", "persona", "message"]],
        ),
    ],
)
@pytest.mark.parametrize("at_terminal", [False, True])
def test_what_does_not_fit_is_said_once_with_numbers(
    persona, messages, parts, at_terminal, converse, monkeypatch, caplog, capsys
) -> None:
    chat = converse("gpt2")
    chat.persona = persona
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\n" for text in messages)))
    if at_terminal:
        interact.TerminalChat(chat, None, Dialogs("")).run()
    else:
        interact.answer_lines(chat, None)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    found = [re.findall(r"(\d+) of the (\d+) tokens of the ([a-z ]+)", warning) for warning in warnings]
    assert [[name for *_, name in each] for each in found] == parts
    assert all(0 < int(left_out) <= int(size) for each in found for left_out, size, _ in each)
    assert all(warning.startswith("warning: the model takes 128 tokens at once; left out: ") for warning in warnings)


def test_a_persona_that_does_not_fit_leaves_the_message(converse) -> None:
    chat = converse("gpt2")
    chat.persona = [LONG]
    messages = chat.tokenizer.encode(["hello you", "what do you do ?"])
    prefixes = [chat.generation(message).prefixes[0][0] for message in messages]
    ids = chat.model.ids
    assert prefixes == [[ids.bos, ids.speaker2, *message, ids.speaker1] for message in messages]
    size = len(chat.tokenizer.encode([LONG])[0])
    assert chat.truncated == {"the persona": (size, size)}


def test_wrong_options_are_one_line(dialog_model) -> None:
    for options in (["--n_replies", "3", "--no_sample"], ["--no_repeat_ngram", "-1"], ["--rerank", "dice"]):
        ended = run_python("interact.py", "--model", dialog_model("gpt2"), "--personality", "hi", *options)
        assert ended.returncode == 2 and ended.stdout == ""
        assert re.fullmatch(r"error: .+\n", ended.stderr)
