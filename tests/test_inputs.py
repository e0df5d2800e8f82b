"""Input building: prefixes, cuts, instances and batches against rows worked out by hand."""

import logging

import pytest
import torch

from batches import batches_by_length, collate
from helpers import IDS, make_split
from inputs import Instance, Instances, build_prefix, truncate

B, E, P, S1, S2 = IDS.bos, IDS.eos, IDS.pad, IDS.speaker1, IDS.speaker2


# ------------------------------------------------------------------------------------------------------------
# The prefix
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("persona", "history", "tokens", "types"),
    [
        pytest.param([], [], [B, S1], [S1, S1], id="nothing"),
        pytest.param([[1, 2], [3]], [], [B, 1, 2, 3, S1], [S1] * 5, id="persona-only"),
        pytest.param([], [[5, 6]], [B, S2, 5, 6, S1], [S1, S2, S2, S2, S1], id="one-utterance"),
        pytest.param([], [[5], [6]], [B, S1, 5, S2, 6, S1], [S1, S1, S1, S2, S2, S1], id="even-history"),
        pytest.param(
            [[1], [2]],
            [[5], [6, 7], [8]],
            [B, 1, 2, S2, 5, S1, 6, 7, S2, 8, S1],
            [S1, S1, S1, S2, S2, S1, S1, S1, S2, S2, S1],
            id="odd-history",
        ),
        pytest.param([[]], [[]], [B, S2, S1], [S1, S2, S1], id="empty-strings"),
    ],
)
def test_the_prefix_and_whose_every_token_is(persona, history, tokens, types):
    assert build_prefix(persona, history, IDS) == (tokens, types)


# ------------------------------------------------------------------------------------------------------------
# Cutting a row to what the model takes
# ------------------------------------------------------------------------------------------------------------

PERSONA = [[1, 2], [3]]
HISTORY = [[11, 12], [13, 14, 15], [16, 17]]


@pytest.mark.parametrize(
    ("limit", "persona", "history", "reply"),
    [
        # <bos>, <speaker1>, <eos>: 3. Persona: 3. History with its speakers: 3 + 4 + 3. Reply: 4. Together 20.
        (20, PERSONA, HISTORY, 4),
        (19, PERSONA, HISTORY[1:], 4),  # one token too many: the oldest utterance goes whole
        (17, PERSONA, HISTORY[1:], 4),
        (16, PERSONA, HISTORY[2:], 4),
        (13, PERSONA, HISTORY[2:], 4),
        (12, PERSONA[:1], HISTORY[2:], 4),  # the persona beside the newest utterance: its last sentence goes
        (11, [], HISTORY[2:], 4),
        (10, [], HISTORY[2:], 4),
        (9, [], [[17]], 4),  # the newest utterance is cut from its front
        (8, [], [], 4),  # nothing of it would be left but its speaker
        (7, [], [], 4),
        (6, [], [], 3),  # the reply is cut from its end
        (5, [], [], 2),
        (4, [], [], 1),
    ],
)
def test_what_is_cut_first(limit, persona, history, reply):
    assert truncate(PERSONA, HISTORY, 4, limit) == (persona, history, reply)


@pytest.mark.parametrize(
    ("given", "limit", "expected"),
    [
        pytest.param(
            ([[1], [2] * 6], [[11]], 1), 9, ([[1]], [[11]], 1), id="a-shorter-persona-leaves-room-for-history"
        ),
        pytest.param(([[1] * 496], [[10] * 9, [11] * 9], 20), 512, ([], [[10] * 9, [11] * 9], 20), id="a-long-persona"),
        pytest.param(([[1] * 6, [2]], [[11]], 1), 9, ([], [[11]], 1), id="the-last-sentence-was-not-enough"),
        pytest.param(([[1, 2]], [[11] * 9], 3), 13, ([], [[11] * 6], 3), id="one-long-utterance"),
        pytest.param(([], [], 20), 10, ([], [], 7), id="only-a-reply"),
        pytest.param(([], [[11, 12]], 0), 5, ([], [[12]], 0), id="an-empty-reply"),
    ],
)
def test_cuts_of_unusual_rows(given, limit, expected):
    assert truncate(*given, limit) == expected


def test_truncation_leaves_its_arguments_alone():
    persona, history = [[1, 2], [3]], [[4, 5], [6, 7]]
    truncate(persona, history, 4, 6)
    assert (persona, history) == ([[1, 2], [3]], [[4, 5], [6, 7]])


# ------------------------------------------------------------------------------------------------------------
# Instances
# ------------------------------------------------------------------------------------------------------------

DIALOGS = [
    (
        [[1, 2], [3], [4]],
        [
            ([[10]], [[20], [21, 22]]),
            ([[10], [21, 22], [11], [23], [12]], [[24, 25, 26], [27], [28, 29]]),
        ],
    ),
    ([], [([], [[30]])]),
]


def test_instances_with_all_of_their_history_and_candidates():
    found = list(map(Instances(make_split(DIALOGS), IDS, max_history=2, limit=100).__getitem__, range(3)))
    assert found == [
        Instance(
            [B, 1, 2, 3, 4, S2, 10, S1],
            [S1, S1, S1, S1, S1, S2, S2, S1],
            [[20, E], [21, 22, E]],
        ),
        Instance(
            [B, 1, 2, 3, 4, S2, 10, S1, 21, 22, S2, 11, S1, 23, S2, 12, S1],
            [S1, S1, S1, S1, S1, S2, S2, S1, S1, S1, S2, S2, S1, S1, S2, S2, S1],
            [[24, 25, 26, E], [27, E], [28, 29, E]],
        ),
        Instance([B, S1], [S1, S1], [[30, E]]),
    ]


@pytest.mark.parametrize(
    ("max_history", "kept"),
    [
        (0, [S2, 12]),
        (1, [S2, 11, S1, 23, S2, 12]),
        (2, [S2, 10, S1, 21, 22, S2, 11, S1, 23, S2, 12]),
        (3, [S2, 10, S1, 21, 22, S2, 11, S1, 23, S2, 12]),
    ],
)
def test_history_is_its_last_exchanges_and_the_utterance_before_the_reply(max_history, kept):
    assert Instances(make_split(DIALOGS), IDS, max_history, 100)[1].prefix == [B, 1, 2, 3, 4, *kept, S1]


@pytest.mark.parametrize(
    ("num_candidates", "kept"),
    [
        (1, [[28, 29, E]]),
        (2, [[27, E], [28, 29, E]]),
        (3, [[24, 25, 26, E], [27, E], [28, 29, E]]),
        (9, [[24, 25, 26, E], [27, E], [28, 29, E]]),
        (0, [[24, 25, 26, E], [27, E], [28, 29, E]]),
        (-1, [[24, 25, 26, E], [27, E], [28, 29, E]]),
    ],
)
def test_the_last_candidates_are_kept(num_candidates, kept):
    assert Instances(make_split(DIALOGS), IDS, 2, 100, num_candidates)[1].candidates == kept


def test_permutations_rotate_the_sentences_of_the_persona():
    instances = Instances(make_split(DIALOGS), IDS, 0, 100, permutations=4)
    assert len(instances) == 12
    personas = [instances[i].prefix[1:-3] for i in (0, 3, 6, 9)]  # the first utterance, four times
    assert personas == [[1, 2, 3, 4], [4, 1, 2, 3], [3, 4, 1, 2], [1, 2, 3, 4]]
    assert [instances[i].prefix for i in (2, 5, 8, 11)] == [[B, S1]] * 4  # the third has no persona


def test_one_cut_for_all_candidates_made_for_the_longest():
    dialogs = [([[1]], [([[10, 11], [12, 13]], [[20, 21, 22, 23], [24], [25, 26]])])]
    # <bos> 1 | <speaker2> 12 13 | <speaker1> and four tokens and <eos>: 11.
    instance = Instances(make_split(dialogs), IDS, 2, 11)[0]
    assert instance == Instance(
        [B, 1, S2, 12, 13, S1], [S1, S1, S2, S2, S2, S1], [[20, 21, 22, 23, E], [24, E], [25, 26, E]]
    )
    # At 5 neither persona nor history is left, and two tokens of a reply.
    instance = Instances(make_split(dialogs), IDS, 2, 5)[0]
    assert instance == Instance([B, S1], [S1, S1], [[20, 21, E], [24, E], [25, 26, E]])


def test_an_extra_continuation_goes_with_its_gold_reply_and_costs_the_others_nothing():
    dialogs = [([[1]], [([[10, 11]], [[20], [21, 22]]), ([[10, 11]], [[21, 22], [20]])])]
    # Strings are numbered as they come: 0 persona; 1 history, 2 3 candidates; 4 history, 5 6 candidates.
    instances = Instances(make_split(dialogs), IDS, 2, 100, extras={3: [30, 31, 32, 33]})
    assert [instances[i].extra for i in range(2)] == [[30, 31, 32, 33], []]
    # <bos> 1 | <speaker2> 10 11 | <speaker1> 21 22 <eos>: 9 tokens fit as they are, and 3 of the extra ones do.
    instances = Instances(make_split(dialogs), IDS, 2, 9, extras={3: [30, 31, 32, 33]})
    assert instances[0] == Instance(
        [B, 1, S2, 10, 11, S1], [S1, S1, S2, S2, S2, S1], [[20, E], [21, 22, E]], [30, 31, 32]
    )
    with pytest.raises(IndexError):
        instances[2]


@pytest.mark.parametrize(
    ("max_history", "num_candidates", "expected"),
    [
        # First: 5 of <bos> and persona, 2 of history, 1 + 2 + 1 of the reply. Last: <bos> <speaker1> 30 <eos>.
        (0, 0, [11, 5 + 2 + 1 + 3 + 1, 4]),
        (1, 0, [11, 5 + 6 + 1 + 3 + 1, 4]),
        (2, 0, [11, 5 + 11 + 1 + 3 + 1, 4]),
        (2, 1, [11, 5 + 11 + 1 + 3 + 1, 4]),  # of all candidates, also where fewer are kept
    ],
)
def test_lengths_are_those_of_the_rows_before_a_cut(max_history, num_candidates, expected):
    instances = Instances(make_split(DIALOGS), IDS, max_history, 100, num_candidates)
    assert instances.lengths().tolist() == expected
    built = list(Instances(make_split(DIALOGS), IDS, max_history, 100))
    assert [len(i.prefix) + max(map(len, i.candidates)) for i in built] == expected


@pytest.mark.parametrize("limit", range(4, 23))
def test_rows_fit_the_model_and_the_cut_ones_are_reported(limit, caplog):
    split = make_split(DIALOGS)
    instances, whole = Instances(split, IDS, 2, limit), Instances(split, IDS, 2, 100)
    assert all(len(instances[i].prefix) + max(map(len, instances[i].candidates)) <= limit for i in range(3))
    changed = sum(instances[i] != whole[i] for i in range(3))
    assert changed == (limit < 11) + (limit < 21)  # they are 11, 21 and 4 tokens long
    with caplog.at_level(logging.INFO, logger="improvedflend"):
        instances.report_truncation("train")
    expected = [f"train: {changed} of 3 utterances are longer than {limit} tokens and are truncated"] if changed else []
    assert caplog.messages == expected


# ------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------


def test_a_batch_of_packed_rows():
    batch = collate(
        [
            Instance([B, 1, S1], [S1, S1, S1], [[5, E], [6, 7, E]]),
            Instance([B, S2, 2, 3, S1], [S1, S2, S2, S2, S1], [[8, E]]),
        ],
        IDS,
    )
    expected = {
        "input_ids": [[B, 1, S1, 5, E, 6, 7, E], [B, S2, 2, 3, S1, 8, E, P]],
        "token_types": [[S1, S1, S1, S1, S1, S1, S1, S1], [S1, S2, S2, S2, S1, S1, S1, P]],
        "positions": [[0, 1, 2, 3, 4, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 0]],
        "segments": [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, -1]],
        "ends": [[4, 7], [8 + 6, 0]],
        "n_candidates": [2, 1],
        # <speaker1> predicts 6, 6 predicts 7, 7 predicts <eos>; in the second row <speaker1> 8, and 8 <eos>.
        "lm_positions": [2, 5, 6, 8 + 4, 8 + 5],
        "lm_labels": [6, 7, E, 8, E],
        "extra_starts": [0, 0],
        "head_positions": [2, 4, 5, 6, 7, 8 + 4, 8 + 5, 8 + 6],
    }
    assert {name: getattr(batch, name).tolist() for name in expected} == expected
    assert {getattr(batch, name).dtype for name in expected} == {torch.int64}
    assert batch.prefix_ends().tolist() == [2, 8 + 4]


def test_extra_continuations_stand_behind_the_candidates_and_are_in_no_loss():
    batch = collate(
        [
            Instance([B, S1], [S1, S1], [[5, E], [6, E]]),
            Instance([B, 1, S1], [S1, S1, S1], [[5, E], [6, E]], extra=[7, 8]),
        ],
        IDS,
    )
    expected = {
        "input_ids": [[B, S1, 5, E, 6, E, P, P, P], [B, 1, S1, 5, E, 6, E, 7, 8]],
        "token_types": [[S1] * 6 + [P] * 3, [S1] * 9],
        "positions": [[0, 1, 2, 3, 2, 3, 0, 0, 0], [0, 1, 2, 3, 4, 3, 4, 3, 4]],
        "segments": [[0, 0, 1, 1, 2, 2, -1, -1, -1], [0, 0, 0, 1, 1, 2, 2, 3, 3]],
        "ends": [[3, 5], [9 + 4, 9 + 6]],
        "n_candidates": [2, 2],
        "lm_positions": [1, 4, 9 + 2, 9 + 5],
        "lm_labels": [6, E, 6, E],
        "extra_starts": [0, 9 + 7],
        "head_positions": [1, 3, 4, 5, 9 + 2, 9 + 4, 9 + 5, 9 + 6, 9 + 7, 9 + 8],
    }
    assert {name: getattr(batch, name).tolist() for name in expected} == expected


def test_an_empty_gold_reply_is_its_eos():
    batch = collate([Instance([B, S1], [S1, S1], [[5, E], [E]])], IDS)
    assert batch.input_ids.tolist() == [[B, S1, 5, E, E]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert (batch.ends.tolist(), batch.lm_positions.tolist(), batch.lm_labels.tolist()) == ([[3, 4]], [1], [E])


def test_batches_by_length_hold_every_utterance_once_and_like_lengths_together():
    dialogs = [([], [([[10] * size], [[size]])]) for size in (7, 1, 5, 3, 9)]
    batches = list(batches_by_length(Instances(make_split(dialogs), IDS, 2, 100), 2))
    assert [batch.lm_labels.tolist() for batch in batches] == [[1, E, 3, E], [5, E, 7, E], [9, E]]
    assert [batch.input_ids.shape[1] for batch in batches] == [5 + 3, 5 + 7, 5 + 9]


def test_processes_share_the_batches_of_the_first_utterances():
    dialogs = [([], [([[10] * size], [[size]])]) for size in (7, 1, 5, 3, 9)]
    instances = Instances(make_split(dialogs), IDS, 2, 100)
    shares = [batches_by_length(instances, 1, size=4, rank=rank, world=3) for rank in range(3)]
    assert [[batch.lm_labels[0].item() for batch in share] for share in shares] == [[1, 7], [3], [5]]
