"""Export the reward model: the adapter with all that is needed to use it, checked after reloading.

    python -m stages.export

Reads models/base, models/adapter, data/tokenized/test and what evaluate wrote. Writes models/export
and metrics/export.json, or nothing: this process, which has seen no model yet, loads the folder,
and its rewards must be those that were evaluated.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
from datasets import Dataset

from stages import params
from stages.model import DIGESTS, Quantization, base_record, load, require_sealed, score, seal
from stages.outputs import read_json, recorded, whole_folder, write_json
from stages.packing import load_split, pairs_of
from stages.pairwise import sides
from stages.params import Positive, ZeroOrMore
from stages.process import Fault, run

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
EXPORT = Path("models/export")
TEST = Path("data/tokenized/test")
REWARDS = Path("reports/evaluate/rewards.parquet")
EVALUATED = Path("metrics/evaluate.json")
METRICS = Path("metrics/export.json")

Rewards = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Export:
    """The group `export` of params.yaml, where each key is described."""

    tokens_per_pack: Positive
    tolerance: ZeroOrMore


def main() -> None:
    group = params.load("export", Export)
    quantization = params.load("quantization", Quantization)
    test = load_split(TEST, BASE)
    with whole_folder(EXPORT) as folder:
        assemble(folder, quantization)
        model = load(BASE, folder, quantization)
        pairs = pairs_of(test)
        chosen, rejected = sides(score(model, pairs, group.tokens_per_pack))
        metrics = compare(test, (chosen.numpy(), rejected.numpy()), group)
    write_json(METRICS, metrics)
    print(
        f"reloaded   {metrics['pairs']} pairs: rewards differ from the evaluated ones by at most "
        f"{metrics['difference_max']:.2g}, {metrics['flips']} orders changed"
    )
    print(f"exported   {EXPORT}; {EXPORT}/README.md says how to load it")


def assemble(folder: Path, quantization: Quantization) -> None:
    """Adapter, tokenizer, template and model card. Raises a Fault for a damaged adapter."""
    require_sealed(ADAPTER, BASE)
    base = base_record(BASE)
    for path in sorted(ADAPTER.iterdir()):
        if path.name != DIGESTS:
            shutil.copyfile(path, folder / path.name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BASE / name, folder / name)
    config = read_json(folder / "adapter_config.json")
    if base["kind"] == "hub":
        config["base_model_name_or_path"] = base["name"]
        config["revision"] = base["revision"]
    write_json(folder / "adapter_config.json", config)
    (folder / "README.md").write_text(card(base, folder, quantization), encoding="utf-8")
    seal(folder, BASE)


def compare(test: Dataset, found: tuple[Rewards, Rewards], group: Export) -> dict[str, Any]:
    """The content of metrics/export.json. Raises a Fault where rewards differ too much."""
    try:
        table = pyarrow.parquet.read_table(REWARDS)
    except (OSError, pyarrow.ArrowException) as error:
        raise Fault(f"{REWARDS} cannot be read ({error}), wanted what evaluate writes") from None
    if table["id"].to_pylist() != list(test["id"]):
        raise Fault(f"{REWARDS} holds other pairs than {TEST}, wanted the same; run dvc repro")
    wanted = [table[f"reward_{side}"].to_numpy() for side in ("chosen", "rejected")]
    difference = np.abs(np.stack(found) - np.stack(wanted))
    flips = np.sign(found[0] - found[1]) != np.sign(wanted[0] - wanted[1])
    if not difference.max() <= group.tolerance:
        raise Fault(
            f"{EXPORT}: reloaded, its rewards differ from {REWARDS} by up to "
            f"{difference.max():.3g}, at most {group.tolerance} is allowed (export.tolerance)"
        )
    return {
        "pairs": len(table),
        "difference_max": float(difference.max()),
        "difference_mean": float(difference.mean()),
        "flips": int(flips.sum()),
    }


# --- the model card --------------------------------------------------------------------------


CARD = """\
---
library_name: peft
pipeline_tag: text-classification
tags:
- reward-model
- lora
{front}---

# Reward model over {name}

A scalar reward of an answer to a prompt: the higher, the better a person would like it. A LoRA
adapter with a scalar head, trained with -log sigmoid(r_chosen - r_rejected).

## Base

{name}, {revision}, {quantization}. The adapter is right on this base, quantized in this way, alone.

| file of the base | SHA-256 |
|---|---|
{files}

## Data

{pairs} training pairs, as text: {template}{eos}, at most {max_length} tokens. The tokenized
training set:

| file | SHA-256 |
|---|---|
{data}

## Metrics

On {test_pairs} test pairs whose prompts were not trained on:

| metric | value |
|---|---|
{metrics}

| slice | accuracy | 95% interval | pairs |
|---|---|---|---|
{slices}

## Parameters

```json
{parameters}
```

## Use

```python
{code}```

## Limits

Rewards order answers to one prompt; across prompts, and outside of the languages, subjects and
lengths of the data above, they mean little. Nobody checked the model for fairness or safety.
"""

CODE = """\
import json

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

folder, base = "models/export", {base}
with open(f"{{folder}}/quantization.json") as file:
    recipe = json.load(file)
with open(f"{{folder}}/template.json") as file:
    template = json.load(file)
model = AutoModelForSequenceClassification.from_pretrained(
    base, {revision}num_labels=1, dtype={dtype},
    quantization_config=BitsAndBytesConfig(**recipe) if recipe else None,
)
model.config.pad_token_id = None  # one text at a time: its last token is the one that counts
model = PeftModel.from_pretrained(model, folder).eval()
for module in model.modules():  # some CPUs would compute in bf16
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
tokenizer = AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def reward(prompt: str, answer: str) -> float:
    {render}
    if template["append_eos"] and ids[-1] != tokenizer.eos_token_id:
        ids = ids + [tokenizer.eos_token_id]
    return model(input_ids=torch.tensor([ids], device=model.device)).logits.item()


print(reward("怎么煮鸡蛋？", "冷水下锅，水开后煮八分钟。"))
"""

RENDER_TEXT = """\
head, rest = template["template"].split("{prompt}")
    middle, tail = rest.split("{answer}")
    ids = tokenizer(head + prompt + middle + answer + tail)["input_ids"]"""

RENDER_CHAT = """\
messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]"""


def card(base: dict[str, Any], folder: Path, quantization: Quantization) -> str:
    """The model card of the folder; nothing in it is of this machine."""
    template, training = (read_json(folder / name) for name in ("template.json", "training.json"))
    metrics, hub = recorded(EVALUATED), base["kind"] == "hub"
    recipe = read_json(folder / "quantization.json")
    low, high = metrics["accuracy_low"], metrics["accuracy_high"]
    rows = {
        "pairwise accuracy (95% interval)": f"{metrics['accuracy']:.4f} ({low:.4f} to {high:.4f})",
        "ties": metrics["ties"],
        "loss": f"{metrics['loss']:.4f}",
        "mean margin": f"{metrics['margin_mean']:.4f}",
        "deviation of the margin": f"{metrics['margin_std']:.4f}",
    }
    slices = [
        f"| {cell(f'{column}: {value}')} | {figures['accuracy']:.4f} "
        f"| {figures['low']:.4f} to {figures['high']:.4f} | {figures['pairs']} |"
        for column, values in metrics["by"].items()
        for value, figures in values.items()
    ]
    name = Path(base["name"]).name if base["kind"] == "local" else base["name"]
    code = CODE.format(
        base=json.dumps(base["name"] if hub else BASE.as_posix()),
        revision=f'revision="{base["revision"]}", ' if hub else "",
        dtype=quantization.dtype,
        render=RENDER_CHAT if template["template"] == "chat" else RENDER_TEXT,
    )
    return CARD.format(
        front=f"base_model: {json.dumps(base['name'])}\n" if hub else "",
        name=cell(name),
        revision=f"commit {base['revision']}" if hub else base["revision"],
        quantization=f"{recipe['bnb_4bit_quant_type'].upper()}" if recipe else "not quantized",
        files=table(base["files"]),
        pairs=training["pairs"],
        template=span(json.dumps(template["template"], ensure_ascii=False)),
        eos=" and the end-of-sequence token" if template["append_eos"] else "",
        max_length=template["max_length"],
        data=table(training["data"]),
        test_pairs=metrics["pairs"],
        metrics=table(rows),
        slices="\n".join(slices),
        parameters=json.dumps(
            {name: training[name] for name in ("quantization", "lora", "train")}, indent=2
        ),
        code=code,
    )


def table(rows: dict[str, Any]) -> str:
    return "\n".join(f"| {cell(name)} | {cell(str(value))} |" for name, value in rows.items())


def span(text: str) -> str:
    """Text as inline code, between more backticks than it has in a row itself."""
    marks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{marks} {text} {marks}"


def cell(text: str) -> str:
    """Text that stays within its cell of a Markdown table and is shown as it is."""
    escaped = "".join(f"\\{mark}" if mark in "\\`*_{}[]<>()#|!" else mark for mark in text)
    return " ".join(escaped.split())


if __name__ == "__main__":
    run(main)
