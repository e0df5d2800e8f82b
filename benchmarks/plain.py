"""The plain way: the original's algorithm on today's transformers, to measure against.

Every candidate is its own row, padded to the longest of the dataset; transformers' own double-head class computes
full LM logits in its default attention; nothing is cached or batched when generating.
"""

import torch
from transformers import OpenAIGPTConfig, OpenAIGPTDoubleHeadsModel

from decoding import draw, filtered_probabilities
from inputs import Instance, Instances
from metrics import WordModel
from model import DialogModel, OpenAIGPTLMHeadModel, with_choice_head
from options import Decoding
from utils import DialogTokenizer, SpecialIds

FULL = {"n_layer": 12, "n_embd": 768, "n_head": 12}  # the openai-gpt shape
QUICK = {"n_layer": 2, "n_embd": 128, "n_head": 4}
PEAKED = 8  # times the weights as they are initialised, the distribution over tokens is as peaked as a trained model's
POSITIONS = 512
ROWS = 40483  # of the embedding: openai-gpt's vocabulary and five special tokens


def random_model(tokenizer: DialogTokenizer, shape: dict[str, int]) -> DialogModel:
    """A DialogModel of the openai-gpt family with random weights."""
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=ROWS, n_positions=POSITIONS, **shape)
    lm = with_choice_head(OpenAIGPTLMHeadModel)(config)
    with torch.no_grad():
        lm.get_output_embeddings().weight *= PEAKED
    return DialogModel(lm, tokenizer.ids).eval()


def double_heads(model: DialogModel) -> OpenAIGPTDoubleHeadsModel:
    """transformers' own class with the same weights."""
    plain = OpenAIGPTDoubleHeadsModel(model.lm.config)
    plain.load_state_dict(model.lm.state_dict(), strict=True)
    return plain.to(model.device).eval()


def padded_rows(instance: Instance, width: int, ids: SpecialIds) -> list[list[list[int]]]:
    """Tokens, token types and LM labels (3, N, width) of an utterance's candidates; only the gold one has labels."""
    rows = []
    for candidate in instance.candidates:
        tokens, types = instance.prefix + candidate, instance.token_types + [ids.speaker1] * len(candidate)
        gold = candidate if candidate is instance.candidates[-1] else [-100] * len(candidate)
        labels, room = [-100] * len(instance.prefix) + gold, width - len(tokens)
        rows.append([tokens + [ids.pad] * room, types + [ids.pad] * room, labels + [-100] * room])
    return [list(column) for column in zip(*rows, strict=True)]


def ends(instance: Instance) -> list[int]:
    """Where each candidate's <eos> stands in its row."""
    return [len(instance.prefix) + len(candidate) - 1 for candidate in instance.candidates]


def scores(plain: OpenAIGPTDoubleHeadsModel, instance: Instance, width: int, ids: SpecialIds) -> torch.Tensor:
    """Multiple-choice scores (N,) of an utterance's candidates, each in a row of `width` tokens."""
    tokens, types, _ = torch.tensor(padded_rows(instance, width, ids), device=plain.device)
    positions = torch.tensor(ends(instance), device=plain.device)
    return plain(tokens[None], token_type_ids=types[None], mc_token_ids=positions[None]).mc_logits[0]


def log_likelihoods(plain: OpenAIGPTDoubleHeadsModel, instance: Instance, width: int, ids: SpecialIds) -> list[float]:
    """The log-likelihood per token of an utterance's candidates, each in a row of `width` tokens."""
    tokens, types, _ = torch.tensor(padded_rows(instance, width, ids), device=plain.device)
    positions = torch.tensor(ends(instance), device=plain.device)
    logits = plain(tokens[None], token_type_ids=types[None], mc_token_ids=positions[None]).logits[0]  # (N, width, V)
    start, means = len(instance.prefix), []
    for row, candidate in enumerate(instance.candidates):
        predicted = logits[row, start - 1 : start - 1 + len(candidate)].log_softmax(-1)
        means.append(predicted.gather(1, torch.tensor(candidate, device=plain.device)[:, None]).mean().item())
    return means


def loss(plain: OpenAIGPTDoubleHeadsModel, instances: list[Instance], width: int, ids: SpecialIds) -> torch.Tensor:
    """The sum of both losses of a batch whose utterances have equally many candidates."""
    rows = torch.tensor([padded_rows(instance, width, ids) for instance in instances], device=plain.device)
    tokens, types, labels = (column.contiguous() for column in rows.unbind(1))  # (B, N, width) each
    positions = torch.tensor([ends(instance) for instance in instances], device=plain.device)
    gold = torch.tensor([len(instance.candidates) - 1 for instance in instances], device=plain.device)
    output = plain(tokens, token_type_ids=types, mc_token_ids=positions, labels=labels, mc_labels=gold)
    return output.loss + output.mc_loss


def next_logits(plain: OpenAIGPTDoubleHeadsModel, tokens: list[int], types: list[int]) -> torch.Tensor:
    """Logits (V,) after one row, which is computed whole each time."""
    ids, token_types = torch.tensor([tokens, types], device=plain.device)
    ends = torch.tensor([[len(tokens) - 1]], device=plain.device)
    return plain(ids[None, None], token_type_ids=token_types[None, None], mc_token_ids=ends).logits[0, 0, -1]


def word_nll(plain: OpenAIGPTDoubleHeadsModel, instance: Instance, words: WordModel, gold: int, speaker: int) -> float:
    """The summed negative log-likelihood of a reply's words: one forward pass for each."""
    total = 0.0
    for offset, word, inside in words.spelled[gold].positions:
        tokens = instance.prefix + instance.extra[:offset]
        logits = next_logits(plain, tokens, instance.token_types + [speaker] * offset)
        table = words.tables["word_nll"][inside]
        total -= float(table.log_probabilities(logits[None], torch.tensor([word])))
    return total


def reply(
    plain: OpenAIGPTDoubleHeadsModel, instances: Instances, index: int, decoding: Decoding, generator: torch.Generator
) -> list[int]:
    """A sampled reply, token by token."""
    ids = instances.ids
    (tokens, types), _ = instances.prefix(index, decoding.max_length)
    drawn: list[int] = []
    while len(drawn) < decoding.max_length:
        logits = next_logits(plain, tokens + drawn, types + [ids.speaker1] * len(drawn))[None]
        if len(drawn) < decoding.min_length:
            logits[:, sorted(ids.all)] = float("-inf")
        token = int(draw(filtered_probabilities(logits, decoding), [generator]))
        if token in ids.all:
            break
        drawn.append(token)
    return drawn
