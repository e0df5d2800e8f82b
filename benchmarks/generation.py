"""Generation: tokens a second of one reply, of a batch of 32, and how near that is to reading the weights once."""

import torch

from benchmarks import plain
from benchmarks.common import Bench, Row, read_bandwidth, seconds
from generation import Decoding, Generation
from model import DialogModel

TOKENS, BATCH = 20, 32


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
    ]


@torch.inference_mode()
def steps(model: DialogModel, prefix, decoding: Decoding, batch: int) -> tuple[float, float]:
    """Seconds to the first token, prefix included, and from there to the last."""
    generators = [torch.Generator().manual_seed(row) for row in range(batch)]
    drawing = iter(Generation(model, [prefix] * batch, decoding, generators))
    return seconds(next, drawing), seconds(list, drawing)
