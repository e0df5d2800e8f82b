"""Generation: tokens a second of one reply, of 32 at once, how near that is to reading the weights once; beams."""

from dataclasses import replace
from functools import partial

import torch

from benchmarks import plain
from benchmarks.common import Bench, Row, read_bandwidth, seconds, times_as_long
from generation import Decoding, Generation, generate_replies
from model import DialogModel

TOKENS, BATCH, BEAMS = 20, 32, 4


def measure(bench: Bench) -> list[Row]:
    instances = bench.instances("valid")
    order = instances.lengths().argsort()
    middle = int(order[len(order) // 2])  # a history of the usual length
    decoding = Decoding(max_length=TOKENS, min_length=TOKENS)
    prefix = instances.prefix(middle, TOKENS)[0]

    @torch.inference_mode()
    def plain_reply() -> None:
        plain.reply(bench.reference, instances, middle, decoding, torch.Generator().manual_seed(0))

    plain_rate = TOKENS / seconds(plain_reply)
    whole, after_first, batched, shares = {}, {}, {}, {}
    bandwidth = read_bandwidth(bench.device)
    for name, model in bench.models.items():
        steps(model, prefix, decoding, 1)  # warm up
        first, rest = min((steps(model, prefix, decoding, 1) for _ in range(5)), key=sum)
        whole[name], after_first[name] = TOKENS / (first + rest), (TOKENS - 1) / rest
        rest_of_batch = min(steps(model, prefix, decoding, BATCH)[1] for _ in range(2))
        batched[name] = BATCH * (TOKENS - 1) / rest_of_batch / after_first[name]
        weights = sum(weight.numel() for weight in bench.model.parameters()) * (2 if name == "bf16" else 4)
        shares[name] = after_first[name] * weights / bandwidth
    return [
        Row("one reply of 20 tokens", "tokens/s", whole, plain_rate, "30x / 70x"),
        Row("one reply, after its first token", "tokens/s", after_first, plain_rate),
        Row("32 replies at once against one, after the first token", "times", batched, must="8"),
        Row("one reply against reading the weights once a token", "share", shares, must="- / 0.4"),
        *(beams_against_greedy(bench, prefix, size) for size in (1, BATCH)),
    ]


def beams_against_greedy(bench: Bench, prefix, replies: int) -> Row:
    """So many replies at once, prefixes included."""
    greedy = Decoding(max_length=TOKENS, min_length=TOKENS, no_sample=True)
    beams = replace(greedy, num_beams=BEAMS)

    def generate(model: DialogModel, decoding: Decoding) -> None:
        generate_replies(model, [prefix] * replies, decoding, [torch.Generator()] * replies)

    times = {
        name: times_as_long(partial(generate, model, beams), partial(generate, model, greedy))
        for name, model in bench.models.items()
    }
    subject = f"{BEAMS} beams against greedy, " + ("one reply" if replies == 1 else f"{replies} replies at once")
    return Row(subject, "times as long", times, must="3 at most")


@torch.inference_mode()
def steps(model: DialogModel, prefix, decoding: Decoding, batch: int) -> tuple[float, float]:
    """Seconds to the first token, prefix included, and from there to the last."""
    generators = [torch.Generator().manual_seed(row) for row in range(batch)]
    drawing = iter(Generation(model, [prefix] * batch, decoding, generators))
    return seconds(next, drawing), seconds(list, drawing)
