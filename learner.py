"""One optimiser step: its batches, precision, losses and gradients, in one process or as a share in each of many.

The losses of a step are means over all its tokens and utterances, so that the same utterances give the same step,
however they are divided into micro-batches and processes.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import ignite.distributed as idist
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from batches import Batch, collate
from cli import UserError
from inputs import DialogRow, Instance
from options import BF16, Settings, option
from utils import SpecialIds

LR = 6.25e-5
LORA_LR = 10 * LR  # adapters begin at zero and are scaled: what trains all weights well hardly moves them


@dataclass(frozen=True)
class LearningSettings(Settings):
    """Options of learning. Those that are None by default are filled in from the others."""

    lr: float | None = option(
        None, f"learning rate, falling to 0 linearly; default: {LR}, with --lora {LORA_LR}", low=0
    )
    lm_coef: float = option(1.0, "weight of the language-modelling loss", low=0)
    mc_coef: float = option(1.0, "weight of the multiple-choice loss", low=0)
    max_norm: float = option(1.0, "gradients are clipped to this norm", low=0)
    fp16: str = option(
        "",
        "mixed precision by apex's names. O0: none; O1: autocast; O2: fp16 weights, fp32 master weights; O3: fp16",
        choices=("", "O0", "O1", "O2", "O3"),
    )
    bf16: bool = BF16
    gradient_checkpointing: bool = option(False, "use less memory and more time", may_change=True)
    lora: int = option(0, "train low-rank adapters of this rank and not all weights (0: off)", low=0)
    lora_alpha: int | None = option(None, "adapters count this over their rank; default: twice the rank", low=1)

    def __post_init__(self):
        super().__post_init__()
        if self.lr is None:
            object.__setattr__(self, "lr", LORA_LR if self.lora else LR)
        if self.lora and self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", 2 * self.lora)
        if self.lora_alpha and not self.lora:
            raise UserError(f"--lora_alpha {self.lora_alpha} without --lora; give a rank, such as --lora 16")
        if self.lora and self.fp16 == "O2":
            raise UserError("--fp16 O2 keeps fp32 copies of all weights, and --lora trains few; use O1 or --bf16")
        if self.fp16 and self.bf16:
            raise UserError(f"--fp16 {self.fp16} and --bf16 are two precisions; give one of them")


# ------------------------------------------------------------------------------------------------------------
# The batches of a step
# ------------------------------------------------------------------------------------------------------------


class StepSampler:
    """This process's share of each optimiser step, in an order that depends on seed and epoch alone.

    Args:
        sizes: replies of each row.
        step_size: replies of a step, over all processes, and at least those of any row. A row belongs to the step in
            which its last reply falls, so steps may differ by a row, and none is empty. Process `rank` gets every
            `world_size`-th row of a step (it may get none).
    """

    def __init__(self, sizes: Sequence[int], step_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.sizes, self.size = np.asarray(sizes), int(np.sum(sizes))
        self.step_size, self.seed = step_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start = 0  # the epoch's first so many replies are left out: steps before a checkpoint have seen them

    def __len__(self) -> int:
        return math.ceil(self.size / self.step_size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.sizes))
        ends = np.cumsum(self.sizes[order]) - self.start
        steps = np.ceil(ends / self.step_size).astype(int)  # from 1; of what was seen already 0 or less
        # Both are sorted, so the rows of a step stand together.
        numbers = np.arange(1, self.steps_left() + 2)
        bounds = np.searchsorted(steps, numbers)
        shares = [order[i:j][self.rank :: self.world_size] for i, j in pairwise(bounds)]
        return iter([share.tolist() for share in shares])

    def steps_left(self) -> int:
        """Steps from `start` to the epoch's end."""
        left = self.size - self.start
        return math.ceil(left / self.step_size)


def row_size(row: Instance | DialogRow) -> int:
    """Tokens of a row."""
    size = len(row.trunk)
    for reply in row.replies:
        size += sum(len(branch.tokens) for branch in reply.candidates)
    return size


def collate_step(
    rows: list[Instance | DialogRow], batch_size: int, ids: SpecialIds, filler: Instance | DialogRow
) -> tuple[list[Batch], int]:
    """A process's share of an optimiser step: micro-batches of rows of like length, and their weight.

    A micro-batch takes rows until it has `batch_size` replies. The losses are means over the whole step, so how it is
    divided does not change it. Every process must take part in every step, so an empty share is replaced by `filler`,
    with weight 0.
    """
    weight = 1 if rows else 0
    batches = defaultdict(list)
    replies = 0
    for row in sorted(rows or [filler], key=row_size):
        replies += len(row.replies)
        number = (replies - 1) // batch_size  # a row goes where its last reply falls, as in a step
        batches[number].append(row)
    return [collate(batch, ids) for batch in batches.values()], weight


# ------------------------------------------------------------------------------------------------------------
# Precision
# ------------------------------------------------------------------------------------------------------------


class Learner:
    """A model, its optimiser and loss scaler, at one of apex's levels of precision (or bf16).

    O0: all fp32. O1: fp32 weights, autocast to fp16, a loss scaler. O2: fp16 weights, fp32 master weights that the
    optimiser works on, a loss scaler. O3: all fp16, no scaler. bf16: fp32 weights, autocast.

    With `settings.lora` the model gets an adapter, and only that is trained. In bf16 the frozen matrices are bf16 too:
    autocast would cast them again in every forward pass.

    Attributes:
        model: to save and to look into.
        parallel: the same to call. Under a launcher its backward pass averages the gradients over all processes.
    """

    def __init__(self, model, settings: LearningSettings, device: torch.device):
        self.model, self.device = model, device
        if settings.lora:
            model.add_adapter(settings.lora, settings.lora_alpha)
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]  # what the optimiser works on
        self.autocast_to = torch.float16 if settings.fp16 == "O1" else torch.bfloat16
        self.uses_autocast = settings.fp16 == "O1" or settings.bf16
        if settings.lora and settings.bf16:
            for weight in model.parameters():
                if not weight.requires_grad and weight.ndim > 1:
                    weight.data = weight.data.bfloat16()
        self.has_masters = settings.fp16 == "O2"
        if self.has_masters:
            self.weights = [weight.detach().clone().requires_grad_() for weight in self.weights]
        if settings.fp16 in ("O2", "O3"):
            model.half()
        # AdamW as the original's library had it: no weight decay, epsilon 1e-6 (torch's defaults differ). In O3 the
        # squared gradients are often 0 in fp16, and such an epsilon makes endless steps: seen NaN from step 2 with
        # 1e-8 and 1e-6, a rising loss with 1e-5, and the lowest losses with 1e-4.
        epsilon = 1e-4 if settings.fp16 == "O3" else 1e-6
        self.optimizer = torch.optim.AdamW(self.weights, lr=settings.lr, eps=epsilon, weight_decay=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.fp16 in ("O1", "O2"))
        if settings.gradient_checkpointing:
            model.checkpoint_gradients()
        if settings.bf16 and device.type == "cpu":
            # The backward pass of torch's own kernel takes three times as long as that of plain matrix products.
            model.lm.set_attn_implementation("eager")
        self.parallel = model
        if dist.is_initialized():
            self.parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def autocast(self):
        return torch.autocast(self.device.type, self.autocast_to, enabled=self.uses_autocast)

    def synchronised(self, last: bool):
        """Skip DDP's gradient all-reduce on all but the last micro-batch of a step."""
        alone = self.parallel is self.model
        return contextlib.nullcontext() if last or alone else self.parallel.no_sync()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Undo the loss scale and clip to `max_norm`; the norm before. Nothing here waits for the device."""
        if self.has_masters:
            for master, weight in zip(self.weights, self.model.parameters(), strict=True):
                # None stays None: AdamW leaves such a weight alone, where zeros would still move it by its momentum.
                master.grad = None if weight.grad is None else weight.grad.float()
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.weights, max_norm)

    def update(self, finite: Tensor) -> None:
        """Take a step where the gradients are finite, else only adapt the loss scale; then forget the gradients.

        Nothing here waits for the device: a fused optimiser reads on it whether to change anything.
        """
        # GradScaler.step would set this attribute by the gradients alone, and where there is no scaler not at all.
        self.optimizer.found_inf = 1 - finite.float()
        self.optimizer.step()
        self.scaler.update()
        if self.has_masters:
            with torch.no_grad():
                for weight, master in zip(self.model.parameters(), self.weights, strict=True):
                    weight.copy_(master)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

    def trained(self) -> dict[str, Tensor]:
        """The model's state without frozen weights, which are still those of the base model."""
        parameters = self.model.named_parameters(remove_duplicate=False)  # tied weights under all of their names
        frozen = {name for name, parameter in parameters if not parameter.requires_grad}
        state = self.model.state_dict()
        return {name: value for name, value in state.items() if name not in frozen}

    def state_dict(self) -> dict:
        return {
            "model": self.trained(),
            "masters": self.weights if self.has_masters else [],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        # What is frozen is not in the checkpoint, and a load wants a whole state.
        whole = self.model.state_dict() | state["model"]
        self.model.load_state_dict(whole)
        with torch.no_grad():
            for master, saved in zip(self.weights, state["masters"], strict=False):  # none are saved but in O2
                master.copy_(saved)
        # Its settings are this program's own, and a fused optimiser takes moments to lie in memory as their weights do.
        moments = state["optimizer"]["state"]
        for number, values in moments.items():
            weight = self.weights[number]
            moments[number] = {
                name: value if name == "step" else torch.empty_like(weight, requires_grad=False).copy_(value)
                for name, value in values.items()
            }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.scaler.load_state_dict(state["scaler"])


# ------------------------------------------------------------------------------------------------------------
# One optimiser step
# ------------------------------------------------------------------------------------------------------------


def sum_over_processes(*values: float, device: torch.device) -> list[float]:
    """The sum of each value over all processes, in float64, in which counts are exact."""
    place = device if idist.get_world_size() > 1 else "cpu"  # MPS has no float64
    return idist.all_reduce(torch.tensor(values, dtype=torch.float64, device=place)).tolist()


class Stopped(Exception):
    """Training was asked to end, and all processes stand between the same two steps."""


def accumulate_gradients(
    learner: Learner, batches: list[Batch], lm_weight: float, mc_weight: float, settings: LearningSettings
) -> Tensor:
    """Forward and backward over a process's micro-batches; its part of both losses (2,).

    Args:
        lm_weight, mc_weight: of a token's and an utterance's loss: one over their number in the whole step.
    """
    losses = torch.zeros(2, device=learner.device)
    for batch in batches:
        with learner.synchronised(last=batch is batches[-1]):
            batch = batch.to(learner.device)
            with learner.autocast():
                output = learner.parallel(batch)
            gold = batch.n_candidates - 1  # the last candidate
            mc_nll = F.cross_entropy(output.mc_logits, gold, reduction="sum")
            # Sums, not means: the weights make them parts of the step's means, whatever is in this micro-batch.
            lm_part = lm_weight * output.lm_nll.sum()
            mc_part = mc_weight * mc_nll
            loss = settings.lm_coef * lm_part + settings.mc_coef * mc_part
            # DDP averages gradients over the processes where the losses are to be summed.
            loss = idist.get_world_size() * loss
            learner.scaler.scale(loss).backward()
        losses += torch.stack([lm_part, mc_part]).detach()
    return losses


def optimizer_step(
    learner: Learner, batches: list[Batch], weight: int, stop: bool, settings: LearningSettings
) -> dict[str, float]:
    """One update of the weights from every process's micro-batches; what the log says of it.

    It waits for the device once, after everything is queued there.

    Raises:
        Stopped: `stop` is true in a process. Nothing was computed yet.
    """
    # Both losses are means over the whole step: over accumulation and processes, weighted by tokens and utterances.
    own_tokens = sum(len(batch.lm_labels) for batch in batches)
    own_utterances = sum(len(batch.n_candidates) for batch in batches)
    # `stop` goes along with the counts. A signal reaches processes at different times; one that ended a step before
    # the others would leave them waiting for its gradients.
    tokens, utterances, stops = sum_over_processes(
        weight * own_tokens, weight * own_utterances, stop, device=learner.device
    )
    if stops:
        raise Stopped
    losses = accumulate_gradients(learner, batches, weight / tokens, weight / utterances, settings)
    if idist.get_world_size() > 1:
        losses = idist.all_reduce(losses.double())
    norm = learner.clip_gradients(settings.max_norm)
    finite = (losses.sum() + norm).isfinite()
    learner.update(finite)
    figures = torch.stack([*losses, norm.to(losses)])
    lm_loss, mc_loss, norm = figures.tolist()  # all else is under way: now wait for it
    return {
        "loss": settings.lm_coef * lm_loss + settings.mc_coef * mc_loss,
        "lm_loss": lm_loss,
        "mc_loss": mc_loss,
        "gradient_norm": norm,
        "lr": learner.optimizer.param_groups[0]["lr"],
        "utterances": utterances,
    }
