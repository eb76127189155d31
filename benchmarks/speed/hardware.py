"""What differs between a CPU and a GPU."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reward.model.base import Quantization
from reward.model.layers import multiplies_bf16

# The dtype that auto selects depends on the hardware.
QUANTIZATION = Quantization(4, "nf4", False, "auto")
IN_BF16 = replace(QUANTIZATION, compute_dtype="bfloat16")


@dataclass(frozen=True)
class Hardware:
    """What differs between a CPU and a GPU."""

    name: str
    trl_batches: tuple[int, ...]
    trl_dense: bool
    # Whether bf16, TRL's default, is measured in addition to the dtype of `auto`.
    also_bf16: bool
    synchronize: Callable[[], None]
    reset_peak: Callable[[], None]
    describe: Callable[[], str]
    note: str


def reset_resident_peak() -> None:
    """Reset this process's peak memory on Linux; elsewhere the peak includes loading."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


CPU = Hardware(
    "cpu",
    trl_batches=(8, 1),
    trl_dense=True,
    also_bf16=multiplies_bf16(),
    synchronize=lambda: None,
    reset_peak=reset_resident_peak,
    describe=lambda: (
        f"CPU ({torch.backends.cpu.get_cpu_capability()}), fp32"
        f"{', or bf16 if a row says so' if multiplies_bf16() else ''}"
    ),
    note="TRL casts the adapter of a quantized base to bf16, which fails on a CPU in fp32. It "
    "therefore gets the dequantized base, which computes the same and needs no dequantizing. In "
    "bf16, which is TRL's default, TRL uses autocast over this fp32 base.",
)
CUDA = Hardware(
    "cuda",
    trl_batches=(8, 1, 2, 4, 16, 32, 64),
    trl_dense=False,
    also_bf16=False,
    synchronize=torch.cuda.synchronize,
    reset_peak=torch.cuda.reset_peak_memory_stats,
    describe=lambda: f"{torch.cuda.get_device_name()}, {QUANTIZATION.dtype}",
    note="TRL casts the adapter of a quantized base to bf16. The others keep it in fp32, so losses "
    "differ by rounding. Batches larger than 8 take fewer steps, so the last step has other pairs.",
)
HARDWARE = CUDA if torch.cuda.is_available() else CPU
