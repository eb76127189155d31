"""How the process of a stage begins and ends: one sentence for a fault, never an orphan."""

import os
import sys
import threading
import time
from collections.abc import Callable

import stages


class Fault(Exception):
    """A fault of the user's: where, what was found, what is wanted; no traceback."""


def run(main: Callable[[], None]) -> None:
    """Call a stage's `main`; a Fault exits with status 1 and its sentence, Ctrl-C with 130.

    Under DVC the stage ends with its parent, and says how long it took.
    """
    staged = "DVC_ROOT" in os.environ
    if staged:
        threading.Thread(target=_follow_parent, daemon=True).start()
    pin_threads()
    try:
        main()
    except Fault as fault:
        print(fault, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if staged:
        print(f"took       {time.monotonic() - stages.BEGUN:.1f} s")


def pin_threads() -> None:
    """Have PyTorch, if it is imported, compute with a thread for every processor of the machine.

    Results depend on their number, and OMP_NUM_THREADS must not change them: work is cut into a
    piece for each thread, and the ends of a piece go through scalar code, whose exponential rounds
    otherwise than the vector one; attention of a single query is cut by its keys.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(os.cpu_count() or 1)


def _follow_parent() -> None:
    """End this process within half a second of DVC's end, however DVC was killed.

    DVC does not take its stages along when it gets SIGTERM or SIGKILL; the orphan would work on
    beside the stage that the next `dvc repro` starts.
    """
    while os.getppid() == stages.PARENT:
        time.sleep(0.5)
    os._exit(1)
