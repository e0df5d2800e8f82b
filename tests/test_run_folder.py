"""What a run folder shows of a run: TensorBoard events, sampled replies, curves.png and the model card."""

import contextlib
import errno
import io
import json
import os
import shutil
import socket
import struct
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import Event

import card
import checkpoints
import files
import runs
import train
from cli import UserError, log
from generation import generate_replies
from inputs import build_prefix
from learner import Learner
from model_files import find_run
from options import Decoding
from template import chat_template
from tiny_models import TEXTS
from train import TrainingSettings


def run_train(*options) -> list[str]:
    """train.py's main in this process; the lines that it told the user."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, options)])
        patch.setattr(log, "info", told.append)
        train.main()
    return "\n".join(told).splitlines()


@pytest.fixture(scope="module")
def options(tiny, tmp_path_factory):
    """`options(folder)`: a run of two epochs, each of three steps and a validation of five utterances."""
    data = tmp_path_factory.mktemp("data") / "data.json"
    utterances = [{"history": TEXTS[i:3], "candidates": [TEXTS[4], TEXTS[5], TEXTS[i + 3]]} for i in range(4)]
    dialog = {"personality": TEXTS[5:], "utterances": utterances}
    data.write_text(json.dumps({"train": [dialog] * 3, "valid": [dialog, dialog | {"utterances": utterances[:1]}]}))

    def options(folder: Path) -> list:
        kept = ["--runs_dir", folder, "--dataset_cache", data.with_name("cache.bin"), "--device", "cpu"]
        learning = ["--lr", 3e-3, "--gradient_accumulation_steps", 1, "--n_epochs", 2, "--eval_before_start"]
        return ["--model", tiny("gpt2"), "--dataset_path", data, *kept, *learning]

    return options


@pytest.fixture(scope="module")
def run(options, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a run, which no test may change, and what it told."""
    runs = tmp_path_factory.mktemp("runs")
    told = run_train(*options(runs))
    return find_run(runs / "latest"), told


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(folder) if "loss" in record]


def events(folder: Path) -> dict[str, dict[int, float | str]]:
    """The values of every tag that TensorBoard shows, by step; a file is of length, checksum, event, checksum, ..."""
    found = defaultdict(dict)
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event, content = Event.FromString(content[12 : 12 + size]), content[16 + size :]
            for value in event.summary.value:
                text = b"".join(value.tensor.string_val).decode()
                found[value.tag][event.step] = text or value.simple_value
    return found


def card_of(folder: Path) -> tuple[ModelCard, dict[str, float], list[str]]:
    """As the hub's own library reads it; its figures; the rows of its table."""
    loaded = ModelCard.load(folder / "README.md")
    table = [line for line in loaded.text.splitlines() if line.startswith("|") and "%" in line]
    return loaded, {result.metric_name: result.metric_value for result in loaded.data.eval_results}, table


def test_tensorboard(run):
    folder, _ = run
    found, steps = events(folder), [record for record in records(folder) if "loss" in record]
    for name in ("loss", "lm_loss", "mc_loss", "gradient_norm", "lr", "utterances/s", "skipped"):
        assert found[f"training/{name}"] == pytest.approx({record["step"]: record[name] for record in steps}, rel=1e-6)
    assert all(0 < record["utterances/s"] < 1e5 for record in steps)
    validations = [record for record in records(folder) if "nll" in record]
    for name, tag in (("nll", "nll"), ("token_ppl", "token_ppl"), ("hits@1", "hits_1")):  # no @ in its names
        expected = {record["step"]: record[name] for record in validations}
        assert list(expected) == [0, 3, 6] and found[f"validation/{tag}"] == pytest.approx(expected, rel=1e-6)


def test_sampled_replies(run):
    """In TensorBoard, the log and the terminal: of the same utterances each time, and another model's are others."""
    folder, told = run
    samples = [record["replies"] for record in records(folder) if "replies" in record]
    asked = [[{name: reply[name] for name in reply if name != "reply"} for reply in replies] for replies in samples]
    assert len(samples) == 3 and asked[0] == asked[1] == asked[2]
    assert samples[0] != samples[2]
    # every second one of the five utterances of validation
    assert asked[0] == [{"persona": TEXTS[5:], "history": TEXTS[2], "gold": TEXTS[i]} for i in (3, 5, 3)]
    shown = events(folder)
    for i, reply in enumerate(samples[2], 1):
        assert f"  {reply['history'][-60:]} -> {reply['reply']}" in told
        expected = f"    persona: {TEXTS[5]} {TEXTS[6]}\n    history: {reply['history']}\n"
        text = shown[f"replies/{i}/text_summary"]
        assert list(text) == [0, 3, 6]
        assert text[6] == f"{expected}    gold: {reply['gold']}\n    reply: {reply['reply']}"


def test_samples_change_no_loss(run, options, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "sample_replies", lambda *_: [])
    run_train(*options(tmp_path))
    assert losses(tmp_path / "latest") == losses(run[0])


def test_resumed_run_has_whole_curves_and_card(run, tmp_path):
    folder = tmp_path / run[0].name
    shutil.copytree(run[0], folder)
    before, text = (folder / "curves.png").read_bytes(), (folder / "README.md").read_bytes()
    assert before[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", before[16:24]) == (1200, 360)
    assert len(before) > 10_000
    checkpoints.checkpoint_files(folder)[-1].unlink()
    run_train("--resume", folder)  # the second epoch again: nothing is lost and nothing twice
    assert ((folder / "curves.png").read_bytes(), (folder / "README.md").read_bytes()) == (before, text)
    run_train("--resume", folder, "--n_epochs", 3)
    assert [step for step, _ in losses(folder)] == list(range(1, 10))
    assert (folder / "curves.png").read_bytes() != before
    _, figures, table = card_of(folder)
    assert [row.split("|")[1].strip() for row in table] == ["0", "1", "2", "**3**"]
    assert table[:2] == card_of(run[0])[2][:2]
    last = [record for record in records(folder) if "nll" in record][-1]
    assert figures["Hits@1"] == pytest.approx(last["hits@1"], abs=1e-4)
    assert "--n_epochs" not in (folder / "README.md").read_text()  # three is what it is by default


def test_a_run_knows_its_dataset_by_its_content(run, options, tmp_path):
    """Moved, it is the same one; with other texts of the same number, it is another."""
    folder, data = tmp_path / "run", Path(options(tmp_path)[3])
    shutil.copytree(run[0], folder)
    (moved := tmp_path / "moved.json").write_bytes(data.read_bytes())
    run_train("--resume", folder, "--dataset_path", moved, "--n_epochs", 3)
    assert [step for step, _ in losses(folder)] == list(range(1, 10))
    moved.write_text(moved.read_text().replace(TEXTS[4], TEXTS[4][::-1]))
    resume = "--resume", folder, "--n_epochs", 4
    with pytest.raises(UserError, match=f"content of {moved} is not .*--changed_dataset"):
        run_train(*resume)
    run_train(*resume, "--changed_dataset")
    assert [step for step, _ in losses(folder)] == list(range(1, 13))
    run_train(*resume[:3], 5)  # it is the run's dataset from now on
    with pytest.raises(UserError, match="other data, of 12 utterances"):  # a launcher's restart: of the same options
        state, settings = {"size": 12, "dataset": "a"}, SimpleNamespace(dataset_digest="b", changed_dataset=False)
        checkpoints.restore(state, None, checkpoints.Progress(), 12, settings)


def test_model_card(run, monkeypatch):
    folder, _ = run
    loaded, figures, table = card_of(folder)
    assert (loaded.data.library_name, loaded.data.pipeline_tag) == ("transformers", "text-generation")
    assert loaded.data.language is None and loaded.data.base_model is None  # not known of one's own data and folder
    assert {"dialogue", "persona-chat", "transfertransfo"} == set(loaded.data.tags)
    last = [record for record in records(folder) if "nll" in record][-1]
    assert figures == pytest.approx({"Hits@1": last["hits@1"], "perplexity per token": last["token_ppl"]}, rel=1e-2)
    assert [row.split("|")[1].strip() for row in table] == ["0", "1", "**2**"]
    mean = sum(loss for _, loss in losses(folder)[3:]) / 3
    assert table[2].split("|")[2:4] == [" **6** ", f" **{mean:.3f}** "]
    # the command in it trains so
    (command,) = [line for line in loaded.text.splitlines() if line.startswith("python train.py")]
    monkeypatch.setattr(sys, "argv", command.split()[1:])
    again, settings = asdict(train.parse_settings()), json.loads((folder / "training_args.json").read_text())
    differing = {name for name in settings if settings[name] != again[name]}
    assert differing <= {"runs_dir", "dataset_cache", "device", "dataset_digest"} and "--eval_before_start" in command


@pytest.mark.parametrize("kind", ["gpt2", "llama", "openai-gpt"])
def test_code_of_the_card_gives_the_reply_of_the_toolkit(kind, dialog_model, load, monkeypatch):
    monkeypatch.chdir(dialog_model(kind))
    model, tokenizer = load(Path("."), pre_tokenizer="basic" if kind == "openai-gpt" else None)
    if kind == "llama":
        tokenizer.hf.chat_template = chat_template(5)
        tokenizer.save(Path("."))
    code, shown = card.recipe(tokenizer, adapter_alone=False).split("```python\n")[1].split("```")[0], io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code, {})
    persona, history = tokenizer.encode(["i like cats.", "do you have a pet ?"])
    prefix = build_prefix([persona], [history], tokenizer.ids)
    decoding = Decoding(no_sample=True, min_length=0)
    (reply,) = generate_replies(model, [prefix], decoding, [torch.Generator()])
    assert reply and shown.getvalue().strip() == tokenizer.hf.decode(reply, clean_up_tokenization_spaces=False).strip()


@pytest.mark.parametrize("what", [["--lr", 0.3], ["--lora", 4, "--lr", 1]], ids=["all weights", "an adapter"])
def test_keep_best_has_the_weights_and_the_card_of_the_best_epoch(what, options, tmp_path):
    """By Hits@1, then NLL. An epoch that is not the best one is in the table, and the figures stay the best one's."""
    for seed in range(20):  # which epoch is the best differs between processors: until it is not the last one
        run_train(*options(tmp_path / "run"), "--keep_best", *what, "--n_epochs", 3, "--seed", seed)
        folder = find_run(tmp_path / "run" / "latest")
        found = [record for record in records(folder) if record["step"] and "nll" in record]
        scores = [(record["hits@1"], -record["nll"]) for record in found]
        best = scores.index(max(scores))
        if best < 2:
            break
    else:
        pytest.fail("the last epoch is the best with every seed")
    _, figures, table = card_of(folder)
    assert ["**" in row for row in table] == [False, *(epoch == best for epoch in range(3))]
    run_train(*options(tmp_path / "again"), "--model", folder, "--n_epochs", 0)
    (found,) = [record for record in records(tmp_path / "again" / "latest") if "nll" in record]
    assert (found["hits@1"], -found["nll"]) == pytest.approx(max(scores), rel=1e-5)
    assert figures["Hits@1"] == pytest.approx(found["hits@1"], abs=1e-4)
    assert figures["perplexity per token"] == pytest.approx(found["token_ppl"], rel=1e-3)


def test_what_the_card_says_of_model_and_data(run, tiny, load, tmp_path, monkeypatch):
    """A model of the hub and PersonaChat are named; a step that was skipped is in no mean."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    settings = train.parse_settings()
    lines = (run[0] / "log.jsonl").read_text().splitlines()
    skipped = json.loads(lines[2]) | {"loss": float("nan"), "lm_loss": float("nan")}
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, json.dumps(skipped)]))
    first = [record for record in records(run[0]) if "nll" in record][1]
    best, command = (first["hits@1"], -first["nll"]), train.training_command(settings)
    card.describe(tmp_path, tmp_path, best, settings, command, load(tiny("openai-gpt"), pre_tokenizer="spacy")[1])
    loaded, _, table = card_of(tmp_path)
    assert loaded.data.base_model == "openai-community/openai-gpt" and loaded.data.language == "en"
    assert loaded.data.eval_results[0].dataset_name == "PersonaChat" and "do n't" in loaded.text
    assert "```bash\npython train.py\n```" in loaded.text
    assert "nan" not in "".join(table) and table[1].startswith("| **1** |")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_goes_on_on_another_device_than_it_was_started_on(device):
    learner = SimpleNamespace(device=torch.device(device), load_state_dict=lambda state: None)
    before = torch.get_rng_state()
    state = {"size": 3, "progress": {"step": 7}, "generators": [{"cpu": before}], "learner": {}}
    torch.manual_seed(123)
    settings = SimpleNamespace(n_epochs=3, seed=0, dataset_digest="", changed_dataset=False)
    checkpoints.restore(state, learner, progress := checkpoints.Progress(), 3, settings)
    assert progress.step == 7
    assert torch.equal(torch.get_rng_state(), before) == (device == "cpu")  # another generator begins anew


@pytest.mark.parametrize(
    ("model", "known"),
    [("gpt2", "openai-community/gpt2"), ("a/b", "a/b"), (".", ""), ("~/", ""), ("https://host/a.tar.gz", "")],
)
def test_base_model_is_one_of_the_hub(model, known, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", model])
    assert train.parse_settings().base_model == known


def test_a_run_in_use_is_refused(run, tmp_path):
    """Until who uses it has ended; and what one left there that was killed goes, but nothing else."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    left = [folder / name / ".saving-.x" for name in ("", "checkpoints", "adapter")]
    other = folder / ".saving-cache.bin.x"  # somebody's dataset cache, which has a lock of its own
    for each in (*left, other):
        each.mkdir(parents=True)
    before = (folder / "log.jsonl").read_bytes()
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with contextlib.ExitStack() as held:
        runs.hold_run(folder, held)
        assert [each.exists() for each in (*left, other)] == [False] * 3 + [True]
        left[0].mkdir()  # by who holds it
        with pytest.raises(UserError, match=f"^{folder} is in use by {holder}; wait until it ends"):
            run_train("--resume", folder, "--n_epochs", 3)
        assert (folder / "log.jsonl").read_bytes() == before and left[0].exists()
    run_train("--resume", folder, "--n_epochs", 3)
    assert len(losses(folder)) == 9


DAMAGES = {
    "no key": lambda state: state.pop("size"),
    "no weight": lambda state: state["learner"]["model"].popitem(),
    "another shape": lambda state: state["learner"]["model"].update(
        {next(iter(state["learner"]["model"])): torch.zeros(3)}
    ),
    "a group more": lambda state: state["learner"]["optimizer"]["param_groups"].append({"params": []}),
    "no groups": lambda state: state["learner"]["optimizer"]["param_groups"].clear(),
    "a weight more": lambda state: state["learner"]["optimizer"]["param_groups"][0]["params"].append(99),
    "another moment": lambda state: state["learner"]["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
    "no moment": lambda state: state["learner"]["optimizer"]["state"][0].pop("step"),
    "an unknown weight": lambda state: state["learner"]["optimizer"]["state"].update({99: {}}),
    "a text": lambda state: state["progress"].update(step="3"),
    "no generator": lambda state: state["generators"].__setitem__(0, {"cpu": torch.zeros(3)}),
    "a list": lambda state: state.update(learner=[]),
    "a weight of another type": lambda state: state["learner"]["model"].update(
        {name: weight.half() for name, weight in state["learner"]["model"].items()}
    ),
    "a weight without numbers": lambda state: state["learner"]["optimizer"]["state"][0].update(
        exp_avg=state["learner"]["optimizer"]["state"][0]["exp_avg"].to("meta")
    ),
    "a sparse moment": lambda state: state["learner"]["optimizer"]["state"][0].update(
        exp_avg=state["learner"]["optimizer"]["state"][0]["exp_avg"].to_sparse()
    ),
    "a surplus": lambda state: state["learner"]["model"].update(x=torch.zeros(1)),
    "masters": lambda state: state["learner"].update(masters=["x"]),
    "another chance": lambda state: state["generators"][0].update(cpu=torch.zeros_like(torch.get_rng_state())),
    "before the first epoch": lambda state: state["progress"].update(epoch=-3),
    "more than there is": lambda state: state["progress"].update(done=10**9),
    "a text among scores": lambda state: state["progress"].update(best="x"),
    "an unknown number": lambda state: state["progress"].update(count_step=3),
}


@pytest.fixture(scope="module")
def learner_of(run, load) -> Learner:
    settings = TrainingSettings(**json.loads((run[0] / "training_args.json").read_text()))
    return Learner(load(run[0])[0], settings, torch.device("cpu"))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_does_not_fit_gives_way_to_the_one_before(name, run, learner_of, tmp_path, caplog):
    shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints")
    older, newest = checkpoints.checkpoint_files(tmp_path)
    state = torch.load(newest)
    DAMAGES[name](state)
    torch.save(state, newest)
    assert checkpoints.newest_checkpoint(tmp_path, learner_of)["progress"]["step"] == 3
    (said,) = caplog.messages
    assert said.startswith(f"warning: {newest} cannot be read (") and "trying the one before it" in said
    newest.unlink()
    caplog.clear()
    assert checkpoints.newest_checkpoint(tmp_path, learner_of) and not caplog.messages


def test_settings_and_layout_of_a_saved_optimiser_are_not_taken_over(run, learner_of, tmp_path):
    """By settings that lack, numbers in another order and moments of one number in memory torch crashes."""
    shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step-999999999.pt").mkdir()  # neither read nor removed
    newest = checkpoints.checkpoint_files(tmp_path)[-2]
    state = torch.load(newest)
    (group,), moments = state["learner"]["optimizer"]["param_groups"], state["learner"]["optimizer"]["state"]
    group.update(params=group["params"][::-1], amsgrad=True, fused=False)
    del group["betas"]
    moments[0]["exp_avg"] = torch.ones(1, 1).expand(moments[0]["exp_avg"].shape)
    torch.save(state, newest)
    learner_of.load_state_dict(checkpoints.newest_checkpoint(tmp_path, learner_of)["learner"])
    (group,) = learner_of.optimizer.param_groups
    assert (group["betas"], group["fused"], group["amsgrad"]) == ((0.9, 0.999), True, False)
    moment = learner_of.optimizer.state[learner_of.weights[0]]["exp_avg"]
    assert moment.is_contiguous() and moment.eq(1).all()
    checkpoints.save_checkpoint(tmp_path, learner_of, checkpoints.Progress(step=9), 12, "")
    assert (tmp_path / "checkpoints" / "step-999999999.pt").is_dir()


def test_odd_lines_of_a_log_are_left_out(run, tmp_path):
    good = (run[0] / "log.jsonl").read_bytes()
    odd = [
        "null",
        "3",
        "[]",
        "{}",
        "x",
        '{"step": null, "epoch": 1}',
        '{"step": 1, "epoch": 1, "loss": "x"}',
        "[" * 99999,
    ]
    odd += ['{"step": 1, "epoch": 1, "nll": 1}', '{"step": true, "epoch": 1}', "\xff"]
    (tmp_path / "log.jsonl").write_bytes("\n".join([*odd, ""]).encode("latin-1") + good)
    assert card.read_log(tmp_path) == card.read_log(run[0])
    runs.open_log(tmp_path, 7)
    assert (tmp_path / "log.jsonl").read_bytes() == good


def test_a_file_system_without_locks_is_told_of_once(tmp_path, monkeypatch, caplog):
    def no_locks(self, **_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.FileLock, "acquire", no_locks)
    for wait in (False, True):
        with files.lock(tmp_path / "x", wait):
            pass
    (said,) = caplog.messages
    assert f"the file system of {tmp_path} has no locks" in said


def test_a_full_disk_keeps_card_and_weights_of_before(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    before = {name: (folder / name).read_bytes() for name in ("README.md", "curves.png", "model.safetensors")}

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(UserError, match=f"cannot write to {folder}: .*No space left"):
        run_train("--resume", folder, "--n_epochs", 3)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not list(folder.glob(".saving-*"))
