"""Variable-length attention without a GPU: `varlen_attn` as torch documents it, text by text.

    from torch.nn.attention.varlen import varlen_attn

It takes tensors of any dtype and device and is differentiable. It refuses what the kernels refuse.
The kernels leave rows that belong to no text undefined. Here these rows and their gradients are
NaN.
"""

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

# The parameters of torch's function, by supported torch version.
COMMON = (
    *("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"),
    *("return_aux", "scale", "window_size"),
)
PARAMETERS = {
    "2.11": COMMON,
    "2.12": (*COMMON, "enable_gqa", "seqused_k", "block_table", "num_splits"),
    "2.13": (*COMMON, "enable_gqa", "seqused_k", "block_table", "num_splits"),
    "2.14": (*COMMON, "enable_gqa", "seqused_k", "block_table", "num_splits"),
}


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """[queries, heads, size] from [queries, heads, size], [keys, fewer heads, size] and offsets."""
    size = query.shape[-1]
    for x in (query, key, value):
        assert x.shape[-1] == size
        assert size <= 256
        assert size % 8 == 0
        assert x.stride(-1) == 1
        assert x.device == cu_seq_q.device == cu_seq_k.device
    assert key.shape == value.shape
    assert query.shape[1] == key.shape[1] or enable_gqa
    assert query.shape[1] % key.shape[1] == 0
    assert len(cu_seq_q) == len(cu_seq_k)
    for cuts, rows, most in ((cu_seq_q, query, max_q), (cu_seq_k, key, max_k)):
        assert cuts.dtype == torch.int32
        assert cuts.is_contiguous()
        assert cuts[0] == 0
        assert cuts[-1] <= len(rows)
        assert cuts.diff().min() >= 0
        assert cuts.diff().max() <= most
    factor = size**-0.5 if scale is None else scale
    texts = list(zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True))
    return cast(Tensor, Texts.apply(query, key, value, texts, factor, window_size))


class Texts(Function):
    """All texts, one at a time; backward recomputes them under PyTorch's autograd."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cuts: Any, scale: float, window: Any
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.cuts, ctx.scale, ctx.window = cuts, scale, window
        found = torch.full_like(query, float("nan"))
        for (q0, q1), (k0, k1) in cuts:
            found[q0:q1] = one_text(query[q0:q1], key[k0:k1], value[k0:k1], scale, window)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows = ctx.saved_tensors
        found = [torch.full_like(x, float("nan")) for x in rows]
        for (q0, q1), (k0, k1) in ctx.cuts:
            places = slice(q0, q1), slice(k0, k1), slice(k0, k1)
            parts = [
                x[place].detach().requires_grad_() for x, place in zip(rows, places, strict=True)
            ]
            query, key, value = parts
            with torch.enable_grad():
                output = one_text(query, key, value, ctx.scale, ctx.window)
            of_parts = torch.autograd.grad(output, parts, gradients[0][q0:q1])
            for whole, place, part in zip(found, places, of_parts, strict=True):
                whole[place] = part
        return *found, None, None, None


def one_text(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: tuple[int, int]
) -> Tensor:
    """softmax(scale q k') v of one text, aligned at its end: the last query is at the last key.

    `window` is how many keys a query sees before and after its own position; -1 means all. As in
    the kernels, scores are computed in at least fp32, whatever the dtype of the tensors.
    """
    computed = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, 1).to(computed) for x in (key, value))
    places = torch.arange(len(key) - len(query), len(key), device=query.device)[:, None]
    before = places - torch.arange(len(key), device=query.device)
    left, right = window
    unseen = torch.zeros_like(before, dtype=torch.bool)
    if left >= 0:
        unseen |= before > left
    if right >= 0:
        unseen |= -before > right
    scores = torch.einsum("qhd,khd->hqk", query.to(computed), keys) * scale
    weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
