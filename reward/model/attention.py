"""Attention over a pack, for every decoder that uses transformers' attention interface.

A pack holds several texts in one row. Each text attends causally to its own tokens and to the
prefix that it shares with other texts, and no other scores are computed. On a GPU in half precision
this is one call of variable-length flash attention, with a copy of the shared keys and values for
each text. Elsewhere PyTorch's scaled_dot_product_attention is called for one block of a text's
queries at a time.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from operator import add
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from reward.model.packing import Layout, to_device
from reward.model.plain import require_plain
from reward.model.swapping import Swapped, swap_in

NAME = "packs"
# The limits of the flash attention kernels; the compute capability is that of Ampere.
FLASH_DTYPES, FLASH_HEAD_SIZE, FLASH_CAPABILITY = (torch.float16, torch.bfloat16), 256, (8, 0)
# Queries per call on a CPU. A smaller block computes fewer masked scores but needs more calls.
BLOCK = 64


def gqa_flag(function: Callable[..., Any]) -> dict[str, bool]:
    """The argument that lets several query heads share a key head in variable-length attention.

    torch 2.11 has no such argument, because it always allows this.
    """
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}


flash: Callable[..., Any] = partial(varlen_attn, **gqa_flag(varlen_attn))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Call:
    """The arguments of variable-length attention that are the same in every layer.

    `keys` selects the keys of all texts from the row: int64, [keys]. `cu_queries` and `cu_keys` are
    the cumulative lengths at which queries and keys are cut into texts, such as 0, 3, 7 for texts
    of 3 and 4 tokens: int32, [texts + 1]. All are on the device. `max_queries` and `max_keys` are
    the most queries and keys of any text.
    """

    keys: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


class Plan:
    """What the attention of all layers needs to know about a layout; created for each pass."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.masks: dict[int | None, Tensor] = {}
        # The most keys that a query sees.
        self.most = max(map(add, layout.prefix, layout.own))
        # On a GPU the number of calls determines the time, so each text is one call.
        self.block = BLOCK if device.type == "cpu" else self.most

    @cached_property
    def ends(self) -> Tensor:
        """The index in the row of each text's last token, on the device: [texts]."""
        return to_device(torch.tensor(self.layout.ends), self.device)

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer's queries attend to, given those that it computed."""
        return key, value

    def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a key, -inf elsewhere: [queries, keys], at most a block's queries.

        The last query and the last key always belong to the same token, so every mask is the lower
        right corner of the largest one, which is created once per window. GPU kernels read masks in
        aligned pieces of 16 bytes. A corner may start at any address, and PyTorch checks only its
        strides, so a GPU gets a copy.
        """
        block, most = self.block, self.most
        if window not in self.masks:
            # `distance` is how many tokens a key is before a query; negative for a later key.
            last = torch.arange(most - block, most, device=self.device)[:, None]
            distance = last - torch.arange(most, device=self.device)
            unseen = (distance < 0) | (distance >= (window or most))
            mask = torch.zeros(block, most, dtype=dtype, device=self.device)
            self.masks[window] = mask.masked_fill_(unseen, float("-inf"))
        corner = self.masks[window][-queries:, -keys:]
        return corner if self.device.type == "cpu" else corner.clone()

    @cached_property
    def call(self) -> Call:
        """The call for all texts. A text's keys are those of its prefix, then its own.

        The prefix is in the text that owns it. The keys of first texts are a slice of the row, so a
        call for these and another call for the others would copy less, but each call costs the CPU
        time to launch it.
        """
        layout = self.layout
        starts = [end + 1 - own for end, own in zip(layout.ends, layout.own, strict=True)]
        pieces = [
            np.arange(first, first + count)
            for text, start in enumerate(starts)
            for first, count in (
                (starts[layout.owner[text]], layout.prefix[text]),
                (start, layout.own[text]),
            )
        ]
        seen = [*map(add, layout.prefix, layout.own)]
        cu_queries, cu_keys = (
            to_device(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), self.device)
            for lengths in (layout.queries, seen)
        )
        keys = to_device(torch.from_numpy(np.concatenate(pieces)), self.device)
        return Call(keys, cu_queries, cu_keys, max(layout.queries), max(seen))


class KeysOnly(Plan):
    """The plan of a pass that ends as soon as a layer has computed its keys and values."""

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        raise Stop(key, value)


class Stop(Exception):
    """Carries a layer's keys and values out of a pass that needs nothing else."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__("keys and values of a layer")
        self.keys_and_values = key, value


class LastTokens(Plan):
    """The plan of a pass over the texts' last tokens, with the keys and values of all tokens."""

    def __init__(self, plan: Plan, known: tuple[Tensor, Tensor]) -> None:
        super().__init__(plan.layout.at_ends(), plan.device)
        self._plan, self._known = plan, known

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._known

    @cached_property
    def call(self) -> Call:
        """The call of the other layers with one query per text, so cu_queries is 0, 1, 2, ..."""
        cu_queries = torch.arange(len(self.layout.own) + 1, dtype=torch.int32, device=self.device)
        return replace(self._plan.call, cu_queries=cu_queries, max_queries=1)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    plan: Plan | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """A layer's attention over a pack, with the signature that AttentionInterface requires.

    `query`, `key` and `value` are [1, heads, tokens, size]; with grouped-query attention the last
    two have fewer heads. The result is [1, queries, heads, size]. Dropout is not applied to
    attention weights, because adapters have their own. Raises a Fault if the model needs more than
    plain causal attention.
    """
    require_plain(module, attention_mask, plan, unknown)
    assert plan is not None
    key, value = plan.keys_and_values(key, value)
    if uses_flash(query, value):
        return flash_attention(query, key, value, plan, scaling, sliding_window), None
    return text_by_text(query, key, value, plan, scaling, sliding_window), None


def uses_flash(query: Tensor, value: Tensor) -> bool:
    """Whether variable-length flash attention supports these tensors."""
    return (
        query.dtype in FLASH_DTYPES
        and max(query.shape[-1], value.shape[-1]) <= FLASH_HEAD_SIZE
        and has_flash(query.device)
    )


@cache
def has_flash(device: torch.device) -> bool:
    """Whether a device has the kernels. A T4, for example, does not."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One variable-length call, with zeros that make all head sizes the same multiple of 8.

    The zeros do not change the products of queries and keys, and the zeros that they add to the
    output are cut off. The default scale is that of the unpadded size. `window_size` is the number
    of tokens that a query sees before and after its own, -1 for all.
    """
    size, width, call = query.shape[-1], value.shape[-1], plan.call
    most = max(size, width)
    # squeeze, because the gradient of x[0] would be copied into zeros.
    query, key, value = (
        widened(x.squeeze(0).transpose(0, 1), most + -most % 8) for x in (query, key, value)
    )
    output = flash(
        query,
        key.index_select(0, call.keys),
        value.index_select(0, call.keys),
        call.cu_queries,
        call.cu_keys,
        call.max_queries,
        call.max_keys,
        scale=size**-0.5 if scaling is None else scaling,
        window_size=(window - 1 if window and window < call.max_keys else -1, 0),
    )
    return cast(Tensor, output[None, ..., :width])


def widened(x: Tensor, size: int) -> Tensor:
    """x with zeros at the end of its last dimension; pad would copy even if it added nothing."""
    return x if x.shape[-1] == size else pad(x, (0, size - x.shape[-1]))


def text_by_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One call for each block of a text's queries, with the keys that the block sees.

    A block sees the text's keys from `start` to `end`, counted from the start of the prefix. `end`
    is after the block's last token. `start` is 0 without a window, otherwise the first key that the
    block's first query sees. If there are as many queries as keys, the kernel's own causal mask is
    right. A single query that sees all of its keys needs no mask.

    The row is split, not sliced, because the gradient of each slice would be as large as the row. A
    CPU computes in fp32, because its kernels take twice as long for gradients in half precision. A
    GPU gets a key head for each query head, because of its kernels other than flash attention, only
    the one that stores all scores lets query heads share a key head.
    """
    layout, dtype = plan.layout, query.dtype
    if query.device.type != "cpu":
        key, value = (for_each_query(x, query.shape[1]) for x in (key, value))
    elif dtype in FLASH_DTYPES:
        query, key, value = query.float(), key.float(), value.float()
    keys, values = key.split(layout.own, 2), value.split(layout.own, 2)
    outputs = []
    for text, part in enumerate(query.split(layout.queries, 2)):
        own_key, own_value = keys[text], values[text]
        if prefix := layout.prefix[text]:
            owner = layout.owner[text]
            own_key = torch.cat([keys[owner][:, :, :prefix], own_key], 2)
            own_value = torch.cat([values[owner][:, :, :prefix], own_value], 2)
        end = own_key.shape[2] - part.shape[2]
        for block in part.split(plan.block, 2):
            queries, end = block.shape[2], end + block.shape[2]
            start = max(0, end - queries - window + 1) if window else 0
            seen, windowed = end - start, window is not None and end - start > window
            square = queries == seen and not windowed
            masked = not square and (queries > 1 or windowed)
            outputs.append(
                scaled_dot_product_attention(
                    block,
                    own_key[:, :, start:end],
                    own_value[:, :, start:end],
                    plan.mask(queries, seen, window, query.dtype) if masked else None,
                    is_causal=square,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
    return torch.cat([output.transpose(1, 2) for output in outputs], 1).to(dtype)


def for_each_query(x: Tensor, heads: int) -> Tensor:
    """Keys or values [1, key heads, tokens, head size] with each head repeated for its queries."""
    times = heads // x.shape[1]
    return x if times == 1 else x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)


class LastLayer(Swapped):
    """A decoder's last layer, computed only at the texts' last tokens, where rewards are read.

    As in generation, keys and values are computed for all tokens, but queries, and everything after
    attention, only for the last ones. This saves most of the layer's work.

    A layer computes queries, keys and values from one input, in a forward whose parts have
    different names in each model family. So it cannot get all tokens for the keys and only the last
    ones for the queries. It is called twice instead. The first call is over all tokens. Its
    attention raises an exception that carries the keys and values, because a layer that returned
    would have done all of its work. The second call is over the last tokens and uses these keys and
    values.
    """

    def forward(self, hidden_states: Tensor, *, plan: Plan | None = None, **rest: Any) -> Tensor:
        layer: Callable[..., Tensor] = super().forward
        if plan is None:
            return layer(hidden_states, **rest)
        try:
            layer(hidden_states, plan=KeysOnly(plan.layout, plan.device), **rest)
        except Stop as stopped:
            known = stopped.keys_and_values
        ends = plan.ends
        # Not every model passes both, and the layers without rotation of some get None.
        if (positions := rest.get("position_ids")) is not None:
            rest["position_ids"] = positions[:, ends]
        if (rotations := rest.get("position_embeddings")) is not None:
            rest["position_embeddings"] = (
                rotations[:, ends]  # complex numbers
                if isinstance(rotations, Tensor)
                else tuple(rotation[:, ends] for rotation in rotations)
            )
        return layer(hidden_states[:, ends], plan=LastTokens(plan, known), **rest)


def swap_last_layer(decoder: nn.Module) -> None:
    """Compute a decoder's last layer only at the texts' last tokens.

    A layer without the usual arguments of transformers' layers stays as it is.
    """
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList):
        arguments = inspect.signature(inspect.unwrap(type(layers[-1]).forward)).parameters
        if "position_embeddings" in arguments:
            swap_in(layers[-1], LastLayer)


AttentionInterface.register(NAME, attend)
