"""Logits and caches: the double-head model, loading and saving it, sampling, generation, a conversation.

Shapes: B rows, T tokens, N candidates, L labelled tokens, D hidden size, V vocabulary. Inference sees ids only.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.openai.modeling_openai import OpenAIGPTLMHeadModel, OpenAIGPTModel
from transformers.pytorch_utils import Conv1D

from utils import (
    Batch,
    DialogTokenizer,
    Instance,
    ModelFiles,
    SpecialIds,
    UserError,
    build_prefix,
    collate,
    decoding_option,
    first_line,
    fit,
    load_config,
    log,
    whole_files,
)

transformers.logging.set_verbosity_error()  # its load reports and advice are ours to give
transformers.logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------------------
# openai-gpt with what the other models of transformers have: a cache, a 4D mask, scaled_dot_product_attention
# ------------------------------------------------------------------------------------------------------------


BLOCK = 64  # columns


class MaskBlock(NamedTuple):
    """What the queries of some columns see: the keys of the first columns, and those from `oldest` to `end`."""

    start: int
    end: int
    first: int  # columns, as many as the longest prefix of the batch has
    oldest: int
    mask: Tensor  # (B, 1, end - start, keys)

    def seen(self, keys: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, H, keys, D)"""
        return torch.cat([keys[:, :, : self.first], keys[:, :, self.oldest : self.end]], dim=2)


Mask = Tensor | list[MaskBlock] | None


def mask_blocks(mask: Tensor, segments: Tensor) -> list[MaskBlock]:
    """The mask of packed rows without most of what it hides: up to the longest prefix, then some columns at a time."""
    first, width = int((segments == 0).sum(1).max()), segments.shape[1]
    begins = torch.cat([segments.new_ones(len(segments), 1), segments.diff()], dim=1) != 0
    # for each column, where the earliest of its rows' segments begins
    earliest = torch.where(begins, torch.arange(width), 0).cummax(1).values.amin(0).tolist()
    blocks = [MaskBlock(0, first, 0, 0, mask[:, :, :first, :first])]
    for start in range(first, width, BLOCK):
        end, oldest = min(start + BLOCK, width), max(first, earliest[start])
        rows = mask[:, :, start:end]
        blocks.append(MaskBlock(start, end, first, oldest, torch.cat([rows[..., :first], rows[..., oldest:end]], -1)))
    return blocks


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attention by two products: q (B, H, T, D), k and v (B, H, S, D), mask (B, 1, T, S) -> (B, H, T, D).

    On a CPU, for blocks and for batches in bf16, they take less time than torch's own kernel; in bf16 they round the
    scores, which it does not.
    """
    q = q * q.shape[-1] ** -0.5
    # For a single query the product of all keys with it is the faster way round.
    scores = (k @ q.transpose(-1, -2)).transpose(-1, -2) if q.shape[2] == 1 else q @ k.transpose(-1, -2)
    return F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout, dropout > 0) @ v


class OpenAIGPTBody(OpenAIGPTModel):
    """transformers' OpenAI GPT, same parameters, with a forward like GPT-2's."""

    gradient_checkpointing = False  # transformers' switch sets it, and the function `_gradient_checkpointing_func`

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        read: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D).

        Args:
            attention_mask: None (causal) or a float mask (B, 1, T, T with the cache) that is added to the scores, or
                the blocks of one.
            read: positions in the flattened (B * T), each once, whose hidden states are wanted; the others' are 0,
                and the last layer's work for them is saved.
        """
        if inputs_embeds is None:
            inputs_embeds = self.tokens_embed(input_ids)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(start, start + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        x = self.drop(inputs_embeds + self.positions_embed(position_ids))
        cache = past_key_values if use_cache else None
        shape = x.shape
        for layer, block in enumerate(self.h):
            wanted = read if block is self.h[-1] else None
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(self._layer, block, x, attention_mask, None, layer, wanted)
            else:
                x = self._layer(block, x, attention_mask, cache, layer, wanted)
        if read is not None:
            x = x.new_zeros(shape).flatten(0, 1).index_copy(0, read, x).view(shape)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)

    def _layer(self, block, x: Tensor, mask: Mask, cache: Cache | None, layer: int, wanted: Tensor | None) -> Tensor:
        y = self._attend(block.attn, x, mask, cache, layer)
        if wanted is not None:  # (B, T, D) -> (R, D)
            x, y = (each.flatten(0, 1).index_select(0, wanted) for each in (x, y))
        x = block.ln_1(x + block.attn.resid_dropout(block.attn.c_proj(y)))
        return block.ln_2(x + block.mlp(x))

    def _attend(self, attn, x: Tensor, mask: Mask, cache: Cache | None, layer: int) -> Tensor:
        q, k, v = (part.unflatten(-1, (attn.n_head, -1)).transpose(1, 2) for part in attn.c_attn(x).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.update(k, v, layer)
        dropout = attn.attn_dropout.p if self.training else 0.0
        if isinstance(mask, list):
            blocks = [(q[:, :, each.start : each.end], each.seen(k), each.seen(v), each.mask) for each in mask]
            y = torch.cat([attend(*block, dropout) for block in blocks], dim=2)
        elif q.shape[2] == 1 and len(q) > 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            y = attend(q, k, v, mask, dropout)  # torch's kernel takes more than twice as long
        else:  # without a mask: causal, which a single new token (the last of all) is of itself
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and q.shape[2] > 1)
        return y.transpose(1, 2).flatten(2)


class OpenAIGPTWithCache(OpenAIGPTLMHeadModel):
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        self.transformer = OpenAIGPTBody(config)
        self.post_init()


# ------------------------------------------------------------------------------------------------------------
# Two heads
# ------------------------------------------------------------------------------------------------------------


class MultipleChoiceHead(nn.Module):
    """A score from the hidden state at a reply's last token. Parameters are named as in transformers' models."""

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(getattr(config, "summary_first_dropout", 0.1))
        self.summary = nn.Linear(config.get_text_config().hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (...)"""
        return self.summary(self.dropout(hidden)).squeeze(-1)


def with_choice_head(causal_lm: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A causal LM class of transformers with a multiple-choice head, so that both load and save as one."""
    if causal_lm is OpenAIGPTLMHeadModel:
        causal_lm = OpenAIGPTWithCache

    class WithChoiceHead(causal_lm):
        def __init__(self, config):
            super().__init__(config)
            self.multiple_choice_head = MultipleChoiceHead(config)
            self.post_init()
            for module in list(self.modules()):
                for name, child in module.named_children():
                    if type(child) is NewGELUActivation:  # the same function in one kernel
                        setattr(module, name, nn.GELU(approximate="tanh"))

    # Known under its parent's name: it stands in config.json, and transformers converts old tensor names by it.
    known = OpenAIGPTLMHeadModel if causal_lm is OpenAIGPTWithCache else causal_lm
    WithChoiceHead.__name__, WithChoiceHead.__module__ = known.__name__, known.__module__
    return WithChoiceHead


@dataclass
class Output:
    lm_nll: Tensor  # (L,) negative log-likelihood of every labelled token, float32
    mc_logits: Tensor  # (B, N) a score for every candidate, float32; -inf where a row has fewer than N


class DialogModel(nn.Module):
    """A causal LM with a multiple-choice head, run over packed rows.

    The candidates of an utterance share their prefix: a row is [prefix | candidate 1 | ... | candidate N], positions
    restart after the prefix, and a mask hides the candidates from each other. Attention is causal, so the hidden
    states are those of N separate rows. `packed` says whether this architecture is exact that way (it is tried
    out); where it is not, rows are unpacked into N padded ones, and generation does without a cache.
    """

    def __init__(self, lm: PreTrainedModel, ids: SpecialIds):
        super().__init__()
        self.lm, self.ids = lm, ids
        self.packed = True
        self.limit = context_length(lm.config)

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def forward(self, batch: Batch) -> Output:
        return self.heads(self.hidden(batch), batch)

    def heads(self, hidden: Tensor, batch: Batch) -> Output:
        """Both heads on hidden states (B, T, D)."""
        labelled = hidden.flatten(0, 1)[batch.lm_positions]  # the LM head only where a label is
        lm_nll = F.cross_entropy(self.lm_logits(labelled).float(), batch.lm_labels, reduction="none")
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        mc_logits = self.lm.multiple_choice_head(hidden[rows, batch.ends]).float()  # (B, N)
        absent = torch.arange(mc_logits.shape[1], device=hidden.device) >= batch.n_candidates[:, None]
        return Output(lm_nll, mc_logits.masked_fill(absent, float("-inf")))

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states (B, T, D) of packed rows, defined at `batch.read`, where heads read them."""
        return self._hidden_packed(batch) if self.packed else self._hidden_padded(batch)

    def _hidden_packed(self, batch: Batch) -> Tensor:
        embeds = self.embed(batch.input_ids, batch.token_types)
        mask = packed_mask(batch.segments, embeds.dtype)
        inputs = {"inputs_embeds": embeds, "position_ids": batch.positions, "attention_mask": mask}
        if isinstance(self.body, OpenAIGPTBody) and mask.device.type == "cpu":
            inputs["attention_mask"] = mask_blocks(mask, batch.segments)
        return self.body(**inputs, **self.reading(batch.read), use_cache=False)[0]

    def _hidden_padded(self, batch: Batch) -> Tensor:
        """Every candidate behind its own copy of the prefix, in a row of its own, padded on the right.

        No mask is needed: in a causal model no token sees the padding behind it.
        """
        candidates = torch.arange(1, int(batch.segments.max()) + 1, device=batch.segments.device)[:, None]
        segments = batch.segments[:, None]  # (B, 1, T)
        keep = (segments == 0) | (segments == candidates)  # (B, N, T)
        order = (~keep).long().argsort(dim=-1, stable=True)[..., : int(keep.sum(-1).max())]  # (B, N, T')
        rows = order.flatten(0, 1)

        def unpack(tensor: Tensor) -> Tensor:  # (B, T) -> (B * N, T')
            return tensor.repeat_interleave(len(candidates), dim=0).gather(1, rows)

        embeds = self.embed(unpack(batch.input_ids), unpack(batch.token_types))
        hidden = self.body(inputs_embeds=embeds, use_cache=False)[0].unflatten(0, order.shape[:2])  # (B, N, T', D)
        packed = hidden.new_zeros(*batch.segments.shape, hidden.shape[-1])
        kept = keep.gather(2, order)
        batch_index = torch.arange(len(packed), device=packed.device)[:, None, None].expand_as(order)
        return packed.index_put((batch_index[kept], order[kept]), hidden[kept])

    def embed(self, tokens: Tensor, types: Tensor) -> Tensor:
        """Token embedding plus the embedding of the token's speaker (B, T) -> (B, T, D); the body adds positions."""
        # One lookup of both: its gradient is a whole embedding matrix, which is then made once.
        return self.lm.get_input_embeddings()(torch.stack([tokens, types])).sum(0)

    @property
    def body(self) -> PreTrainedModel:
        """The transformer without its heads."""
        return self.lm.base_model

    def reading(self, read: Tensor) -> dict[str, Tensor]:
        """What tells the body which hidden states (positions in the flattened B * T) are wanted, if it can be told."""
        return {"read": read} if isinstance(self.body, OpenAIGPTBody) else {}

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), with the scaling and soft-capping that some models put behind their head."""
        config = self.lm.config.get_text_config()
        logits = self.lm.get_output_embeddings()(hidden)
        logits = logits * (getattr(config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def save(self, folder: Path) -> None:
        """Write config.json, generation_config.json and model.safetensors; plain transformers can load them.

        Each file appears whole under its name or not at all.
        """
        with whole_files(folder) as partial:
            self.lm.save_pretrained(partial)

    def checkpoint_gradients(self) -> None:
        """From now on keep only each layer's input for the backward pass and compute the rest again."""
        # before transformers 5.22 it had the second name
        enable = getattr(self.lm, "activation_checkpointing_enable", None) or self.lm.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(
                f"--gradient_checkpointing: {first_line(error)}; leave it out for this model, or use another one"
            ) from error


def packed_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of packed rows (B, 1, T, T), to be added to attention scores.

    A token sees what stands before it in the prefix and in its own candidate. Padding sees the prefix, so that no
    row of the softmax is empty.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1:] * 2, dtype=torch.bool, device=segments.device).tril()
    visible = ((key == 0) | (key == query)) & causal
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def gold_ranks(output: Output, batch: Batch) -> Tensor:
    """How many other candidates score at least as much as the gold reply (B,): 0 is a hit, ties are none."""
    gold = output.mc_logits.gather(1, batch.n_candidates[:, None] - 1)
    return (output.mc_logits >= gold).sum(1) - 1


def context_length(config) -> int:
    """Tokens a model takes at once: its positions, and its sliding window where it has one."""
    text = config.get_text_config()
    names = (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "sliding_window",
        "attention_window",
    )
    sizes = [size for size in (getattr(text, name, None) for name in names) if isinstance(size, int) and size > 0]
    return min(sizes, default=1024)


def same_numbers(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways of computing the same vectors (..., D) differ by rounding alone.

    Rounding in fp32 was seen to come to 3e-4 of a vector's length (SmolLM2, whose hidden states have outliers), rows
    that may not be packed to 0.17 (MPT).
    """
    most = 1e-2 if expected.dtype == torch.float32 else 1e-1
    return bool(((found - expected).norm(dim=-1) <= most * expected.norm(dim=-1)).all())


# ------------------------------------------------------------------------------------------------------------
# Inference on a CPU
# ------------------------------------------------------------------------------------------------------------


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


# ------------------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------------------


def load_model(
    files: ModelFiles, tokenizer: DialogTokenizer, device: torch.device, from_scratch: bool = False
) -> DialogModel:
    """The model in a folder, .gguf or unpacked archive, in float32, with rows for the tokenizer's special tokens.

    Args:
        from_scratch: a folder without weights gives a freshly initialised model; else that is an error.
    Raises:
        UserError: the weights are missing, damaged or of another architecture.
    """
    if files.has_weights:
        lm = load_weights(files)
    elif from_scratch:
        config = load_config(files)
        config.vocab_size = len(tokenizer)
        make = causal_lm_class(config)
        try:
            lm = make(config)
        except Exception as error:  # each architecture has its own for sizes that do not go together
            raise UserError(
                f"{files.folder}/config.json: {first_line(error)}; expected sizes of which a model can be made"
            ) from error
    else:
        raise UserError(f"{files.folder} holds no weights; train it first: python train.py --model {files.folder}")
    if lm.config.__dict__.pop("auto_map", None):
        log.warning(
            f"warning: {files.folder}/config.json asks for code of its own (auto_map), which is never run; "
            f"using the {lm.config.model_type} of transformers"
        )
    if lm.get_input_embeddings().num_embeddings != len(tokenizer):
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.ids
    for config in (lm.config, lm.config.get_text_config()):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = ids.bos, ids.eos, ids.pad
    lm.generation_config = GenerationConfig(bos_token_id=ids.bos, eos_token_id=ids.eos, pad_token_id=ids.pad)
    model = DialogModel(lm.float(), ids).eval()
    if model.limit < 16:
        raise UserError(f"the model in {files.folder} takes {model.limit} tokens at once; expected at least 16")
    probe(model)
    return model.to(device)


def causal_lm_class(config) -> type[PreTrainedModel]:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"a {config.model_type} model is not a causal language model; expected one, such as gpt2")
    return with_choice_head(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def load_weights(files: ModelFiles) -> PreTrainedModel:
    """A model from safetensors, .bin or .gguf; a base model's multiple-choice head is freshly initialised."""
    path = files.folder / (files.gguf or "")
    try:
        if files.gguf:  # what transformers loads counts as quantised for ever: build a plain model from its tensors
            from transformers import AutoModelForCausalLM

            quantised = AutoModelForCausalLM.from_pretrained(files.folder, gguf_file=files.gguf, dtype=torch.float32)
            config, source = quantised.config, {"state_dict": quantised.state_dict()}
            for name in ("quantization_config", "_pre_quantization_dtype"):
                config.__dict__.pop(name, None)
        else:
            config, source = load_config(files), {"pretrained_model_name_or_path": files.folder}
        lm, report = causal_lm_class(config).from_pretrained(
            **{"pretrained_model_name_or_path": None} | source,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and pickle raise many types for a file they cannot use
        raise UserError(
            f"cannot load the weights in {path}: {first_line(error)}; expected whole files of tensors"
        ) from error
    reshaped = [f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in report["mismatched_keys"]]
    missing = [name for name in report["missing_keys"] if not name.startswith("multiple_choice_head.")]
    extremes = {name: torch.stack(parameter.aminmax()) for name, parameter in lm.named_parameters()}  # nan is both
    infinite = [name for name, values in extremes.items() if not values.isfinite().all()]
    faults = {"have wrong shapes in": reshaped, "lack": missing, "hold nan or infinity in": infinite}
    for fault, tensors in faults.items():
        if tensors:
            raise UserError(
                f"the weights in {path} {fault} {len(tensors)} tensors, such as {min(tensors)}; "
                "fetch the model again, or use an earlier checkpoint"
            )
    # Checkpoints of old versions carry their causal mask as a buffer.
    surplus = [name for name in report["unexpected_keys"] if not name.endswith((".attn.bias", ".attn.masked_bias"))]
    if surplus:
        log.warning(f"warning: {path} holds {len(surplus)} tensors this model has no place for, such as {min(surplus)}")
    return lm


@torch.no_grad()
def probe(model: DialogModel) -> None:
    """Try a tiny batch both ways: packed against padded, cached against whole, our logits against the model's own.

    Sets `model.packed`; raises `UserError` where logits cannot be had from hidden states at labels only, or are no
    numbers. Our own openai-gpt is tried for the latter only.
    """
    tokens = [token for token in range(len(model.ids.all) + 30) if token not in model.ids.all]
    speakers = [model.ids.speaker1] * 3 + [model.ids.speaker2] * 3
    instances = [
        Instance(tokens[:6], speakers, [tokens[6:9], tokens[9:14]]),
        Instance(tokens[8:12], speakers[:4], [tokens[1:3], tokens[4:6], tokens[2:7]]),
    ]
    batch = collate(instances, model.ids)

    padded, real = model._hidden_padded(batch), batch.segments >= 0
    if not padded.isfinite().all():
        raise UserError("the model's weights give numbers that are not finite; use an earlier checkpoint of it")
    if isinstance(model.body, OpenAIGPTBody):
        return
    try:
        model.packed = same_numbers(model._hidden_packed(batch)[real], padded[real])
        rows = Continuation(model, [(instance.prefix[:4], instance.token_types[:4]) for instance in instances[:1]])
        rows.start()
        stepped = [rows.extend(tokens[i : i + 1], speakers[i]) for i in (4, 5)]
        model.packed = model.packed and same_numbers(torch.cat(stepped), padded[0, 4:6])
        reason = "hidden states differ"
    except Exception as error:  # an architecture may refuse a 4D mask, positions or a cache in its own way
        model.packed, reason = False, first_line(error)
    kind = model.lm.config.model_type
    if "local" in getattr(model.lm.config, "attention_layers", ()):  # GPT-Neo's look back a number of tokens along
        model.packed, reason = False, "its layers are local"  # the row, too many for a tiny batch to show it
    if not model.packed:
        log.info(f"{kind}: packed rows are not exact for it ({reason}); using padded rows, which are slower")
    width = len(instances[0].prefix + instances[0].candidates[0])  # which stand side by side
    embeds = model.embed(batch.input_ids[:1, :width], batch.token_types[:1, :width])
    logits = model.lm(inputs_embeds=embeds, use_cache=False).logits
    if not same_numbers(model.lm_logits(padded[:1, :width]), logits):
        raise UserError(
            f"{kind} changes its logits behind the LM head in a way this toolkit does not know; use another model"
        )


# ------------------------------------------------------------------------------------------------------------
# Generation
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Decoding:
    """How a reply is drawn: the options of `utils.add_decoding_options`."""

    no_sample: bool = False
    max_length: int = 20
    min_length: int = 1
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    n_replies: int = 1
    rerank: str = "both"
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if self.no_sample and self.n_replies > 1:
            raise UserError(f"n_replies {self.n_replies} with no_sample would be the same reply each time; drop one")

    @classmethod
    def from_args(cls, args) -> "Decoding":
        return cls(**{name: getattr(args, name) for name in cls.__dataclass_fields__})

    def changed(self, name: str, text: str) -> "Decoding":
        """With the option `name` set to what a user typed."""
        return replace(self, **{name: decoding_option(name, text)})


NUCLEI = 64, 1024  # tokens: sizes to try before the whole vocabulary


def filtered_probabilities(logits: Tensor, decoding: Decoding) -> Tensor:
    """Temperature, then top-k, then nucleus sampling (Holtzman et al. 2020, section 3.1). (B, V) -> (B, V)

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p; it is never empty.
    """
    logits = logits / decoding.temperature
    if decoding.top_k > 0:
        least = logits.topk(min(decoding.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if 0 < decoding.top_p < 1:
        # Sorting a whole vocabulary costs more than the model itself, and the nucleus is nearly always small.
        for size in (*NUCLEI, probabilities.shape[-1]):
            ordered, order = probabilities.topk(min(size, probabilities.shape[-1]))
            if bool((ordered.sum(-1) >= decoding.top_p).all()):
                break
        before = ordered.cumsum(-1) - ordered  # the probability of all likelier tokens
        nucleus = ordered.masked_fill(before >= max(decoding.top_p, 1e-6), 0)  # float32 rounds less than that to none
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, nucleus)
    return probabilities / probabilities.sum(-1, keepdim=True)


def draw(probabilities: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token for each row (B, V) -> (B,), each by its own (CPU) generator: rows do not depend on their batch."""
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(probabilities)
    heights = probabilities.cumsum(-1)
    below = uniform[:, None].clamp(max=1 - 1e-6) * heights[:, -1:]  # rounded, but never up to the last height
    return torch.searchsorted(heights, below, right=True)[:, 0]


def repeating(said: list[int], reply: list[int], n: int) -> set[int]:
    """The tokens that would end a sequence of `n` tokens which `said` or the reply already holds."""
    if len(reply) < n - 1:  # the sequence would begin before the reply
        return set()
    said, tail = [*said, *reply], reply[len(reply) - n + 1 :]
    return {said[i] for i in range(n - 1, len(said)) if said[i - n + 1 : i] == tail}


class RoomyLayer(DynamicLayer):
    """A layer of a cache with room behind its keys and values, so that a token is added without copying the others."""

    ROOM = 64  # columns
    buffers: tuple[Tensor, Tensor] | None = None  # keys and values are the beginning of these

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < end:
            wide = [states.new_empty(*states.shape[:-2], end + self.ROOM, states.shape[-1]) for states in new]
            if start:
                wide[0][..., :start, :], wide[1][..., :start, :] = self.keys, self.values
            self.buffers = tuple(wide)
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[..., start:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats > 1:
            super().batch_repeat_interleave(repeats)
            self.buffers = None


def new_cache() -> Cache:
    return Cache(layer_class_to_replicate=RoomyLayer)


class PrefixCache:
    """Keys and values of the last rows, so that a prefix which begins like one of them is computed only from there.

    They depend on the tokens and token types of the row alone, so rows of different conversations may share them.

    Args:
        size: rows to keep.
    """

    def __init__(self, size: int = 1):
        self.size = size
        self.kept: list[tuple[list[tuple[int, int]], list[tuple[Tensor, Tensor]]]] = []  # the newest is the last

    def beginning(self, prefix: tuple[list[int], list[int]]) -> Cache:
        """A cache of the longest beginning that `prefix` has in common with a kept row, short of its last token."""
        row = list(zip(*prefix, strict=True))[:-1]
        cache, length, layers = new_cache(), 0, []
        for other, other_layers in self.kept:
            shared = len(os.path.commonprefix([row, other]))
            if shared > length:
                length, layers = shared, other_layers
        for layer, (keys, values) in enumerate(layers):
            cache.update(keys[:, :, :length], values[:, :, :length], layer)
        return cache

    def keep(self, row: list[tuple[int, int]], cache: Cache, index: int) -> None:
        """Keep row `index` of a cache, whose tokens and token types begin with `row`."""
        row = row[: cache.get_seq_length()]
        layers = [(each.keys[[index], :, : len(row)], each.values[[index], :, : len(row)]) for each in cache.layers]
        others = [kept for kept in self.kept if kept[0] != row[: len(kept[0])]]  # it holds what those held
        self.kept = [*others, (row, layers)][-self.size :]


class Continuation:
    """Prefixes, padded on the right, and the tokens that are added to them one column at a time.

    With a cache only new tokens are computed. Where the architecture does not allow that (`model.packed` is False),
    every row is computed anew each time.

    Args:
        kept: where the beginning of a prefix that stands alone may be found.
    """

    def __init__(
        self, model: DialogModel, prefixes: list[tuple[list[int], list[int]]], kept: PrefixCache | None = None
    ):
        self.model = model
        sizes = [len(tokens) for tokens, _ in prefixes]
        self.lengths = torch.tensor(sizes, device=model.device)
        self.width, self.ragged = max(sizes), min(sizes) < max(sizes)
        padded = [
            [row + [model.ids.pad] * (self.width - len(row)) for row in column]
            for column in zip(*prefixes, strict=True)
        ]
        self.tokens, self.types = torch.tensor(padded, device=model.device)  # (B, T) each
        self.cache = None
        if model.packed:
            self.cache = kept.beginning(prefixes[0]) if kept and len(prefixes) == 1 else new_cache()

    def start(self, copies: int = 1) -> Tensor:
        """The hidden state of every prefix's last token; each prefix becomes `copies` rows (B, D)."""
        hidden = self._compute()
        self.tokens, self.types, self.lengths, hidden = (
            tensor.repeat_interleave(copies, dim=0) for tensor in (self.tokens, self.types, self.lengths, hidden)
        )
        if self.cache is not None:
            self.cache.batch_repeat_interleave(copies)
        return hidden

    def _compute(self) -> Tensor:
        """The hidden state of every row's last token (B, D), computed from where the cache ends."""
        done = self.cache.get_seq_length() if self.cache is not None else 0
        embeds = self.model.embed(self.tokens[:, done:], self.types[:, done:])
        behind = {}
        if done:
            columns = torch.arange(self.width, device=embeds.device)
            hidden = columns > columns[done:, None]  # (T - done, T)
            mask = torch.zeros_like(hidden, dtype=embeds.dtype).masked_fill_(hidden, torch.finfo(embeds.dtype).min)
            behind = {"position_ids": columns[None, done:], "attention_mask": mask[None, None]}
        ends = torch.arange(len(embeds), device=embeds.device) * embeds.shape[1] + self.lengths - 1 - done
        inputs = behind | self.model.reading(ends) | self._cache_options()
        return self.model.body(inputs_embeds=embeds, **inputs)[0].flatten(0, 1)[ends]

    def extend(self, tokens: list[int], speaker: int) -> Tensor:
        """Add one token to every row; their hidden states (B, D)."""
        new = torch.tensor(tokens, device=self.model.device)[:, None]
        if self.cache is None:
            column = new.new_full(new.shape, self.model.ids.pad)
            self.tokens = torch.cat([self.tokens, column], dim=1).scatter_(1, self.lengths[:, None], new)
            self.types = torch.cat([self.types, torch.full_like(new, speaker)], dim=1)
            self.types.scatter_(1, self.lengths[:, None], speaker)
            self.lengths = self.lengths + 1
            return self._compute()
        embeds = self.model.embed(new, torch.full_like(new, speaker))
        added = self.cache.get_seq_length() - self.width
        hidden = self.model.body(
            inputs_embeds=embeds,
            position_ids=self.lengths[:, None] + added,
            attention_mask=self._mask(embeds.dtype, self.width + added + 1) if self.ragged else None,
            **self._cache_options(),
        )[0]
        return hidden[:, 0]

    def _cache_options(self) -> dict:
        return {"use_cache": False} if self.cache is None else {"use_cache": True, "past_key_values": self.cache}

    def _mask(self, dtype: torch.dtype, columns: int) -> Tensor:
        """(B, 1, 1, columns): the new token sees its row's own prefix and what was added, not the padding between."""
        column = torch.arange(columns, device=self.lengths.device)
        hidden = (column >= self.lengths[:, None]) & (column < self.width)
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


@dataclass
class Reply:
    tokens: list[int]
    complete: bool  # it ended of itself, not at its longest length
    lm: float  # log-likelihood per token, of the model's own distribution, <eos> included
    mc: float  # the multiple-choice head's score


def rank(replies: list[Reply], rerank: str) -> list[Reply]:
    """The best first: by the multiple-choice head (ties by likelihood), by likelihood, or by the sum of both logs."""
    if rerank == "mc":
        return sorted(replies, key=lambda reply: (reply.mc, reply.lm), reverse=True)
    # The head's softmax takes the same from each score, so the score itself ranks like its log-probability.
    weight = 1.0 if rerank == "both" else 0.0
    return sorted(replies, key=lambda reply: reply.lm + weight * reply.mc, reverse=True)


class Generation:
    """Replies to a batch of prefixes (tokens and token types, as `utils.build_prefix` makes them).

    Each prefix gets `n_replies` rows. Iterating draws one token for every row at a time and yields them; None for a
    row that has ended. A reply ends before its first special token, or after `max_length` tokens. Special tokens are
    barred for the first `min_length`. Iterating may be given up at any token.

    Args:
        generators: one for each prefix.
        kept: prefixes computed before; a single prefix begins there, and its best reply is kept for the next turn.
    """

    def __init__(
        self,
        model: DialogModel,
        prefixes: list[tuple[list[int], list[int]]],
        decoding: Decoding,
        generators: list[torch.Generator],
        kept: PrefixCache | None = None,
    ):
        self.model, self.prefixes, self.decoding, self.kept = model, prefixes, decoding, kept
        self.generators = [generator for generator in generators for _ in range(decoding.n_replies)]
        self.rows = Continuation(model, prefixes, kept)
        speakers = model.ids.speaker1, model.ids.speaker2
        histories = [tokens[next(i for i, t in enumerate(tokens) if t in speakers) :] for tokens, _ in prefixes]
        self.said = [history for history in histories for _ in range(decoding.n_replies)]  # the persona is not said
        self.replies = [Reply([], False, 0.0, float("nan")) for _ in self.generators]
        self.drawn: list[int] | None = None  # the last column, not computed yet

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[int | None]]:
        for count in range(self.decoding.max_length):
            logits = self.model.lm_logits(self._advance()).float()
            tokens = self._draw(logits, count)
            likelihoods = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens].tolist()
            for reply, token, likelihood in zip(self.replies, tokens, likelihoods, strict=True):
                if not reply.complete:
                    reply.lm += likelihood
                    reply.complete = token in self.model.ids.all
                    reply.tokens += [] if reply.complete else [token]
            column = [None if reply.complete else reply.tokens[-1] for reply in self.replies]
            self.drawn = [self.model.ids.eos if token is None else token for token in column]
            if all(reply.complete for reply in self.replies):
                return
            yield column

    def _advance(self) -> Tensor:
        """Compute the tokens drawn last, at first the prefixes: the hidden states that predict the next ones (R, D).

        A row that ended in this column has its <eos> computed, which is what the multiple-choice head reads.
        """
        if self.drawn is None:
            return self.rows.start(self.decoding.n_replies)
        hidden = self.rows.extend(self.drawn, self.model.ids.speaker1)
        scores = self.model.lm.multiple_choice_head(hidden).float().tolist()
        for reply, token, score in zip(self.replies, self.drawn, scores, strict=True):
            if token == self.model.ids.eos and reply.mc != reply.mc:  # not a number: it has no score yet
                reply.mc = score
        return hidden

    def _draw(self, logits: Tensor, count: int) -> list[int]:
        decoding, logits = self.decoding, logits.clone()
        for row, (said, reply) in enumerate(zip(self.said, self.replies, strict=True)):
            if decoding.repetition_penalty != 1.0:
                used = torch.tensor(sorted({*said, *reply.tokens} - self.model.ids.all), device=logits.device).long()
                scores = logits[row, used]
                logits[row, used] = scores * decoding.repetition_penalty ** -scores.sign()
            if decoding.no_repeat_ngram:
                logits[row, list(repeating(said, reply.tokens, decoding.no_repeat_ngram))] = float("-inf")
        if count < decoding.min_length:
            logits[:, sorted(self.model.ids.all)] = float("-inf")
        if decoding.no_sample:
            return logits.argmax(-1).tolist()
        return draw(filtered_probabilities(logits, decoding), self.generators).tolist()

    @torch.inference_mode()
    def finish(self) -> list[list[Reply]]:
        """The replies to each prefix, best first, as far as they were drawn."""
        while any(reply.mc != reply.mc for reply in self.replies):
            self._advance()
            self.drawn = [self.model.ids.eos] * len(self.replies)
        for reply in self.replies:
            reply.lm /= max(len(reply.tokens) + reply.complete, 1)
        n = self.decoding.n_replies
        ranked = [rank(self.replies[i : i + n], self.decoding.rerank) for i in range(0, len(self.replies), n)]
        if self.kept is not None and self.rows.cache is not None and len(ranked) == 1:
            best, (tokens, types) = ranked[0][0], self.prefixes[0]
            row = [*zip(tokens, types, strict=True), *((token, self.model.ids.speaker1) for token in best.tokens)]
            self.kept.keep(row, self.rows.cache, next(i for i, reply in enumerate(self.replies) if reply is best))
        return ranked


def generate_replies(*args) -> list[list[int]]:
    """The tokens of the best reply to each prefix of a `Generation`."""
    generation = Generation(*args)
    for _ in generation:
        pass
    if generation.decoding.n_replies == 1:  # nothing to choose from, so nothing to score
        return [reply.tokens for reply in generation.replies]
    return [replies[0].tokens for replies in generation.finish()]


@dataclass
class Turn:
    text: str | None  # of the other person; None where the bot spoke first
    reply: str
    ids: list[list[int]]  # of what was said, as the model sees it
    candidates: list[tuple[str, Reply]]  # distinct replies, best first: the first was given


class Conversation:
    """A persona and what was said; what a terminal and a browser share.

    Args:
        persona: sentences, as text.
        max_history: exchanges that the model is shown.
        seed: of the replies.
        kept: prefixes computed before, where conversations share them.
    """

    def __init__(
        self,
        model: DialogModel,
        tokenizer: DialogTokenizer,
        persona: list[str],
        decoding: Decoding,
        max_history: int,
        seed: int,
        kept: PrefixCache | None = None,
    ):
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding
        self.persona = persona
        self.n_history = 2 * max_history + 1
        self.turns: list[Turn] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.kept = kept or PrefixCache()

    @property
    def said(self) -> list[str]:
        """All utterances, oldest first."""
        return [text for turn in self.turns for text in (turn.text, turn.reply) if text is not None]

    def record(self) -> dict:
        """Persona and messages, as a dialog to train on (`utils.Record`)."""
        roles = [("user", "assistant")[(len(self.said) - i) % 2] for i in range(len(self.said))]  # the bot spoke last
        messages = [{"role": role, "content": text} for role, text in zip(roles, self.said, strict=True)]
        return {"personality": self.persona, "messages": messages}

    def resume(self, dialog: list[str]) -> None:
        """Put an earlier conversation, ending with the bot's reply, in the place of this one."""
        texts = [None, *dialog] if len(dialog) % 2 else dialog
        pairs = [texts[i : i + 2] for i in range(0, len(texts), 2)]
        self.turns = [
            Turn(*pair, self.tokenizer.encode([text for text in pair if text is not None]), []) for pair in pairs
        ]

    def generation(self, text: str) -> Generation:
        """The replies to `text`, to be drawn."""
        history = [ids for turn in self.turns for ids in turn.ids] + self.tokenizer.encode([text])
        longest = min(self.decoding.max_length, self.model.limit // 2)  # leave room for what it replies to
        persona_ids = self.tokenizer.encode(self.persona)  # each time: a persona may change, and it takes no time
        persona, kept, longest = fit(persona_ids, history[-self.n_history :], longest, self.model.limit)
        prefix = build_prefix(persona, kept, self.model.ids)
        decoding = replace(self.decoding, max_length=longest)
        return Generation(self.model, [prefix], decoding, [self.generator], self.kept)

    def stream(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Say `text`; yields the bot's reply piece by piece, and remembers the turn once it is whole.

        The best of several replies is known, and yielded, only at the end. There is a (maybe empty) piece for every
        token: after each `stopped` is asked, and where it says so the reply ends. One stopped before its first word
        is no turn.
        """
        generation, shown = self.generation(text), ""
        for _ in generation:
            start = self.tokenizer.decode_start(generation.replies[0].tokens) if len(generation.replies) == 1 else ""
            yield start[len(shown) :]
            shown = start
            if stopped():
                break
        candidates: dict[str, Reply] = {}
        for candidate in generation.finish()[0]:
            candidates.setdefault(self.tokenizer.decode(candidate.tokens), candidate)
        reply, best = next(iter(candidates.items()))
        if reply or not stopped():
            ids = [*self.tokenizer.encode([text]), best.tokens]
            self.turns.append(Turn(text, reply, ids, list(candidates.items())))
        yield reply[len(shown) :]

    def reply(self, text: str) -> str:
        """Say `text`; the bot's reply."""
        return "".join(self.stream(text))
