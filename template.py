"""A chat template that gives the ids of our rows, so that other engines show a model what it was trained on."""

from dataclasses import replace

from cli import log
from inputs import Instances, utterances_shown
from turns import sides_before_reply
from utils import DialogTokenizer

# The system message is the persona. As in `inputs.build_prefix`, utterances follow their speaker, and only a last reply
# ends with <eos>. {shown}: slices of the turns before a reply, and of these with the reply.
TEMPLATE = """\
{{{{- '<bos>' -}}}}
{{%- if messages and messages[0]['role'] == 'system' -%}}
    {{{{- messages[0]['content'] -}}}}
    {{%- set turns = messages[1:] -%}}
{{%- else -%}}
    {{%- set turns = messages -%}}
{{%- endif -%}}
{shown}{{%- for turn in turns -%}}
    {{{{- ('<speaker1>' if turn['role'] == 'assistant' else '<speaker2>') + turn['content'] -}}}}
{{%- endfor -%}}
{{{{- '<speaker1>' if add_generation_prompt else '<eos>' -}}}}
"""
SHOWN = "{{%- set turns = turns[-{before}:] if add_generation_prompt else turns[-{with_reply}:] -%}}\n"
COMPARED = 500  # replies: what a template says of them grows with the square of a long dialog


def chat_template(n_history: int) -> str:
    """A Jinja template of transformers for rows with the last `n_history` utterances before the reply."""
    whole = n_history == utterances_shown(-1)
    return TEMPLATE.format(shown="" if whole else SHOWN.format(before=n_history, with_reply=n_history + 1))


def history_messages(history: list[str]) -> list[dict[str, str]]:
    """A history as messages for a chat template: speakers alternate backwards from the reply, the assistant's."""
    sides = sides_before_reply(len(history))
    return [{"role": side, "content": text} for side, text in zip(sides, history, strict=True)]


def set_template(tokenizer: DialogTokenizer, instances: Instances) -> None:
    """Give a tokenizer the chat template of our rows, or none where no template gives their ids.

    That of a base model would show the fine-tuned one what it has never seen.
    """
    fault = template_fault(tokenizer, instances)
    if fault and not tokenizer.ids.token_types:
        log.info(f"no chat template is written: {fault}")
    tokenizer.hf.chat_template = None if fault else chat_template(instances.n_history)


def template_fault(tokenizer: DialogTokenizer, instances: Instances) -> str:
    """Why no chat template gives the ids of our rows; "" where one does, on the first replies.

    It is tried and not derived: the text of a template is cut into tokens as a whole, and some tokenizers then join
    or change what stands beside our special tokens.
    """
    if tokenizer.ids.token_types:
        return "each token has its speaker's embedding added, which no chat template tells"
    if tokenizer.pre_tokenizer == "spacy":
        return "text is cut into words by spaCy first"
    template, split = chat_template(instances.n_history), instances.split
    whole = replace(instances, limit=10**9)  # templates truncate nothing
    for row in range(min(len(split), COMPARED)):
        history = split.history_texts(row)
        persona = {"role": "system", "content": " ".join(split.persona_texts(row))}
        messages = [persona, *history_messages(history)]
        ids = tokenizer.hf.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=False
        )
        if ids != whole[row].prefix:
            return f"one gives other tokens for the reply to {(history or [''])[-1][:40]!r}"
    return ""
