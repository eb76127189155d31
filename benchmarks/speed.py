"""Measure side by side how fast this pipeline and others train a reward model.

python -m benchmarks.speed

Ours against TRL's RewardTrainer, against the article's loop (one pair at a time, two passes), and
against the bare matrix products of the base's linear layers. All have the same base, pairs, order
of pairs, first adapter and head, optimizer and threads; they take turns, each time in a process of
its own, and the median counts. Prints a table and writes it to benchmarks/results/<cpu or cuda>.md,
with the raw figures (.json) and a picture (.svg) beside it. Needs the extra `bench`.
"""

# First of all: it silences what bitsandbytes warns of at its import.
import stages  # noqa: F401  # isort: skip

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
import vl_convert
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks import random_base
from reward.data.reading import files, read
from reward.data.records import BadRecord, check
from reward.data.tokens import TEMPLATES, Encoder, Template, prefix_length
from reward.model.base import Quantization, add_lora, device, head_of, load_base, new_head, stock
from reward.model.checkpoints import Run
from reward.model.layers import product
from reward.model.packing import COLUMNS, Texts, into_packs, tokens
from reward.model.pairwise import losses
from reward.model.scoring import score
from reward.model.trainer import HEAD_PAIRS, RewardTrainer, Train, peak_memory, scale_head
from reward.outputs import read_json, write_json
from reward.process import Fault, run

T = TypeVar("T")
RESULTS = Path("benchmarks/results")
PAIRS_PER_STEP = 8
LONGEST = 2040

# Lengths in tokens of a well-known human-preference set at the 50th, 90th and 99th percentile. The
# ends are a tenth of the median and twice the 99th percentile.
PREFIX = {0.0: 10, 0.5: 98, 0.9: 273, 0.99: 542, 1.0: 1084}
ANSWER = {0.0: 3, 0.5: 30, 0.9: 95, 0.99: 220, 1.0: 440}

SHAPE = {
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "vocab_size": 16384,
}
QUANTIZATION = Quantization(4, "nf4", False, "auto")
DENSE = replace(QUANTIZATION, bits="none")
TARGETS = ["k_proj", "q_proj", "v_proj"]
# The arguments that all trainers share, by their names in transformers. One point of the curve a
# step, so that the losses of all can be compared.
SHARED: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.3,
    "weight_decay": 0.001,
    "max_grad_norm": 0.3,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "seed": 0,
    "report_to": "none",
}

# Columns that TRL takes for texts that are tokenized already.
TRL_COLUMNS = ("chosen_ids", "rejected_ids")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl")
VEGA_LITE = "5.21"
COLORS = {"ours": "#1f5a8f", "trl": "#c2763c", "article": "#8a8a8a", "floor": "#cfd6dc"}
INK = "#222222"


@dataclass(frozen=True)
class Hardware:
    """What differs between a CPU and a GPU."""

    name: str
    trl_batches: tuple[int, ...]
    trl_dense: bool
    synchronize: Callable[[], None]
    forget_peak: Callable[[], None]
    describe: Callable[[], str]
    note: str


def forget_resident_peak() -> None:
    """Have Linux count the peak of this process's memory from here; elsewhere loading counts."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


CPU = Hardware(
    "cpu",
    trl_batches=(8, 1),
    trl_dense=True,
    synchronize=lambda: None,
    forget_peak=forget_resident_peak,
    describe=lambda: f"CPU ({torch.backends.cpu.get_cpu_capability()}), fp32",
    note="TRL casts the adapter of a quantized base to bf16, which fails on a CPU in fp32. Here it "
    "has the base dequantized, which computes the same and has nothing to dequantize.",
)
CUDA = Hardware(
    "cuda",
    trl_batches=(8, 1, 2, 4, 16, 32),
    trl_dense=False,
    synchronize=torch.cuda.synchronize,
    forget_peak=torch.cuda.reset_peak_memory_stats,
    describe=lambda: f"{torch.cuda.get_device_name()}, {QUANTIZATION.dtype}",
    note="TRL casts the adapter of a quantized base to bf16, the others have theirs in fp32, so "
    "that losses differ by rounding. Batches above 8 take fewer steps, the last of other pairs.",
)
HARDWARE = CUDA if torch.cuda.is_available() else CPU


@dataclass(frozen=True)
class Workload:
    """What all contenders work on.

    `dense` is the dequantized base where TRL needs it, `adapter` a file with the first adapter and
    head, `linear` the [outputs, inputs] of each linear layer of the decoder.
    """

    base: Path
    dense: Path
    adapter: Path
    pairs: list[Texts]
    linear: list[tuple[int, int]]
    tokens_per_pack: int

    def steps(self) -> Iterator[list[Texts]]:
        """The pairs of each optimizer step."""
        for start in range(0, len(self.pairs), PAIRS_PER_STEP):
            yield self.pairs[start : start + PAIRS_PER_STEP]


@dataclass(frozen=True)
class Measurement:
    """One contender, once: all steps but the first. Memory in GB, a loss for each step."""

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
    """A row of the table; `floor` names the row of bare products that its speed is a share of."""

    label: str
    measure: Callable[[Workload], Measurement]
    floor: str = "floor"


@dataclass(frozen=True)
class Row:
    """All measurements of a contender, or none and its error."""

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


def main() -> None:
    options = parse()
    # Before the first process is started; bitsandbytes and PyTorch have each their own OpenMP.
    os.environ.update(OMP_NUM_THREADS=str(options.threads), MKL_NUM_THREADS=str(options.threads))
    os.environ["HF_HUB_OFFLINE"] = "1"
    chosen = {
        name: contender
        for name, contender in contenders(HARDWARE).items()
        if name in (options.only or [name])
    }
    with TemporaryDirectory() as scratch:
        print("preparing base, pairs and adapter", file=sys.stderr)
        workload = alone(partial(prepare, options, Path(scratch)))
        settings = describe(workload, options)
        rows = measure(workload, chosen, options.repeats)
    report = as_markdown(settings, rows)
    print(report)
    write(settings, rows, report)


def parse() -> argparse.Namespace:
    """The command line. Raises a Fault for what cannot be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(contenders(HARDWARE))
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each contender")
    parser.add_argument("--pairs", type=int, default=256, help="pairs, a multiple of 8")
    parser.add_argument("--seed", type=int, default=0, help="of generating, or drawing, the pairs")
    parser.add_argument("--data", type=Path, help="preference pairs instead of generated ones")
    parser.add_argument("--template", default="zh", choices=[*TEMPLATES, "chat"], help="of --data")
    parser.add_argument("--base", type=Path, help="folder of a base instead of a small random one")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens-per-pack", type=int, default=4096)
    options = parser.parse_args()
    for name, lowest in (("repeats", 1), ("threads", 1), ("tokens_per_pack", 1), ("seed", 0)):
        if (value := getattr(options, name)) < lowest:
            raise Fault(f"--{name.replace('_', '-')} is {value}, wanted at least {lowest}")
    least = 2 * max(HARDWARE.trl_batches)
    if options.pairs < least or options.pairs % PAIRS_PER_STEP:
        raise Fault(
            f"--pairs is {options.pairs}, wanted a multiple of {PAIRS_PER_STEP} and at least "
            f"{least}: the first step of each contender is not counted"
        )
    if unknown := sorted(set(options.only or names) - set(names)):
        raise Fault(f"--only names {', '.join(unknown)}, wanted some of {', '.join(names)}")
    if options.base and not (options.base / "config.json").is_file():
        raise Fault(f"{options.base}/config.json is not here, wanted the folder of a base model")
    if any(name.startswith("trl") for name in options.only or names) and not find_spec("trl"):
        raise Fault("trl is not installed here; pip install -e .[bench], or leave it out by --only")
    return options


def contenders(hardware: Hardware) -> dict[str, Contender]:
    """All rows of the table by the names that --only takes."""
    rows = {
        "ours": Contender("ours", ours),
        "ours-checkpointing": Contender(
            "ours, gradient checkpointing", partial(ours, checkpointing=True)
        ),
    }
    for batch in hardware.trl_batches:
        times = f" x {PAIRS_PER_STEP // batch}" if batch < PAIRS_PER_STEP else ""
        label = f"TRL, batch {batch}{times}"
        if batch in (1, PAIRS_PER_STEP):
            rows[f"trl-{batch}-checkpointing"] = Contender(
                f"{label}, gradient checkpointing (default)",
                partial(trl, batch=batch, checkpointing=True),
            )
        rows[f"trl-{batch}"] = Contender(label, partial(trl, batch=batch, checkpointing=False))
    rows |= {
        "article": Contender("the article's loop", article),
        "floor": Contender("floor: bare matrix products", floor),
    }
    if hardware is CPU:
        rows["floor-onednn"] = Contender(
            "the floor by oneDNN, as ours multiplies", partial(floor, multiply=by_onednn)
        )
    return rows | {
        "ours-scoring": Contender("ours, scoring", scoring, "floor-scoring"),
        "floor-scoring": Contender("floor of scoring", floor_of_scoring, "floor-scoring"),
    }


# --- processes -------------------------------------------------------------------------------


def alone(work: Callable[[], T]) -> T:
    """What `work` returns, from a fresh process, whose output is thrown away.

    From a fork server: a process that is started directly counts the peak memory of the one that
    starts it as its own (getrusage(2), execve(2)).
    """
    context = get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context, initializer=silence) as pool:
        return pool.submit(work).result()


def silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())


def measure(workload: Workload, chosen: dict[str, Contender], repeats: int) -> dict[str, Row]:
    """Every contender once, then every one again; a line for each to stderr."""
    rows = {name: Row(each.label, each.floor, [], "") for name, each in chosen.items()}
    turns = [(repeat, name) for repeat in range(1, repeats + 1) for name in chosen]
    for turn, (repeat, name) in enumerate(turns, start=1):
        row = rows[name]
        if row.error:
            continue
        try:
            measured = alone(partial(chosen[name].measure, workload))
        except Exception as error:  # what stops one contender does not stop the others
            outcome = f"{type(error).__name__}: {error}".splitlines()[0]
            rows[name] = replace(row, measurements=[], error=outcome)
        else:
            row.measurements.append(measured)
            outcome = f"{measured.speed:.2f} pairs/s, peak {measured.memory_peak:.2f} GB"
        print(f"{turn}/{len(turns)} repeat {repeat} {name}: {outcome}", file=sys.stderr)
    return rows


class Stopwatch(TrainerCallback):
    """Time, tokens and memory of all steps but the first; neither loading nor saving counts."""

    def __init__(self, embedding: nn.Module | None = None) -> None:
        """Every token that is computed goes through the embedding once."""
        self.tokens = 0
        if embedding is not None:
            embedding.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.tokens += inputs[0].numel()

    def prepare(self) -> None:
        """To be called before the first step."""
        gc.collect()
        HARDWARE.forget_peak()
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


def timed(trainer: Trainer, model: PeftModel, workload: Workload) -> Measurement:
    """Train, and measure it."""
    stopwatch = Stopwatch(embedding_of(model))
    trainer.add_callback(stopwatch)
    trainer.train()
    args = trainer.args
    first = args.per_device_train_batch_size * args.gradient_accumulation_steps
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return stopwatch.measurement(len(workload.pairs) - first, curve)


def embedding_of(model: PeftModel) -> nn.Module:
    classifier: Any = model.get_base_model()
    return classifier.get_input_embeddings()


# --- what all work on ------------------------------------------------------------------------


def prepare(options: argparse.Namespace, scratch: Path) -> Workload:
    """Make or find base and pairs, and write what all contenders begin with to `scratch`."""
    base = options.base
    if not base:
        base = scratch / "base"
        random_base.make(base, SHAPE)
    longest = min(LONGEST, read_json(base / "config.json").get("max_position_embeddings", LONGEST))
    if options.data:
        pairs = drawn(options, base, longest)
    else:
        pairs = generated(options.pairs, options.seed, usable_ids(base), longest)
    packed = load_base(base, QUANTIZATION)
    linear = [
        (module.out_features, module.in_features)
        for module in packed.base_model.modules()
        if isinstance(module, nn.Linear)
    ]
    model = with_adapter(packed)
    scale_head(model, pairs[:HEAD_PAIRS], options.tokens_per_pack)
    save_file(
        {
            name: weight.detach()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        },
        scratch / "adapter.safetensors",
    )
    if HARDWARE.trl_dense:
        stock(base, QUANTIZATION).dequantize().save_pretrained(scratch / "dense")
    return Workload(
        base,
        scratch / "dense",
        scratch / "adapter.safetensors",
        pairs,
        linear,
        options.tokens_per_pack,
    )


def generated(count: int, seed: int, ids: Sequence[int], longest: int) -> list[Texts]:
    """Pairs of random ids, of the lengths of a human-preference set, no text over `longest`.

    Each length is drawn from a share of its own of the distribution, so that few pairs have its
    percentiles too. The answers differ in their first id: the prefix is all that they share.
    """
    draw = np.random.default_rng(seed)
    known = np.asarray(ids)
    sizes = [
        lengths(quantiles, (draw.permutation(count) + draw.random(count)) / count)
        for quantiles in (PREFIX, ANSWER, ANSWER)
    ]
    pairs = []
    for prefix, *answers in zip(*sizes, strict=True):
        answers = [min(answer, longest // 2) for answer in answers]
        prefix = min(prefix, longest - max(answers))
        shared = draw.choice(known, prefix).tolist()
        first = draw.integers(len(known))
        other = (first + draw.integers(1, len(known))) % len(known)
        texts = [
            [*shared, int(known[begin]), *draw.choice(known, answer - 1).tolist()]
            for begin, answer in zip((first, other), answers, strict=True)
        ]
        pairs.append(Texts(texts, prefix))
    return pairs


def lengths(quantiles: dict[float, int], shares: Any) -> list[int]:
    """The quantile function at `shares`: between its points the logarithm of a length is linear."""
    logs = np.log(list(quantiles.values()))
    found: list[int] = np.exp(np.interp(shares, list(quantiles), logs)).round().astype(int).tolist()
    return found


def usable_ids(base: Path) -> list[int]:
    """All ids that a base knows but the special ones, which can mean padding."""
    special = set(AutoTokenizer.from_pretrained(base).all_special_ids)
    return [
        id_ for id_ in range(read_json(base / "config.json")["vocab_size"]) if id_ not in special
    ]


def drawn(options: argparse.Namespace, base: Path, longest: int) -> list[Texts]:
    """Pairs of a preference file, drawn at random from those that can be used."""
    encoder = Encoder(base, Template.of(options.template, False, longest, base))
    records = [record for path in files(options.data) for _, record in read(path)]
    pairs: list[Texts] = []
    for index in np.random.default_rng(options.seed).permutation(len(records)):
        try:
            pair = check(records[index])
            texts = [encoder.render(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        except BadRecord:
            continue
        chosen, rejected = encoder.encode(texts)
        if chosen != rejected and max(len(chosen), len(rejected)) <= longest:
            pairs.append(Texts((chosen, rejected), prefix_length(chosen, rejected)))
        if len(pairs) == options.pairs:
            return pairs
    raise Fault(
        f"{options.data} has {len(pairs)} usable pairs of at most {longest} tokens under the "
        f"template {options.template}, wanted {options.pairs}; give another number by --pairs"
    )


def with_adapter(
    model: PreTrainedModel,
    workload: Workload | None = None,
    add: Callable[[PreTrainedModel, LoraConfig], Any] = add_lora,
) -> PeftModel:
    """The base with adapter and head: those of the workload, or fresh ones."""
    new_head(model, seed=0)
    config = LoraConfig(
        TaskType.SEQ_CLS, r=4, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS
    )
    torch.manual_seed(0)
    adapted: PeftModel = add(model, config)
    if workload:
        found = adapted.load_state_dict(load_file(workload.adapter), strict=False)
        if found.unexpected_keys:
            raise ValueError(f"{workload.adapter} has {found.unexpected_keys}, not in the model")
    return adapted


# --- contenders ------------------------------------------------------------------------------


def ours(workload: Workload, checkpointing: bool = False) -> Measurement:
    """The trainer of stages.train."""
    group = Train(
        **SHARED,
        pairs_per_step=PAIRS_PER_STEP,
        tokens_per_pack=workload.tokens_per_pack,
        max_steps=-1,
        gradient_checkpointing=checkpointing,
        deterministic=False,
        eval_steps=len(workload.pairs),
        save_steps=len(workload.pairs),
    )
    prefixes = [texts.prefix for texts in workload.pairs]
    dataset = texts_of(workload, COLUMNS[:2]).add_column(COLUMNS[2], prefixes)
    model = with_adapter(load_base(workload.base, QUANTIZATION), workload)
    with TemporaryDirectory() as name:
        folder, validation = Path(name), dataset.select([0])
        trainer = RewardTrainer(model, group, Run(folder), dataset, validation, folder)
        # As all others here: the steps then have the pairs of which the floor computes the packs.
        trainer.args.train_sampling_strategy = "sequential"
        return timed(trainer, model, workload)


def trl(workload: Workload, batch: int, checkpointing: bool) -> Measurement:
    """TRL's RewardTrainer as documented, at the same pairs a step where the batch allows it."""
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer as TrlTrainer

    base = (
        stock(workload.dense, DENSE) if HARDWARE.trl_dense else stock(workload.base, QUANTIZATION)
    )
    model = with_adapter(base, workload, get_peft_model)
    with TemporaryDirectory() as output:
        trainer = TrlTrainer(
            model=model,
            args=RewardConfig(
                **others(output, batch),
                gradient_checkpointing=checkpointing,
                bf16=QUANTIZATION.dtype == torch.bfloat16,
                max_length=None,
            ),
            train_dataset=texts_of(workload),
            processing_class=AutoTokenizer.from_pretrained(workload.base),
        )
        return timed(trainer, model, workload)


class ArticleTrainer(Trainer):
    """A Trainer of one pair at a time: a pass for the chosen text, another for the rejected one."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        chosen, rejected = (self.reward(inputs[side]) for side in TRL_COLUMNS)
        return losses(chosen, rejected).mean()

    def reward(self, input_ids: Tensor) -> Tensor:
        """The reward of one text, [1], with the head in fp32 as it is in ours."""
        model: Any = self.model
        classifier = model.get_base_model()
        output = classifier.base_model(input_ids=input_ids, use_cache=False)
        return head_of(classifier)(output.last_hidden_state[:, -1].float())[:, 0]


def article(workload: Workload) -> Measurement:
    """The loop of the article, with this project's steps of several pairs."""
    model = with_adapter(stock(workload.base, QUANTIZATION), workload, get_peft_model)
    with TemporaryDirectory() as output:
        trainer = ArticleTrainer(
            model=model,
            args=TrainingArguments(**others(output, batch=1), remove_unused_columns=False),
            train_dataset=texts_of(workload),
            data_collator=lambda rows: {
                side: torch.tensor([row[side] for row in rows]) for side in rows[0]
            },
        )
        return timed(trainer, model, workload)


def others(output: str, batch: int) -> dict[str, Any]:
    """The arguments of trainers that are not ours."""
    return SHARED | {
        "output_dir": output,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": max(1, PAIRS_PER_STEP // batch),
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": HARDWARE.name == "cpu",
    }


def texts_of(workload: Workload, columns: Sequence[str] = TRL_COLUMNS) -> Dataset:
    """The ids of chosen and rejected in columns of the given names."""
    chosen, rejected = zip(*(texts.ids for texts in workload.pairs), strict=True)
    return Dataset.from_dict(dict(zip(columns, (chosen, rejected), strict=True)))


def scoring(workload: Workload) -> Measurement:
    """The rewards of the same pairs, without a gradient."""
    model = with_adapter(load_base(workload.base, QUANTIZATION), workload)
    stopwatch = Stopwatch(embedding_of(model))
    first, rest = workload.pairs[:PAIRS_PER_STEP], workload.pairs[PAIRS_PER_STEP:]
    stopwatch.prepare()
    score(model, first, workload.tokens_per_pack)
    stopwatch.start()
    score(model, rest, workload.tokens_per_pack)
    stopwatch.stop()
    return stopwatch.measurement(len(rest))


Multiply = Callable[[Tensor, Tensor, Tensor], Any]


def by_torch(x: Tensor, weight: Tensor, result: Tensor) -> None:
    torch.mm(x, weight.T, out=result)


def by_onednn(x: Tensor, weight: Tensor, _: Tensor) -> None:
    """As the frozen layers of ours; oneDNN makes a result of its own."""
    product(x, weight)


def floor(workload: Workload, multiply: Multiply = by_torch) -> Measurement:
    """The products of a training step's passes: forward, and back to the layers' inputs."""
    steps = [[tokens(texts) for texts in step] for step in workload.steps()]
    return products(workload, steps, multiply, backward=True)


def floor_of_scoring(workload: Workload) -> Measurement:
    """The products of the passes that `scoring` makes, in its packs of pairs of like length."""
    sizes = [tokens(texts) for texts in workload.pairs]
    parts = sizes[:PAIRS_PER_STEP], sizes[PAIRS_PER_STEP:]
    steps = [sorted(part, reverse=True) for part in parts]
    return products(workload, steps, by_torch, backward=False)


def products(
    workload: Workload, steps: list[list[int]], multiply: Multiply, backward: bool
) -> Measurement:
    """Multiply the tokens of each step's packs with all linear layers of the decoder, no more.

    `steps` has the tokens of each pair. What is multiplied is made before, and a place for each
    size of result, so that no memory need be asked for meanwhile.
    """
    packs = [
        [
            sum(sizes[index] for index in group)
            for group in into_packs(sizes, workload.tokens_per_pack)
        ]
        for sizes in steps
    ]
    make = partial(torch.randn, dtype=QUANTIZATION.dtype, device=device())
    weights = [make(shape) for shape in workload.linear]
    sizes = {size for shape in workload.linear for size in shape}
    most = max(map(max, packs))
    inputs, results = ({size: make(most, size) for size in sizes} for _ in range(2))
    stopwatch = Stopwatch()
    stopwatch.prepare()
    for number, step in enumerate(packs):
        if number == 1:
            stopwatch.start()
        for rows in step:
            stopwatch.tokens += rows
            for weight in [*weights, *(weight.T for weight in reversed(weights) if backward)]:
                after, before = weight.shape
                multiply(inputs[before][:rows], weight, results[after][:rows])
    stopwatch.stop()
    return stopwatch.measurement(sum(map(len, steps[1:])))


# --- results ---------------------------------------------------------------------------------


def describe(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """What the figures hold for."""
    config = read_json(workload.base / "config.json")
    answers = [len(ids) - texts.prefix for texts in workload.pairs for ids in texts.ids]
    return {
        "hardware": HARDWARE.describe(),
        "threads": options.threads,
        "base": options.base.name if options.base else "random",
        "shape": {name: config[name] for name in ("model_type", *SHAPE) if name in config},
        "data": options.data.name if options.data else f"generated from seed {options.seed}",
        "pairs": len(workload.pairs),
        "pairs_per_step": PAIRS_PER_STEP,
        "prefix": percentiles([texts.prefix for texts in workload.pairs]),
        "answer": percentiles(answers),
        "tokens_per_pack": workload.tokens_per_pack,
        "repeats": options.repeats,
        "versions": {name: version(name) for name in LIBRARIES if find_spec(name)},
    }


def percentiles(sizes: list[int]) -> list[int]:
    """Those of the 50th, 90th and 99th percentile."""
    found: list[int] = np.quantile(sizes, [0.5, 0.9, 0.99], method="nearest").tolist()
    return found


def as_markdown(settings: dict[str, Any], rows: dict[str, Row]) -> str:
    """The table with what it holds for and how it is to be read."""
    prefix, answer = ("/".join(map(str, settings[name])) for name in ("prefix", "answer"))
    shape = ", ".join(f"{name} {value}" for name, value in settings["shape"].items())
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    lines = [
        f"# Speed of training on {HARDWARE.name.upper()}",
        "Written by `python -m benchmarks.speed`, which says what is measured and how.",
        f"![Pairs per second, and tokens computed for a pair]({HARDWARE.name}.svg)",
        "\n".join(
            [
                f"- {settings['hardware']}, threads: {settings['threads']}",
                f"- base: {settings['base']} ({shape})",
                f"- {settings['pairs']} pairs, {settings['data']}; tokens at the 50th/90th/99th "
                f"percentile: prefix {prefix}, answer {answer}",
                f"- {settings['pairs_per_step']} pairs a step, the first step not counted; at most "
                f"{settings['tokens_per_pack']} tokens in one of our packs",
                f"- median, and range, of {settings['repeats']} measurements, each in a process of "
                "its own, the contenders taking turns",
                f"- {versions}",
            ]
        ),
        table(rows),
        *compared(rows),
        "The floor is what the matrix products of the base's linear layers take with the tokens of "
        "our packs: forward and back to the layers' inputs, for scoring forward alone. A row's "
        "share of it is its speed by the floor's.",
        HARDWARE.note,
    ]
    return "\n\n".join(lines) + "\n"


def table(rows: dict[str, Row]) -> str:
    """One line for each contender; its error, where it has no figures."""
    heads = [
        *("", "pairs/s", "range", "ours is ... times as fast", "tokens computed for a pair"),
        *("peak memory, GB", "before the first step, GB", "share of the floor"),
        "loss of the last step",
    ]
    lines = [
        heads,
        ["---", *["---:"] * (len(heads) - 1)],
        *(cells(row, rows) for row in rows.values()),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: Row, rows: dict[str, Row]) -> list[str]:
    none = "–"
    if not row.measurements:
        return [row.label, row.error.replace("|", "/"), *[none] * 7]
    speeds = [each.speed for each in row.measurements]
    peak, before = (
        median(getattr(each, name) for each in row.measurements)
        for name in ("memory_peak", "memory_before")
    )
    curve = row.measurements[-1].losses
    ours, floor = rows.get("ours"), rows.get(row.floor)
    return [
        row.label,
        f"{row.speed:.2f}",
        f"{min(speeds):.2f} to {max(speeds):.2f}",
        f"{ours.speed / row.speed:.2f}" if ours and ours.measurements and curve else none,
        f"{row.tokens_per_pair:.1f}",
        f"{peak:.2f}",
        f"{before:.2f}",
        f"{row.speed / floor.speed:.0%}" if floor and floor.measurements else none,
        f"{curve[-1]:.7f}" if curve else none,
    ]


def compared(rows: dict[str, Row]) -> list[str]:
    """The sentences on TRL at its best, and on the floor by oneDNN."""
    measured = {name: row for name, row in rows.items() if row.measurements}
    ours, fast = measured.get("ours"), measured.get("floor-onednn")
    if not ours:
        return []
    sentences = []
    if others := [row for name, row in measured.items() if name.startswith("trl")]:
        best = max(others, key=lambda row: row.speed)
        sentences += [
            f'The fastest of TRL\'s is "{best.label}" with {best.speed:.2f} pairs/s: ours is '
            f"{ours.speed / best.speed:.2f} times as fast."
        ]
    if fast:
        sentences += [
            "PyTorch multiplies by MKL, ours by oneDNN, which knows more processors; a share of "
            "the floor can then exceed 100%. Of the same floor by oneDNN, ours has "
            f"{ours.speed / fast.speed:.0%}."
        ]
    return sentences


def chart(rows: dict[str, Row]) -> dict[str, Any]:
    """Vega-Lite: pairs per second of training, and the tokens computed for a pair."""
    values = [
        {
            "row": row.label,
            "speed": row.speed,
            "low": min(each.speed for each in row.measurements),
            "high": max(each.speed for each in row.measurements),
            "tokens": row.tokens_per_pair,
            "kind": name.partition("-")[0],
        }
        for name, row in rows.items()
        if row.measurements and row.floor == "floor"
    ]
    across = {
        "mark": {"type": "rule", "color": INK},
        "encoding": {"x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}},
    }
    labels = {"labelLimit": 400, "ticks": False, "domain": False}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "padding": 16,
        "data": {"values": values},
        "hconcat": [
            panel("speed", "high", "pairs per second", ".3~r", labels, [across]),
            panel("tokens", "tokens", "tokens computed for a pair", ".0f", None, []),
        ],
        "spacing": 40,
        "config": {"view": {"stroke": None}, "axis": {"grid": False, "tickCount": 5}},
    }


def panel(
    field: str,
    end: str,
    title: str,
    digits: str,
    labels: dict[str, Any] | None,
    across: list[dict[str, Any]],
) -> dict[str, Any]:
    """A bar for each row, what is drawn `across` it, and the figure behind its `end`."""
    colors = {"domain": list(COLORS), "range": list(COLORS.values())}
    return {
        "width": 300,
        "height": {"step": 24},
        "encoding": {
            "y": {"field": "row", "type": "nominal", "sort": None, "title": None, "axis": labels}
        },
        "layer": [
            {
                "mark": {"type": "bar", "height": 15},
                "encoding": {
                    "x": {"field": field, "type": "quantitative", "title": title},
                    "color": {"field": "kind", "type": "nominal", "scale": colors, "legend": None},
                },
            },
            *across,
            {
                "mark": {"type": "text", "align": "left", "dx": 5, "color": INK},
                "encoding": {
                    "x": {"field": end, "type": "quantitative"},
                    "text": {"field": field, "format": digits},
                },
            },
        ],
    }


def write(settings: dict[str, Any], rows: dict[str, Row], report: str) -> None:
    """Write table, raw figures and picture."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / HARDWARE.name
    raw = {name: asdict(row) for name, row in rows.items()}
    write_json(path.with_suffix(".json"), {"settings": settings, "rows": raw})
    path.with_suffix(".svg").write_text(
        vl_convert.vegalite_to_svg(chart(rows), vl_version=VEGA_LITE), encoding="utf-8"
    )
    path.with_suffix(".md").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    run(main)
