"""SwiGLU and its gradients, in one kernel each on a GPU, where PyTorch's operations take several.

Passes over memory determine their time. PyTorch compiles the kernels when they are first called, in
about a second, and keeps them in ~/.cache/torch/kernels. T is the type of the computation: fp32 for
tensors in half precision, so a result is rounded once. Elsewhere than on a GPU, PyTorch's
operations compute the same.
"""

from typing import Any

from torch import Tensor
from torch.cuda.jiterator import _create_jit_fn, _create_multi_output_jit_fn
from torch.nn.functional import silu

SWIGLU: Any = _create_jit_fn(
    "template <typename T> T swiglu(T gate, T up) { return gate / (T(1) + std::exp(-gate)) * up; }"
)
SWIGLU_GRADIENTS: Any = _create_multi_output_jit_fn(
    """
    template <typename T> void swiglu_gradients(T gradient, T gate, T up, T& of_gate, T& of_up) {
        const T sigmoid = T(1) / (T(1) + std::exp(-gate));
        of_gate = gradient * up * sigmoid * (T(1) + gate * (T(1) - sigmoid));
        of_up = gradient * gate * sigmoid;
    }
    """,
    num_outputs=2,
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, for tensors of one shape: Shazeer 2020, "GLU variants", equation 6."""
    if gate.is_cuda:
        found: Tensor = SWIGLU(gate, up)
        return found
    return silu(gate.float()).mul_(up).to(gate.dtype)


def swiglu_gradients(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, given that of the result.

    With s = sigmoid(gate), the derivative of silu is s (1 + gate (1 - s)).
    """
    if gate.is_cuda:
        of_gate, of_up = SWIGLU_GRADIENTS(gradient, gate, up)
        return of_gate, of_up
    gradient, wide, dtype = gradient.float(), gate.float(), gate.dtype
    s = wide.sigmoid()
    slope = s * (1 + wide * (1 - s))
    return (gradient * up * slope).to(dtype), (gradient * wide * s).to(dtype)
