"""What differs between a CPU and a GPU."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reward.model.base import Quantization
from reward.model.layers import multiplies_bf16

# What auto computes in depends on the hardware.
QUANTIZATION = Quantization(4, "nf4", False, "auto")
IN_BF16 = replace(QUANTIZATION, compute_dtype="bfloat16")


@dataclass(frozen=True)
class Hardware:
    """What differs between a CPU and a GPU."""

    name: str
    trl_batches: tuple[int, ...]
    trl_dense: bool
    # Whether bf16, in which TRL trains by default, is measured beside what `auto` computes in.
    bf16_beside: bool
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
    bf16_beside=multiplies_bf16(),
    synchronize=lambda: None,
    forget_peak=forget_resident_peak,
    describe=lambda: (
        f"CPU ({torch.backends.cpu.get_cpu_capability()}), fp32"
        f"{', and bf16 where a row says so' if multiplies_bf16() else ''}"
    ),
    note="TRL casts the adapter of a quantized base to bf16, which fails on a CPU in fp32. Here it "
    "has the base dequantized, which computes the same and has nothing to dequantize. Its bf16, "
    "which is its default, is autocast over that base in fp32.",
)
CUDA = Hardware(
    "cuda",
    trl_batches=(8, 1, 2, 4, 16, 32),
    trl_dense=False,
    bf16_beside=False,
    synchronize=torch.cuda.synchronize,
    forget_peak=torch.cuda.reset_peak_memory_stats,
    describe=lambda: f"{torch.cuda.get_device_name()}, {QUANTIZATION.dtype}",
    note="TRL casts the adapter of a quantized base to bf16, the others have theirs in fp32, so "
    "that losses differ by rounding. Batches above 8 take fewer steps, the last of other pairs.",
)
HARDWARE = CUDA if torch.cuda.is_available() else CPU
