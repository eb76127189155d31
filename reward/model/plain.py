"""The conditions under which packs are exact for a base.

The attention of the base must be plain and causal, which is checked when it is called. The rotation
of a token must depend only on its position in its own text, not on anything else in the row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reward.process import Fault

# Model types with a window that is only in the mask, which packs do not use.
WINDOW_IN_MASK = {"phimoe"}
# Arguments by which models request more than plain attention from an attention function.
EXTRAS = {"softcap", "s_aux", "position_bias"}


def require_plain(
    module: nn.Module, mask: Tensor | None, plan: object | None, more: Mapping[str, Any]
) -> None:
    """Raises a Fault unless a module's attention is plain and causal and receives the plan.

    `more` are the other keyword arguments that the module passes to its attention.
    """
    name = type(module).__name__
    extras = EXTRAS & {key for key, value in more.items() if value is not None}
    if extras or mask is not None:
        raise Fault(
            f"{name} uses {', '.join(sorted(extras)) or 'its own mask'} in its attention, "
            "expected plain causal attention, with or without a sliding window"
        )
    if not getattr(module, "is_causal", True):
        raise Fault(f"{name} also attends to later tokens, expected plain causal attention")
    if plan is None:
        raise Fault(
            f"{name} does not receive the layout of its row, expected a model that passes keyword "
            "arguments on to its attention"
        )


def ropes(config: Any) -> list[dict[str, Any]]:
    """The parameters of a configuration's rotary embeddings; some models have several kinds."""
    found = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in found.values() if isinstance(part, dict)]
    return parts or [found]


def require_length(config: Any, base: Path, most: int) -> None:
    """Raises a Fault if texts of `most` tokens are too long, or could change others in their pack.

    LongRoPE rotates all texts of a row by other factors once one of them is longer than the texts
    of the original pretraining. Dynamic scaling does the same above the maximum number of
    positions, which no text may exceed anyway. A window that attention does not receive has no
    effect in packs, so no text may exceed it either.
    """
    limits = {
        f"{base} reads at most {{}} tokens": getattr(config, "max_position_embeddings", None),
        f"{base} rotates all texts of a pack by other factors once one of them has more than {{}} "
        "tokens (longrope), so rewards would depend on the other texts in the pack": min(
            (
                rope["original_max_position_embeddings"]
                for rope in ropes(config)
                if rope.get("rope_type") == "longrope"
            ),
            default=None,
        ),
        f"{base} has a sliding window of {{}} tokens, which packs would leave out": (
            getattr(config, "sliding_window", None) if config.model_type in WINDOW_IN_MASK else None
        ),
    }
    for found, limit in limits.items():
        if limit and most > limit:
            raise Fault(
                f"params.yaml: preprocess.max_length is {most}, but {found.format(limit)}; "
                f"set it to at most {limit}"
            )
