"""The ledger of records in preprocess: which columns identify the annotator."""

import random
import tracemalloc
from array import array
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest

from reward import params
from reward.data import ledger
from reward.data.columns import ANSWERS
from reward.data.ledger import Judges, Ledger
from stages import preprocess

Row = tuple[int, int, int, dict[str, str]]
NAMES = ("id", "annotator", "comment", "source")


def draw(seed: int) -> list[Row]:
    """File, position, answers and columns of random records, some of which have several pairs."""
    random_ = random.Random(seed)
    rows: list[Row] = []
    for file in range(3):
        for position in range(1, random_.randint(2, 30)):
            values = {
                "id": str(position),
                "annotator": random_.choice("abc"),
                "comment": str(random_.randint(0, 25)),
                "source": str(file),
            }
            columns = {name: values[name] for name in NAMES if random_.random() < 0.8}
            pairs = random_.randint(1, 2)
            rows += [(file, position, random_.randint(1, 6), columns) for _ in range(pairs)]
    return rows


def slow_annotators(rows: list[Row]) -> list[frozenset[tuple[str, str]]]:
    """The columns of each record that identify the annotator, by comparing all values of a file."""
    answers = defaultdict(set)
    for index, (file, position, answer, columns) in enumerate(rows):
        if index and rows[index - 1][:2] == (file, position):
            continue
        for name, value in columns.items():
            answers[file, name, value].add(answer)
    counts = {(file, name) for (file, name, _), found in answers.items() if len(found) > 1}
    return [
        frozenset(
            item for item in columns.items() if item[0] != "source" and (file, item[0]) in counts
        )
        for file, _, _, columns in rows
    ]


@pytest.mark.parametrize("seed", range(20))
def test_column_identifies_annotators_if_a_value_has_several_comparisons(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "FIRST_LOOK", 4)
    rows = draw(seed)
    file, position, answers = array("I"), array("I"), array("Q")
    judges = Judges(file, position, lambda rows: np.asarray(answers)[rows])
    for row in rows:
        for values, value in zip((file, position, answers), row[:3], strict=True):
            values.append(value)
        judges.add(judges.hashed(row[3]))
    hashes, expected = judges.all().tolist(), slow_annotators(rows)
    assert len({*zip(hashes, expected, strict=True)}) == len({*hashes}) == len({*expected})
    assert judges.all().tolist() == hashes


def test_comparing_all_records_takes_less_memory_than_their_numbers() -> None:
    """The numbers of a record themselves take about 50 bytes."""
    count, generator = 100_000, np.random.default_rng(0)
    held = Ledger([SimpleNamespace(split=None)])  # type: ignore[list-item]
    for name in ("prompt", *ANSWERS):
        getattr(held, name).extend(generator.integers(0, 2**64, count, dtype=np.uint64).tolist())
    for name in ("file", "position"):
        getattr(held, name).extend([0] * count)
    held._judges._sums.extend([0] * count)
    options = params.load("preprocess", preprocess.Preprocess)
    used = np.ones(count, dtype=bool)
    for compare in (lambda: preprocess.without_repeats(options, held), lambda: held.late(used)):
        tracemalloc.start()
        compare()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 40 * count
