"""What must be true of a base for its packs to be exact.

Its attention is plain and causal, which is judged where it is called, and where a token is in its
text decides its rotation, and nothing else that is in the row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reward.process import Fault

# What models do to attention besides, as they tell it to transformers' attention functions.
BESIDES = {"softcap", "s_aux", "position_bias"}


def require_plain(
    module: nn.Module, mask: Tensor | None, plan: object | None, more: Mapping[str, Any]
) -> None:
    """Raises a Fault for what stock attention would do besides, and for one that is not told of
    packs. `more` are the keyword arguments that a module gives to its attention."""
    name = type(module).__name__
    besides = BESIDES & {key for key, value in more.items() if value is not None}
    if besides or mask is not None:
        raise Fault(
            f"{name} has {', '.join(sorted(besides)) or 'a mask of its own'} in its attention, "
            "wanted plain causal attention, with a sliding window or without"
        )
    if not getattr(module, "is_causal", True):
        raise Fault(f"{name} attends to later tokens as well, expected plain causal attention")
    if plan is None:
        raise Fault(
            f"{name} is not told how its row is laid out, wanted a model that hands keyword "
            "arguments on to its attention"
        )


def ropes(config: Any) -> list[dict[str, Any]]:
    """The parameters of a configuration's rotary embeddings, which some have several kinds of."""
    found = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in found.values() if isinstance(part, dict)]
    return parts or [found]


def require_length(config: Any, base: Path, most: int) -> None:
    """Raises a Fault where a base would not read texts of `most` tokens alike in any company.

    LongRoPE rotates all texts of a row by other factors as soon as one of them is longer than those
    of the first training. Dynamic scaling does so above the most positions, where texts end anyway.
    """
    limits = {
        f"{base} reads at most {{}} tokens": getattr(config, "max_position_embeddings", None),
        f"{base} rotates all texts of a pack by other factors as soon as one of them has more than "
        "{} tokens (longrope), so that rewards would depend on what is beside them": min(
            (
                rope["original_max_position_embeddings"]
                for rope in ropes(config)
                if rope.get("rope_type") == "longrope"
            ),
            default=None,
        ),
    }
    for found, limit in limits.items():
        if limit and most > limit:
            raise Fault(
                f"params.yaml: preprocess.max_length is {most}, but {found.format(limit)}; "
                f"set it to at most {limit}"
            )
