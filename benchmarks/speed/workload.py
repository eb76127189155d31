"""What all contenders work on: the base, the pairs, and the initial adapter and head."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks import random_base
from benchmarks.speed.hardware import HARDWARE, QUANTIZATION
from reward.data.records import BadRecord, check
from reward.data.sources import sources
from reward.data.tokens import Encoder, Template
from reward.model.base import add_lora, load_base, load_stock, new_head
from reward.model.packing import Texts, texts_of
from reward.model.trainer import HEAD_PAIRS, scale_head
from reward.outputs import read_json
from reward.process import Fault, counted

LONGEST, PROMPTS_PER_STEP = 2040, 8

# Text lengths in tokens, at the 50th, 90th and 99th percentile of a human-preference dataset.
# The ends are a tenth of the median and twice the 99th percentile.
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
DENSE = replace(QUANTIZATION, bits="none")
TARGETS = ["k_proj", "q_proj", "v_proj"]


@dataclass(frozen=True)
class Workload:
    """What all contenders work on.

    `dense` is the dequantized base, if TRL needs it; `adapter` is a file with the initial adapter
    and head. `prompts` has the texts of each prompt, the same number for all, from best to worst.
    `linear` has the [outputs, inputs] of each linear layer of the decoder.
    """

    base: Path
    dense: Path
    adapter: Path
    prompts: list[Texts]
    linear: list[tuple[int, int]]
    tokens_per_pack: int
    prompts_per_step: int

    @property
    def answers(self) -> int:
        return len(self.prompts[0].ids)

    @property
    def pairs_per_prompt(self) -> int:
        return comb(self.answers, 2)

    @property
    def pairs_per_step(self) -> int:
        return self.prompts_per_step * self.pairs_per_prompt

    @property
    def counted(self) -> int:
        """The number of pairs in all steps except the first, which is not counted."""
        return (len(self.prompts) - self.prompts_per_step) * self.pairs_per_prompt

    def steps(self) -> Iterator[list[Texts]]:
        """The prompts of each optimizer step."""
        for start in range(0, len(self.prompts), self.prompts_per_step):
            yield self.prompts[start : start + self.prompts_per_step]


def prepare(options: argparse.Namespace, scratch: Path) -> Workload:
    """Make or read base and pairs, and write what all contenders start from to `scratch`."""
    base = options.base
    if not base:
        base = scratch / "base"
        random_base.make(base, SHAPE)
    longest = min(LONGEST, read_json(base / "config.json").get("max_position_embeddings", LONGEST))
    if options.data:
        prompts = drawn(options, base, longest)
    else:
        prompts = generated(
            options.prompts, options.answers, options.seed, usable_ids(base), longest
        )
    packed = load_base(base, QUANTIZATION)
    linear = linear_shapes(packed)
    model = with_adapter(packed)
    first = [texts_of(texts.ids[:2]) for texts in prompts[:HEAD_PAIRS]]
    scale_head(model, first, options.tokens_per_pack)
    save_file(
        {
            name: weight.detach()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        },
        scratch / "adapter.safetensors",
    )
    if HARDWARE.trl_dense:
        load_stock(base, QUANTIZATION).dequantize().save_pretrained(scratch / "dense")
    return Workload(
        base,
        scratch / "dense",
        scratch / "adapter.safetensors",
        prompts,
        linear,
        options.tokens_per_pack,
        options.prompts_per_step,
    )


def linear_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """The [outputs, inputs] of each linear layer of the decoder."""
    return [
        (module.out_features, module.in_features)
        for module in model.base_model.modules()
        if isinstance(module, nn.Linear)
    ]


def generated(count: int, answers: int, seed: int, ids: Sequence[int], longest: int) -> list[Texts]:
    """Prompts of random ids with the lengths of a human-preference dataset, up to `longest`.

    Lengths are a stratified sample of their distribution, so even a few prompts have its
    percentiles. Answers differ in their first id, so they share exactly the prefix.
    """
    draw = np.random.default_rng(seed)
    known = np.asarray(ids)
    sizes = [
        lengths(quantiles, (draw.permutation(count) + draw.random(count)) / count)
        for quantiles in (PREFIX, *[ANSWER] * answers)
    ]
    prompts = []
    for prefix, *own in zip(*sizes, strict=True):
        own = [min(size, longest // 2) for size in own]
        prefix = min(prefix, longest - max(own))
        shared = draw.choice(known, prefix).tolist()
        begins = draw.choice(known, answers, replace=False).tolist()
        texts = [
            [*shared, begin, *draw.choice(known, size - 1).tolist()]
            for begin, size in zip(begins, own, strict=True)
        ]
        prompts.append(Texts(texts, prefix))
    return prompts


def lengths(quantiles: dict[float, int], shares: Any) -> list[int]:
    """The quantile function at `shares`; log lengths are interpolated linearly."""
    logs = np.log(list(quantiles.values()))
    found: list[int] = np.exp(np.interp(shares, list(quantiles), logs)).round().astype(int).tolist()
    return found


def usable_ids(base: Path) -> list[int]:
    """All ids of a base except the special ones, which may be padding."""
    special = set(AutoTokenizer.from_pretrained(base).all_special_ids)
    return [
        id_ for id_ in range(read_json(base / "config.json")["vocab_size"]) if id_ not in special
    ]


def drawn(options: argparse.Namespace, base: Path, longest: int) -> list[Texts]:
    """Pairs of preference files, drawn at random from those that can be used.

    Of a record with several comparisons, only the first is used.
    """
    # Where a base has its chat template, if fetch has not written it.
    jinja = base / "chat_template.jinja"
    chat = jinja if jinja.is_file() else None
    encoder = Encoder(base, Template.of(options.template, False, longest, base, chat))
    records = [(source, *found) for source in sources(options.data) for found in source]
    pairs: list[Texts] = []
    bad = ""
    for index in np.random.default_rng(options.seed).permutation(len(records)):
        try:
            source, position, content = records[index]
            record = check(source.raw(position, content))
            first = record.comparisons[:1]
            answers = [record.answers[place] for each in first for place in (each.j, each.k)]
            texts = [encoder.render(record.prompt, answer) for answer in answers]
        except BadRecord as fault:
            bad = f" (a bad record: {fault})"
            continue
        if not texts:  # a tie of equal answers
            continue
        chosen, rejected = encoder.encode(texts)
        if chosen != rejected and max(len(chosen), len(rejected)) <= longest:
            pairs.append(texts_of((chosen, rejected)))
        if len(pairs) == options.prompts:
            return pairs
    raise Fault(
        f"{options.data} has {counted(len(pairs), 'usable pair')} of at most {longest} tokens with "
        f"the template {options.template}{bad}, expected {options.prompts}; lower --prompts"
    )


def with_adapter(
    model: PreTrainedModel,
    workload: Workload | None = None,
    add: Callable[[PreTrainedModel, LoraConfig], Any] = add_lora,
) -> PeftModel:
    """The base with the adapter and head of the workload, or with new ones."""
    new_head(model, seed=0)
    config = LoraConfig(
        TaskType.SEQ_CLS, r=4, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS
    )
    torch.manual_seed(0)
    adapted: PeftModel = add(model, config)
    if workload:
        found = adapted.load_state_dict(load_file(workload.adapter), strict=False)
        if found.unexpected_keys:
            raise ValueError(
                f"{workload.adapter} has {found.unexpected_keys}, which the model lacks"
            )
    return adapted
