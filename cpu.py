"""Inference on a CPU, hung on a model through one function; leaving it out changes nothing but speed."""

from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from model import DialogModel, same_numbers

# ------------------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------------------

BLOCK = 96  # queries


def attention_in_blocks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """scaled_dot_product_attention, a block of queries at a time, each with only the keys that it attends to.

    torch's kernel computes all scores and then hides those that the mask hides: in a packed row with twenty
    candidates, most of them. This function has the form that transformers' registry asks for.

    Args:
        query: (B, H, T, D). key, value: (B, H, S, D).
        attention_mask: float (B, 1, T, S), added to the scores.
    Returns:
        (B, T, H, D), and no attention weights.
    """
    if attention_mask is None or attention_mask.dtype == torch.bool or query.shape[2] <= BLOCK:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    attended = []
    for queries, (columns, mask) in zip(query.split(BLOCK, dim=2), mask_blocks(attention_mask), strict=True):
        keys, values = key.index_select(2, columns), value.index_select(2, columns)
        block, _ = sdpa_attention_forward(module, queries, keys, values, mask, **options)
        attended.append(block)
    return torch.cat(attended, dim=1), None


@lru_cache(maxsize=1)  # the layers of a forward pass share one mask
def mask_blocks(mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each block of queries: the columns that any of them attends to, in any row, and the mask of those columns."""
    blocks = []
    for rows in mask.split(BLOCK, dim=2):
        visible = rows > torch.finfo(mask.dtype).min  # (B, 1, BLOCK, S)
        columns = visible.flatten(0, 2).any(0).nonzero()[:, 0]
        blocks.append((columns, rows.index_select(3, columns)))
    return blocks


AttentionInterface.register("sdpa_in_blocks", attention_in_blocks)
AttentionMaskInterface.register("sdpa_in_blocks", sdpa_mask)

# ------------------------------------------------------------------------------------------------------------
# Linear layers
# ------------------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer whose fixed weights have the layout that oneDNN reads fastest; and the activation after it."""

    def __init__(self, layer: nn.Linear | Conv1D):
        super().__init__()
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight  # (out, in)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.activation = "none", [], ""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.activation)


def cpu_has_bf16() -> bool:
    """Whether the processor computes in bfloat16 itself."""
    asks = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asks is not None and asks()


# ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def optimize_for_cpu_inference(model: DialogModel) -> None:
    """Make a model on a CPU faster, for inference only. Its results change by rounding alone.

    Linear layers get what torch.compile does with frozen weights, without the minutes that it takes. Nothing changes
    on another device, where torch or the processor lacks the kernels (oneDNN's), and in a model that does not give the
    same logits when this is tried: some architectures read weights directly, past the layers that hold them.
    """
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    if model.lm.dtype != torch.float32 and not (model.lm.dtype == torch.bfloat16 and cpu_has_bf16()):
        return
    ids = torch.arange(8)[None]
    expected = model.lm(input_ids=ids, use_cache=False).logits
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in (nn.Linear, Conv1D)}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, PackedLinear(layer))
        exact = same_numbers(model.lm(input_ids=ids, use_cache=False).logits, expected)
    except (RuntimeError, AttributeError):
        exact = False
    if not exact:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        return
    for module in model.modules():
        # In GPT-2's family the layer `c_fc` is followed by the activation `act`: one kernel computes both.
        if hasattr(module, "c_fc") and type(getattr(module, "act", None)) is nn.GELU:
            module.c_fc.activation = "gelu", [], module.act.approximate
            module.act = nn.Identity()
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = "sdpa_in_blocks"
