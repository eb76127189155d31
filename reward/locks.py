"""Locks of one process against others, which end with their process however it ends."""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from reward.outputs import writing
from reward.process import Fault

NONE_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def hold(path: Path, seconds: float = 0) -> Iterator[None]:
    """Hold the lock file `path`, once it is free; below 0 seconds wait for it without an end.

    Where the file system has no flock, as Lustre may, a file with the number of the process stands
    for the lock. Raises filelock.Timeout where another process holds it after that time, and a
    Fault where the file system refuses to lock, as NFS without its lock service does.
    """
    lock = FileLock(path, timeout=seconds, thread_local=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flock not supported")
            lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        if error.errno in NONE_HERE:
            raise Fault(
                f"{path} cannot be locked, its file system has no locks "
                f"({os.strerror(error.errno)}); expected {path.parent} on a local disk, or on one "
                "that is mounted with flock"
            ) from None
        error.filename = path  # as it is known to people, not from the root
        with writing(path):
            raise
    try:
        yield
    finally:
        lock.release()
