"""Dialog rows: a dialog, or as much of one as fits, in one row."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cli import log
from inputs import Branch, DialogRow, Instances, Reply
from utils import SpecialIds


@dataclass
class RowPlan:
    """Which replies a dialog row holds: `count` utterances from `first`, after a part of that one's history."""

    first: int
    history: int  # place of the first utterance that is shown
    count: int = 1


class DialogRows(torch.utils.data.Dataset):
    """The dialogs of a split, each as one row, or as several where it is too long. Built when they are indexed.

    Each row of a dialog begins with its persona. A later one shows as much of what was said before as fits half of the
    model. Histories that do not go on from one another, as some datasets have them, begin rows of their own.

    Args:
        instances: whose replies they are; its history must be the whole one.
        most: replies in a row.
    Attributes:
        sizes: replies of each row.
        shortened: replies whose row lacks a part of their history.
    """

    def __init__(self, instances: Instances, most: int):
        self.instances, self.most, self.shortened = instances, most, 0
        self.plans = list(self.plan())
        self.sizes = np.tile([plan.count for plan in self.plans], instances.permutations)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def n_replies(self) -> int:
        return len(self.instances)

    @property
    def ids(self) -> SpecialIds:
        return self.instances.ids

    def plan(self) -> Iterator[RowPlan]:
        """Divide the replies into rows, in order."""
        split, limit, longest = self.instances.split, self.instances.limit, self.instances.longest()

        def tokens(strings: np.ndarray) -> int:
            """Of these, each with one more: an utterance's speaker, or the space before a sentence of a persona."""
            return int((split.sizes[strings] + 1).sum())

        row, length = None, 0  # of the trunk, up to the next reply's speaker
        for utterance in range(len(split)):
            news = self.news(utterance) if row and row.count < self.most else None
            if news is not None:
                gold = int(split.sizes[split.candidates[utterance - 1][-1]])
                length += gold + tokens(news) + 1
            if news is None or length + longest[utterance] + 1 > limit:
                if row:
                    yield row
                history, persona = split.history[utterance], split.persona[split.dialogs[utterance]]
                shown = np.cumsum(split.sizes[history[::-1]] + 1)
                first = not (row and split.dialogs[row.first] == split.dialogs[utterance])
                room = (limit if first else limit // 2) - tokens(persona) - 3
                room -= int(longest[utterance]) if first else 0
                kept = max(1, int(np.searchsorted(shown, room, side="right")))
                row = RowPlan(utterance, max(0, len(history) - kept))
                length = 2 + tokens(persona) + tokens(history[row.history :])
            else:
                row.count += 1
            self.shortened += row.history > 0
        if row:
            yield row

    def news(self, utterance: int) -> np.ndarray | None:
        """What is said between the last utterance's reply and this one's; None where its history does not go on so.

        The bot's and the other person's utterances must alternate, as they do backwards from every reply.
        """
        split = self.instances.split
        if split.dialogs[utterance] != split.dialogs[utterance - 1]:
            return None
        before, history = split.history[utterance - 1], split.history[utterance]
        size = len(before) + 1
        known = np.array_equal(history[: size - 1], before) and len(history) > size
        known = known and history[size - 1] == split.candidates[utterance - 1][-1]
        return history[size:] if known and (len(history) - size) % 2 else None

    def __getitem__(self, index: int) -> DialogRow:
        if index not in range(len(self)):
            raise IndexError(index)
        rotation, number = divmod(index, len(self.plans))
        instances, plan = self.instances, self.plans[number]
        split, ids = instances.split, instances.ids
        shown = len(split.history[plan.first]) - plan.history
        longest = int(split.sizes[split.candidates[plan.first]].max())
        at = plan.first + rotation * len(split)
        (tokens, types), room = instances.prefix(at, longest, shown)
        row = DialogRow([*tokens], [*types])
        for utterance in range(plan.first, plan.first + plan.count):
            if utterance > plan.first:
                for place, text in enumerate(self.news(utterance)):
                    speaker = ids.speaker1 if place % 2 else ids.speaker2
                    said = [speaker, *split.ids(text)]
                    row.trunk += said
                    row.token_types += [speaker] * len(said)
                row.trunk.append(ids.speaker1)
                row.token_types.append(ids.speaker1)
                room = instances.limit - len(row.trunk) - 1
            *distractors, gold = (split.ids(text)[:room] for text in instances.kept(split.candidates[utterance]))
            start = len(row.trunk) - 1
            row.trunk += gold
            row.token_types += [ids.speaker1] * len(gold)
            branches = [Branch(start, [*tokens, ids.eos]) for tokens in distractors]
            row.replies.append(Reply(start, [*branches, Branch(len(row.trunk) - 1, [ids.eos])]))
        return row

    def report_truncation(self, name: str) -> None:
        """Say once how many replies have lost a part of their history."""
        if self.shortened:
            size = len(self.instances.split)
            log.info(f"{name}: {self.shortened} of {size} replies are in rows that begin after their dialog's start")
