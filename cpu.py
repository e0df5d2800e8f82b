"""Inference on a CPU, hung on a model through one function; leaving it out changes nothing but speed."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from model import DialogModel, same_numbers


class PackedLinear(nn.Module):
    """A linear layer of fixed weights (out, in), laid out as oneDNN's products read them, and the GELU behind it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: nn.GELU | None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if bias is None else bias.detach()
        self.activation = ("gelu", [], gelu.approximate) if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.activation)


def cpu_has_bf16() -> bool:
    """Whether the processor computes in bfloat16 itself."""
    asks = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asks is not None and asks()


@torch.inference_mode()
def pack_weights(model: DialogModel) -> None:
    """Make a model on a CPU faster, for inference only; its results change by rounding alone.

    What torch.compile does with frozen weights, without its minutes. Nothing changes elsewhere, where torch has no
    oneDNN or that no such arithmetic, and where an architecture reads its weights past their layers (it is tried).
    """
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    if model.lm.dtype != torch.float32 and not (model.lm.dtype == torch.bfloat16 and cpu_has_bf16()):
        return
    ids = torch.arange(8)[None]
    expected = model.lm(input_ids=ids, use_cache=False).logits
    replaced = []
    try:
        for parent in list(model.lm.modules()):
            act = getattr(parent, "act", None)
            gelu = act if type(act) is nn.GELU and hasattr(parent, "c_fc") else None  # GPT-2's family has it behind
            for name, layer in list(parent.named_children()):
                if type(layer) in (nn.Linear, Conv1D):
                    weight = layer.weight if type(layer) is nn.Linear else layer.weight.t()
                    new = PackedLinear(weight, layer.bias, gelu if name == "c_fc" else None)
                elif layer is gelu:
                    new = nn.Identity()
                else:
                    continue
                setattr(parent, name, new)
                replaced.append((parent, name, layer))
        packs = same_numbers(model.lm(input_ids=ids, use_cache=False).logits, expected)
    except (RuntimeError, AttributeError):
        packs = False
    if not packs:
        for parent, name, layer in replaced:
            setattr(parent, name, layer)
