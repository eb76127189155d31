"""Further test sets: a folder with a file of preference pairs for each, judged beside the split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from stages.outputs import watched
from stages.pairs import SUFFIXES, BadRecord, Messages, Pair, check, read, unit
from stages.process import Fault
from stages.tokens import Encoder, prefix_length

SHOWN = 10


@dataclass(frozen=True)
class TestSet:
    """A file's pairs as ids, with the columns that a tokenized split has, but for the masks.

    `cut` prompts were too long and lost their left end; `left_out` pairs had an answer too long.
    """

    name: str
    pairs: Dataset
    cut: int
    left_out: int

    def leaked(self, prompt_ids: set[str]) -> int:
        """How many of the pairs have one of these prompts."""
        return sum(prompt_id in prompt_ids for prompt_id in self.pairs["prompt_id"])


def load_sets(folder: Path, encoder: Encoder) -> list[TestSet]:
    """The sets of a folder, by the names of their files. Raises a Fault for what cannot be read."""
    try:
        paths = [path for path in sorted(folder.iterdir()) if path.name.endswith(SUFFIXES)]
    except OSError as error:
        raise Fault(
            f"params.yaml: evaluate.sets {folder} cannot be read: {error.strerror}; "
            "wanted a folder of test sets, which may be empty"
        ) from None
    names = [name_of(path) for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Fault(f"{folder} has two files for the set {twice[0]}, wanted one for each name")
    return [load_set(path, encoder) for path in paths]


def load_set(path: Path, encoder: Encoder) -> TestSet:
    rows, faults, cut, left_out = [], [], 0, 0
    for position, record in watched(read(path), f"test set {path.name}", "pairs"):
        try:
            pair = check(record)
            sides = encoder.encode([encoder.render(pair.prompt, side) for side in answers(pair)])
        except BadRecord as fault:
            faults.append(f"{path}: {unit(path)} {position}: {fault.reason}: {fault}")
            continue
        if max(map(len, sides)) > encoder.template.max_length:
            shorter = encoder.encode_cut(pair.prompt, answers(pair))
            if shorter is None:
                left_out += 1
                continue
            sides, cut = shorter, cut + 1
        rows.append(as_row(pair, *sides))
    if faults:
        listed = "\n".join(faults[:SHOWN])
        raise Fault(f"{listed}\nbad records: {len(faults)} in {path}; wanted none in a test set")
    if not rows:
        raise Fault(f"{path}: no pair has answers short enough to be judged, wanted some")
    names = sorted({name for row in rows for name in row})
    pairs = Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    return TestSet(name_of(path), pairs, cut, left_out)


def answers(pair: Pair) -> tuple[Messages, Messages]:
    return pair.chosen, pair.rejected


def as_row(pair: Pair, chosen: list[int], rejected: list[int]) -> dict[str, Any]:
    return pair.columns | {
        "id": pair.id,
        "prompt_id": pair.prompt_id,
        "input_ids_j": chosen,
        "input_ids_k": rejected,
        "prefix_length": prefix_length(chosen, rejected),
    }


def name_of(path: Path) -> str:
    return path.name.removesuffix(next(end for end in SUFFIXES if path.name.endswith(end)))
