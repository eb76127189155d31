"""What attention must be for packs to be exact: plain and causal. Judged where it is called."""

from collections.abc import Mapping
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
