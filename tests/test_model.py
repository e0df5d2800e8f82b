"""The double-head model against transformers' own classes: forward, gradients, loading and saving."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2DoubleHeadsModel,
    OpenAIGPTDoubleHeadsModel,
)

import cpu
from batches import collate
from cli import UserError
from cpu import PackedLinear, optimize_for_cpu_inference
from helpers import rewrite_json, run_python
from inputs import Instance
from loading import load_model
from model import gold_ranks
from model_files import ModelFiles
from tiny_models import PACKED, RAGGED, embed, make_instances, write_gguf
from utils import load_tokenizer

DOUBLE_HEADS = {"openai-gpt": OpenAIGPTDoubleHeadsModel, "gpt2": GPT2DoubleHeadsModel}
PADDED = ("bloom", "mpt", "gpt_neo", "mamba")

# (length of the prefix, lengths of the candidates) of each row in a batch.
ONE_SHAPE = [(9, [4, 6])] * 2
WIDE = [(60, [15] * 6), (5, [2])]  # packed, the first row is longer than any model here takes; unpacked, it is not


def padded_rows(instances: list[Instance], ids) -> dict[str, torch.Tensor]:
    """Instances with equally many candidates as the (B, N, T) arguments of a double-heads class of transformers."""
    rows = [[(i.prefix, i.token_types, reply) for reply in i.candidates] for i in instances]
    width = max(len(prefix) + len(reply) for row in rows for prefix, _, reply in row)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (width - len(values))

    def label(n: int, row: list) -> list[int]:
        prefix, _, reply = row[n]
        gold = n == len(row) - 1
        return pad([-100] * len(prefix) + reply, -100) if gold else [-100] * width

    return {
        "input_ids": torch.tensor([[pad(prefix + reply, ids.pad) for prefix, _, reply in row] for row in rows]),
        "token_type_ids": torch.tensor(
            [[pad(types + [ids.speaker1] * len(reply), ids.pad) for _, types, reply in row] for row in rows]
        ),
        "mc_token_ids": torch.tensor([[len(prefix) + len(reply) - 1 for prefix, _, reply in row] for row in rows]),
        "labels": torch.tensor([[label(n, row) for n in range(len(row))] for row in rows]),
        "mc_labels": torch.tensor([len(row) - 1 for row in rows]),
    }


def double_heads(model, kind: str):
    """transformers' own double-heads model with the weights of ours: every name and shape must be the same."""
    hf = DOUBLE_HEADS[kind](model.lm.config)
    hf.load_state_dict(model.lm.state_dict())
    return hf.eval()


def double_heads_losses(hf, instances: list[Instance], ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Language-modelling and multiple-choice loss of a whole batch: rows with equally many candidates at a time."""
    groups = defaultdict(list)
    for instance in instances:
        groups[len(instance.candidates)].append(instance)
    lm_sum, mc_sum, labelled = 0, 0, 0
    for group in groups.values():
        rows = padded_rows(group, ids)
        output = hf(**rows)
        count = int((rows["labels"] != -100).sum())
        lm_sum, labelled = lm_sum + output.loss * count, labelled + count
        mc_sum = mc_sum + output.mc_loss * len(group)
    return lm_sum / labelled, mc_sum / len(instances)


# ------------------------------------------------------------------------------------------------------------
# Forward and backward
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [ONE_SHAPE, RAGGED], ids=["one shape", "ragged"])
@pytest.mark.parametrize("kind", DOUBLE_HEADS)
def test_losses_and_gradients_are_those_of_transformers_double_heads(kind, shapes, dialog_model, load):
    model, tokenizer = load(dialog_model(kind))
    hf = double_heads(model, kind)
    instances = make_instances(tokenizer.ids, shapes)
    batch = collate(instances, tokenizer.ids)

    output = model(batch)
    lm_loss = output.lm_nll.mean()
    mc_loss = F.cross_entropy(output.mc_logits, batch.n_candidates - 1)
    (lm_loss + mc_loss).backward()
    hf_lm_loss, hf_mc_loss = double_heads_losses(hf, instances, tokenizer.ids)
    (hf_lm_loss + hf_mc_loss).backward()

    torch.testing.assert_close(lm_loss, hf_lm_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mc_loss, hf_mc_loss, rtol=1e-5, atol=1e-5)
    ours, theirs = dict(model.lm.named_parameters()), dict(hf.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        distance = (ours[name].grad - parameter.grad).norm()
        # The bias of the choice head moves all candidates alike: but for rounding its gradient is zero.
        assert distance <= 1e-4 * parameter.grad.norm() + 1e-6, name


@pytest.mark.parametrize("shapes", [RAGGED, WIDE], ids=["ragged", "wide"])
@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
def test_forward_is_that_of_plain_rows_one_at_a_time(kind, shapes, dialog_model, load):
    model, tokenizer = load(dialog_model(kind))
    ids = tokenizer.ids
    plain = AutoModelForCausalLM.from_pretrained(dialog_model(kind)).eval()
    instances = make_instances(ids, shapes)
    batch = collate(instances, ids)
    expected_nll, expected_scores = [], torch.full((len(instances), max(len(c) for _, c in shapes)), float("-inf"))
    with torch.no_grad():
        output = model(batch)
        for row, instance in enumerate(instances):
            for n, reply in enumerate(instance.candidates):
                types = instance.token_types + [ids.speaker1] * len(reply)
                embeds = embed(plain, ids, instance.prefix + reply, types)
                hidden = plain.base_model(inputs_embeds=embeds)[0][0, -1]
                expected_scores[row, n] = model.lm.multiple_choice_head.summary(hidden)
            # the last candidate is the gold one
            logits = plain(inputs_embeds=embeds).logits[0, len(instance.prefix) - 1 : -1]
            expected_nll.append(F.cross_entropy(logits, torch.tensor(reply), reduction="none"))

    torch.testing.assert_close(output.lm_nll, torch.cat(expected_nll), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.mc_logits, expected_scores, rtol=1e-4, atol=1e-4)
    assert model.packed == (kind in PACKED)


@pytest.mark.parametrize("kind", PADDED)
def test_gradients_of_padded_rows_are_those_of_plain_rows(kind, dialog_model, load):
    """A prefix has a row for each of its candidates, but only one of them may send a gradient back."""
    model, tokenizer = load(dialog_model(kind))
    instances = make_instances(tokenizer.ids, RAGGED)
    batch = collate(instances, tokenizer.ids)
    weight = model.lm.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(model(batch).lm_nll.sum(), weight)
    expected = torch.zeros_like(weight)
    for prefix, types, (*_, reply) in ((i.prefix, i.token_types, i.candidates) for i in instances):
        speakers = types + [tokenizer.ids.speaker1] * len(reply)
        logits = model.lm(inputs_embeds=model.embed(torch.tensor([prefix + reply]), torch.tensor([speakers]))).logits
        nll = F.cross_entropy(logits[0, len(prefix) - 1 : -1], torch.tensor(reply), reduction="sum")
        expected += torch.autograd.grad(nll, weight)[0]
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("block", [3, 96], ids=["many blocks", "one block"])
@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
def test_a_model_made_fast_for_cpus_computes_the_same(kind, block, dialog_model, load, monkeypatch):
    monkeypatch.setattr("cpu.BLOCK", block)
    sdpa, queries = cpu.sdpa_attention_forward, []
    monkeypatch.setattr("cpu.sdpa_attention_forward", lambda *a, **k: queries.append(a[1].shape[2]) or sdpa(*a, **k))
    model, tokenizer = load(dialog_model(kind))
    batch = collate(make_instances(tokenizer.ids, RAGGED), tokenizer.ids)
    with torch.inference_mode():
        before = model(batch)
        optimize_for_cpu_inference(model)
        del queries[:]
        after = model(batch)
    if kind in PACKED and kind != "gemma2":  # which transformers runs in eager attention
        assert 1 <= max(queries) <= block
    torch.testing.assert_close(after.lm_nll, before.lm_nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.mc_logits, before.mc_logits, rtol=1e-5, atol=1e-5)
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    assert not layers if kind == "mamba" else len(layers) >= 9  # mamba reads weights past their layers: left as it was
    with_gelu = sum(layer.activation[0] == "gelu" for layer in layers)
    assert with_gelu == (model.lm.config.num_hidden_layers if kind in (*DOUBLE_HEADS, "gpt_neo") else 0)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_rows_have_the_hidden_states_of_padded_rows(kind, dialog_model, load):
    model, tokenizer = load(dialog_model(kind))
    batch = collate(make_instances(tokenizer.ids, RAGGED), tokenizer.ids)
    with torch.no_grad():
        packed, padded = (way(batch).flatten(0, 1) for way in (model._hidden_packed, model._hidden_padded))
    real = batch.head_positions if kind == "openai-gpt" else (batch.segments >= 0).flatten()  # it computes no others
    torch.testing.assert_close(packed[real], padded[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["drop", "attn_dropout", "resid_dropout", "mlp.dropout"])
def test_each_dropout_of_openai_gpt_is_at_work_in_training_only(name, dialog_model, load):
    model, tokenizer = load(dialog_model("openai-gpt"))
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5 if path.endswith("." + name) else 0.0
    batch = collate(make_instances(tokenizer.ids, RAGGED), tokenizer.ids)
    with torch.no_grad():
        for training in (True, False):
            first, second = (model.train(training).hidden(batch) for _ in range(2))
            assert torch.equal(first, second) != training


def test_an_openai_gpt_that_gives_no_numbers(dialog_model, load, tmp_path):
    folder = shutil.copytree(dialog_model("openai-gpt"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.tokens_embed.weight"] *= 1e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the model's weights give numbers that are not finite"):
        load(folder)


def test_an_architecture_without_packing_is_named(tiny, load, caplog):
    caplog.set_level("INFO")
    load(tiny("bloom"))
    assert "bloom: packed rows are not exact for it" in caplog.text


@pytest.mark.parametrize(
    "scores, rank",
    [([1.0, 2.0, 3.0], 0), ([4.0, 2.0, 3.0], 1), ([4.0, 5.0, 3.0], 2), ([3.0, 2.0, 3.0], 1)],
    ids=["best", "second", "last", "a tie is no hit"],
)
def test_gold_ranks(scores, rank, tiny, load):
    model, tokenizer = load(tiny("gpt2"))
    batch = collate(make_instances(tokenizer.ids, [(4, [2, 2, 2]), (4, [2])]), tokenizer.ids)
    output = model(batch)
    output.mc_logits = torch.tensor([scores, [-9.0, float("-inf"), float("-inf")]])  # absent candidates never count
    assert gold_ranks(output, batch).tolist() == [rank, 0]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints that the original toolkit wrote
# ------------------------------------------------------------------------------------------------------------

OLD_SIZES = {"n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
OLD_CONFIG = {
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "finetuning_task": None,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "num_labels": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "pruned_heads": {},
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "torchscript": False,
}
OLD_OPENAI = {"afn": "gelu", "n_special": 0, "predict_special_tokens": True}
OF_2020 = {
    "bos_token_id": None,
    "eos_token_ids": None,
    "pad_token_id": None,
    "do_sample": False,
    "is_decoder": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "num_beams": 1,
    "output_past": True,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "use_bfloat16": False,
}
OLD_CONFIGS = [
    pytest.param("openai-gpt", OLD_OPENAI, id="openai-gpt of 2019"),
    pytest.param(
        "openai-gpt",
        OLD_OPENAI | OF_2020 | {"model_type": "openai-gpt", "architectures": ["OpenAIGPTDoubleHeadsModel"]},
        id="openai-gpt of 2020",
    ),
    pytest.param("gpt2", {}, id="gpt2 of 2019"),
    pytest.param(
        "gpt2", OF_2020 | {"model_type": "gpt2", "architectures": ["GPT2DoubleHeadsModel"]}, id="gpt2 of 2020"
    ),
]


def write_legacy(folder: Path, tiny_folder: Path, kind: str, keys: dict):
    """A fine-tuned checkpoint as the original toolkit left it; transformers' own model with its weights."""
    folder.mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    base = len(json.loads((folder / "vocab.json").read_text()))
    added = {token: base + n for n, token in enumerate(["<bos>", "<eos>", "<pad>", "<speaker1>", "<speaker2>"])}
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    special["unk_token"] = "<unk>" if kind == "openai-gpt" else "<|endoftext|>"
    special["additional_special_tokens"] = ["<speaker1>", "<speaker2>"]
    sizes = OLD_SIZES | {"vocab_size": base + 5}
    config = OLD_CONFIG | keys | sizes | {"vocab_size_or_config_json_file": base}
    for name, content in [
        ("added_tokens.json", added),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", {}),
        ("config.json", config),
    ]:
        (folder / name).write_text(json.dumps(content))
    torch.save({"lr": 6.25e-5}, folder / "model_training_args.bin")

    hf = DOUBLE_HEADS[kind](AutoConfig.for_model(kind, initializer_range=0.2, **sizes)).eval()
    weights = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    assert "lm_head.weight" in weights and "multiple_choice_head.summary.weight" in weights
    causal = torch.ones(64, 64).tril().view(1, 1, 64, 64)
    weights |= {f"transformer.h.{layer}.attn.bias": causal for layer in range(2)}
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return hf, list(added.values())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind, keys", OLD_CONFIGS)
def test_legacy_checkpoint(kind, keys, tiny, tmp_path, load, capfd, caplog):
    caplog.set_level("INFO")
    hf, special = write_legacy(tmp_path, tiny(kind), kind, keys)
    model, tokenizer = load(tmp_path)
    assert capfd.readouterr() == ("", "") and not caplog.records

    ids = tokenizer.ids
    assert [ids.bos, ids.eos, ids.pad, ids.speaker1, ids.speaker2] == special
    assert tokenizer.fine_tuned and tokenizer.pre_tokenizer == {"openai-gpt": "basic"}.get(kind)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    words = ["i</w>", "do</w>"] if kind == "openai-gpt" else ["i", "Ġdo"]
    assert tokenizer.encode(["i do"]) == [[vocabulary[word] for word in words]]

    instances = make_instances(ids, ONE_SHAPE)
    rows = padded_rows(instances, ids)
    with torch.no_grad():
        expected = hf(**rows)
        output = model(collate(instances, ids))
        embeds = model.embed(rows["input_ids"].flatten(0, 1), rows["token_type_ids"].flatten(0, 1))
        lm_logits = model.lm_logits(model.body(inputs_embeds=embeds)[0]).view_as(expected.logits)
    torch.testing.assert_close(lm_logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.mc_logits, expected.mc_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.lm_nll.mean(), expected.loss, rtol=1e-4, atol=1e-4)


def test_loading_a_legacy_checkpoint_prints_nothing(tiny, tmp_path):
    """In a process of its own: handlers that libraries made before a test began write past pytest's capture."""
    folders = [str(tmp_path / kind) for kind in DOUBLE_HEADS]
    for kind in DOUBLE_HEADS:
        write_legacy(tmp_path / kind, tiny(kind), kind, OLD_OPENAI if kind == "openai-gpt" else {})
    script = (
        "import logging, sys, torch\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "from model_files import find_model\n"
        "from utils import load_tokenizer\n"
        "from loading import load_model\n"
        "for folder in sys.argv[1:]:\n"
        "    files = find_model(folder)\n"
        "    load_model(files, load_tokenizer(files), torch.device('cpu'))\n"
    )
    done = run_python("-c", script, *folders)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("kind", DOUBLE_HEADS)
def test_folder_that_todays_double_heads_class_saved(kind, dialog_model, tmp_path, load):
    """Of the tied pair OpenAIGPTDoubleHeadsModel stores lm_head.weight alone, and the embedding must come from it."""
    model, tokenizer = load(dialog_model(kind))
    tokenizer.save(tmp_path)
    hf = double_heads(model, kind)
    hf.save_pretrained(tmp_path)
    if kind == "openai-gpt":
        assert "transformer.tokens_embed.weight" not in load_file(tmp_path / "model.safetensors")

    again, _ = load(tmp_path)
    torch.testing.assert_close(again.lm.get_input_embeddings().weight, hf.get_input_embeddings().weight)
    batch = collate(make_instances(tokenizer.ids, RAGGED), tokenizer.ids)
    with torch.no_grad():
        torch.testing.assert_close(again(batch).lm_nll, model(batch).lm_nll)
        torch.testing.assert_close(again(batch).mc_logits, model(batch).mc_logits)


# ------------------------------------------------------------------------------------------------------------
# Loading and saving
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
def test_loading_keeps_what_was_pretrained(kind, tiny, load):
    plain = AutoModelForCausalLM.from_pretrained(tiny(kind)).eval()
    model, tokenizer = load(tiny(kind))
    tokens = torch.randint(10, 200, (2, 7))
    with torch.no_grad():
        expected = plain(tokens).logits
        logits = model.lm_logits(model.body(input_ids=tokens)[0])
    assert logits.shape[-1] == len(tokenizer) == plain.config.vocab_size + 5
    torch.testing.assert_close(logits[..., :-5], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["openai-gpt", "gpt2", "llama", "gpt_neox", "gpt_neo", "mamba"])
def test_saved_folder_loads_in_plain_transformers_and_here(kind, tiny, tmp_path, load):
    model, tokenizer = load(tiny(kind))
    ids = tokenizer.ids
    model.save(tmp_path)
    tokenizer.save(tmp_path)
    assert {"config.json", "model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".saving*"))

    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    for config in (plain.config, plain.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (ids.bos, ids.eos, ids.pad)
    tokens = torch.randint(10, 200, (2, 7))
    again, _ = load(tmp_path)
    batch = collate(make_instances(ids, RAGGED), ids)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(tokens).logits, model.lm(tokens).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(batch).mc_logits, model(batch).mc_logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(batch).lm_nll, model(batch).lm_nll, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["openai-gpt", "gpt2", "llama"])
def test_folder_with_only_a_config_is_trained_from_scratch(kind, make_model, tmp_path):
    make_model(tmp_path, kind, weights=False)
    for file in tmp_path.iterdir():
        if file.name != "config.json":
            file.unlink()
    files = ModelFiles(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer; train it first"):
        load_tokenizer(files)
    tokenizer = load_tokenizer(files, texts=["i like cats .", "do you like dogs ?"])
    with pytest.raises(UserError, match="holds no weights; train it first"):
        load_model(files, tokenizer, torch.device("cpu"))
    model = load_model(files, tokenizer, torch.device("cpu"), from_scratch=True)
    assert model.lm.get_input_embeddings().num_embeddings == len(tokenizer) == model.lm.config.vocab_size
    batch = collate(make_instances(tokenizer.ids, RAGGED), tokenizer.ids)
    assert model(batch).lm_nll.isfinite().all()


def test_gguf_file_is_a_plain_model(tiny, tmp_path, load, capfd):
    write_gguf(tmp_path / "llama.gguf", tiny("llama"))
    capfd.readouterr()
    model, tokenizer = load(tmp_path / "llama.gguf")
    assert "\r" not in capfd.readouterr().err, "a bar in a log"
    original, original_tokenizer = load(tiny("llama"))
    texts = ["do you like dogs ?", "don't <eos>"]
    assert tokenizer.encode(texts) == original_tokenizer.encode(texts)
    assert tokenizer.ids == original_tokenizer.ids
    tokens = torch.randint(10, 200, (2, 7))
    with torch.no_grad():
        expected = original.lm(tokens).logits[..., :-5]  # but for the special tokens, which are new in both
        torch.testing.assert_close(model.lm(tokens).logits[..., :-5], expected, rtol=1e-5, atol=1e-5)

    saved = tmp_path / "saved"
    saved.mkdir()
    model.save(saved)
    plain = AutoModelForCausalLM.from_pretrained(saved).eval()
    assert not hasattr(plain.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, model.lm(tokens).logits, rtol=1e-5, atol=1e-5)
    model.half()  # transformers refuses it to a model that it loaded from a .gguf file itself


class Malice:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shrink_config(folder: Path) -> None:
    rewrite_json(folder / "config.json", n_embd=16)


def cut_file(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def not_causal(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 2}))


def plant_malice(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Malice(folder / "run")}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop_tensor, "lack 1 tensors, such as transformer.h.1.mlp.c_fc.weight"),
        (shrink_config, "have wrong shapes in 28 tensors, such as transformer.h.0.attn.c_attn.bias"),
        (cut_file, "cannot load the weights"),
        (not_causal, "a t5 model is not a causal language model"),
        (plant_malice, "cannot load the weights"),
    ],
)
def test_weights_that_cannot_be_used_are_a_users_error(damage, message, make_model, tmp_path, load):
    folder = make_model(tmp_path / "gpt2", "gpt2")
    damage(folder)
    with pytest.raises(UserError, match=message):
        load(folder)
    assert not (folder / "run").exists(), "a checkpoint ran code of its own"


def test_surplus_tensors_are_named(make_model, tmp_path, load, caplog):
    folder = make_model(tmp_path / "gpt2", "gpt2")
    weights = load_file(folder / "model.safetensors") | {"adapter.weight": torch.ones(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder)
    assert "such as adapter.weight" in caplog.text
