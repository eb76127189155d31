"""Locks between processes. A lock is released when its process ends, however it ends."""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from reward.outputs import writing
from reward.process import Fault

UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def hold(path: Path, seconds: float = 0) -> Iterator[None]:
    """Wait up to `seconds` until the lock file `path` is free, and hold it. Below 0, wait forever.

    On a file system without flock, such as some Lustre mounts, a file with the process id is the
    lock. Raises filelock.Timeout if another process still holds the lock after that time, and a
    Fault if the file system refuses to lock, as NFS without its lock service does.
    """
    lock = FileLock(path, timeout=seconds, thread_local=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flock not supported")
            lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        if error.errno in UNSUPPORTED:
            raise Fault(
                f"{path} cannot be locked because its file system has no locks "
                f"({os.strerror(error.errno)}); expected {path.parent} on a local disk, or on one "
                "that is mounted with flock"
            ) from None
        error.filename = path  # as the user wrote it, not the absolute path
        with writing(path):
            raise
    try:
        yield
    finally:
        lock.release()
