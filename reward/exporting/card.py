"""The model card of an exported folder: what it is, of what, how good, and how to load it."""

import json
import re
from pathlib import Path
from typing import Any

from reward.exporting.exported import EXPORTED_BASE, MERGED, REWARD
from reward.outputs import read_json

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

{name}, {revision}, {quantization}. The adapter is right on this base, quantized in this way, alone:
on other weights, and merged by PEFT into 4 bits, it gives other rewards.

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

A reward is the logit at the last token of a text. The tokenizer's chat template makes the text of a
prompt and an answer as the model was trained on it; its pad token, {pad}, occurs in no text. On the
test pairs the rewards have mean {mean:.4f} and deviation {std:.4f}, and the probability that one
answer is preferred to another is sigmoid((reward - other) / {temperature:.3f}). These figures are
in `reward.json`, and as `reward_model` in the configuration of the merged model.

{use}
## Limits

Rewards order answers to one prompt; across prompts, and outside of the languages, subjects and
lengths of the data above, they mean little. Nobody checked the model for fairness or safety.
"""

PEFT = """\
from contextlib import chdir

from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer{quantization}

folder = "models/export"
with chdir(folder):  # the adapter may name its base by a path within the folder
    model = AutoPeftModelForSequenceClassification.from_pretrained("."{arguments}).eval()
for module in model.modules():  # some CPUs would compute in bf16, or fail
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
tokenizer = AutoTokenizer.from_pretrained(folder)

prompt, answers = "怎么煮鸡蛋？", ["冷水下锅，水开后煮八分钟。", "不知道。"]
chats = [
    [{{"role": "user", "content": prompt}}, {{"role": "assistant", "content": answer}}]
    for answer in answers
]
batch = tokenizer.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt")
rewards = model(**batch.to(model.device)).logits[:, 0].tolist()
print(rewards)
"""

# What plain loaders must be told of a base that is the Hub's.
OF_THE_HUB = """,
        num_labels=1,
        pad_token_id={pad},
        dtype="{dtype}",
        quantization_config={recipe},
    """

TRANSFORMERS = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "models/export/merged"
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

prompt, answers = "怎么煮鸡蛋？", ["冷水下锅，水开后煮八分钟。", "不知道。"]
chats = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    for answer in answers
]
batch = tokenizer.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt")
rewards = model(**batch).logits[:, 0].tolist()
print(rewards)
"""

PIPELINE = """\
from transformers import pipeline

scorer = pipeline("text-classification", "models/export/merged")

prompt, answers = "怎么煮鸡蛋？", ["冷水下锅，水开后煮八分钟。", "不知道。"]
texts = [
    scorer.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        tokenize=False,
    )
    for answer in answers
]
rewards = [each["score"] for each in scorer(texts, batch_size=2, add_special_tokens=False)]
print(rewards)
"""

CROSS_ENCODER = """\
from sentence_transformers import CrossEncoder

model = CrossEncoder("models/export/merged")
prompt, answers = "怎么煮鸡蛋？", ["冷水下锅，水开后煮八分钟。", "不知道。"]
rewards = model.predict([(prompt, answer) for answer in answers]).tolist()
print(rewards, model.rank(prompt, answers))
"""

GRPO = """\
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

prompts = ["怎么煮鸡蛋？", "How do I boil an egg?"]
trainer = GRPOTrainer(
    "models/base",  # the model to be trained
    "models/export/merged",
    args=GRPOConfig(
        "models/policy",
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=16,
        bf16=False,
        report_to="none",
    ),
    train_dataset=Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": prompt}] for prompt in prompts]}
    ),
)
trainer.train()
"""

REWARD_TRAINER = """\
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

question = [{"role": "user", "content": "怎么煮鸡蛋？"}]
pairs = Dataset.from_list(
    [
        {
            "chosen": [*question, {"role": "assistant", "content": "冷水下锅，水开后煮八分钟。"}],
            "rejected": [*question, {"role": "assistant", "content": "不知道。"}],
        }
    ]
)
trainer = RewardTrainer(
    "models/export/merged",
    RewardConfig("models/judge", bf16=False, max_length=None, report_to="none"),
    train_dataset=pairs,
    eval_dataset=pairs,
)
figures = trainer.evaluate()
print(figures)
"""

OF_MERGED = {
    "transformers": TRANSFORMERS,
    "transformers pipeline": PIPELINE,
    "sentence-transformers": CROSS_ENCODER,
    "TRL, as the reward of GRPO": GRPO,
    "TRL, to judge pairs": REWARD_TRAINER,
}


def snippets(folder: Path) -> dict[str, str]:
    """Code for each client of an exported folder, by the client's name."""
    peft = PEFT.format(quantization="", arguments="")
    if not (folder / EXPORTED_BASE).is_dir():
        reward, recipe = (read_json(folder / name) for name in (REWARD, "quantization.json"))
        as_code = ", ".join(f"{key}={value!r}" for key, value in (recipe or {}).items())
        peft = PEFT.format(
            quantization=", BitsAndBytesConfig" if recipe else "",
            arguments=OF_THE_HUB.format(
                pad=reward["pad_token_id"],
                dtype=reward["dtype"],
                recipe=f"BitsAndBytesConfig({as_code})" if recipe else None,
            ),
        )
    return {"PEFT": peft} | (OF_MERGED if (folder / MERGED).is_dir() else {})


def render(folder: Path, base: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The card of a folder; nothing in it is of this machine."""
    template, training, recipe, reward = (
        read_json(folder / name)
        for name in ("template.json", "training.json", "quantization.json", REWARD)
    )
    hub = base["kind"] == "hub"
    name = Path(base["name"]).name if base["kind"] == "local" else base["name"]
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
        metrics=table(figures(metrics)),
        slices="\n".join(slices(metrics)),
        parameters=json.dumps(
            {name: training[name] for name in ("quantization", "lora", "train")}, indent=2
        ),
        pad=span(read_json(folder / "tokenizer_config.json")["pad_token"]),
        use="\n".join(
            f"### {client}\n\n```python\n{code}```\n" for client, code in snippets(folder).items()
        ),
        **{key: reward[key] for key in ("mean", "std", "temperature")},
    )


def figures(metrics: dict[str, Any]) -> dict[str, Any]:
    low, high = metrics["accuracy_low"], metrics["accuracy_high"]
    return {
        "pairwise accuracy (95% interval)": f"{metrics['accuracy']:.4f} ({low:.4f} to {high:.4f})",
        "ties": metrics["ties"],
        "loss": f"{metrics['loss']:.4f}",
        "mean margin": f"{metrics['margin_mean']:.4f}",
        "deviation of the margin": f"{metrics['margin_std']:.4f}",
    }


def slices(metrics: dict[str, Any]) -> list[str]:
    """A row for every slice, with its interval."""
    return [
        f"| {cell(f'{column}: {value}')} | {found['accuracy']:.4f} "
        f"| {found['low']:.4f} to {found['high']:.4f} | {found['pairs']} |"
        for column, values in metrics["by"].items()
        for value, found in values.items()
    ]


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
