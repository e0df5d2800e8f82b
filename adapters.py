"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685), by peft: added to a model, saved, merged into one.

Shapes: V vocabulary, D hidden size, K rows of the embedding that are trained.
"""

import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cli import UserError, first_line, log
from files import make_folder, whole_files
from model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from utils import DialogTokenizer

NAME = "default"  # peft's own name for the only adapter of a model
WRAPPED_COPY = re.compile(r"\.(modules_to_save|original_module)\.")  # in a tensor's name in an adapter's file


def has_adapter(lm: PreTrainedModel) -> bool:
    return hasattr(lm, "peft_config")


def add_adapter(lm: PreTrainedModel, rank: int, alpha: int, tokens: list[int]) -> None:
    """Freeze a model and put a fresh adapter into it, in place; it computes what it did until a step is taken.

    Trained from now on: beside each linear layer of weight W two matrices A (rank, in) and B (out, rank), by which it
    computes W + alpha / rank * B A; the multiple-choice head; the rows of `tokens` in the embedding, and in the LM head
    where that is not tied to it.

    Raises:
        UserError: peft has no adapter for a model of this architecture.
    """
    from peft import LoraConfig  # heavy: only where there are adapters
    from peft.tuners.lora import LoraLayer

    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    names = {layer: name for name, layer in lm.named_modules()}
    rows = {names[embedding]: tokens}
    if head.weight is not embedding.weight:
        rows[names[head]] = tokens
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        modules_to_save=["multiple_choice_head"],
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings(action="ignore"):  # that GPT-2's layers are transposed, which it then heeds
            lm.add_adapter(config)
    except ValueError as error:
        raise UserError(
            f"no adapter for a {lm.config.model_type} model: {first_line(error)}; leave --lora out, "
            "or use another model"
        ) from error
    for layer in lm.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # to float32, for autocast to cast it back


def save_adapter(lm: PreTrainedModel, folder: Path, tokenizer: DialogTokenizer, base: str) -> None:
    """Write what is trained to `folder`, in peft's own format, with the tokenizer that it was trained with.

    Args:
        base: names the model that the adapter belongs on: a short name, a hub id or a path.
    """
    from peft import get_peft_model_state_dict

    config = lm.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = base, True
    # Unless it is told not to, peft adds the whole embedding where that was resized.
    weights = get_peft_model_state_dict(lm, save_embedding_layers=False)
    weights = {f"base_model.model.{name}": weight.cpu().contiguous() for name, weight in weights.items()}
    make_folder(folder)
    with whole_files(folder) as partial:
        tokenizer.save(partial)
        config.save_pretrained(partial)
        save_file(weights, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def merge_adapter(lm: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model with the adapter in `folder` merged into its weights, in float32 and in place. It keeps its vocabulary.

    Raises:
        UserError: the adapter is damaged, of a kind that cannot be merged, or belongs to another model.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    row = torch.arange(8)[None]
    size = lm.get_input_embeddings().num_embeddings
    try:
        with warnings.catch_warnings(record=True, action="always") as told:
            config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
        # Of an embedding that was resized and trained, peft saves its wrapper's two copies too.
        weights = {name: weight for name, weight in weights.items() if not WRAPPED_COPY.search(name)}
        resize_to(lm, weights)
        with warnings.catch_warnings(action="ignore"):
            config.inference_mode = False  # what it trains is then marked so
            adapted = get_peft_model(lm, config)
            own = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
            own = {name for name in own if "multiple_choice_head.summary." not in name}  # as where all biases are
            result = set_peft_model_state_dict(adapted, weights)
            adapted.eval()
            with torch.no_grad():
                expected = lm(input_ids=row).logits
                lm = adapted.merge_and_unload()
                merged = lm(input_ids=row).logits
    except Exception as error:  # peft, safetensors and torch raise many types for what they cannot use
        raise UserError(
            f"cannot use the adapter in {folder}: {first_line(error)}; expected one that peft can merge into the model "
            f"that its {ADAPTER_CONFIG} names"
        ) from error
    for each in told:  # such as settings that a newer peft wrote, which this one leaves out
        log.warning(f"warning: {folder / ADAPTER_CONFIG}: {first_line(each.message)}")
    # peft loads what fits and leaves the rest as it was made.
    wrong = {
        "lacks": own.intersection(result.missing_keys),
        "has a surplus of": result.unexpected_keys,
        "holds nan or infinity in": [name for name, tensor in weights.items() if not tensor.isfinite().all()],
    }
    for fault, names in wrong.items():
        if names:
            raise UserError(
                f"the adapter in {folder} {fault} {len(names)} tensors, such as {min(names)}; "
                f"expected a whole one, of the model that its {ADAPTER_CONFIG} names"
            )
    if (merged - expected).norm() > 1e-2 * expected.norm():  # as where layers that it repeats share their weights
        raise UserError(f"the adapter in {folder} computes something else when it is merged; merge it by other means")
    lm.resize_token_embeddings(size, mean_resizing=False)
    lm.requires_grad_(True)  # peft freezes what it does not train
    lm.choice_head_trained |= any("multiple_choice_head" in name for name in weights)
    return lm


def resize_to(lm: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Give a model's vocabulary the size that it has in the weights of an adapter, where these hold a whole embedding.

    Other tools add their own tokens to the base and then save all rows of its embedding, those of our tokens not.
    """
    name = next(name for name, layer in lm.named_modules() if layer is lm.get_input_embeddings())
    whole = weights.get(f"base_model.model.{name}.weight")
    if whole is not None:
        lm.resize_token_embeddings(len(whole), mean_resizing=False)


def without_adapter(lm: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with its adapter merged, on the CPU and in float32. It shares what no adapter changes.

    peft can only merge in place, which rounds the frozen weights.
    """
    from peft.tuners.lora import LoraLayer

    def frozen(weight: Tensor) -> Tensor:
        return weight.detach().cpu().float() if weight.is_floating_point() else weight.cpu()

    def plain(name: str) -> str:  # of a parameter, without the names of peft's wrappers
        return re.sub(rf"\.(base_layer|token_adapter|modules_to_save\.{NAME})(?=\.)", "", name)

    own = re.compile(r"\.(lora_\w+|trainable_tokens_\w+|original_module)\.")
    weights = {plain(name): frozen(weight) for name, weight in lm.state_dict().items() if not own.search(name)}
    for name, layer in lm.named_modules():
        if isinstance(layer, LoraLayer):
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + frozen(layer.get_delta_weight(NAME))
        elif trained := trained_rows(layer):
            tokens, rows = map(Tensor.cpu, trained)
            weights[f"{name}.weight"] = weights[f"{name}.weight"].index_copy(0, tokens, rows.detach().float())
    with torch.device("meta"):  # nothing is computed only to be replaced
        copy = type(lm)(lm.config)
    copy.load_state_dict(weights, assign=True)
    copy.tie_weights()
    copy.generation_config = lm.generation_config
    return copy


# ------------------------------------------------------------------------------------------------------------
# A few trained rows of an embedding
# ------------------------------------------------------------------------------------------------------------

# peft writes them into a copy of the whole embedding for each forward pass, and so has a gradient made of all of it.


def trained_rows(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The tokens (K,) whose rows of an embedding or LM head are trained, and these rows (K, D); None: not only rows."""
    adapter = getattr(layer, "token_adapter", None)
    if adapter is None:
        return None
    rows = adapter.trainable_tokens_delta[NAME]
    return torch.tensor(adapter.token_indices[NAME], device=rows.device), rows


def look_up(embedding: nn.Module, ids: Tensor) -> Tensor:
    """`embedding(ids)` (...) -> (..., D)"""
    trained = trained_rows(embedding)
    if trained is None:
        return embedding(ids)
    tokens, rows = trained
    scale = embedding.token_adapter._get_embed_scale()  # of Gemma's
    rows = rows if scale is None else rows * scale
    is_trained = ids[..., None] == tokens  # (..., K)
    trained_vectors = F.embedding(is_trained.long().argmax(-1), rows)
    return torch.where(is_trained.any(-1, keepdim=True), trained_vectors, embedding.token_adapter.base_layer(ids))


def project(head: nn.Module, hidden: Tensor) -> Tensor:
    """`head(hidden)` (..., D) -> (..., V)"""
    trained = trained_rows(head)
    if trained is None:
        return head(hidden)
    tokens, rows = trained
    base = head.token_adapter.base_layer
    logits = base(hidden)
    bias = None if base.bias is None else base.bias[tokens]
    return logits.index_copy(-1, tokens, F.linear(hidden, rows, bias))
