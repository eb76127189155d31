"""Training: the same as a plain loop, the same after interruptions, and fully recorded."""

import gc
import hashlib
import itertools
import json
import math
import random
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from reward import params
from reward.model import checkpoints, progress, trackers, trainer
from reward.model.base import Quantization, head_of
from reward.model.memory import within_memory
from reward.model.packing import Texts, pairs_of, tokens
from reward.model.plain import require_length
from reward.model.scoring import as_in_transformers, rewards, score
from reward.model.steps import Step, Steps
from reward.outputs import digest, digests, read_json, write_json
from reward.process import Fault
from stages import preprocess, train
from tests.forked import Forked, train_until
from tests.support import SetParams, built, chosen_and_rejected, new_trainer, write_pairs

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def prepared(workspace: Path, set_params: SetParams) -> Path:
    """A workspace with 14 training pairs: 4 steps per epoch, 8 in total, the last with 2 pairs."""
    write_pairs(workspace / "data" / "raw" / "pairs.json", 20)
    set_params("preprocess", validation_fraction=0.1, test_fraction=0.2)
    preprocess.main()
    set_params("lora", r=4, lora_dropout=0.1)
    set_params("train", pairs_per_step=4, num_train_epochs=2, max_steps=-1, learning_rate=5e-4)
    set_params("train", lr_scheduler_type="linear", warmup_steps=0.3, optim="paged_adamw_8bit")
    set_params("train", logging_steps=2, eval_steps=3, save_steps=2)
    assert len(load_from_disk("data/tokenized/train")) == 14
    return workspace


def outs() -> dict[str, str]:
    """Digests of all outs of the stage."""
    return {
        **{f"adapter/{name}": value for name, value in digests(train.ADAPTER).items()},
        **{f"reports/{name}": value for name, value in digests(train.REPORTS).items()},
        "metrics": digest(train.METRICS),
    }


def remove_outs() -> None:
    shutil.rmtree(train.ADAPTER)
    shutil.rmtree(train.REPORTS)
    train.METRICS.unlink()


def forget() -> None:
    """Make the next run start from scratch."""
    remove_outs()
    shutil.rmtree("models/checkpoints")


def weights() -> Tensors:
    return load_file(train.ADAPTER / "adapter_model.safetensors")


def distance(one: Tensors, other: Tensors) -> float:
    """The largest difference between tensors of two adapters, relative to the tensor's norm."""
    assert one.keys() == other.keys()
    return max(((one[n] - other[n]).norm() / (other[n].norm() + 1e-12)).item() for n in one)


def ids_of(step: Step) -> list[list[int]]:
    """The ids of all texts of a step."""
    return [[*map(int, ids)] for each in step.rankings for ids in each.texts.ids]


@torch.no_grad()
def set_adapters(model: PeftModel) -> None:
    """Give new adapters an effect, so that rewards depend on them."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05)


def training_pairs() -> list[Texts]:
    return pairs_of(load_from_disk("data/tokenized/train"))


def stock_reward(model: PeftModel, ids: list[int]) -> torch.Tensor:
    """The reward of a text from transformers' own forward pass: no pack, original layers."""
    with as_in_transformers(model) as classifier:
        classifier.config.pad_token_id = None
        found: torch.Tensor = classifier(input_ids=torch.tensor([ids])).logits[0, 0]
        return found


def curve(name: str) -> list[dict[str, float]]:
    content: list[dict[str, float]] = json.loads((train.REPORTS / f"{name}.json").read_text())
    return content


class Killed(BaseException):
    """Simulates a kill without ending the process of the test."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The pairs and the loss of every training step."""
    seen: list[dict[str, Any]] = []
    original = trainer.RewardTrainer.training_step

    def recorded(self: trainer.RewardTrainer, model: Any, inputs: Any, items: Any = None) -> Any:
        loss = original(self, model, inputs, items)
        pairs = [
            [list(map(int, ranking.texts.ids[side])) for side in (each.j, each.k)]
            for ranking in inputs["step"].rankings
            for each in ranking.comparisons
        ]
        seen.append({"pairs": pairs, "loss": loss.item()})
        return loss

    monkeypatch.setattr(trainer.RewardTrainer, "training_step", recorded)
    return seen


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the stage and kill it after `step` steps."""
    original = trainer.RewardTrainer.training_step

    def killing(self: trainer.RewardTrainer, *arguments: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.RewardTrainer, "training_step", killing)
        with pytest.raises(Killed):
            train.main()


# --- optimization ----------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs_per_step", "use_dora"), [(1, False), (4, True)])
def test_training_matches_a_plain_loop(
    set_params: SetParams, steps: list[dict[str, Any]], pairs_per_step: int, use_dora: bool
) -> None:
    """AdamW by hand, one text per forward pass, with explicit learning rates and clipping.

    With one pair per step it is the article's loop: batch size 1, no padding, no packing.
    """
    rate, decay, norm = 3e-3, 0.1, 0.3
    set_params("lora", lora_dropout=0.0, use_dora=use_dora)
    set_params("train", learning_rate=rate, weight_decay=decay, max_grad_norm=norm)
    set_params("train", warmup_steps=3, logging_steps=1, optim="adamw_torch", tokens_per_pack=200)
    set_params("train", pairs_per_step=pairs_per_step, num_train_epochs=3, max_steps=10)
    train.main()

    groups = (
        params.load("train", trainer.Train),
        params.load("lora", train.Lora),
        params.load("quantization", Quantization),
    )
    model = train.build(*groups)
    trainer.scale_head(model, training_pairs(), 4096)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in trained.items()}
    assert len(steps) == 10
    for step, entry in enumerate(steps):
        losses = []
        for pair in entry["pairs"]:
            chosen, rejected = (stock_reward(model, ids) for ids in pair)
            losses.append(-torch.log(torch.sigmoid(chosen - rejected)))
        loss = sum(losses, torch.zeros(())) / len(losses)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        total = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        now = rate * step / 3 if step < 3 else rate * (10 - step) / (10 - 3)
        logged = curve("training")[step]
        assert entry["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert logged["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert logged["grad_norm"] == pytest.approx(total, rel=1e-3)
        assert logged["learning_rate"] == pytest.approx(now)
        with torch.no_grad():
            for (name, weight), gradient in zip(trained.items(), gradients, strict=True):
                clipped = gradient * min(1.0, norm / (total + 1e-6))
                first, second = state[name]
                first.mul_(0.9).add_(clipped, alpha=0.1)
                second.mul_(0.999).add_(clipped.square(), alpha=0.001)
                weight.mul_(1 - now * decay)
                mean, spread = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
                weight.sub_(now * mean / (spread.sqrt() + 1e-8))
    expected = {
        name.replace(".default", "").replace(".modules_to_save", ""): p.detach()
        for name, p in trained.items()
    }
    assert any("lora_magnitude_vector" in name for name in expected) == use_dora
    assert distance(weights(), expected) < 1e-3


def graded_rankings() -> Dataset:
    """All comparisons of 5, 2 and 3 answers to three prompts, with all kinds of labels."""
    draw = random.Random(0)
    rows = []
    for prompt, count in enumerate((5, 2, 3)):
        shared = [draw.randrange(1000) for _ in range(6)]
        answers = [[*shared, *draw.choices(range(1000), k=3 + place)] for place in range(count)]
        for j, k in itertools.combinations(range(count), 2):
            preference = draw.choice([1.0, 0.5, 0.8])
            rows.append(
                {"prompt_id": str(prompt), "answer_j": j, "answer_k": k, "prefix_length": 6}
                | {"input_ids_j": answers[j], "input_ids_k": answers[k], "preference": preference}
                | {"weight": draw.uniform(0.5, 2), "margin": float(preference == 1)}
            )
    return Dataset.from_list(rows)


@pytest.mark.parametrize("tokens_per_pack", [20, 40, 10**6])
def test_gradient_of_a_step_matches_its_comparisons_one_by_one(
    set_params: SetParams, tokens_per_pack: int
) -> None:
    """Includes rankings that do not fit into a pack; compares with passes of single texts."""
    set_params("lora", lora_dropout=0.0)
    set_params("train", step_of="prompts", center_rewards=0.01, tokens_per_pack=tokens_per_pack)
    options, rows = params.load("train", trainer.Train), graded_rankings()
    steps = Steps(rows, [np.arange(len(rows))])
    run = checkpoints.Run(Path("models/checkpoints/run"))
    ours = trainer.RewardTrainer(built(), options, run, steps, rows, train.REPORTS)
    set_adapters(ours.reward_model)
    sums = ours.attempt(steps[0])
    assert sums is not None
    loss, right, margin, decided = sums.tolist()

    trained = [each for each in ours.reward_model.parameters() if each.requires_grad]
    expected = torch.zeros(())
    margins = []
    for row in rows:
        j, k = (stock_reward(ours.reward_model, row[f"input_ids_{side}"]) for side in "jk")
        above, below = torch.sigmoid(j - k - row["margin"]), torch.sigmoid(k - j + row["margin"])
        p = row["preference"]
        entropy = -p * above.log() - (1 - p) * below.log()
        expected = expected + row["weight"] * (entropy + 0.01 * (j + k) ** 2)
        margins += [(j - k).item()] if p != 0.5 else []
    expected = expected / sum(rows["weight"])
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert (right, decided) == (sum(each > 0 for each in margins), len(margins))
    assert margin == pytest.approx(sum(margins), abs=1e-4)
    for parameter, gradient in zip(trained, torch.autograd.grad(expected, trained), strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7


def test_step_computes_each_answer_once(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_params("train", step_of="prompts", tokens_per_pack=10**6)
    options, rows = params.load("train", trainer.Train), graded_rankings()
    steps = Steps(rows, [np.arange(len(rows))])
    run = checkpoints.Run(Path("models/checkpoints/run"))
    ours = trainer.RewardTrainer(built(), options, run, steps, rows, train.REPORTS)
    computed = []

    def noted(model: Any, batch: Any) -> torch.Tensor:
        computed.append(batch.input_ids.shape[1])
        return rewards(model, batch)

    monkeypatch.setattr(trainer, "rewards", noted)
    ours.attempt(steps[0])
    # Three prompts of 6 tokens each; answers of 3 to 7, 3 and 4, and 3 to 5 tokens.
    assert computed == [3 * 6 + (3 + 4 + 5 + 6 + 7) + (3 + 4) + (3 + 4 + 5)]


def test_curves_of_only_ties_have_no_accuracy(set_params: SetParams, tmp_path: Path) -> None:
    set_params("train", max_steps=2, logging_steps=1, save_steps=2, eval_steps=2)
    rows = graded_rankings()
    ties = rows.filter(lambda row: row["preference"] == 0.5)
    options = params.load("train", trainer.Train)
    steps = Steps(ties, [np.arange(len(ties))] * 2)
    ours = trainer.RewardTrainer(
        built(), options, checkpoints.Run(tmp_path / "run"), steps, rows, tmp_path
    )
    ours.train()
    logged = [entry for entry in ours.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all("accuracy" not in entry for entry in logged)
    progress.write_curves(tmp_path, ours.state.log_history)
    assert read_json(tmp_path / "training.json")[0]["accuracy"] is None


def test_every_epoch_uses_every_pair_once_in_its_own_order(
    steps: list[dict[str, Any]],
) -> None:
    train.main()
    ids = [str([list(map(int, text)) for text in texts.ids]) for texts in training_pairs()]
    order = [[str(pair) for pair in entry["pairs"]] for entry in steps]
    first, second = [*chain(*order[:4])], [*chain(*order[4:])]
    assert [len(step) for step in order] == [4, 4, 4, 2] * 2
    assert sorted(first) == sorted(second) == sorted(ids)
    assert len({tuple(ids), tuple(first), tuple(second)}) == 3


def test_result_does_not_depend_on_the_size_of_packs(set_params: SetParams) -> None:
    set_params("lora", lora_dropout=0.0)
    set_params("train", num_train_epochs=3, max_steps=10, logging_steps=1, optim="adamw_torch")
    found = []
    for tokens_per_pack in (1, 200, 10**6):
        set_params("train", tokens_per_pack=tokens_per_pack)
        train.main()
        found.append((weights(), curve("training")))
    expected_weights, expected_curve = found[2]
    for adapter, figures in found[:2]:
        assert distance(adapter, expected_weights) < 1e-3
        for entry, expected in zip(figures, expected_curve, strict=True):
            assert entry == pytest.approx(expected, rel=1e-3)


def test_gradient_checkpointing_does_not_change_the_result(set_params: SetParams) -> None:
    set_params("train", max_steps=4)
    train.main()
    expected = weights()
    set_params("train", gradient_checkpointing=True)
    train.main()
    assert distance(weights(), expected) < 1e-4


@pytest.mark.parametrize("room", [80, 130])
def test_step_that_runs_out_of_memory_restarts_with_smaller_packs(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Memory runs out in the backward pass, after part of the gradient was added."""
    set_params("lora", lora_dropout=0.0)
    set_params("train", max_steps=4, logging_steps=1)
    train.main()
    expected, expected_curve = weights(), curve("training")
    forget()
    original, failed = rewards, []

    def limited(model: Any, batch: Any) -> torch.Tensor:
        found = original(model, batch)
        if found.requires_grad and batch.input_ids.shape[1] > room:
            failed.append(batch.input_ids.shape[1])
            found.sum().backward()
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(trainer, "rewards", limited)
    train.main()
    assert failed
    assert distance(weights(), expected) < 1e-3
    for entry, figures in zip(curve("training"), expected_curve, strict=True):
        assert entry == pytest.approx(figures, rel=1e-3)


def test_repeated_step_uses_the_same_random_numbers(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pack has one pair, whatever the limit, so dropout draws the same masks in both runs."""
    set_params("train", max_steps=3, pairs_per_step=1, logging_steps=2)
    train.main()
    expected = weights()
    forget()
    original, calls = rewards, []

    def once(model: Any, batch: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 2:
            original(model, batch).sum().backward()
            raise torch.OutOfMemoryError
        return original(model, batch)

    monkeypatch.setattr(trainer, "rewards", once)
    monkeypatch.setattr(trainer, "halved", lambda held, least, place: 10**6)
    train.main()
    assert len(calls) == 4
    assert distance(weights(), expected) == 0


def test_dropout_of_a_pack_depends_on_the_seed_its_step_and_its_number(
    set_params: SetParams,
) -> None:
    set_params("lora", lora_dropout=0.5)
    ours = new_trainer()
    set_adapters(ours.reward_model)
    step = ours.steps[0]
    [held] = step.packs(ours.tokens_per_pack)

    def addend(seed: int, done: int, number: int) -> tuple[float, ...]:
        ours.args.seed, ours.state.global_step = seed, done
        return tuple(ours.addend(step, [held] * 2, number).tolist())

    found = [addend(*each) for each in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert addend(0, 0, 0) == found[0]
    assert len({*found}) == 4


def test_pair_too_long_for_memory_stops_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(trainer, "rewards", never)
    with pytest.raises(Fault, match=r"^step 1: out of memory for a pair of \d+ tokens; lower"):
        train.main()
    assert not train.ADAPTER.exists()


def test_all_modules_are_in_training_mode_before_the_first_step() -> None:
    """transformers loads a base in eval mode, in which layers would not be checkpointed."""
    assert all(module.training for module in new_trainer().reward_model.modules())


def test_steps_drop_and_clip_gradients_without_a_look_at_the_base(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer would walk over all of its modules after every step, which takes long."""
    set_params("train", max_steps=3, max_grad_norm=1e-3)
    ours = new_trainer()
    monkeypatch.delattr(torch.nn.Module, "zero_grad")
    monkeypatch.delattr("accelerate.Accelerator.clip_grad_norm_")
    norms, step = [], ours._clip_grad_norm

    def noted(model: torch.nn.Module) -> torch.Tensor:
        found = step(model)
        gradients = [each.grad.flatten() for each in ours.trained if each.grad is not None]
        assert len(gradients) == len(ours.trained)
        norms.append((found.item(), torch.cat(gradients).norm().item()))
        return found

    monkeypatch.setattr(ours, "_clip_grad_norm", noted)
    ours.train()
    assert len(norms) == 3
    for before, after in norms:
        assert before > 1e-3
        assert after == pytest.approx(1e-3, rel=1e-3)
    assert all(each.grad is None for each in ours.trained)


@pytest.mark.parametrize("room", [90, 150, 220, 10**6])
def test_auto_finds_the_largest_pack_that_fits_in_memory(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    set_params("train", tokens_per_pack="auto")
    ours = new_trainer()
    assert ours.tokens_per_pack == 4096
    original = rewards

    def limited(model: Any, batch: Any) -> torch.Tensor:
        if batch.input_ids.shape[1] > room:
            raise torch.OutOfMemoryError
        return original(model, batch)

    monkeypatch.setattr(trainer, "rewards", limited)
    before = torch.get_rng_state()
    found = trainer.largest_pack(ours)
    lengths = sorted((tokens(texts) for texts in training_pairs()), reverse=True)
    if room == 10**6:
        assert found == sum(lengths[:4])
    else:
        assert lengths[0] * 7 // 8 <= found <= room
        assert found >= room * 0.6 or found * 8 // 7 <= lengths[0] + 1
    assert all(parameter.grad is None for parameter in ours.reward_model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_without_room_for_the_optimizer_is_a_fault(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_params("train", tokens_per_pack="auto")
    ours = new_trainer()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(Fault, match=r"^before the first step: out of memory for a pair of"):
        trainer.largest_pack(ours)


def test_auto_counts_only_the_tokens_that_it_tried(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between one and two of the longest pairs, no other size can be tried."""
    set_params("train", tokens_per_pack="auto")
    ours = new_trainer()
    longest = max(tokens(texts) for texts in training_pairs())

    def limited(step: Step) -> Any:
        return True if len(step.rankings) == 1 else None

    monkeypatch.setattr(ours, "attempt", limited)
    assert trainer.largest_pack(ours) == longest - longest // 8
    assert f"packs of {longest} tokens fit" in capsys.readouterr().out


@pytest.mark.parametrize("checkpointing", [True, False])
def test_auto_tries_packs_under_training_conditions_smallest_first(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    set_params("train", tokens_per_pack="auto", gradient_checkpointing=checkpointing)
    ours = new_trainer()
    tried, original = [], ours.attempt

    def noted(step: Step) -> torch.Tensor | None:
        layers = cast(Any, ours.reward_model.get_base_model()).base_model.layers
        tried.append((ours.tokens_per_pack, {layer.gradient_checkpointing for layer in layers}))
        return original(step)

    monkeypatch.setattr(ours, "attempt", noted)
    most = trainer.largest_pack(ours)
    least = max(tokens(texts) for texts in training_pairs())
    assert tried == [(least, {checkpointing}), (most, {checkpointing})]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("Allocation on device"),
        *map(
            RuntimeError,
            (
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
                "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasSgemm(handle)`",
                "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
            ),
        ),
    ],
)
def test_out_of_memory_errors_are_recognized(error: Exception) -> None:
    assert within_memory(Mock(side_effect=error)) is None


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(`",
        "CUDA error: an illegal memory access was encountered",
    ],
)
def test_other_errors_of_cuda_are_raised(message: str) -> None:
    with pytest.raises(RuntimeError, match="CUDA error"):
        within_memory(Mock(side_effect=RuntimeError(message)))


def test_memory_of_work_that_failed_is_free_without_the_garbage_collector() -> None:
    kept = []

    def work() -> None:
        tensor = torch.zeros(3)
        kept.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError

    gc.disable()
    try:
        assert within_memory(work) is None
        assert kept[0]() is None
    finally:
        gc.enable()


def test_deterministic_kernels_are_required_without_warn_only(set_params: SetParams) -> None:
    """With warn_only, attention on a GPU would use other kernels."""
    for deterministic in (True, False):
        set_params("train", deterministic=deterministic)
        built()
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_pack_size_is_in_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, steps: list[dict[str, Any]]
) -> None:
    sizes = []
    original = trainer.RewardTrainer.addend

    def recorded(self: trainer.RewardTrainer, *arguments: Any) -> torch.Tensor:
        sizes.append(self.tokens_per_pack)
        if len(sizes) == 2:
            raise torch.OutOfMemoryError
        return original(self, *arguments)

    monkeypatch.setattr(trainer.RewardTrainer, "addend", recorded)
    kill_at(5, monkeypatch)
    train.main()
    assert sizes[:2] == [4096, 4096]
    assert len(set(sizes[2:])) == 1
    assert sizes[2] < 4096
    assert len(steps) == 5 + 4


# --- start and faults ------------------------------------------------------------------------


def test_all_linear_layers_can_be_adapted_with_rank_stabilization_and_dropout(
    set_params: SetParams,
) -> None:
    set_params("lora", r=4, lora_alpha=32, use_rslora=True, target_modules="all-linear")
    set_params("lora", lora_dropout=0.5)
    layers = [each for each in built().modules() if isinstance(each, LoraLayer)]
    assert len(layers) == 2 * 7
    assert {each.scaling["default"] for each in layers} == {32 / 2}
    assert {str(each.lora_dropout["default"]) for each in layers} == {str(nn.Dropout(0.5))}


def test_seed_determines_adapters_head_order_dropout_and_validation_pairs(
    set_params: SetParams,
) -> None:
    set_params("preprocess", validation_fraction=0.4)
    preprocess.main()

    def drawn(seed: int) -> dict[str, Any]:
        set_params("train", seed=seed, validation_pairs=1)
        ours = new_trainer()
        weights = {
            name: each.tolist()
            for name, each in ours.reward_model.named_parameters()
            if each.requires_grad and "lora_B" not in name
        }
        texts = {"order": [ids_of(each) for each in ours.steps]}
        return weights | texts | {"validation": ids_of(ours.validation), "dropout": ours.args.seed}

    first, again, other = map(drawn, (0, 0, 1))
    assert len(first) == 2 * 7 + 1 + 3
    assert first == again
    assert [name for name in first if first[name] == other[name]] == []


def test_initial_margins_are_small_whatever_the_scale_of_the_head() -> None:
    model, pairs = built(), training_pairs()
    with torch.no_grad():
        for parameter in head_of(model.get_base_model()).parameters():
            parameter.mul_(1000)
    chosen, rejected = chosen_and_rejected(score(model, pairs, 4096))
    assert (chosen - rejected).std() > 10
    trainer.scale_head(model, pairs, 4096)
    chosen, rejected = chosen_and_rejected(score(model, pairs, 4096))
    margins = (chosen - rejected).tolist()
    mean = sum(margins) / len(margins)
    deviation = math.sqrt(sum((margin - mean) ** 2 for margin in margins) / len(margins))
    loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    assert 0 < deviation <= 0.1
    assert abs(loss - math.log(2)) <= 0.05


def test_large_initial_margins_stop_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "HEAD_MARGIN", 100.0)
    model, pairs = built(), training_pairs()
    with torch.no_grad():
        for parameter in head_of(model.get_base_model()).parameters():
            parameter.mul_(1000)
    with pytest.raises(Fault, match="before the first step the margins have a standard deviation"):
        trainer.scale_head(model, pairs, 4096)


def test_non_finite_rewards_stop_the_stage() -> None:
    model, pairs = built(), training_pairs()
    with torch.no_grad():
        for parameter in head_of(model.get_base_model()).parameters():
            parameter.fill_(math.inf)
    with pytest.raises(Fault, match="not finite"):
        trainer.scale_head(model, pairs, 4096)


@pytest.mark.parametrize("eval_steps", [1, 20])
def test_non_finite_loss_stops_the_stage_and_names_the_step(
    set_params: SetParams, eval_steps: int
) -> None:
    set_params("train", learning_rate=1e30, warmup_steps=0, eval_steps=eval_steps)
    name, step = ("validation loss", 1) if eval_steps == 1 else ("loss", 2)
    with pytest.raises(Fault, match=rf"^the {name} is (nan|inf) at step {step}; lower train\.lear"):
        train.main()
    assert not train.ADAPTER.exists()
    assert not train.METRICS.exists()


@pytest.mark.parametrize(
    ("group", "values", "name"),
    [
        ("lora", {"lora_alpha": 1e30}, "norm of the gradient"),
        ("train", {"center_rewards": 1e300}, "loss"),
    ],
)
def test_value_that_is_not_finite_is_reported_with_what_can_help(
    set_params: SetParams, group: str, values: dict[str, float], name: str
) -> None:
    set_params("train", logging_steps=1)
    set_params(group, **values)
    with pytest.raises(Fault) as fault:
        train.main()
    assert str(fault.value) == (
        f"the {name} is inf at step 1; lower train.learning_rate, train.max_grad_norm, "
        "train.weight_decay, train.center_rewards or lora.lora_alpha, or set "
        "quantization.compute_dtype to float32, then run again"
    )


def test_figures_that_are_read_late_keep_no_gradients_in_memory() -> None:
    ours = new_trainer()
    found = ours.attempt(ours.steps[0])
    assert found is not None
    assert found.untyped_storage().nbytes() == 16


def test_figures_that_are_read_late_are_the_same(set_params: SetParams) -> None:
    """As on a GPU, where reading them waits for the GPU."""
    set_params("train", max_steps=5, logging_steps=2, eval_steps=3)
    curves = []
    for every_step in (True, False):
        ours = new_trainer()
        ours.reads_every_step = every_step
        ours.begin(new_head=True)
        points = ours.state.log_history
        curves.append([each for each in points if {"loss", "eval_loss"} & each.keys()])
    assert curves[0] == curves[1]
    assert [each["step"] for each in curves[0] if "loss" in each] == [2, 4]


@pytest.mark.parametrize(("eval_steps", "read_at"), [(20, 5), (3, 3)])
def test_non_finite_loss_that_is_read_late_names_its_step(
    set_params: SetParams, eval_steps: int, read_at: int
) -> None:
    """And no checkpoint is written after that step."""
    steps = {"logging_steps": 5, "save_steps": 5, "eval_steps": eval_steps}
    set_params("train", learning_rate=1e30, warmup_steps=0, **steps)
    ours = new_trainer()
    ours.reads_every_step = False
    with pytest.raises(Fault, match=r"^the loss is (nan|inf) at step 2;"):
        ours.begin(new_head=True)
    assert ours.state.global_step == read_at
    assert not ours.run.latest()


def test_save_steps_must_be_a_multiple_of_logging_steps(set_params: SetParams) -> None:
    set_params("train", save_steps=3)
    with pytest.raises(Fault, match=r"train\.save_steps is 3, must be a multiple of"):
        train.main()


@pytest.mark.parametrize(
    ("key", "value"), [("optim", "lion_8bit"), ("lr_scheduler_type", "warmup_stable_decay")]
)
def test_optimizers_and_schedules_that_need_extra_arguments_are_refused(
    set_params: SetParams, key: str, value: str
) -> None:
    set_params("train", **{key: value})
    with pytest.raises(Fault, match=rf"train\.{key} is '{value}', must be one of"):
        train.main()


def test_every_offered_optimizer_and_schedule_can_be_created(
    set_params: SetParams, tmp_path: Path
) -> None:
    model, rows = built(), load_from_disk("data/tokenized/train")
    for index in range(max(len(trainer.OPTIMIZERS), len(trainer.SCHEDULES))):
        optim = trainer.OPTIMIZERS[index % len(trainer.OPTIMIZERS)]
        schedule = trainer.SCHEDULES[index % len(trainer.SCHEDULES)]
        set_params("train", optim=optim, lr_scheduler_type=schedule)
        group = params.load("train", trainer.Train)
        run, steps = checkpoints.Run(tmp_path), train.steps(group, rows)
        ours = trainer.RewardTrainer(model, group, run, steps, rows, tmp_path)
        ours.create_optimizer_and_scheduler(8)
        assert ours.lr_scheduler is not None
        assert 0 <= ours.lr_scheduler.get_last_lr()[0] <= group.learning_rate


def test_rate_at_which_the_polynomial_schedule_ends_is_refused(set_params: SetParams) -> None:
    set_params("train", lr_scheduler_type="polynomial", learning_rate=1e-7)
    with pytest.raises(
        Fault, match=r"train\.learning_rate is 1e-07, must be above 1e-07, at which"
    ):
        train.main()


@pytest.mark.parametrize(
    ("warmup_steps", "schedule", "noted"),
    [
        *((7, "linear", 0), (8, "linear", 8), (0.9, "linear", 8)),
        *((100, "cosine", 100), (8, "constant", 0)),
    ],
)
def test_warm_up_as_long_as_training_is_noted_in_one_line(
    tmp_path: Path,
    set_params: SetParams,
    capsys: pytest.CaptureFixture[str],
    warmup_steps: float,
    schedule: str,
    noted: int,
) -> None:
    set_params("train", warmup_steps=warmup_steps, lr_scheduler_type=schedule, optim="adamw_torch")
    trainer.arguments(params.load("train", trainer.Train), tmp_path, 8)
    note = (
        f"note       the warm-up takes {noted} steps and training has only 8, so the learning rate "
        "never reaches its peak; lower train.warmup_steps\n"
    )
    assert capsys.readouterr().out == (note if noted else "")


def test_only_step_of_a_warm_up_is_said_to_learn_nothing(
    tmp_path: Path, set_params: SetParams, capsys: pytest.CaptureFixture[str]
) -> None:
    set_params("train", warmup_steps=0.1)
    trainer.arguments(params.load("train", trainer.Train), tmp_path, 1)
    assert "so the learning rate is 0 and nothing is learned; lower" in capsys.readouterr().out


def test_adapters_that_do_not_fit_in_memory_are_named(set_params: SetParams) -> None:
    set_params("lora", r=10**11)
    with pytest.raises(Fault, match=f"adapters of rank {10**11} do not fit in memory; lower lora"):
        train.main()


def test_tracker_that_is_not_installed_is_named_before_the_model_is_loaded(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    monkeypatch.delattr(train, "build")
    set_params("train", report_to="mlflow")
    with pytest.raises(Fault, match=r"train\.report_to is mlflow, which is not installed"):
        train.main()


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("evaluate", {"tokens_per_pack": 0}, "evaluate.tokens_per_pack is 0, must be a posit"),
        ("export", {"merge": "fp16"}, "export.merge is 'fp16', must be one of float32, bfloat16"),
        ("export", {"clients": "all"}, "export.clients is all, but trl and sentence-transformers"),
    ],
)
def test_value_that_a_later_stage_refuses_ends_training_before_the_model_is_loaded(
    set_params: SetParams,
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    values: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("reward.after_training.find_spec", lambda name: None)
    monkeypatch.delattr(train, "build")
    set_params(group, **values)
    with pytest.raises(Fault, match=message):
        train.main()


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit"])
def test_cuda_optimizers_fall_back_with_one_line(
    tmp_path: Path,
    set_params: SetParams,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    optim: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_params("train", optim=optim)
    found = trainer.arguments(params.load("train", trainer.Train), tmp_path, 8)
    assert found.optim == "adamw_torch_fused"
    assert capsys.readouterr().out.startswith(f"optimizer  adamw_torch_fused instead of {optim}, ")


def test_number_of_pairs_per_step_does_not_depend_on_visible_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    found = trainer.arguments(params.load("train", trainer.Train), tmp_path, 8)
    assert found.device == torch.device("cuda:0")
    assert (found.per_device_train_batch_size, found.train_batch_size) == (1, 1)


@pytest.mark.parametrize("compute_dtype", ["auto", "float32"])
@pytest.mark.parametrize(
    ("found", "faster"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_bf16": False}, False)],
)
def test_auto_reports_in_one_line_if_bf16_would_be_faster(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: dict[str, bool],
    faster: bool,
    compute_dtype: Any,
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: found)
    train.report_precision(Quantization.unquantized(compute_dtype))
    printed = capsys.readouterr().out
    assert printed.count("\n") == ("bf16 would be faster" in printed)
    assert ("bf16 would be faster" in printed) == (faster and compute_dtype == "auto")


# --- output ----------------------------------------------------------------------------------


def test_run_writes_adapter_curves_and_metrics_and_prints_no_noise(
    steps: list[dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {})
    train.main()
    assert set(outs()) == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/digests.json",
        "adapter/quantization.json",
        "adapter/template.json",
        "adapter/training.json",
        "reports/figures.json",
        "reports/training.json",
        "reports/validation.json",
        "metrics",
    }
    training, validation = curve("training"), curve("validation")
    assert [entry["step"] for entry in training] == [2, 4, 6, 8]
    assert [entry["step"] for entry in validation] == [3, 6, 8]
    for index, entry in enumerate(training):
        one, other = (steps[2 * index + i]["loss"] for i in (0, 1))
        assert entry["loss"] == pytest.approx((one + other) / 2)
        assert 0 <= entry["accuracy"] <= 1
        assert entry["margin"] != 0
        assert entry["grad_norm"] > 0
        assert entry.keys() == {
            *("step", "loss", "accuracy", "margin", "learning_rate", "grad_norm")
        }
    rates = [5e-4 * x for x in (1 / 3, 5 / 5, 3 / 5, 1 / 5)]
    assert [entry["learning_rate"] for entry in training] == pytest.approx(rates)
    figures = json.loads((train.REPORTS / "figures.json").read_text())
    assert figures["validation"] == validation[-1]
    assert figures.keys() == {"steps", "base_parameters", "trainable_parameters", "validation"}
    adapter = json.loads((train.ADAPTER / "training.json").read_text())
    base = load_file("models/base/model.safetensors")
    layers = [each.numel() for name, each in base.items() if "_proj.weight" in name]
    rest = sum(each.numel() for each in base.values()) - sum(layers)
    assert figures["base_parameters"] == {"four_bits": sum(layers), "half": 0, "full": rest}
    assert adapter["base_parameters"] == figures["base_parameters"]
    assert json.loads(train.METRICS.read_text()) == {
        "steps": 8,
        "validation/accuracy": validation[-1]["accuracy"],
        "validation/loss": validation[-1]["loss"],
        "validation/step": 8,
    }
    printed = capfd.readouterr()
    assert printed.err == ""
    assert [line.split()[0] for line in printed.out.splitlines()] == [
        *(
            "base",
            "optimizer",
            "trainable",
            "step",
            "step",
            "step",
            "speed",
            "validation",
            "trained",
        )
    ]


def test_eval_steps_may_be_a_fraction_of_all_steps(set_params: SetParams) -> None:
    set_params("train", max_steps=8, eval_steps=0.4)
    train.main()
    assert [point["step"] for point in curve("validation")] == [4, 8]


def labelled(prompts: list[str], preference: list[float]) -> Dataset:
    grades = {"preference": preference, "weight": [1.0] * len(prompts)}
    grades |= {"margin": [0.0] * len(prompts)}
    return Dataset.from_dict({"prompt_id": prompts, "row": range(len(prompts))} | grades)


@pytest.mark.parametrize("most", [1, 30, 31, 99, 100])
def test_validation_uses_whole_prompts_up_to_a_number_of_pairs(most: int) -> None:
    prompts = [f"p{index // 3}" for index in range(100)]
    rows = labelled(prompts, [1.0] * 100)
    found = trainer.validation_sample(rows, most, 0)
    assert most <= len(found) < most + 3
    assert list(found["row"]) == sorted(found["row"])
    for prompt in set(found["prompt_id"]):
        assert list(found["prompt_id"]).count(prompt) == prompts.count(prompt)
    if most < 99:
        assert list(found["row"]) != list(trainer.validation_sample(rows, most, 1)["row"])


@pytest.mark.parametrize("decided", range(10))
def test_validation_draws_on_until_a_pair_is_not_a_tie(decided: int) -> None:
    preference = [0.5] * 10
    preference[decided] = 0.8
    rows = labelled([str(index) for index in range(10)], preference)
    found = [*trainer.validation_sample(rows, 1, 0)["row"]]
    assert decided in found
    assert [*trainer.validation_sample(rows, len(found), 0)["row"]] == found


def test_printed_validation_pairs_are_those_that_accuracy_counts(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_a_tie(dataset: Dataset, *_: Any) -> Dataset:
        preference = [0.5] + [1.0] * (len(dataset) - 1)
        return dataset.remove_columns("preference").add_column("preference", preference)

    monkeypatch.setattr(trainer, "validation_sample", with_a_tie)
    set_params("train", max_steps=1)
    assert len(load_from_disk("data/tokenized/validation")) == 2
    train.main()
    assert " of 1 pair\n" in capsys.readouterr().out


def test_curves_are_written_during_training(
    monkeypatch: pytest.MonkeyPatch, set_params: SetParams
) -> None:
    set_params("train", max_steps=8, logging_steps=1, eval_steps=2, save_steps=8)
    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_CURVES", -1.0)
    kill_at(6, monkeypatch)
    assert [entry["step"] for entry in curve("training")] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in curve("validation")] == [2, 4, 6]
    assert not train.METRICS.exists()
    assert not train.ADAPTER.exists()


def test_first_loss_is_that_of_an_undecided_model(set_params: SetParams) -> None:
    set_params("train", max_steps=2, logging_steps=1)
    train.main()
    assert curve("training")[0]["loss"] == pytest.approx(math.log(2), abs=0.05)


@pytest.fixture
def overtrained(set_params: SetParams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation pairs whose loss is smallest at a margin of 1.39, which training exceeds."""
    set_params("train", keep="best", learning_rate=8e-3, lr_scheduler_type="constant")
    set_params("train", eval_steps=1, save_steps=1, logging_steps=1)

    def uncertain(dataset: Dataset, *_: Any) -> Dataset:
        return dataset.remove_columns("preference").add_column("preference", [0.8] * len(dataset))

    monkeypatch.setattr(trainer, "validation_sample", uncertain)


@pytest.mark.usefixtures("overtrained")
def test_best_adapter_has_the_smallest_validation_loss_and_survives_a_kill(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Uses DoRA; like all trained weights, its magnitudes are kept and are in checkpoints."""
    seen: dict[int, list[torch.Tensor]] = {}
    original = trainer.RewardTrainer.evaluate

    def noted(self: trainer.RewardTrainer, *arguments: Any, **named: Any) -> dict[str, float]:
        seen[self.state.global_step] = [each.detach().clone() for each in self.trained]
        return original(self, *arguments, **named)

    monkeypatch.setattr(trainer.RewardTrainer, "evaluate", noted)
    set_params("lora", use_dora=True)
    set_params("train", max_steps=6)
    train.main()
    points = curve("validation")
    losses = [point["loss"] for point in points]
    best = losses.index(min(losses))
    assert 0 < best < 3
    step = int(points[best]["step"])
    kept = {digest_of(each) for each in weights().values()}
    assert any("lora_magnitude_vector" in name for name in weights())
    assert kept == {digest_of(each) for each in seen[step]}
    assert read_json(train.METRICS) == {"steps": 6} | {
        f"validation/{name}": points[best][name] for name in ("accuracy", "loss", "step")
    }
    assert read_json(train.REPORTS / "figures.json")["validation"] == points[best]
    assert f"kept       the adapter of step {step} of 6\n" in capsys.readouterr().out

    expected = outs()
    forget()
    kill_at(5, monkeypatch)
    left = {path.name for path in Path("models/checkpoints").glob("*/step-*")}
    assert left == {"step-4", "step-5"}  # the checkpoint of the best step is gone
    train.main()
    assert outs() == expected


def digest_of(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


# --- interruptions ---------------------------------------------------------------------------


UNDISTURBED: dict[int, dict[str, str]] = {}


@pytest.fixture
def undisturbed(set_params: SetParams) -> Callable[[int], dict[str, str]]:
    """The outs of an uninterrupted run of `max_steps` steps, made once for all tests."""

    def run(max_steps: int) -> dict[str, str]:
        set_params("train", max_steps=max_steps)
        if max_steps not in UNDISTURBED:
            train.main()
            UNDISTURBED[max_steps] = outs()
            remove_outs()
            shutil.rmtree("models/checkpoints")
        return UNDISTURBED[max_steps]

    return run


@pytest.mark.parametrize(
    ("killed", "max_steps", "left"),
    [
        (1, -1, 8),  # before the first checkpoint
        (3, -1, 6),  # in the middle of an epoch
        (5, -1, 4),  # with a checkpoint at the end of an epoch
        (5, 7, 3),
    ],
)
def test_killed_run_ends_with_the_bytes_of_an_uninterrupted_one(
    undisturbed: Callable[[int], dict[str, str]],
    steps: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    killed: int,
    max_steps: int,
    left: int,
) -> None:
    expected = undisturbed(max_steps)
    kill_at(killed, monkeypatch)
    assert not train.ADAPTER.exists()
    steps.clear()
    train.main()
    assert len(steps) == left
    assert outs() == expected


@pytest.mark.parametrize("max_steps", [-1, 7])
def test_run_killed_after_its_last_step_writes_its_outs_without_extra_steps(
    undisturbed: Callable[[int], dict[str, str]],
    steps: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    max_steps: int,
) -> None:
    expected = undisturbed(max_steps)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train, "write", killed)
        with pytest.raises(Killed):
            train.main()
    steps.clear()
    train.main()
    assert not steps
    assert outs() == expected


def test_finished_run_restarts_only_once_dvc_lock_records_it(
    undisturbed: Callable[[int], dict[str, str]], steps: list[dict[str, Any]]
) -> None:
    expected = undisturbed(-1)
    train.main()
    steps.clear()
    remove_outs()
    train.main()
    assert not steps
    assert outs() == expected

    md5 = hashlib.md5(train.METRICS.read_bytes(), usedforsecurity=False).hexdigest()
    content = {"stages": {"train": {"outs": [{"path": str(train.METRICS), "md5": md5}]}}}
    Path("dvc.lock").write_text(json.dumps(content))
    remove_outs()
    train.main()
    assert len(steps) == 8
    assert outs() == expected


def test_damaged_checkpoint_is_skipped_for_the_previous_one(
    undisturbed: Callable[[int], dict[str, str]],
    steps: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = undisturbed(-1)
    kill_at(5, monkeypatch)
    [latest] = Path("models/checkpoints").glob("*/step-4")
    (latest / "optimizer.pt").unlink()
    steps.clear()
    train.main()
    assert len(steps) == 6
    assert outs() == expected


def test_checkpoints_contain_nothing_that_could_run_code(
    undisturbed: Callable[[int], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states of the Trainer are pickles, and all are loaded with weights_only."""
    undisturbed(-1)
    kill_at(3, monkeypatch)
    read: dict[str, Any] = {}
    original = torch.load

    def spy(file: Any, *arguments: Any, **options: Any) -> Any:
        read[Path(file).name] = options.get("weights_only")
        return original(file, *arguments, **options)

    monkeypatch.setattr(torch, "load", spy)
    train.main()
    assert read == {"optimizer.pt": True, "scheduler.pt": True, "rng_state.pth": True}
    [last] = Path("models/checkpoints").glob("*/step-8")
    assert {path.name for path in last.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "digests.json"),
        *("optimizer.pt", "packs.json", "rng_state.pth", "scheduler.pt", "trainer_state.json"),
    }


def test_each_set_of_parameters_has_its_own_checkpoints_and_one_trainer(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path("models/checkpoints")
    kill_at(0, monkeypatch)
    [first] = [path for path in root.iterdir() if path.is_dir()]
    with checkpoints.locked(first.name), monkeypatch.context() as patch:
        patch.setattr(time, "sleep", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train.main()
    assert f"another trainer of the same run uses {first}" in capsys.readouterr().out
    for group, change in (
        ("lora", {"use_dora": True}),
        ("train", {"seed": 1}),
        ("quantization", {"double_quant": True}),
    ):
        before = {path.name for path in root.iterdir()}
        set_params(group, **change)
        kill_at(0, monkeypatch)
        assert len({path.name for path in root.iterdir()} - before) == 1


def test_resumed_run_keeps_its_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number of processors may have changed by then, and sums of floats depend on it."""
    threads = [3]
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(train, "threads", lambda: 5)
    kill_at(3, monkeypatch)
    assert threads == [3, 5]
    monkeypatch.setattr(train, "threads", lambda: 2)
    train.main()
    assert threads == [3, 5, 2, 5]
    [last] = Path("models/checkpoints").glob("*/step-8")
    assert read_json(last / "packs.json")["threads"] == 5


def test_run_killed_by_sigkill_resumes_in_a_new_process(
    undisturbed: Callable[[int], dict[str, str]],
) -> None:
    expected = undisturbed(-1)
    with Forked(train_until, 5) as killed:
        _, errors = killed.communicate()
        assert killed.returncode == -signal.SIGKILL, errors
    assert not train.ADAPTER.exists()
    with Forked(train_until, -1) as resumed:
        printed, errors = resumed.communicate()
        assert resumed.returncode == 0, errors
    assert "resuming   from step-4" in printed
    assert outs() == expected


@pytest.mark.parametrize("longest", ["longrope", "positions"])
def test_maximum_length_beyond_the_base_is_refused_before_the_first_step(
    longest: str, set_params: SetParams, steps: list[dict[str, Any]]
) -> None:
    """The limit counts, not the lengths of training texts, because test texts may be longer."""
    config = read_json(train.BASE / "config.json")
    config["max_position_embeddings"] = 1024 if longest == "positions" else 131072
    if longest == "longrope":
        factors = [1.0] * 8
        config["rope_parameters"] = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": 1024,
        }
    write_json(train.BASE / "config.json", config)
    base = read_json(train.BASE / "base.json")
    base["files"]["config.json"] = digest(train.BASE / "config.json")
    write_json(train.BASE / "base.json", base)
    with pytest.raises(Fault) as fault:
        train.main()
    assert "preprocess.max_length is 2040, but models/base " in str(fault.value)
    assert str(fault.value).endswith("; set it to at most 1024")
    assert steps == []
    set_params("preprocess", max_length=1024)
    preprocess.main()
    set_params("train", max_steps=2)
    train.main()


def test_maximum_length_beyond_a_window_that_attention_does_not_get_is_refused() -> None:
    for window, most in ((None, 64), (64, 64), (131072, 4096)):
        require_length(AutoConfig.for_model("phimoe", sliding_window=window), train.BASE, most)
    config = AutoConfig.for_model("phimoe", sliding_window=64)
    with pytest.raises(Fault, match=r"max_length is 65, but models/base has .* at most 64$"):
        require_length(config, train.BASE, 65)
    require_length(AutoConfig.for_model("mistral", sliding_window=64), train.BASE, 65)


def test_fingerprint_depends_on_the_dtype_that_auto_selects(set_params: SetParams) -> None:
    """A run that was killed on a GPU is not resumed with another dtype on a CPU."""
    set_params("train", max_steps=1)
    for dtype in ("auto", "float32", "bfloat16"):
        set_params("quantization", compute_dtype=dtype)
        train.main()
    runs = [path for path in Path("models/checkpoints").iterdir() if path.is_dir()]
    assert len(runs) == 2


def test_packs_of_both_splits_are_checked_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = Mock(side_effect=[None, Fault("differs")])
    monkeypatch.setattr(train, "require_exact", checked)
    monkeypatch.delattr(trainer.RewardTrainer, "fit")
    with pytest.raises(Fault, match="differs"):
        train.main()
    assert checked.call_count == 2


def test_training_shorter_than_an_interval_has_a_point_in_its_curve(set_params: SetParams) -> None:
    set_params("train", max_steps=1, logging_steps=2, save_steps=2)
    train.main()
    assert [point["step"] for point in curve("training")] == [1]


def test_small_head_is_not_scaled_up() -> None:
    model = built()
    head = head_of(model.get_base_model())
    with torch.no_grad():
        head.weight.mul_(1e-3)
    before = head.weight.clone()
    trainer.scale_head(model, training_pairs(), 4096)
    assert torch.equal(head.weight, before)


def test_fingerprint_depends_on_the_template_and_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fingerprint() -> str:
        groups: tuple[tuple[str, Any], ...] = (
            ("train", trainer.Train),
            ("lora", train.Lora),
            ("quantization", Quantization),
        )
        return train.fingerprint(*(params.load(name, kind) for name, kind in groups))

    before, path = fingerprint(), train.TOKENIZED / "template.json"
    content = read_json(path)
    write_json(path, content | {"max_length": content["max_length"] - 1})
    assert fingerprint() != before
    write_json(path, content)
    assert fingerprint() == before
    monkeypatch.setattr(train, "device", lambda: torch.device("cuda"))
    assert fingerprint() != before
