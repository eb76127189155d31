"""The torture test: its cases, the phases of a run, and the verdict on a second run."""

import random
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tools import torture
from tools.torture import EVERY, MODES, Case, Outcome

LAST = torture.STEPS[-1]


def test_cases_cover_every_kind_and_change_the_number_of_processes() -> None:
    found = list(torture.cases(len(EVERY), random.Random(0)))
    assert [case.number for case in found] == [*range(1, len(EVERY) + 1)]
    assert sorted((case.phase, case.signal) for case in found) == sorted(
        (phase, number) for phase, _, number in EVERY
    )
    training = {(case.phase, case.victim, case.signal) for case in found if case.phase != "commit"}
    assert training == {kind for kind in EVERY if kind[0] != "commit"}
    # The trainer has ended by then.
    assert {case.victim for case in found if case.phase == "commit"} == {"dvc", "group"}
    assert {case.mode for case in found} == {*MODES}
    assert all(before != after for before, after in (case.processes for case in found))
    assert all(case.processes[0] > 1 for case in found if case.victim == "rank")


@pytest.mark.parametrize(
    ("moment", "phases"),
    [
        ({}, {"loading"}),
        ({"output": "trainable"}, set()),
        ({"output": "trainable", "writing": True}, {"checkpoint"}),
        ({"output": "trainable", "checkpoints": [5]}, {"steps"}),
        ({"output": "trainable", "checkpoints": [5], "writing": True}, {"checkpoint"}),
        ({"output": "trainable", "checkpoints": [5, LAST]}, {"outs"}),
        ({"output": "trainable", "checkpoints": [LAST], "finished": True}, set()),
        ({"output": "trainable", "checkpoints": [LAST], "finished": True, "ended": 1}, {"commit"}),
        ({"output": "trainable", "checkpoints": [LAST], "finished": True, "ended": 2}, {"commit"}),
        ({"output": "trainable", "checkpoints": [5], "ended": 1}, set()),
    ],
)
def test_moment_of_a_run_is_in_at_most_one_phase(moment: dict[str, Any], phases: set[str]) -> None:
    """An ended trainer (1) may be a zombie (2)."""
    defaults = {"output": "", "checkpoints": [], "writing": False, "finished": False}
    project: Any = SimpleNamespace(
        **{name: lambda name=name: moment.get(name, defaults[name]) for name in defaults}
    )
    ended = moment.get("ended", 0)
    trainer: Any = SimpleNamespace(
        is_running=lambda: ended != 1,
        status=lambda: psutil.STATUS_ZOMBIE if ended == 2 else psutil.STATUS_RUNNING,
    )
    assert {
        phase for phase in torture.PHASES if torture.in_phase(project, phase, trainer)
    } == phases


RAN = "> python -m stages.train\n"


@pytest.mark.parametrize(
    ("output", "recorded", "trainers", "failure"),
    [
        (f"{RAN}resuming   from step-10\n", "outs", 1, ""),
        (f"{RAN}resuming   from step-15\n", "outs", 1, ""),
        ("", "outs", 1, ""),
        (f"{RAN}resuming   from step-5\n", "outs", 1, "resumed from step 5, expected 10 or later"),
        (RAN, "outs", 1, "started at step 0"),
        (f"{RAN}resuming   from step-10\n", "others", 1, "different bytes, or none: > python"),
        (f"{RAN}resuming   from step-10\n", "", 1, "different bytes, or none: > python"),
        (f"{RAN}resuming   from step-10\n", "outs", 2, "two trainers ran at once"),
    ],
)
def test_second_run_must_resume_alone_and_give_the_same_bytes(
    tmp_path: Path, output: str, recorded: str, trainers: int, failure: str
) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    started: list[int] = []
    project: Any = SimpleNamespace(
        folder=tmp_path,
        mode="dvc repro",
        lock=lambda: "",
        read=lambda _: {"preprocess": {}},
        forget=lambda: None,
        start=started.append,
        working=lambda: trainers > 1,
        trainers=lambda: [None] * trainers,
        output=lambda: output,
        recorded=lambda: recorded,
    )
    case = Case(1, "steps", "dvc repro", "trainer", signal.SIGKILL, (1, 2))
    outcome = Outcome(case, at=10)
    torture.run_again(project, outcome, "outs")
    assert started == [2]
    assert len(outcome.failures) == bool(failure)
    assert "".join(outcome.failures).startswith(failure)
    assert outcome.same == (recorded == "outs")
    assert not outcome.repaired
