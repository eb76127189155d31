"""How a process starts and ends: one sentence for a fault, and no orphans."""

import argparse
import json
import logging
import math
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

# The id of the parent process, and when this process started. A launcher passes its id, because the
# launcher may have ended before this line runs.
LAUNCHER = "REWARD_LAUNCHER"
PARENT, STARTED = int(os.environ.get(LAUNCHER) or os.getppid()), time.monotonic()
# The cgroup of a container, as seen from inside.
CGROUP = Path("/sys/fs/cgroup")


def is_command(arguments: Sequence[str]) -> bool:
    """Whether a Python command line runs a module of this project."""
    module = next((after for flag, after in pairwise(arguments) if flag == "-m"), "")
    return module.startswith(("stages.", "reward."))


def loaded_modules() -> dict[str, Path]:
    """The files of the modules of this project that are loaded; `main` is the one that was run."""
    own = [name for name in sys.modules if name.startswith(("stages.", "reward."))]
    modules = {name: sys.modules[name] for name in own} | {"main": sys.modules["__main__"]}
    files = {name: getattr(module, "__file__", None) for name, module in modules.items()}
    return {name: Path(file) for name, file in sorted(files.items()) if file}


def see_one_gpu() -> None:
    """Let this process, one of several, see only its own GPU.

    Call it before any library looks for GPUs.
    """
    local, visible = os.environ["LOCAL_RANK"], os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = local
    # A value with fewer names, such as -1, stays as it is.
    elif int(local) < len(names := visible.split(",")):
        os.environ["CUDA_VISIBLE_DEVICES"] = names[int(local)]


# Whether torchrun started this process as one of several. If torchrun started another program, such
# as a trainer that calls the reward function, this is False.
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ and is_command(sys.orig_argv)
# Whether DVC started this process, directly or through another one, and if directly.
UNDER_DVC = "DVC_ROOT" in os.environ
IS_STAGE = UNDER_DVC and LAUNCHER not in os.environ
# The file from which torchrun reads the error of a process.
ERRORS = os.environ.get("TORCHELASTIC_ERROR_FILE") if LAUNCHED else None
if LAUNCHED:
    see_one_gpu()

# Set before torch is imported: otherwise its C++ code prints a stack trace when another process has
# ended. The code that catches the error prints what it means.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# bitsandbytes, which transformers and PEFT import, warns on some processors that an optional
# package is missing. Nothing here needs that package.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Fault(Exception):
    """An error that the user can fix, printed without a traceback.

    The message says where it is, what was found and what was expected.
    """

    # Whether another process ended first and reports the reason.
    elsewhere = False


def project() -> Path:
    """The project's folder, even if DVC runs this process in a copy of it for an experiment."""
    return Path(os.environ.get("DVC_ROOT", "."))


def as_written(value: object) -> str:
    """A value of a YAML or JSON file for a message, with null, true and false as in the file."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def visible(text: str) -> str:
    """A text for a terminal, without control characters other than line breaks and tabs."""
    return re.sub(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]", lambda found: repr(found[0])[1:-1], text)


def one_line(error: Exception, most: int | None = None) -> str:
    """What an error says, in one line of at most `most` characters."""
    return " ".join(str(error).split())[:most]


def named(error: Exception) -> str:
    """An error by its class and what it says, in one line."""
    return f"{type(error).__name__}: {one_line(error, 200)}"


def counted(count: int, noun: str) -> str:
    """A count with its noun, such as "1 pair" or "2 pairs"."""
    return f"{count} {plural(noun, count)}"


def plural(noun: str, count: int) -> str:
    """The noun in its plural, unless the count is 1."""
    return noun if count == 1 else f"{noun}s"


def command_line(
    module: str, description: str | None, epilog: str | None = None
) -> argparse.ArgumentParser:
    """The parser for `python -m module`. Its --help shows the description line by line."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=epilog,
    )


def run(main: Callable[[], None]) -> None:
    """Call the `main` of a stage or command. A Fault prints its sentence and exits with status 1.

    Ctrl-C exits with 130, and an output that nobody reads any more, as after `| head -1`, with 141.
    Under DVC, the time taken is printed. If there are several processes, each leaves all printing
    to its parent.
    """
    try:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
        if IS_STAGE:
            print(f"took       {time.monotonic() - STARTED:.1f} s")
        print(end="", flush=True)  # unlike sys.stdout.flush, also if it is closed
    except Fault as fault:
        if not ERRORS:
            print(visible(str(fault)), file=sys.stderr)
        elif not fault.elsewhere:
            report = {"message": str(fault), "timestamp": int(time.time())}
            Path(ERRORS).write_text(json.dumps(report), encoding="utf-8")
        sys.exit(1)
    except KeyboardInterrupt:
        if not LAUNCHED:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        if not _is_broken(sys.stdout.fileno()):
            raise
        # When Python ends, it tries again to write what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _is_broken(pipe: int) -> bool:
    """Whether a file descriptor is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(pipe, 0)  # errors are reported in any case
    return bool(poll.poll(0))


def threads() -> int:
    """How many threads to use: OMP_NUM_THREADS, set for several processes, or one per processor."""
    requested = os.environ.get("OMP_NUM_THREADS", "")
    return (int(requested) if requested.isdecimal() else 0) or processors()


def follow(parent: int) -> None:
    """End this process within half a second of its parent's end, however the parent was killed.

    DVC does not stop its stages when it gets SIGTERM or SIGKILL. The orphan would keep working next
    to the stage that the next `dvc repro` starts. `parent` must be a process id that was read while
    the parent was certainly alive. While a library's code is being loaded, which may take two
    seconds, no Python thread runs, not even the one that watches the parent.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def processors() -> int:
    """How many processors this process may use: its CPU affinity, limited by its cgroup's quota.

    On a shared machine, a scheduler grants fewer than the machine has.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    granted = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(granted, _quota())))


def free_memory(memory: Path = Path("/proc/meminfo"), group: Path = CGROUP) -> float:
    """Bytes that are free in the machine and its cgroup (version 2); infinite if neither is known.

    The page cache counts as free.
    """
    free = [math.inf]
    with suppress(OSError, KeyError):
        of_machine = dict(line.split(":") for line in memory.read_text().splitlines())
        free.append(int(of_machine["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # "max" is not a number
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        of_group = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(limit - used + int(of_group["active_file"]) + int(of_group["inactive_file"]))
    return min(free)


def _quota(root: Path = CGROUP) -> float:
    """How many processors the quota of the cgroup (version 2 or 1) allows; infinite if unset.

    A container sees its own cgroup at the root of the cgroup file system.
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


def interrupt(*_: object) -> None:
    """End this process as `run` does after Ctrl-C, while there is no `run` yet."""
    if not LAUNCHED:
        with suppress(OSError):
            os.write(2, b"interrupted\n")
    os._exit(130)


# If this package is installed, libraries use it to download and run kernels from the Hub.
if is_command(sys.orig_argv):
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
# Importing libraries takes seconds, in which the parent may end or Ctrl-C may be pressed.
if is_command(sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupt)
if is_command(sys.orig_argv) and (UNDER_DVC or LAUNCHED or LAUNCHER in os.environ):
    follow(PARENT)
