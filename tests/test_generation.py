"""Sampling, batched generation with a cache, and conversations."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import conversation
from conversation import Conversation
from decoding import draw, filtered_probabilities
from generation import DecodeState, Generation, generate_replies, last_hidden
from options import Decoding
from tiny_models import embed

KINDS = ("openai-gpt", "gpt2", "llama", "mpt", "mamba")  # the last two do without packed rows and without a cache
GREEDY = Decoding(no_sample=True, max_length=12)


@pytest.fixture
def loaded(request, dialog_model, load):
    """Model and tokenizer of the kind that a test asks for."""
    return load(dialog_model(request.param))


with_kinds = pytest.mark.parametrize("loaded", KINDS, indirect=True)
with_one = pytest.mark.parametrize("loaded", ["gpt2"], indirect=True)


def make_prefixes(ids, lengths=(7, 3, 12, 7)) -> list[tuple[list[int], list[int]]]:
    """Random tokens and token types, the last of each the speaker of the reply."""
    prefixes = []
    for length in lengths:
        tokens = torch.randint(10, 200, (length - 1,)).tolist()
        types = [(ids.speaker1, ids.speaker2)[choice] for choice in torch.randint(2, (length - 1,)).tolist()]
        prefixes.append(([*tokens, ids.speaker1], [*types, ids.speaker1]))
    return prefixes


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def plain_greedy(plain, prefix, ids, decoding) -> list[int]:
    """The likeliest token again and again, all computed anew each time by transformers' own model."""
    tokens, types = prefix
    reply = []
    while len(reply) < decoding.max_length:
        embeds = embed(plain, ids, tokens + reply, types + [ids.speaker1] * len(reply))
        logits = plain(inputs_embeds=embeds).logits[0, -1]
        if len(reply) < decoding.min_length:
            logits[list(ids.all)] = float("-inf")
        token = int(logits.argmax())
        if token in ids.all:
            break
        reply.append(token)
    return reply


# ------------------------------------------------------------------------------------------------------------
# Generation
# ------------------------------------------------------------------------------------------------------------


@with_kinds
def test_greedy_batch_is_what_plain_transformers_says_row_by_row(loaded, dialog_model, request):
    model, tokenizer = loaded
    kind = request.node.callspec.params["loaded"]
    plain = AutoModelForCausalLM.from_pretrained(dialog_model(kind)).eval()
    prefixes = make_prefixes(tokenizer.ids)
    expected = [plain_greedy(plain, prefix, tokenizer.ids, GREEDY) for prefix in prefixes]
    assert generate_replies(model, prefixes, GREEDY, generators(*range(4))) == expected
    assert [generate_replies(model, [prefix], GREEDY, generators(0))[0] for prefix in prefixes] == expected
    assert model.packed == (kind in ("openai-gpt", "gpt2", "llama"))


@with_kinds
def test_hidden_states_of_each_added_token(loaded):
    """Closer than a token's choice can tell: cached or not, in a ragged batch or alone."""
    model, tokenizer = loaded
    ids = tokenizer.ids
    prefixes = make_prefixes(ids)
    added = torch.randint(10, 200, (5, len(prefixes))).tolist()
    advance = DecodeState(model, 4, 12 + 5).extend_to if model.packed else partial(last_hidden, model)
    rows = [list(zip(*prefix, strict=True)) for prefix in prefixes]
    with torch.no_grad():
        found = [advance(rows)]
        for column in added:
            rows = [[*row, (token, ids.speaker1)] for row, token in zip(rows, column, strict=True)]
            found.append(advance(rows))
        for row, (tokens, types) in enumerate(prefixes):
            reply = [column[row] for column in added]
            embeds = model.embed(torch.tensor([tokens + reply]), torch.tensor([types + [ids.speaker1] * 5]))
            expected = model.body(inputs_embeds=embeds, use_cache=False)[0][0, len(tokens) - 1 :]
            torch.testing.assert_close(torch.stack(found, dim=1)[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loaded", ["openai-gpt", "gpt2", "llama"], indirect=True)
def test_rows_may_get_tokens_at_different_times(loaded):
    model, tokenizer = loaded
    rows = [list(zip(*prefix, strict=True)) for prefix in make_prefixes(tokenizer.ids, [7, 3, 12])]
    more = [list(zip(*prefix, strict=True)) for prefix in make_prefixes(tokenizer.ids, [2, 3, 1])]
    state = DecodeState(model, 3, 20)
    with torch.no_grad():
        state.extend_to(rows)
        rows[1] = rows[1] + more[1]
        state.extend_to(rows)  # nothing is new in the others
        rows[0], rows[2] = rows[0] + more[0], rows[2] + more[2]
        hidden = state.extend_to(rows)
        for row in (0, 2):
            alone = DecodeState(model, 1, 20).extend_to([rows[row]])
            torch.testing.assert_close(hidden[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loaded", ["openai-gpt", "gpt2", "llama", "mpt"], indirect=True)
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_beam_search_is_that_of_transformers(loaded, length_penalty, tmp_path):
    """In a batch, with ends at different times, the three best replies of four beams."""
    model, tokenizer = loaded
    ids, vectors = tokenizer.ids, model.lm.get_input_embeddings().weight
    kept = vectors.detach().clone()
    try:
        with torch.no_grad():
            vectors[ids.speaker1] = 0  # transformers knows no token types: now they add nothing
            vectors[ids.eos] = vectors[10:200].mean(0) * 3
        model.save(tmp_path)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        prefixes = [(tokens, [ids.speaker1] * len(tokens)) for tokens, _ in make_prefixes(ids)]
        decoding = Decoding(num_beams=4, length_penalty=length_penalty, n_replies=3, max_length=9)
        generation = Generation(model, prefixes, decoding, generators(*range(4)))
        steps = list(generation)
        found = [[(reply.tokens, reply.complete) for reply in replies] for replies in generation.replies]
    finally:
        with torch.no_grad():
            vectors.copy_(kept)
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": length_penalty, "do_sample": False}
    options |= {"max_new_tokens": 9, "min_new_tokens": 1, "eos_token_id": sorted(ids.all), "pad_token_id": ids.pad}
    for (tokens, _), replies in zip(prefixes, found, strict=True):
        rows = plain.generate(torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), **options)
        expected = [row[len(tokens) :].tolist() for row in rows]
        ends = [next((i for i, token in enumerate(row) if token in ids.all), None) for row in expected]
        assert replies == [(row[:end], end is not None) for row, end in zip(expected, ends, strict=True)]
    for step in steps:  # what is shown before the end stays
        for (shown, *_), (best, *_) in zip(step, generation.replies, strict=True):
            assert best.tokens[: len(shown.tokens)] == shown.tokens


@with_kinds
def test_beams_are_scored_as_if_they_had_been_drawn_alone(loaded):
    """Both heads' scores of the best beams, computed after the beams have changed places."""
    model, tokenizer = loaded
    prefixes = make_prefixes(tokenizer.ids)
    decoding = Decoding(num_beams=3, n_replies=2, max_length=5, min_length=5, no_repeat_ngram=1)
    generation = Generation(model, prefixes, decoding, generators(*range(4)))
    for step, _ in zip(range(6), generation, strict=False):
        assert step < 5
    for prefix, replies in zip(prefixes, generation.finish(), strict=True):
        assert len({tuple(reply.tokens) for reply in replies}) == 2
        for reply in replies:
            assert len(set(reply.tokens)) == 5
            row = list(zip(*prefix, strict=True)) + [
                (token, tokenizer.ids.speaker1) for token in (*reply.tokens, tokenizer.ids.eos)
            ]
            with torch.no_grad():
                hidden = torch.cat([last_hidden(model, [row[:end]]) for end in range(len(prefix[0]), len(row) + 1)])
                score = model.lm.multiple_choice_head(hidden[-1:])[0, 0]
                likelihoods = model.lm_logits(hidden[:5]).log_softmax(-1)
            assert reply.mc_score == pytest.approx(float(score), abs=1e-3)
            assert reply.log_likelihood == pytest.approx(
                sum(float(likelihoods[i, token]) for i, token in enumerate(reply.tokens)), abs=1e-3
            )


@with_one
def test_a_beam_search_that_is_stopped_has_a_reply_so_far(loaded):
    model, tokenizer = loaded
    (prefix,) = make_prefixes(tokenizer.ids, [7])
    generation = Generation(model, [prefix], Decoding(num_beams=4, min_length=9, max_length=9), generators(0))
    for _ in zip(range(3), generation, strict=False):
        pass
    ((reply,),) = generation.finish()
    assert len(reply.tokens) == 3 and not reply.complete and reply.mc_score is not None
    assert generation.finish() == [[reply]] and list(generation) == []


@with_kinds
def test_sampled_replies_do_not_depend_on_their_batch(loaded):
    model, tokenizer = loaded
    prefixes = make_prefixes(tokenizer.ids)
    decoding = Decoding(max_length=10)
    batched = generate_replies(model, prefixes, decoding, generators(5, 6, 7, 8))
    alone = [generate_replies(model, [prefixes[row]], decoding, generators(5 + row))[0] for row in range(4)]
    assert batched == alone
    other_seeds = generate_replies(model, prefixes, decoding, generators(1, 2, 3, 4))
    assert other_seeds != batched


def script_logits(monkeypatch, model, columns: list[list[dict[int, float]]]) -> None:
    """Let the model give these logits instead of its own: for each new column and row, a few tokens' logits."""
    steps = iter(columns)

    def lm_logits(hidden):
        logits = torch.full((len(hidden), model.lm.config.vocab_size), -20.0)
        for row, scores in zip(logits, next(steps), strict=True):
            row[list(scores)] = torch.tensor(list(scores.values()))
        return logits

    monkeypatch.setattr(model, "lm_logits", lm_logits)


@with_one
@pytest.mark.parametrize("sample", [True, False], ids=["sampled", "greedy"])
def test_reply_ends_at_any_special_token(loaded, sample, monkeypatch):
    model, tokenizer = loaded
    decoding = Decoding(no_sample=not sample, max_length=6)
    assert len(tokenizer.ids.all) == 6  # ours and <|endoftext|>
    for special in tokenizer.ids.all:
        script_logits(monkeypatch, model, [[{token: 20.0}] for token in (50, 51, special, 52, 53, 54)])
        assert generate_replies(model, make_prefixes(tokenizer.ids, [4]), decoding, generators(0)) == [[50, 51]]


@with_one
def test_rows_of_a_batch_end_on_their_own(loaded, monkeypatch):
    model, tokenizer = loaded
    eos = tokenizer.ids.eos
    rows = [[50, eos, 52, 53], [60, 61, 62, eos], [eos, 71, 72, 73]]  # what each row would like to say
    columns = [[{token: 20.0} for token in column] for column in zip(*rows, strict=True)]
    decoding = Decoding(no_sample=True, max_length=9, min_length=0)
    script_logits(monkeypatch, model, columns)
    steps = list(Generation(model, make_prefixes(tokenizer.ids, [4, 6, 5]), decoding, generators(0, 1, 2)))
    assert [[reply.tokens for (reply,) in step] for step in steps] == [
        [[50], [60], []],
        [[50], [60, 61], []],
        [[50], [60, 61, 62], []],
        [[50], [60, 61, 62], []],
    ]
    assert [[reply.complete for (reply,) in step] for step in steps] == [
        [False, False, True],
        [True, False, True],
        [True, False, True],
        [True, True, True],
    ]
    script_logits(monkeypatch, model, columns)
    replies = generate_replies(model, make_prefixes(tokenizer.ids, [4, 6, 5]), decoding, generators(0, 1, 2))
    assert replies == [[50], [60, 61, 62], []]


@with_one
@pytest.mark.parametrize("sample", [True, False], ids=["sampled", "greedy"])
@pytest.mark.parametrize("min_length", [0, 1, 3])
def test_special_tokens_are_barred_for_min_length(loaded, min_length, sample, monkeypatch):
    model, tokenizer = loaded
    everything = {token: 20.0 for token in tokenizer.ids.all} | {50: 5.0}  # any special token rather than 50
    script_logits(monkeypatch, model, [[everything]] * 6)
    decoding = Decoding(no_sample=not sample, max_length=6, min_length=min_length)
    replies = generate_replies(model, make_prefixes(tokenizer.ids, [4]), decoding, generators(0))
    assert replies == [[50] * min_length]


@with_one
@pytest.mark.parametrize(
    "max_length, min_length, length", [(1, 1, 1), (5, 1, 5), (3, 9, 3)], ids=["one", "five", "below min_length"]
)
def test_max_length_is_the_longest_reply(loaded, max_length, min_length, length, monkeypatch):
    model, tokenizer = loaded
    script_logits(monkeypatch, model, [[{50: 20.0}] * 2] * 9)
    decoding = Decoding(no_sample=True, max_length=max_length, min_length=min_length)
    replies = generate_replies(model, make_prefixes(tokenizer.ids, [4, 8]), decoding, generators(0, 1))
    assert replies == [[50] * length] * 2


@with_kinds
def test_special_tokens_never_come_out(loaded):
    model, tokenizer = loaded
    decoding = Decoding(max_length=20, min_length=3, temperature=2.0, top_p=1.0)
    prefixes = make_prefixes(tokenizer.ids, [4, 6, 5, 3] * 8)
    replies = generate_replies(model, prefixes, decoding, generators(*range(32)))
    assert not tokenizer.ids.all & {token for reply in replies for token in reply}
    lengths = {len(reply) for reply in replies}
    assert min(lengths) >= 3 and max(lengths) <= 20 and len(lengths) > 1  # so some did end at a special token


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------

PLAIN = Decoding(temperature=1.0, top_k=0, top_p=1.0)
HALVES = [0.5, 0.25, 0.125, 0.0625, 0.0625]


@pytest.mark.parametrize(
    "probabilities, options, expected",
    [
        pytest.param(HALVES, {}, HALVES, id="nothing"),
        pytest.param([0.8, 0.2], {"temperature": 0.5}, [16 / 17, 1 / 17], id="temperature sharpens"),
        pytest.param([0.8, 0.2], {"temperature": 2.0}, [2 / 3, 1 / 3], id="temperature flattens"),
        pytest.param([0.4, 0.6], {"temperature": 1e-6}, [0, 1], id="temperature near zero is greedy"),
        pytest.param(HALVES, {"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0], id="top_k"),
        pytest.param([0.125, 0.25, 0.125, 0.5], {"top_k": 1}, [0, 0, 0, 1], id="top_k of one, unordered"),
        pytest.param(HALVES, {"top_k": 9}, HALVES, id="top_k above the vocabulary"),
        pytest.param(HALVES, {"top_k": -1}, HALVES, id="top_k below zero is off"),
        pytest.param([0.25, 0.25, 0.5], {"top_k": 2}, [0.25, 0.25, 0.5], id="top_k keeps all ties"),
        pytest.param(HALVES, {"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0, 0], id="top_p reaches into the next token"),
        pytest.param(HALVES, {"top_p": 0.75}, [2 / 3, 1 / 3, 0, 0, 0], id="top_p reached exactly"),
        pytest.param([0.125, 0.5, 0.25, 0.125], {"top_p": 0.7}, [0, 2 / 3, 1 / 3, 0], id="top_p, unordered"),
        pytest.param(HALVES, {"top_p": 1e-9}, [1, 0, 0, 0, 0], id="tiny top_p keeps the likeliest"),
        pytest.param(HALVES, {"top_p": 0.0}, HALVES, id="top_p of zero is off"),
        pytest.param(HALVES, {"top_p": -1.0}, HALVES, id="top_p below zero is off"),
        # top_k leaves 2/3 and 1/3, and of these the first already reaches 0.6; without top_k, two would be needed
        pytest.param(HALVES, {"min_p": 0.2}, [4 / 7, 2 / 7, 1 / 7, 0, 0], id="min_p of the likeliest"),
        pytest.param(HALVES, {"min_p": 1.0}, [1, 0, 0, 0, 0], id="min_p of one keeps the likeliest"),
        pytest.param(HALVES, {"min_p": 0.4, "temperature": 0.5}, [1, 0, 0, 0, 0], id="temperature, then min_p"),
        pytest.param(HALVES, {"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0, 0], id="top_k first, then top_p"),
        pytest.param(HALVES, {"top_k": 4, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0, 0], id="top_p is narrower"),
        # squares of 0.5, 0.25 and 0.25 are 4:1:1, so the first has 2/3 and reaches 0.6
        pytest.param([0.25, 0.5, 0.25], {"temperature": 0.5, "top_p": 0.6}, [0, 1, 0], id="temperature, then top_p"),
    ],
)
def test_filtered_probabilities(probabilities, options, expected):
    logits = torch.tensor([probabilities, probabilities[::-1]]).log() + 3.0  # whatever is added to all logits
    found = filtered_probabilities(logits, replace(PLAIN, **options))
    torch.testing.assert_close(found, torch.tensor([expected, expected[::-1]], dtype=torch.float32))


def test_nucleus_of_ties_is_no_larger_than_needed():
    found = filtered_probabilities(torch.zeros(1, 8), replace(PLAIN, top_p=0.375))
    assert found[0].sort(descending=True).values.tolist() == pytest.approx([1 / 3] * 3 + [0] * 5)


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
def test_nucleus_in_a_large_vocabulary(top_p):
    """One row is nearly flat, so that its nucleus holds thousands of tokens; the other has a small one."""
    logits = torch.randn(2, 6000) * torch.tensor([[0.1], [6.0]])
    found = filtered_probabilities(logits, replace(PLAIN, top_p=top_p))
    for row, probabilities in enumerate(logits.double().softmax(-1).tolist()):
        nucleus, reached = [], 0.0
        for token in sorted(range(6000), key=lambda token: -probabilities[token]):
            if reached >= top_p:
                break
            nucleus.append(token)
            reached += probabilities[token]
        kept = found[row].nonzero()[:, 0]
        assert abs(len(kept) - len(nucleus)) <= 1  # where the sum comes within rounding of top_p
        expected = torch.tensor([probabilities[token] / reached for token in nucleus[:-1]])
        torch.testing.assert_close(found[row, nucleus[:-1]], expected, rtol=2e-3, atol=1e-6)


def test_barred_tokens_stay_barred():
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]])
    found = filtered_probabilities(logits, Decoding(temperature=5.0, top_k=4, top_p=0.999))
    assert found[0, [0, 3]].tolist() == [0, 0] and found.sum() == pytest.approx(1)


def test_draw_follows_the_probabilities():
    wanted = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    count = 4000
    tokens = draw(wanted.expand(count, -1), generators(*range(count)))
    frequencies = torch.bincount(tokens, minlength=6) / count
    assert frequencies[wanted == 0].sum() == 0
    assert (frequencies - wanted).abs().max() < 0.03  # four standard deviations


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-24, 4)])
def test_draw_at_the_edges(uniform, token, monkeypatch):
    """The smallest and the largest number that torch.rand can give never pick a token of probability zero."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, uniform))
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]])
    assert draw(probabilities, generators(0)).tolist() == [token]


# ------------------------------------------------------------------------------------------------------------
# Conversations
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch) -> list[tuple[list[int], int]]:
    """The prefix tokens that each reply was generated for, and its longest length."""
    calls = []

    class Watched(Generation):
        def __init__(self, model, prefixes, decoding, *rest):
            calls.append((prefixes[0][0], decoding.max_length))
            super().__init__(model, prefixes, decoding, *rest)

    monkeypatch.setattr(conversation, "Generation", Watched)
    return calls


def test_conversation_keeps_two_utterances_for_each_exchange(dialog_model, load, seen):
    model, tokenizer = load(dialog_model("gpt2"))
    ids = tokenizer.ids
    chat = Conversation(model, tokenizer, ["i like"], Decoding(max_length=4), max_history=1, seed=0)
    persona = tokenizer.encode(["i like"])[0]
    said = []
    for text in ("a", "b", "c", "d"):
        heard = tokenizer.encode([text])[0]
        reply = chat.reply(text)
        tokens, _ = seen[-1]
        # the last three: what the other said, the bot's reply to it, and what was said now
        history = [*said, heard][-3:]
        speakers = [ids.speaker2, ids.speaker1, ids.speaker2][-len(history) :]
        expected = [ids.bos, *persona]
        for speaker, utterance in zip(speakers, history, strict=True):
            expected += [speaker, *utterance]
        assert tokens == [*expected, ids.speaker1]
        said += [heard, chat.turns[-1].ids[-1]]
        assert tokenizer.decode(chat.turns[-1].ids[-1]) == reply


@pytest.mark.parametrize(
    "kind, sentences", [("openai-gpt", 2), ("gpt2", 2), ("llama", 2), ("gpt2", 0), ("gpt2", 40)], ids=str
)
def test_long_conversation_stays_within_the_models_limit(kind, sentences, make_model, tmp_path, load, seen):
    sizes = {"max_position_embeddings": 64} if kind == "llama" else {"n_positions": 64}
    model, tokenizer = load(make_model(tmp_path, kind, **sizes))
    assert model.limit == 64
    decoding = Decoding(max_length=50, min_length=50)
    chat = Conversation(model, tokenizer, ["my car is red ."] * sentences, decoding, max_history=5, seed=0)
    for turn in range(8):
        text = "what do you do for a living , and do you like fish ? " * (turn % 4 + 1)
        chat.reply(text)
        tokens, longest = seen[-1]
        assert len(tokens) + longest <= 64
        assert longest >= 1 and len(chat.turns[-1].ids[-1]) == longest
        if sentences < 40:  # a persona that fills the model leaves no room for what was just said
            assert tokens[-3:-1] == tokenizer.encode([text])[0][-2:]


@pytest.mark.parametrize("kind", ["openai-gpt", "gpt2", "llama"])
def test_typed_special_tokens_are_text(kind, dialog_model, load, seen):
    model, tokenizer = load(dialog_model(kind))
    ids = tokenizer.ids
    chat = Conversation(model, tokenizer, ["<bos> i <pad>"], Decoding(max_length=3), max_history=2, seed=0)
    chat.reply("<eos> <speaker1> hello <speaker2> <pad> <bos> <|endoftext|>")
    tokens, _ = seen[-1]
    ours = [token for token in tokens if token in (ids.bos, ids.eos, ids.pad, ids.speaker1, ids.speaker2)]
    assert ours == [ids.bos, ids.speaker2, ids.speaker1]
    if kind != "openai-gpt":  # its small vocabulary has unknown letters, which are <unk>
        assert "<eos>" in tokenizer.decode(tokens) and "<pad>" in tokenizer.decode(tokens)
        assert ids.all.isdisjoint(chat.turns[0].ids[0])


def test_same_seed_same_replies(dialog_model, load):
    model, tokenizer = load(dialog_model("gpt2"))

    def talk(seed: int) -> list[str]:
        chat = Conversation(model, tokenizer, ["i like cats ."], Decoding(), max_history=2, seed=seed)
        return [chat.reply(text) for text in ("hello", "what do you do ?", "i like dogs .")]

    first = talk(1)
    assert talk(1) == first
    assert talk(2) != first
