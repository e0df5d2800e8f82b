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
    def ids(self) -> SpecialIds:
        return self.instances.ids

    def plan(self) -> Iterator[RowPlan]:
        """Divide the replies into rows, in order."""
        instances = self.instances
        split, limit = instances.split, instances.limit
        history = split.history
        places = zip(history.starts.tolist(), history.ends.tolist(), strict=True)
        longest = instances.longest()
        # Tokens, with one more each: an utterance's speaker, or the space before a sentence of a persona.
        persona = row_sums(split.persona, split.sizes + 1)
        said = running_sums(history, split.sizes + 1)
        row = None
        length = 0  # of the trunk, up to the next reply's speaker
        for utterance, (start, end) in enumerate(places):
            goes_on = False
            if row and row.count < self.most:
                news = self.news(utterance)
                if news is not None:
                    gold = split.candidates[utterance - 1][-1]
                    length += split.sizes[gold] + 1
                    length += said[end] - said[end - len(news)]
                    # Whatever candidate the model reads, its <eos> is to fit too.
                    goes_on = length + longest[utterance] + 1 <= limit
            if goes_on:
                row.count += 1
            else:
                dialog = split.dialogs[utterance]
                continues = row and split.dialogs[row.first] == dialog
                if row:
                    yield row
                # Half a model of history leaves a later row the other half for replies. Filled to its end, it would
                # hold a single one, and so would every row after it.
                room = limit // 2 if continues else limit - longest[utterance]
                room -= persona[dialog] + 3  # <bos>, the reply's speaker, <eos>
                # From the first place after which all fits; the last utterance is there whether it fits or not.
                place = start + np.searchsorted(said[start:end], said[end] - room)
                place = max(start, min(int(place), end - 1))
                row = RowPlan(utterance, place - start)
                length = 2 + persona[dialog]  # <bos>, the reply's speaker
                length += said[end] - said[place]
            self.shortened += row.history > 0
        if row:
            yield row

    def news(self, utterance: int) -> list[int] | None:
        """What is said between the last utterance's reply and this one's; None where its history does not go on so.

        The bot's and the other person's utterances must alternate, as they do backwards from every reply.
        """
        split = self.instances.split
        history = split.history
        last = utterance - 1
        if split.dialogs[utterance] != split.dialogs[last]:
            return None
        # Histories that go on from one another are views from the same place, so texts need not be compared.
        if history.starts[utterance] != history.starts[last]:
            return None
        since = history.values[history.ends[last] : history.ends[utterance]]
        if not len(since):  # two replies to the same history
            return None
        reply, *news = since.tolist()
        goes_on = len(news) % 2 and reply == split.candidates[last][-1]
        return news if goes_on else None

    def __getitem__(self, index: int) -> DialogRow:
        if index not in range(len(self)):
            raise IndexError(index)
        rotation, number = divmod(index, len(self.plans))
        plan = self.plans[number]
        instances = self.instances
        split, ids = instances.split, instances.ids
        first = plan.first
        shown = len(split.history[first]) - plan.history
        longest = int(split.sizes[split.candidates[first]].max())
        # `room` is for the first reply; those after it may fill what the trunk leaves.
        prefix, room = instances.prefix(first + rotation * len(split), longest, shown)
        row = DialogRow(*prefix)

        def say(speaker: int, tokens: list[int]) -> None:
            row.trunk += tokens
            row.token_types += [speaker] * len(tokens)

        for utterance in range(first, first + plan.count):
            if utterance > first:
                for place, text in enumerate(self.news(utterance)):
                    speaker = ids.speaker1 if place % 2 else ids.speaker2
                    say(speaker, [speaker, *split.ids(text)])
                say(ids.speaker1, [ids.speaker1])
                room = instances.limit - len(row.trunk) - 1  # <eos>
            candidates = instances.kept(split.candidates[utterance])
            *distractors, gold = (split.ids(candidate)[:room] for candidate in candidates)
            # The <eos> of a gold reply is a branch too: what follows in the trunk must not see it, since in a history
            # utterances have none.
            start = len(row.trunk) - 1
            branches = [Branch(start, [*tokens, ids.eos]) for tokens in distractors]
            say(ids.speaker1, gold)
            branches.append(Branch(len(row.trunk) - 1, [ids.eos]))
            row.replies.append(Reply(start, branches))
        return row

    def report_truncation(self, name: str) -> None:
        """Say once how many replies have lost a part of their history."""
        if self.shortened:
            size = len(self.instances.split)
            log.info(f"{name}: {self.shortened} of {size} replies are in rows that begin after their dialog's start")
