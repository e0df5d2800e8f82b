"""A model's files in, the double-head model out; what an architecture can do is tried."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from adapters import merge_adapter
from batches import Batch, collate
from cli import UserError, explain_errors, first_line, log
from configs import load_config
from inputs import Instance
from model import HEAD, NOT_FINITE, DialogModel, OpenAIGPTBody, packed_visibility, same_numbers, with_choice_head
from model_files import ModelFiles
from options import Decoding
from smollm2 import read_gguf
from utils import DialogTokenizer, SpecialIds


def load_model(
    files: ModelFiles, tokenizer: DialogTokenizer, device: torch.device, from_scratch: bool = False
) -> DialogModel:
    """The model in a folder, .gguf or unpacked archive, in float32, with rows for the tokenizer's special tokens and
    its adapters merged.

    Args:
        from_scratch: a folder without weights gives a freshly initialised model; else that is an error.
    Raises:
        UserError: the weights are missing, damaged or of another architecture.
    """
    if files.weights:
        lm = load_weights(files)
    elif from_scratch:
        log.info(f"{files.folder} holds a configuration alone: from scratch, random weights")
        lm = initial_weights(files, len(tokenizer))
    else:
        raise UserError(f"{files.folder} holds no weights; train it first: python train.py --model {files.folder}")
    if lm.config.__dict__.pop("auto_map", None):
        log.warning(
            f"warning: {files.folder}/config.json asks for code of its own (auto_map), which is never run; "
            f"using the {lm.config.model_type} of transformers"
        )
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for folder in files.adapters:
        lm = merge_adapter(lm, folder)
    ids = tokenizer.ids
    special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    for config in (lm.config, lm.config.get_text_config()):
        config.update(special)
    lm.generation_config = GenerationConfig(**special, **sampling(ids))
    model = DialogModel(lm.float(), ids).eval()
    if model.limit < 16:
        raise UserError(f"the model in {files.folder} takes {model.limit} tokens at once; expected at least 16")
    probe(model)
    return model.to(device)


def sampling(ids: SpecialIds) -> dict:
    """How other engines are to draw replies: as interact.py does by default. With token types no other engine can."""
    if ids.token_types:
        return {}
    default = Decoding()
    return {
        "do_sample": True,
        "temperature": default.temperature,
        "top_k": default.top_k,
        "top_p": default.top_p,
    }


def causal_lm_class(config) -> type[PreTrainedModel]:
    """transformers' class for a configuration, with our second head. Raises UserError where it has none."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"a {config.model_type} model is not a causal language model; expected one, such as gpt2")
    return with_choice_head(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def initial_weights(files: ModelFiles, vocabulary: int) -> PreTrainedModel:
    """A freshly initialised model of the sizes in a folder's config.json."""
    config = load_config(files)
    config.vocab_size = vocabulary
    make = causal_lm_class(config)
    # Each architecture has its own errors for sizes that do not go together.
    with explain_errors(f"{files.folder}/config.json", "expected sizes of which a model can be made"):
        return make(config)


def load_weights(files: ModelFiles) -> PreTrainedModel:
    """A model from the files of its weights; a base model's multiple-choice head is freshly initialised."""
    path = files.folder / (files.gguf or "")
    # transformers, safetensors and pickle raise many types for a file they cannot use.
    with explain_errors(f"cannot load the weights in {path}", "expected whole files of tensors"):
        if files.gguf:
            config, tensors = read_gguf(path)
        else:
            config, tensors = load_config(files), read_tensors(files.weights)
        lm, report = causal_lm_class(config).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
    check_weights(lm, report, path)
    return lm


# Under these names training scripts keep a model in a checkpoint of theirs; one may be inside the other.
WRAPPINGS = {"model", "state_dict", "model_state_dict", "module"}

# These wrappers of a model (DataParallel, torch.compile, FSDP) come into the names of its tensors.
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read_tensors(paths: list[Path]) -> dict[str, Tensor]:
    """The tensors in all of these files (safetensors or pickles of torch) by name, as a bare model names them.

    Raises:
        UserError: a file is damaged, or holds something else. No code in it is run.
    """
    tensors = {}
    for path in paths:
        with explain_errors(f"cannot load the weights in {path}", "expected whole files of tensors"):
            if path.suffix == ".safetensors":
                found = load_file(path)
            else:
                found = torch.load(path, map_location="cpu", weights_only=True)
                for _ in WRAPPINGS:  # one in the other, but not for ever: a pickle may hold itself
                    wrappings = isinstance(found, dict) and WRAPPINGS & found.keys()
                    if wrappings:
                        found = found[min(wrappings)]
                if not isinstance(found, dict):
                    raise ValueError(f"a {type(found).__name__}")
            for name, tensor in found.items():
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"{name} is a {type(tensor).__name__}")
                tensors[WRAPPERS.sub("", name)] = tensor
    return tensors


def check_weights(lm: PreTrainedModel, report: dict, path: Path) -> None:
    """Refuse a model that was not loaded whole, or not of numbers. report: transformers' loading info."""
    reshaped = [f"{name} {tuple(stored)} for {tuple(expected)}" for name, stored, expected in report["mismatched_keys"]]
    missing = [name for name in report["missing_keys"] if not name.startswith(HEAD)]
    lm.choice_head_trained = len(missing) == len(report["missing_keys"])
    # Checkpoints of old versions hold their causal mask as a buffer.
    surplus = [name for name in report["unexpected_keys"] if not name.endswith((".attn.bias", ".attn.masked_bias"))]
    others = ""
    if missing and surplus:
        others = f", and hold {len(surplus)} others, such as {min(surplus)}"
    infinite = [name for name, parameter in lm.named_parameters() if not all_finite(parameter)]
    faults = {"have wrong shapes in": reshaped, "lack": missing, "hold nan or infinity in": infinite}
    for fault, names in faults.items():
        if names:
            raise UserError(
                f"the weights in {path} {fault} {len(names)} tensors, such as {min(names)}{others}; "
                "fetch the model again, or use an earlier checkpoint"
            )
    if surplus:
        log.warning(f"warning: {path} holds {len(surplus)} tensors this model has no place for, such as {min(surplus)}")


def all_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    extremes = torch.stack(tensor.aminmax())  # a nan is both; this copies nothing, as isfinite of the whole would
    return bool(extremes.isfinite().all())


@torch.no_grad()
def probe(model: DialogModel) -> None:
    """Compute a tiny batch in our fast ways and in plain ones, and set `model.packed` by whether they agree.

    openai-gpt, whose forward is our own, is tried for finite numbers only.

    Raises:
        UserError: the weights give numbers that are not finite, or the model changes its logits in a way that
            `lm_logits` does not know.
    """
    ids = model.ids
    tokens = [token for token in range(len(ids.all) + 30) if token not in ids.all]
    speakers = [ids.speaker1] * 3 + [ids.speaker2] * 3
    first = Instance(tokens[:6], speakers, [tokens[6:9], tokens[9:14]])
    second = Instance(tokens[8:12], speakers[:4], [tokens[1:3], tokens[4:6], tokens[2:7]])
    batch = collate([first, second], ids)
    padded = model._hidden_padded(batch)
    if not padded.isfinite().all():
        raise UserError(NOT_FINITE)
    if isinstance(model.body, OpenAIGPTBody):
        return
    kind, reason = model.lm.config.model_type, packing_fault(model, batch, padded)
    if reason:
        model.packed = False
        log.info(f"{kind}: packed rows are not exact for it ({reason}); using padded rows, which are slower")
    row = {"input_ids": batch.input_ids[:1, :6], "use_cache": False}
    if not same_numbers(model.lm_logits(model.body(**row)[0]), model.lm(**row).logits):
        raise UserError(
            f"{kind} changes its logits after the LM head in a way this toolkit does not know; use another model"
        )


def packing_fault(model: DialogModel, batch: Batch, padded: Tensor) -> str:
    """Why packed rows, whole or with a key-value cache, do not give the hidden states of padded rows (B, T, D).

    Empty if they do.
    """
    # GPT-Neo's local layers look back a number of columns along the row: too many for a tiny batch to show it.
    if "local" in getattr(model.lm.config, "attention_layers", ()):
        return "its layers are local"
    visible = packed_visibility(batch.segments, batch.forks)
    rows = torch.stack([batch.input_ids, batch.token_types, batch.positions])  # (3, B, T)
    cache, parts = DynamicCache(), []
    try:
        whole = model._hidden_packed(batch)
        for columns in (slice(0, 4), slice(4, 5), slice(5, visible.shape[1])):  # one of them a single new token
            parts.append(model.run_body(*rows[..., columns], visible[:, columns, : columns.stop], cache=cache))
    except Exception as error:  # an architecture may refuse a 4D mask, positions or a cache in its own way
        return first_line(error)
    cached = torch.cat(parts, dim=1)
    real = batch.segments >= 0  # no padding
    for hidden in (whole, cached):
        if not same_numbers(hidden[real], padded[real]):
            return "hidden states differ"
    return ""
