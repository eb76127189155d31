"""Score answers to prompts with an exported reward model.

    python -m reward.serving.score data/raw/pairs.json --output rewards.jsonl

Reads records with `prompt` and one `answer` or a list of `answers`, or pairs with `chosen` and
`rejected`, which are read as in training, in any type of file that preprocess reads. Writes each
record unchanged with three more keys: `rewards`, `ranks` (1 is the best) and `probabilities` of
being the best. Each is a list in the order of the answers (chosen, then rejected). A Parquet output
has the columns `position`, `file` and `record` (as JSON text), and those three.

To continue after an interruption, run the same command again: finished rows are kept in a journal
next to the output. All visible GPUs share the work, with one process each.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.parquet
import torch
from filelock import Timeout
from tqdm import tqdm

from reward.data.answers import CANONICAL, UNGRADED, Preferred
from reward.data.forms import Form
from reward.data.reading import batches, files, place_of, read, require_utf8
from reward.data.records import KINDS, PAIR, TOOLS, BadRecord, Raw, hash64, is_pair
from reward.data.sources import source_of
from reward.data.suggestion import MAPPING
from reward.locks import hold
from reward.model import group
from reward.model.base import DIGESTS
from reward.model.launching import distribute
from reward.outputs import digest, whole_file, writing
from reward.process import Fault, command_line, counted, run, threads
from reward.serving.scorer import EXPORT, Misfit, Scorer, probabilities, ranks

ADDED = ("rewards", "ranks", "probabilities")
# About the characters of the records and texts in a batch. A kill loses at most one batch.
BATCH_CHARACTERS = 1 << 18
ROWS = 1000
SCHEMA = pa.schema(
    {
        "position": pa.int64(),
        "file": pa.string(),
        "record": pa.string(),
        "rewards": pa.list_(pa.float32()),
        "ranks": pa.list_(pa.int32()),
        "probabilities": pa.list_(pa.float32()),
    }
)

Row = dict[str, Any]

# Created once, because json.dumps creates a new encoder for each call with options.
as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


@dataclass(frozen=True)
class Input:
    """An input file."""

    path: Path

    @cached_property
    def form(self) -> Form:
        """What the columns of its pairs mean, as preprocess recognizes it. Raises a Fault.

        The answers are chosen and rejected, in this order, even if dataset.yaml says that other
        columns decide which of them is better.
        """
        form = source_of(self.path, only=is_pair).form
        answers = CANONICAL if {*form.answers.columns} == {*PAIR} else form.answers
        if not isinstance(answers, Preferred):
            raise Fault(f"{self.path} is read as {form.description}, expected chosen and rejected")
        return replace(form, answers=answers, grades=UNGRADED)

    @cached_property
    def form_hash(self) -> int:
        """A hash of the form, by which rows in the journal are recognized. Raises a Fault.

        It leaves out the description and the rivals, which change no text that is scored.
        """
        context = replace(self.form.context, rivals=())
        return hash64(asdict(replace(self.form, context=context, description="")))

    def pair(self, record: Row) -> Raw:
        """The prompt, chosen and rejected of a record, as in training. Raises BadRecord."""
        found = self.form.read(record)
        if len(found.answers) > len(PAIR):
            raise BadRecord(
                "several_kinds", "has lists of chosen or rejected answers, expected one of each"
            )
        return found


class Item(NamedTuple):
    """A record as JSON text and as read, unchecked, and its position in its file."""

    input: Input
    position: int
    record: str
    content: Row

    @property
    def place(self) -> str:
        """The file and position, for messages."""
        return place_of(self.input.path, self.position)

    @property
    def answers(self) -> int:
        """The number of answers; any number for a record that cannot be scored."""
        match self.content:
            case {"answers": [*answers]}:
                return len(answers)
            case {"answer": _}:
                return 1
        return len(PAIR)

    def size(self) -> int:
        """About how many characters the record and its texts have.

        It does not depend on the texts themselves, because finished records are not rendered again.
        """
        repeated = sum(len(str(self.content.get(key, ""))) for key in ("prompt", TOOLS))
        return 2 * len(self.record) + (self.answers - 1) * repeated

    @property
    def source(self) -> Row:
        """The first columns of its row. Raises a Fault if the form of a pair is unknown."""
        form = {"form": self.input.form_hash} if is_pair(self.content) else {}
        place = {"file": str(self.input.path), "position": self.position}
        return place | form | {"record": self.record}


@dataclass
class Totals:
    """How much was read, how much of it was scored in this run, and in how many seconds."""

    prompts: int = 0
    texts: int = 0
    scored: int = 0
    tokens: int = 0
    seconds: float = 0.0


def main() -> None:
    options = parse()
    output = destination(options.output, options.inputs)
    paths = [file for path in options.inputs for file in files(path)]
    torch.set_num_threads(threads())
    scorer = Scorer(options.model)
    if not group.leads():
        score_files(scorer, paths, None)
        return
    with journal_beside(output, options.model) as journal:
        totals = score_files(scorer, paths, journal)
        publish(journal, output)
    report(totals, output)


def parse() -> argparse.Namespace:
    parser = command_line("reward.serving.score", __doc__)
    parser.add_argument(
        "inputs", type=Path, nargs="+", metavar="INPUT", help="a file, or a folder of files"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="a file that ends in .jsonl or .parquet"
    )
    parser.add_argument(
        "--model", type=Path, default=EXPORT, help=f"folder of an exported model ({EXPORT})"
    )
    return parser.parse_args()


def destination(output: Path, inputs: list[Path]) -> Path:
    """The file to write: the output, or the file that it is a link to.

    Raises a Fault if that has another ending, exists but is not a regular file, or would be read as
    input, and for a path that is not UTF-8, which the Parquet writer cannot open.
    """
    place = Path(os.path.realpath(output)) if output.is_symlink() else output
    require_utf8(place)
    named = f"--output is {output}{f', a link to {place}' if place != output else ''}"
    if place.suffix not in (".jsonl", ".parquet"):
        raise Fault(f"{named}, expected a file that ends in .jsonl or .parquet")
    if os.path.lexists(place) and not place.is_file():
        raise Fault(f"{named}, which is not a regular file; choose another path")
    own = {*map(os.path.realpath, (place, place.parent, output.parent))}
    if own & {*map(os.path.realpath, inputs)}:
        raise Fault(f"{named}, which is part of the input; choose another path")
    return place


# --- scoring ---------------------------------------------------------------------------------


def score_files(scorer: Scorer, paths: list[Path], journal: "Journal | None") -> Totals:
    """Score all records that are not in the journal yet, and add their rows to it.

    Only the first of several processes has the journal; the others share the packs.
    """
    totals, start = Totals(), time.perf_counter()
    bar = tqdm(items(paths), desc="scored", unit=" prompts", disable=None)
    for batch in batches(bar, Item.size, BATCH_CHARACTERS):
        totals.prompts += len(batch)
        totals.texts += sum(item.answers for item in batch)
        if not group.from_first(journal is not None and journal.holds(batch)):
            rows = scored(scorer, batch, totals)
            if journal:
                journal.append(rows)
    if journal:
        journal.require_end()
    totals.seconds = time.perf_counter() - start
    return totals


def items(paths: list[Path]) -> Iterator[Item]:
    """The records of all files. Raises a Fault for one that cannot be written to the output."""
    for path in paths:
        source = Input(path)
        for position, record in read(path):
            try:
                yield Item(source, position, as_text(record), record)
            except BadRecord as error:
                raise fault_at(place_of(path, position), error) from None


def as_text(record: Any) -> str:
    """A record as JSON. Raises BadRecord if it is not an object, or information would be lost."""
    if not isinstance(record, dict):
        raise BadRecord("wrong_type", f"is {KINDS[type(record)]}, expected an object")
    if taken := [name for name in ADDED if name in record]:
        raise BadRecord(
            "taken_key", f"has the key {taken[0]!r}, which the output needs; rename or remove it"
        )
    columns = []
    for name, value in record.items():
        try:
            columns.append(f"{as_json(name)}: {as_json(value)}")
            columns[-1].encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRecord(
                "not_json",
                f"{name!r} cannot be written as JSON ({error}), expected texts, finite numbers, or "
                "lists and objects of them; convert that column or remove it",
            ) from None
    return f"{{{', '.join(columns)}}}"


def scored(scorer: Scorer, batch: list[Item], totals: Totals) -> list[Row]:
    """A row for each item. Raises a Fault for a record that cannot be scored."""
    rendered = [text for item in batch for text in texts_of(scorer, item)]
    owners = [index for index, item in enumerate(batch) for _ in range(item.answers)]
    try:
        texts = scorer.encode(rendered)
    except Misfit as error:
        raise fault_at(batch[owners[error.index]].place, error) from None
    totals.scored += len(texts)
    totals.tokens += sum(map(len, texts))
    found = iter(scorer.rewards(texts, owners))
    rows = []
    for item in batch:
        rewards = list(islice(found, item.answers))
        added = (rewards, ranks(rewards), probabilities(rewards, scorer.temperature))
        rows.append(item.source | dict(zip(ADDED, added, strict=True)))
    return rows


def texts_of(scorer: Scorer, item: Item) -> list[str]:
    """The rendered answers of an item. Raises a Fault if they cannot be rendered."""
    record = item.content
    try:
        asked = item.input.pair(record) if is_pair(record) else record
        return scorer.render(scorer.candidates(asked))
    except BadRecord as error:
        raise fault_at(item.place, error) from None


def fault_at(place: str, error: BadRecord) -> Fault:
    return Fault(f"{place}: {error.reason}: {error}")


# --- the journal -----------------------------------------------------------------------------


class Journal:
    """A file with a line about the model and the rows, then a row for each record, in order.

    Rows are written in whole batches. What follows a batch that a kill or a power cut has left
    incomplete is cut off.
    """

    def __init__(self, path: Path, file: BinaryIO, model: str) -> None:
        """Raises a Fault if the rows were scored by another model, or have other columns."""
        self._path = path
        self._file = file
        file.seek(0)
        first, row = file.readline(), file.readline()
        expected = as_line({"model": model, "added": ADDED})
        if first == expected:
            file.seek(len(first))
        elif row.endswith(b"\n"):
            raise Fault(
                f"{path} has rows that another model or an earlier version scored; "
                f"{self._remedy('model')}"
            )
        else:
            self._cut(0)
            self._write(expected)

    def holds(self, batch: list[Item]) -> bool:
        """Whether the next rows are those of a batch. Raises a Fault if they are of others."""
        start = self._file.tell()
        lines = [self._file.readline() for _ in batch]
        rows = [row for line in lines if (row := as_row(line))]
        if len(rows) < len(lines):
            self._cut(start)
            return False
        for item, line, row in zip(batch, lines, rows, strict=True):
            if not line.startswith(as_line(item.source)[:-2]):
                self._refuse(item, row)
        return True

    def append(self, rows: list[Row]) -> None:
        self._write(b"".join(map(as_line, rows)))

    def require_end(self) -> None:
        """Raises a Fault if there are rows beyond the last record."""
        if self._file.readline():
            raise Fault(
                f"{self._path} has more rows than the input has records; {self._remedy('input')}"
            )

    def rows(self) -> Iterator[Row]:
        """All rows, starting with the first."""
        self._file.seek(0)
        return map(json.loads, islice(self._file, 1, None))

    def _refuse(self, item: Item, row: Row) -> NoReturn:
        """Raises a Fault that says how an item differs from the row at its place."""
        if (row["position"], row["record"]) != (item.position, item.record):
            raise Fault(
                f"{item.place} is not the record that was scored at this position; "
                f"{self._remedy('input')}"
            )
        if row["file"] != str(item.input.path):
            raise Fault(f"{item.place} was scored as {row['file']}; {self._remedy('path')}")
        raise Fault(
            f"{item.place} is read as {item.input.form.description}, but was scored in another "
            f"form: {MAPPING}, the first pairs or this program have changed; "
            f"{self._remedy('input')}"
        )

    def _write(self, content: bytes) -> None:
        with writing(self._path):
            self._file.write(content)
            self._file.flush()
            os.fsync(self._file.fileno())

    def _cut(self, place: int) -> None:
        with writing(self._path):
            self._file.seek(place)
            self._file.truncate()

    def _remedy(self, what: str) -> str:
        return f"use the same {what}, or remove {self._path} to start again"


@contextmanager
def journal_beside(output: Path, model: Path) -> Iterator[Journal]:
    """The journal of an output, removed when the output is complete.

    Raises a Fault if another process uses it, or as Journal does.
    """
    path = output.with_name(output.name + ".journal")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, output):
        with writing(path):
            file = path.open("a+b")
        try:
            yield Journal(path, file, digest(model / DIGESTS))
        finally:
            # Closing the file retries a write that failed because the disk was full.
            with writing(path):
                file.close()
        path.unlink()


@contextmanager
def locked(journal: Path, output: Path) -> Iterator[None]:
    """Lock an output against other processes; the lock file is removed at the end."""
    lock = journal.with_name(journal.name + ".lock")
    try:
        with hold(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise Fault(
            f"{journal} is in use by another process that writes {output}; wait until it ends"
        ) from None


def publish(journal: Journal, output: Path) -> None:
    """Write the output from the journal, completely or not at all."""
    write = as_parquet if output.suffix == ".parquet" else as_lines
    with whole_file(output) as partial:
        write(journal.rows(), partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())


def as_line(row: Row) -> bytes:
    return as_json(row).encode() + b"\n"


def as_row(line: bytes) -> Row | None:
    """The row of a line; None if the line is damaged."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and {*SCHEMA.names} <= row.keys() else None


def as_lines(rows: Iterator[Row], path: Path) -> None:
    with path.open("wb") as file:
        for row in rows:
            added = {name: row[name] for name in ADDED}
            file.write(as_line(json.loads(row["record"]) | added))


def as_parquet(rows: Iterator[Row], path: Path) -> None:
    with pyarrow.parquet.ParquetWriter(path, SCHEMA) as writer:
        while part := list(islice(rows, ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(part, SCHEMA))


def report(totals: Totals, output: Path) -> None:
    before = totals.texts - totals.scored
    print(f"read       {counted(totals.prompts, 'prompt')} with {counted(totals.texts, 'text')}")
    print(
        f"scored     {counted(totals.scored, 'text')} with {totals.tokens} tokens in "
        f"{totals.seconds:.1f} s: {totals.scored / totals.seconds:.1f} texts/s; already scored: "
        f"{before}"
    )
    print(f"written    {output}")


if __name__ == "__main__":
    parse()  # so that a bad command line is reported once, before there are several processes
    arguments = sys.argv[1:]
    run(lambda: distribute(main, "reward.serving.score", arguments=arguments))
