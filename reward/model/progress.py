"""What training shows while it runs: a progress bar, lines of figures, and the curves."""

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reward.model.steps import Step
from reward.outputs import write_json


class Progress(TrainerCallback):
    """A progress bar over the steps with the latest figures, and a line for each evaluation."""

    def __init__(self, pairs: npt.NDArray[np.int64]) -> None:
        """`pairs` is the number of pairs of each step."""
        self.pairs = pairs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.first, self.start = state.global_step, time.monotonic()
        self.bar = tqdm(
            total=state.max_steps, initial=self.first, desc="training", unit=" steps", disable=None
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            shown = {name: logs[name] for name in ("loss", "accuracy") if name in logs}
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
        elif logs and "eval_loss" in logs:
            found = {name: logs[f"eval_{name}"] for name in ("loss", "accuracy", "margin")}
            self.bar.write(line_of(f"step {state.global_step:>5}", found), file=sys.stdout)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.close()
        if pairs := int(self.pairs[self.first : state.global_step].sum()):
            rate = pairs / (time.monotonic() - self.start)
            print(f"speed      {rate:.1f} pairs/s, peak memory {peak_memory():.2f} GB")


def line_of(place: str, found: dict[str, float]) -> str:
    """A line of figures for the validation pairs."""
    return (
        f"{place:<11} validation loss {found['loss']:.4f}  accuracy {found['accuracy']:.4f}  "
        f"margin {found['margin']:+.4f}"
    )


def at_work(step: Step, tokens_per_pack: int, workers: int, called: str = "processes") -> int:
    """How many processes or GPUs have work: at most as many as the step has packs.

    Prints a line if some have none.
    """
    packs = len(step.packs(tokens_per_pack))
    if packs < workers:
        print(
            f"{called:<11}{packs} of {workers} have work, because the first step has no more "
            "packs; raise train.pairs_per_step or lower train.tokens_per_pack to use more"
        )
    return min(packs, workers)


def peak_memory() -> float:
    """The peak memory in GB, of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def write_curves(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write the Trainer's log so far as the curves that the plots show."""
    names = ("step", "loss", "accuracy", "margin", "learning_rate", "grad_norm")
    training = [{name: entry.get(name) for name in names} for entry in history if "loss" in entry]
    write_json(folder / "training.json", training)
    write_json(folder / "validation.json", validation_curve(history))


def validation_curve(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    return [
        {"step": entry["step"]}
        | {name: entry[f"eval_{name}"] for name in ("loss", "accuracy", "margin")}
        for entry in history
        if "eval_loss" in entry
    ]
