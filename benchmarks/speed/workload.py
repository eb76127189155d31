"""What all contenders work on: base, pairs, first adapter and head."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from reward.data.reading import files, read
from reward.data.records import BadRecord, check
from reward.data.tokens import Encoder, Template
from reward.model.base import add_lora, load_base, new_head, stock
from reward.model.packing import Texts, texts_of
from reward.model.trainer import HEAD_PAIRS, scale_head
from reward.outputs import read_json
from reward.process import Fault

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
DENSE = replace(QUANTIZATION, bits="none")
TARGETS = ["k_proj", "q_proj", "v_proj"]


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
            pairs.append(texts_of((chosen, rejected)))
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
