"""The process of a stage: a fault is one sentence, interrupts never exit with 0, no orphans."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Annotated

import pytest

from reward import params, process
from reward.params import Rule
from reward.stage import reads, run_stage
from tests.support import ROOT

STAGE = """
import sys, time
from reward.process import Fault, run

def main():
    print("begun", flush=True)
    {body}

run(main)
"""
# The command line of `python -m stages.stage`, by which our commands are recognized.
AS_COMMAND = ("-m", "stages.stage")


def start(tmp_path: Path, body: str, **environment: str) -> "subprocess.Popen[str]":
    (tmp_path / "stage.py").write_text(STAGE.format(body=body), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "stage.py"), *AS_COMMAND],
        preexec_fn=interruptible,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interruptible() -> None:
    """Make SIGINT kill a child: shell background jobs ignore it, which children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_fault_prints_one_sentence_and_exits_with_1(tmp_path: Path) -> None:
    stage = start(tmp_path, 'raise Fault("file: found this, expected that")')
    assert stage.communicate() == ("begun\n", "file: found this, expected that\n")
    assert stage.returncode == 1


def test_names_in_a_fault_cannot_control_the_terminal(tmp_path: Path) -> None:
    stage = start(tmp_path, r'raise Fault("a\x1b[2J文\x9b\r:\n\tb\u2028")')
    assert stage.communicate()[1] == "a\\x1b[2J文\\x9b\\r:\n\tb\u2028\n"


def test_commands_download_no_kernels_although_their_package_is_installed(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("print('imported')", encoding="utf-8")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__init__.py").touch()
    code = """
        import importlib.util
        import reward.process
        print(importlib.util.find_spec("kernels"))
        import kernels
    """
    (tmp_path / "stages" / "probe.py").write_text(dedent(code), encoding="utf-8")
    found = subprocess.run(
        [sys.executable, "-m", "stages.probe"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.stdout == "None\n"
    assert "ModuleNotFoundError: import of kernels halted" in found.stderr


@pytest.mark.parametrize(
    ("environment", "printed"),
    [({}, False), ({"DVC_ROOT": "."}, True), ({"DVC_ROOT": ".", process.LAUNCHER: "1"}, False)],
)
def test_stage_that_dvc_started_says_how_long_it_took(
    environment: dict[str, str], printed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that it has started says nothing."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "stage.py").write_text(STAGE.format(body="pass"), encoding="utf-8")
    command = [sys.executable, "stage.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    output = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    assert ("took " in output) == printed


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("printed", ["'end'", "'end', flush=True", "'x' * 10**6"])
def test_output_that_nobody_reads_any_more_ends_a_stage_in_silence(
    printed: str, unbuffered: str
) -> None:
    code = f"from reward.process import run; run(lambda: print({printed}))"
    reader, writer = os.pipe()
    os.close(reader)
    stage = subprocess.run(
        [sys.executable, "-c", code],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        check=False,
    )
    os.close(writer)
    assert (stage.returncode, stage.stderr) == (128 + signal.SIGPIPE, b"")


def test_another_broken_pipe_shows_its_traceback(tmp_path: Path) -> None:
    stage = start(tmp_path, 'raise BrokenPipeError("elsewhere")')
    printed, errors = stage.communicate()
    assert printed == "begun\n"
    assert errors.endswith("BrokenPipeError: elsewhere\n")
    assert stage.returncode == 1


@pytest.mark.parametrize(
    ("argument", "status", "printed"),
    [("--help", 0, "What the stage does."), ("lora.r=8", 2, "unrecognized arguments: lora.r=8")],
)
def test_stage_takes_no_argument_except_help(
    argument: str,
    status: int,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["stage.py", argument])
    with pytest.raises(SystemExit) as ended:
        run_stage("stages.stage", "What the stage does.", lambda: pytest.fail("it ran"))
    assert ended.value.code == status
    assert printed in "".join(capsys.readouterr())


@pytest.mark.parametrize("target", ["elsewhere", "project/large"])
def test_folder_of_outputs_that_leads_out_of_the_project_is_refused_before_the_work(
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / target).mkdir()
    (tmp_path / "project" / "models").symlink_to(tmp_path / target)
    monkeypatch.chdir(tmp_path / "project")
    Path("dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["stages.train"])
    done = []
    for staged in (False, True):
        monkeypatch.setattr("reward.stage.UNDER_DVC", staged)
        with pytest.raises(SystemExit) if staged and target == "elsewhere" else nullcontext():
            run_stage("stages.train", None, lambda: done.append(True))
    assert len(done) == (1 if target == "elsewhere" else 2)
    message = f"models is a link to {tmp_path}/elsewhere, but DVC records no outputs outside of the"
    assert (message in capsys.readouterr().err) == (target == "elsewhere")


@dataclass(frozen=True)
class Group:
    """A group of params.yaml with one key."""

    rank: Annotated[int, Rule("an integer")]


@pytest.mark.parametrize(
    ("name", "before", "after", "found"),
    [
        ("params.yaml", "a: {rank: 2}\n", "a: {rank: 2}\nb: {}\n", ""),
        ("params.yaml", "a: {rank: 2}\n", "a: {rank: 3}\n", "a.rank from 2 to 3; DVC would record"),
        ("reward/code.py", "x = 1\n", "x = 2\n", "reward/code.py; DVC would record"),
        ("data/pairs.json", "[]\n", "[{}]\n", "data/pairs.json; DVC would record"),
        ("other.json", "[]\n", "[{}]\n", ""),
    ],
)
def test_outputs_are_not_recorded_for_what_has_changed_while_they_were_made(
    name: str,
    before: str,
    after: str,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """DVC reads parameters and code again when a stage is done, and records what it then finds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stages.train"])
    stage = {"cmd": "python -m stages.train", "deps": ["${some.data}", "reward/code.py"]}
    Path("dvc.yaml").write_text(json.dumps({"stages": {"train": stage}}), encoding="utf-8")
    Path("reward").mkdir()
    Path("reward/code.py").touch()
    Path("data").mkdir()
    Path("params.yaml").write_text("a: {rank: 2}\n", encoding="utf-8")

    def main() -> None:
        params.load("a", Group)
        reads(Path("data"))
        Path(name).write_text(after, encoding="utf-8")

    for staged in (False, True):
        Path(name).write_text(before, encoding="utf-8")
        monkeypatch.setattr("reward.stage.UNDER_DVC", staged)
        with pytest.raises(SystemExit) if staged and found else nullcontext():
            run_stage("stages.train", None, main)
    said = capsys.readouterr().err
    assert said.startswith(f"changed since the stage began: {found}" if found else "")
    assert bool(said) == bool(found)


@pytest.mark.parametrize("depth", [[], ["--depth", "1"]])
@pytest.mark.parametrize("copy", [".dvc/tmp/exps/tmp1", ".dvc/tmp/exps/standalone/tmp1", "."])
def test_experiment_that_dvc_would_lose_is_refused_before_the_work(
    depth: list[str],
    copy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """DVC loses what it runs in a copy of a shallow clone, below .dvc/tmp/exps."""

    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    author = ("-c", "user.name=tests", "-c", "user.email=tests@example.org")
    git("init", "origin")
    for message in ("one", "two"):
        git("-C", "origin", *author, "commit", "--allow-empty", "--message", message)
    git("clone", *depth, f"file://{tmp_path}/origin", "project")
    project = tmp_path / "project"
    (project / copy).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(project / copy)
    Path("dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.setattr(sys, "argv", ["stages.train"])
    monkeypatch.setattr("reward.stage.UNDER_DVC", True)
    lost, done = bool(depth) and copy != ".", []
    with pytest.raises(SystemExit) if lost else nullcontext():
        run_stage("stages.train", None, lambda: done.append(True))
    assert done == ([] if lost else [True])
    assert capsys.readouterr().err == lost * (
        f"{project} is a shallow git clone, from which DVC would lose this experiment when it has "
        "finished; run git fetch --unshallow there first\n"
    )


def test_bug_shows_its_traceback(tmp_path: Path) -> None:
    stage = start(tmp_path, "1 / 0")
    assert "Traceback" in stage.communicate()[1]
    assert stage.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_stage_never_exits_with_0(tmp_path: Path, number: signal.Signals) -> None:
    stage = start(tmp_path, "time.sleep(60)")
    assert stage.stdout
    stage.stdout.readline()
    stage.send_signal(number)
    _, errors = stage.communicate(timeout=20)
    assert stage.returncode != 0
    assert "Traceback" not in errors


# The first package that `python -m` imports, followed by a long import.
IMPORTING = 'import {package}, time\nprint("begun", flush=True)\ntime.sleep(60)\n'


@pytest.mark.parametrize("code", [IMPORTING.format(package="stages"), STAGE], ids=["import", "run"])
def test_ctrl_c_prints_one_word(tmp_path: Path, code: str) -> None:
    (tmp_path / "stage.py").write_text(code.format(body="time.sleep(60)"), encoding="utf-8")
    stage = subprocess.Popen(
        [sys.executable, str(tmp_path / "stage.py"), *AS_COMMAND],
        preexec_fn=interruptible,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert stage.stdout
    stage.stdout.readline()
    stage.send_signal(signal.SIGINT)
    _, errors = stage.communicate(timeout=20)
    assert (stage.returncode, errors) == (130, "interrupted\n")


def test_process_exits_if_its_launcher_is_already_gone(tmp_path: Path) -> None:
    gone = start(tmp_path, "pass")
    gone.communicate()
    environment = {"DVC_ROOT": str(tmp_path), "REWARD_LAUNCHER": f"{gone.pid}"}
    stage = start(tmp_path, "time.sleep(60)", **environment)
    stage.communicate(timeout=30)
    assert stage.returncode == 1


@pytest.mark.parametrize(
    ("code", "under_dvc"),
    [
        (STAGE.format(body="time.sleep(60)"), True),
        (IMPORTING.format(package="stages"), True),
        (IMPORTING.format(package="reward"), False),
    ],
    ids=["stage", "importing stage", "importing child"],
)
def test_process_dies_with_its_parent(tmp_path: Path, code: str, under_dvc: bool) -> None:
    """This holds even during imports; without our code, DVC would leave it running."""
    (tmp_path / "stage.py").write_text(code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_ROOT": str(tmp_path)}
    if not under_dvc:
        del environment["DVC_ROOT"]
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys; "
            f"launcher = dict() if {under_dvc} else dict(REWARD_LAUNCHER=str(os.getpid())); "
            "p = subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | launcher); "
            "print(p.pid, flush=True); p.wait()",
            str(tmp_path / "stage.py"),
            *AS_COMMAND,
        ],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout
    stage = int(parent.stdout.readline())
    assert parent.stdout.readline() == "begun\n"
    assert running(stage)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not running(stage):
            return
        time.sleep(0.1)
    pytest.fail("the process still runs without its parent")


def running(process: int) -> bool:
    """Whether a process exists and is not a zombie."""
    done = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False
    )
    return bool(done.stdout.strip()) and not done.stdout.strip().startswith("Z")


# --- processors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "200000\n"}, math.inf),
    ],
)
def test_quota_is_read_from_the_cgroup(
    tmp_path: Path, files: dict[str, str], granted: float
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert process._quota(tmp_path) == granted


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, math.inf),
        ({"meminfo": "MemTotal:  9 kB\nMemAvailable:   3 kB\nHugePages_Total:   0\n"}, 3072),
        ({"memory.max": "max\n", "memory.current": "50\n"}, math.inf),
        ({"memory.max": "100\n", "memory.current": "50\n"}, math.inf),
        (
            {
                "memory.max": "100\n",
                "memory.current": "50\n",
                "memory.stat": "anon 38\nactive_file 5\ninactive_file 7\n",
            },
            62,
        ),
    ],
)
def test_free_memory_is_limited_by_machine_and_cgroup(
    tmp_path: Path, files: dict[str, str], free: float
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert process.free_memory(tmp_path / "meminfo", tmp_path) == free


@pytest.mark.parametrize(
    ("affinity", "quota", "granted"),
    [
        ({0, 1, 5}, math.inf, 3),
        ({0, 1, 5}, 1.5, 2),
        ({0, 1, 5}, 8.0, 3),
        ({4}, math.inf, 1),
        ({0, 1}, 0.2, 1),
    ],
)
def test_processors_are_limited_by_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, affinity: set[int], quota: float, granted: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity, raising=False)
    monkeypatch.setattr(process, "_quota", lambda: quota)
    assert process.processors() == granted


def test_all_processors_are_granted_without_affinity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(process, "_quota", lambda: math.inf)
    assert process.processors() == 7


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_child_with_an_affinity_for_one_processor_gets_one(tmp_path: Path) -> None:
    one = min(os.sched_getaffinity(0))
    body = f"import os; os.sched_setaffinity(0, {{{one}}}); " + (
        "from reward.process import processors; print(processors())"
    )
    assert start(tmp_path, body).communicate() == ("begun\n1\n", "")


@pytest.mark.parametrize(("asked", "found"), [("3", 3), ("", 5), ("4,2", 5), ("0", 5)])
def test_threads_follow_omp_num_threads(
    monkeypatch: pytest.MonkeyPatch, asked: str, found: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(process, "processors", lambda: 5)
    assert process.threads() == found


def test_free_memory_is_the_smaller_of_machine_and_cgroup(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("10000\n")
    (tmp_path / "memory.current").write_text("50\n")
    (tmp_path / "memory.stat").write_text("active_file 5\ninactive_file 7\n")
    for available, free in ((3, 3072), (30, 9962)):
        (tmp_path / "meminfo").write_text(f"MemAvailable: {available} kB\n")
        assert process.free_memory(tmp_path / "meminfo", tmp_path) == free
