"""Make a plain checkpoint a GGUF file and a Modelfile, for llama.cpp and Ollama."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import UserError, log, run_script
from configs import load_config
from files import typed_path, whole_files
from gguf_file import ARCHITECTURES, FILE_TYPES, write_gguf
from inputs import utterances_shown
from loading import load_model
from model_files import ModelFiles, decoding_defaults, find_model, find_run
from options import Decoding, Parser, Settings, option
from utils import DialogTokenizer, load_tokenizer

# The rows of template.py in Go's language, which Ollama has in place of Jinja. System messages are in .Messages too.
TEMPLATE = (
    "<bos>{{ .System }}{{ range $i, $_ := .Messages }}"
    '{{ if and (ne .Role "system")SHOWN }}'
    '{{ if eq .Role "assistant" }}<speaker1>{{ else }}<speaker2>{{ end }}{{ .Content }}{{ end }}{{ end }}<speaker1>'
)


@dataclass(frozen=True)
class ExportSettings(Settings):
    """Options of export.py."""

    model: str = ""
    gguf: str = option("q8_0", "how the weights are stored", choices=tuple(FILE_TYPES))
    personality: list[str] | None = option(None, "a sentence of the Modelfile's persona; can be repeated")

    def __post_init__(self):
        super().__post_init__()
        if any('"""' in sentence for sentence in self.personality or ()):
            raise UserError('--personality: found """, which would end a text in a Modelfile; leave it out')


def check_plain(files: ModelFiles, tokenizer: DialogTokenizer) -> None:
    """Refuse a model that no other engine can run as it was trained.

    Raises:
        UserError: it says what to train instead.
    """
    config, instead = load_config(files), "train another base model: python train.py --model smollm2"
    if config.model_type not in ARCHITECTURES:
        kinds = ", ".join(ARCHITECTURES)
        raise UserError(f"{files.folder} is a {config.model_type} model; expected one of {kinds}; {instead}")
    if not tokenizer.fine_tuned:
        raise UserError(
            f"{files.folder} was not fine-tuned on dialogs; train it first: python train.py --model {files.folder}"
        )
    if tokenizer.ids.token_types:
        raise UserError(
            f"{files.folder} has token types: to each token's embedding that of its speaker is added, which no other "
            "engine does; train one without: python train.py --no_token_types"
        )
    if not tokenizer.hf.chat_template:
        raise UserError(
            f"{files.folder} has no chat template, as none gives the tokens that it was trained on; {instead}"
        )
    for name, expected in ARCHITECTURES[config.model_type][1].items():
        if getattr(config, name) != expected:
            raise UserError(
                f"{files.folder}/config.json: {name} is {getattr(config, name)}, but {expected} in llama.cpp; {instead}"
            )


def modelfile(gguf: str, limit: int, max_history: int, decoding: Decoding, persona: list[str]) -> str:
    """What `ollama create` reads: the model's file, its rows as a template, how replies are drawn, and the persona.

    Args:
        limit: tokens that the model takes at once.
    """
    parameters = {name: getattr(decoding, name) for name in ("temperature", "top_k", "min_p")}
    # Ollama's own defaults are more tokens than some models take, and 1.1.
    parameters |= {"num_ctx": limit, "repeat_penalty": decoding.repetition_penalty}
    parameters["top_p"] = decoding.top_p if decoding.top_p > 0 else 1.0  # 0 is off here, the likeliest token there
    shown = ""
    if max_history != -1:
        shown = f" (le (len (slice $.Messages $i)) {utterances_shown(max_history)})"
    template = TEMPLATE.replace("SHOWN", shown)
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    if persona:
        lines.append(f'SYSTEM """{" ".join(persona)}"""')
    return "\n".join(lines) + "\n"


def parse_settings() -> ExportSettings:
    parser = Parser(__doc__, ExportSettings)
    parser.add_argument("model", nargs="?", default="runs/latest", help="run folder, or one with an adapter")
    return ExportSettings.from_args(parser.parse_args())


def find_folder(name: str) -> Path:
    """The folder of a model of one's own. Raises UserError where there is none of that name."""
    folder = typed_path(name)
    if folder.name == "latest":
        return find_run(name)
    if not folder.is_dir():
        raise UserError(f"no such folder: {name}; expected a run folder of train.py, such as runs/latest")
    return folder


def main() -> None:
    settings = parse_settings()
    folder = find_folder(settings.model)
    files = find_model(str(folder))
    tokenizer = load_tokenizer(files)
    check_plain(files, tokenizer)
    model = load_model(files, tokenizer, torch.device("cpu"))
    name, max_history = f"model-{settings.gguf}.gguf", tokenizer.choose_max_history(None)
    decoding = Decoding(**decoding_defaults(files))
    with whole_files(folder) as partial:
        write_gguf(partial / name, model, tokenizer, settings.gguf)
        text = modelfile(name, model.limit, max_history, decoding, settings.personality or [])
        (partial / "Modelfile").write_text(text, encoding="utf-8")
    log.info(f"saved {folder / name} and {folder / 'Modelfile'}; to serve them:")
    gguf, recipe = (shlex.quote(str(folder / file)) for file in (name, "Modelfile"))
    log.info(f"llama-server -m {gguf}\nollama create my-model -f {recipe}")


if __name__ == "__main__":
    run_script(main)
