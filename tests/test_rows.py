"""Dialog rows against a row for each reply with its whole history: losses, scores, gradients, and what is in them."""

import json
import logging
import math
import multiprocessing
import os
import signal
import tracemalloc
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from batches import collate, load_batches
from conversation import Conversation
from dialogs import Dialogs
from helpers import IDS, make_split
from inputs import Instances
from learner import Learner, LearningSettings, StepSampler, collate_step, optimizer_step
from model import DialogModel
from options import Decoding
from rows import DialogRows
from utils import load_dataset

B, E, P, S1, S2 = IDS.bos, IDS.eos, IDS.pad, IDS.speaker1, IDS.speaker2


def dialog(persona, texts, bot_opens=False, distractors=(0, 2, 1, 3)):
    """Replies of the bot to all of `texts` that the other person says, with unequal numbers of distractors."""
    utterances = []
    for place in range(0 if bot_opens else 1, len(texts), 2):
        others = [[40 + place, 50 + n] for n in range(distractors[place // 2 % len(distractors)])]
        utterances.append((texts[:place], [*others, texts[place]]))
    return persona, utterances


TEXTS = [[10, 11], [12], [13, 14, 15], [16, 17], [18], [19, 20, 21, 22], [23], [24, 25]]
DIALOGS = [
    dialog([[1, 2], [3]], TEXTS),
    dialog([], TEXTS[:5], bot_opens=True),
    dialog([[4, 5, 6]], TEXTS[2:4]),
    dialog([[7]], TEXTS[1:8], distractors=(1,)),
]


def rows_of(dialogs, limit=100, most=100, **options) -> tuple[DialogRows, Instances]:
    instances = Instances(make_split(dialogs), IDS, -1, limit, **options)
    return DialogRows(instances, most), instances


def test_a_row_holds_a_dialog():
    rows, _ = rows_of([dialog([[1, 2], [3]], TEXTS[:4], distractors=(1, 0))])
    (row,) = rows
    assert row.trunk == [B, 1, 2, 3, S2, 10, 11, S1, 12, S2, 13, 14, 15, S1, 16, 17]
    assert row.token_types == [S1] * 4 + [S2] * 3 + [S1] * 2 + [S2] * 4 + [S1] * 3
    batch = collate([row], IDS)
    # after it: a distractor and the gold reply's <eos> for the first reply, the <eos> alone for the second
    assert batch.input_ids[0, 16:].tolist() == [41, 50, E, E, E]
    assert batch.positions[0, 16:].tolist() == [8, 9, 10, 9, 16]
    assert batch.forks[0, 16:].tolist() == [7, 7, 7, 8, 15]
    assert batch.ends.tolist() == [[18, 19], [20, 0]] and batch.n_candidates.tolist() == [2, 1]
    assert batch.lm_positions.tolist() == [7, 8, 13, 14, 15] and batch.lm_labels.tolist() == [12, E, 16, 17, E]


def by_reply(model: DialogModel, rows, ids) -> tuple[list[list[float]], list[list[float]], torch.Tensor]:
    """Losses of each reply's tokens, and scores of its candidates, in order; the loss of all."""
    batch = collate(rows, ids)
    output = model(batch)
    golds = [(reply.start, reply.candidates[-1]) for row in rows for reply in row.replies]
    sizes = [gold.fork - start + len(gold.tokens) for start, gold in golds]
    scores = [row[:count].tolist() for row, count in zip(output.mc_logits, batch.n_candidates, strict=True)]
    loss = output.lm_nll.mean() + F.cross_entropy(output.mc_logits, batch.n_candidates - 1)
    return [part.tolist() for part in output.lm_nll.split(sizes)], scores, loss


@pytest.mark.parametrize("kind", ["openai-gpt", "gpt2", "llama"])
@pytest.mark.parametrize("num_candidates", [0, 1, 2])
@pytest.mark.parametrize("most", [100, 2])
def test_losses_scores_and_gradients_are_those_of_a_row_for_each_reply(kind, num_candidates, most, dialog_model, load):
    model, _ = load(dialog_model(kind))
    model.ids = model.ids.__class__(**(vars(IDS) | {"token_types": model.ids.token_types}))
    rows, instances = rows_of(DIALOGS, most=most, num_candidates=num_candidates)
    assert rows.sizes.tolist() == ([4, 3, 1, 3] if most > 2 else [2, 2, 2, 1, 1, 2, 1])
    found, expected = [], []
    for each, result in ((list(rows), found), (list(instances), expected)):
        model.zero_grad()
        nll, scores, loss = by_reply(model, each, IDS)
        loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        result.extend([nll, scores, gradients])
    for name, one, other in zip(("nll", "scores"), found, expected, strict=False):
        for row, right in zip(one, other, strict=True):
            assert row == pytest.approx(right, abs=1e-5), name
    for name, gradient in expected[2].items():
        scale = gradient.abs().max()
        torch.testing.assert_close(found[2][name], gradient, rtol=0, atol=1e-4 * float(scale) + 1e-7, msg=name)


def test_a_chat_computes_only_what_is_new_and_forgets_a_quarter_at_once(dialog_model, load):
    """Thirty turns with the whole history, in a model of 128 tokens."""
    model, tokenizer = load(dialog_model("openai-gpt"))
    decoding = Decoding(no_sample=True, max_length=4, min_length=4)
    chat = Conversation(model, tokenizer, ["i like cats ."], decoding, max_history=-1, seed=0)
    computed, run_body = [], model.run_body
    model.run_body = lambda tokens, *rest, **more: computed.append(tokens.shape[1]) or run_body(tokens, *rest, **more)
    started_anew = 0
    for turn in range(30):
        forgotten, seen = chat.forgotten, len(computed)
        chat.reply("hi you")
        new = len(tokenizer.encode(["hi you"])[0]) + 2 + 1  # two speakers, and the last token of the reply before
        if turn and chat.forgotten == forgotten:
            assert computed[seen] <= new, turn
        started_anew += chat.forgotten > forgotten
    assert 0 < started_anew < 10


def test_histories_that_do_not_go_on_from_one_another_begin_rows():
    """A reply to the same as the last one, to what another dialog said, to a part of it."""
    told = [([TEXTS[0]], [[3]]), ([TEXTS[0]], [[4]]), ([TEXTS[0], [4], TEXTS[2]], [[5]]), ([[4], TEXTS[2]], [[6]])]
    rows, instances = rows_of([([[1]], told), ([[1]], [([], [[3]]), ([[3], [7]], [[8]])])])
    assert rows.sizes.tolist() == [1, 2, 1, 2]
    assert [row.trunk[-4:] for row in rows] == [[10, 11, S1, 3], [14, 15, S1, 5], [14, 15, S1, 6], [S2, 7, S1, 8]]
    history = instances.split.history
    assert [history[i].size for i in range(6)] == [1, 1, 3, 2, 0, 2] and history.values.size == 3 + 2 + 2


# ------------------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_workers_give_the_same_steps_in_the_same_order(whole):
    """Also where signals that are meant for the training reach them too, and where a run goes on in mid-epoch."""
    rows, instances = rows_of(DIALOGS * 10, num_candidates=2)
    rows = rows if whole else instances
    sampler = StepSampler(rows.sizes, 8, seed=3)
    collate_rows = partial(collate_step, batch_size=4, ids=IDS, filler=rows[0])
    state, shown = torch.get_rng_state(), []
    for workers, start in ((0, 0), (2, 0), (2, 24)):
        sampler.start = start
        loader = load_batches(rows, sampler, collate_rows, torch.device("cpu"), workers)
        shown.append([])
        for step, weight in loader:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT), os.kill(worker.pid, signal.SIGTERM)
            shown[-1].append((weight, [[column.tolist() for column in vars(batch).values()] for batch in step]))
    alone, workers, rest = shown
    assert len(alone) > 10 and alone == workers and alone[3:] == rest
    assert torch.equal(state, torch.get_rng_state())  # dropout draws from it


def test_a_gpu_gets_pinned_batches_from_workers():
    rows, instances = rows_of(DIALOGS)
    for device, workers in (("cpu", 0), ("cuda", 2)):
        loader = load_batches(instances, [[0]], partial(collate, ids=IDS), torch.device(device))
        assert (loader.num_workers, loader.pin_memory) == (workers, device == "cuda")


TURNS = 50_000


@pytest.mark.parametrize("max_history", [2, -1])
def test_a_chat_log_of_50000_turns_takes_memory_by_its_turns(max_history, dialog_model, load, tmp_path, caplog):
    """As copies its histories alone would be 625 million numbers."""
    model, tokenizer = load(dialog_model("openai-gpt"))
    log = {"personality": ["i like cats ."], "dialog": [f"hi {'you ' * (turn % 7)}" for turn in range(TURNS)]}
    short = {"personality": ["i like tea ."], "dialog": ["hi", "hello"]}
    (tmp_path / "log.json").write_text(json.dumps({"train": [log], "valid": [short]}))
    tracemalloc.start()
    for _ in ("tokenised", "mapped"):
        train = load_dataset(Dialogs(str(tmp_path / "log.json")), tokenizer, f"{tmp_path}/c.bin", False)["train"]
    instances = Instances(train, tokenizer.ids, max_history, model.limit, num_candidates=2)
    rows = DialogRows(instances, 8) if max_history == -1 else instances
    with caplog.at_level(logging.INFO, logger="improvedflend"):
        rows.report_truncation("training")
    (share, *_) = StepSampler(rows.sizes, 8, seed=0)
    step = collate_step([rows[index] for index in share], 4, tokenizer.ids, rows[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1000 * TURNS and next(tmp_path.glob("c_*.bin")).stat().st_size < 100 * TURNS
    assert len(train.history[len(train) - 1]) == TURNS - 1
    if max_history == -1:  # cut into rows, each of which begins with the persona; this is said once
        told = f"training: {rows.shortened} of {len(train)} replies are in rows that begin after their dialog's start"
        assert caplog.messages == [told] and rows.shortened > 0.9 * len(train)
        persona = instances.prefix(0, 1)[0][0][:4]
        assert all(rows[index].trunk[:4] == persona for index in (0, len(rows) // 2, len(rows) - 1))
    settings = LearningSettings()
    found = optimizer_step(Learner(model, settings, torch.device("cpu")), *step, False, settings)
    assert math.isfinite(found["loss"]) and 0 < found["utterances"] <= 8
