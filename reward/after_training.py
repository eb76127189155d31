"""The groups of params.yaml for the stages after training, which training also checks.

So a value that they would refuse ends training before its first step, not when it is done.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from reward import params
from reward.params import Positive, Seed, ZeroOrMore
from reward.process import Fault

# What the clients of `export.clients: all` import, and the names of its packages.
LIBRARIES = {"trl": "trl", "sentence_transformers": "sentence-transformers"}


@dataclass(frozen=True)
class Evaluate:
    """The group `evaluate` of params.yaml, which describes each key."""

    tokens_per_pack: Positive
    seed: Seed


@dataclass(frozen=True)
class Export:
    """The group `export` of params.yaml, which describes each key."""

    merge: Literal["float32", "bfloat16", "none"]
    clients: Literal["light", "all"]
    pairs: Positive
    seed: Seed
    tolerance: ZeroOrMore
    tolerance_in_half: ZeroOrMore


def require_usable() -> None:
    """Raises a Fault if a later stage would refuse its group."""
    params.checked("evaluate", Evaluate)
    require_libraries(params.checked("export", Export))


def require_libraries(options: Export) -> None:
    """Raises a Fault if a library that the clients need is not installed."""
    missing = [name for module, name in LIBRARIES.items() if find_spec(module) is None]
    if options.clients == "all" and missing:
        raise Fault(
            f"params.yaml: export.clients is all, but {' and '.join(missing)} cannot be imported; "
            f"run pip install {' '.join(missing)} or set export.clients to light"
        )
