"""Which rows of the tokenized data each optimizer step uses, planned before the first step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from reward.model.packing import balanced, rows_in, tokens
from reward.model.pairwise import Labels
from reward.model.rankings import COLUMNS, Ranking, divided, rankings

Rows = npt.NDArray[np.int64]
StepOf = Literal["pairs", "prompts"]


@dataclass(frozen=True)
class Step:
    """What one optimizer step learns from. The row of a comparison is its index in the labels."""

    rankings: list[Ranking]
    labels: Labels

    def packs(self, tokens_per_pack: int) -> list[list[Ranking]]:
        """The rankings in parts that fit into packs, pack by pack, the largest pack first."""
        parts = [part for each in self.rankings for part in divided(each, tokens_per_pack)]
        found = balanced([tokens(part.texts) for part in parts], tokens_per_pack)
        return [[parts[index] for index in indices] for indices in found]


class Steps(Sequence[Step]):
    """The steps of a tokenized dataset; each is read when it is accessed."""

    def __init__(self, dataset: Dataset, rows: Sequence[Rows]) -> None:
        """`rows` are the rows of the dataset that each step uses."""
        self.dataset = dataset
        self._texts = dataset.select_columns(COLUMNS).with_format("arrow")
        self._labels = Labels.of(dataset)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self._rows[index]
        return Step(rankings(rows_in(self._texts[rows])), self._labels.take(rows))

    def sizes(self) -> Rows:
        """The number of comparisons of each step."""
        return np.array([len(rows) for rows in self._rows])


def planned(
    prompts: Sequence[str],
    pairs_per_step: int,
    step_of: StepOf,
    epochs: float,
    max_steps: int,
    seed: int,
) -> list[Rows]:
    """The rows of every step; `prompts` is the prompt of each row.

    An epoch uses every row once, in a new random order. The last epoch may be a fraction, and the
    steps end at `max_steps` if that is positive.
    """
    _, prompt_of = np.unique(np.asarray(prompts), return_inverse=True)
    steps: list[Rows] = []
    for epoch in range(math.ceil(epochs)):
        generator = np.random.default_rng([seed, epoch])
        found = [*one_epoch(prompt_of, pairs_per_step, step_of, generator)]
        # Rounded, because 1.1 - 1 is slightly more than 0.1.
        share = round(min(1.0, epochs - epoch), 9)
        steps += found[: math.ceil(round(share * len(found), 9))]
        if 0 < max_steps <= len(steps):
            return steps[:max_steps]
    return steps


def one_epoch(
    prompt_of: Rows, size: int, step_of: StepOf, generator: np.random.Generator
) -> Iterator[Rows]:
    """All rows once: `size` rows per step, or whole prompts with at least `size` rows together."""
    if step_of == "pairs":
        rows = generator.permutation(len(prompt_of))
        yield from (rows[start : start + size] for start in range(0, len(rows), size))
        return
    # The rows of each prompt, in their original order.
    by_prompt = np.split(np.argsort(prompt_of, kind="stable"), np.cumsum(np.bincount(prompt_of)))
    step: list[Rows] = []
    for prompt in generator.permutation(len(by_prompt) - 1):
        step.append(by_prompt[prompt])
        if sum(map(len, step)) >= size:
            yield np.concatenate(step)
            step = []
    if step:
        yield np.concatenate(step)
