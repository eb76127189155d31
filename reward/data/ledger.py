"""What preprocess knows about each comparison: a few numbers if it is usable, else what is wrong.

Texts and ids are on disk, in the scratch table. Only these numbers are in memory, so a million
pairs fit.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from reward.data import tokenized
from reward.data.columns import ANSWERS, GRADES
from reward.data.prefixes import TokenIds
from reward.data.reading import place_of
from reward.data.records import CERTAIN, DECIMALS, BadRecord, Record, check, hash64
from reward.data.rows import Kept, hash_of
from reward.data.sources import Source
from reward.data.splitting import (
    Ballots,
    Flags,
    Floats,
    Hashes,
    Indices,
    Prompts,
    beginnings,
    combined,
    first_places,
    mixed,
    number_answers,
    portions,
)
from reward.data.tokens import Encoder

SHOWN = 10
# A column is searched for repeated values at this many records, at twice as many, and so on.
FIRST_LOOK = 1024

uint32s, uint64s = partial(array, "I"), partial(array, "Q")


class BadPlace(NamedTuple):
    """The place of a bad record and what is wrong with it. Sorts by file and position."""

    file: int
    position: int
    reason: str
    sentence: str


class Rendered(NamedTuple):
    """A record that passed the checks, its place, and the text of each answer."""

    file: int
    position: int
    record: Record
    texts: list[str]

    def characters(self) -> int:
        return sum(map(len, self.texts))


@dataclass
class Ledger:
    """The usable comparisons as arrays with one element each, and what is wrong with the others.

    `file` is the index of the source and `position` the place in it. `prompt`, `answer_j` and
    `answer_k` are hashes; `chosen`, `rejected` and `prefix` are lengths in tokens. `graded` are the
    rows of comparisons whose GRADES are not the default, and `grades` their values. `begun` are the
    hashes of the `beginnings` of all prompts, and `owner` the rows that these belong to.
    """

    sources: list[Source]
    file: array[int] = field(default_factory=uint32s)
    position: array[int] = field(default_factory=uint32s)
    prompt: array[int] = field(default_factory=uint64s)
    answer_j: array[int] = field(default_factory=uint64s)
    answer_k: array[int] = field(default_factory=uint64s)
    graded: array[int] = field(default_factory=uint32s)
    grades: dict[str, array[float]] = field(default_factory=lambda: {n: array("d") for n in GRADES})
    owner: array[int] = field(default_factory=uint32s)
    begun: array[int] = field(default_factory=uint64s)
    chosen: array[int] = field(default_factory=uint32s)
    rejected: array[int] = field(default_factory=uint32s)
    prefix: array[int] = field(default_factory=uint32s)
    columns: set[str] = field(default_factory=set)
    faults: list[BadPlace] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    votes: int = 0
    merged: int = 0

    def __post_init__(self) -> None:
        self._judges = Judges(self.file, self.position, self.answers)

    def rendered(self, encoder: Encoder) -> Iterator[Rendered]:
        """The records of all sources that pass the checks, as text. The others are counted."""
        for file, source in enumerate(self.sources):
            bar = tqdm(source, desc=str(source.path), unit=" records", delay=2, disable=None)
            for position, content in bar:
                try:
                    record = check(source.raw(position, content))
                    texts = [encoder.render(record.prompt, answer) for answer in record.answers]
                except BadRecord as fault:
                    self.bad(file, position, fault)
                    continue
                for each in record.faults:
                    self.bad(file, position, each)
                if record.comparisons:
                    yield Rendered(file, position, record, texts)

    def add(
        self, file: int, position: int, record: Record, ids: Sequence[TokenIds], kept: Kept
    ) -> None:
        """Add the comparisons of a record that are kept. `ids` are the token ids of its answers."""
        begun, answers = beginnings(record.prompt), [*map(hash_of, ids)]
        judged = self._judges.hashed(record.columns)
        self.columns.update(record.columns)
        for found, (_, j, k, prefix) in zip(kept.comparisons, kept.compared, strict=True):
            if found.grades != CERTAIN.grades:
                self.grade([len(self.file)], *([grade] for grade in found.grades))
            self.owner.extend([len(self.file)] * len(begun))
            self.begun.extend(begun)
            self.file.append(file)
            self.position.append(position)
            self.prompt.append(record.prompt_hash)
            self.answer_j.append(answers[j])
            self.answer_k.append(answers[k])
            self.chosen.append(len(ids[j]))
            self.rejected.append(len(ids[k]))
            self.prefix.append(prefix)
            self._judges.add(judged)

    def grade(self, rows: Iterable[int], *grades: Iterable[float]) -> None:
        """Set the GRADES of some comparisons. Later values replace earlier ones."""
        self.graded.extend(rows)
        for values, found in zip(self.grades.values(), grades, strict=True):
            values.extend(found)

    def grade_of(self, name: str) -> Floats:
        """One of GRADES: [comparisons]. If all have the default, it takes no memory."""
        default: float = getattr(CERTAIN, name)
        if not self.graded:
            return np.broadcast_to(np.float64(default), len(self.file))
        found = np.full(len(self.file), default, dtype=np.float64)
        found[np.asarray(self.graded)] = np.asarray(self.grades[name])
        return found

    def bad(self, file: int, position: int, fault: BadRecord) -> None:
        """Count a bad record, and keep its place if it is one of the first SHOWN with its reason.

        Records arrive in file order only within one reason, because the ids of a record are checked
        long after the record itself.
        """
        self.dropped[fault.reason] += 1
        if self.dropped[fault.reason] <= SHOWN:
            self.faults.append(BadPlace(file, position, fault.reason, str(fault)))

    def bad_rows(self, rows: Iterable[int], fault: BadRecord) -> None:
        """Count records that turn out to be bad when all records are compared."""
        for row in rows:
            self.bad(self.file[row], self.position[row], fault)

    def column(self, name: str) -> npt.NDArray[Any]:
        """One of the arrays, without a copy."""
        return np.asarray(getattr(self, name))

    def answers(self, rows: Indices | slice) -> Hashes:
        """Hashes that are equal for the same two answers to one prompt, in either order: [rows]."""
        prompt, one, other = (self.column(name)[rows] for name in ("prompt", *ANSWERS))
        return combined(prompt, np.minimum(one, other), np.maximum(one, other))

    def ballots(self, rows: Indices) -> Ballots:
        """The ballots of some comparisons: [rows]."""
        preference, weight, margin = (self.grade_of(name)[rows] for name in GRADES)
        one, other = (self.column(name)[rows] for name in ANSWERS)
        first, answers = np.where(one < other, preference, 1 - preference), self.answers(rows)
        verdicts = combined(answers, np.round(first * 10**DECIMALS).astype(np.uint64))
        return Ballots(answers, verdicts, first, weight, margin)

    def late(self, used: Flags) -> dict[str, npt.NDArray[Any]]:
        """The columns that are known only after all records are read: [comparisons].

        ANSWERS are the numbers of the answers within their prompts, in the comparisons selected by
        `used`. All of a prompt's are in the same split.
        """
        prompts, numbers = self.column("prompt"), np.zeros((len(used), 2), dtype=np.int32)
        for rows in portions(prompts, used):
            sides = [self.column(name)[rows] for name in ANSWERS]
            numbers[rows] = number_answers(prompts[rows], np.stack(sides, axis=1))
        grades = {name: self.grade_of(name) for name in GRADES}
        return dict(zip(ANSWERS, numbers.T, strict=True)) | grades

    def write(
        self,
        folder: Path,
        table: Path,
        rows: Flags,
        late: Mapping[str, npt.NDArray[Any]],
        tokenizer: str,
        texts: bool,
    ) -> None:
        """Write the comparisons selected by `rows` from the scratch table to a new folder.

        `late` is that of all comparisons. With `texts`, write the texts of the answers too.
        """
        tokenized.write(folder, table, rows, late, sorted(self.columns), tokenizer)
        if texts:
            numbers = np.stack([late[name][rows] for name in ANSWERS], axis=1)
            first = first_places(self.column("prompt")[rows], numbers)
            sides = 2 * np.flatnonzero(rows)[first // 2] + first % 2
            tokenized.write_answers(folder, table, sides, numbers.ravel()[first], tokenizer)

    @property
    def prompts(self) -> Prompts:
        return Prompts(self.column("prompt"), self.column("owner"), self.column("begun"))

    @property
    def judges(self) -> Hashes:
        """Hashes of the extra columns of each comparison, such as its judge: [comparisons]."""
        return self._judges.all()

    def fixed(self, splits: tuple[str, ...]) -> npt.NDArray[np.int8]:
        """The split that each comparison's file is for, -1 if it is for none: [comparisons]."""
        found = [splits.index(each.split) if each.split else -1 for each in self.sources]
        return np.array(found, dtype=np.int8)[self.column("file")]

    def place(self, file: int, position: int) -> str:
        """Where a record is, for messages."""
        return place_of(self.sources[file].path, position)

    def listed(self, reasons: set[str]) -> str:
        """The first records that are bad for one of the reasons, one per line, and the counts."""
        shown = sorted(fault for fault in self.faults if fault.reason in reasons)[:SHOWN]
        lines = [
            f"{self.place(file, position)}: {reason}: {sentence}"
            for file, position, reason, sentence in shown
        ]
        counts = ", ".join(f"{self.dropped[reason]} {reason}" for reason in sorted(reasons))
        return "\n".join([*lines, f"bad records: {counts}"])


class Judges:
    """A hash of the extra columns of each comparison, such as its judge.

    A column whose values are all different, such as an `id`, does not name a judge: if it counted,
    two records would never contradict each other. Whether a value is repeated may be known only at
    the end of a file, so the hashes of a column wait until a value is repeated.
    """

    def __init__(
        self, file: array[int], position: array[int], answers: Callable[[slice], Hashes]
    ) -> None:
        """`file`, `position` and `answers` are the ledger's, which extends them before `add`."""
        self._file, self._position, self._answers = file, position, answers
        self._sums = uint64s()
        self._start = 0
        # The waiting hashes of each column of the current file; None for a column that counts.
        self._waiting: dict[str, array[int] | None] = {}

    @staticmethod
    def hashed(columns: dict[str, str]) -> dict[str, int]:
        """The hash of each column of a record."""
        # The source differs between the files of a folder with dataset.yaml, but is not a judge.
        return {name: hash64([name, value]) for name, value in columns.items() if name != "source"}

    def add(self, hashed: dict[str, int]) -> None:
        """Add the hashed columns of the ledger's last comparison."""
        row = len(self._sums)
        if row and self._file[row] != self._file[row - 1]:
            self._settle()
            self._start, self._waiting = row, {}
        total, row = 0, row - self._start
        for name, value in hashed.items():
            waiting = self._waiting.setdefault(name, uint64s())
            if waiting is None:
                total += value
            else:
                waiting.extend([0] * (row - len(waiting)))
                waiting.append(value)
        self._sums.append(total % (1 << 64))
        if row + 1 >= FIRST_LOOK and not (row + 1) & row:
            self._settle()

    def all(self) -> Hashes:
        """The hash of every comparison: [comparisons]."""
        self._settle()
        return np.asarray(self._sums)

    def _settle(self) -> None:
        """Add the columns in which a value occurs with two different pairs of answers."""
        if not self._waiting:
            return
        here = slice(self._start, None)
        sums, positions = (np.asarray(each)[here] for each in (self._sums, self._position))
        answers = self._answers(here)
        # The pairs of a record are consecutive and share its columns, so the first is enough.
        first = np.diff(positions, prepend=0) != 0
        for name, waiting in self._waiting.items():
            if waiting is None:
                continue
            found = np.asarray(waiting)
            rows = np.flatnonzero(first[: len(found)] & (found != 0))
            if mixed(found[rows], answers[rows]).any():
                sums[: len(found)] += found
                self._waiting[name] = None
