"""Kill the pipeline at random moments, run it again, and check that nothing was lost.

make torture

Each case kills the training of the embedded model once, in its own copy of a fresh clone. The
victim is the trainer, one of the processes that it has started, DVC, or their whole process group.
The signal is SIGINT, SIGTERM or SIGKILL, and the command is `dvc repro` or any kind of `dvc exp
run`, with one, two or four processes. The kills cover every phase of the work. Then the same
command runs again with another number of processes, and must end with the same bytes as an
undisturbed run in one process. Prints a table and writes it to benchmarks/results/torture.md. Linux
only; all 55 kills took 68 minutes on 2 cores that had other work, too.
"""

import argparse
import ctypes
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from reward.process import command_line

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "torture.md"
PHASES = ("loading", "steps", "checkpoint", "outs", "commit")
VICTIMS = ("trainer", "rank", "dvc", "group")
PROCESSES = (1, 2, 4)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
# While a stage runs, DVC ignores a SIGINT that is sent only to DVC.
EVERY = [
    (phase, victim, number)
    for phase, victim, number in product(PHASES, VICTIMS, SIGNALS)
    if (victim, number) != ("dvc", signal.SIGINT)
]
MODES = {
    "dvc repro": [["repro", "train"]],
    "dvc exp run": [["exp", "run", "train"]],
    "dvc exp run --temp": [["exp", "run", "--temp", "train"]],
    "dvc exp run --queue": [["exp", "run", "--queue", "train"], ["queue", "start"]],
}
# Short enough for many runs, and long enough to be killed in every phase; several packs per step.
TRAIN = {"max_steps": 40, "logging_steps": 5, "eval_steps": 40, "save_steps": 5}
TRAIN |= {"pairs_per_step": 8, "tokens_per_pack": 400}
STEPS = [*range(TRAIN["save_steps"], TRAIN["max_steps"] + 1, TRAIN["save_steps"])]
PATIENCE = 120.0
ATTEMPTS = 12
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)


class Failure(Exception):
    """One sentence that says what went wrong in a case."""


@dataclass(frozen=True)
class Case:
    """One kill: the phase, the command, the victim and the signal.

    `processes` are the numbers of processes before and after the kill.
    """

    number: int
    phase: str
    mode: str
    victim: str
    signal: signal.Signals
    processes: tuple[int, int]

    def __str__(self) -> str:
        before, after = self.processes
        who = f"{self.signal.name} to {self.victim}"
        return f"{self.mode}, {self.phase}: {who}; {before} processes, then {after}"


@dataclass
class Outcome:
    """The outcome of a case. `at` is the step of the last checkpoint before the kill, if any."""

    case: Case
    at: int | None = None
    repeated: int | None = None
    repaired: bool = False
    resumed: bool = False
    same: bool = False
    failures: list[str] = field(default_factory=list)


def main() -> None:
    options = parse()
    if ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0):
        sys.exit("prctl failed; run this on Linux")
    draw = random.Random(options.seed)
    with TemporaryDirectory(prefix="torture-") as scratch:
        prepared = prepare(Path(scratch) / "prepared")
        expected, loading, commit = undisturbed(prepared, Path(scratch) / "undisturbed")
        print(f"undisturbed: loading {loading:.1f} s, commit {commit:.1f} s", flush=True)
        outcomes = []
        for case in cases(options.kills, draw):
            delays = {"loading": loading, "commit": commit}
            outcome = run_case(case, prepared, Path(scratch), expected, delays, draw)
            outcomes.append(outcome)
            verdict = "; ".join(outcome.failures) or "same bytes"
            print(f"{case.number:>3} {case}, checkpoint {outcome.at}: {verdict}", flush=True)
    report = as_markdown(options, outcomes)
    print(report)
    RESULT.write_text(report, encoding="utf-8")
    if any(outcome.failures for outcome in outcomes):
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = command_line("tools.torture", __doc__)
    parser.add_argument("--kills", type=int, default=len(EVERY), help="number of kills")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random moments, victims and commands"
    )
    options = parser.parse_args()
    if options.kills < 1:
        parser.error(f"--kills is {options.kills}, expected at least 1")
    return options


def cases(count: int, draw: random.Random) -> Iterator[Case]:
    """Random cases, in which all phases, victims, signals and commands are about as frequent."""
    kinds, modes = cycle(draw.sample(EVERY, len(EVERY))), cycle(draw.sample([*MODES], len(MODES)))
    for number, (phase, victim, signal_number), mode in zip(
        range(1, count + 1), kinds, modes, strict=False
    ):
        # When DVC commits the outputs, the trainer has already ended.
        ended = phase == "commit" and victim in ("trainer", "rank")
        who = draw.choice(("dvc", "group")) if ended else victim
        before = draw.choice(PROCESSES[1:] if who == "rank" else PROCESSES)
        after = draw.choice([count for count in PROCESSES if count != before])
        yield Case(number, phase, mode, who, signal_number, (before, after))


# --- a project to run ------------------------------------------------------------------------


def prepare(folder: Path) -> Path:
    """A clone in which every stage before the training has run, committed to git."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    yaml, path = YAML(), folder / "params.yaml"
    content = yaml.load(path)
    content["train"].update(TRAIN)
    yaml.dump(content, path)
    (folder / ".dvc" / "config.local").write_text(
        f"[core]\n    site_cache_dir = {folder.parent / 'site'}\n", encoding="utf-8"
    )
    later = [f"metrics/{name}.json" for name in ("train", "evaluate", "export")]
    for arguments in (
        ["switch", "--quiet", "-C", "main"],
        ["config", "user.name", "torture"],
        ["config", "user.email", "torture@example.org"],
        ["rm", "--quiet", "dvc.lock", *later],
    ):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    subprocess.run(
        ["dvc", "repro", "--quiet", "preprocess"], cwd=folder, env=environment(), check=True
    )
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", "prepared"], cwd=folder, check=True)
    return folder


def environment(processes: int = 1) -> dict[str, str]:
    """The environment of a user who has activated the virtual environment.

    The bytes may depend on the number of threads, so each process has one.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "GIT_"))}
    kept |= {"PET_NPROC_PER_NODE": str(processes), "OMP_NUM_THREADS": "1"}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}


class Project:
    """A copy of the prepared clone and the processes that run in it."""

    def __init__(self, prepared: Path, folder: Path, mode: str) -> None:
        self.folder, self.mode = folder, mode
        shutil.copytree(prepared, folder, symlinks=True)
        self.log = folder.with_suffix(".log")
        self.seen: dict[Path, int] = {}
        self.command: subprocess.Popen[bytes] | None = None

    def start(self, processes: int = 1) -> None:
        """Run the commands of the mode, the last one in the background; it writes to the log."""
        *first, last = MODES[self.mode]
        for arguments in first:
            self.call("dvc", *arguments)
        here, there = pty.openpty()
        termios.tcsetwinsize(there, (24, 120))  # progress bars need a width
        self.command = subprocess.Popen(
            ["dvc", *last],
            cwd=self.folder,
            env=environment(processes),
            stdin=subprocess.DEVNULL,
            stdout=there,
            stderr=there,
            start_new_session=True,
            preexec_fn=interruptible,
        )
        os.close(there)
        threading.Thread(target=copy, args=(here, self.log), daemon=True).start()

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Failure(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-300:]}")
        return done.stdout

    def output(self) -> str:
        """What was printed since the last `forget`, including by tasks in DVC's queue."""
        return "\n".join(
            path.read_text(encoding="utf-8", errors="replace")[self.seen.get(path, 0) :]
            for path in self.logs()
        )

    def forget(self) -> None:
        for path in self.logs():
            self.seen[path] = len(path.read_text(encoding="utf-8", errors="replace"))

    def logs(self) -> list[Path]:
        found = [self.log, *self.folder.glob(".dvc/tmp/exps/run/*/*.out")]
        return [path for path in found if path.exists()]

    def processes(self) -> list[psutil.Process]:
        """All processes whose working directory is in the folder."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                inside = Path(process.cwd()).is_relative_to(self.folder)
                if inside and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def trainers(self) -> list[psutil.Process]:
        """The training processes that DVC has started, without their children."""
        found = self.training()
        return [each for each in found if each.ppid() not in {other.pid for other in found}]

    def training(self) -> list[psutil.Process]:
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if "stages.train" in process.cmdline() and "python" in process.name():
                    found.append(process)
        return found

    def working(self) -> bool:
        """Whether the command or the queue's worker is still running."""
        reap(self.command)
        return bool(self.processes())

    def checkpoints(self) -> list[int]:
        """The steps of complete checkpoints, in ascending order."""
        found = self.folder.glob("models/checkpoints/*/step-*[0-9]")
        return sorted(int(path.name.removeprefix("step-")) for path in found)

    def writing(self) -> bool:
        return any(self.folder.glob("models/checkpoints/*/step-*.partial"))

    def finished(self) -> bool:
        return any(self.folder.glob("models/checkpoints/*/finished.json"))

    def recorded(self) -> str:
        """The outs of train in the last dvc.lock of this project or its experiments."""
        revisions = self.call("git", "for-each-ref", "--format=%(objectname)", "refs/exps").split()
        locks = [self.lock()]
        locks += [self.call("git", "show", f"{revision}:dvc.lock") for revision in revisions]
        for lock in reversed(locks):
            if train := self.read(lock).get("train"):
                return str(sorted((out["path"], out["md5"]) for out in train["outs"]))
        return ""

    def lock(self) -> str:
        return (self.folder / "dvc.lock").read_text(encoding="utf-8")

    def read(self, lock: str) -> dict[str, Any]:
        """The stages of a dvc.lock; none if DVC was killed while it wrote the file."""
        with suppress(YAMLError):
            return (YAML(typ="safe").load(lock) or {}).get("stages", {})
        return {}

    def remove(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        reap(self.command)
        shutil.rmtree(self.folder, ignore_errors=True)


def copy(terminal: int, log: Path) -> None:
    """Append what is written to a terminal to a file, until all writers have closed it."""
    with log.open("ab", buffering=0) as file, suppress(OSError):
        while content := os.read(terminal, 1 << 16):
            file.write(content)
    os.close(terminal)


def interruptible() -> None:
    """Restore SIGINT, which a background job of a shell would ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def reap(command: "subprocess.Popen[bytes] | None") -> None:
    """Reap ended children, orphans included, as process 1 does for other programs."""
    if command:
        command.poll()
    for child in psutil.Process().children():
        with suppress(psutil.Error, ChildProcessError):
            if child.status() == psutil.STATUS_ZOMBIE and (not command or child.pid != command.pid):
                os.waitpid(child.pid, os.WNOHANG)


def wait(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait until the condition holds. Raises a Failure after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Failure(f"timed out after {seconds:.0f} s waiting for {what}")
        time.sleep(0.001)


def undisturbed(prepared: Path, folder: Path) -> tuple[str, float, float]:
    """The outs of an undisturbed run, and the seconds that it takes to load and to commit."""
    project = Project(prepared, folder, "dvc repro")
    project.start()
    wait(project.trainers, "the trainer")
    begun = time.monotonic()
    wait(lambda: "trainable" in project.output(), "the first step")
    loading = time.monotonic() - begun
    wait(lambda: project.finished() and not project.trainers(), "the trainer's end")
    begun = time.monotonic()
    wait(lambda: not project.working(), "DVC's end")
    commit = time.monotonic() - begun
    outs = project.recorded()
    project.remove()
    return outs, loading, commit


# --- one case --------------------------------------------------------------------------------


def run_case(
    case: Case,
    prepared: Path,
    scratch: Path,
    expected: str,
    delays: dict[str, float],
    draw: random.Random,
) -> Outcome:
    """Kill, run again and compare. If the phase was missed, try again in a new copy."""
    for attempt in range(ATTEMPTS):
        outcome = Outcome(case)
        project = Project(prepared, scratch / f"case-{case.number}-{attempt}", case.mode)
        try:
            project.start(case.processes[0])
            if kill(
                project, outcome, {name: each * 0.8**attempt for name, each in delays.items()}, draw
            ):
                run_again(project, outcome, expected)
                return outcome
        except Failure as failure:
            outcome.failures.append(f"{failure} ({project.output()[-600:]})")
            return outcome
        finally:
            project.remove()
    outcome.failures.append(f"the phase was missed {ATTEMPTS} times")
    return outcome


def kill(project: Project, outcome: Outcome, delays: dict[str, float], draw: random.Random) -> bool:
    """Send the signal in the phase of the case; False if the phase was missed."""
    case = outcome.case
    wait(project.trainers, "the trainer")
    trainer = project.trainers()[0]
    dvc = trainer.parent()
    if dvc is None:
        return False
    group = os.getpgid(dvc.pid)

    def ranks() -> list[psutil.Process]:
        found = []
        for process in project.training():
            with suppress(psutil.Error):
                if process.ppid() == trainer.pid:
                    found.append(process)
        return found

    if case.victim == "rank":
        started = case.processes[0]
        wait(lambda: len(ranks()) >= started or project.finished(), "the trainer's processes")
    await_phase(project, case.phase, delays, draw)
    if not in_phase(project, case.phase, trainer):
        return False
    victim = trainer if case.victim == "trainer" else dvc
    if case.victim == "rank":
        if len(found := ranks()) < case.processes[0]:
            return False
        victim = draw.choice(found)
    if not victim.is_running():
        return False
    if case.victim == "group":
        os.killpg(group, case.signal)
    else:
        os.kill(victim.pid, case.signal)
    outcome.at = max(project.checkpoints(), default=None)
    if reached := re.findall(r"training:.*?(\d+)/\d+ \[", project.output()):
        outcome.repeated = max(0, int(reached[-1]) - (outcome.at or 0))
    wait(lambda: not project.training(), "the training to end; a process was orphaned", 20)
    wait(lambda: not project.working(), "DVC to end", 30)
    return True


def await_phase(
    project: Project, phase: str, delays: dict[str, float], draw: random.Random
) -> None:
    """Wait for a random moment in the phase."""
    if phase == "loading":
        time.sleep(draw.uniform(0, delays["loading"]))
    elif phase == "steps":
        after = draw.choice(STEPS[:-1])
        wait(lambda: after in project.checkpoints() or project.finished(), "a checkpoint")
        time.sleep(draw.uniform(0.05, 0.6))
    elif phase == "checkpoint":
        after = draw.choice([0, *STEPS[:-2]])
        wait(lambda: max([0, *project.checkpoints()]) >= after, "a checkpoint")
        wait(lambda: project.writing() or project.finished(), "a checkpoint to be written")
        time.sleep(draw.uniform(0, 0.02))
    elif phase == "outs":
        wait(lambda: STEPS[-1] in project.checkpoints(), "the last checkpoint")
        time.sleep(draw.uniform(0, 0.03))
    else:
        wait(lambda: project.finished() and not project.trainers(), "the trainer's end")
        time.sleep(draw.uniform(0, delays["commit"]))


def in_phase(project: Project, phase: str, trainer: psutil.Process) -> bool:
    """Whether the training is in the phase, judged quickly by its files and output."""
    alive = trainer.is_running() and trainer.status() != psutil.STATUS_ZOMBIE
    if phase == "commit":
        return not alive and project.finished()
    if not alive:
        return False
    if phase == "loading":
        return "trainable" not in project.output()
    if phase == "checkpoint":
        return project.writing()
    last = max([0, *project.checkpoints()])
    if phase == "steps":
        return 0 < last < STEPS[-1] and not project.writing()
    return last == STEPS[-1] and not project.finished()


def run_again(project: Project, outcome: Outcome, expected: str) -> None:
    """Run the same command again, wait until it ends, and compare the outs."""
    if subprocess.run(
        ["git", "symbolic-ref", "--quiet", "HEAD"],
        cwd=project.folder,
        stdout=subprocess.DEVNULL,
        check=False,
    ).returncode:
        project.call("git", "switch", "--quiet", "main")
        outcome.repaired = True
    if not project.read(project.lock()):
        project.call("git", "checkout", "--quiet", "dvc.lock")
        outcome.repaired = True
    project.forget()
    project.start(outcome.case.processes[1])
    end = time.monotonic() + PATIENCE
    while project.working():
        if len(project.trainers()) > 1:
            outcome.failures.append("two trainers ran at once")
            break
        if time.monotonic() > end:
            raise Failure("the second run did not end")
        if "queue" in project.mode and project.recorded() == expected:
            break  # because the queue's worker stays alive for a while
        time.sleep(0.1)
    output = project.output()
    resumed = [int(step) for step in re.findall(r"resuming   from step-(\d+)", output)]
    if outcome.at and (resumed or [outcome.at])[0] < outcome.at:
        outcome.failures.append(f"resumed from step {resumed[0]}, expected {outcome.at} or later")
    if outcome.at and not resumed and "python -m stages.train" in output:
        outcome.failures.append("started at step 0")
    if outcome.case.phase == "commit":
        outcome.repeated = 0
    outcome.resumed = not outcome.failures
    outcome.same = project.recorded() == expected
    if not outcome.same:
        outcome.failures.append(f"different bytes, or none: {output[-600:]}")


# --- the table -------------------------------------------------------------------------------


def as_markdown(options: argparse.Namespace, outcomes: list[Outcome]) -> str:
    """The outcomes by phase, command, victim, number of processes and signal."""
    lines = [
        "# Killed and resumed",
        "",
        f"Written by `python -m tools.torture --kills {options.kills} --seed {options.seed}`; "
        "tools/torture.py describes the test.",
        "",
    ]
    for title, key, names in (
        ("phase", lambda outcome: outcome.case.phase, PHASES),
        ("command", lambda outcome: outcome.case.mode, tuple(MODES)),
        ("victim", lambda outcome: outcome.case.victim, VICTIMS),
        ("processes", lambda outcome: outcome.case.processes[0], PROCESSES),
        ("signal", lambda outcome: outcome.case.signal.name, tuple(s.name for s in SIGNALS)),
    ):
        lines += [
            f"| {title} | kills | resumed | repaired by git | "
            "steps repeated, median and maximum | same bytes |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name in names:
            group = [outcome for outcome in outcomes if key(outcome) == name]
            lines.append(row(str(name), group))
        lines += [row("all", outcomes), ""]
    return "\n".join(lines)


def row(name: str, outcomes: list[Outcome]) -> str:
    resumed, repaired, same = (
        sum(getattr(outcome, name) for outcome in outcomes)
        for name in ("resumed", "repaired", "same")
    )
    repeated = [outcome.repeated for outcome in outcomes if outcome.repeated is not None]
    steps = f"{median(repeated):.0f}, {max(repeated)}" if repeated else "–"
    return f"| {name} | {len(outcomes)} | {resumed} | {repaired} | {steps} | {same} |"


if __name__ == "__main__":
    main()
