"""Low-rank adapters against the model they are put into, against peft alone, and as folders that the scripts take."""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from adapters import add_adapter, look_up, project, save_adapter, trained_rows
from batches import collate
from cli import UserError, log
from helpers import rewrite_json
from inputs import utterances_shown
from learner import LR, Learner, LearningSettings, optimizer_step
from model import DialogModel, with_choice_head
from model_files import ModelFiles, decoding_defaults, find_model, lasting_name
from options import Decoding
from runs import new_run_folder
from template import chat_template
from tiny_models import PACKED, RAGGED, SIZES, make_instances
from train import TrainingSettings, training_command
from utils import load_tokenizer

SHIPPED = Path(__file__).parents[1] / "data" / "smollm2-persona"
SMOLLM2_TRAINED = 4_887_937  # numbers that an adapter of rank 16 trains of it
RANK, LAYERS, WIDTH = 4, 2, 32
TIED = {"tie_word_embeddings": True}
MODELS = [
    pytest.param("openai-gpt", {}, id="openai-gpt"),
    pytest.param("gpt2", {}, id="gpt2"),
    pytest.param("llama", {}, id="llama, untied"),
    pytest.param("llama", TIED, id="llama, tied"),
    pytest.param("gemma", {}, id="gemma, whose embedding is scaled"),
    pytest.param("bloom", {}, id="bloom, in padded rows"),
]
NAN = torch.full((5, WIDTH), float("nan"))
FIVE = ("bos", "eos", "pad", "speaker1", "speaker2")


class Trained:
    """A base model in a folder, and an adapter in another that a few steps have trained on top of it."""

    def __init__(self, base: Path, folder: Path, load, steps: int = 3, **options):
        self.base, self.folder, self.learner = base, folder, None
        torch.manual_seed(1)
        self.model, self.tokenizer = load(base)
        self.batch = collate(make_instances(self.tokenizer.ids, RAGGED), self.tokenizer.ids)
        self.before = self.outputs()
        self.settings = LearningSettings(lora=RANK, lr=1e-2, **options)
        self.learner = Learner(self.model, self.settings, torch.device("cpu"))
        self.fresh = self.outputs()
        self.start = {name: weight.detach().clone() for name, weight in self.model.lm.state_dict().items()}
        self.model.train()
        for _ in range(steps):
            optimizer_step(self.learner, [self.batch], 1, False, self.settings)
        self.model.eval()

    @torch.no_grad()
    def outputs(self, model: DialogModel | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        with self.learner.autocast() if self.learner else contextlib.nullcontext():
            output = (model or self.model)(self.batch)
        return output.lm_nll, output.mc_logits

    def save(self) -> Path:
        save_adapter(self.model.lm, self.folder, self.tokenizer, str(self.base))
        return self.folder


@pytest.fixture
def trained(make_model, load, tmp_path):
    """`trained(kind, config, **options)`: a tiny model of that kind with an adapter, trained for three steps."""

    def train(kind: str, config: dict | None = None, **options) -> Trained:
        torch.manual_seed(0)
        return Trained(make_model(tmp_path / "base", kind, **config or {}), tmp_path / "adapter", load, **options)

    return train


def same(found, expected, within: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=within, atol=within)


# ------------------------------------------------------------------------------------------------------------
# What is trained, and what that computes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "config"), MODELS)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_moves_what_it_should(kind, config, trained):
    run = trained(kind, config)
    assert all(map(torch.equal, run.fresh, run.before))
    lm, now = run.model.lm, run.model.lm.state_dict()
    moved = {name for name, weight in now.items() if not torch.equal(weight, run.start[name])}
    names = {name for name, weight in lm.named_parameters(remove_duplicate=False) if weight.requires_grad}
    # The bias of the choice head moves all candidates alike: but for rounding its gradient is zero.
    bias = "multiple_choice_head.modules_to_save.default.summary.bias"
    assert moved | {bias} == names

    # The layers' inputs and outputs come to 512 numbers in each of these architectures (see tiny_models.SIZES).
    embeddings = 1 if lm.config.tie_word_embeddings else 2
    count = sum(weight.numel() for weight in run.learner.weights)
    print(f"{kind}: {count} numbers are trained")
    assert count == LAYERS * RANK * 512 + (WIDTH + 1) + embeddings * len(FIVE) * WIDTH
    assert {weight.dtype for weight in run.learner.weights} == {torch.float32}


def test_the_number_that_is_trained_of_smollm2():
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=49157, num_hidden_layers=30, tie_word_embeddings=True, **shape)
    with torch.device("meta"):
        lm = with_choice_head(LlamaForCausalLM)(config)
        add_adapter(lm, 16, 32, list(range(49152, 49157)))
    layers = 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    count = sum(weight.numel() for weight in lm.parameters() if weight.requires_grad)
    assert count == layers + 577 + 5 * 576 == SMOLLM2_TRAINED


@pytest.mark.parametrize(("kind", "config"), MODELS)
def test_merged_saved_and_loaded_by_anyone_it_computes_the_same(kind, config, trained, load, tmp_path):
    run = trained(kind, config)
    outputs = run.outputs()
    (tmp_path / "merged").mkdir()
    run.model.save(tmp_path / "merged")
    run.tokenizer.save(tmp_path / "merged")
    adapter = run.save()
    assert all(map(torch.equal, run.outputs(), outputs)), "saving changed the model"
    merged, adapted = load(tmp_path / "merged")[0], load(adapter)[0]
    for model in (merged, adapted):
        same(run.outputs(model), outputs)
        assert model.lm.state_dict().keys() == load(run.base)[0].lm.state_dict().keys()

    # in plain peft and plain transformers: logits of whole rows
    base = AutoModelForCausalLM.from_pretrained(run.base)
    base.resize_token_embeddings(len(run.tokenizer), mean_resizing=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    rows, expected = run.batch.input_ids[:, :3], None
    with torch.no_grad():
        for lm in (run.model.lm, PeftModel.from_pretrained(base, adapter).eval(), adapted.lm, merged.lm, plain.eval()):
            logits = lm(input_ids=rows).logits
            same(logits, logits if expected is None else expected)
            expected = logits


@pytest.mark.parametrize("kind", ["llama", "gemma", "phi"])
def test_a_few_rows_are_looked_up_and_projected_as_peft_does(kind):
    """Values and gradients, without a gradient of the whole embedding; phi's head has a bias, which peft forgets."""
    config = AutoConfig.for_model(kind, **SIZES["gemma" if kind == "phi" else kind], vocab_size=40)
    lm = with_choice_head(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])(config)
    add_adapter(lm, 2, 4, [3, 30, 31])
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    ids, hidden = torch.randint(40, (3, 7)), torch.randn(3, 7, 32, requires_grad=True)
    ids[0, :3] = torch.tensor([3, 30, 31])
    for ours, theirs, argument in ((look_up, embedding, ids), (project, head, hidden)):
        rows = trained_rows(theirs)[1]
        with torch.no_grad():
            rows += 1
        bias = getattr(theirs.token_adapter.base_layer, "bias", None)
        found, expected = ours(theirs, argument), theirs(argument) + (0 if bias is None else bias)
        same(found, expected)
        weights = torch.randn_like(found)
        wanted = [rows, hidden] if argument is hidden else [rows]
        same(*(torch.autograd.grad((each * weights).sum(), wanted) for each in (found, expected)))


# ------------------------------------------------------------------------------------------------------------
# Precision, memory
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["openai-gpt", "gpt2", "llama"])
def test_in_bf16_what_is_frozen_is_stored_so(kind, trained, load, tmp_path):
    full, run = trained(kind), trained(kind, bf16=True)
    for name, weight in run.model.lm.named_parameters():
        kept = weight.requires_grad or weight.ndim == 1
        assert weight.dtype == (torch.float32 if kept else torch.bfloat16), name
    same(run.outputs()[0].mean(), full.outputs()[0].mean(), within=0.05)
    (tmp_path / "merged").mkdir()
    run.model.save(tmp_path / "merged")
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["openai-gpt", "gpt2", "llama"])
def test_gradient_checkpointing_changes_no_step(kind, trained):
    for one, other in zip(trained(kind).outputs(), trained(kind, gradient_checkpointing=True).outputs(), strict=True):
        same(one, other)


@pytest.mark.parametrize("kind", PACKED)
def test_attention_by_products_sees_what_the_mask_of_packed_rows_shows(kind, dialog_model, load):
    """It is what trains in bf16 on a CPU."""
    model, tokenizer = load(dialog_model(kind))
    batch = collate(make_instances(tokenizer.ids, RAGGED), tokenizer.ids)
    with torch.no_grad():
        expected = model(batch)
        model.lm.set_attn_implementation("eager")
        found = model(batch)
    same((found.lm_nll, found.mc_logits), (expected.lm_nll, expected.mc_logits), within=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_is_trained_and_names_its_base(trained):
    run = trained("llama", TIED)
    folder = run.save()
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    saved = load_file(folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(weight.numel() for weight in run.learner.weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(run.base), RANK, 2 * RANK)
    files = find_model(str(folder))
    assert (files.folder, files.adapters, files.tokenizer_folder) == (run.base, (folder,), folder)


def test_an_adapter_on_an_adapter(trained, load, tmp_path):
    first = trained("gpt2")
    second = Trained(first.save(), tmp_path / "second", load)
    assert find_model(str(second.save())).adapters == (first.folder, second.folder)
    same(second.before, second.outputs(first.model))
    model, _ = load(second.folder)
    same(second.outputs(model), second.outputs())
    assert model.lm.choice_head_trained and not load(first.base)[0].lm.choice_head_trained


def test_an_adapter_that_peft_alone_made(tiny, load, tmp_path):
    """Of another tool: without our tokens, head and tokenizer."""
    lm = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    adapted = get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    model, _ = load(tmp_path / "adapter")
    expected = adapted(input_ids=torch.arange(9)[None]).logits
    same(model.lm(input_ids=torch.arange(9)[None]).logits[..., : expected.shape[-1]], expected)
    assert not model.lm.choice_head_trained


@pytest.fixture
def made_by_peft(make_model, tmp_path):
    """`made_by_peft(**options)`: an adapter on a Llama with biases, by peft alone, and its logits of `ROW`."""

    def make(**options) -> tuple[Path, torch.Tensor]:
        lm = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "base", "llama", attention_bias=True))
        adapted = get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
        for weight in adapted.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.1)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", adapted.eval()(input_ids=ROW).logits

    return make


ROW = torch.arange(9)[None]


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 4}},
        {"bias": "all"},
        {"modules_to_save": ["norm"], "lora_dropout": 0.5},
        {"trainable_token_indices": [3, 4]},
    ],
    ids=str,
)
def test_settings_of_peft_that_are_not_ours(options, made_by_peft, load):
    folder, expected = made_by_peft(**options)
    model, _ = load(folder)
    same(model.lm(input_ids=ROW).logits[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("tokens", [-7, 2, 64], ids=lambda tokens: f"{tokens} tokens more than the base")
@pytest.mark.parametrize("learned", [None, ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
def test_an_adapter_that_holds_a_whole_embedding(learned, tokens, make_model, load, tmp_path):
    """As other tools save it where they added tokens of their own to the base."""
    lm = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "base", "llama"))
    lm.resize_token_embeddings(lm.config.vocab_size + tokens)
    adapted = get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=learned))
    for weight in adapted.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model, tokenizer = load(tmp_path / "adapter")
    found, expected = model.lm(input_ids=ROW).logits, adapted.eval()(input_ids=ROW).logits
    shared = min(len(tokenizer), expected.shape[-1])
    assert found.shape[-1] == len(tokenizer)
    same(found[..., :shared], expected[..., :shared])


def test_what_peft_would_leave_out_or_merge_to_something_else(made_by_peft, load, monkeypatch):
    folder, _ = made_by_peft(bias="all")
    rewrite_json(folder / "adapter_config.json", of_a_newer_peft=True)
    told = []
    monkeypatch.setattr(log, "warning", told.append)
    load(folder)
    assert len(told) == 1 and "Unexpected keyword arguments ['of_a_newer_peft']" in told[0]
    keep(folder / "adapter_model.safetensors", lambda name: "bias" not in name)
    with pytest.raises(UserError, match="lacks .* tensors, such as .*bias"):
        load(folder)
    folder, _ = made_by_peft(layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(UserError, match="computes something else when it is merged"):
        load(folder)


def test_all_weights_can_be_trained_on_from_an_adapter(trained, load):
    run = trained("llama", TIED)
    model, _ = load(run.save())
    before = {name: weight.detach().clone() for name, weight in model.lm.named_parameters()}
    settings = LearningSettings(lr=1e-2)
    optimizer_step(Learner(model, settings, torch.device("cpu")), [run.batch], 1, False, settings)
    moved = {name for name, weight in model.lm.named_parameters() if not torch.equal(weight, before[name])}
    assert moved | {"multiple_choice_head.summary.bias"} == before.keys()


def test_the_adapter_that_comes_with_the_toolkit(tiny):
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 12e6
    config = json.loads((SHIPPED / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["r"]) == ("smollm2", 16)
    weights = load_file(SHIPPED / "adapter_model.safetensors").values()
    assert sum(weight.numel() for weight in weights) == SMOLLM2_TRAINED
    assert all(weight.dtype == torch.bfloat16 and weight.isfinite().all() for weight in weights)
    files = ModelFiles(tiny("llama"), adapters=(SHIPPED,))
    tokenizer = load_tokenizer(files)
    assert (len(tokenizer), tokenizer.max_history, tokenizer.ids.token_types) == (49157, -1, False)
    assert tokenizer.hf.chat_template == chat_template(utterances_shown(-1))
    Decoding(**decoding_defaults(files))  # within their bounds


def test_names_that_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = new_run_folder("gpt2", tmp_path / "runs")
    (run / "training_args.json").write_text("{}")
    assert lasting_name("runs/latest") == lasting_name(str(run)) == str(run)
    (tmp_path / "runs" / "latest").unlink()
    (tmp_path / "runs" / "latest").write_text(run.name)  # where links are not possible
    assert lasting_name("runs/latest") == str(run)
    names = {"gpt2": "openai-community/gpt2", "a/b": "a/b", "smollm2": "smollm2", "https://host/a": "https://host/a"}
    assert {name: lasting_name(name) for name in names} == names


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("adapter_config.json", lambda path: path.write_text("{"), "adapter_config.json: .*; expected peft's JSON"),
        ("adapter_config.json", lambda path: path.write_text("{}"), "cannot read .*base_model_name_or_path"),
        ("adapter_config.json", lambda path: rewrite_json(path, base_model_name_or_path=None), "the base is None"),
        (
            "adapter_config.json",
            lambda path: rewrite_json(path, base_model_name_or_path="./gone"),
            "no such model: ./gone",
        ),
        (
            "adapter_config.json",
            lambda path: rewrite_json(path, base_model_name_or_path=str(path.parent)),
            "is an adapter of this one; expected a model",
        ),
        ("adapter_config.json", lambda path: rewrite_json(path, peft_type="NONSENSE"), "cannot use the adapter in"),
        ("adapter_config.json", lambda path: rewrite_json(path, r=3), "cannot use the adapter in .*size mismatch"),
        ("adapter_model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:99]), "cannot use the adapter"),
        ("adapter_model.safetensors", lambda path: path.unlink(), "cannot use the adapter"),
        (
            "adapter_model.safetensors",
            lambda path: keep(path, lambda name: "c_fc.lora_A" not in name),
            "lacks 2 tensors",
        ),
        ("adapter_model.safetensors", lambda path: keep(path, lambda name: True, x=[1.0]), "a surplus of 1 tensors"),
        # a special token's embedding, which no short text shows
        (
            "adapter_model.safetensors",
            lambda path: keep(path, lambda name: True, **{"transformer.wte.token_adapter.trainable_tokens_delta": NAN}),
            "holds nan or infinity in 1 tensors",
        ),
    ],
)
def test_a_folder_that_is_not_whole(file, change, said, trained, load):
    folder = trained("gpt2", steps=0).save()
    change(folder / file)
    with pytest.raises(UserError, match=said):
        load(folder)


def test_a_revision_of_the_base_is_named(trained, load, caplog):
    folder = trained("gpt2", steps=0).save()
    rewrite_json(folder / "adapter_config.json", revision="v2")
    load(folder)
    assert "adapter_config.json: not read: the revision 'v2' of the base" in caplog.text


def keep(path: Path, wanted, **more) -> None:
    weights = {name: tensor for name, tensor in load_file(path).items() if wanted(name)}
    save_file(weights | {f"base_model.model.{name}": torch.as_tensor(value) for name, value in more.items()}, path)


def test_an_adapter_on_another_model_than_its_own(trained, load, tiny):
    folder = trained("gpt2", steps=0).save()
    rewrite_json(folder / "adapter_config.json", base_model_name_or_path=str(tiny("llama")))
    with pytest.raises(UserError, match="cannot use the adapter in .*expected one that peft can merge into the model"):
        load(folder)


def test_an_architecture_without_adapters(tiny, load):
    model, _ = load(tiny("mamba"))
    with pytest.raises(UserError, match="no adapter for a mamba model: .*; leave --lora out"):
        model.add_adapter(4, 8)


# ------------------------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_decided_by_the_rest():
    assert (LearningSettings().lr, LearningSettings().lora_alpha) == (6.25e-5, None)
    adapted = LearningSettings(lora=16)
    assert (adapted.lr, adapted.lora_alpha) == (pytest.approx(6.25e-4), 32)
    assert (LearningSettings(lora=16, lr=1e-3).lr, LearningSettings(lora=4, lora_alpha=4).lora_alpha) == (1e-3, 4)
    assert training_command(TrainingSettings()) == "python train.py"
    assert training_command(TrainingSettings(token_types=True)) == "python train.py --token_types"
    assert training_command(TrainingSettings(token_types=False)) == "python train.py --no_token_types"
    assert training_command(TrainingSettings(lora=8)) == "python train.py --lora 8"
    given = TrainingSettings(lora=8, lora_alpha=8, lr=LR, lora_save="adapter")
    assert training_command(given) == f"python train.py --lr {LR} --lora 8 --lora_alpha 8 --lora_save adapter"
    assert TrainingSettings(**asdict(given)) == given  # as --resume reads them


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_alpha": 8}, "--lora_alpha 8 without --lora"),
        ({"lora_save": "adapter"}, "--lora_save adapter without --lora"),
        ({"lora": 8, "fp16": "O2"}, "--fp16 O2 keeps"),
        ({"lora": -1}, "at least 0"),
    ],
)
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(UserError, match=said):
        TrainingSettings(**options)
