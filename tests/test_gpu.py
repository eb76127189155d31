"""The pipeline on a GPU: all stages, a run that was killed, memory, and the GPU's queue."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reward.exporting import clients
from reward.model import trainer
from reward.model.attention import Plan, text_by_text
from reward.model.base import fast_dtype
from reward.model.kernels import in_fours, rotated, rotated_by_operations, swiglu, swiglu_gradients
from reward.model.packing import pack, tokens
from reward.model.steps import Step
from reward.outputs import digests, read_json
from stages import export, preprocess, train
from tests.support import (
    new_trainer,
    random_prompts,
    set_params,
    train_killed_once,
    write_pairs,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore"),  # warnings of client libraries
]


@pytest.fixture
def whole_memory() -> Iterator[None]:
    """Lifts a limit on the GPU's memory after the test."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("project")
def test_every_client_loads_the_export_of_a_gpu() -> None:
    dtype = str(fast_dtype()).removeprefix("torch.")
    assert read_json(export.EXPORT / "reward.json")["dtype"] == dtype
    by_client = read_json(export.REPORTS / "figures.json")["clients"]
    assert by_client.keys() == {client.name for client in clients.select("light", merged=True)}
    assert by_client["packs"]["packs"]["difference_max"] == 0


@pytest.mark.usefixtures("project")
def test_killed_deterministic_run_ends_with_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_params("train", deterministic=True)
    train.main()
    expected = digests(train.ADAPTER)
    assert train_killed_once(monkeypatch) == [0, 1, 1]
    assert digests(train.ADAPTER) == expected


@pytest.mark.usefixtures("project", "whole_memory")
@pytest.mark.parametrize("auto", [False, True])
def test_packs_shrink_until_they_fit_in_the_memory_of_the_gpu(auto: bool) -> None:
    """The limit leaves a fifth of the memory that one pack of all pairs needs."""
    ours, step = large_step(tokens_per_pack="auto" if auto else 10**6)
    ours.tokens_per_pack = 10**6
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    expected = gradient(ours, step)
    needed = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + needed / 5) / total)
    if auto:
        ours.tokens_per_pack = trainer.largest_pack(ours)
    found = gradient(ours, step)
    size = sum(tokens(each.texts) for each in step.rankings)
    assert size / 64 < ours.tokens_per_pack < size / 2
    assert (found - expected).norm() / expected.norm() < 0.02


@pytest.mark.usefixtures("project")
def test_step_never_waits_for_the_gpu() -> None:
    ours, step = large_step()
    ours.training_step(ours.reward_model, {"step": step})
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.training_step(ours.reward_model, {"step": step})
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float16, 0.01)])
@pytest.mark.parametrize(("heads", "grouped"), [(4, 4), (14, 2)])
@pytest.mark.parametrize("window", [None, 6])
def test_attention_without_flash_matches_a_cpu(
    window: int | None, heads: int, grouped: int, dtype: torch.dtype, rounding: float
) -> None:
    """The path of cards such as a T4, and of fp32. Masks of all alignments occur."""
    for seed in range(3):
        layout = pack(random_prompts(seed, 20)).layout
        torch.manual_seed(seed)
        shapes = (heads, grouped, grouped)
        exact = [torch.randn(1, n, sum(layout.own), 64).to(dtype) for n in shapes]
        here = [x.float().requires_grad_() for x in exact]
        there = [x.cuda().requires_grad_() for x in exact]
        (q, k, v), (on_gpu_q, on_gpu_k, on_gpu_v) = here, there
        expected = text_by_text(q, k, v, Plan(layout, torch.device("cpu")), None, window)
        plan = Plan(layout, torch.device("cuda"))
        found = text_by_text(on_gpu_q, on_gpu_k, on_gpu_v, plan, None, window)
        direction = torch.randn_like(expected)
        for one, other in zip(
            (found, *torch.autograd.grad(found, there, direction.to(found))),
            (expected, *torch.autograd.grad(expected, here, direction)),
            strict=True,
        ):
            difference = one.detach().float().cpu() - other.detach()
            assert difference.norm() < rounding * other.detach().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 33), (3, 40, 96)])
def test_swiglu_kernels_match_their_formulas(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The larger shape is computed several numbers at a time."""
    torch.manual_seed(0)
    gradient, gate, up = (4 * torch.randn(shape) for _ in range(3))
    gate[0, 0, :2] = torch.tensor([-1000.0, 1000.0])
    here = [each.to(dtype) for each in (gradient, gate, up)]
    found, expected = (
        (swiglu(*given[1:]), *swiglu_gradients(*given))
        for given in ([each.cuda() for each in here], [each.float() for each in here])
    )
    rounding = 1e-5 if dtype == torch.float32 else 0.01
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float().cpu(), other, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("size", "width", "one_by_one"), [(64, 64, 0), (64, 32, 0), (24, 24, 0), (64, 64, 1)]
)
def test_rotation_kernel_matches_its_formula(
    size: int, width: int, one_by_one: bool, sign: int
) -> None:
    """For queries and keys that are slices of a wider tensor, as from joint projections.

    Slices that begin at an odd place are not read in fours.
    """
    torch.manual_seed(0)
    heads, tokens, before = (6, 2), 50, int(one_by_one)
    wide = torch.randn(1, tokens, before + 8 * size, dtype=torch.bfloat16, device="cuda")
    wide[0, 3, before + 5] = float("nan")
    q, k = (
        part.view(1, tokens, -1, size).transpose(1, 2)[..., :width]
        for part in wide[..., before:].split([size * count for count in heads], -1)
    )
    angles = torch.randn(1, 1, tokens, width // 2, device="cuda").repeat(1, 1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    assert in_fours(q) == (not one_by_one)
    found = rotated((q, k), cos, sin, sign)
    rounding = 0.02 if one_by_one else 2**-8
    for one, x in zip(found, (q, k), strict=True):
        expected = rotated_by_operations(x.float(), cos.float(), sin.float(), sign)
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(
            one.float(), expected, rtol=rounding, atol=rounding, equal_nan=True
        )


def large_step(**values: Any) -> tuple[trainer.RewardTrainer, Step]:
    """A trainer, and a step of 500 pairs."""
    write_pairs(Path("data/raw/pairs.json"), 800)
    preprocess.main()
    set_params("train", pairs_per_step=500, **values)
    ours = new_trainer()
    return ours, ours.steps[0]


def gradient(ours: trainer.RewardTrainer, step: Step) -> torch.Tensor:
    """The gradient of a step, flattened."""
    ours.training_step(ours.reward_model, {"step": step})
    found = torch.cat([each.grad.flatten() for each in ours.trained if each.grad is not None])
    assert len(found) == sum(each.numel() for each in ours.trained)
    return found.clone()
