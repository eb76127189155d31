"""Further test sets: a folder with a file of preference pairs for each, tokenized as all pairs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reward.data import tokenized
from reward.data.mapping import read_mapping
from reward.data.reading import SUFFIXES, name_of, unit
from reward.data.records import BadRecord, Messages, Pair
from reward.data.rows import as_row
from reward.data.sources import Source, source_of, usable
from reward.data.splitting import Prompts
from reward.data.tokens import Encoder
from reward.outputs import watched, write_json, writing
from reward.process import Fault

SHOWN = 10
INDEX = "index.json"


@dataclass(frozen=True)
class TestSet:
    """The pairs of a file as rows of the scratch table, and their prompts.

    `cut` prompts were too long and lost their left end; `left_out` pairs had an answer too long.
    """

    source: Source
    name: str
    rows: list[dict[str, Any]]
    prompts: Prompts
    cut: int
    left_out: int
    bad: int


@dataclass(frozen=True)
class Notes:
    """What is to be said of a set besides its figures: pairs cut, left out, leaked; bad records.

    A pair has leaked if its prompt is one that the model is trained on, begins one, or goes on from
    one.
    """

    cut: int
    left_out: int
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
    rows, prompts, faults, cut, left_out = [], [], [], 0, 0
    source = source_of(path)
    for position, record in watched(source, f"test set {path.name}", "pairs"):
        try:
            pair = usable(record)
            texts = [encoder.render(pair.prompt, side) for side in answers(pair)]
            whole = encoder.encode(texts)
            too_long = max(map(len, whole)) > encoder.template.max_length
            sides = encoder.encode_cut(pair.prompt, answers(pair)) if too_long else whole
        except BadRecord as fault:
            faults.append(f"{path}: {unit(path)} {position}: {fault.reason}: {fault}")
            continue
        if sides is None:
            left_out += 1
            continue
        cut += too_long
        rows.append(as_row(pair, sides, list(map(encoder.decode, sides)) if too_long else texts))
        prompts.append(pair.prompt)
    if faults and not drop:
        listed = "\n".join(faults[:SHOWN])
        raise Fault(
            f"{listed}\nbad records: {len(faults)} in {path}; preprocess.on_bad_record drop leaves "
            "bad records out"
        )
    if not rows:
        raise Fault(
            f"{path}: no pair is left to judge: {left_out} too long, {len(faults)} bad, "
            f"{source.ties} ties; expected one at least"
        )
    return TestSet(source, name_of(path), rows, Prompts.of(prompts), cut, left_out, len(faults))


def answers(pair: Pair) -> tuple[Messages, Messages]:
    return pair.chosen, pair.rejected


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
        tokenized.write(folder / each.name, scratch, everything, columns, tokenizer)
        scratch.unlink()
        leaked = each.prompts.shared_with(trained_on)
        index[each.name] = Notes(each.cut, each.left_out, int(leaked.sum()), each.bad)
    write_json(folder / INDEX, {name: asdict(notes) for name, notes in index.items()})
    return index
