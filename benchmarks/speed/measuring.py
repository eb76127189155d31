"""How a contender is measured: in a fresh process, over all steps except the first."""

import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.speed.hardware import HARDWARE
from benchmarks.speed.workload import Workload
from reward.model.progress import peak_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """A contender's figures over all steps except the first; `losses` has all. Memory is in GB."""

    pairs: int
    seconds: float
    tokens: int
    memory_before: float
    memory_peak: float
    losses: list[float]

    @property
    def speed(self) -> float:
        return self.pairs / self.seconds


@dataclass(frozen=True)
class Contender:
    """A row of the table; `floor` names the row of bare products that it is compared with."""

    label: str
    measure: Callable[[Workload], Measurement]
    floor: str = "floor"


@dataclass(frozen=True)
class Row:
    """All measurements of a contender, or its error and no measurements."""

    label: str
    floor: str
    measurements: list[Measurement]
    error: str

    @property
    def speed(self) -> float:
        return median(each.speed for each in self.measurements)

    @property
    def tokens_per_pair(self) -> float:
        return self.measurements[0].tokens / self.measurements[0].pairs


def alone(work: Callable[[], T]) -> T:
    """Call `work` in a fresh process, discard what it prints, and return its result.

    A fork server starts the process, because a process inherits the peak memory of the one that
    starts it (getrusage(2), execve(2)).
    """
    context = get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context, initializer=silence) as pool:
        return pool.submit(work).result()


def silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())


def measure(workload: Workload, chosen: dict[str, Contender], repeats: int) -> dict[str, Row]:
    """Measure all contenders in turn, `repeats` times; print a line for each to stderr."""
    rows = {name: Row(each.label, each.floor, [], "") for name, each in chosen.items()}
    turns = [(repeat, name) for repeat in range(1, repeats + 1) for name in chosen]
    for turn, (repeat, name) in enumerate(turns, start=1):
        row = rows[name]
        if row.error:
            continue
        try:
            measured = alone(partial(chosen[name].measure, workload))
        except Exception as error:  # one failing contender must not stop the others
            outcome = f"{type(error).__name__}: {error}".splitlines()[0]
            rows[name] = replace(row, measurements=[], error=outcome)
        else:
            row.measurements.append(measured)
            outcome = f"{measured.speed:.2f} pairs/s, peak {measured.memory_peak:.2f} GB"
        print(f"{turn}/{len(turns)} repeat {repeat} {name}: {outcome}", file=sys.stderr)
    return rows


class Stopwatch(TrainerCallback):
    """Time, tokens and memory of all steps except the first, without loading and saving."""

    def __init__(self, embedding: nn.Module | None = None) -> None:
        """Every computed token passes through the embedding once."""
        self.tokens = 0
        if embedding is not None:
            embedding.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.tokens += inputs[0].numel()

    def prepare(self) -> None:
        """To be called before the first step."""
        gc.collect()
        HARDWARE.reset_peak()
        self.memory_before = peak_memory()

    def start(self) -> None:
        """To be called before the second step."""
        HARDWARE.synchronize()
        self.tokens, self.started = 0, time.perf_counter()

    def stop(self) -> None:
        """To be called after the last step."""
        HARDWARE.synchronize()
        self.seconds = time.perf_counter() - self.started
        self.counted, self.memory_peak = self.tokens, peak_memory()

    def measurement(self, pairs: int, curve: Sequence[float] = ()) -> Measurement:
        return Measurement(
            pairs, self.seconds, self.counted, self.memory_before, self.memory_peak, list(curve)
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.prepare()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 1:
            self.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == state.max_steps:
            self.stop()
