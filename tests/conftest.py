"""Shared fixtures: a tiny base model, folders to work in, and the rule for skipped tests."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

# Set before torch is imported: threads cost more than they gain in small passes. If there are
# several, here or in processes that tests start, a waiting thread yields its processor.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# All other tests run on the CPU; `pytest -m cuda` runs the GPU tests.
if "cuda" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest

from reward.process import processors
from tests import support
from tests.support import PARAMS, ROOT, run_clients_here, write_pairs

NEEDS = ("cuda", "browser")
# The files that take longest. Left for the end, they would keep one worker busy and the other idle.
LONGEST = ("pipeline", "export", "train", "distributed", "disk")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the LONGEST files, and skip tests that need a GPU or a browser without one."""
    import torch

    from tools.browser import CHROMIUM

    here = {"cuda": torch.cuda.is_available(), "browser": CHROMIUM is not None}
    for item in items:
        for name in NEEDS:
            if item.get_closest_marker(name) and not here[name]:
                item.add_marker(pytest.mark.skip(reason=f"needs {name}"))
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def stage_threads() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """A context with the thread count of a stage; outside it, stages cannot change the count.

    The bytes that a stage computes depend on the thread count. More than one thread wastes time
    here: passes are small, and threads that wait for each other block other work.
    """
    import torch

    before, set_threads = torch.get_num_threads(), torch.set_num_threads

    @contextmanager
    def with_stage_threads() -> Iterator[None]:
        set_threads(processors())
        try:
            yield
        finally:
            set_threads(before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda number: None)
        yield with_stage_threads


@pytest.fixture(scope="session", autouse=True)
def no_main_file() -> Iterator[None]:
    """Hide the main file from fingerprints: it is pytest's own, and xdist workers have none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("__main__.__file__", None, raising=False)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """In CI a skipped test fails, unless it needs hardware or a browser that CI may lack."""
    report = yield
    if report.skipped and os.environ.get("CI") and not any(map(item.get_closest_marker, NEEDS)):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as fetch writes it: a random 2-layer Qwen2 with the embedded tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from reward.model import embedded
    from reward.outputs import digests, write_json

    folder = tmp_path_factory.mktemp("base")
    tokenizer = embedded.train_tokenizer(embedded.paragraphs(ROOT / embedded.CORPUS))
    embedded.save_tokenizer(tokenizer, folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    content = {"name": "tiny", "kind": "embedded", "revision": "seed 0", "files": digests(folder)}
    write_json(folder / "base.json", content)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the params.yaml of the tests, models/base and nothing else."""
    shutil.copy(PARAMS, tmp_path)
    (tmp_path / "data" / "sets").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    shutil.copytree(tiny_base, tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def complete(
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
    stage_threads: Callable[[], AbstractContextManager[None]],
) -> Path:
    """A folder in which all stages have run, with the same bytes as under DVC."""
    from reward.exporting import gate
    from stages import evaluate, export, fetch, preprocess, train

    folder = tmp_path_factory.mktemp("complete")
    parameters = Path(shutil.copy(PARAMS, folder))
    support.set_params("base", parameters, name=str(tiny_base))
    steps = {"max_steps": 2, "logging_steps": 1, "eval_steps": 1, "save_steps": 1}
    support.set_params("train", parameters, **steps)
    write_pairs(folder / "data" / "raw" / "pairs.json", 20)
    (folder / "data" / "sets").mkdir()
    shutil.copy(ROOT / "data" / "sets" / "by_hand.jsonl", folder / "data" / "sets")
    with pytest.MonkeyPatch.context() as patch, stage_threads():
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        patch.setattr(gate, "run_clients", run_clients_here)
        for stage in (fetch, preprocess, train, evaluate, export):
            stage.main()
    return folder


@pytest.fixture
def clients_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run export's clients in this process instead of a fresh one."""
    monkeypatch.setattr("reward.exporting.gate.run_clients", run_clients_here)


@pytest.fixture
def project(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `complete` as the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(complete, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return folder


@pytest.fixture
def set_params(workspace: Path) -> Callable[..., None]:
    """Change values in the workspace's params.yaml: set_params("lora", r=8)."""
    return partial(support.set_params, path=workspace / "params.yaml")
