"""The head of a base that is already a reward model: a classifier with one label."""

from collections.abc import Mapping
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

HEAD, HEAD_BIAS = "score.weight", "score.bias"


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to a sequence classifier of transformers."""
    own = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(str(config.get("model_type")))
    return own is not None and own in (config.get("architectures") or ())


def problem_with_labels(config: Mapping[str, Any]) -> str | None:
    """Why a classifier with this config.json does not give one reward, or None."""
    names = config.get("id2label")
    # transformers does not write the labels to config.json if there are two.
    count = len(names) if isinstance(names, dict) else config.get("num_labels", 2)
    if is_classifier(config) and count != 1:
        return f"is a classifier with {count} labels, expected one label, which is the reward"
    return None


def problem_with_head(report: Mapping[str, Any]) -> str | None:
    """Why training cannot start from a classifier's head, or None.

    `report` is what transformers says of the weights that it loaded. It would drop a bias without
    an error, and initialize a missing head at random.
    """
    if HEAD_BIAS in report["unexpected_keys"]:
        return f"has a head with a bias, {HEAD_BIAS}, expected only {HEAD}"
    if HEAD in report["missing_keys"]:
        return f"is a classifier without a head, expected {HEAD} among its weights"
    for name, found, _ in report["mismatched_keys"]:
        if name == HEAD and found[0] != 1:
            return f"has a head with {found[0]} labels, expected one label, which is the reward"
    return None
