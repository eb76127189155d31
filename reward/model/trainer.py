"""The Trainer for pairs: a batch is the pairs of one optimizer step, computed in packs.

The training loop is that of transformers, with its schedules, optimizers, callbacks, trackers and
checkpoints. A resumed training ends with the same bytes. The loop is overridden where packs of
pairs need something else:

- A batch is one object, not padded tensors, so no library pads it or iterates over its ids. The
  pairs of every batch are planned in advance, so one epoch of the Trainer is the whole training.
- `training_step` cuts the batch into packs and adds up the gradient of the mean loss over the
  step's pairs. So memory depends only on `tokens_per_pack` and the gradient only on the step's
  pairs. The Trainer's own accumulation ties both to one number. If memory runs out, the step starts
  again with smaller packs.
- Each process has a Trainer that does not know about the other processes. They share the packs
  of a step. What a pack adds to the gradient, dropout included, is the same whichever process
  computes it. So the bytes do not depend on the number of processes, and all take the same step.
- `evaluate` scores the validation pairs in packs, as `stages.evaluate` does.
- `_save_checkpoint` runs in the first process and writes to a temporary folder that is renamed when
  it is complete. It adds what the Trainer does not save: the pack size and the number of threads,
  which affect the bytes, and the weights of the best step so far if those are kept.
- `log` adds accuracy and margin to the loss, and writes the curves during training.
"""

import hashlib
import math
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from reward.data.columns import PROMPT_ID
from reward.model import checkpoints, group
from reward.model.base import device, head_of, settle_config, trained_bytes
from reward.model.memory import within_memory
from reward.model.packing import Texts, lengths_of, pack, pairs_of, tokens
from reward.model.pairwise import Labels, correct, losses, margins
from reward.model.progress import Progress, at_work, validation_curve, write_curves
from reward.model.rankings import Comparison, Ranking, rankings_of, sides
from reward.model.scoring import halved, rewards, score
from reward.model.steps import Step, StepOf, Steps
from reward.outputs import read_json, write_json, writing
from reward.params import AboveZero, Positive, Rule, Seed, Switch, ZeroOrMore
from reward.process import Fault, counted

# A new head is scaled so that the root mean square of the margins of the first pairs is at most
# HEAD_MARGIN; HEAD_PAIRS is the number of these pairs.
HEAD_MARGIN, HEAD_PAIRS = 0.05, 32
TOKENS_ON_A_CPU = 4096
SECONDS_BETWEEN_CURVES = 2.0
# Extra files in a checkpoint.
PACKS, BEST = "packs.json", "best.safetensors"

# The optimizers and schedules of transformers that need no extra package or argument.
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("adafactor", "sgd"),
)
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"),
    *("constant", "constant_with_warmup"),
)


@dataclass(frozen=True)
class Train:
    """The group `train` of params.yaml, which describes each key."""

    head: Literal["auto", "new"]
    pairs_per_step: Positive
    step_of: StepOf
    center_rewards: ZeroOrMore
    sum_in_order: Switch
    tokens_per_pack: Annotated[
        int | Literal["auto"],
        Rule("a positive integer, or auto", lambda tokens: tokens == "auto" or tokens > 0),
    ]
    num_train_epochs: Annotated[
        float, Rule("a number above 0 and at most 10000", lambda epochs: 0 < epochs <= 10**4)
    ]
    max_steps: Annotated[int, Rule("a positive integer, or -1", lambda n: n > 0 or n == -1)]
    learning_rate: AboveZero
    lr_scheduler_type: Annotated[
        str, Rule(f"one of {', '.join(SCHEDULES)}", lambda name: name in SCHEDULES)
    ]
    warmup_steps: Annotated[
        float,
        Rule(
            "an integer that is not negative, or a share of all steps below 1",
            lambda steps: 0 <= steps < 1 or (steps >= 1 and steps == int(steps)),
        ),
    ]
    weight_decay: ZeroOrMore
    max_grad_norm: AboveZero
    optim: Annotated[str, Rule(f"one of {', '.join(OPTIMIZERS)}", lambda name: name in OPTIMIZERS)]
    gradient_checkpointing: Switch
    deterministic: Switch
    logging_steps: Positive
    eval_steps: Annotated[
        float,
        Rule(
            "a positive integer, or a share of all steps above 0 and below 1",
            lambda steps: 0 < steps < 1 or (steps >= 1 and steps == int(steps)),
        ),
    ]
    validation_pairs: Positive
    keep: Literal["last", "best"]
    save_steps: Positive
    seed: Seed
    report_to: Literal["none", "wandb", "tensorboard", "mlflow"]


class RewardTrainer(Trainer):
    """The Trainer for pairs: a batch is the pairs of one optimizer step, computed in packs."""

    def __init__(
        self,
        model: PeftModel,
        options: Train,
        run: checkpoints.Run,
        steps: Steps,
        validation: Dataset,
        curves: Path,
    ) -> None:
        """`run` keeps the checkpoints; the curves are written to the folder `curves`."""
        super().__init__(
            model=model,
            args=arguments(options, run.folder, len(steps)),
            train_dataset=steps,
            eval_dataset=validation,
            data_collator=lambda batch: {"step": batch[0]},
            callbacks=[LastStep(), *([Progress(steps.sizes())] if group.leads() else [])],
        )
        self.remove_callback(PrinterCallback)
        self.reward_model, self.options, self.steps = model, options, steps
        self.names = [name for name, each in model.named_parameters() if each.requires_grad]
        self.trained = [each for each in model.parameters() if each.requires_grad]
        self.best: list[Tensor] = []
        self.validation = validation_step(validation, options)
        self.finds_pack_size = options.tokens_per_pack == "auto" and device().type == "cuda"
        self.tokens_per_pack = (
            TOKENS_ON_A_CPU if options.tokens_per_pack == "auto" else options.tokens_per_pack
        )
        self.run, self.curves = run, curves
        self.sums = torch.zeros(4)
        # The sums of `attempt` that the CPU has not read, by step.
        self.unread: list[tuple[int, Tensor]] = []
        self.reads_every_step = device().type == "cpu"
        self.curves_written = -math.inf
        model.train()  # because transformers loads a base in eval mode
        # The Trainer calls this after every step. The model's own walks over all of its modules.
        model.zero_grad = partial(drop_gradients, self.trained)  # type: ignore[method-assign]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Compute the gradient of the mean loss over the step's pairs, pack by pack.

        If memory runs out, the step starts again with packs of half the size.
        """
        if not model.training:  # because this, too, walks over all modules
            model.train()
        step = inputs["step"]
        while (sums := self.attempt(step)) is None:
            largest, *_ = step.packs(self.tokens_per_pack)
            place = f"step {self.state.global_step + 1}"
            self.tokens_per_pack = halved([part.texts for part in largest], 2, place)
            print(
                f"memory     ran out; from now on packs have at most {self.tokens_per_pack} tokens"
            )
        self.unread.append((self.state.global_step + 1, sums))
        if self.reads_every_step:
            self.read_sums()
        return sums[0]

    def read_sums(self) -> None:
        """Read the sums of the steps since the last call. Raises a Fault if a loss is not finite.

        Reading waits for the GPU. If every step did that, the GPU would be idle while the CPU
        prepares the next step. So on a GPU, sums are read only for the log and for evaluations. One
        of them comes before every checkpoint.
        """
        unread, self.unread = self.unread, []
        for step, sums in unread:
            on_cpu = sums.cpu()
            require_finite("loss", on_cpu[0].item(), step)
            self.sums += on_cpu

    def attempt(self, step: Step) -> Tensor | None:
        """Give the parameters the gradient of the step's loss; each process computes some packs.

        Returns the loss and, over the pairs that are not ties, how many are correct, the sum of
        their margins and their number: [4]. Returns None if any process ran out of memory.
        """
        packs = step.packs(self.tokens_per_pack)
        total = group.OrderedSum() if self.options.sum_in_order else group.PlainSum()
        for first in range(0, len(packs), group.size()):
            found = within_memory(self.addend, step, packs, first + group.rank())
            if not group.minimum(found is not None) or found is None:
                return None
            total.add(found, count=len(packs) - first)
        *gradients, sums = total.total().split([*(each.numel() for each in self.trained), 4])
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return sums.clone()  # because a view would keep the gradients in memory

    def addend(self, step: Step, packs: Sequence[Sequence[Ranking]], number: int) -> Tensor:
        """What one pack adds to the step's gradient and to the four numbers of `attempt`.

        The gradients of all parameters, flattened, followed by the four numbers: fp32, [numbers].
        Zeros if there is no pack with this number.
        """
        if number >= len(packs):
            return torch.zeros(sum(each.numel() for each in self.trained) + 4, device=device())
        held, weight = packs[number], step.labels.weight.sum().item()
        with random_numbers(self.args.seed, self.state.global_step, number):
            found = rewards(self.reward_model, pack([each.texts for each in held]))
            j, k, rows = sides(found, held)
            labels = step.labels.take(rows).to(found.device)
            loss = losses(j, k, labels, self.options.center_rewards).sum() / weight
            gradients = torch.autograd.grad(loss, self.trained, materialize_grads=True)
        sums = torch.stack([loss.detach(), *tally(j.detach(), k.detach(), labels)])
        return torch.cat([*(each.flatten() for each in gradients), sums])

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss, accuracy and mean margin on the validation pairs."""
        self.read_sums()
        found = figures(self.reward_model, self.validation, self.tokens_per_pack)
        metrics = {f"eval_{name}": value for name, value in found.items()}
        step = self.state.global_step
        require_finite("validation loss", metrics["eval_loss"], step)
        self.log(metrics)
        if self.options.keep == "best" and self.kept["step"] == step:
            self.best = [each.detach().cpu().clone() for each in self.trained]
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @property
    def kept(self) -> dict[str, float]:
        """The point of the validation curve so far whose weights are kept."""
        curve = validation_curve(self.state.log_history)
        if self.options.keep == "best":
            return min(curve, key=lambda point: point["loss"])
        return curve[-1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.read_sums()
            require_finite("norm of the gradient", logs["grad_norm"], self.state.global_step)
            _, right, margin, decided = self.sums.tolist()
            # If all pairs are ties, there is no accuracy.
            logs |= {"accuracy": right / decided, "margin": margin / decided} if decided else {}
            self.sums = torch.zeros(4)
        super().log(logs, start_time)
        if group.leads() and time.monotonic() - self.curves_written > SECONDS_BETWEEN_CURVES:
            write_curves(self.curves, self.state.log_history)
            self.curves_written = time.monotonic()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradients. The Trainer would look for them in all of the base's modules."""
        return nn.utils.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Always 0, because the Trainer can only count the tokens of padded tensors."""
        return 0

    def fit(self, new_head: bool) -> None:
        """Train to the end and load the weights that are kept into the model.

        Training resumes from the last intact checkpoint if there is one.
        """
        trainable, total = self.reward_model.get_nb_trainable_parameters()
        print(f"trainable  {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
        group.connect()
        checkpoint = group.folder_from_first(self.run.latest(), self.run.folder)
        if checkpoint:
            self.resume(checkpoint)
        else:
            self.begin(new_head)
        if self.options.keep == "best":
            self.set_weights(self.best)

    def begin(self, new_head: bool) -> None:
        """Train from the first step. A head that is not new is evaluated first, not scaled."""
        if self.finds_pack_size:
            self.tokens_per_pack = largest_pack(self)
        at_work(self.steps[0], self.tokens_per_pack, group.size())
        rows = self.steps.dataset
        first = pairs_of(rows.select(range(min(HEAD_PAIRS, len(rows)))))
        if new_head:
            scale_head(self.reward_model, first, self.tokens_per_pack)
        else:
            first_margins(self.reward_model, first, self.tokens_per_pack)
            self.args.eval_on_start = True
        # All processes start with the weights of the first one.
        self.set_weights(group.from_first([each.detach().cpu() for each in self.trained]))
        self.train()

    def resume(self, checkpoint: Path) -> None:
        """Train from a checkpoint.

        The number of threads is the one that the run started with, so the bytes are the same.
        """
        print(f"resuming   from {checkpoint.name}")
        packs = read_json(checkpoint / PACKS)
        self.tokens_per_pack = packs["tokens_per_pack"]
        torch.set_num_threads(packs["threads"])
        if (checkpoint / BEST).exists():
            best = load_file(checkpoint / BEST)
            self.best = [best[name] for name in self.names]
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < state.max_steps:
            at_work(self.steps[0], self.tokens_per_pack, group.size())
            self.train(resume_from_checkpoint=str(checkpoint))
        else:  # because the Trainer would take an extra step if the last epoch is not a whole one
            self._load_from_checkpoint(str(checkpoint))
            self.state = state

    @torch.no_grad()
    def set_weights(self, weights: Sequence[Tensor]) -> None:
        """Copy weights into the trained parameters."""
        for parameter, weight in zip(self.trained, weights, strict=True):
            parameter.copy_(weight)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not group.leads():
            return
        usual, step = self.args.output_dir, self.state.global_step
        with self.run.writing(step) as folder:
            self.args.output_dir = str(folder)
            with writing(folder, room=trained_bytes(self.reward_model)):
                super()._save_checkpoint(model, trial)
                if self.best:
                    save_file(dict(zip(self.names, self.best, strict=True)), folder / BEST)
            self.args.output_dir = usual
            # The Trainer writes to a folder of its own in the output folder. Move its files up.
            written = folder / f"checkpoint-{step}"
            for path in written.iterdir():
                path.rename(folder / path.name)
            written.rmdir()
            # A pickle of the arguments, which resuming does not read.
            (folder / "training_args.bin").unlink(missing_ok=True)
            settle_config(folder)
            packs = {"tokens_per_pack": self.tokens_per_pack, "threads": torch.get_num_threads()}
            write_json(folder / PACKS, packs)


@contextmanager
def random_numbers(seed: int, step: int, number: int) -> Iterator[None]:
    """Seed the random numbers of one pack by its step and number.

    So they depend neither on the process that computes the pack nor on what it computed before.
    """
    own = int(np.random.SeedSequence((seed, step, number)).generate_state(1, np.uint64)[0])
    on_gpu = device().type == "cuda"
    with torch.random.fork_rng(devices=[0] if on_gpu else []):
        torch.default_generator.manual_seed(own)
        if on_gpu:
            torch.cuda.manual_seed(own)
        yield


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def tally(j: Tensor, k: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
    """Of the pairs that are not ties: how many are correct, the sum of their margins, the count."""
    # Multiplied, because the size of a selection is known only when the GPU has finished its queue.
    decided = labels.decided
    return (correct(j, k) * decided).sum(), (margins(j, k) * decided).sum(), decided.sum()


def figures(model: PeftModel, step: Step, tokens_per_pack: int) -> dict[str, float]:
    """The loss, and the accuracy and mean margin of the pairs that are not ties, by name."""
    found = score(model, [each.texts for each in step.rankings], tokens_per_pack)
    j, k, rows = sides(found, step.rankings)
    labels = step.labels.take(rows)
    right, margin, decided = tally(j, k, labels)
    return {
        "loss": (losses(j, k, labels).sum() / labels.weight.sum()).item(),
        "accuracy": (right / decided).item(),
        "margin": (margin / decided).item(),
    }


def require_finite(name: str, value: float, step: int) -> None:
    """Raises a Fault if the value is not finite."""
    if not math.isfinite(value):
        raise Fault(
            f"the {name} is {value} at step {step}; lower train.learning_rate, "
            "train.max_grad_norm, train.weight_decay, train.center_rewards or lora.lora_alpha, or "
            "set quantization.compute_dtype to float32, then run again"
        )


# --- arguments and callbacks -----------------------------------------------------------------


def optimizer(options: Train) -> str:
    """The optimizer in use. Paged and 8-bit optimizers exist only for CUDA."""
    special = "8bit" in options.optim or "paged" in options.optim
    return "adamw_torch_fused" if special and not torch.cuda.is_available() else options.optim


def arguments(options: Train, folder: Path, steps: int) -> TrainingArguments:
    """The Trainer's arguments. Keys of params.yaml have the Trainer's names.

    An item of the training data is a step. The Trainer takes each step once, in order.
    """
    optim = optimizer(options)
    if optim != options.optim:
        print(f"optimizer  {optim} instead of {options.optim}, which needs CUDA; same method, fp32")
    found = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        max_steps=steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim=optim,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        seed=options.seed,
        report_to=options.report_to if group.leads() else "none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    # With several visible GPUs, the Trainer would multiply the batch size by their number.
    found._n_gpu = min(found.n_gpu, 1)
    if options.lr_scheduler_type != "constant":
        report_warmup(found.get_warmup_steps(steps), steps)
    return found


def report_warmup(warmup: int, steps: int) -> None:
    """Print a note if training ends before the learning rate reaches its peak."""
    if warmup >= steps:
        effect = "never reaches its peak" if steps > 1 else "is 0 and nothing is learned"
        print(
            f"note       the warm-up takes {counted(warmup, 'step')} and training has only "
            f"{steps}, so the learning rate {effect}; lower train.warmup_steps"
        )


class LastStep(TrainerCallback):
    """Evaluate and save at the last step, whatever the intervals are.

    Every point of the training curve covers the same number of steps. Leftover steps at the end add
    no point unless there is no other point.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
            control.should_log |= state.global_step < args.logging_steps


# --- before the first step -------------------------------------------------------------------


def longest(dataset: Dataset, count: int) -> list[Texts]:
    """The `count` pairs with the most tokens in a pack, the longest first."""
    return pairs_of(dataset.select(np.argsort(-lengths_of(dataset), kind="stable")[:count]))


def validation_step(dataset: Dataset, options: Train) -> Step:
    """The validation pairs that are evaluated during training, in the form of a step."""
    pairs = validation_sample(dataset, options.validation_pairs, options.seed)
    return Step(rankings_of(pairs), Labels.of(pairs))


def validation_sample(dataset: Dataset, most: int, seed: int) -> Dataset:
    """About `most` of the validation pairs: all pairs of some prompts, drawn by their hash.

    With a million pairs, scoring a tenth of them every few steps would take longer than training.
    The rows keep their order. The last prompt drawn may add a few pairs more than `most`. More
    prompts are drawn until there is a pair that is not a tie, because ties have no accuracy.
    """
    if len(dataset) <= most:
        return dataset
    prompts, of_row = np.unique(dataset[PROMPT_ID][:], return_inverse=True)
    ranks = [hashlib.sha256(f"{seed} {prompt}".encode()).digest() for prompt in prompts]
    order = sorted(range(len(prompts)), key=ranks.__getitem__)
    pairs = np.bincount(of_row)[order].cumsum()
    decided = np.bincount(of_row, Labels.of(dataset).decided.numpy())[order].cumsum()
    count = int(np.argmax((pairs >= most) & (decided > 0))) + 1
    return dataset.select(np.flatnonzero(np.isin(of_row, order[:count])))


def first_margins(model: PeftModel, pairs: Sequence[Texts], tokens_per_pack: int) -> Tensor:
    """The margins of the first pairs: [pairs]. Raises a Fault if they are not finite."""
    found = margins(*score(model, pairs, tokens_per_pack).view(-1, 2).unbind(1))
    if not found.isfinite().all():
        raise Fault(
            "the base model's rewards of the first pairs are not finite; set "
            "quantization.compute_dtype to float32"
        )
    return found


def scale_head(model: PeftModel, pairs: Sequence[Texts], tokens_per_pack: int) -> None:
    """Scale the head so that the margins of the first pairs are small.

    With a root mean square of at most HEAD_MARGIN, their standard deviation is at most 0.05 and
    their mean loss is within 0.03 of ln 2. So training starts undecided, however large the base's
    activations are. Raises a Fault if rewards are not finite.
    """
    size = first_margins(model, pairs, tokens_per_pack).square().mean().sqrt().item()
    head = head_of(model.get_base_model())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(min(1.0, HEAD_MARGIN / size) if size else 1.0)
    found = first_margins(model, pairs, tokens_per_pack)
    deviation = found.std(correction=0).item()
    loss = losses(found, torch.zeros_like(found), Labels.certain(len(pairs))).mean().item()
    if deviation > 0.1 or abs(loss - math.log(2)) > 0.05:
        raise Fault(
            f"before the first step the margins have a standard deviation of {deviation:.3f} and "
            f"the loss is {loss:.3f}, expected at most 0.1 and ln 2 = 0.693"
        )


def largest_pack(trainer: RewardTrainer) -> int:
    """The largest pack size, in tokens, that fits on the GPU, by trial steps on the longest pairs.

    A binary search finds it to within an eighth, and an eighth is left free. No pack needs to be
    larger than a whole step. The smallest pack is tried first, so that CUDA libraries allocate
    their own memory while there is room.
    """
    pairs = longest(trainer.steps.dataset, trainer.options.pairs_per_step)
    ends = [*accumulate(map(tokens, pairs))]
    # What a real step also holds: two states of the optimizer, and the sum of the packs' gradients.
    numbers = sum(each.numel() for each in trainer.trained)
    room = within_memory(torch.empty, 3, numbers, device=device())
    if room is None:
        halved(pairs[:1], 2, "before the first step")
    trainer.reward_model.train()
    if trainer.args.activation_checkpointing:
        # The Trainer does this again when training begins.
        kwargs = trainer.args.activation_checkpointing_kwargs
        trainer.reward_model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)

    def fits(size: int) -> bool:
        trainer.tokens_per_pack = size
        held = pairs[: bisect_right(ends, size)]
        ranked = [Ranking(texts, [Comparison(row, 0, 1)]) for row, texts in enumerate(held)]
        found = trainer.attempt(Step(ranked, Labels.certain(len(held))))
        drop_gradients(trainer.trained)
        return found is not None

    fitting, most = ends[0], ends[-1]
    if not fits(fitting):
        halved(pairs[:1], 2, "before the first step")
    if fits(most):
        return most
    while most - fitting > fitting // 8:
        middle = (fitting + most) // 2
        fitting, most = (middle, most) if fits(middle) else (fitting, middle)
    # The pairs that were tried take fewer tokens than the size if one more would exceed it.
    fitting = ends[bisect_right(ends, fitting) - 1]
    limit = fitting - fitting // 8
    print(f"memory     packs of {fitting} tokens fit; the limit is {limit}, to leave memory free")
    return limit
