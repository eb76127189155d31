"""Attention over a pack, for every decoder that takes its attention from transformers.

Each text of the row attends to its own keys, causally, and nothing else is computed: on a GPU in
half precision by variable-length flash attention, one call for the first texts of all prompts and
one for the others; elsewhere by PyTorch's own attention, block by block of each text's queries.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from reward.model.packing import Layout, sent
from reward.model.plain import require_plain
from reward.model.swapping import Swapped, swap_in

NAME = "packs"
# What the kernels of flash attention take, from Ampere on.
FLASH_DTYPES, FLASH_HEAD_SIZE, FLASH_CAPABILITY = (torch.float16, torch.bfloat16), 256, (8, 0)
# Queries of one call on a CPU. Fewer compute fewer scores that are masked, in more calls.
BLOCK = 64


def grouped(function: Callable[..., Any]) -> dict[str, bool]:
    """What asks variable-length attention to share keys between heads; torch 2.11 does unasked."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}


flash: Callable[..., Any] = partial(varlen_attn, **grouped(varlen_attn))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Call:
    """One call of variable-length attention: its keys in the row, queries and keys cut at `cu_*`.

    `cu_queries` and `cu_keys` are int32, [texts + 1], on the device.
    """

    queries: int
    keys: slice | Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    most_queries: int
    most_keys: int


class Plan:
    """What all layers share in computing attention over a layout; made for one pass."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.masks: dict[int | None, Tensor] = {}
        self.most = max(map(add, layout.prefix, layout.own))
        # On a GPU it is the number of calls that costs: one a text.
        self.block = BLOCK if device.type == "cpu" else self.most

    @cached_property
    def ends(self) -> Tensor:
        """Where in the row each text has its last token, on the device: [texts]."""
        return sent(torch.tensor(self.layout.ends), self.device)

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those that a layer's queries see, of those that the layer has computed."""
        return key, value

    def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a key, -inf elsewhere: [queries, keys], at most a block's queries.

        Aligned at the end, it is a corner of the largest one, which is made once for a window. The
        kernels of a GPU read masks 16 bytes at a time, from addresses that allow it; a corner may
        begin anywhere, and PyTorch looks at its strides alone. So a GPU gets a copy.
        """
        block, most = self.block, self.most
        if window not in self.masks:
            last = torch.arange(most - block, most, device=self.device)[:, None]
            distance = last - torch.arange(most, device=self.device)
            unseen = (distance < 0) | (distance >= (window or most))
            mask = torch.zeros(block, most, dtype=dtype, device=self.device)
            self.masks[window] = mask.masked_fill_(unseen, float("-inf"))
        corner = self.masks[window][-queries:, -keys:]
        return corner if self.device.type == "cpu" else corner.clone()

    @cached_property
    def calls(self) -> list[Call]:
        """First texts, whose keys are a slice of the row; the others, whose keys are gathered."""
        layout, firsts = self.layout, self.layout.firsts
        starts = [end + 1 - own for end, own in zip(layout.ends, layout.own, strict=True)]
        pieces = [
            torch.cat([torch.arange(prefix) + starts[owner], torch.arange(own) + start])
            for prefix, own, owner, start in zip(
                layout.prefix, layout.own, layout.owner, starts, strict=True
            )
        ]
        seen = [len(piece) for piece in pieces]
        calls = [self._call(slice(sum(seen[:firsts])), layout.queries[:firsts], seen[:firsts])]
        if firsts < len(pieces):
            keys = sent(torch.cat(pieces[firsts:]), self.device)
            calls.append(self._call(keys, layout.queries[firsts:], seen[firsts:]))
        return calls

    def _call(self, keys: slice | Tensor, queries: list[int], seen: list[int]) -> Call:
        cu_queries, cu_keys = (
            sent(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), self.device)
            for lengths in (queries, seen)
        )
        return Call(sum(queries), keys, cu_queries, cu_keys, max(queries), max(seen))


class KeysAlone(Plan):
    """The plan of a pass that is over where a layer's keys and values are known."""

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        raise Known(key, value)


class Known(Exception):
    """A layer's keys and values, raised to leave a pass in which nothing else is asked for."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__("keys and values of a layer")
        self.keys_and_values = key, value


class AtEnds(Plan):
    """The plan of a pass over the last tokens of the texts, with the keys and values of all."""

    def __init__(self, plan: Plan, known: tuple[Tensor, Tensor]) -> None:
        super().__init__(plan.layout.at_ends(), plan.device)
        self._plan, self._known = plan, known

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._known

    @cached_property
    def calls(self) -> list[Call]:
        """Those of the other layers, with one query for each text: 0, 1, 2, ... cut them apart."""
        return [
            replace(
                call,
                queries=len(call.cu_keys) - 1,
                cu_queries=torch.arange(len(call.cu_keys), dtype=torch.int32, device=self.device),
                most_queries=1,
            )
            for call in self._plan.calls
        ]


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
    """Attention of a layer over a pack, as AttentionInterface wants it: [1, queries, heads, size].

    `query`, `key` and `value` are [1, heads, tokens, size], with fewer heads in the last two where
    they are grouped. Dropout of attention weights is not applied: adapters have their own. Raises a
    Fault for what stock attention would do besides.
    """
    require_plain(module, attention_mask, plan, unknown)
    assert plan is not None
    key, value = plan.keys_and_values(key, value)
    if flashes(query, value):
        return by_flash(query, key, value, plan, scaling, sliding_window), None
    return text_by_text(query, key, value, plan, scaling, sliding_window), None


def flashes(query: Tensor, value: Tensor) -> bool:
    """Whether variable-length flash attention takes these tensors."""
    return (
        query.dtype in FLASH_DTYPES
        and query.shape[-1] == value.shape[-1] <= FLASH_HEAD_SIZE
        and has_flash(query.device)
    )


@cache
def has_flash(device: torch.device) -> bool:
    """Whether a device has the kernels: a T4 and a CPU have not."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


def by_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Two variable-length calls. Heads are filled up with zeros to a multiple of 8."""
    size = query.shape[-1]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if size % 8:  # pad copies, even where it adds nothing
        query, key, value = (pad(x, (0, -size % 8)) for x in (query, key, value))
    parts = query.split([call.queries for call in plan.calls])
    outputs = [
        flash(
            part,
            taken(key, call.keys),
            taken(value, call.keys),
            call.cu_queries,
            call.cu_keys,
            call.most_queries,
            call.most_keys,
            scale=size**-0.5 if scaling is None else scaling,
            window_size=(window - 1 if window and window < call.most_keys else -1, 0),
        )
        for part, call in zip(parts, plan.calls, strict=True)
    ]
    return torch.cat(outputs)[None, ..., :size]


def taken(rows: Tensor, which: slice | Tensor) -> Tensor:
    return rows[which] if isinstance(which, slice) else rows.index_select(0, which)


def text_by_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """A call for each block of a text's queries, with the keys up to its end and no others.

    The row is split, not sliced: the gradient of each slice would be a whole row. A CPU computes it
    in fp32, because its kernels take twice as long for the gradients of halves.
    """
    layout, dtype = plan.layout, query.dtype
    if query.device.type == "cpu" and dtype in FLASH_DTYPES:
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
    return torch.cat(outputs, 2).transpose(1, 2).to(dtype)


class LastLayer(Swapped):
    """A decoder's last layer, worked out at the texts' last tokens alone: no other output is read.

    As in generation, keys and values are those of all tokens, while queries, and all that comes
    after attention, are those of the last ones: most of the layer's work. A layer projects its
    input and adds to it in one call, whose parts have other names in every family, so its input
    cannot be cut for the queries and stay whole for the keys. Hence two calls: the first, of all
    tokens, is left by an exception where attention is told its keys and values, because a layer
    that returned would have done all of its work; the second is of the last tokens.
    """

    def forward(self, hidden_states: Tensor, *, plan: Plan | None = None, **rest: Any) -> Tensor:
        layer: Callable[..., Tensor] = super().forward
        if plan is None:
            return layer(hidden_states, **rest)
        try:
            layer(hidden_states, plan=KeysAlone(plan.layout, plan.device), **rest)
        except Known as found:
            known = found.keys_and_values
        ends = plan.ends
        rotations = rest.pop("position_embeddings")
        return layer(
            hidden_states[:, ends],
            position_ids=rest.pop("position_ids")[:, ends],
            position_embeddings=tuple(rotation[:, ends] for rotation in rotations),
            plan=AtEnds(plan, known),
            **rest,
        )


def swap_last_layer(decoder: nn.Module) -> None:
    """Have a decoder's last layer worked out at the texts' last tokens alone.

    A layer that is not called in transformers' usual way is left as it is.
    """
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList):
        arguments = inspect.signature(inspect.unwrap(type(layers[-1]).forward)).parameters
        if "position_embeddings" in arguments:
            swap_in(layers[-1], LastLayer)


AttentionInterface.register(NAME, attend)
