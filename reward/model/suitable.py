"""Whether a base can become a reward model, judged by its config.json before any weights are there.

The model is built on PyTorch's meta device, which allocates no memory, and a row is passed through
it without computing any numbers. So a model is rejected for what its code does, not for its name.
Later its weights are judged by their names, shapes and types.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    logging,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from reward.model.head import HEAD, is_classifier, problem_with_labels
from reward.model.plain import require_plain, ropes
from reward.process import Fault, named

NAME = "suitable"
EXPECTED = (
    "expected a decoder language model that transformers can also build as a classifier, such as "
    "Qwen2ForCausalLM"
)
UNQUANTIZED = (
    "expected the unquantized model that is named on its page; quantization.bits then quantizes "
    "that model"
)
# Where tools that quantize models say so: in config.json, or in a file beside it.
QUANTIZED_KEYS = ("quantization_config", "compression_config", "quantization")
QUANTIZED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# Weights that a classifier does not have: the output of tokens, and constants in old checkpoints.
NOT_NEEDED = re.compile(r"^(lm_head|embed_out)\.|\.(rotary_emb\.inv_freq|attn\.masked_bias)$")
# The value of `pooling` with which the last token is read.
LAST = "eos"
OUTPUTS = "with which clients of the trained model get no rewards"
IMPLEMENTATION = ((None, "eager", "sdpa"), "which not every machine has")
# Keys of config.json, the values that they may have, the default first, and what others do.
SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "output_attentions": ((False, None), OUTPUTS),
    "return_dict": ((True,), OUTPUTS),
    "torchscript": ((False, None), OUTPUTS),
    "attn_implementation": IMPLEMENTATION,
    "_attn_implementation": IMPLEMENTATION,
}
# The types of weights that are not quantized, as safetensors calls them.
FLOATS = ("F64", "F32", "F16", "BF16")
TOKENS = 5


def problem_with(config: dict[str, Any]) -> str | None:
    """Why a model with this config.json cannot become a reward model, or None.

    The reason is the rest of a sentence that begins with the name of the model.
    """
    return (
        problem_with_class(config)
        or problem_with_labels(config)
        or problem_with_settings(config)
        or problem_with_model(config)
    )


def problem_with_class(config: dict[str, Any]) -> str | None:
    """Why a model's class is not a decoder for which transformers also has a classifier.

    The class may already be that classifier, but not one that also reads images.
    """
    kind = str(config.get("model_type"))
    classes = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, kind)]
    shown = ", ".join(map(str, classes))
    known: Any = set(classes) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    known = known or (is_classifier(config) and "vision_config" not in config)
    if known and not config.get("is_encoder_decoder"):
        if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            return None
        return f"is a {shown}, for which transformers has no sequence classifier, {EXPECTED}"
    if "auto_map" in config:
        return f"is a {shown} whose own code would have to run, {EXPECTED}"
    return f"is a {shown}, {EXPECTED}"


def problem_with_settings(config: dict[str, Any]) -> str | None:
    """Why a setting of config.json that the meta device would not show rules a model out, or None.

    The first two are part of the model, so the message does not suggest changing them.
    """
    if not config.get("is_causal", True):
        return (
            'also attends to later tokens ("is_causal" in its config.json), expected plain causal '
            "attention"
        )
    if (pooling := config.get("pooling") or LAST) != LAST:
        return (
            f"does not read its reward from the last token ({pooling!r} is `pooling` in its "
            "config.json), expected a classifier that does"
        )
    for key, (values, effect) in SETTINGS.items():
        if (found := config.get(key, values[0])) not in values:
            return (
                f'has "{key}": {json.dumps(found)} in its config.json, {effect}; set it to '
                f"{json.dumps(values[0])} in a local copy of the model and use that"
            )
    return None


def problem_with_quantization(config: dict[str, Any]) -> str | None:
    """Why training cannot use a model's stored weights: they are already quantized.

    Training on such weights would use a different base than the one that is recorded.
    """
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    for part in parts:
        for key in QUANTIZED_KEYS:
            recipe = part.get(key)
            if recipe or (key == QUANTIZED_KEYS[0] and recipe == {}):
                method = recipe.get("quant_method") if isinstance(recipe, dict) else None
                return f"is already quantized ({method or key}), {UNQUANTIZED}"
    return None


def problem_with_types(types: Mapping[str, str]) -> str | None:
    """Why training cannot use weights of these types, by their names, or None.

    Quantized weights need scales, which transformers would leave out without the recipe.
    """
    for name, found in types.items():
        if name.endswith(".weight") and found not in FLOATS:
            return f"is already quantized ({name} is {found}), {UNQUANTIZED}"
    return None


def problem_with_weights(model: PreTrainedModel, report: Mapping[str, Any]) -> str | None:
    """Why the weights in a folder, loaded by `on_meta`, are not those of its config.json, or None.

    transformers would draw what is missing at random.
    """
    if missing := sorted({*report["missing_keys"]} - {HEAD}):
        more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
        return (
            f"lacks {', '.join(missing[:2])}{more} among its weights, expected all that "
            f"{type(model).__name__} needs with its config.json"
        )
    for name, found, expected in sorted(report["mismatched_keys"]):
        return f"has {name} of shape {[*found]}, expected {[*expected]}, as its config.json says"
    return None


def unused_weights(report: Mapping[str, Any]) -> list[str]:
    """The weights in a folder that a reward model leaves out, except for the output of tokens."""
    return sorted(name for name in report["unexpected_keys"] if not NOT_NEEDED.search(name))


def on_meta(folder: Path) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model in a folder without any numbers, and what transformers reports of its weights."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=1,
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    return model, report


def problem_with_model(config: dict[str, Any]) -> str | None:
    """Why the model that transformers builds from a config.json cannot be packed, or None."""
    try:
        model = build(config)
    except Exception as error:  # because a model's code may raise anything
        if needs_numbers(error):
            return None
        return (
            f"has a config.json from which transformers cannot build a model ({named(error)}), "
            "expected one for the installed version"
        )
    if reason := problem_with_interface(model):
        return reason
    try:
        windows = trace(model)
    except Fault as fault:
        return f"cannot be packed: {fault}"
    except Exception as error:
        if needs_numbers(error):
            return None
        return (
            f"cannot be packed: {type(model).__name__} fails on a row of tokens without a mask "
            f"({named(error)}), expected a decoder that needs none, with a config.json for the "
            "installed version"
        )
    return problem_with_layers(model, windows)


def needs_numbers(error: Exception) -> bool:
    """Whether a model failed only on the meta device; the check before training has to decide."""
    return isinstance(error, NotImplementedError) or "meta tensors" in str(error)


def problem_with_interface(model: PreTrainedModel) -> str | None:
    """Why a model without a score head or replaceable attention cannot be used, or None."""
    name = type(model).__name__
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return f"cannot be used: {name} has no linear layer `score`, {EXPECTED}"
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        return (
            f"cannot be packed: {name} does not allow its attention to be replaced, expected a "
            "decoder that supports transformers' attention interface"
        )
    return None


def build(config: dict[str, Any]) -> PreTrainedModel:
    """The classifier of a configuration on the meta device, where any size fits."""
    logging.set_verbosity_error()
    # A copy, because transformers modifies nested values.
    own = deepcopy({key: value for key, value in config.items() if key != "quantization_config"})
    found = CONFIG_MAPPING[own["model_type"]].from_dict(own | {"num_labels": 1})
    # No pad token, because some models search the row for it. Some do not allow this. One outside
    # of the vocabulary stays, because many models cannot be built with it.
    rows = getattr(found.get_text_config(), "vocab_size", None) or math.inf
    if (getattr(found, "pad_token_id", None) or 0) < rows:
        with suppress(StrictDataclassError):
            found.pad_token_id = None
    for rope in ropes(found):
        if rope.get("rope_type") == "dynamic":  # it needs the value of the largest position
            rope["rope_type"] = "default"
    with torch.device("meta"):
        # The default implementation selects experts by values, which the meta device does not have.
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            found, experts_implementation="batched_mm"
        )
    return model.eval()  # because in training some models skip layers at random


def trace(model: PreTrainedModel) -> list[int | None]:
    """Pass a row through a model. Returns the window of each call of attention.

    Raises a Fault for attention that is not plain.
    """
    windows: list[int | None] = []
    with torch.no_grad():
        model.base_model(
            input_ids=torch.zeros(1, TOKENS, dtype=torch.long, device="meta"),
            position_ids=torch.arange(TOKENS, device="meta")[None],
            plan=windows,
            use_cache=False,
        )
    return windows


def record_window(
    module: nn.Module,
    query: Tensor,
    _key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: list[int | None] | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Replaces attention: appends the window to `plan` and returns only the right shape."""
    require_plain(module, attention_mask, plan, more)
    assert plan is not None
    plan.append(sliding_window)
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1]), None


def problem_with_layers(model: PreTrainedModel, windows: list[int | None]) -> str | None:
    """Why a model cannot be packed, judged by the window of each call of attention, or None."""
    config = model.config.get_text_config()
    layers, name = config.num_hidden_layers, type(model).__name__
    if len(windows) != layers:
        state = "; other layers carry state from one text to the next"
        return (
            f"cannot be packed: {name} calls attention {len(windows)} times in {layers} layers, "
            f"expected once in each{state if len(windows) < layers else ''}"
        )
    kinds = getattr(config, "layer_types", None) or []
    if others := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        return (
            f"cannot be packed: {name} has layers with {', '.join(others)}, expected full "
            "attention or a sliding window"
        )
    if kinds and kinds.count("sliding_attention") != sum(window is not None for window in windows):
        return (
            f"cannot be packed: {name} does not pass the sliding windows of its layers to its "
            "attention, expected a model that does"
        )
    return None


AttentionInterface.register(NAME, record_window)
