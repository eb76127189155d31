"""Extra test sets: a folder with a file of preference pairs for each, tokenized as all pairs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reward.data import tokenized
from reward.data.mapping import read_mapping
from reward.data.reading import SUFFIXES, name_of, unit
from reward.data.records import BadRecord
from reward.data.rows import as_row, hash_of, late_columns
from reward.data.sources import Source, source_of, usable
from reward.data.splitting import Hashes, Prompts, number_answers
from reward.data.tokens import Encoder
from reward.outputs import watched, write_json, writing
from reward.process import Fault

SHOWN = 10
INDEX = "index.json"


@dataclass(frozen=True)
class TestSet:
    """The pairs of a file as rows of the scratch table, their prompts, and hashes of their answers.

    Not among them are the pairs that are `too_long` and the records that are `bad`.
    """

    source: Source
    name: str
    rows: list[dict[str, Any]]
    prompts: Prompts
    answers: Hashes
    too_long: int
    bad: int


@dataclass(frozen=True)
class Notes:
    """What is to be said of a set besides its figures: how much of it was left out, or has leaked.

    A pair has leaked if its prompt is one that the model is trained on, begins one, or goes on from
    one.
    """

    too_long: int
    leaked: int
    bad: int


def read_sets(folder: Path, encoder: Encoder, drop: bool) -> list[TestSet]:
    """The sets of a folder, by the names of their files.

    Bad records are left out with `drop`, otherwise a Fault lists them. Raises a Fault for what
    cannot be read.
    """
    try:
        paths = [path for path in sorted(folder.iterdir()) if path.name.endswith(SUFFIXES)]
    except OSError as error:
        raise Fault(
            f"params.yaml: preprocess.sets {folder} cannot be read: {error.strerror}; "
            "wanted a folder of test sets, which may be empty"
        ) from None
    if mapping := read_mapping(folder):
        mapping.require_files([path.name for path in paths])
    names = [name_of(path) for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Fault(f"{folder} has two files for the set {twice[0]}, wanted one for each name")
    return [read_set(path, encoder, drop) for path in paths]


def read_set(path: Path, encoder: Encoder, drop: bool) -> TestSet:
    rows, prompts, answers, faults, too_long = [], [], [], [], 0
    source = source_of(path)
    for position, record in watched(source, f"test set {path.name}", "pairs"):
        try:
            pair = usable(record)
            texts = [encoder.render(pair.prompt, side) for side in (pair.chosen, pair.rejected)]
            sides = encoder.encode(texts)
            if max(map(len, sides)) > encoder.template.max_length:
                too_long += 1
                continue
            rows.append(as_row(pair, sides, texts))
            prompts.append(pair.prompt)
            answers.append([*map(hash_of, sides)])
        except BadRecord as fault:
            faults.append(f"{path}: {unit(path)} {position}: {fault.reason}: {fault}")
    if faults and not drop:
        listed = "\n".join(faults[:SHOWN])
        raise Fault(
            f"{listed}\nbad records: {len(faults)} in {path}; preprocess.on_bad_record drop leaves "
            "bad records out"
        )
    if not rows:
        raise Fault(
            f"{path}: no pair is left to judge: {too_long} too long, {len(faults)} bad, "
            f"{source.ties} ties; expected one at least"
        )
    hashes = np.array(answers, dtype=np.uint64)
    return TestSet(source, name_of(path), rows, Prompts.of(prompts), hashes, too_long, len(faults))


def write_sets(
    folder: Path, sets: Iterable[TestSet], tokenizer: str, trained_on: Prompts
) -> dict[str, Notes]:
    """Write each set as a tokenized split, and an index of them, which is there without sets too.

    `trained_on` are the prompts of training and validation.
    """
    with writing(folder):
        folder.mkdir()
    index = {}
    for each in sets:
        scratch = folder / "scratch.arrow"
        with tokenized.stream(scratch) as append:
            append(tokenized.batch(each.rows))
        columns = sorted({name for row in each.rows for name, _ in row[tokenized.KEPT]})
        everything = np.ones(len(each.rows), dtype=bool)
        numbered = number_answers(each.prompts.own, each.answers)
        late = late_columns(numbered.numbers)
        tokenized.write(folder / each.name, scratch, everything, late, columns, tokenizer)
        numbers = numbered.numbers.ravel()[numbered.first]
        tokenized.write_answers(folder / each.name, scratch, numbered.first, numbers, tokenizer)
        scratch.unlink()
        leaked = each.prompts.shared_with(trained_on)
        index[each.name] = Notes(each.too_long, int(leaked.sum()), each.bad)
    write_json(folder / INDEX, {name: asdict(notes) for name, notes in index.items()})
    return index
