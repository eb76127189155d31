"""What preprocess knows of each record: a few numbers of the usable ones, the faults of the others.

Texts and ids are on disk, in the scratch table; memory holds these numbers alone, so a million
pairs fit.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reward.data.reading import unit
from reward.data.records import Pair, hash64
from reward.data.rows import Ids, hash_of
from reward.data.sources import Source
from reward.data.splitting import (
    Hashes,
    Numbered,
    Prompts,
    beginnings,
    combined,
    mixed,
    number_answers,
)

SHOWN = 10
# How often a column is looked through for a value that repeats: at this many records, at twice as
# many, and so on.
FIRST_LOOK = 1024


class BadPlace(NamedTuple):
    """The place of a bad record and why it is bad; in the order of files and positions."""

    file: int
    position: int
    reason: str
    sentence: str


def numbers() -> array[int]:
    return array("I")


def hashes() -> array[int]:
    return array("Q")


@dataclass
class Ledger:
    """The numbers of every usable record, one element each, and what is wrong with the others."""

    sources: list[Source]
    file: array[int] = field(default_factory=numbers)
    position: array[int] = field(default_factory=numbers)
    prompt: array[int] = field(default_factory=hashes)
    answer_j: array[int] = field(default_factory=hashes)
    answer_k: array[int] = field(default_factory=hashes)
    owner: array[int] = field(default_factory=numbers)
    begun: array[int] = field(default_factory=hashes)
    chosen: array[int] = field(default_factory=numbers)
    rejected: array[int] = field(default_factory=numbers)
    prefix: array[int] = field(default_factory=numbers)
    columns: set[str] = field(default_factory=set)
    faults: list[BadPlace] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    votes: int = 0
    merged: int = 0

    def __post_init__(self) -> None:
        self._judges = Judges(self.file, self.position, self.answers)

    def add(self, file: int, position: int, pair: Pair, ids: Sequence[Ids], prefix: int) -> None:
        """Note a usable pair with the ids of chosen and rejected, and how many they share."""
        begun = beginnings(pair.prompt)
        self.owner.extend([len(self.file)] * len(begun))
        self.begun.extend(begun)
        self.file.append(file)
        self.position.append(position)
        self.prompt.append(pair.prompt_hash)
        self.answer_j.append(hash_of(ids[0]))
        self.answer_k.append(hash_of(ids[1]))
        self.chosen.append(len(ids[0]))
        self.rejected.append(len(ids[1]))
        self.prefix.append(prefix)
        self.columns.update(pair.columns)
        self._judges.add(pair.columns)

    def bad(self, file: int, position: int, reason: str, sentence: str) -> None:
        """Count a bad record, and keep its place if it is among the first of its reason.

        Those of one reason come in order, those of different reasons need not: a record is
        checked long before its ids are.
        """
        self.dropped[reason] += 1
        if self.dropped[reason] <= SHOWN:
            self.faults.append(BadPlace(file, position, reason, sentence))

    def bad_rows(self, rows: Iterable[int], reason: str, sentence: str) -> None:
        """The same for records that passed until all of them were compared."""
        for row in rows:
            self.bad(self.file[row], self.position[row], reason, sentence)

    def column(self, name: str) -> npt.NDArray[Any]:
        return np.asarray(getattr(self, name))

    def pairs(self, start: int = 0) -> Hashes:
        """Hashes that are equal for equal records, of those from `start` on."""
        return combined(*self._compared(start))

    def answers(self, start: int = 0) -> Hashes:
        """The same, whichever answer is the chosen one."""
        prompt, one, other = self._compared(start)
        return combined(prompt, np.minimum(one, other), np.maximum(one, other))

    def _compared(self, start: int) -> list[Hashes]:
        return [self.column(name)[start:] for name in ("prompt", "answer_j", "answer_k")]

    def numbered(self, rows: npt.NDArray[np.bool_]) -> Numbered:
        """The answers of some of the records, numbered within their prompts."""
        sides = [self.column(name)[rows] for name in ("answer_j", "answer_k")]
        return number_answers(self.column("prompt")[rows], np.stack(sides, axis=1))

    @property
    def prompts(self) -> Prompts:
        return Prompts(self.column("prompt"), self.column("owner"), self.column("begun"))

    @property
    def judges(self) -> Hashes:
        """Hashes of what records say besides their pair, such as who judged it: [records]."""
        return self._judges.all()

    def fixed(self, splits: tuple[str, ...]) -> npt.NDArray[np.int8]:
        """The index of the split that a record's file has, -1 where prompts are to be split."""
        found = [splits.index(each.split) if each.split else -1 for each in self.sources]
        return np.array(found, dtype=np.int8)[self.column("file")]

    def place(self, file: int, position: int) -> str:
        path = self.sources[file].path
        return f"{path}: {unit(path)} {position}"

    def listed(self, reasons: set[str]) -> str:
        """The first records that are bad for one of the reasons, a line each, and their number."""
        shown = sorted(fault for fault in self.faults if fault.reason in reasons)[:SHOWN]
        lines = [
            f"{self.place(file, position)}: {reason}: {sentence}"
            for file, position, reason, sentence in shown
        ]
        counts = ", ".join(f"{self.dropped[reason]} {reason}" for reason in sorted(reasons))
        return "\n".join([*lines, f"bad records: {counts}"])


class Judges:
    """A hash for each record of what it says besides its pair, such as who judged it.

    A column whose values each belong to one comparison alone, such as an `id`, does not say who
    judged: if it counted, two records would never contradict each other. Whether a value comes
    back is known only at the end of a file, so the hashes of a column wait until one does.
    """

    def __init__(
        self, file: array[int], position: array[int], answers: Callable[[int], Hashes]
    ) -> None:
        """`file`, `position` and `answers` are the ledger's, which it extends before `add`."""
        self._file, self._position, self._answers = file, position, answers
        self._sums = hashes()
        self._start = 0
        # The columns of the current file: None for one that counts.
        self._waiting: dict[str, array[int] | None] = {}

    def add(self, columns: dict[str, str]) -> None:
        """Note the columns of the ledger's last record."""
        row = len(self._sums)
        if row and self._file[row] != self._file[row - 1]:
            self._settle()
            self._start, self._waiting = row, {}
        total, row = 0, row - self._start
        for name, value in columns.items():
            # Files of a folder that is mapped differ in their source: that is not a judge.
            if name == "source":
                continue
            hashed = hash64([name, value])
            waiting = self._waiting.setdefault(name, hashes())
            if waiting is None:
                total += hashed
            else:
                waiting.extend([0] * (row - len(waiting)))
                waiting.append(hashed)
        self._sums.append(total % (1 << 64))
        if row + 1 >= FIRST_LOOK and not (row + 1) & row:
            self._settle()

    def all(self) -> Hashes:
        """The hash of every record: [records]."""
        self._settle()
        return np.array(self._sums, dtype=np.uint64)

    def _settle(self) -> None:
        """Add the columns of which a value was found beside two comparisons."""
        sums, positions = (np.asarray(each)[self._start :] for each in (self._sums, self._position))
        answers = self._answers(self._start)
        # The pairs of one record follow each other, and have its columns in common.
        first = np.diff(positions, prepend=0) != 0
        for name, waiting in self._waiting.items():
            if waiting is None:
                continue
            found = np.asarray(waiting)
            rows = np.flatnonzero(first[: len(found)] & (found != 0))
            if mixed(found[rows], answers[rows]).any():
                sums[: len(found)] += found
                self._waiting[name] = None
