"""Train LoRA and the scalar head on the preference pairs.

    python -m stages.train

Reads data/tokenized/{train,validation} and models/base. Writes models/adapter (adapter with head,
template.json, quantization.json, training.json), the curves in reports/train, which grow while it
trains, and metrics/train.json. Progress is kept in models/checkpoints: a run that was killed goes
on where it was, and ends with the same bytes.
"""

import gc
import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import set_seed

from reward import params
from reward.data import tokenized
from reward.data.columns import IDS, PROMPT_ID
from reward.model import checkpoints, group
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
from reward.model.plain import require_length
from reward.model.scoring import require_exact, within_memory
from reward.model.steps import Steps, planned
from reward.model.trainer import (
    TOKENS_ON_A_CPU,
    RewardTrainer,
    Train,
    figures,
    full_pack,
    line_of,
    optimizer,
    validation_step,
    write_curves,
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
from reward.process import Fault, run, threads

BASE = Path("models/base")
TOKENIZED = Path("data/tokenized")
SPLITS = [TOKENIZED / "train", TOKENIZED / "validation"]
ADAPTER = Path("models/adapter")
REPORTS = Path("reports/train")
METRICS = Path("metrics/train.json")


@dataclass(frozen=True)
class Lora:
    """The group `lora` of params.yaml, where each key is described."""

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
    require_same_source()
    report_precision(quantization)
    most = recorded(TOKENIZED / "template.json")["max_length"]
    train, validation = (tokenized.load(path, BASE) for path in SPLITS)
    with checkpoints.shared(fingerprint(options, lora, quantization)) as saved:
        saved.forget_if_recorded(Path("dvc.lock"), "train")
        require_files(BASE, base_record(BASE)["files"])
        if goes_on(options) and group.from_first(saved.latest() is None):
            tell_unquantized(options, lora, quantization, validation)
        model = build(options, lora, quantization)
        tell_precisions(model, quantization)
        require_length(model.get_base_model().config, BASE, most)
        trainer = RewardTrainer(model, options, saved, steps(options, train), validation, REPORTS)
        for dataset in (train, validation):
            require_fit(model, dataset)
            require_exact(model, full_pack(dataset, trainer.tokens_per_pack))
        trainer.fit(new_head=not goes_on(options))
        if group.leads():
            write(trainer, options, lora, quantization)
            saved.finish(METRICS)


def useful(gpus: int) -> int:
    """Of that many GPUs, how many have work: the packs of a step, as the first one says."""
    options = params.load("train", Train)
    if options.tokens_per_pack == "auto":
        return gpus
    first = steps(options, tokenized.load(SPLITS[0], BASE))[0]
    packs = len(first.packs(options.tokens_per_pack))
    if packs < gpus:
        print(
            f"processes  {packs} on {gpus} GPUs: a step has no more packs to share; raise "
            "train.pairs_per_step or lower train.tokens_per_pack for more"
        )
    return min(packs, gpus)


def require_possible(options: Train) -> None:
    """Raises a Fault for values that do not go together, or ask for what is not installed."""
    if options.save_steps % options.logging_steps:
        raise Fault(
            f"params.yaml: train.save_steps is {options.save_steps}, must be a multiple of "
            f"train.logging_steps, {options.logging_steps}, so that no curve has a gap after a kill"
        )
    if options.report_to != "none" and not find_spec(options.report_to):
        raise Fault(
            f"params.yaml: train.report_to is {options.report_to}, which is not installed here; "
            f"pip install {options.report_to}, or none"
        )


def report_precision(quantization: Quantization) -> None:
    """Say where `auto` computes in fp32 on a processor that is faster in bf16."""
    if quantization.compute_dtype == "auto" and device().type == "cpu" and multiplies_bf16():
        print(
            "precision  fp32, as auto is on a CPU; this processor would be faster in bf16, at its "
            "rounding: dvc exp run -S quantization.compute_dtype=bfloat16"
        )


def fingerprint(options: Train, lora: Lora, quantization: Quantization) -> str:
    """What stands for all that decides the bytes of the result."""
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


def goes_on(options: Train) -> bool:
    """Whether training goes on from the head of a base that is a reward model already."""
    return options.head == "auto" and has_head(BASE)


def build(options: Train, lora: Lora, quantization: Quantization) -> PeftModel:
    """The model with fresh adapters, and a fresh head or the base's. Seeds the random state."""
    torch.set_num_threads(threads())
    # cuBLAS reads it when it is first used.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # Where it may only warn, attention takes the kernels that differ from run to run.
    torch.use_deterministic_algorithms(options.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    set_seed(options.seed)
    model = load_base(BASE, quantization)
    if goes_on(options):
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


def tell_unquantized(
    options: Train, lora: Lora, quantization: Quantization, validation: Dataset
) -> None:
    """Print the figures of a base that is a reward model, to be held beside those in 4 bits.

    It is loaded for that as it is stored, and let go again.
    """
    if quantization.bits == "none":
        return
    plain = Quantization.unquantized(quantization.compute_dtype)
    model = within_memory(build, options, lora, plain)
    if group.minimum(model is not None) and model:
        size = TOKENS_ON_A_CPU if options.tokens_per_pack == "auto" else options.tokens_per_pack
        print(line_of("unquantized", figures(model, validation_step(validation, options), size)))
    else:
        print(
            "note       memory does not hold the base unquantized, so its own figures are not here"
        )
    del model
    gc.collect()
    torch.cuda.empty_cache()


def tell_precisions(model: PeftModel, quantization: Quantization) -> None:
    """Print in how many bits the base is, because what is asked for is not what all of it gets."""
    bits, half, full = (f"{count:,}" for count in precisions(model).values())
    print(f"base       {bits} parameters in 4 bits, {half} in half and {full} in full precision")
    if quantization.bits == 4 and (experts := fused_experts(model)):
        print(f"note       {experts:,} are in experts, which bitsandbytes does not quantize")


def require_fit(model: PeftModel, dataset: Dataset) -> None:
    """Raises a Fault for an id that the base does not know."""
    config: Any = model.get_base_model().config
    largest = max(pc.max(pc.list_flatten(dataset.data[name])).as_py() for name in IDS)
    if largest >= config.vocab_size:
        raise Fault(
            f"{TOKENIZED} has the id {largest}, {BASE} knows {config.vocab_size} ids; "
            "wanted a tokenizer that belongs to the model"
        )


def steps(options: Train, dataset: Dataset) -> Steps:
    """The steps of the whole training."""
    rows = planned(
        dataset[PROMPT_ID],
        options.pairs_per_step,
        options.step_of,
        options.num_train_epochs,
        options.max_steps,
        options.seed,
    )
    return Steps(dataset, rows)


def write(trainer: RewardTrainer, options: Train, lora: Lora, quantization: Quantization) -> None:
    """Write the adapter with what it was trained from, the curves and the metrics."""
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
    steps, kept = trainer.state.global_step, trainer.kept
    with whole_folder(REPORTS) as folder:
        write_curves(folder, history)
        write_json(
            folder / "figures.json",
            {
                "steps": steps,
                "base_parameters": parameters,
                "trainable_parameters": trainable,
                "validation": kept,
            },
        )
    # A name with a slash is left out of a short table: --drop '.*/.*'.
    validation = {f"validation/{name}": kept[name] for name in ("accuracy", "loss", "step")}
    write_json(METRICS, {"steps": steps} | validation)
    if options.keep == "best":
        print(f"kept       the adapter of step {kept['step']} of {steps}")
    print(
        f"validation accuracy {kept['accuracy']:.4f}, loss {kept['loss']:.4f}, "
        f"margin {kept['margin']:+.4f} of {len(trainer.validation.labels)} pairs"
    )
    print(f"trained    {ADAPTER}; dvc plots show draws the curves, here and while it trains")


if __name__ == "__main__":
    run(lambda: distribute(main, "stages.train", useful, machines=True))
