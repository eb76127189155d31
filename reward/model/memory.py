"""How running out of memory is recognized, so that a smaller pack is tried or a part left out."""

from collections.abc import Callable
from traceback import walk_tb
from typing import Any, TypeVar

import torch

from reward.process import Fault

# The texts of plain RuntimeErrors that mean out of memory: from a CPU, from CUDA, and from cuBLAS,
# which allocates its own memory for every thread that uses it.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "when calling `cublasCreate(",
)
Result = TypeVar("Result")


class TooLarge(Fault, MemoryError):
    """A Fault because memory ran out. `within_memory` treats it like any other such error."""


def within_memory(work: Callable[..., Result], *arguments: Any, **named: Any) -> Result | None:
    """What `work` returns, or None if memory ran out. The memory that it used is then freed."""
    try:
        return work(*arguments, **named)
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or is_known(str(error))
        # Not if it is known, because looking at frames keeps what their variables hold in memory.
        caught = [] if known else caught_while_loading(error)
        if not known and not any(map(is_known, caught)):
            if caught:
                raise RuntimeError(f"{error} The first error was:\n{caught[0]}") from None
            raise
    torch.cuda.empty_cache()
    return None


def is_known(message: str) -> bool:
    """Whether the message of an error says that memory ran out."""
    return any(sign in message for sign in OUT_OF_MEMORY)


def caught_while_loading(error: Exception) -> list[str]:
    """The errors that transformers caught when it quantized or merged weights.

    It only logs them, and then raises a RuntimeError that does not say what they were.
    """
    for frame, _ in walk_tb(error.__traceback__):
        if report := frame.f_locals.get("loading_info"):
            return [*getattr(report, "conversion_errors", {}).values()]
    return []
