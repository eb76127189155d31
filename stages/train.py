"""Train LoRA and the scalar head on the preference pairs.

    python -m stages.train

Reads data/tokenized/{train,validation} and models/base. Writes models/adapter (adapter with head,
template.json, quantization.json, training.json), the curves in reports/train, which grow while it
trains, and metrics/train.json. Progress is kept in models/checkpoints: a run that was killed goes
on where it was, and ends with the same bytes.
"""

import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from stages import checkpoints, params
from stages.model import (
    Quantization,
    add_lora,
    base_record,
    device,
    fits,
    halved,
    head_of,
    load_base,
    new_head,
    require_exact,
    rewards,
    save,
    score,
    seal,
)
from stages.outputs import (
    changed_files,
    digests,
    read_json,
    recorded,
    require_files,
    whole_folder,
    write_json,
)
from stages.packing import COLUMNS, Texts, load_split, pack, pair, pairs_of, plan, tokens
from stages.pairwise import hits, losses, margins, sides
from stages.params import AboveZero, Fraction, Positive, Rule, Seed, Switch, ZeroOrMore
from stages.process import Fault, run

BASE = Path("models/base")
TOKENIZED = Path("data/tokenized")
ADAPTER = Path("models/adapter")
REPORTS = Path("reports/train")
METRICS = Path("metrics/train.json")
HEAD_PAIRS = 32
PACKS = "packs.json"
TOKENS_ON_A_CPU = 4096
SECONDS_BETWEEN_CURVES = 2.0

# Those of transformers that need no package and no argument beyond the keys of params.yaml.
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("adafactor", "sgd"),
)
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"),
    *("constant", "constant_with_warmup"),
)


@dataclass(frozen=True)
class Lora:
    """The group `lora` of params.yaml, where each key is described."""

    r: Positive
    lora_alpha: AboveZero
    lora_dropout: Fraction
    target_modules: Annotated[list[str], Rule("a list of at least one module name", bool)]


@dataclass(frozen=True)
class Train:
    """The group `train` of params.yaml, where each key is described."""

    pairs_per_step: Positive
    tokens_per_pack: Annotated[
        int | Literal["auto"],
        Rule("a positive integer, or auto", lambda tokens: tokens == "auto" or tokens > 0),
    ]
    num_train_epochs: AboveZero
    max_steps: Annotated[int, Rule("a positive integer, or -1", lambda n: n > 0 or n == -1)]
    learning_rate: AboveZero
    lr_scheduler_type: Annotated[
        str, Rule(f"one of {', '.join(SCHEDULES)}", lambda name: name in SCHEDULES)
    ]
    warmup_steps: ZeroOrMore
    weight_decay: ZeroOrMore
    max_grad_norm: AboveZero
    optim: Annotated[str, Rule(f"one of {', '.join(OPTIMIZERS)}", lambda name: name in OPTIMIZERS)]
    gradient_checkpointing: Switch
    deterministic: Switch
    logging_steps: Positive
    eval_steps: Positive
    save_steps: Positive
    seed: Seed
    head_seed: Seed
    head_margin: Annotated[
        float, Rule("a number from 0 to 0.05", lambda margin: 0 <= margin <= 0.05)
    ]
    report_to: Literal["none", "wandb", "tensorboard", "mlflow"]


@dataclass(frozen=True)
class Step:
    """The pairs of one optimizer step, in one piece so that no library walks through their ids."""

    pairs: list[Texts]


def main() -> None:
    group = params.load("train", Train)
    lora = params.load("lora", Lora)
    quantization = params.load("quantization", Quantization)
    if group.save_steps % group.logging_steps:
        raise Fault(
            f"params.yaml: train.save_steps is {group.save_steps}, must be a multiple of "
            f"train.logging_steps, {group.logging_steps}, so that no curve has a gap after a kill"
        )
    if group.report_to != "none" and not find_spec(group.report_to):
        raise Fault(
            f"params.yaml: train.report_to is {group.report_to}, which is not installed here; "
            f"pip install {group.report_to}, or none"
        )
    require_same_source()
    recorded(TOKENIZED / "template.json")
    datasets = [TOKENIZED / "train", TOKENIZED / "validation"]
    train, validation = (load_split(path, BASE) for path in datasets)
    name = checkpoints.fingerprint(
        {
            "train": asdict(group) | {"optim": optimizer(group)},
            "lora": asdict(lora),
            "quantization": asdict(quantization) | {"compute_dtype": str(quantization.dtype)},
            "device": device().type,
        },
        [BASE / "base.json", *datasets, TOKENIZED / "template.json"],
    )
    with checkpoints.held(name) as held:
        held.forget_if_recorded(Path("dvc.lock"), "train")
        require_files(BASE, base_record(BASE)["files"])
        model = build(group, lora, quantization)
        for dataset in (train, validation):
            require_fit(model, dataset)
            require_exact(model, longest(dataset, 1)[0])
        trainer = RewardTrainer(model, group, held, train, validation)
        fit(trainer, held)
        write(trainer, group, lora, quantization)
        held.finish(METRICS)


def require_same_source() -> None:
    """Faults if models/base came from a local folder whose files have changed since.

    A folder that is not there has nothing to compare: another machine may have models/base alone.
    """
    base = base_record(BASE)
    if base["kind"] != "local":
        return
    folder = Path(base["name"]).expanduser()
    if not folder.is_dir():
        print(f"base       {base['name']} is not here any more; {BASE} is used as it was copied")
        return
    if changed := changed_files(folder, base["source"]):
        raise Fault(
            f"params.yaml: base.name {base['name']} has changed since it was copied to {BASE} "
            f"({', '.join(changed)}); run dvc repro --force --single-item fetch, then go on"
        )


def build(group: Train, lora: Lora, quantization: Quantization) -> PeftModel:
    """The model with fresh adapters and a fresh head. Seeds the global random state."""
    # cuBLAS reads it when it is first used.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(group.deterministic, warn_only=True)
    set_seed(group.seed)
    model = load_base(BASE, quantization)
    new_head(model, group.head_seed)
    return add_lora(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # scaling is alpha / r, a float
            lora_dropout=lora.lora_dropout,
            target_modules=sorted(lora.target_modules),
        ),
    )


def require_fit(model: PeftModel, dataset: Dataset) -> None:
    """Raises a Fault for a text longer than the base can read, or an id that it does not know."""
    config: Any = model.get_base_model().config
    columns = [dataset.data[name] for name in COLUMNS[:2]]
    most = max(pc.max(pc.list_value_length(column)).as_py() for column in columns)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and most > positions:
        raise Fault(
            f"{TOKENIZED} has texts of {most} tokens, {BASE} reads at most {positions}; "
            "lower preprocess.max_length"
        )
    largest = max(pc.max(pc.list_flatten(column)).as_py() for column in columns)
    if largest >= config.vocab_size:
        raise Fault(
            f"{TOKENIZED} has the id {largest}, {BASE} knows {config.vocab_size} ids; "
            "wanted a tokenizer that belongs to the model"
        )


def longest(dataset: Dataset, count: int) -> list[Texts]:
    """The pairs with the most tokens in a pack, the longest first."""
    chosen, rejected = (pc.list_value_length(dataset.data[name]) for name in COLUMNS[:2])
    size = pc.subtract(pc.add(chosen, rejected), dataset.data[COLUMNS[2]]).to_numpy()
    return pairs_of(dataset.select(np.argsort(-size, kind="stable")[:count]))


def scale_head(
    model: PeftModel, pairs: Sequence[Texts], tokens_per_pack: int, margin: float
) -> None:
    """Scale the head so that the first pairs' margins have that root mean square at most.

    At 0.05 their deviation is at most 0.05 and their mean loss within 0.03 of ln 2: training starts
    undecided, however large the base's activations are. Raises a Fault for rewards that are not
    finite.
    """
    chosen, rejected = sides(score(model, pairs, tokens_per_pack))
    size = margins(chosen, rejected).square().mean().sqrt().item()
    if not math.isfinite(size):
        raise Fault(
            f"{BASE}: the rewards of the first pairs are not finite, wanted a base model that "
            "computes in quantization.compute_dtype; try float32"
        )
    head = head_of(model.get_base_model())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(min(1.0, margin / size) if size else 1.0)
    chosen, rejected = sides(score(model, pairs, tokens_per_pack))
    deviation = margins(chosen, rejected).std(correction=0).item()
    loss = losses(chosen, rejected).mean().item()
    if deviation > 0.1 or abs(loss - math.log(2)) > 0.05:
        raise Fault(
            f"{BASE}: before the first step the margins deviate by {deviation:.3f} and the loss is "
            f"{loss:.3f}, wanted at most 0.1 and ln 2 = 0.693"
        )


class RewardTrainer(Trainer):
    """The Trainer for pairs: a batch is one optimizer step's pairs, worked through in packs."""

    def __init__(
        self,
        model: PeftModel,
        group: Train,
        held: checkpoints.Run,
        train: Dataset,
        validation: Dataset,
    ) -> None:
        super().__init__(
            model=model,
            args=arguments(group, held.folder),
            train_dataset=train.select_columns(COLUMNS).with_format("numpy"),
            eval_dataset=validation,
            data_collator=lambda rows: {"step": Step([pair(row) for row in rows])},
            callbacks=[LastStep(), Progress()],
        )
        self.remove_callback(PrinterCallback)
        self.reward_model, self.train_pairs = model, train
        self.validation_pairs = pairs_of(validation)
        self.size_on_trial = group.tokens_per_pack == "auto" and device().type == "cuda"
        self.tokens_per_pack = (
            TOKENS_ON_A_CPU if group.tokens_per_pack == "auto" else group.tokens_per_pack
        )
        self.head_margin, self.held = group.head_margin, held
        self.sums, self.pairs = torch.zeros(3), 0
        self.drawn = -math.inf

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Accumulate the gradient of the mean loss over the step's pairs, pack by pack.

        Where memory does not suffice, the step begins again in packs of half the size, with the
        random numbers that it had.
        """
        model.train()
        pairs = inputs["step"].pairs
        while (sums := self.attempt(pairs)) is None:
            lengths = [tokens(texts) for texts in pairs]
            groups = plan(lengths, self.tokens_per_pack)
            largest = max(([lengths[index] for index in group] for group in groups), key=sum)
            self.tokens_per_pack = halved(largest, f"step {self.state.global_step + 1}")
            print(f"memory     does not suffice, packs have {self.tokens_per_pack} tokens from now")
        self.sums, self.pairs = self.sums + sums.cpu(), self.pairs + len(pairs)
        loss = sums[0] / len(pairs)
        require_finite("loss", loss.item(), self.state.global_step + 1)
        return loss

    def attempt(self, pairs: list[Texts]) -> torch.Tensor | None:
        """Sums of loss, hits and margin over the pairs, [3], their gradient accumulated.

        None, and all as it was before, if memory did not suffice.
        """
        states = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        sums = fits(self.accumulate, pairs)
        if sums is None:
            self.reward_model.zero_grad()
            torch.set_rng_state(states[0])
            torch.cuda.set_rng_state_all(states[1])
        return sums

    def accumulate(self, pairs: list[Texts]) -> torch.Tensor:
        sums = torch.zeros(3, device=device())
        for group in plan([tokens(texts) for texts in pairs], self.tokens_per_pack):
            batch = pack([pairs[index] for index in group])
            chosen, rejected = sides(rewards(self.reward_model, batch))
            loss = losses(chosen, rejected).sum()
            self.accelerator.backward(loss / len(pairs))
            with torch.no_grad():
                right, margin = hits(chosen, rejected).sum(), margins(chosen, rejected).sum()
                sums += torch.stack([loss, right, margin])
        return sums

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss, accuracy and mean margin on the validation pairs."""
        found = score(self.reward_model, self.validation_pairs, self.tokens_per_pack)
        chosen, rejected = sides(found)
        metrics = {
            "eval_loss": losses(chosen, rejected).mean().item(),
            "eval_accuracy": hits(chosen, rejected).mean().item(),
            "eval_margin": margins(chosen, rejected).mean().item(),
        }
        require_finite("validation loss", metrics["eval_loss"], self.state.global_step)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            _, accuracy, margin = (self.sums / self.pairs).tolist()
            logs |= {"accuracy": accuracy, "margin": margin}
            self.sums, self.pairs = torch.zeros(3), 0
        super().log(logs, start_time)
        if time.monotonic() - self.drawn > SECONDS_BETWEEN_CURVES:
            write_curves(REPORTS, self.state.log_history)
            self.drawn = time.monotonic()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = self.args.output_dir
        step = self.state.global_step
        with self.held.writing(step) as partial:
            self.args.output_dir = str(partial)
            super()._save_checkpoint(model, trial)
            self.args.output_dir = folder
            written = partial / f"checkpoint-{step}"
            for path in written.iterdir():
                path.rename(partial / path.name)
            written.rmdir()
            (partial / "training_args.bin").unlink(missing_ok=True)
            write_json(partial / PACKS, {"tokens_per_pack": self.tokens_per_pack})


def require_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise Fault(
            f"the {name} is {value} at step {step}; "
            "lower train.learning_rate or train.max_grad_norm, then run again"
        )


def optimizer(group: Train) -> str:
    """The optimizer in use: without CUDA there are no paged and no 8-bit ones."""
    special = "8bit" in group.optim or "paged" in group.optim
    return "adamw_torch_fused" if special and not torch.cuda.is_available() else group.optim


def arguments(group: Train, folder: Path) -> TrainingArguments:
    """The Trainer's own arguments; those of params.yaml keep their names."""
    optim = optimizer(group)
    if optim != group.optim:
        print(f"optimizer: {group.optim} is for CUDA; here {optim}, the same method in 32 bits")
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=group.pairs_per_step,
        num_train_epochs=group.num_train_epochs,
        max_steps=group.max_steps,
        learning_rate=group.learning_rate,
        lr_scheduler_type=group.lr_scheduler_type,
        warmup_steps=group.warmup_steps,
        weight_decay=group.weight_decay,
        max_grad_norm=group.max_grad_norm,
        optim=optim,
        activation_checkpointing=group.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=group.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=group.eval_steps,
        save_strategy="steps",
        save_steps=group.save_steps,
        seed=group.seed,
        report_to=group.report_to,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


class LastStep(TrainerCallback):
    """Evaluate and save at the last step, whatever the intervals are.

    A point of the training curve is as many steps as any other: what is left over makes none,
    unless it is all there is.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
            control.should_log |= state.global_step < args.logging_steps


class Progress(TrainerCallback):
    """A bar over the steps with the latest figures; a line at each evaluation."""

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
            self.bar.set_postfix({name: f"{logs[name]:.3f}" for name in ("loss", "accuracy")})
        elif logs and "eval_loss" in logs:
            self.bar.write(
                f"step {state.global_step:>5}  validation loss {logs['eval_loss']:.4f}  "
                f"accuracy {logs['eval_accuracy']:.4f}  margin {logs['eval_margin']:+.4f}",
                file=sys.stdout,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.close()
        pairs = (state.global_step - self.first) * args.per_device_train_batch_size
        if pairs:
            rate = pairs / (time.monotonic() - self.start)
            print(f"speed      {rate:.1f} pairs/s, peak memory {peak_memory():.2f} GB")


def peak_memory() -> float:
    """In GB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def fit(trainer: RewardTrainer, held: checkpoints.Run) -> None:
    """Train to the end, from the last whole checkpoint if there is one."""
    model = trainer.reward_model
    trainable, total = model.get_nb_trainable_parameters()
    print(f"trainable  {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    checkpoint = held.latest()
    if not checkpoint:
        if trainer.size_on_trial:
            trainer.tokens_per_pack = largest_pack(trainer)
        first = trainer.train_pairs.select(range(min(HEAD_PAIRS, len(trainer.train_pairs))))
        scale_head(model, pairs_of(first), trainer.tokens_per_pack, trainer.head_margin)
        trainer.train()
        return
    print(f"resuming   from {checkpoint.name}")
    trainer.tokens_per_pack = read_json(checkpoint / PACKS)["tokens_per_pack"]
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:  # the Trainer would take one more step where the last epoch is not a whole one
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state


def largest_pack(trainer: RewardTrainer) -> int:
    """The most tokens of a pack that the GPU holds, by trial steps on the longest pairs.

    Found to an eighth, and an eighth is left free. A step's pairs are the most that is of use.
    """
    pairs = longest(trainer.train_pairs, trainer.args.per_device_train_batch_size)
    trainer.reward_model.train()

    def held(size: int) -> bool:
        trainer.tokens_per_pack = size
        with torch.random.fork_rng():
            found = trainer.attempt(pairs)
        trainer.reward_model.zero_grad()
        return found is not None

    fitting, most = tokens(pairs[0]), sum(map(tokens, pairs))
    if held(most):
        return most
    if not held(fitting):
        halved([fitting], "before the first step")
    while most - fitting > fitting // 8:
        middle = (fitting + most) // 2
        fitting, most = (middle, most) if held(middle) else (fitting, middle)
    print(f"memory     holds packs of {fitting} tokens, of which {fitting - fitting // 8} are used")
    return fitting - fitting // 8


def write_curves(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write what the Trainer has logged so far as the curves that plots show."""
    names = ("step", "loss", "accuracy", "margin", "learning_rate", "grad_norm")
    training = [{name: entry[name] for name in names} for entry in history if "loss" in entry]
    write_json(folder / "training.json", training)
    write_json(folder / "validation.json", validation_curve(history))


def validation_curve(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    return [
        {"step": entry["step"]}
        | {name: entry[f"eval_{name}"] for name in ("loss", "accuracy", "margin")}
        for entry in history
        if "eval_loss" in entry
    ]


def write(trainer: RewardTrainer, group: Train, lora: Lora, quantization: Quantization) -> None:
    """Write the adapter with what it was trained from, the curves and the metrics."""
    history = trainer.state.log_history
    with whole_folder(ADAPTER) as folder:
        save(trainer.reward_model, folder, str(BASE), quantization)
        shutil.copyfile(TOKENIZED / "template.json", folder / "template.json")
        write_json(
            folder / "training.json",
            {
                "train": asdict(group),
                "lora": asdict(lora),
                "quantization": asdict(quantization),
                "pairs": len(trainer.train_pairs),
                "data": digests(TOKENIZED / "train"),
            },
        )
        seal(folder, BASE)
    with whole_folder(REPORTS) as folder:
        write_curves(folder, history)
    trainable, _ = trainer.reward_model.get_nb_trainable_parameters()
    last = {name: value for name, value in validation_curve(history)[-1].items() if name != "step"}
    write_json(
        METRICS,
        {"steps": trainer.state.global_step, "trainable_parameters": trainable, "validation": last},
    )
    print(
        f"validation accuracy {last['accuracy']:.4f}, loss {last['loss']:.4f}, "
        f"margin {last['margin']:+.4f} of {len(trainer.validation_pairs)} pairs"
    )
    print(f"trained    {ADAPTER}; dvc plots show draws the curves, here and while it trains")


if __name__ == "__main__":
    run(main)
