"""The preference files of a path: each with its form, its split, and the records that are taken."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from reward.data.forms import Form, Unmeant
from reward.data.reading import files, read, unit
from reward.data.recognition import HEAD, recognize
from reward.data.records import BadRecord, Pair, check
from reward.process import Fault

# As on the Hub: the word, and no letter behind it.
SPLIT = re.compile(r"(validation|test)(?![^\W\d_])")


@dataclass
class Source:
    """A file and what is known of it; `records` and `ties` count what was read."""

    path: Path
    form: Form
    split: str | None = None
    records: int = field(default=0, init=False)
    ties: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """The position of each record with each of its pairs, which `usable` takes; no ties.

        Raises a Fault for a verdict to which the form gives no meaning.
        """
        self.records = self.ties = 0
        for position, record in read(self.path):
            self.records += 1
            try:
                found = self.form.pairs(record)
            except BadRecord as fault:
                yield position, fault
                continue
            except Unmeant as error:
                raise Fault(f"{self.path}: {unit(self.path)} {position}: {error}") from None
            self.ties += found.ties
            for pair in found.records:
                yield position, pair

    @property
    def said(self) -> str:
        """What was recognized and read, for people."""
        split = f" for {self.split}" if self.split else ""
        ties = f", ties left out: {self.ties:,}" if self.ties else ""
        return f"read       {self.path} as {self.form.said}, {self.records:,} records{split}{ties}"


def usable(found: Any) -> Pair:
    """A pair of a Source, checked. Raises BadRecord, that of its record too."""
    if isinstance(found, BadRecord):
        raise found
    return check(found)


def sources(path: Path) -> list[Source]:
    """The files of a path with their forms. Raises a Fault where one cannot be read or recognized.

    In a folder, files called test... and validation... are those splits.
    """
    found = [source_of(file) for file in files(path)]
    for source in found if path.is_dir() else []:
        named = SPLIT.match(source.path.name)
        source.split = named[1] if named else None
    return found


def source_of(path: Path) -> Source:
    """A file with its form. Raises a Fault where it cannot be read or recognized."""
    head = [record for _, record in islice(read(path), HEAD)]
    return Source(path, recognize(path, path.parent, head))
