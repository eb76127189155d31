"""Conversion of bases that differ from another transformers model only in names and constants.

Some models have no classifier in transformers, or only one that also covers images. For them, fetch
writes an equivalent decoder language model: its configuration, and the weights with its names and
scales. Everything after fetch sees only the converted model.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from math import sqrt
from typing import Any

from torch import Tensor
from transformers import GraniteConfig

Tensors = dict[str, Tensor]
Read = Callable[[], Tensor]


@dataclass(frozen=True)
class Conversion:
    """What a base becomes: a configuration, and how each of its tensors is converted.

    `description` is for people. `tensors` maps a tensor's name, and a function that reads it, to
    the new tensors: none if it is dropped, without reading it.
    """

    description: str
    config: dict[str, Any]
    tensors: Callable[[str, Read], Tensors]


def conversion_of(config: dict[str, Any]) -> Conversion | None:
    """The conversion of a base with this config.json; None if it needs no conversion."""
    if config.get("architectures") == ["Gemma3ForConditionalGeneration"]:
        return text_from_gemma3(config)
    if config.get("model_type") == "granite":
        return llama_from_granite(config)
    return None


# --- the text part of Gemma 3 ----------------------------------------------------------------

# The prefixes of its weights in older and newer checkpoints, and what replaces them.
TEXT_PARTS = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}


def text_from_gemma3(config: dict[str, Any]) -> Conversion:
    """Gemma3ForCausalLM: the language model by itself, without the vision tower."""
    outer = ("bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype")
    text = {key: config[key] for key in outer if key in config} | config.get("text_config", {})
    own = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}

    def renamed(name: str, read: Read) -> Tensors:
        for before, after in TEXT_PARTS.items():
            if name.startswith(before):
                return {after + name.removeprefix(before): read()}
        return {}

    return Conversion("the text part of Gemma3ForConditionalGeneration", text | own, renamed)


# --- Granite ---------------------------------------------------------------------------------


def llama_from_granite(config: dict[str, Any]) -> Conversion:
    """The Llama that computes what a Granite computes.

    A Granite is a Llama with four extra constants, and transformers has no classifier for it. The
    constants are folded into the weights. With embeddings e, parts f of the layers and norm n, the
    residual stream h is

        h = embedding_multiplier e;  h = h + residual_multiplier f(n(h));  logits = W n(h) / scaling

    Apart from its epsilon, a norm does not depend on the scale of its input. So dividing the whole
    stream by residual_multiplier, and epsilon by its square, leaves n(h) as it was. The embeddings
    are scaled, and the layers add f(n(h)) as in Llama. The weights of the layers stay as they are,
    except those of the queries, because Llama scales scores by 1 / sqrt(head size) and Granite by
    attention_multiplier.
    """
    full = GraniteConfig.from_dict(deepcopy(config))
    size = getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads
    stream, logits = 1 / full.residual_multiplier, 1 / full.logits_scaling
    scales = {
        "embed_tokens.weight": full.embedding_multiplier * stream,
        "q_proj.weight": full.attention_multiplier * sqrt(size),
        "q_proj.bias": full.attention_multiplier * sqrt(size),
        "lm_head.weight": logits,
    }
    constants = {
        *("embedding_multiplier", "residual_multiplier"),
        *("attention_multiplier", "logits_scaling"),
    }
    own = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": full.rms_norm_eps * stream**2,
        # Embeddings and output share a matrix in Granite, but have different scales in this Llama.
        "tie_word_embeddings": False,
    }

    def converted(name: str, read: Read) -> Tensors:
        if full.tie_word_embeddings and name == "lm_head.weight":
            return {}
        tensor, end = read(), ".".join(name.split(".")[-2:])
        found = {name: scaled(tensor, scales.get(end, 1.0))}
        if full.tie_word_embeddings and name == "model.embed_tokens.weight":
            found["lm_head.weight"] = scaled(tensor, logits)
        return found

    return Conversion(
        "Granite as the Llama that computes the same",
        {key: value for key, value in config.items() if key not in constants} | own,
        converted,
    )


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """A tensor times a number, in its own dtype if that is exact, else in fp32."""
    if scale == 1:
        return tensor
    found = tensor.float() * scale
    narrow = found.to(tensor.dtype)
    return narrow if narrow.float().equal(found) else found
