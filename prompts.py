"""What a model reads that was never fine-tuned here: persona and history through its own chat template."""

from dataclasses import dataclass, field, replace

import numpy as np

from cli import UserError, explain_errors
from files import typed_path
from inputs import Instances, Prefix
from template import history_messages
from utils import DialogTokenizer, SpecialIds

INSTRUCTIONS = """You are chatting with someone you have just met. This is who you are:
{persona}
Stay in character. Answer with one short, casual sentence."""
PERSONA = "{persona}"  # in instructions: where the sentences of the persona go


def read_instructions(name: str) -> str:
    """The words around the persona from a file, or our own where `name` is empty. Raises UserError."""
    if not name:
        return INSTRUCTIONS
    with explain_errors(f"cannot read --instructions {name}", "expected UTF-8 text", OSError, UnicodeDecodeError):
        text = typed_path(name).read_text(encoding="utf-8").strip()
    if PERSONA not in text:
        raise UserError(f"--instructions {name} holds no {PERSONA}; put it where the persona's sentences belong")
    return text


class ChatTemplate:
    """A tokenizer's chat template, with the special tokens that it was written for.

    Args:
        instructions: the system message, with `{persona}` in it.
    """

    def __init__(self, tokenizer: DialogTokenizer, instructions: str):
        self.tokenizer, self.instructions = tokenizer, instructions
        if not getattr(tokenizer.hf, "chat_template", None):
            raise UserError("--prompt chat: this model has no chat template; leave it out, or use an instruct model")
        if tokenizer.fine_tuned:
            raise UserError("--prompt chat is for models as they were downloaded; this one was fine-tuned, so drop it")
        self.end = self._end_of_reply()

    def _render(self, messages: list[dict[str, str]], to_be_answered: bool = True) -> str:
        return self.tokenizer.hf.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=to_be_answered,
            enable_thinking=False,  # of those that know the word, such as Qwen3's
            **self.tokenizer.own_special,  # templates write bos_token and its like by name
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.hf(text, add_special_tokens=False)["input_ids"]

    def _end_of_reply(self) -> int:
        """The token that ends a reply: the first one after it where it is part of the history."""
        with explain_errors("--prompt chat: the chat template fails", "leave it out"):  # it is somebody's program
            text = self._render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "REPLY"}], False)
        end = self._ids(text.rpartition("REPLY")[2].lstrip(" "))  # some templates put a space before it
        if not end:
            raise UserError("--prompt chat: the chat template does not end its replies; leave it out for this model")
        return end[0]

    def ids(self) -> SpecialIds:
        """The special tokens of a dialog, of which the reply's end is the template's; no token types."""
        ids = self.tokenizer.ids
        return replace(ids, eos=self.end, all=ids.all | {self.end}, token_types=False)

    def _plain(self, text: str) -> str:
        """Text in which no special token can be read: a mark without width parts its first two signs."""
        for token in self.tokenizer.hf.get_added_vocab():
            if len(token) > 1:  # one sign cannot be parted
                text = text.replace(token, f"{token[0]}\u2060{token[1:]}")
        return text

    def prefix(self, persona: list[str], history: list[str]) -> list[int]:
        """The tokens before a reply."""
        system = self.instructions.replace(PERSONA, "\n".join(map(self._plain, persona)))
        texts = list(map(self._plain, history))
        try:
            text = self._render([{"role": "system", "content": system}, *history_messages(texts)])
        except Exception:  # some templates know no system message, and let the user begin
            texts = texts if len(texts) % 2 else texts[1:]
            first = "\n\n".join([system, *texts[:1]])
            text = self._render(history_messages([first, *texts[1:]]))
        return self._ids(text)


@dataclass(eq=False)
class ChatInstances(Instances):
    """Instances whose prefixes are those of a chat template."""

    template: ChatTemplate = field(kw_only=True)

    def prefix(self, index: int, reply: int) -> tuple[Prefix, int]:
        """As of any instance. What does not fit goes in the same order: old messages, then the persona's end."""
        persona = self.split.persona_texts(index)
        history = self.split.history_texts(index)[-self.n_history :]
        reply = min(reply, self.limit // 2)  # the rest is for what it answers
        room = self.limit - reply - 1  # <eos>
        tokens = self.template.prefix(persona, history)
        while len(tokens) > room and (len(history) > 1 or persona):
            if len(history) > 1:
                history = history[1:]
            else:
                persona = persona[:-1]
            tokens = self.template.prefix(persona, history)
        tokens = tokens[-room:]  # of a message that is too long by itself, the end
        return (tokens, [self.ids.speaker1] * len(tokens)), reply

    def lengths(self) -> np.ndarray:
        """As of any instance; the template's own words are counted once, without a persona."""
        return super().lengths() + len(self.template.prefix([], [""]))
