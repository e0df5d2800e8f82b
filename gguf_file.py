"""A model as llama.cpp's own file: GGUF, with sizes, tokenizer, chat template and weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import quantize

from cli import UserError
from model import HEAD, DialogModel
from utils import DialogTokenizer

# By transformers' model type: the architecture in llama.cpp, and what a config.json must say, as it is fixed there.
ARCHITECTURES = {
    "gpt2": (
        MODEL_ARCH.GPT2,
        {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "llama": (MODEL_ARCH.LLAMA, {"hidden_act": "silu"}),
    "mistral": (MODEL_ARCH.LLAMA, {"hidden_act": "silu"}),
    "qwen2": (MODEL_ARCH.QWEN2, {"hidden_act": "silu", "use_sliding_window": False}),
    "qwen3": (MODEL_ARCH.QWEN3, {"hidden_act": "silu", "use_sliding_window": False}),
    "gemma": (MODEL_ARCH.GEMMA, {"hidden_act": "gelu_pytorch_tanh"}),
}
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}  # and llama.cpp's numbers of them

# llama.cpp's name for the steps that cut a byte-level BPE's text into words. ByteLevel itself cuts by GPT-2's pattern.
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


def write_gguf(path: Path, model: DialogModel, tokenizer: DialogTokenizer, kind: str) -> None:
    """Write a model without token types, of one of ARCHITECTURES.

    Args:
        kind: one of FILE_TYPES.
    Raises:
        UserError: the model or its tokenizer has something that llama.cpp does not know.
    """
    arch, _ = ARCHITECTURES[model.lm.config.model_type]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    writer.add_name(path.stem)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(2)
    add_sizes(writer, model)
    add_tokenizer(writer, tokenizer)
    for name, values in llama_cpp_tensors(model, arch):
        add_tensor(writer, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: GGUFWriter, model: DialogModel) -> None:
    config = model.lm.config
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
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_size = 2 * len(model.body.rotary_emb.inv_freq)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


# ------------------------------------------------------------------------------------------------------------
# Tokenizer
# ------------------------------------------------------------------------------------------------------------


def add_tokenizer(writer: GGUFWriter, tokenizer: DialogTokenizer) -> None:
    """Add vocabulary, special tokens and chat template: text gets the ids that it has here."""
    backend, ids = json.loads(tokenizer.hf.backend_tokenizer.to_str()), tokenizer.ids
    rows = range(len(tokenizer))
    texts = [f"<unused {row}>" for row in rows]
    types = [TokenType.UNUSED for row in rows]
    for text, row in tokenizer.hf.get_vocab().items():
        texts[row] = text
        types[row] = TokenType.NORMAL
    for token in backend["added_tokens"]:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if backend["model"]["type"] == "BPE" and backend["model"].get("byte_fallback"):
        for row, text in enumerate(texts):
            if text.startswith("<0x"):
                types[row] = TokenType.BYTE
        add_sentencepiece(writer, tokenizer, backend, texts)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(backend))
        writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_bos_token_id(ids.bos)
    writer.add_eos_token_id(ids.eos)
    writer.add_pad_token_id(ids.pad)
    # As here, a reply also ends where the model goes on with an utterance: as tokens that end a turn, or a message.
    writer.add_eot_token_id(ids.speaker2)
    writer.add_eom_token_id(ids.speaker1)
    writer.add_add_bos_token(False)  # the chat template has it
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.hf.chat_template)


def pre_tokenizer(backend: dict) -> str:
    """llama.cpp's name for how a byte-level BPE cuts text into words. backend: the JSON of a tokenizer.json."""
    parts = backend["pre_tokenizer"] or {"type": "none"}
    parts = parts.get("pretokenizers", [parts])
    steps = []
    for part in parts:
        if part["type"] == "Split":
            steps.append(part["pattern"].get("Regex"))
        elif part.get("use_regex", True):  # ByteLevel after a pattern of the tokenizer's own has none
            steps.append(part["type"])
    name = PRE_TOKENIZERS.get(tuple(steps))
    spaced = any(part.get("add_prefix_space") for part in parts)
    kept = backend["normalizer"] in (None, {"type": "NFC"})  # NFC is Qwen's, which llama.cpp leaves out
    if backend["model"]["type"] != "BPE" or spaced or not kept or not name:
        raise UserError(
            "the tokenizer cuts text into words by rules that are not known to be llama.cpp's; "
            "train another base model, such as smollm2, gpt2 or Qwen/Qwen3-0.6B"
        )
    return name


def add_sentencepiece(writer: GGUFWriter, tokenizer: DialogTokenizer, backend: dict, texts: list[str]) -> None:
    """Add the scores of a BPE by SentencePiece, as Llama 2, Mistral and Gemma have: the earlier merged, the higher."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(backend["model"]["merges"]):
        ranks.setdefault("".join(pair), rank)
    writer.add_tokenizer_model("llama")
    writer.add_token_scores([-float(ranks.get(text, len(ranks))) for text in texts])
    first = tokenizer.hf.convert_ids_to_tokens(tokenizer.encode(["a"])[0])[0]
    writer.add_add_space_prefix(first.startswith("▁"))


# ------------------------------------------------------------------------------------------------------------
# Weights
# ------------------------------------------------------------------------------------------------------------


def llama_cpp_tensors(model: DialogModel, arch: MODEL_ARCH) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of each tensor as llama.cpp has them. The multiple-choice head is left out."""
    lm, config = model.lm, model.lm.config
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    for name, tensor in lm.state_dict().items():
        if name.startswith(HEAD) or (tied and name.startswith("lm_head.")):
            continue
        values = tensor.numpy()
        part = name.split(".")[-2]
        if arch is MODEL_ARCH.LLAMA and part in heads:  # it rotates a head's neighbours, transformers its halves
            values = values.reshape(heads[part], 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        elif arch is MODEL_ARCH.GPT2 and part.startswith("c_"):  # transformers multiplies from the other side
            values = values.T
        elif arch is MODEL_ARCH.GEMMA and part.endswith("norm"):  # transformers adds the 1 when it runs
            values = values + 1
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if not place:
            raise UserError(f"llama.cpp has no place for the tensor {name}; train another base model, such as smollm2")
        yield place, values
    # The frequencies of rotary positions may be scaled, for long texts; llama.cpp has the factors as a tensor.
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = rope.get("rope_type", "default")
    if scaling == "default":
        return
    if arch is not MODEL_ARCH.LLAMA or scaling not in ("linear", "llama3"):
        raise UserError(f"its positions are scaled ({scaling}); train another base model, such as smollm2")
    frequencies = model.body.rotary_emb.inv_freq
    places = torch.arange(len(frequencies)) / len(frequencies)
    unscaled = rope["rope_theta"] ** -places
    yield "rope_freqs.weight", (unscaled / frequencies).numpy()


def add_tensor(writer: GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    """Add a tensor, stored as `kind` says; as in llama.cpp's own tools, not all of them are."""
    if values.ndim == 1 or name == "position_embd.weight":
        kind = "f32"
    elif kind in ("q8_0", "q4_0") and values.shape[-1] % 32:
        kind = "f16"  # quantised are blocks of 32 numbers, and a row of this tensor is not made of whole ones
    elif kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
        kind = "q8_0"  # where four bits cost the most
    stored = GGMLQuantizationType[kind.upper()]
    writer.add_tensor(name, quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
