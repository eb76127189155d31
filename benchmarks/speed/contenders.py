"""The rows of the table: this project, TRL, the article's loop, and the bare products."""

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from math import comb
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
from benchmarks.speed.workload import DENSE, Workload, with_adapter
from reward.data.columns import ANSWERS, GRADES, IDS, PREFIX, PROMPT_ID
from reward.model.base import Quantization, head_of, load_base, load_stock
from reward.model.checkpoints import Run
from reward.model.packing import Texts, texts_of
from reward.model.pairwise import Labels, losses
from reward.model.scoring import score
from reward.model.steps import Steps
from reward.model.trainer import RewardTrainer, Train

# The arguments that all trainers share, by their names in transformers. The loss of every step is
# logged, so that it can be compared.
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

# The columns in which TRL expects tokenized texts.
TRL_COLUMNS = ("chosen_ids", "rejected_ids")


def contenders(hardware: Hardware, answers: int, prompts_per_step: int) -> dict[str, Contender]:
    """All rows of the table, by the names that --only takes."""
    pairs_per_step = prompts_per_step * comb(answers, 2)
    rows = {
        "ours": Contender("this project", ours),
        "ours-checkpointing": Contender(
            "this project, gradient checkpointing", partial(ours, checkpointing=True)
        ),
    }
    if answers > 2:
        rows["ours-by-pairs"] = Contender(
            "this project, pair by pair", partial(ours, by_pairs=True)
        )
    for name, label, batch in trl_batches(hardware, pairs_per_step):
        if batch in (1, hardware.trl_batches[0]):
            rows[f"{name}-checkpointing"] = Contender(
                f"{label}, gradient checkpointing (its default)",
                partial(trl, batch=batch, checkpointing=True),
            )
        rows[name] = Contender(label, partial(trl, batch=batch, checkpointing=False))
    if hardware.also_bf16:
        rows |= in_bf16(hardware, pairs_per_step)
    rows |= {
        "article": Contender("the article's loop", article),
        "floor": Contender("bare matrix products", floor),
    }
    if hardware is CPU:
        rows["floor-onednn"] = Contender(
            "bare matrix products by oneDNN", partial(floor, multiply=by_onednn)
        )
    rows["ours-scoring"] = Contender("this project, scoring", scoring, "floor-scoring")
    if answers > 2:
        rows["ours-scoring-by-pairs"] = Contender(
            "this project, scoring pair by pair", partial(scoring, by_pairs=True), "floor-scoring"
        )
    return rows | {
        "floor-scoring": Contender(
            "bare matrix products of scoring", floor_of_scoring, "floor-scoring"
        ),
    }


def trl_batches(hardware: Hardware, pairs_per_step: int) -> Iterator[tuple[str, str, int]]:
    """Name, label and size of TRL's batches; the pairs of a step fill smaller batches evenly."""
    for most in hardware.trl_batches:
        batch = max(
            size
            for size in range(1, most + 1)
            if most > pairs_per_step or pairs_per_step % size == 0
        )
        times = f" x {pairs_per_step // batch}" if batch < pairs_per_step else ""
        yield f"trl-{most}", f"TRL, batch {batch}{times}", batch


def in_bf16(hardware: Hardware, pairs_per_step: int) -> dict[str, Contender]:
    """The additional rows in bf16: this project, TRL with its defaults, and the bare products."""
    rows = {
        "ours-bf16": Contender(
            "this project, bf16", partial(ours, quantization=IN_BF16), "floor-bf16"
        )
    }
    for name, label, batch in trl_batches(hardware, pairs_per_step):
        for suffix, checkpointing in (("-checkpointing", True), ("", False)):
            rows[f"{name}-bf16{suffix}"] = Contender(
                f"{label}, bf16"
                + (", gradient checkpointing (both its defaults)" if checkpointing else ""),
                partial(trl, batch=batch, checkpointing=checkpointing, bf16=True),
                "floor-bf16",
            )
    return rows | {
        "floor-bf16": Contender(
            "bare matrix products, bf16",
            partial(floor, multiply=by_onednn, dtype=torch.bfloat16),
            "floor-bf16",
        )
    }


def ours(
    workload: Workload,
    checkpointing: bool = False,
    quantization: Quantization = QUANTIZATION,
    by_pairs: bool = False,
) -> Measurement:
    """This project's trainer on rankings, or with `by_pairs` on separate pairs."""
    group = Train(
        **SHARED,
        head="new",
        keep="last",
        sum_in_order=True,
        pairs_per_step=workload.pairs_per_step,
        step_of="prompts",
        center_rewards=0.0,
        tokens_per_pack=workload.tokens_per_pack,
        max_steps=-1,
        gradient_checkpointing=checkpointing,
        deterministic=False,
        eval_steps=len(workload.prompts),
        validation_pairs=1,
        save_steps=len(workload.prompts),
    )
    dataset = as_tokenized(workload, by_pairs)
    model = with_adapter(load_base(workload.base, quantization), workload)
    with TemporaryDirectory() as name:
        folder, validation = Path(name), dataset.select([0])
        # In order, as for the others, so that the floor has the packs of the same steps.
        starts = range(workload.pairs_per_step, len(dataset), workload.pairs_per_step)
        rows = np.split(np.arange(len(dataset)), starts)
        trainer = RewardTrainer(model, group, Run(folder), Steps(dataset, rows), validation, folder)
        return timed(trainer, model, workload)


def as_tokenized(workload: Workload, by_pairs: bool) -> Dataset:
    """The pairs as preprocess writes them, with all columns that training reads.

    With `by_pairs`, each pair has its own prompt id, so training does not know what pairs share.
    """
    rows = []
    for prompt, (texts, j, k) in enumerate(compared(workload)):
        shared = prompt if by_pairs else prompt // workload.pairs_per_prompt
        rows.append(
            {PROMPT_ID: str(shared), PREFIX: texts_of([texts.ids[j], texts.ids[k]]).prefix}
            | dict(zip(ANSWERS, (j, k), strict=True))
            | dict(zip(IDS, (texts.ids[j], texts.ids[k]), strict=True))
            | dict(zip(GRADES, (1.0, 1.0, 0.0), strict=True))
        )
    return Dataset.from_list(rows)


def compared(workload: Workload) -> Iterator[tuple[Texts, int, int]]:
    """Every pair in order: its prompt's texts, and the indices of the better and worse one."""
    for texts in workload.prompts:
        for j, k in combinations(range(len(texts.ids)), 2):
            yield texts, j, k


def trl(workload: Workload, batch: int, checkpointing: bool, bf16: bool = False) -> Measurement:
    """TRL's RewardTrainer as documented, with the same pairs per step if the batch allows it."""
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer as TrlTrainer

    base = (
        load_stock(workload.dense, DENSE)
        if HARDWARE.trl_dense
        else load_stock(workload.base, QUANTIZATION)
    )
    model = with_adapter(base, workload, get_peft_model)
    with TemporaryDirectory() as output:
        trainer = TrlTrainer(
            model=model,
            args=RewardConfig(
                **others(workload, output, batch),
                gradient_checkpointing=checkpointing,
                bf16=bf16 or QUANTIZATION.dtype == torch.bfloat16,
                max_length=None,
            ),
            train_dataset=for_trl(workload),
            processing_class=AutoTokenizer.from_pretrained(workload.base),
        )
        return timed(trainer, model, workload)


class ArticleTrainer(Trainer):
    """A Trainer with one pair at a time, and one pass each for the chosen and the rejected text."""

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
        """The reward of one text, [1], with the head in fp32, as in this project."""
        model: Any = self.model
        classifier = model.get_base_model()
        output = classifier.base_model(input_ids=input_ids, use_cache=False)
        return head_of(classifier)(output.last_hidden_state[:, -1].float())[:, 0]


def article(workload: Workload) -> Measurement:
    """The article's loop, with several pairs per step, as in this project."""
    model = with_adapter(load_stock(workload.base, QUANTIZATION), workload, get_peft_model)
    with TemporaryDirectory() as output:
        trainer = ArticleTrainer(
            model=model,
            args=TrainingArguments(
                **others(workload, output, batch=1), remove_unused_columns=False
            ),
            train_dataset=for_trl(workload),
            data_collator=lambda rows: {
                side: torch.tensor([row[side] for row in rows]) for side in rows[0]
            },
        )
        return timed(trainer, model, workload)


def others(workload: Workload, output: str, batch: int) -> dict[str, Any]:
    """The arguments of the other trainers."""
    return SHARED | {
        "output_dir": output,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": max(1, workload.pairs_per_step // batch),
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": HARDWARE.name == "cpu",
    }


def for_trl(workload: Workload) -> Dataset:
    """The ids of chosen and rejected texts in TRL's columns."""
    pairs = [(texts.ids[j], texts.ids[k]) for texts, j, k in compared(workload)]
    return Dataset.from_list([dict(zip(TRL_COLUMNS, pair, strict=True)) for pair in pairs])


def scoring(workload: Workload, by_pairs: bool = False) -> Measurement:
    """Score the same texts without gradients, or with `by_pairs` each pair separately."""
    model = with_adapter(load_base(workload.base, QUANTIZATION), workload)
    stopwatch = Stopwatch(embedding_of(model))
    texts, count = workload.prompts, workload.prompts_per_step
    if by_pairs:
        pairs = compared(workload)
        texts = [texts_of([texts.ids[j], texts.ids[k]]) for texts, j, k in pairs]
        count = workload.pairs_per_step
    first, rest = texts[:count], texts[count:]
    stopwatch.prepare()
    score(model, first, workload.tokens_per_pack)
    stopwatch.start()
    score(model, rest, workload.tokens_per_pack)
    stopwatch.stop()
    return stopwatch.measurement(workload.counted)


def timed(trainer: Trainer, model: PeftModel, workload: Workload) -> Measurement:
    """Train and measure."""
    stopwatch = Stopwatch(embedding_of(model))
    trainer.add_callback(stopwatch)
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return stopwatch.measurement(workload.counted, curve)


def embedding_of(model: PeftModel) -> nn.Module:
    classifier: Any = model.get_base_model()
    return classifier.get_input_embeddings()
