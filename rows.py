"""Dialog rows: a dialog, or as much of one as fits, in one row."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cli import log
from inputs import Branch, DialogRow, Instances, Reply, row_sums, running_sums
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
        instances, split = self.instances, self.instances.split
        limit, longest, history = instances.limit, instances.longest(), split.history
        # Tokens, with one more each: an utterance's speaker, or the space before a sentence of a persona.
        persona, said = row_sums(split.persona, split.sizes + 1), running_sums(history, split.sizes + 1)
        row, length = None, 0  # of the trunk, up to the next reply's speaker
        for utterance, (start, end) in enumerate(zip(history.starts.tolist(), history.ends.tolist(), strict=True)):
            news = self.news(utterance) if row and row.count < self.most else None
            if news is not None:
                gold = split.sizes[split.candidates[utterance - 1][-1]]
                length += gold + said[end] - said[end - len(news)] + 1
            if news is None or length + longest[utterance] + 1 > limit:
                if row:
                    yield row
                dialog = split.dialogs[utterance]
                first = not (row and split.dialogs[row.first] == dialog)
                room = (limit - longest[utterance] if first else limit // 2) - persona[dialog] - 3
                # From the first place after which all fits; the last utterance is there whether it fits or not.
                place = start + np.searchsorted(said[start:end], said[end] - room)
                place = max(start, min(int(place), end - 1))
                row = RowPlan(utterance, place - start)
                length = 2 + persona[dialog] + said[end] - said[place]
            else:
                row.count += 1
            self.shortened += row.history > 0
        if row:
            yield row

    def news(self, utterance: int) -> list[int] | None:
        """What is said between the last utterance's reply and this one's; None where its history does not go on so.

        The bot's and the other person's utterances must alternate, as they do backwards from every reply.
        """
        split, history = self.instances.split, self.instances.split.history
        if split.dialogs[utterance] != split.dialogs[utterance - 1]:
            return None
        if history.starts[utterance] != history.starts[utterance - 1]:
            return None
        reply, *news = history.values[history.ends[utterance - 1] : history.ends[utterance]].tolist() or [-1]
        return news if len(news) % 2 and reply == split.candidates[utterance - 1][-1] else None

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
