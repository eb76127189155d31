"""Score prompts with answers by an exported reward model.

    python -m reward.serving.score data/raw/pairs.json --output rewards.jsonl

Reads records with `prompt` and one `answer` or a list of `answers`, or preference pairs, in all the
files that preprocess reads. Writes each record as it came with `rewards`, in the order of its
answers (chosen, then rejected), `ranks`, 1 for the best, and `probabilities` to be the best. As
Parquet the columns are `position` in its `file`, `record` as JSON text, and those three.

Whatever stops it, the same command goes on where it was: rows wait in a journal beside the output.
GPUs in sight share the work, a process each.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet
import torch
from filelock import Timeout
from tqdm import tqdm

from reward.data.reading import files, read, unit
from reward.data.records import BadRecord, candidates
from reward.locks import hold
from reward.model import group
from reward.model.base import DIGESTS
from reward.model.launching import distribute
from reward.outputs import digest, writing
from reward.process import Fault, run, threads
from reward.serving.scorer import Misfit, Scorer, probabilities, ranks

EXPORT = Path("models/export")
ADDED = ("rewards", "ranks", "probabilities")
# Of records and texts that are scored together; after a kill so much is done again.
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


class Item(NamedTuple):
    """A record as JSON text, its place, and the texts of its answers."""

    file: Path
    position: int
    record: str
    texts: list[str]

    @property
    def place(self) -> str:
        """Where people find it."""
        return f"{self.file}: {unit(self.file)} {self.position}"

    @property
    def source(self) -> Row:
        """What its row begins with."""
        return {"file": str(self.file), "position": self.position, "record": self.record}


@dataclass
class Totals:
    """What was read, and what of it was scored now, in how many seconds."""

    prompts: int = 0
    texts: int = 0
    scored: int = 0
    tokens: int = 0
    seconds: float = 0.0


def main() -> None:
    options = parse()
    require_output(options.output, options.inputs)
    paths = [file for path in options.inputs for file in files(path)]
    torch.set_num_threads(threads())
    scorer = Scorer(options.model)
    if not group.leads():
        score_files(scorer, paths, None)
        return
    with journal_beside(options.output, options.model) as journal:
        totals = score_files(scorer, paths, journal)
        publish(journal, options.output)
    report(totals, options.output)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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


def require_output(output: Path, inputs: list[Path]) -> None:
    """Raises a Fault for an output of another kind, and for one that is, or joins, the input."""
    if output.suffix not in (".jsonl", ".parquet") or output.is_dir():
        raise Fault(f"--output is {output}, wanted a file that ends in .jsonl or .parquet")
    place = output.resolve()
    if {place, place.parent} & {path.resolve() for path in inputs}:
        raise Fault(f"--output is {output}, among what is read; wanted another place")


# --- scoring ---------------------------------------------------------------------------------


def score_files(scorer: Scorer, paths: list[Path], journal: "Journal | None") -> Totals:
    """Have all records of the files in the journal; those that are there are left as they are.

    Of several processes the first one has the journal, the others help it with the packs.
    """
    totals, start = Totals(), time.perf_counter()
    bar = tqdm(items(scorer, paths), desc="scored", unit=" prompts", disable=None)
    for batch in batches(bar):
        totals.prompts += len(batch)
        totals.texts += sum(len(item.texts) for item in batch)
        if not group.from_first(journal is not None and journal.holds(batch)):
            rows = scored(scorer, batch, totals)
            if journal:
                journal.append(rows)
    if journal:
        journal.require_end()
    totals.seconds = time.perf_counter() - start
    return totals


def items(scorer: Scorer, paths: list[Path]) -> Iterator[Item]:
    """The records of all files, rendered. Raises a Fault for a record that cannot be scored."""
    for path in paths:
        for position, record in read(path):
            try:
                texts = scorer.render(candidates(record))
                yield Item(path, position, as_text(record), texts)
            except BadRecord as error:
                place = f"{path}: {unit(path)} {position}"
                raise Fault(f"{place}: {error.reason}: {error}") from None


def as_text(record: Row) -> str:
    """A record as JSON. Raises BadRecord where that would lose something."""
    if taken := [name for name in ADDED if name in record]:
        raise BadRecord("taken_key", f"has the key {taken[0]!r}, which the output needs")
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise BadRecord("not_json", f"holds what JSON cannot: {error}") from None
    return text


def batches(found: Iterable[Item]) -> Iterator[list[Item]]:
    """Lists of items of about BATCH_CHARACTERS each, the same ones at every run."""
    batch: list[Item] = []
    size = 0
    for item in found:
        batch.append(item)
        size += sum(map(len, item.texts), len(item.record))
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def scored(scorer: Scorer, batch: list[Item], totals: Totals) -> list[Row]:
    """A row for each item. Raises a Fault for a text that is too long."""
    owners = [index for index, item in enumerate(batch) for _ in item.texts]
    try:
        texts = scorer.encode([text for item in batch for text in item.texts])
    except Misfit as error:
        item = batch[owners[error.index]]
        raise Fault(f"{item.place}: {error.reason}: {error}") from None
    totals.scored += len(texts)
    totals.tokens += sum(map(len, texts))
    found = iter(scorer.rewards(texts, owners))
    rows = []
    for item in batch:
        rewards = list(islice(found, len(item.texts)))
        added = (rewards, ranks(rewards), probabilities(rewards, scorer.temperature))
        rows.append(item.source | dict(zip(ADDED, added, strict=True)))
    return rows


# --- the journal -----------------------------------------------------------------------------


class Journal:
    """A line that says which model scores, then a row for each record, in the order of the records.

    Rows come in whole batches; what a kill left of the last one is cut off.
    """

    def __init__(self, path: Path, file: BinaryIO, model: str) -> None:
        """Reads from the beginning. Raises a Fault if the rows were scored by another model."""
        self._path = path
        self._file = file
        file.seek(0)
        first, wanted = file.readline(), as_line({"model": model})
        if not first.endswith(b"\n"):
            self._cut(0)
            self._write(wanted)
        elif first != wanted:
            raise Fault(f"{path} has rows that another model scored; {self._wanted('model')}")

    def holds(self, batch: list[Item]) -> bool:
        """Whether the next rows are those of a batch. Raises a Fault for those of others."""
        start = self._file.tell()
        lines = [self._file.readline() for _ in batch]
        if not lines[-1].endswith(b"\n"):
            self._cut(start)
            return False
        for item, line in zip(batch, lines, strict=True):
            if not line.startswith(as_line(item.source)[:-2]):
                raise Fault(
                    f"{item.place} is another record than the one that was scored in its place; "
                    f"{self._wanted('input')}"
                )
        return True

    def append(self, rows: list[Row]) -> None:
        self._write(b"".join(map(as_line, rows)))

    def require_end(self) -> None:
        """Raises a Fault if there are rows of further records."""
        if self._file.readline():
            raise Fault(f"{self._path} has more rows than the input; {self._wanted('input')}")

    def rows(self) -> Iterator[Row]:
        """All rows, from the first."""
        self._file.seek(0)
        return map(json.loads, islice(self._file, 1, None))

    def _write(self, content: bytes) -> None:
        with writing(self._path):
            self._file.write(content)
            self._file.flush()
            os.fsync(self._file.fileno())

    def _cut(self, place: int) -> None:
        with writing(self._path):
            self._file.seek(place)
            self._file.truncate()

    def _wanted(self, what: str) -> str:
        return f"wanted the same {what}, or {self._path} removed to begin again"


@contextmanager
def journal_beside(output: Path, model: Path) -> Iterator[Journal]:
    """The journal of an output that a model scores, removed when the output is there.

    Raises a Fault where another process, or another model, is at work on it.
    """
    path = output.with_name(output.name + ".journal")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path, output):
        with writing(path):
            file = path.open("a+b")
        try:
            yield Journal(path, file, digest(model / DIGESTS))
        finally:
            # Closing tries again to write what did not fit.
            with writing(path):
                file.close()
        path.unlink()


@contextmanager
def alone(journal: Path, output: Path) -> Iterator[None]:
    """No other process scores to an output; the lock file goes when this one is done."""
    lock = journal.with_name(journal.name + ".lock")
    try:
        with hold(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise Fault(f"{journal} is in use: another process scores to {output}") from None


def publish(journal: Journal, output: Path) -> None:
    """Write the output from the journal: whole, or not at all."""
    partial = output.with_name(output.name + ".partial")
    write = as_parquet if output.suffix == ".parquet" else as_lines
    with writing(output):
        try:
            write(journal.rows(), partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)


def as_line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


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
    print(f"read       {totals.prompts} prompts with {totals.texts} texts")
    print(
        f"scored     {totals.scored} texts of {totals.tokens} tokens in {totals.seconds:.1f} s: "
        f"{totals.scored / totals.seconds:.1f} texts/s; {before} were scored before"
    )
    print(f"written    {output}")


if __name__ == "__main__":
    parse()  # What is wrong with the command line is said before there are several processes.
    arguments = sys.argv[1:]
    run(lambda: distribute(main, "reward.serving.score", lambda gpus: gpus, arguments=arguments))
