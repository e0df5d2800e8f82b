"""The benchmarks: both ways compute the same, so that what is measured is speed alone."""

import argparse

import pytest
import torch
import torch.nn.functional as F

from batches import collate
from benchmarks import adapters, evaluation, generation, host, plain, training
from benchmarks.common import SAMPLE, Bench, table


@pytest.fixture
def bench(monkeypatch) -> Bench:
    monkeypatch.setattr(plain, "QUICK", {"n_layer": 1, "n_embd": 32, "n_head": 2})
    monkeypatch.setattr(plain, "ROWS", 8005)
    monkeypatch.setattr(evaluation, "OURS", 4)
    monkeypatch.setattr(training, "CANDIDATES", (2,))
    monkeypatch.setattr(host, "UTTERANCES", 200)
    monkeypatch.setattr(training, "peak_flops", lambda *_: 1e11)  # products as large as that takes take long
    options = {"quick": True, "device": "cpu", "dataset_path": SAMPLE, "valid_path": "", "tokenizer": ""}
    return Bench(argparse.Namespace(**options, billion=False))


def test_every_subject_has_its_rows(bench) -> None:
    rows = [row for subject in (evaluation, generation, training, host) for row in subject.measure(bench)]
    assert all(min(row.ours.values()) > 0 for row in rows)
    assert [row.difference < 1e-4 for row in rows if row.difference is not None] == [True] * 4
    assert table(rows).count("\n") == len(rows) + 1


def test_the_plain_loss_is_ours(bench) -> None:
    instances = [bench.instances("train", num_candidates=3)[i] for i in range(4)]
    width = max(len(i.prefix) + len(candidate) for i in instances for candidate in i.candidates) + 7
    batch = collate(instances, bench.ids)
    with torch.no_grad():
        output = bench.model(batch)
        ours = output.lm_nll.mean() + F.cross_entropy(output.mc_logits, batch.n_candidates - 1)
        theirs = plain.loss(bench.reference, instances, width, bench.ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_adapters_and_all_weights_are_measured(bench) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    for lora in (0, 4):
        rate, memory = adapters.train(bench.options, shape | {"vocab_size": 8005}, lora, bf16=False)
        assert rate > 0 and memory > 0.01
