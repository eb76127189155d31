"""What stages write: whole or not at all, the same bytes for the same content."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from reward.process import Fault

Item = TypeVar("Item")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what is raised where the disk is full, or closed to us, into a Fault that names it."""
    try:
        yield
    except Exception as error:
        number = disk_error(error)
        if number is None:
            raise
        wanted = "more room" if number in FULL else "the right to write there"
        raise Fault(
            f"{getattr(error, 'filename', None) or path} cannot be written: {os.strerror(number)}; "
            f"wanted {wanted}, then run the same command again"
        ) from None


def disk_error(error: Exception) -> int | None:
    """The error number of a disk that is full or closed, however the library at work says it."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    if number is None and re.search(
        "PytorchStreamWriter|iostream error|unexpected pos", str(error)
    ):
        number = errno.ENOSPC
    return number if number in FULL | CLOSED else None


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A fresh folder to fill, which takes the place of `path` only if the block succeeds."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            # safetensors leaves its files readable by their owner alone.
            for file in filter(Path.is_file, partial.rglob("*")):
                file.chmod(partial.stat().st_mode & 0o666)
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` with sorted keys and a newline at the end, through a rename."""
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def recorded(path: Path) -> dict[str, Any]:
    """What a stage recorded in a JSON file. Raises a Fault where it is not here, or broken."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise Fault(
            f"{path} cannot be read ({error}), wanted what dvc repro leaves there"
        ) from None
    if not isinstance(found, dict):
        raise Fault(f"{path} holds no object, wanted what dvc repro leaves there")
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): digest(path)
        for path in watched(files, f"digests of {folder}")
    }


def changed_files(folder: Path, wanted: dict[str, str]) -> list[str]:
    """Names of files that are missing, or are not those which were recorded, by their SHA-256."""
    return [
        name
        for name, value in watched(wanted.items(), f"checking {folder}")
        if not (folder / name).is_file() or digest(folder / name) != value
    ]


def watched(items: Iterable[Item], doing: str, unit: str = "files") -> Iterable[Item]:
    """The items one by one; a bar shows it where that takes longer than two seconds."""
    return tqdm(items, desc=doing, unit=f" {unit}", delay=2, leave=False, disable=None)


def require_files(folder: Path, wanted: dict[str, str]) -> None:
    """Raises a Fault for files that are not those which were recorded."""
    if changed := changed_files(folder, wanted):
        raise Fault(
            f"{folder}: {', '.join(changed)} damaged, exchanged or missing, wanted the files that "
            "were written there; dvc repro brings them back"
        )
