"""Checkpoints: complete or absent, named after all that affects the result, with one trainer."""

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from reward.model import checkpoints, group
from reward.model.checkpoints import KEPT_RUNS, KEPT_STEPS, Run, fingerprint, locked, shared
from reward.outputs import read_json, write_json
from reward.process import Fault

ROOT = Path(__file__).parent.parent


def written(run: Run, *steps: int) -> Run:
    for step in steps:
        with run.writing(step) as folder:
            (folder / "weights").write_text(f"weights of {step}")
            (folder / "state").mkdir()
            (folder / "state" / "optimizer").write_text(f"optimizer of {step}")
    return run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoints folder of all runs, in a fresh DVC repository."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path / "models" / "checkpoints"


# --- complete or absent ----------------------------------------------------------------------


def test_latest_is_the_step_with_the_highest_number(tmp_path: Path) -> None:
    assert Run(tmp_path).latest() is None
    assert written(Run(tmp_path), 8, 10).latest() == tmp_path / "step-10"


def test_only_the_last_two_steps_are_kept(tmp_path: Path) -> None:
    written(Run(tmp_path), 2, 4, 6, 8, 10)
    assert KEPT_STEPS == 2
    assert {path.name for path in tmp_path.iterdir()} == {"step-8", "step-10"}


def test_interrupted_write_leaves_no_checkpoint(tmp_path: Path) -> None:
    run = written(Run(tmp_path), 2)
    with suppress(KeyboardInterrupt), run.writing(4) as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert run.latest() == tmp_path / "step-2"
    assert written(run, 4).latest() == tmp_path / "step-4"
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-4"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights", "weights of 5"),
        ("weights", ""),
        ("weights", None),
        ("state/optimizer", "weights of 4"),
        ("more", "a file that was not written"),
        ("digests.json", None),
        ("digests.json", ""),
        ("digests.json", '{"weights": "0123'),
        ("digests.json", "{}"),
    ],
)
def test_damaged_checkpoint_is_skipped(
    tmp_path: Path, name: str, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(Run(tmp_path), 2, 4)
    path = tmp_path / "step-4" / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    assert run.latest() == tmp_path / "step-2"
    printed = "checkpoint step-4 is damaged or belongs to another run; it is ignored\n"
    assert capsys.readouterr().out == printed


def test_checkpoint_of_another_run_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one, other = written(Run(tmp_path / "one"), 2), written(Run(tmp_path / "other"), 4)
    shutil.copytree(tmp_path / "other" / "step-4", tmp_path / "one" / "step-4")
    assert one.latest() == tmp_path / "one" / "step-2"
    assert other.latest() == tmp_path / "other" / "step-4"


# --- finished runs ---------------------------------------------------------------------------


def lock_file(path: Path, content: str) -> Path:
    """A dvc.lock whose train stage has an out with the MD5 of `content`."""
    md5 = hashlib.md5(content.encode(), usedforsecurity=False).hexdigest()
    outs = [{"path": "metrics/train.json", "hash": "md5", "md5": md5}]
    YAML().dump({"schema": "2.0", "stages": {"train": {"outs": outs}}}, path)
    return path


@pytest.mark.parametrize(
    ("recorded", "left"),
    [("metrics", None), ("of another run", "step-8"), (None, "step-8")],
)
def test_finished_run_restarts_once_its_outs_are_recorded(
    tmp_path: Path, recorded: str | None, left: str | None
) -> None:
    run, metrics = written(Run(tmp_path), 6, 8), tmp_path / "train.json"
    metrics.write_text("metrics")
    run.finish(metrics)
    assert not (tmp_path / "step-6").exists()
    lock = tmp_path / "dvc.lock"
    if recorded:
        lock_file(lock, recorded)
    run.forget_if_recorded(lock, "train")
    assert run.latest() == (tmp_path / left if left else None)
    run.forget_if_recorded(lock_file(lock, "metrics"), "train")
    assert run.latest() == (tmp_path / left if left else None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("finished.json", ""),
        ("finished.json", "[]"),
        ("finished.json", "{}"),
        ("dvc.lock", ""),
        ("dvc.lock", "stages:\n"),
        ("dvc.lock", "stages:\n  train:\n    outs:\n    - path: metrics/train.json\n"),
        ("dvc.lock", "stages: {train"),
        ("dvc.lock", "<<<<<<< HEAD\n"),
    ],
)
def test_finished_run_resumes_if_its_marker_or_dvc_lock_is_damaged(
    tmp_path: Path, name: str, content: str
) -> None:
    run, metrics = written(Run(tmp_path), 8), tmp_path / "train.json"
    metrics.write_text("metrics")
    run.finish(metrics)
    lock = lock_file(tmp_path / "dvc.lock", "metrics")
    (tmp_path / name).write_text(content)
    run.forget_if_recorded(lock, "train")
    assert run.latest() == tmp_path / "step-8"
    run.finish(metrics)
    run.forget_if_recorded(lock_file(lock, "metrics"), "train")
    assert run.latest() is None


def test_other_files_and_folders_are_not_checkpoints(tmp_path: Path) -> None:
    run, kept = written(Run(tmp_path), 4), {"step-4-backup", "step-4-2", "step-9", "step-2.partial"}
    for name in ("step-4-backup", "step-4-2", "step-2.partial"):
        shutil.copytree(tmp_path / "step-4", tmp_path / name)
    (tmp_path / "step-9").write_text("a note")
    assert written(run, 6, 8).latest() == tmp_path / "step-8"
    assert {path.name for path in tmp_path.iterdir()} == kept | {"step-6", "step-8"}


def test_unfinished_run_resumes_whatever_is_recorded(tmp_path: Path) -> None:
    run = written(Run(tmp_path), 2)
    run.forget_if_recorded(lock_file(tmp_path / "dvc.lock", "metrics"), "train")
    assert run.latest() == tmp_path / "step-2"


# --- the fingerprint -------------------------------------------------------------------------


def test_fingerprint_depends_on_params_and_inputs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows").write_text("1")
    (tmp_path / "template").write_text("2")
    inputs = [tmp_path / "data", tmp_path / "template"]
    names = [fingerprint({"r": 4, "seed": 0}, inputs), fingerprint({"r": 8, "seed": 0}, inputs)]
    assert fingerprint({"seed": 0, "r": 4}, inputs) == names[0]
    for path in (tmp_path / "data" / "rows", tmp_path / "data" / "more", tmp_path / "template"):
        path.write_text("another")
        names.append(fingerprint({"r": 4, "seed": 0}, inputs))
    assert len(set(names)) == len(names) == 5
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in names)


def test_fingerprint_depends_on_library_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = fingerprint({}, [])
    monkeypatch.setattr(checkpoints, "version", lambda name: "0")
    assert fingerprint({}, []) != before


def test_fingerprint_depends_on_the_code_in_use(tmp_path: Path) -> None:
    """A two-line stage, run as a module, prints the fingerprint of the code that it uses."""
    for name in ("reward", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = "from reward.model.checkpoints import fingerprint\nprint(fingerprint({}, []))\n"
    (tmp_path / "stages" / "train.py").write_text(source)

    def edited(path: str) -> str:
        """What the stage prints after a change to a file."""
        with (tmp_path / path).open("a") as file:
            file.write("# an edit\n")
        command = [sys.executable, "-m", "stages.train"]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    unused = "reward/data/reading.py"
    files = (unused, unused, "stages/train.py", "reward/outputs.py")
    first, second, third, fourth = map(edited, files)
    assert first == second
    assert len({second, third, fourth}) == 3


# --- one trainer at a time -------------------------------------------------------------------


def waiting(root: Path) -> str:
    """What a second trainer of the run `busy` prints."""
    return (
        f"waiting    another trainer of the same run uses {root}/busy; this one continues when it "
        "ends\n"
    )


def locked_after(end: Callable[[], object]) -> Path:
    """The folder of a run that its holder releases only a moment later, when `end` is called."""
    ended = threading.Event()

    def release() -> None:
        ended.set()
        end()

    timer = threading.Timer(0.3, release)
    timer.start()
    with locked("busy") as run:
        assert ended.is_set()
        timer.join()
        return run.folder


def test_second_trainer_waits_until_the_first_ends(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as first:
        first.enter_context(locked("busy"))
        with locked("free") as run:
            assert run.folder == root / "free"
        assert capsys.readouterr().out == ""
        assert locked_after(first.pop_all().close) == root / "busy"
    assert capsys.readouterr().out == waiting(root)


@pytest.mark.parametrize("busy", [0, 3])
def test_other_processes_hear_from_the_first_while_it_waits(
    root: Path, busy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise their group would give up after a while, as it does on a process that hangs."""
    sent: list[bool] = []

    def send(value: bool) -> bool:
        sent.append(value)
        return value

    taken, tries = checkpoints._acquire, iter([False] * busy + [True])
    monkeypatch.setattr(checkpoints, "_acquire", lambda *given: next(tries) and taken(*given))
    monkeypatch.setattr(group, "from_first", send)
    with shared("busy") as run:
        assert run.folder == root / "busy"
    assert sent == [True] * (busy - 1) + [False]
    received = iter(sent)
    monkeypatch.setattr(group, "leads", lambda: False)
    monkeypatch.setattr(group, "from_first", lambda _: next(received))
    with shared("busy") as run:
        assert not [*run.folder.iterdir()]
        assert not [*received]


def test_ctrl_c_ends_the_wait(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with locked("busy"):
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", interrupt)
            with pytest.raises(KeyboardInterrupt), locked("busy"):
                pass
        with locked("free") as run:
            assert run.folder == root / "free"


HOLDER = """
import errno, fcntl, sys, time
from reward.model.checkpoints import locked

def refuse(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")

if sys.argv[1] == "soft":
    fcntl.flock = refuse
with locked("busy"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make flock fail with the given errno."""

    def refuse(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return refuse


@pytest.mark.parametrize("kind", ["flock", "soft"])
def test_lock_is_released_when_its_process_dies(
    root: Path, kind: str, no_flock: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """With flock, and with the lock file that is used if flock is missing."""
    if kind == "soft":
        no_flock(errno.ENOSYS)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, kind],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"

    def kill() -> None:
        holder.kill()
        holder.communicate()

    assert locked_after(kill) == root / "busy"
    assert capsys.readouterr().out == waiting(root)


def test_one_trainer_at_a_time_without_flock(
    root: Path, no_flock: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    no_flock(errno.ENOSYS)
    with ExitStack() as first:
        first.enter_context(locked("busy"))
        with locked("free") as run:
            assert run.folder == root / "free"
        assert capsys.readouterr().out == ""
        assert locked_after(first.pop_all().close) == root / "busy"
    assert capsys.readouterr().out == waiting(root)
    assert not [*root.rglob("lock")]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_reported(
    root: Path, number: int, no_flock: Callable[[int], None]
) -> None:
    no_flock(number)
    with pytest.raises(Fault) as fault, locked("run"):
        pass
    assert str(fault.value) == (
        f"{root}/lock cannot be locked because its file system has no locks "
        f"({os.strerror(number)}); "
        f"expected {root} on a local disk, or on one that is mounted with flock"
    )


def test_lock_is_not_part_of_a_checkpoint(root: Path) -> None:
    with locked("run") as run:
        written(run, 2)
        assert run.latest() == root / "run" / "step-2"
        recorded = read_json(root / "run" / "step-2" / "digests.json")["files"]
    assert recorded.keys() == {"weights", "state/optimizer"}


def test_checkpoints_are_in_the_working_directory_without_dvc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    with locked("run") as run:
        assert run.folder.resolve() == tmp_path / "models" / "checkpoints" / "run"


def test_oldest_runs_are_removed_unless_in_use(root: Path) -> None:
    for age in range(KEPT_RUNS + 3):
        with locked(f"run-{age}") as run:
            write_json(run.folder / "finished.json", {})
        os.utime(root / f"run-{age}", (age, age))
    with locked("busy"):
        os.utime(root / "busy", (0, 0))
        with locked("now"):
            names = {path.name for path in root.iterdir() if path.is_dir()}
    kept = {f"run-{age}" for age in range(4, KEPT_RUNS + 3)}
    assert names == {"now", "busy"} | kept


def test_unfinished_runs_are_kept_longer_than_finished_ones(root: Path) -> None:
    for age in range(KEPT_RUNS + 3):
        with locked(f"run-{age}") as run:
            if age > 0:
                write_json(run.folder / "finished.json", {})
        os.utime(root / f"run-{age}", (age, age))
    with locked("now"):
        assert (root / "run-0").is_dir()
        assert not (root / "run-1").exists()


def test_fingerprint_must_be_the_same_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another(found: Any) -> list[Any]:
        return [found, ("b", found[1] | {"params": {"seed": 1}})]

    monkeypatch.setattr(group, "gathered", with_another)
    with pytest.raises(Fault, match="process 1 on b has different params than process 0"):
        fingerprint({"seed": 0}, [])
