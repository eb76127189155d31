"""The bare matrix products of the base's linear layers, for the tokens of this project's packs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.hardware import QUANTIZATION
from benchmarks.speed.measuring import Measurement, Stopwatch
from benchmarks.speed.workload import Workload
from reward.model.base import device
from reward.model.layers import product
from reward.model.packing import into_packs, tokens

Multiply = Callable[[Tensor, Tensor, Tensor], Any]


def by_torch(x: Tensor, weight: Tensor, result: Tensor) -> None:
    torch.mm(x, weight.T, out=result)


def by_onednn(x: Tensor, weight: Tensor, _: Tensor) -> None:
    """Multiply like this project's frozen layers; oneDNN allocates its own result."""
    product(x, weight)


def floor(
    workload: Workload, multiply: Multiply = by_torch, dtype: torch.dtype = QUANTIZATION.dtype
) -> Measurement:
    """The products of training: forward, and for the gradients of the layers' inputs."""
    steps = [[tokens(texts) for texts in step] for step in workload.steps()]
    return products(workload, steps, multiply, backward=True, dtype=dtype)


def floor_of_scoring(workload: Workload) -> Measurement:
    """The products of `scoring`, in its packs of prompts with similar lengths."""
    sizes, first = [tokens(texts) for texts in workload.prompts], workload.prompts_per_step
    parts = sizes[:first], sizes[first:]
    steps = [sorted(part, reverse=True) for part in parts]
    return products(workload, steps, by_torch, backward=False, dtype=QUANTIZATION.dtype)


def products(
    workload: Workload,
    steps: list[list[int]],
    multiply: Multiply,
    backward: bool,
    dtype: torch.dtype,
) -> Measurement:
    """Multiply the tokens of each step's packs with all linear layers of the decoder.

    `steps` has the number of tokens of each prompt. All operands, and a tensor for each size of
    result, are allocated before the measurement.
    """
    packs = [
        [
            sum(sizes[index] for index in group)
            for group in into_packs(sizes, workload.tokens_per_pack)
        ]
        for sizes in steps
    ]
    make = partial(torch.randn, dtype=dtype, device=device())
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
    return stopwatch.measurement(workload.counted)
