"""The double-head model: forward, load, save; openai-gpt with a cache.

Shapes: B rows, T tokens, N candidates, L labelled tokens, D hidden size, V vocabulary. Inference sees ids only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.openai.modeling_openai import OpenAIGPTLMHeadModel, OpenAIGPTModel

from cli import UserError, first_line, log
from files import ModelFiles, whole_files
from inputs import Batch, Instance, collate
from utils import DialogTokenizer, SpecialIds, load_config

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
        embeds, positions, cache = (
            model.embed(batch.input_ids[:1, :6], batch.token_types[:1, :6]),
            batch.positions,
            DynamicCache(),
        )
        for new in (slice(0, 4), slice(4, 5), slice(5, 6)):
            inputs = {"inputs_embeds": embeds[:, new], "position_ids": positions[:1, new], "past_key_values": cache}
            stepped = model.body(**inputs, use_cache=True)[0]
            model.packed = model.packed and same_numbers(stepped, padded[:1, new])
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
