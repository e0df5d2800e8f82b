"""Tiny models with random weights, in folders and files as the hub has them for pretrained ones."""

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from inputs import Instance
from loading import load_model
from model import DialogModel
from model_files import find_model
from utils import DialogTokenizer, SpecialIds, load_tokenizer

TEXTS = [
    "hello , how are you doing today ?",
    "i'm fine , thanks . i just came back from walking my three dogs .",
    "i do not like rain , but i like the sea . don't you ?",
    "what do you do for a living ?",
    "i teach music to children at a small school . my favorite color is green .",
    "that sounds like fun ! i work as a cook and i love to eat fish .",
    "my sister has two cats and my brother drives a red car .",
]

# The few sizes that make a model tiny, by the names each architecture has for them.
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
LLAMA_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SIZES = {
    "openai-gpt": GPT2_SIZES,
    "gpt2": GPT2_SIZES,
    "llama": LLAMA_SIZES,
    "qwen3": LLAMA_SIZES | {"head_dim": 8},
    "mistral": LLAMA_SIZES,
    "gemma": LLAMA_SIZES | {"head_dim": 8},
    "gemma2": LLAMA_SIZES | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": LLAMA_SIZES | {"logit_scale": 0.5},
    "granite": LLAMA_SIZES | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "gpt_neox": {name: size for name, size in LLAMA_SIZES.items() if name != "num_key_value_heads"},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 32,  # less than a packed row, more than a short one
        "max_position_embeddings": 128,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}

# The kinds whose candidates may share a prefix in one row
PACKED = ("openai-gpt", "gpt2", "llama", "qwen3", "mistral", "gemma", "gemma2", "cohere", "granite", "opt", "gpt_neox")

# (length of the prefix, lengths of the candidates) of each row in a batch
RAGGED = [(9, [3, 5]), (4, [1, 2, 6]), (14, [4]), (3, [7, 1])]


def make_instances(ids, shapes) -> list[Instance]:
    """Rows of random tokens of these shapes, each candidate with <eos> behind it."""

    def tokens(count: int) -> list[int]:
        return torch.randint(10, 200, (count,)).tolist()

    def speakers(count: int) -> list[int]:
        return [(ids.speaker1, ids.speaker2)[choice] for choice in torch.randint(2, (count,)).tolist()]

    return [
        Instance(tokens(prefix), speakers(prefix), [[*tokens(size - 1), ids.eos] for size in candidates])
        for prefix, candidates in shapes
    ]


def embed(lm, ids: SpecialIds, tokens: list[int], types: list[int]) -> torch.Tensor:
    """The input (1, T, D) of a plain model of transformers for tokens and their types."""
    embedding = lm.get_input_embeddings()
    vectors = embedding(torch.tensor([tokens]))
    return vectors + embedding(torch.tensor([types])) if ids.token_types else vectors


def write_tokenizer(folder: Path, kind: str, vocab_size: int) -> int:
    """Learn a BPE vocabulary from TEXTS and write it as a model of that kind has it; the number of its tokens."""
    settings = {"vocab_size": vocab_size, "show_progress": False}
    if kind == "openai-gpt":  # lower-case words, each ending in </w>
        bpe = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        bpe.normalizer, bpe.pre_tokenizer = (
            normalizers.BertNormalizer(lowercase=True),
            pre_tokenizers.BertPreTokenizer(),
        )
        letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,!?'<>-:;")
        # Every letter also as the last of a word, which the trainer learns only where it has seen one.
        texts = [*TEXTS, " ".join(letters)]
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                end_of_word_suffix="</w>", special_tokens=["<unk>"], initial_alphabet=letters, **settings
            ),
        )
    else:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(
            TEXTS, trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], **settings)
        )
    if kind in ("openai-gpt", "gpt2"):
        bpe.model.save(str(folder))  # vocab.json and merges.txt
        (folder / "tokenizer_config.json").write_text("{}")
    else:
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder)
    return bpe.get_vocab_size()


def write_model(folder: Path, kind: str, weights: bool = True, vocab_size: int = 320, **changes) -> Path:
    """A folder as the hub has one for a pretrained model of that kind: config, tokenizer and weights.

    Width 32, two layers. The weights are large enough that every part of the model makes a difference.

    Args:
        weights: False leaves them out.
        changes: of the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(folder, kind, vocab_size)
    config = AutoConfig.for_model(
        kind, **{"vocab_size": vocab_size, "initializer_range": 0.2, **SIZES[kind], **changes}
    )
    if not weights:
        settings = config.to_diff_dict() | {"model_type": kind}
        (folder / "config.json").write_text(json.dumps(settings))
        return folder
    lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            elif name.endswith("bias"):  # zero as they are made, which would hide a lost one
                parameter.normal_(std=0.1)
    lm.save_pretrained(folder)
    return folder


def load_folder(folder: Path, **options) -> tuple[DialogModel, DialogTokenizer]:
    """A model folder loaded the way the scripts do it, on the CPU."""
    files = find_model(str(folder))
    tokenizer = load_tokenizer(files, options.pop("pre_tokenizer", None))
    return load_model(files, tokenizer, torch.device("cpu"), **options), tokenizer


# The names of a Llama's tensors in transformers and in a .gguf file.
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "lm_head": "output",
}


def write_gguf(path: Path, folder: Path) -> None:
    """A Llama folder as one .gguf file, the way llama.cpp's converter writes it."""
    config = json.loads((folder / "config.json").read_text())
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads["q_proj"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in load_file(folder / "model.safetensors").items():
        for part, count in heads.items():
            if part in name:  # llama.cpp pairs a head's neighbours for its rotation, transformers its halves
                tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        for theirs, short in GGUF_NAMES.items():
            name = name.replace(theirs, short)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
