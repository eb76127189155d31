"""The head that a base brings where it is a reward model already: a classifier of one label."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

HEAD, HEAD_BIAS = "score.weight", "score.bias"


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a sequence classifier of transformers'."""
    own = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(str(config.get("model_type")))
    return own is not None and own in (config.get("architectures") or ())


def against_labels(config: Mapping[str, Any]) -> str | None:
    """Why a classifier of this config.json gives no reward: it has more labels than one."""
    names = config.get("id2label")
    # Two labels are those that transformers does not write down.
    count = len(names) if isinstance(names, dict) else config.get("num_labels", 2)
    if is_classifier(config) and count != 1:
        return f"is a classifier of {count} labels, expected one label, which is the reward"
    return None


def against_head(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Why a classifier whose tensors have these shapes has no head that training could go on with.

    transformers leaves out a bias without an error, and makes a missing head at random.
    """
    if HEAD_BIAS in shapes:
        return f"has a head with a bias, {HEAD_BIAS}, expected {HEAD} alone"
    if HEAD not in shapes:
        return f"is a classifier without a head, expected {HEAD} among its weights"
    if shapes[HEAD][0] != 1:
        return f"has a head of {shapes[HEAD][0]} labels, expected one label, which is the reward"
    return None
