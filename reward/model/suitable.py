"""Whether a base can become a reward model, judged by its config.json, before a weight is there.

The model is built without memory, on PyTorch's meta device, and a row goes through it in which
nothing is computed: so a model is refused for what its own code does, whatever its name.
"""

from copy import deepcopy
from typing import Any

import torch
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

from reward.model.head import against_labels, is_classifier
from reward.model.plain import require_plain, ropes
from reward.process import Fault

NAME = "suitable"
EXPECTED = (
    "expected a decoder language model that transformers can also build as a classifier, such as "
    "Qwen2ForCausalLM"
)
TOKENS = 5


def reason_against(config: dict[str, Any]) -> str | None:
    """Why no model of this config.json can become a reward model, said of it, or None."""
    return against_name(config) or against_labels(config) or against_model(config)


def against_name(config: dict[str, Any]) -> str | None:
    """Why it is no decoder that transformers has the code of, and a classifier over.

    It may be that classifier already, but not one that sees.
    """
    kind = str(config.get("model_type"))
    classes = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, kind)]
    named = ", ".join(map(str, classes))
    known: Any = set(classes) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    known = known or (is_classifier(config) and "vision_config" not in config)
    if known and not config.get("is_encoder_decoder"):
        if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            return None
        return f"is a {named}, which transformers has no classifier over, {EXPECTED}"
    if "auto_map" in config:
        return f"is a {named} of code that comes with it and is never run, {EXPECTED}"
    return f"is a {named}, {EXPECTED}"


def against_quantization(config: dict[str, Any]) -> str | None:
    """Why its weights are not the numbers that LoRA is trained over here.

    Trained as they are, such weights would be another base than the one that is recorded.
    """
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            if recipe := part.get(key):
                method = recipe.get("quant_method") if isinstance(recipe, dict) else None
                return (
                    f"is quantized already ({method or key}), expected the unquantized model that "
                    "it was made from, which its page names: quantization.bits quantizes it here"
                )
    return None


def against_model(config: dict[str, Any]) -> str | None:
    """Why the model as transformers builds it gives no rewards of packs."""
    windows: list[int | None] = []
    try:
        model = build(config)
        if reason := against_class(model):
            return reason
        go_through(model, windows)
    except Fault as fault:
        return f"cannot be packed: {fault}"
    except Exception as error:  # whatever a model's code raises for a configuration
        if isinstance(error, NotImplementedError) or "meta tensors" in str(error):
            return None  # it asks for numbers: what comes of them, training compares
        detail = " ".join(str(error).split())[:200]
        return (
            f"has a config.json that transformers cannot make a model of ({type(error).__name__}: "
            f"{detail}), expected one of the version of transformers here"
        )
    return against_layers(model, windows)


def against_class(model: PreTrainedModel) -> str | None:
    """Why a model of its class is no decoder with a head, or one that takes no other attention."""
    name = type(model).__name__
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return f"is not a decoder: {name} has no score head, {EXPECTED}"
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        return (
            f"cannot be packed: {name} takes no attention but its own, expected a decoder that "
            "supports transformers' attention interface"
        )
    return None


def build(config: dict[str, Any]) -> PreTrainedModel:
    """The classifier of a configuration on the meta device, so of any size in no memory."""
    logging.set_verbosity_error()
    # Copied, because transformers fills in what is nested in it.
    own = deepcopy({key: value for key, value in config.items() if key != "quantization_config"})
    # Without a pad token, because some models look for it in the row.
    found = CONFIG_MAPPING[own["model_type"]].from_dict(
        own | {"num_labels": 1, "pad_token_id": None}
    )
    for rope in ropes(found):
        if rope.get("rope_type") == "dynamic":  # it asks for the longest position, a number
            rope["rope_type"] = "default"
    with torch.device("meta"):
        # Experts are otherwise chosen by numbers, which there are none of.
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            found, experts_implementation="batched_mm"
        )
    return model


def go_through(model: PreTrainedModel, windows: list[int | None]) -> None:
    """Have a row pass through a model; `windows` gets those that its attention was told, in order.

    Raises a Fault for attention that is not plain.
    """
    with torch.no_grad():
        model.base_model(
            input_ids=torch.zeros(1, TOKENS, dtype=torch.long, device="meta"),
            position_ids=torch.arange(TOKENS, device="meta")[None],
            plan=windows,
            use_cache=False,
        )


def attend_to_nothing(
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
    """In the place of attention: its shape alone. `plan` notes the window that it was told."""
    require_plain(module, attention_mask, plan, more)
    assert plan is not None
    plan.append(sliding_window)
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1]), None


def against_layers(model: PreTrainedModel, windows: list[int | None]) -> str | None:
    """Why what its layers do is not attention, or is another one than they have told."""
    config = model.config.get_text_config()
    layers, name = config.num_hidden_layers, type(model).__name__
    if len(windows) != layers:
        return (
            f"cannot be packed: {name} attends {len(windows)} times in {layers} layers, expected "
            "once in each; a layer without attention carries what it reads from text to text"
        )
    kinds = getattr(config, "layer_types", None) or []
    if others := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        return (
            f"cannot be packed: {name} has layers of {', '.join(others)}, expected full attention "
            "or a sliding window"
        )
    if kinds and kinds.count("sliding_attention") != sum(window is not None for window in windows):
        return (
            f"cannot be packed: {name} does not tell its attention the windows of its layers, "
            "expected a model that does"
        )
    return None


AttentionInterface.register(NAME, attend_to_nothing)
