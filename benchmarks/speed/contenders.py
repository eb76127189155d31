"""The rows of the table: ours, TRL's trainer, the article's loop, and the floor of each."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainingArguments

from benchmarks.speed.floor import by_onednn, floor, floor_of_scoring
from benchmarks.speed.hardware import CPU, HARDWARE, IN_BF16, QUANTIZATION, Hardware
from benchmarks.speed.measuring import Contender, Measurement, Stopwatch
from benchmarks.speed.workload import DENSE, PAIRS_PER_STEP, Workload, with_adapter
from reward.data.columns import (
    ANSWERS,
    IDS,
    PREFERENCE,
    PREFIX,
    PROMPT_ID,
    TARGET_MARGIN,
    WEIGHT,
)
from reward.model.base import Quantization, head_of, load_base, stock
from reward.model.checkpoints import Run
from reward.model.pairwise import Labels, losses
from reward.model.scoring import score
from reward.model.steps import Steps
from reward.model.trainer import RewardTrainer, Train

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
    if hardware.bf16_beside:
        rows |= in_bf16(hardware)
    rows |= {
        "article": Contender("the article's loop", article),
        "floor": Contender("reference: bare matrix products", floor),
    }
    if hardware is CPU:
        rows["floor-onednn"] = Contender(
            "the reference by oneDNN, as ours multiplies", partial(floor, multiply=by_onednn)
        )
    return rows | {
        "ours-scoring": Contender("ours, scoring", scoring, "floor-scoring"),
        "floor-scoring": Contender("reference of scoring", floor_of_scoring, "floor-scoring"),
    }


def in_bf16(hardware: Hardware) -> dict[str, Contender]:
    """The rows in bf16 beside those in fp32: ours, TRL by all its defaults, and the products."""
    rows = {"ours-bf16": Contender("ours, bf16", partial(ours, quantization=IN_BF16), "floor-bf16")}
    for batch in hardware.trl_batches:
        times = f" x {PAIRS_PER_STEP // batch}" if batch < PAIRS_PER_STEP else ""
        label = f"TRL, batch {batch}{times}, bf16"
        for name, checkpointing in (("-checkpointing", True), ("", False)):
            rows[f"trl-{batch}-bf16{name}"] = Contender(
                f"{label}, gradient checkpointing (both default)" if checkpointing else label,
                partial(trl, batch=batch, checkpointing=checkpointing, bf16=True),
                "floor-bf16",
            )
    return rows | {
        "floor-bf16": Contender(
            "reference: bare matrix products, bf16",
            partial(floor, multiply=by_onednn, dtype=torch.bfloat16),
            "floor-bf16",
        )
    }


def ours(
    workload: Workload, checkpointing: bool = False, quantization: Quantization = QUANTIZATION
) -> Measurement:
    """The trainer of stages.train."""
    group = Train(
        **SHARED,
        pairs_per_step=PAIRS_PER_STEP,
        step_of="pairs",
        center_rewards=0.0,
        tokens_per_pack=workload.tokens_per_pack,
        max_steps=-1,
        gradient_checkpointing=checkpointing,
        deterministic=False,
        eval_steps=len(workload.pairs),
        validation_pairs=1,
        save_steps=len(workload.pairs),
    )
    dataset = as_tokenized(workload)
    model = with_adapter(load_base(workload.base, quantization), workload)
    with TemporaryDirectory() as name:
        folder, validation = Path(name), dataset.select([0])
        # As all others here: the steps have the pairs of which the floor computes the packs.
        rows = np.split(
            np.arange(len(dataset)), range(PAIRS_PER_STEP, len(dataset), PAIRS_PER_STEP)
        )
        trainer = RewardTrainer(model, group, Run(folder), Steps(dataset, rows), validation, folder)
        return timed(trainer, model, workload)


def as_tokenized(workload: Workload) -> Dataset:
    """The pairs as preprocess leaves them, with all that training reads."""
    pairs = workload.pairs
    chosen, rejected = zip(*(texts.ids for texts in pairs), strict=True)
    ones = [1.0] * len(pairs)
    return Dataset.from_dict(
        {
            PROMPT_ID: [str(index) for index in range(len(pairs))],
            **dict(zip(ANSWERS, ([0] * len(pairs), [1] * len(pairs)), strict=True)),
            **dict(zip(IDS, (chosen, rejected), strict=True)),
            PREFIX: [texts.prefix for texts in pairs],
            PREFERENCE: ones,
            WEIGHT: ones,
            TARGET_MARGIN: [0.0] * len(pairs),
        }
    )


def trl(workload: Workload, batch: int, checkpointing: bool, bf16: bool = False) -> Measurement:
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
                bf16=bf16 or QUANTIZATION.dtype == torch.bfloat16,
                max_length=None,
            ),
            train_dataset=for_trl(workload),
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
        return losses(chosen, rejected, Labels.certain(len(chosen))).mean()

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
            train_dataset=for_trl(workload),
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


def for_trl(workload: Workload) -> Dataset:
    """The ids of chosen and rejected in the columns of TRL."""
    chosen, rejected = zip(*(texts.ids for texts in workload.pairs), strict=True)
    return Dataset.from_dict(dict(zip(TRL_COLUMNS, (chosen, rejected), strict=True)))


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


def timed(trainer: Trainer, model: PeftModel, workload: Workload) -> Measurement:
    """Train, and measure it."""
    stopwatch = Stopwatch(embedding_of(model))
    trainer.add_callback(stopwatch)
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return stopwatch.measurement(len(workload.pairs) - PAIRS_PER_STEP, curve)


def embedding_of(model: PeftModel) -> nn.Module:
    classifier: Any = model.get_base_model()
    return classifier.get_input_embeddings()
