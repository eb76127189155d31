"""Train LoRA and the scalar head on the preference pairs.

    python -m stages.train

Reads data/tokenized/{train,validation} and models/base. Writes models/adapter (adapter with head,
template.json, quantization.json, training.json), the curves in reports/train, which grow during
training, and metrics/train.json. Checkpoints are in models/checkpoints. A run that was killed
continues from the last one and ends with the same bytes.
"""

import gc
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import set_seed

from reward import params
from reward.after_training import require_usable
from reward.data import tokenized
from reward.data.columns import PROMPT_ID
from reward.model import checkpoints, group, trackers
from reward.model.base import (
    Quantization,
    add_lora,
    base_record,
    device,
    fused_experts,
    has_head,
    head_of,
    load_base,
    new_head,
    precisions,
    save,
    seal,
    set_head,
)
from reward.model.launching import distribute
from reward.model.layers import multiplies_bf16
from reward.model.memory import within_memory
from reward.model.packing import full_pack
from reward.model.plain import require_length
from reward.model.progress import at_work, line_of, write_curves
from reward.model.scoring import require_exact
from reward.model.steps import Steps, planned
from reward.model.trainer import (
    TOKENS_ON_A_CPU,
    RewardTrainer,
    Train,
    figures,
    optimizer,
    validation_step,
)
from reward.outputs import (
    changed_files,
    copy_file,
    digests,
    recorded,
    require_files,
    whole_folder,
    write_json,
)
from reward.params import AboveZero, Fraction, Positive, Rule, Switch
from reward.process import Fault, counted, threads
from reward.stage import run_stage

BASE = Path("models/base")
TOKENIZED = Path("data/tokenized")
SPLITS = [TOKENIZED / "train", TOKENIZED / "validation"]
ADAPTER = Path("models/adapter")
REPORTS = Path("reports/train")
METRICS = Path("metrics/train.json")


@dataclass(frozen=True)
class Lora:
    """The group `lora` of params.yaml, which describes each key."""

    r: Positive
    lora_alpha: AboveZero
    lora_dropout: Fraction
    use_rslora: Switch
    use_dora: Switch
    target_modules: Annotated[
        list[str] | Literal["all-linear"],
        Rule("a list of at least one module name, or all-linear", bool),
    ]


def main() -> None:
    options, lora = params.load("train", Train), params.load("lora", Lora)
    quantization = params.load("quantization", Quantization)
    require_possible(options)
    require_usable()
    if options.report_to != "none" and group.leads():
        trackers.prepare(options.report_to)
    require_same_source()
    report_precision(quantization)
    max_length = recorded(TOKENIZED / "template.json")["max_length"]
    train, validation = (tokenized.load(path, BASE) for path in SPLITS)
    with checkpoints.shared(fingerprint(options, lora, quantization)) as saved:
        saved.forget_if_recorded(Path("dvc.lock"), "train")
        require_files(BASE, base_record(BASE)["files"])
        if keeps_head(options) and group.from_first(saved.latest() is None):
            report_other_texts()
            report_unquantized(options, lora, quantization, validation)
        model = build(options, lora, quantization)
        report_precisions(model, quantization)
        require_length(model.get_base_model().config, BASE, max_length)
        trainer = RewardTrainer(model, options, saved, steps(options, train), validation, REPORTS)
        for dataset in (train, validation):
            require_exact(model, full_pack([dataset], trainer.tokens_per_pack))
        trainer.fit(new_head=not keeps_head(options))
        if group.leads():
            write(trainer, options, lora, quantization)
            report(trainer, options)
            saved.finish(METRICS)


def useful(gpus: int) -> int:
    """How many of these GPUs would have work: at most as many as the first step has packs."""
    options = params.load("train", Train)
    if options.tokens_per_pack == "auto":
        return gpus
    first = steps(options, tokenized.load(SPLITS[0], BASE))[0]
    return at_work(first, options.tokens_per_pack, gpus, called="GPUs")


def require_possible(options: Train) -> None:
    """Raises a Fault for values that contradict each other."""
    if options.save_steps % options.logging_steps:
        raise Fault(
            f"params.yaml: train.save_steps is {options.save_steps}, must be a multiple of "
            f"train.logging_steps, {options.logging_steps}, so that no curve has a gap after a kill"
        )
    if options.lr_scheduler_type == "polynomial" and options.learning_rate <= 1e-7:
        raise Fault(
            f"params.yaml: train.learning_rate is {options.learning_rate}, must be above 1e-07, at "
            "which train.lr_scheduler_type polynomial ends"
        )


def report_precision(quantization: Quantization) -> None:
    """Print a note if `auto` means fp32 on a processor that is faster in bf16."""
    if quantization.compute_dtype == "auto" and device().type == "cpu" and multiplies_bf16():
        print(
            "precision  fp32, the choice of auto on a CPU; bf16 would be faster on this processor, "
            "with coarser rounding: dvc exp run -S quantization.compute_dtype=bfloat16"
        )


def fingerprint(options: Train, lora: Lora, quantization: Quantization) -> str:
    """A hash of everything that determines the bytes of the result."""
    return checkpoints.fingerprint(
        {
            "train": asdict(options) | {"optim": optimizer(options)},
            "lora": asdict(lora),
            "quantization": asdict(quantization) | {"compute_dtype": str(quantization.dtype)},
            "device": device().type,
        },
        [BASE / "base.json", *SPLITS, TOKENIZED / "template.json"],
    )


def require_same_source() -> None:
    """Raises a Fault if models/base came from a local folder whose files have changed since.

    A missing folder is accepted, because another machine may have models/base only.
    """
    base = base_record(BASE)
    if base["kind"] != "local":
        return
    folder = Path(base["name"]).expanduser()
    if not folder.is_dir():
        print(f"base       {base['name']} no longer exists; {BASE} is used as it is")
        return
    if changed := changed_files(folder, base["source"]):
        raise Fault(
            f"params.yaml: base.name {base['name']} has changed since it was copied to {BASE} "
            f"({', '.join(changed)}); run dvc repro --force --single-item fetch first"
        )


def keeps_head(options: Train) -> bool:
    """Whether training continues with the head of a base that already is a reward model."""
    return options.head == "auto" and has_head(BASE)


def build(options: Train, lora: Lora, quantization: Quantization) -> PeftModel:
    """The model with new adapters, and a new head or the base's. Seeds the random state."""
    torch.set_num_threads(threads())
    # cuBLAS reads this variable when it is first used.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # With warn_only=True attention would still use the kernels that differ from run to run.
    torch.use_deterministic_algorithms(options.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    set_seed(options.seed)
    model = load_base(BASE, quantization)
    if keeps_head(options):
        set_head(model, head_of(model).weight)
    else:
        new_head(model, options.seed)
    return add_lora(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # scaling is alpha / r, a float
            lora_dropout=lora.lora_dropout,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            target_modules=lora.target_modules,
        ),
    )


def report_other_texts() -> None:
    """Print a note if the base's head was trained on texts of another template than the data has.

    An export records its template, and its chat template renders the same texts. Any other reward
    model was probably trained with its chat template.
    """
    used = recorded(TOKENIZED / "template.json")
    chat = recorded(BASE / "tokenizer_config.json").get("chat_template")
    export = recorded(BASE / "config.json").get("reward_model")
    if isinstance(export, dict):
        before, trained = {name: export.get(name) for name in ("template", "append_eos")}, "trained"
    elif chat:
        before, trained = {"template": "chat"}, "probably trained"
    else:
        return
    now = {name: used[name] for name in before}
    # The base's own template renders the texts of its training, with their eos. If it prints a
    # date, preprocess has put a macro before it.
    if chat and (used["chat_template"] or "").endswith(chat):
        now = {name: before[name] or now[name] for name in before}
    elif used["chat_template"]:
        now["template"] = "chat with another chat_template"
    if differing := [name for name in before if before[name] != now[name]]:
        was, has = (
            " and ".join(
                f"preprocess.{name} {json.dumps(settings[name], ensure_ascii=False)}"
                for name in differing
            )
            for settings in (before, now)
        )
        print(
            f"note       the base's head was {trained} with {was}, but the data has {has}; its "
            "rewards are worse on other texts"
        )


def report_unquantized(
    options: Train, lora: Lora, quantization: Quantization, validation: Dataset
) -> None:
    """Print the figures of the unquantized base, to compare with those in 4 bits.

    Used for a base that already is a reward model. It is loaded as it is stored, and released.
    """
    if quantization.bits == "none":
        return
    plain = Quantization.unquantized(quantization.compute_dtype)
    size = TOKENS_ON_A_CPU if options.tokens_per_pack == "auto" else options.tokens_per_pack
    found = None
    model = within_memory(build, options, lora, plain)
    if group.minimum(model is not None) and model:
        found = within_memory(figures, model, validation_step(validation, options), size)
    if found:
        print(line_of("unquantized", found))
    else:
        print("note       the unquantized base does not fit in memory, so its figures are left out")
    del model
    gc.collect()
    torch.cuda.empty_cache()


def report_precisions(model: PeftModel, quantization: Quantization) -> None:
    """Print the precisions of the base, because not all parameters get the requested one."""
    bits, half, full = (f"{count:,}" for count in precisions(model).values())
    print(f"base       {bits} parameters in 4 bits, {half} in half and {full} in full precision")
    if quantization.bits == 4 and (experts := fused_experts(model)):
        print(
            f"note       {experts:,} parameters are in experts, which bitsandbytes does not "
            "quantize"
        )


def steps(options: Train, dataset: Dataset) -> Steps:
    """The steps of the whole training."""
    rows = planned(
        dataset[PROMPT_ID][:],
        options.pairs_per_step,
        options.step_of,
        options.num_train_epochs,
        options.max_steps,
        options.seed,
    )
    return Steps(dataset, rows)


def write(trainer: RewardTrainer, options: Train, lora: Lora, quantization: Quantization) -> None:
    """Write the adapter with the record of its training, the curves and the metrics."""
    history = trainer.state.log_history
    parameters = precisions(trainer.reward_model)
    with whole_folder(ADAPTER) as folder:
        save(trainer.reward_model, folder, str(BASE), quantization)
        copy_file(TOKENIZED / "template.json", folder / "template.json")
        write_json(
            folder / "training.json",
            {
                "train": asdict(options),
                "lora": asdict(lora),
                "quantization": asdict(quantization),
                "base_parameters": parameters,
                "pairs": len(trainer.steps.dataset),
                "data": digests(TOKENIZED / "train"),
            },
        )
        seal(folder, BASE)
    trainable, _ = trainer.reward_model.get_nb_trainable_parameters()
    last, kept = trainer.state.global_step, trainer.kept
    with whole_folder(REPORTS) as folder:
        write_curves(folder, history)
        write_json(
            folder / "figures.json",
            {
                "steps": last,
                "base_parameters": parameters,
                "trainable_parameters": trainable,
                "validation": kept,
            },
        )
    # `dvc exp show --drop '.*/.*'` leaves out the names with a slash.
    validation = {f"validation/{name}": kept[name] for name in ("accuracy", "loss", "step")}
    write_json(METRICS, {"steps": last} | validation)


def report(trainer: RewardTrainer, options: Train) -> None:
    """Print the figures of the weights that are kept."""
    kept = trainer.kept
    if options.keep == "best":
        print(f"kept       the adapter of step {kept['step']} of {trainer.state.global_step}")
    decided = int(trainer.validation.labels.decided.sum())
    print(
        f"validation accuracy {kept['accuracy']:.4f}, loss {kept['loss']:.4f}, "
        f"margin {kept['margin']:+.4f} of {counted(decided, 'pair')}"
    )
    print(f"trained    {ADAPTER}; dvc plots show draws the curves, also during training")


if __name__ == "__main__":
    run_stage(
        "stages.train", __doc__, lambda: distribute(main, "stages.train", useful, machines=True)
    )
