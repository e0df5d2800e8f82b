"""The double-head model: forward, load, save; openai-gpt with a key-value cache.

Shapes: B rows, T tokens, S columns that are attended to, N candidates, L labelled tokens, D hidden size, V vocabulary.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.openai.modeling_openai import OpenAIGPTLMHeadModel, OpenAIGPTModel

from adapters import add_adapter, has_adapter, look_up, project, without_adapter
from batches import Batch
from cli import explain_errors, quiet_transformers
from files import whole_files
from model_files import HEAD_WEIGHTS
from utils import SpecialIds

quiet_transformers()

# ------------------------------------------------------------------------------------------------------------
# openai-gpt with a key-value cache
# ------------------------------------------------------------------------------------------------------------


class OpenAIGPTBody(OpenAIGPTModel):
    """transformers' OpenAI GPT with the attention of its GPT-2, which has the same parameters under the same names.

    GPT-2's attention takes 4D masks and a key-value cache, and looks its kernel up in transformers' registry of
    attention functions. OpenAI GPT's own has none of the three.
    """

    gradient_checkpointing = False  # transformers' gradient_checkpointing_enable sets it

    def __init__(self, config):
        super().__init__(config)
        # A config of its own: transformers refuses "sdpa" to other openai-gpt classes that are made from ours.
        sizes = {name: getattr(config, name) for name in ("n_embd", "n_head", "attn_pdrop", "resid_pdrop")}
        attention = GPT2Config(**sizes, attn_implementation="sdpa")
        for index, block in enumerate(self.h):
            block.attn = GPT2Attention(attention, layer_idx=index)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        needed: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D).

        Args:
            attention_mask: a float mask (B, 1, T, S), added to the attention scores. None: causal.
            position_ids: (B, T). None: from 0 on, as without a cache.
            past_key_values: a cache of earlier columns; those of these tokens are added to it.
            needed: flat indices (into B*T), each once, of the hidden states that somebody reads. The last layer
                leaves out its feed-forward part for all others, and their hidden states are 0.
        """
        if inputs_embeds is None:
            inputs_embeds = self.tokens_embed(input_ids)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        x = self.drop(inputs_embeds + self.positions_embed(position_ids))
        shape = x.shape
        for block in self.h:
            is_last = block is self.h[-1]
            inputs = block, x, attention_mask, past_key_values, needed if is_last else None
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(self._layer, *inputs)
            else:
                x = self._layer(*inputs)
        if needed is not None:
            x = x.new_zeros(shape).flatten(0, 1).index_copy(0, needed, x).view(shape)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)

    @staticmethod
    def _layer(block, x: Tensor, mask: Tensor | None, cache: Cache | None, needed: Tensor | None) -> Tensor:
        """One transformer block: (B, T, D) -> (B, T, D), or (R, D) for R needed hidden states."""
        attended = block.attn(x, past_key_values=cache, attention_mask=mask)[0]
        if needed is not None:
            x, attended = x.flatten(0, 1)[needed], attended.flatten(0, 1)[needed]
        x = block.ln_1(x + attended)
        return block.ln_2(x + block.mlp(x))


class OpenAIGPTWithCache(OpenAIGPTLMHeadModel):
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        self.transformer = OpenAIGPTBody(config)
        self.post_init()


# ------------------------------------------------------------------------------------------------------------
# Two heads
# ------------------------------------------------------------------------------------------------------------


NOT_FINITE = "the model's weights give numbers that are not finite; use an earlier checkpoint of it"
HEAD = "multiple_choice_head."  # begins the names of its tensors


def multiple_choice_head(config) -> nn.Module:
    """A score (..., 1) from the hidden state (..., D) at a reply's <eos>.

    Parameters get the names that they have in transformers' double-head models.
    """
    dropout = nn.Dropout(getattr(config, "summary_first_dropout", 0.1))
    summary = nn.Linear(config.get_text_config().hidden_size, 1)
    return nn.Sequential(OrderedDict(dropout=dropout, summary=summary))


def with_choice_head(causal_lm: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A causal LM class of transformers with a multiple-choice head, so that both load and save as one model."""
    parent = OpenAIGPTWithCache if causal_lm is OpenAIGPTLMHeadModel else causal_lm

    class WithChoiceHead(parent):
        choice_head_trained = False  # whether its weights are those of a checkpoint

        def __init__(self, config):
            super().__init__(config)
            self.multiple_choice_head = multiple_choice_head(config)
            self.post_init()
            # transformers' tanh GELU is eight elementwise kernels; torch's is one.
            for name, module in list(self.named_modules(remove_duplicate=False)):
                if type(module) is NewGELUActivation:
                    self.set_submodule(name, nn.GELU(approximate="tanh"))

    # transformers writes the class name to config.json and uses it to rename legacy tensors, so keep its own class's.
    WithChoiceHead.__name__, WithChoiceHead.__module__ = causal_lm.__name__, causal_lm.__module__
    return WithChoiceHead


@dataclass
class Output:
    lm_nll: Tensor  # (L,) negative log-likelihood of every labelled token, float32
    mc_logits: Tensor  # (U, N) a score for every candidate, float32; -inf where a reply has fewer than N


class DialogModel(nn.Module):
    """A causal LM with a multiple-choice head, run over packed rows.

    The candidates of an utterance share their prefix: a row is [prefix | candidate 1 | ... | candidate N], positions
    restart after the prefix, and a mask hides the candidates from each other. Attention is causal, so the hidden
    states are those of N separate rows.

    Not every architecture is exact that way. `packed` says whether this one is (`probe` tries it); where it is not,
    a packed row is unpacked into N padded ones, and replies are generated without our cache.
    """

    def __init__(self, lm: PreTrainedModel, ids: SpecialIds):
        super().__init__()
        self.lm, self.ids = lm, ids
        self.packed = True
        self.untrained: list[int] = []  # special tokens that mean nothing to it yet: never said
        self.limit = context_length(lm.config)

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def body(self) -> PreTrainedModel:
        """The transformer without its heads."""
        return self.lm.base_model

    def forward(self, batch: Batch) -> Output:
        return self.heads(self.hidden(batch), batch)

    def hidden(self, batch: Batch) -> Tensor:
        """The last layer's hidden states (B, T, D) of packed rows. Only those at `batch.head_positions` are defined."""
        return self._hidden_packed(batch) if self.packed else self._hidden_padded(batch)

    def heads(self, hidden: Tensor, batch: Batch) -> Output:
        """Both heads, each only where its output is used: the LM head at labels, the other at every <eos>."""
        labelled = hidden.flatten(0, 1)[batch.lm_positions]
        lm_nll = F.cross_entropy(self.lm_logits(labelled).float(), batch.lm_labels, reduction="none")
        mc_logits = self.lm.multiple_choice_head(hidden.flatten(0, 1)[batch.ends])[..., 0].float()  # (U, N)
        absent = torch.arange(mc_logits.shape[1], device=hidden.device) >= batch.n_candidates[:, None]
        return Output(lm_nll, mc_logits.masked_fill(absent, float("-inf")))

    def _hidden_packed(self, batch: Batch) -> Tensor:
        visible = packed_visibility(batch.segments, batch.forks)
        return self.run_body(batch.input_ids, batch.token_types, batch.positions, visible, needed=batch.head_positions)

    def _hidden_padded(self, batch: Batch) -> Tensor:
        """Every candidate after a copy of the prefix, in a row of its own (B*N, T'), padded on the right.

        It needs no mask: in a causal model no token attends to the padding after it.
        """
        candidates = torch.arange(1, int(batch.segments.max()) + 1, device=batch.segments.device)
        segments = batch.segments[:, None]  # (B, 1, T)
        in_row = (segments == 0) | (segments == candidates[:, None])  # (B, N, T)
        # For each padded row, the packed columns that it holds, in their order; then whatever else, as padding.
        columns = (~in_row).int().argsort(dim=-1, stable=True)[..., : int(in_row.sum(-1).max())]  # (B, N, T')

        def in_padded_rows(packed: Tensor) -> Tensor:  # (B, T) -> (B*N, T')
            return packed[:, None].expand_as(in_row).gather(2, columns).flatten(0, 1)

        embeds = self.embed(in_padded_rows(batch.input_ids), in_padded_rows(batch.token_types))
        hidden = self.body(inputs_embeds=embeds, use_cache=False)[0]
        hidden = hidden.unflatten(0, columns.shape[:2])  # (B, N, T', D)
        # Back to packed columns. The prefix is read from one row alone: it would else get every row's gradient.
        row = segments.clamp(min=1) - 1  # (B, 1, T): candidate n is in row n - 1, the prefix in row 0
        place = in_row.cumsum(-1).gather(1, row) - 1
        dialog = torch.arange(len(hidden), device=hidden.device)[:, None]
        return hidden[dialog, row[:, 0], place[:, 0]]

    def run_body(
        self,
        tokens: Tensor,
        types: Tensor,
        positions: Tensor,
        visible: Tensor,
        needed: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The last layer's hidden states (B, T, D) of tokens, their types and their positions (B, T).

        Args:
            visible: (B, T, S) bool, the columns that each token attends to. S is T, or with a cache what it holds
                and T.
            needed: flat indices (into B*T) of the hidden states that somebody reads. Some models save work by it.
            cache: keys and values of earlier columns; those of these tokens are added to it.
        """
        embeds = self.embed(tokens, types)
        # Added to attention scores. A bool mask would be shorter, and silently wrong in eager attention.
        mask = torch.zeros_like(visible, dtype=embeds.dtype)
        mask.masked_fill_(~visible, torch.finfo(embeds.dtype).min)
        options = {"needed": needed} if isinstance(self.body, OpenAIGPTBody) else {}
        return self.body(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask[:, None],
            past_key_values=cache,
            use_cache=cache is not None,
            **options,
        )[0]

    def embed(self, tokens: Tensor, types: Tensor) -> Tensor:
        """Token embedding plus, with token types, that of the token's speaker: (B, T) -> (B, T, D).

        The body adds positions.
        """
        if not self.ids.token_types:
            return look_up(self.lm.get_input_embeddings(), tokens)
        # Both in one lookup, because the gradient of a lookup is as large as the whole embedding.
        return look_up(self.lm.get_input_embeddings(), torch.stack([tokens, types])).sum(0)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), with the scaling and soft-capping that some architectures apply after their LM head."""
        config = self.lm.config.get_text_config()
        logits = project(self.lm.get_output_embeddings(), hidden)
        # Only where it is asked for: there may be gigabytes of logits, and each line here goes through all of them.
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        if self.untrained:
            logits[..., self.untrained] = torch.finfo(logits.dtype).min
        return logits

    def save(self, folder: Path) -> None:
        """Write config.json, generation_config.json and model.safetensors; plain transformers can load them.

        Each file appears whole under its name or not at all.
        """
        lm = without_adapter(self.lm) if has_adapter(self.lm) else self.lm
        with whole_files(folder) as partial:
            if self.ids.token_types:
                lm.save_pretrained(partial)
                return
            tensors = lm.state_dict()
            head = {name: tensors.pop(name).contiguous() for name in list(tensors) if name.startswith(HEAD)}
            lm.save_pretrained(partial, state_dict=tensors)
            save_file(head, partial / HEAD_WEIGHTS)

    def add_adapter(self, rank: int, alpha: int) -> None:
        """From now on train only an adapter, the multiple-choice head and the five tokens (see adapters.py)."""
        ids = self.ids
        add_adapter(self.lm, rank, alpha, [ids.bos, ids.eos, ids.pad, ids.speaker1, ids.speaker2])

    def checkpoint_gradients(self) -> None:
        """From now on keep only each layer's input for the backward pass, and compute the rest again there."""
        # transformers before 5.22 has the second name only.
        enable = getattr(self.lm, "activation_checkpointing_enable", None) or self.lm.gradient_checkpointing_enable
        with explain_errors("--gradient_checkpointing", "leave it out for this model, or use another one", ValueError):
            enable({"use_reentrant": False})


def packed_visibility(segments: Tensor, forks: Tensor) -> Tensor:
    """Which columns a token of a packed row attends to: (B, T), (B, T) -> (B, T, T) bool.

    They are those of the trunk up to its fork, and those before it in its own branch. Padding attends to the first
    column, because a softmax over nothing would be nan.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    columns = torch.arange(segments.shape[1], device=segments.device)
    return (key == 0) & (columns <= forks[:, :, None]) | (key == query).tril() & (key > 0)


def gold_ranks(output: Output, batch: Batch) -> Tensor:
    """How many other candidates score at least as much as the gold reply (U,): 0 is a hit, ties are none."""
    gold = output.mc_logits.gather(1, batch.n_candidates[:, None] - 1)
    return (output.mc_logits >= gold).sum(1) - 1


def context_length(config) -> int:
    """Tokens a model takes at once: its positions, or its sliding window where that is smaller."""
    text = config.get_text_config()
    positions = "max_position_embeddings", "n_positions", "max_seq_len", "seq_length"
    windows = "sliding_window", "attention_window"
    sizes = [getattr(text, name, None) for name in (*positions, *windows)]
    sizes = [size for size in sizes if isinstance(size, int) and size > 0]
    return min(sizes, default=1024)


def same_numbers(vectors: Tensor, expected: Tensor) -> bool:
    """Whether two ways to compute the same vectors (..., D) differ by rounding alone.

    Rounding in fp32 was seen to be 3e-4 of a vector's length (SmolLM2, whose hidden states have outliers). In rows
    that may not be packed the difference was 0.17 (MPT).
    """
    tolerance = 1e-2 if expected.dtype == torch.float32 else 1e-1
    differences = (vectors - expected).norm(dim=-1)
    return bool((differences <= tolerance * expected.norm(dim=-1)).all())
