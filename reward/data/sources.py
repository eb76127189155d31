"""The preference files of a path: each with its form, its split, and its selected records."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from reward.data.answers import UnknownVerdict
from reward.data.forms import Form
from reward.data.mapping import Entry, Mapping, read_mapping
from reward.data.reading import files, name_of, place_of, read
from reward.data.recognition import HEAD, recognize
from reward.data.records import Raw, hash64, names_of
from reward.data.suggestion import MAPPING
from reward.data.values import column_of, normalized, value_at
from reward.process import Fault, counted, plural

# As on the Hub, the name of a file begins with that of its split, and no letter follows.
SPLIT = re.compile(r"(validation|test)(?![^\W\d_])")
# Other names of test and validation files: with one of these words at the beginning, or at the end
# before any numbers. They may also mean something else.
HELD = (
    r"((?<![a-z])(test|val|valid|dev|eval|held[_-]?out|hold[_-]?out)"
    r"(s|ing|ation|uation|[_-]?(set|split|data))?|(测试|评测)(集|数据)?|(验证|评估)集)"
)
LIKE_A_SPLIT = re.compile(
    rf"{HELD}(?![a-z])|(?!train(?![a-z])).*{HELD}([\W_]*v)?[\W\d_]*(of[\W\d_]*)?$",
    re.IGNORECASE,
)


@dataclass
class Source:
    """A file and what is known about it.

    `name` is the value of its column `source`, if it gets one. `seen` and `taken` count the records
    that were read and those that were selected.
    """

    path: Path
    form: Form
    entry: Entry = field(default_factory=Entry)
    name: str | None = None
    split: str | None = None
    seen: int = field(default=0, init=False)
    taken: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """The position and content of each selected record, for `raw`.

        Those that match `where`, or a draw from them. Raises a Fault if none matches.
        """
        self.seen = self.taken = matching = 0
        drawn = self._draw() if self.entry.take is not None else None
        for position, record in read(self.path):
            self.seen += 1
            if self._matches(record):
                matching += 1
                if drawn is None or matching in drawn:
                    self.taken += 1
                    yield position, record
        if not matching:
            paths = ", ".join(path for path, _ in self.entry.where)
            raise Fault(
                f"{self.path}: where ({paths}) matches no record (of {self.seen:,}), expected at "
                "least one"
            )

    def raw(self, position: int, record: Any) -> Raw:
        """What a selected record means.

        Raises BadRecord, and a Fault for a verdict that has no meaning in the form.
        """
        try:
            return self.form.read(self._labelled(record))
        except UnknownVerdict as error:
            raise Fault(f"{place_of(self.path, position)}: {error}") from None

    def _labelled(self, record: Any) -> Any:
        """A record with its source. A source named in dataset.yaml replaces the record's own."""
        if self.name is None or not isinstance(record, dict):
            return record
        return {"source": self.name} | record | ({"source": self.name} if self.entry.source else {})

    def _draw(self) -> set[int]:
        """Which matching records are taken, numbered from 1: those with the smallest hashes.

        A hash is of the seed and the number, so a larger `take` draws the same records and more.
        """
        count = sum(self._matches(record) for _, record in read(self.path))
        take = self.entry.take or 0
        amount = max(1, round(take * count)) if isinstance(take, float) else take
        if count and amount > count:
            raise Fault(
                f"{self.path}: take is {take}, but it can draw from only {counted(count, 'record')}"
            )
        places = range(1, count + 1)
        return {*sorted(places, key=lambda place: hash64([self.entry.seed, place]))[:amount]}

    def _matches(self, record: Any) -> bool:
        return all(
            isinstance(record, dict)
            and normalized(value_at(record, path)) in [normalized(value) for value in values]
            for path, values in self.entry.where
        )

    @property
    def description(self) -> str:
        """The line to print about what was recognized and read."""
        of = "" if self.taken == self.seen else f" of {self.seen:,}"
        split = f" for {self.split}" if self.split else ""
        records = f"{self.taken:,}{of} {plural('record', self.seen)}"
        return f"read       {self.path} as {self.form.description}, {records}{split}"


def sources(path: Path) -> list[Source]:
    """The files of a path with their forms. Raises a Fault if one cannot be read or recognized.

    In a folder, files named test* and validation* are those splits, unless dataset.yaml says
    otherwise.
    """
    paths, mapping = files(path), read_mapping(path if path.is_dir() else path.parent)
    if path.is_dir() and mapping:
        mapping.require_files([file.name for file in paths])
    elif mapping and mapping.entry(path.name):
        raise Fault(
            f"{mapping.path} has an entry for {path.name}; set preprocess.data to the folder "
            f"{path.parent} instead of {path}, so that DVC notices a change of the entry"
        )
    # DVC does not see dataset.yaml beside a single file, so it must change no record.
    found = [_source(file, mapping if path.is_dir() else None, path.is_file()) for file in paths]
    for source in found if path.is_dir() else []:
        named = SPLIT.match(source.path.name)
        source.split = source.entry.split or (named[1] if named else None)
        if source.split is None and LIKE_A_SPLIT.match(name_of(source.path)):
            raise Fault(
                f"{source.path} is named like a test or validation set, but would be trained on; "
                "expected a name that begins with test or validation, or a split for it in "
                f"{path / MAPPING}"
            )
    return found


def source_of(path: Path, only: Callable[[Any], bool] = lambda _: True) -> Source:
    """A file in a folder with its form, that of the records for which `only` is true.

    Raises a Fault if it cannot be read or recognized.
    """
    return _source(path, read_mapping(path.parent), alone=False, only=only)


def _source(
    path: Path,
    mapping: Mapping | None,
    alone: bool,
    only: Callable[[Any], bool] = lambda _: True,
) -> Source:
    head = [*islice((record for _, record in read(path) if only(record)), HEAD)]
    entry = (mapping.entry(path.name) if mapping else None) or Entry()
    columns = {name: None for record in head if isinstance(record, dict) for name in record}
    for key, column in entry.paths:
        if mapping and column not in columns and column_of(column) not in columns:
            found = names_of(columns) if columns else "no columns"
            named = f"{mapping.path}: {path.name}: {key} is {column!r}"
            raise Fault(f"{named}, which is not a column; found {found}")
    form = recognize(path, head, entry.known, alone)
    name = (entry.source or name_of(path)) if mapping else None
    return Source(path, form, entry, name)
