"""How much memory the export of a model takes in addition to the loaded base.

    python -m benchmarks.random_base models/qwen2-0.5b-shape
    python -m benchmarks.merging models/qwen2-0.5b-shape

The base is quantized to 4 bits, with computations in fp32 or bf16, or is unquantized. base/ and
merged/ are written to a temporary folder next to the model, each by a fresh process. Needs Linux,
where a process can reset its peak memory.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from reward.exporting import portable
from reward.exporting.merging import write_merged
from reward.model.base import DTYPES, Quantization, add_lora, load_base, load_stock, new_head, save
from reward.outputs import partial_folder
from reward.process import command_line

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PARTS = ("base", "float32", "bfloat16")
QUANTIZATIONS = {
    "nf4, fp32": Quantization(4, "nf4", False, "float32"),
    "nf4, bf16": Quantization(4, "nf4", False, "bfloat16"),
    "dense, bf16": Quantization.unquantized("bfloat16"),
}


def main() -> None:
    parser = command_line("benchmarks.merging", __doc__)
    parser.add_argument("base", type=Path, help="folder of the base model")
    base = parser.parse_args().base
    print(f"{'base':<16}{'loaded, GB':>12}{'written':>20}{'GB':>8}{'extra, GB':>10}{'s':>8}")
    with partial_folder(base) as folder:
        for name in QUANTIZATIONS:
            in_fresh_process(write_adapter, base, folder / "adapter", name)
            for part in PARTS:
                loaded, extra, seconds = in_fresh_process(measured, base, folder, name, part)
                size = sum(path.stat().st_size for path in (folder / part).iterdir()) / 1e9
                kind = part if part == "base" else f"merged, {part}"
                print(f"{name:<16}{loaded:12.2f}{kind:>20}{size:8.2f}{extra:10.2f}{seconds:8.1f}")


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work` in a fresh process, which has no freed memory to reuse; return its result."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def write_adapter(base: Path, folder: Path, name: str) -> None:
    """Write an adapter with random weights on all attention projections."""
    quantization = QUANTIZATIONS[name]
    model = load_base(base, quantization)
    new_head(model, seed=0)
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"])
    lora.init_lora_weights = False
    save(add_lora(model, lora), folder, "base", quantization)


def measured(base: Path, folder: Path, name: str, part: str) -> tuple[float, float, float]:
    """GB of the process before it writes a part, extra GB at the peak, and seconds."""
    model = load_stock(base, QUANTIZATIONS[name])
    portable.take_head(model, folder / "adapter")
    for weight in model.parameters():  # a memory-mapped weight takes no memory until it is read
        weight.data.view(torch.uint8).max()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that loading freed but the process kept
    PEAK.write_text("5")
    before, start = status("VmRSS"), time.perf_counter()
    if part == "base":
        model.save_pretrained(folder / part)
    else:
        write_merged(model, folder / "adapter", DTYPES[part], folder / part)
    return before, status("VmHWM") - before, time.perf_counter() - start


def status(key: str) -> float:
    """A value from /proc/self/status, in GB."""
    [line] = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    main()
