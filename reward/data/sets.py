"""Extra test sets: a folder with one preference file per set, tokenized like all pairs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from reward.data import tokenized
from reward.data.columns import TEST_SPLIT
from reward.data.ledger import Ledger
from reward.data.mapping import read_mapping
from reward.data.reading import has_records, name_of, require_utf8
from reward.data.rows import as_row, compare
from reward.data.sources import Source, source_of
from reward.data.splitting import Prompts
from reward.data.tokenized import Row
from reward.data.tokens import Encoder
from reward.outputs import write_json, writing
from reward.process import Fault

INDEX, SCRATCH = "index.json", "scratch.arrow"


@dataclass(frozen=True)
class TestSet:
    """The records of a file as rows of the scratch table, and their ledger.

    `too_long` and `bad` count the comparisons or records that were left out.
    """

    name: str
    rows: list[Row]
    ledger: Ledger
    too_long: int
    bad: int

    @property
    def source(self) -> Source:
        [source] = self.ledger.sources
        return source


@dataclass(frozen=True)
class Notes:
    """How many pairs of a set were left out, and how many of the others have leaked.

    A pair has leaked if its prompt is, begins or continues one of the training or validation split.
    """

    too_long: int
    leaked: int
    bad: int


def read_sets(folder: Path, encoder: Encoder, drop: bool) -> list[TestSet]:
    """The sets of a folder, named after their files.

    With `drop`, bad records are left out, otherwise a Fault lists them. Raises a Fault for a file
    that cannot be read or whose name is not UTF-8.
    """
    try:
        paths = sorted(filter(has_records, folder.iterdir()))
    except OSError as error:
        raise Fault(
            f"params.yaml: preprocess.sets {folder} cannot be read: {error.strerror}; "
            "expected a folder of test sets, which may be empty"
        ) from None
    for path in paths:
        require_utf8(path)
    if mapping := read_mapping(folder):
        mapping.require_files([path.name for path in paths])
    names = [name_of(path) for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Fault(f"{folder} has two files for the set {twice[0]}, expected one per name")
    if taken := sorted({TEST_SPLIT, INDEX, SCRATCH}.intersection(names)):
        raise Fault(f"{folder} has a set named {taken[0]!r}, which means something else; rename it")
    return [read_set(path, encoder, drop) for path in paths]


def read_set(path: Path, encoder: Encoder, drop: bool) -> TestSet:
    """The set of one file. Raises a Fault as `read_sets` does, and for a set without pairs."""
    rows, ledger = [], Ledger([source_of(path)])
    for file, position, record, texts in ledger.rendered(encoder):
        ids = encoder.encode_arrays(texts)
        kept = compare(record, ids, encoder.template.max_length, encoder.unknown)
        for each in kept.faults:
            ledger.bad(file, position, each)
        if kept.compared:
            rows.append(as_row(record, ids, texts, kept.compared))
            ledger.add(file, position, record, ids, kept)
    reasons = ledger.dropped.keys() - {"over_length", "no_weight"}
    too_long, bad = ledger.dropped["over_length"], sum(ledger.dropped[reason] for reason in reasons)
    if reasons and not drop:
        raise Fault(
            f"{ledger.listed(reasons)}; to leave them out, set preprocess.on_bad_record to drop"
        )
    if not rows:
        raise Fault(
            f"{path}: no pairs left to evaluate: {too_long} too long, {bad} bad; "
            "expected at least one"
        )
    return TestSet(name_of(path), rows, ledger, too_long, bad)


def write_sets(
    folder: Path, sets: Iterable[TestSet], tokenizer: str, trained_on: Prompts
) -> dict[str, Notes]:
    """Write each set as a tokenized split, and an index, which may be empty.

    `trained_on` are the prompts of training and validation. Returns the content of the index.
    """
    with writing(folder):
        folder.mkdir()
    index = {}
    for each in sets:
        scratch = folder / SCRATCH
        with tokenized.stream(scratch) as append:
            append(tokenized.batch(each.rows))
        everything = np.ones(len(each.ledger.file), dtype=bool)
        late = each.ledger.late(everything)
        each.ledger.write(folder / each.name, scratch, everything, late, tokenizer, texts=True)
        scratch.unlink()
        leaked = each.ledger.prompts.shared_with(trained_on)
        index[each.name] = Notes(each.too_long, int(leaked.sum()), each.bad)
    write_json(folder / INDEX, {name: asdict(notes) for name, notes in index.items()})
    return index
