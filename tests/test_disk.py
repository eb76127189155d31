"""Full disk, missing permissions, damaged files: one line, no partial outs, a rerun recovers."""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from reward.data import sources, tokenized
from reward.data.columns import ANSWER, ANSWERS
from reward.exporting import exported
from reward.judging import page
from reward.model import base, trainer
from reward.outputs import digest, digests, read_json, write_json
from reward.process import run
from stages import evaluate, export, fetch, preprocess, train
from tests.support import file_size_limit, set_params

Main = Callable[[], None]
STAGES: dict[str, tuple[Main, list[str]]] = {
    "fetch": (fetch.main, ["models/base"]),
    "preprocess": (
        preprocess.main,
        ["data/tokenized", "reports/preprocess", "metrics/preprocess.json"],
    ),
    "train": (train.main, ["models/adapter", "reports/train", "metrics/train.json"]),
    "evaluate": (evaluate.main, ["reports/evaluate", "metrics/evaluate.json"]),
    "export": (export.main, ["models/export", "reports/export", "metrics/export.json"]),
}
pytestmark = pytest.mark.usefixtures("project", "clients_here")
CAPABILITIES = 0x20080522  # _LINUX_CAPABILITY_VERSION_3 of capget(2)
OVERRIDE = 0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER


@pytest.fixture(autouse=True)
def threads_as_in_complete(
    stage_threads: Callable[[], AbstractContextManager[None]],
) -> Iterator[None]:
    """Outs are compared with those of `complete`, whose bytes depend on the thread count."""
    with stage_threads():
        yield


@pytest.fixture
def fault(capsys: pytest.CaptureFixture[str]) -> Callable[[Main], str]:
    """Run a stage that fails, and return its one-line error message."""

    def run_it(main: Main) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(main)
        assert caught.value.code == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message.rstrip("\n")

    return run_it


def state(paths: list[str]) -> dict[str, object]:
    """Digests of the paths that exist."""
    found = {name: Path(name) for name in paths if Path(name).exists()}
    return {name: digests(path) if path.is_dir() else digest(path) for name, path in found.items()}


def remove(paths: list[str]) -> None:
    for path in map(Path, paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def left_over() -> list[Path]:
    return [*Path().rglob("*.partial"), *Path().rglob("tmp*")]


# --- full disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_full_disk_is_reported_whichever_file_fills_it(
    stage: str, fault: Callable[[Main], str]
) -> None:
    main, outs = STAGES[stage]
    expected = state(outs)
    files = [path for out in [*outs, "models/checkpoints"] for path in Path(out).rglob("*")]
    files = [path for path in [*files, *map(Path, outs)] if path.is_file()]
    if stage != "train":
        files = [path for path in files if "checkpoints" not in path.parts]
    sizes = sorted({path.stat().st_size for path in files} - {0})
    assert len(sizes) >= 2
    for size in sizes:
        remove([*outs, "models/checkpoints"])
        with file_size_limit(size - 1):
            message = fault(main)
        assert message.endswith(
            "File too large; free some space, then run the same command again"
        ) or ("No space left" in message)
        found = state(outs)
        assert found != expected
        found.pop("reports/train", None)  # the curves grow during training
        assert found == {name: expected[name] for name in found}
        assert left_over() == []
    run(main)
    assert state(outs) == expected


def test_checkpoint_that_does_not_fit_keeps_the_earlier_one(
    fault: Callable[[Main], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main, outs = STAGES["train"]
    expected = state(outs)
    remove([*outs, "models/checkpoints"])
    original = trainer.RewardTrainer._save_checkpoint

    def filling(self: trainer.RewardTrainer, *arguments: object) -> None:
        with file_size_limit(2000 if self.state.global_step == 2 else 10**9):
            original(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(trainer.RewardTrainer, "_save_checkpoint", filling)
        assert "step-2" in fault(main)
    [run_folder] = [path for path in Path("models/checkpoints").iterdir() if path.is_dir()]
    assert {path.name for path in run_folder.glob("step-*")} == {"step-1"}
    run(main)
    assert state(outs) == expected


# --- permissions -----------------------------------------------------------------------------


@contextmanager
def enforced_permissions(*folders: str) -> Iterator[None]:
    """Make folders read-only, and drop a superuser's right to ignore permissions."""
    libc = ctypes.CDLL(None, use_errno=True)
    head, before = (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    super_user = sys.platform == "linux" and os.geteuid() == 0
    if super_user:
        assert libc.capget(head, before) == 0
        without = (ctypes.c_uint32 * 6)(*before)
        without[0] &= ~OVERRIDE
        assert libc.capset(head, without) == 0
    for folder in folders:
        Path(folder).chmod(0o555)
    try:
        yield
    finally:
        if super_user:
            assert libc.capset(head, before) == 0
        for folder in folders:
            Path(folder).chmod(0o755)


@pytest.mark.parametrize(
    ("stage", "folder"),
    [
        ("fetch", "models"),
        ("preprocess", "data"),
        ("preprocess", "metrics"),
        ("train", "models"),
        ("train", "models/checkpoints"),
        ("train", "reports"),
        ("train", "metrics"),
        ("evaluate", "reports"),
        ("evaluate", "metrics"),
        ("export", "models"),
        ("export", "metrics"),
    ],
)
def test_read_only_folder_is_reported(
    stage: str, folder: str, fault: Callable[[Main], str]
) -> None:
    main, outs = STAGES[stage]
    expected = state(outs)
    remove([*outs, *(str(path) for path in Path("models/checkpoints").glob("*"))])
    with enforced_permissions(folder):
        message = fault(main)
    assert message.startswith(folder)
    assert message.endswith(
        "cannot be written: Permission denied; allow writing there, then run the same command again"
    )
    assert state(outs) != expected
    run(main)
    assert state(outs) == expected


def test_unreadable_input_is_reported(fault: Callable[[Main], str]) -> None:
    Path("data/raw/pairs.json").chmod(0)
    with enforced_permissions():
        assert fault(preprocess.main).startswith("data/raw/pairs.json")
    Path("params.yaml").chmod(0)
    with enforced_permissions():
        assert fault(preprocess.main) == (
            "params.yaml cannot be read: Permission denied; expected the parameters"
        )


def test_unreadable_source_is_not_reported_as_a_failed_write(fault: Callable[[Main], str]) -> None:
    shutil.copytree(read_json(Path("models/base/base.json"))["name"], "source")
    source = Path("source/model.safetensors")
    source.chmod(0)
    set_params("base", name="source")
    remove(["models/base"])
    with enforced_permissions():
        message = fault(fetch.main)
    assert message == f"{source} cannot be read: Permission denied; expected a readable file"
    assert state(["models/base"]) == {}
    assert left_over() == []


READS: dict[str, tuple[Any, str]] = {
    "fetch": (fetch, "digests"),
    "preprocess": (sources, "read"),
    "train": (base, "base_record"),
    "evaluate": (page, "with_bar"),
    "export": (exported, "base_record"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_failed_read_during_a_write_is_not_reported_as_a_failed_write(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, outs = STAGES[stage]
    remove(outs)
    module, name = READS[stage]
    original, partial = getattr(module, name), Path(f"{outs[0]}.partial")

    def broken(*arguments: Any) -> Any:
        if partial.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO), "data/raw/pairs.json")
        return original(*arguments)

    monkeypatch.setattr(module, name, broken)
    with pytest.raises(OSError, match=r"Input/output error: 'data/raw/pairs\.json'"):
        main()
    assert not Path(outs[0]).exists()
    assert left_over() == []


# --- damaged ---------------------------------------------------------------------------------


def truncate(path: str) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


def flip_bit(path: str) -> None:
    """Flip one bit of the last byte."""
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    Path(path).write_bytes(bytes(content))


def replace_base() -> None:
    """models/base as fetch writes it, with different weights."""
    folder = Path("models/base")
    record = read_json(folder / "base.json")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.embed_tokens.weight.data.mul_(1.5)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    record["files"]["model.safetensors"] = digest(folder / "model.safetensors")
    write_json(folder / "base.json", record)


def replace_tokenizer() -> None:
    path = Path("models/base/tokenizer.json")
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    record = read_json(path.with_name("base.json"))
    write_json(
        path.with_name("base.json"),
        record | {"files": record["files"] | {"tokenizer.json": digest(path)}},
    )


def overwrite(one: str, other: str) -> None:
    Path(one).write_bytes(Path(other).read_bytes())


def drop_answers(folder: str) -> None:
    """A split as preprocess wrote it before answers had numbers."""
    with pa.OSFile(f"{folder}/{ARROW}") as source:
        table = pa.ipc.open_stream(source).read_all()
    dropped = [name for name in table.column_names if name in (*ANSWERS, ANSWER)]
    features = Dataset.load_from_disk(folder).remove_columns(dropped).features
    shutil.rmtree(folder)
    tokenizer = table.schema.metadata[tokenized.TOKENIZER].decode()
    with tokenized.new_folder(Path(folder), features, tokenizer) as append:
        append(table.drop_columns(dropped))


ARROW = "data-00000-of-00001.arrow"
DAMAGES: dict[str, tuple[Callable[[], None], list[str], str]] = {
    "base truncated": (
        lambda: truncate("models/base/model.safetensors"),
        ["train", "evaluate", "export"],
        "models/base: damaged, replaced or missing: model.safetensors; expected the files",
    ),
    "base with a flipped bit": (
        lambda: flip_bit("models/base/model.safetensors"),
        ["train", "evaluate", "export"],
        "models/base: damaged, replaced or missing: model.safetensors",
    ),
    "base without its weights": (
        lambda: Path("models/base/model.safetensors").unlink(),
        ["train", "evaluate", "export"],
        "models/base: damaged, replaced or missing: model.safetensors",
    ),
    "base record missing": (
        lambda: Path("models/base/base.json").unlink(),
        ["train", "evaluate", "export"],
        "models/base/base.json cannot be read",
    ),
    "base record truncated": (
        lambda: truncate("models/base/base.json"),
        ["train", "evaluate", "export"],
        "models/base/base.json cannot be read",
    ),
    "adapter of another base": (
        replace_base,
        ["evaluate", "export"],
        "models/adapter was trained on a different base than models/base, which differs in "
        "model.safetensors",
    ),
    "adapter truncated": (
        lambda: truncate("models/adapter/adapter_model.safetensors"),
        ["evaluate", "export"],
        "models/adapter: damaged, replaced or missing: adapter_model.safetensors",
    ),
    "adapter with a flipped bit": (
        lambda: flip_bit("models/adapter/adapter_model.safetensors"),
        ["evaluate", "export"],
        "models/adapter: damaged, replaced or missing: adapter_model.safetensors",
    ),
    "adapter scale changed": (
        lambda: flip_bit("models/adapter/adapter_config.json"),
        ["evaluate", "export"],
        "models/adapter: damaged, replaced or missing: adapter_config.json",
    ),
    "adapter digests missing": (
        lambda: Path("models/adapter/digests.json").unlink(),
        ["evaluate", "export"],
        "models/adapter/digests.json cannot be read",
    ),
    "data of another tokenizer": (
        replace_tokenizer,
        ["train"],
        "data/tokenized/train was made with a different tokenizer from that of models/base",
    ),
    "test data of another tokenizer": (
        replace_tokenizer,
        ["evaluate", "export"],
        "data/tokenized/test was made with a different tokenizer from that of models/base",
    ),
    "no tokenizer": (
        lambda: Path("models/base/tokenizer.json").unlink(),
        ["evaluate", "export"],
        "models/base/tokenizer.json is missing, expected what fetch wrote; run dvc repro",
    ),
    "data truncated": (
        lambda: truncate(f"data/tokenized/train/{ARROW}"),
        ["train"],
        "data/tokenized/train",
    ),
    "data with a flipped bit": (
        lambda: flip_bit(f"data/tokenized/validation/{ARROW}"),
        ["train"],
        "data/tokenized/validation",
    ),
    "data swapped": (
        lambda: overwrite(f"data/tokenized/test/{ARROW}", f"data/tokenized/train/{ARROW}"),
        ["evaluate", "export"],
        "data/tokenized/test is damaged, expected the bytes that preprocess wrote; run dvc repro",
    ),
    "data without its state": (
        lambda: Path("data/tokenized/test/state.json").unlink(),
        ["evaluate", "export"],
        "data/tokenized/test",
    ),
    "no data": (
        lambda: shutil.rmtree("data/tokenized/test"),
        ["evaluate", "export"],
        "data/tokenized/test",
    ),
    "training data of another version": (
        lambda: drop_answers("data/tokenized/train"),
        ["train"],
        "data/tokenized/train lacks answer_j, answer_k, so another version of this project wrote "
        "it; run dvc repro",
    ),
    "test data of another version": (
        lambda: drop_answers("data/tokenized/test"),
        ["evaluate", "export"],
        "data/tokenized/test lacks answer_j, answer_k, so another version of this project wrote "
        "it; run dvc repro",
    ),
    "texts of another version": (
        lambda: drop_answers("data/tokenized/test/answers"),
        ["evaluate"],
        "data/tokenized/test/answers lacks answer, so another version of this project wrote it; "
        "run dvc repro",
    ),
    "rewards truncated": (
        lambda: truncate("reports/evaluate/rewards.parquet"),
        ["export"],
        "reports/evaluate/rewards.parquet cannot be read",
    ),
    "metrics missing": (
        lambda: Path("reports/evaluate/figures.json").unlink(),
        ["export"],
        "reports/evaluate/figures.json cannot be read",
    ),
    "template missing": (
        lambda: Path("data/tokenized/template.json").unlink(),
        ["train"],
        "data/tokenized/template.json",
    ),
}


@pytest.mark.parametrize(
    ("name", "stage"),
    [(name, stage) for name, (_, stages, _) in DAMAGES.items() for stage in stages],
)
def test_damaged_input_is_named_and_not_used(
    name: str, stage: str, fault: Callable[[Main], str]
) -> None:
    damage, _, expected = DAMAGES[name]
    main, outs = STAGES[stage]
    damage()
    remove([*outs, "models/checkpoints"])
    message = fault(main)
    assert message.startswith(expected)
    assert "expected" in message or "run dvc repro" in message
    assert state(outs) == {}
    assert left_over() == []
