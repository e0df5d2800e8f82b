"""GGUF files and Modelfiles: read back by transformers' own reader, and run by llama.cpp where that is installed."""

import json
import sys
from collections.abc import Callable
from itertools import islice, takewhile
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

import pytest
import torch
from gguf import GGUFReader, TokenType
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import export
import train
from cli import UserError
from conversation import Conversation
from gguf_file import LLAMA3, pre_tokenizer
from helpers import ROOT
from loading import load_model
from model_files import find_model, find_run
from options import Decoding
from template import chat_template
from tiny_models import TEXTS, load_folder, write_model
from utils import load_tokenizer

# transformers' reader takes these sizes to be as its configurations have them by default.
READABLE = {"llama": {}, "qwen3": {"head_dim": 128}, "gpt2": {"n_positions": 1024}}
PERSONA = ["i like cats.", "my car is red."]


def make_plain(folder: Path, kind: str, write_tokenizer: Callable[[Path], None] | None = None, **changes) -> Path:
    """A checkpoint as train.py --no_token_types --max_history 1 leaves it, with random weights.

    Args:
        write_tokenizer: writes another tokenizer into the base model's folder.
        changes: of the base model's configuration.
    """
    base = write_model(folder / "base", kind, **changes)
    if write_tokenizer:
        write_tokenizer(base)
    files = find_model(str(base))
    tokenizer = load_tokenizer(files, token_types=False)
    tokenizer.max_history, tokenizer.hf.chat_template = 1, chat_template(3)
    load_model(files, tokenizer, torch.device("cpu")).save(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """`plain(kind)`: a plain checkpoint, made once."""
    folders = {}

    def plain(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = make_plain(tmp_path_factory.mktemp(kind), kind, **READABLE.get(kind, {}))
        return folders[kind]

    return plain


@pytest.fixture
def exported(monkeypatch):
    """`exported(folder, type, *options)`: the GGUF file that the script makes."""

    def exported(folder: Path, kind: str = "f32", *options) -> Path:
        monkeypatch.setattr(sys, "argv", ["export.py", str(folder), "--gguf", kind, *options])
        export.main()
        return folder / f"model-{kind}.gguf"

    return exported


@torch.no_grad()
def logits(folder: Path, **options) -> torch.Tensor:
    """Of some tokens (1, 60), by plain transformers: (1, 60, V)."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return lm(torch.arange(10, 70)[None]).logits


@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.parametrize(("stored", "tolerance"), [("f32", 1e-5), ("f16", 1e-2), ("bf16", 1e-1), ("q8_0", 0.5)])
def test_transformers_reads_the_same_logits(kind, stored, tolerance, plain, exported):
    folder = plain(kind)
    file = exported(folder, stored)
    difference = (logits(folder, gguf_file=file.name) - logits(folder)).abs().max()
    assert difference <= tolerance and (difference > 0) == (stored != "f32")


def test_q8_0_costs_less_than_a_hundredth_of_perplexity(plain, exported):
    folder = plain("llama")
    file = exported(folder, "q8_0")
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(" ".join(TEXTS))["input_ids"][:120])[None]

    @torch.no_grad()
    def perplexity(**options) -> float:
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        return lm(tokens, labels=tokens).loss.exp().item()

    assert perplexity(gguf_file=file.name) == pytest.approx(perplexity(), rel=0.01)


@pytest.mark.parametrize(
    ("stored", "weights", "embedding"),
    [("f32", "F32", "F32"), ("bf16", "BF16", "BF16"), ("q8_0", "Q8_0", "Q8_0"), ("q4_0", "Q4_0", "Q8_0")],
)
def test_types_of_tensors(stored, weights, embedding, plain, exported):
    reader = GGUFReader(exported(plain("llama"), stored))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.1.attn_q.weight"] == weights and types["token_embd.weight"] == embedding
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == "F32"
    assert not any("multiple_choice" in name for name in types)


def test_rows_that_are_not_of_whole_blocks_are_half_floats(tmp_path, exported):
    folder = make_plain(tmp_path, "llama", hidden_size=48)  # mlp.down_proj has rows of 64
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(exported(folder, "q4_0")).tensors}
    assert types["blk.0.attn_q.weight"] == "F16" and types["blk.0.ffn_down.weight"] == "Q4_0"


def test_tokenizer_in_the_file(plain, exported, load):
    file = exported(plain("qwen3"))
    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    about = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    _, tokenizer = load(plain("qwen3"))
    vocabulary = tokenizer.hf.get_vocab()
    assert about["tokens"] == sorted(vocabulary, key=vocabulary.get)
    control = {vocabulary[text] for text in ("<bos>", "<eos>", "<pad>", "<speaker1>", "<speaker2>", "<|endoftext|>")}
    assert {i for i, kind in enumerate(about["token_type"]) if kind == TokenType.CONTROL} == control
    assert (about["model"], about["pre"], about["add_bos_token"]) == ("gpt2", "gpt-2", False)
    ends = (about["bos_token_id"], about["eos_token_id"], about["eot_token_id"], about["eom_token_id"])
    ids = tokenizer.ids
    assert ends == (ids.bos, ids.eos, ids.speaker2, ids.speaker1)
    assert fields["tokenizer.chat_template"] == chat_template(3) and fields["qwen3.context_length"] == 128
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert [theirs(text)["input_ids"] for text in TEXTS] == tokenizer.encode(TEXTS)


def test_modelfile(plain, exported):
    """Ollama's own template has the same history: the last three turns before the reply."""
    folder = exported(plain("gpt2"), "f16", "--personality", PERSONA[0], "--personality", PERSONA[1]).parent
    first, template, *parameters, system = (folder / "Modelfile").read_text().splitlines()
    assert first == "FROM ./model-f16.gguf" and system == 'SYSTEM """i like cats. my car is red."""'
    assert template.startswith('TEMPLATE """<bos>{{ .System }}') and template.endswith('<speaker1>"""')
    assert "(le (len (slice $.Messages $i)) 3)" in template
    expected = {"temperature": "0.7", "top_k": "0", "top_p": "0.9", "min_p": "0.0"}
    expected |= {"num_ctx": "1024", "repeat_penalty": "1.0"}
    assert dict(line.removeprefix("PARAMETER ").split() for line in parameters) == expected
    exported(folder)
    assert "SYSTEM" not in (folder / "Modelfile").read_text()
    # Of a whole history nothing is left out. The replies are drawn as the folder says.
    text = export.modelfile("m.gguf", 512, -1, Decoding(min_p=0.1, top_p=0, repetition_penalty=1.2), [])
    expected = {"min_p": "0.1", "top_p": "1.0", "repeat_penalty": "1.2"}  # 0 is off here, in llama.cpp 1
    assert "slice" not in text and all(f"PARAMETER {name} {value}\n" in text for name, value in expected.items())


def write_sentencepiece(folder: Path) -> None:
    """Learn a BPE as SentencePiece makes one and transformers reads it: Llama 2's, Mistral's, Gemma's."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    letters = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=letters, show_progress=False))
    saved = json.loads(bpe.to_str())
    saved["added_tokens"] = saved["added_tokens"][:3]  # bytes are none that a text may name
    bpe = Tokenizer.from_str(json.dumps(saved))
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


def test_sentencepiece_has_scores_and_bytes(tmp_path, exported):
    folder = make_plain(tmp_path, "mistral", write_tokenizer=write_sentencepiece)
    fields = {name: field.contents() for name, field in GGUFReader(exported(folder)).fields.items()}
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    first, second, *_ = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert scores[tokens.index("".join(first))] > scores[tokens.index("".join(second))] > scores[tokens.index("a")]
    assert fields["tokenizer.ggml.token_type"][tokens.index("<0x41>")] == TokenType.BYTE
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"]


WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES = WORDS | {"use_regex": False}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([WORDS], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, WORDS], "smollm"),
        ([split(LLAMA3), BYTES], "llama-bpe"),
        ([split(LLAMA3.replace("{1,3}", "")), BYTES], "qwen2"),
        ([split("[a-z]+"), BYTES], None),
        ([WORDS | {"add_prefix_space": True}], None),
        ([{"type": "Whitespace"}], None),
    ],
)
def test_names_of_how_words_are_cut(steps, name):
    backend = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {"type": "BPE"}}
    backend["normalizer"] = {"type": "NFC"}
    if name:
        assert pre_tokenizer(backend) == name
    for change in ({"normalizer": {"type": "Lowercase"}}, {"model": {"type": "Unigram"}}, {})[: 2 if name else 3]:
        with pytest.raises(UserError, match="cuts text into words by rules that are not known"):
            pre_tokenizer(backend | change)


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def test_scaled_positions(tmp_path, exported):
    folder = make_plain(tmp_path, "llama", rope_parameters=LLAMA3_ROPE)
    (factors,) = [each.data for each in GGUFReader(exported(folder)).tensors if each.name == "rope_freqs.weight"]
    assert factors[0] == 1 and factors[-1] == 8  # fast rotations stay, slow ones are slower


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("openai-gpt", "is a openai-gpt model; expected one of gpt2, llama, .*; train another base model: python"),
        ("opt", "is a opt model; expected one of"),
        ("gpt2", "has token types: .*; train one without: python train.py --no_token_types"),
        ("llama", "has no chat template, as none gives the tokens"),
    ],
)
def test_what_no_other_engine_runs(kind, said, dialog_model, exported):
    with pytest.raises(UserError, match=said):
        exported(dialog_model(kind))
    assert not list(dialog_model(kind).glob("*.gguf"))


def test_a_base_model_is_to_be_trained_first(tiny, exported):
    with pytest.raises(UserError, match="was not fine-tuned on dialogs; train it first: python train.py --model"):
        exported(tiny("llama"))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gpt2", {"activation_function": "relu"}, "activation_function is relu, but gelu_new in llama.cpp"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False, but True in llama.cpp"),
        ("qwen3", {"rope_parameters": LLAMA3_ROPE}, r"its positions are scaled \(llama3\)"),
    ],
)
def test_what_llama_cpp_does_otherwise(kind, changes, said, tmp_path, exported):
    with pytest.raises(UserError, match=said):
        exported(make_plain(tmp_path, kind, **changes))
    assert not list(tmp_path.glob("*.gguf"))


def test_options(plain, exported):
    with pytest.raises(UserError, match='--personality: found """'):
        exported(plain("llama"), "f32", "--personality", 'i say """.')
    with pytest.raises(UserError, match="no such folder: nowhere; expected a run folder"):
        exported(Path("nowhere"))


def test_a_run_with_an_adapter_alone_is_merged(tiny, tmp_path, monkeypatch, exported):
    """Both the run folder and its adapter's; the files lie where they were asked for, not beside the base model."""
    kept = ["--runs_dir", tmp_path, "--dataset_cache", tmp_path / "cache.bin", "--device", "cpu", "--seed", 1]
    trained = ["--n_epochs", 1, "--lora", 4, "--lora_save", "adapter", "--lr", 0.01, "--num_candidates", 1]
    sample = json.loads((ROOT / "data" / "sample.json").read_text())
    sample["train"] = sample["train"][:2]
    sample["valid"] = sample["valid"][:1]
    (tmp_path / "sample.json").write_text(json.dumps(sample))
    given = ["--model", tiny("llama"), "--dataset_path", tmp_path / "sample.json", *kept, *trained]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, given)])
    train.main()
    run = find_run(str(tmp_path / "latest"))
    for folder in (run, run / "adapter"):
        file = exported(folder, "f32", "--personality", "i like cats.")
        assert (folder / "Modelfile").exists()
        model, _ = load_folder(folder)
        file = file.rename(tmp_path / file.name)  # beside an adapter transformers would look for it in the base
        read = logits(tmp_path, gguf_file=file.name)
        with torch.no_grad():
            assert torch.allclose(read, model.lm(torch.arange(10, 70)[None]).logits, atol=1e-5)
    assert not list(tiny("llama").glob("*.gguf"))


# ------------------------------------------------------------------------------------------------------------
# llama.cpp itself
# ------------------------------------------------------------------------------------------------------------


def by_llama_cpp_python(file: Path, dialogs: list[list[dict]]) -> list[tuple[list[int], list[int]]]:
    """Tokens of the prompt and of a greedy reply to each dialog, by the package llama-cpp-python."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    f32 = llama_cpp.GGML_TYPE_F32
    llm = llama_cpp.Llama(str(file), n_ctx=512, n_threads=1, verbose=False, type_k=f32, type_v=f32)
    template = llm.metadata["tokenizer.chat_template"]
    form = Jinja2ChatFormatter(template, eos_token="<eos>", bos_token="<bos>")
    made = []
    for messages in dialogs:
        prompt = llm.tokenize(form(messages=messages).prompt.encode(), add_bos=False, special=True)
        llm.reset()
        made.append((prompt, list(islice(llm.generate(prompt, temp=0.0, repeat_penalty=1.0), LENGTH))))
        chat = llm.create_chat_completion(messages, temperature=0.0, repeat_penalty=1.0, max_tokens=LENGTH)
        assert chat["usage"]["prompt_tokens"] == len(prompt)
    return made


def by_llama_server(file: Path, dialogs: list[list[dict]]) -> list[tuple[list[int], list[int]]]:
    """The same by llama.cpp's server and its own Jinja, from the package xllamacpp, which need not be compiled."""
    xllamacpp = pytest.importorskip("xllamacpp")
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = str(file), 512, 1, False
    options.cpuparams.n_threads, options.port = 1, 0
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(options)

    def ask(place: str, **body) -> dict:
        request = Request(server.listening_address + place, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with build_opener(ProxyHandler({})).open(request) as answer:
            return json.load(answer)

    greedy = {"temperature": 0, "repeat_penalty": 1.0, "n_predict": LENGTH, "return_tokens": True}
    made = []
    for messages in dialogs:
        text = ask("/apply-template", messages=messages)["prompt"]
        prompt = ask("/tokenize", content=text, parse_special=True, add_special=True)["tokens"]
        made.append((prompt, ask("/completion", prompt=text, **greedy)["tokens"]))
        chat = ask("/v1/chat/completions", messages=messages, **greedy)
        assert chat["usage"]["prompt_tokens"] == len(prompt)
    return made


LENGTH = 20
ENGINES = {"llama_cpp": by_llama_cpp_python, "xllamacpp": by_llama_server}
SERVED = {
    **{kind: (kind, {}) for kind in ("llama", "mistral", "qwen3", "gemma", "gpt2")},
    "scaled": ("llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True}),
    "sentencepiece": ("mistral", {"write_tokenizer": write_sentencepiece}),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("served", SERVED)
def test_greedy_replies_of_llama_cpp_are_ours(engine, served, tmp_path, exported):
    """Token for token, on dialogs of any length: so are the prompts, by the template in the file."""
    pytest.importorskip(engine)
    kind, changes = SERVED[served]
    folder = make_plain(tmp_path, kind, **({"max_position_embeddings": 512} if kind != "gpt2" else {}), **changes)
    model, tokenizer = load_folder(folder)
    dialogs, expected = [], []
    for number in range(20):
        *history, message = [f"{text[:20]}12345é ♞ don'T" for text in (TEXTS * 3)[number : number + 1 + number % 4]]
        chat = Conversation(model, tokenizer, PERSONA, Decoding(no_sample=True), max_history=1, seed=0)
        chat.resume(history)
        roles = ("assistant", "user") if len(history) % 2 else ("user", "assistant")
        messages = [{"role": "system", "content": " ".join(PERSONA)}]
        messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate([*history, message])]
        dialogs.append(messages)
        prompt = chat.generation(tokenizer.encode([message])[0]).prefixes[0][0]
        row = torch.tensor([prompt])
        stop = sorted(tokenizer.ids.all)
        options = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": stop, "temperature": None}
        reply = model.lm.generate(row, attention_mask=torch.ones_like(row), **options)[0, len(prompt) :]
        expected.append((prompt, until(tokenizer.ids.all, reply.tolist())))
    made = [(prompt, until(tokenizer.ids.all, reply)) for prompt, reply in ENGINES[engine](exported(folder), dialogs)]
    assert made == expected


def until(ends: frozenset[int], reply: list[int]) -> list[int]:
    """A reply up to what ends it. Engines say it or not, and those of random weights come to any token."""
    return list(takewhile(lambda token: token not in ends, reply))
