"""A plain checkpoint for other engines: a GGUF file, which llama.cpp runs, and a Modelfile for Ollama."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import QuantError, quantize

from cli import Parser, Settings, UserError, log, option, run_script
from files import typed_path, whole_files
from inputs import utterances_shown
from model import HEAD, DialogModel, load_model
from model_files import ModelFiles, find_model, find_run
from utils import DialogTokenizer, load_config, load_tokenizer

# By transformers' model type: llama.cpp's architecture, and the activation function that it has there.
ARCHITECTURES = {
    "gpt2": (MODEL_ARCH.GPT2, "gelu_new"),
    "llama": (MODEL_ARCH.LLAMA, "silu"),
    "mistral": (MODEL_ARCH.LLAMA, "silu"),
    "qwen2": (MODEL_ARCH.QWEN2, "silu"),
    "qwen3": (MODEL_ARCH.QWEN3, "silu"),
    "gemma": (MODEL_ARCH.GEMMA, "gelu_pytorch_tanh"),
}
# By the steps that cut a byte-level BPE's text into words: llama.cpp's name for them. ByteLevel is GPT-2's pattern.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (LLAMA3,): "llama-bpe",
    (LLAMA3.replace("{1,3}", ""),): "qwen2",
}
TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}  # llama.cpp's numbers of these types of files
# The rows of template.py in Go's language, which Ollama has in place of Jinja.
TEMPLATE = (
    '<bos>{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}{{ .Content }}'
    "{{ else if le (len (slice $.Messages $i)) SHOWN }}"
    '{{ if eq .Role "assistant" }}<speaker1>{{ else }}<speaker2>{{ end }}{{ .Content }}{{ end }}{{ end }}<speaker1>'
)


@dataclass(frozen=True)
class ExportSettings(Settings):
    """Options of export.py."""

    model: str = ""
    gguf: str = option("q8_0", "type of the weights in the file", choices=tuple(TYPES))
    personality: list[str] | None = option(None, "a sentence of the Modelfile's persona; can be repeated")

    def __post_init__(self):
        super().__post_init__()
        if any('"""' in sentence for sentence in self.personality or ()):
            raise UserError('--personality: found """, which ends a text in a Modelfile; leave it out')


def check_plain(files: ModelFiles, tokenizer: DialogTokenizer) -> None:
    """Refuse what no file for llama.cpp can be made of.

    Raises:
        UserError: it says what to train instead.
    """
    config, instead = load_config(files), "train another base model: python train.py --model smollm2"
    arch, activation = ARCHITECTURES.get(config.model_type, (None, None))
    if not arch:
        kinds = ", ".join(ARCHITECTURES)
        raise UserError(f"{files.folder} is a {config.model_type} model, expected one of {kinds}; {instead}")
    if not tokenizer.fine_tuned:
        raise UserError(
            f"{files.folder} was not fine-tuned here; train it first: python train.py --model {files.folder}"
        )
    if tokenizer.ids.token_types:
        raise UserError(
            f"{files.folder} has token types: its speakers' embeddings are added to its tokens', which no other "
            "engine does; train one without: python train.py --no_token_types"
        )
    if not tokenizer.hf.chat_template:
        raise UserError(f"{files.folder} has no chat template: none gives the tokens of its training; {instead}")
    found = getattr(config, "hidden_act", None) or config.activation_function
    if found != activation:
        raise UserError(f"{files.folder} has the activation function {found}, expected {activation}; {instead}")


def write_tokenizer(writer: GGUFWriter, tokenizer: DialogTokenizer) -> None:
    """Vocabulary, merges, special tokens and chat template. A text's ids are then those that we give it."""
    backend = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    parts = backend["pre_tokenizer"].get("pretokenizers", [backend["pre_tokenizer"]])
    # Where a pattern of its own came before, ByteLevel has none.
    steps = tuple(
        part["pattern"]["Regex"] if part["type"] == "Split" else part["type"]
        for part in parts
        if part.get("use_regex", True)
    )
    if backend["model"]["type"] != "BPE" or steps not in PRE_TOKENIZERS:
        raise UserError("the tokenizer cuts text into words in a way that is not known as one of llama.cpp's; TODO")
    texts = {number: text for text, number in tokenizer.hf.get_vocab().items()}
    types = dict.fromkeys(texts, TokenType.NORMAL)
    for token in backend["added_tokens"]:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    ids = tokenizer.ids
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[steps])
    writer.add_token_list([texts.get(number, f"<unused {number}>") for number in range(len(tokenizer))])
    writer.add_token_types([types.get(number, TokenType.UNUSED) for number in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(ids.bos)
    writer.add_eos_token_id(ids.eos)
    writer.add_pad_token_id(ids.pad)
    writer.add_eot_token_id(ids.speaker2)  # a reply ends also where the model goes on for the other person
    writer.add_eom_token_id(ids.speaker1)
    writer.add_add_bos_token(False)  # the template has it
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.hf.chat_template)


def write_sizes(writer: GGUFWriter, model: DialogModel) -> None:
    config = model.lm.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(model.limit)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def tensors(model: DialogModel, arch: MODEL_ARCH) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of each tensor, as llama.cpp has them."""
    lm, config = model.lm, model.lm.config
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    for name, tensor in lm.state_dict().items():
        if name.startswith(HEAD) or (tied and name.startswith("lm_head.")):
            continue
        values, part = tensor.numpy(), name.split(".")[-2]
        if arch is MODEL_ARCH.LLAMA and part in heads:  # it pairs a head's neighbours for the rotation, not its halves
            values = values.reshape(heads[part], 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        elif arch is MODEL_ARCH.GPT2 and part.startswith("c_"):  # transformers multiplies from the other side
            values = values.T
        elif arch is MODEL_ARCH.GEMMA and part.endswith("norm"):  # transformers adds the 1 when it runs
            values = values + 1
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), values


def write_tensor(writer: GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    """Add a tensor, stored as `kind` says where llama.cpp's own tools would do it too."""
    if values.ndim == 1 or name == "position_embd.weight":
        kind = "f32"
    elif kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
        kind = "q8_0"  # four bits would cost the most here
    try:
        data = quantize(np.ascontiguousarray(values), GGMLQuantizationType[kind.upper()])
    except QuantError:  # rows that are not of whole blocks of 32
        kind = "f16"
        data = quantize(values, GGMLQuantizationType.F16)
    writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind.upper()])


def write_gguf(path: Path, model: DialogModel, tokenizer: DialogTokenizer, kind: str) -> None:
    arch, _ = ARCHITECTURES[model.lm.config.model_type]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    writer.add_name(path.stem)
    writer.add_file_type(TYPES[kind])
    writer.add_quantization_version(2)
    write_sizes(writer, model)
    write_tokenizer(writer, tokenizer)
    for name, values in tensors(model, arch):
        write_tensor(writer, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def modelfile(gguf: str, model: DialogModel, max_history: int, persona: list[str]) -> str:
    """What `ollama create` reads: the file, the rows as a template, how replies are drawn, and the persona."""
    drawn = model.lm.generation_config
    parameters = {
        "num_ctx": model.limit,
        "temperature": drawn.temperature,
        "top_k": drawn.top_k,
        "top_p": drawn.top_p,
        "repeat_penalty": 1.0,  # Ollama has 1.1 by default
    }
    shown = TEMPLATE.replace("SHOWN", str(utterances_shown(max_history)))
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{shown}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    lines += [f'SYSTEM """{" ".join(persona)}"""'] if persona else []
    return "\n".join(lines) + "\n"


def parse_settings() -> ExportSettings:
    parser = Parser(
        "Write a plain checkpoint as a GGUF file and a Modelfile, for llama.cpp and Ollama.", ExportSettings
    )
    parser.add_argument("model", nargs="?", default="runs/latest", help="run folder, or that of an adapter")
    return ExportSettings.from_args(parser.parse_args())


def main() -> None:
    settings = parse_settings()
    folder = typed_path(settings.model)
    if folder.name == "latest":
        folder = find_run(settings.model)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; expected a run folder of train.py, such as runs/latest")
    files = find_model(str(folder))
    tokenizer = load_tokenizer(files)
    check_plain(files, tokenizer)
    model = load_model(files, tokenizer, torch.device("cpu"))
    name = f"model-{settings.gguf}.gguf"
    with whole_files(folder) as partial:
        write_gguf(partial / name, model, tokenizer, settings.gguf)
        text = modelfile(name, model, tokenizer.max_history, settings.personality or [])
        (partial / "Modelfile").write_text(text, encoding="utf-8")
    log.info(f"llama-server -m {folder / name}")
    log.info(f"ollama create NAME -f {folder / 'Modelfile'}")


if __name__ == "__main__":
    run_script(main)
