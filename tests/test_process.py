"""A stage's process: one sentence for a fault, no exit 0 when interrupted, never an orphan."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT

STAGE = """
import sys, time
from reward.process import Fault, run

def main():
    print("begun", flush=True)
    {body}

run(main)
"""


def start(tmp_path: Path, body: str, **environment: str) -> "subprocess.Popen[str]":
    (tmp_path / "stage.py").write_text(STAGE.format(body=body), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "stage.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_fault_is_its_sentence_and_status_1(tmp_path: Path) -> None:
    process = start(tmp_path, 'raise Fault("file: found this, wanted that")')
    assert process.communicate() == ("begun\n", "file: found this, wanted that\n")
    assert process.returncode == 1


def test_a_bug_shows_its_traceback(tmp_path: Path) -> None:
    process = start(tmp_path, "1 / 0")
    assert "Traceback" in process.communicate()[1]
    assert process.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_stage_never_exits_0(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "time.sleep(60)")
    assert process.stdout
    process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "head", ["", 'import stages, time\nprint("begun", flush=True)\ntime.sleep(2)\n']
)
def test_a_stage_dies_with_its_parent(tmp_path: Path, head: str) -> None:
    """A parent that is killed takes the stage along, as DVC does not; one still importing too."""
    stage_code = head + STAGE.format(body="time.sleep(60)")
    (tmp_path / "stage.py").write_text(stage_code, encoding="utf-8")
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys; p = subprocess.Popen([sys.executable, sys.argv[1]]); "
            "print(p.pid, flush=True); p.wait()",
            str(tmp_path / "stage.py"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "DVC_ROOT": str(tmp_path)},
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
    pytest.fail("the stage runs on without its parent")


def running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    done = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False
    )
    return bool(done.stdout.strip()) and not done.stdout.strip().startswith("Z")
