"""How the process of a stage begins and ends: one sentence for a fault, never an orphan."""

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

# Who started this process, and when. A launcher says who it is: it may be gone before this is read.
LAUNCHER = "REWARD_LAUNCHER"
PARENT, BEGUN = int(os.environ.get(LAUNCHER) or os.getppid()), time.monotonic()
# The cgroup of a container, seen from within.
GROUP = Path("/sys/fs/cgroup")


def is_command(arguments: Sequence[str]) -> bool:
    """Whether a command line of Python runs a module of this project."""
    module = next((named for flag, named in pairwise(arguments) if flag == "-m"), "")
    return module.startswith(("stages.", "reward."))


def see_one_gpu() -> None:
    """Have one of several processes see the GPU that is its own, before a library looks for any."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) != "":
        local = os.environ["LOCAL_RANK"]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(local)] if visible else local


# Whether torchrun has started this process as one of several. Somebody else's trainer, which it may
# have started too and which calls the reward function, goes its own way.
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ and is_command(sys.orig_argv)
# Whether DVC has started this process, or another one that DVC has.
STAGED = "DVC_ROOT" in os.environ
# Where torchrun reads what went wrong.
ERRORS = os.environ.get("TORCHELASTIC_ERROR_FILE") if LAUNCHED else None
if LAUNCHED:
    see_one_gpu()

# Before torch is imported: where another process has ended, its C++ code prints a stack trace. What
# that means for the work is said by whoever catches the error.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# At its import, which happens in transformers and PEFT, bitsandbytes warns on some processors that
# an optional package is missing. Nothing needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Fault(Exception):
    """A fault of the user's: where, what was found, what is wanted; no traceback."""

    # Whether another process, which went first, has the reason.
    elsewhere = False


def run(main: Callable[[], None]) -> None:
    """Call the `main` of a stage or command; a Fault exits with status 1 and its sentence.

    Ctrl-C exits with 130. Under DVC it says how long it took. One of several leaves to its parent
    what is to be said.
    """
    try:
        main()
    except Fault as fault:
        if not ERRORS:
            print(fault, file=sys.stderr)
        elif not fault.elsewhere:
            told = {"message": str(fault), "timestamp": int(time.time())}
            Path(ERRORS).write_text(json.dumps(told), encoding="utf-8")
        sys.exit(1)
    except KeyboardInterrupt:
        if not LAUNCHED:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    if STAGED and not LAUNCHED:
        print(f"took       {time.monotonic() - BEGUN:.1f} s")


def threads() -> int:
    """Those of OMP_NUM_THREADS, which several processes share, else one for each processor."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else processors()


def follow(parent: int) -> None:
    """End this process within half a second of its parent's end, however that was killed.

    DVC does not take its stages along when it gets SIGTERM or SIGKILL; the orphan would work on
    beside the stage that the next `dvc repro` starts. `parent` is a process id that was noted while
    the parent was there for certain. While a library's code is loaded, which may take two seconds,
    no thread of Python runs, nor this one.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def processors() -> int:
    """How many processors this process may use: those of its affinity, within its cgroup's quota.

    On a shared machine a scheduler grants fewer than there are.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    granted = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(granted, _quota())))


def free_memory(memory: Path = Path("/proc/meminfo"), group: Path = GROUP) -> float:
    """Bytes that machine and cgroup, of version 2, have free; infinite where neither says so.

    What files take of it that were read is free as well.
    """
    free = [math.inf]
    with suppress(OSError, KeyError):
        of_machine = dict(line.split(":") for line in memory.read_text().splitlines())
        free.append(int(of_machine["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # "max" is no number
        most, taken = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        of_group = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(most - taken + int(of_group["active_file"]) + int(of_group["inactive_file"]))
    return min(free)


def _quota(root: Path = GROUP) -> float:
    """Processors' worth of time that the cgroup grants, of version 2 or 1; infinite without one.

    A container sees its own group at the root of the file system.
    """
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = (
                (root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        except OSError:
            return math.inf
    return math.inf if limit == "max" or int(limit) <= 0 else int(limit) / int(period)


# From the first moment: the imports of libraries take seconds, in which who started it may be gone.
if is_command(sys.orig_argv) and (STAGED or LAUNCHED or LAUNCHER in os.environ):
    follow(PARENT)
