"""A conversation: a persona and its turns, text in, the bot's reply as text out."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from cli import log
from generation import Generation, PrefixCache, Reply
from inputs import build_prefix, truncate, utterances_shown
from model import DialogModel
from options import Decoding
from utils import DialogTokenizer


@dataclass
class Turn:
    text: str | None  # of the other person; None where the bot spoke first
    reply: str
    ids: list[list[int]]  # token ids of both, as the model sees them
    candidates: list[tuple[str, Reply]] = field(default_factory=list)  # distinct replies, best first, the given one too


def token_counts(persona: list[list[int]], history: list[list[int]], begun: list[int]) -> dict[str, int]:
    """Tokens of each part of a prefix, in the order in which they are truncated."""
    *earlier, message = history or [[]]
    return {
        "the earlier messages": sum(map(len, earlier)),
        "the persona": sum(map(len, persona)),
        "the message": len(message),
        "the beginning of the reply": len(begun),
    }


def distinct(replies: list[Reply], decode: Callable[[list[int]], str]) -> dict[str, Reply]:
    """Ranked replies by their text, best first; of those with the same text the best."""
    texts: dict[str, Reply] = {}
    for reply in replies:
        texts.setdefault(decode(reply.tokens), reply)
    return texts


class Conversation:
    """A persona and its turns; what a terminal and a browser share.

    Args:
        persona: sentences, as text.
        max_history: exchanges that the model sees.
        seed: of the replies.
        prefix_cache: prefixes computed before, where conversations share them.
    """

    def __init__(
        self,
        model: DialogModel,
        tokenizer: DialogTokenizer,
        persona: list[str],
        decoding: Decoding,
        max_history: int,
        seed: int,
        prefix_cache: PrefixCache | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.decoding = decoding
        self.persona = persona
        self.n_history = utterances_shown(max_history)
        self.forgotten = 0  # oldest utterances that are not shown any more
        self.turns: list[Turn] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.prefix_cache = prefix_cache or PrefixCache()
        self.truncated: dict[str, tuple[int, int]] = {}  # what of the last prefix did not fit: tokens left out, of all
        self.warned: set[str] = set()  # parts of a prefix that a warning was logged of; conversations may share it

    @property
    def truncation(self) -> str:
        """What of the last prefix did not fit the model, in words; "" where all of it did."""
        if not self.truncated:
            return ""
        parts = [f"{left_out} of the {size} tokens of {name}" for name, (left_out, size) in self.truncated.items()]
        return f"the model takes {self.model.limit} tokens at once; left out: {', '.join(parts)}"

    def warn_of_truncation(self) -> None:
        """Log what of the last prefix did not fit, once of each of its parts."""
        if not self.warned.issuperset(self.truncated):
            log.warning(f"warning: {self.truncation}; a shorter persona leaves more room")
            self.warned.update(self.truncated)

    def record(self) -> dict:
        """Persona and messages, as a dialog to train on."""
        messages = []
        for turn in self.turns:
            if turn.text is not None:
                messages.append({"role": "user", "content": turn.text})
            messages.append({"role": "assistant", "content": turn.reply})
        return {"personality": self.persona, "messages": messages}

    @property
    def history(self) -> list[str]:
        """All utterances, oldest first."""
        return [message["content"] for message in self.record()["messages"]]

    def resume(self, history: list[str]) -> None:
        """Put an earlier conversation, whose last utterance is the bot's, in the place of this one."""
        if len(history) % 2:  # the bot spoke first
            history = [None, *history]
        self.turns = []
        texts, replies = history[::2], history[1::2]
        for text, reply in zip(texts, replies, strict=True):
            utterances = [reply] if text is None else [text, reply]
            ids = self.tokenizer.encode(utterances)
            self.turns.append(Turn(text, reply, ids))

    def recent(self, history: list[list[int]], room: int) -> list[list[int]]:
        """The utterances (token ids) that are shown: the last ones; of a whole history, those that `room` tokens hold.

        A history that is too long is forgotten by quarters of the context. To forget no more than is needed would move
        the beginning of the prefix at each turn, and all keys and values would be computed again.
        """
        if self.n_history < utterances_shown(-1):
            return history[-self.n_history :]
        too_many = sum(len(utterance) + 1 for utterance in history) - room
        quarter = self.model.limit // 4
        to_forget = math.ceil(too_many / quarter) * quarter
        self.forgotten = 0
        for utterance in history[:-1]:  # the message, which is the last, stays
            if to_forget <= 0:
                break
            to_forget -= len(utterance) + 1  # its speaker's token too
            self.forgotten += 1
        return history[self.forgotten :]

    def generation(self, message: list[int], begun: list[int] = ()) -> Generation:
        """The replies to a message, not drawn yet. begun: how they begin, which is not drawn. Both are token ids."""
        limit, speaker = self.model.limit, self.model.ids.speaker1
        history = [utterance for turn in self.turns for utterance in turn.ids]
        history.append(message)
        persona = self.tokenizer.encode_persona(self.persona)  # each time: it may have changed, and takes no time
        whole = token_counts(persona, history[-self.n_history :], begun)
        # A reply gets at most half of what the model takes, and its beginning a quarter: the rest is for what it
        # answers.
        longest = min(self.decoding.max_length, limit // 2)
        begun = begun[-limit // 4 :]
        reply = len(begun) + longest
        beside_history = sum(map(len, persona)) + reply + 3  # <bos>, the reply's speaker, <eos>
        history = self.recent(history, limit - beside_history)
        persona, history, _ = truncate(persona, history, reply, limit)
        shown = token_counts(persona, history, begun)
        self.truncated = {name: (size - shown[name], size) for name, size in whole.items() if shown[name] < size}
        tokens, types = build_prefix(persona, history, self.model.ids)
        tokens += begun
        types += [speaker] * len(begun)
        decoding = replace(self.decoding, max_length=longest)
        return Generation(self.model, [(tokens, types)], decoding, [self.generator], self.prefix_cache)

    def stream(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Say `text`; yields the bot's reply piece by piece, and remembers the turn once it is whole.

        There is a (maybe empty) piece for every token. After each, `stopped` is asked whether the reply ends here;
        one that is stopped before its first word is no turn. The best of several replies is known, and yielded, only
        at the end.
        """
        (message,) = self.tokenizer.encode([text])
        generation = self.generation(message)
        shown = ""
        for (replies,) in generation:
            # Not `decode`: a character may be several tokens, and white space goes before some punctuation.
            start = self.tokenizer.decode_start(replies[0].tokens) if len(replies) == 1 else ""
            yield start[len(shown) :]
            shown = start
            if stopped():  # what is drawn so far is the reply
                break
        (ranked,) = generation.finish()
        candidates = list(distinct(ranked, self.tokenizer.decode).items())
        reply, best = candidates[0]
        if reply or not stopped():
            # The reply's own tokens, not its text's: the prefix cache holds those, and encoding may give others.
            self.turns.append(Turn(text, reply, [message, best.tokens], candidates))
        yield reply[len(shown) :]  # all of the best of several; of one, what `decode_start` held back

    def reply(self, text: str) -> str:
        """Say `text`; the bot's reply."""
        return "".join(self.stream(text))
