"""What a run folder tells a stranger: its curves as a picture, and a model card that the hub understands."""

import math
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from runs import parse_record

CARD = """\
# {name}

A persona-grounded dialogue model: give it a few sentences about who it is, and it talks as that person. It was
trained from `{model}` on {dataset} with ImprovedFlend, by the method of TransferTransfo
([arXiv 1901.08149](https://arxiv.org/abs/1901.08149)): one transformer with a language-modelling head, which writes
the reply, and a multiple-choice head, which tells the real reply from distractors.

It says what sounds likely, not what is true.

## Training

```bash
{command}
```

The epoch in bold is the one whose weights are here. The loss is the mean over the epoch's steps; Hits@1 (how often
the real reply scores best of all its candidates) and perplexity per token are those of the validation split.

{table}

![Training and validation curves](curves.png)

## Talking to it

With the toolkit, `.` being this folder (or its name on the hub):

```bash
python interact.py --model_checkpoint . --personality "i like cats." --personality "i live in rome."
```

{recipe}
| token | what it means |
| --- | --- |
| `<bos>` | begins the persona; the sentences of the persona follow, as `<speaker1>`'s |
| `<speaker2>` | begins an utterance of the person who talks to the model |
| `<speaker1>` | begins an utterance of the model; the last one begins the reply |
| `<eos>` | ends the reply; the multiple-choice head reads it |
| `<pad>` | fills up a batch |
"""
# How to use a checkpoint without the toolkit: one with token types, one that has none, one without a chat template,
# and an adapter alone.
TOKEN_TYPES = """\
In plain transformers. Every token has a second embedding, added to its own: that of its speaker.{cut}

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".").eval()
embed, bot, person = model.get_input_embeddings(), "<speaker1>", "<speaker2>"
tokens, speakers = [], []
for speaker, text in [(bot, "<bos>i like cats."), (person, "<speaker2>do you have a pet ?"), (bot, "<speaker1>")]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens, speakers = tokens + ids, speakers + tokenizer.convert_tokens_to_ids([speaker]) * len(ids)
reply = []
while len(reply) < 20 and not set(reply) & set(tokenizer.all_special_ids):
    with torch.no_grad():
        hidden = embed(torch.tensor([tokens + reply])) + embed(torch.tensor([speakers + speakers[-1:] * len(reply)]))
        reply.append(model(inputs_embeds=hidden).logits[0, -1].argmax().item())
print(tokenizer.decode(reply, skip_special_tokens=True))
```
"""
PLAIN = """\
In plain transformers, with the persona as the system message:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".").eval()
messages = [{"role": "system", "content": "i like cats."}, {"role": "user", "content": "do you have a pet ?"}]
row = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
reply = model.generate(**row, max_new_tokens=20, do_sample=False)[0, row["input_ids"].shape[1] :]
print(tokenizer.decode(reply, skip_special_tokens=True))
```

The chat template gives the tokens that the model was trained on: they were compared on the first replies of
the validation split. So engines that read it serve this folder as it is:

```bash
vllm serve .
transformers serve            # and ask for this folder as the model
mlx_lm.server --model .
```

For llama.cpp and Ollama (models of the Llama, Mistral, Qwen, Gemma and GPT-2 kinds), with the toolkit:

```bash
python export.py . --gguf q8_0 --personality "i like cats."
llama-server -m model-q8_0.gguf
ollama create my-model -f Modelfile && ollama run my-model
```
"""
NO_TEMPLATE = """\
There is no chat template: none gives the tokens that the model was trained on, for its tokenizer joins or changes what
stands beside special tokens. The rows are those of this table.
"""
ADAPTER_ALONE = """\
This folder holds an adapter alone, in `adapter/`. The toolkit merges it into its base model whenever it loads this
folder; other programs need the merged model, which `--lora_save both` writes. The rows are those of this table.
"""
SPACY = """ This model learned from
text cut as spaCy cuts it (`do n't`), which the toolkit does too; its tokenizer alone cuts otherwise (`don ' t`)."""


def recipe(tokenizer, adapter_alone: bool) -> str:
    """How to use a checkpoint with this tokenizer without the toolkit, for its card."""
    if adapter_alone:
        return ADAPTER_ALONE
    if tokenizer.ids.token_types:
        return TOKEN_TYPES.format(cut=SPACY if tokenizer.pre_tokenizer == "spacy" else "")
    return PLAIN if tokenizer.hf.chat_template else NO_TEMPLATE


def read_log(folder: Path) -> tuple[list[dict], list[dict]]:
    """The records of steps whose loss is a number, and those of validations, from `log.jsonl` in a run folder."""
    lines = (folder / "log.jsonl").read_bytes().splitlines()
    records = list(filter(None, map(parse_record, lines)))
    steps = [record for record in records if math.isfinite(record.get("loss", math.nan))]
    return steps, [record for record in records if "nll" in record]


def running_mean(values: list[float], window: int) -> np.ndarray:
    """For each value, the mean of it and of those before it, at most `window` in all."""
    sums, ends = np.cumsum([0.0, *values]), np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_curves(path: Path, steps: list[dict], validations: list[dict]) -> None:
    """Training losses and validation figures over steps, as a PNG."""
    import matplotlib  # heavy, like the hub's below: only where a run ends an epoch
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # a user's own settings may ask for what is not installed, such as LaTeX
    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    losses, hits, perplexity = figure.subplots(1, 3, sharex=True)
    numbers = [record["step"] for record in steps]
    for name, what, colour in (("lm_loss", "language modelling", "C0"), ("mc_loss", "multiple choice", "C1")):
        values = [record[name] for record in steps]
        losses.plot(numbers, values, colour, alpha=0.25, linewidth=0.8)
        # A step's own loss is noise around the trend, so draw a mean over a twentieth of the run too.
        losses.plot(numbers, running_mean(values, max(1, len(steps) // 20)), colour, label=what)
    losses.legend()
    numbers = [record["step"] for record in validations]
    hits.plot(numbers, [100 * record["hits@1"] for record in validations], "C2o-")
    perplexity.plot(numbers, [record["token_ppl"] for record in validations], "C3o-")
    titles = ("training loss", "validation Hits@1 (%)", "validation perplexity per token")
    for axes, title in zip((losses, hits, perplexity), titles, strict=True):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(path)


def results_table(steps: list[dict], validations: list[dict], kept: dict) -> str:
    """A row for each validation; the one of `kept` in bold."""
    rows = ["| epoch | steps | loss | Hits@1 | perplexity |", "| --- | --- | --- | --- | --- |"]
    for record in validations:
        epoch = record["epoch"] if record["step"] else 0
        losses = [record["loss"] for record in steps if record["epoch"] == epoch]
        loss = f"{sum(losses) / len(losses):.3f}" if losses else "-"
        cells = [epoch, record["step"], loss, f"{100 * record['hits@1']:.1f} %", f"{record['token_ppl']:.2f}"]
        mark = "**" if record is kept else ""
        rows.append("| " + " | ".join(f"{mark}{cell}{mark}" for cell in cells) + " |")
    return "\n".join(rows)


def describe(
    partial: Path,
    folder: Path,
    best: tuple[float, float] | None,
    settings,
    command: str,
    tokenizer,
) -> None:
    """Write `curves.png` and the model card `README.md` of a run folder, from its log.

    Args:
        partial: the folder to write them to.
        best: Hits@1 and -nll of the epoch whose weights the run folder gets or keeps; None: the last validation's.
        settings: train.py's; `base_model` is the hub's id of what training started from, "" where it has none.
        command: that trains such a model.
        tokenizer: the model's, with a chat template where one gives its rows.
    """
    from huggingface_hub import EvalResult, ModelCardData

    steps, validations = read_log(folder)
    same = [record for record in validations if best and (record["hits@1"], -record["nll"]) == tuple(best)]
    kept = same[0] if same else validations[-1]
    draw_curves(partial / "curves.png", steps, validations)
    dataset = Path(urlsplit(settings.dataset_path).path).name or "PersonaChat"
    task = {"task_type": "text-generation", "dataset_type": dataset.lower(), "dataset_name": dataset}
    results = []
    for kind, name, value in (
        ("accuracy", "Hits@1", round(kept["hits@1"], 4)),
        ("perplexity", "perplexity per token", round(kept["token_ppl"], 2)),
    ):
        if math.isfinite(value):
            result = {"metric_type": kind, "metric_name": name, "metric_value": value}
            results.append(EvalResult(**task, dataset_split="validation", **result))
    about = ModelCardData(
        model_name=folder.name,
        library_name="transformers",
        pipeline_tag="text-generation",
        language=None if settings.dataset_path else "en",  # of other data it is not known
        base_model=settings.base_model or None,
        tags=["dialogue", "persona-chat", "transfertransfo"],
        eval_results=results,
    )
    text = CARD.format(
        name=folder.name,
        model=settings.model,
        dataset=dataset,
        command=command,
        table=results_table(steps, validations, kept),
        recipe=recipe(tokenizer, settings.lora_save == "adapter"),
    )
    (partial / "README.md").write_text(f"---\n{about.to_yaml()}\n---\n\n{text}", encoding="utf-8")
