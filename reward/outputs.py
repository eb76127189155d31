"""Write outputs completely or not at all, and the same bytes for the same content."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from reward.process import Fault

Item = TypeVar("Item")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
REMEDIES = {
    **dict.fromkeys(FULL, "free some space"),
    **dict.fromkeys(CLOSED, "allow writing there"),
    errno.EIO: "check the disk",
}
CHUNK = 1 << 20


@contextmanager
def writing(path: Path, room: int = CHUNK) -> Iterator[None]:
    """Turn an error of a write into a Fault if the disk is full, read-only or broken.

    Some libraries hide the error number. A probe then finds it by writing `room` bytes, as many as
    the library may have written and removed again. An error that has nothing to do with the disk of
    `path`, such as an unreadable file elsewhere, is raised unchanged.
    """
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        place = getattr(error, "filename", None)
        number = _refused(error, path, room)
        if number not in REMEDIES:
            raise
        raise Fault(
            f"{path if place is None or number in FULL else place} cannot be written: "
            f"{os.strerror(number)}; {REMEDIES[number]}, then run the same command again"
        ) from None


def _refused(error: Exception, path: Path, room: int) -> int:
    """The error number with which the disk of `path` refuses a write, 0 if it does not."""
    number, place = getattr(error, "errno", None), getattr(error, "filename", None)
    if number in FULL:  # reading never fails with these
        return int(number)
    if place is None:
        return _probe(path if path.is_dir() else path.parent, room)
    # A file below `path`, its temporary name (path.partial), or a folder above it.
    known, found = str(path.absolute()), str(Path(os.fsdecode(place)).absolute())
    is_related = found.startswith(known) or known.startswith(f"{found}{os.sep}")
    return int(number or 0) if is_related else 0


def _probe(folder: Path, room: int) -> int:
    """The error number of writing `room` bytes to a file larger than any in the folder."""
    random = os.urandom(CHUNK)
    try:
        largest = max((file.stat().st_size for file in folder.iterdir()), default=0)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.seek(largest)
            for _ in range(0, room, CHUNK):
                file.write(random)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or 0
    return 0


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A fresh folder next to `path`, with the suffix .partial, that is removed after the block."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(path):
            partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A fresh folder to fill, which replaces `path` only if the block succeeds.

    If `path` is a link, the folder that it leads to is replaced. Errors of the block are raised
    unchanged, because each of its writes is within `writing`.
    """
    path = path.resolve() if path.is_symlink() else path
    with partial_folder(path) as partial:
        yield partial
        with writing(path):
            # safetensors makes its files readable by their owner only.
            for file in filter(Path.is_file, partial.rglob("*")):
                file.chmod(partial.stat().st_mode & 0o666)
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, whose file replaces `path` only if the block succeeds.

    Raises a Fault if the disk refuses a write, as `writing` does.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def link_folder(source: Path, target: Path) -> None:
    """Make a second folder of the same files, hard-linked, so that it takes no space.

    Copies them if the file system has no hard links. Raises a Fault if neither is possible.
    """

    def link_file(file: str, place: str) -> None:
        try:
            os.link(file, place)
        except OSError:
            copy_file(Path(file), Path(place))

    with writing(target):
        shutil.copytree(source, target, copy_function=link_file)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes. Raises a Fault that names the file that cannot be read or written."""
    try:
        with writing(target):
            shutil.copyfile(source, target)
    except OSError as error:
        raise Fault(
            f"{source} cannot be read: {error.strerror or error}; expected a readable file"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with writing(path):
        path.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON with sorted keys and a final newline, and replace `path` at once."""
    text = json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
    with whole_file(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def recorded(path: Path) -> dict[str, Any]:
    """What a stage recorded in a JSON file. Raises a Fault if the file is missing or broken."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise Fault(
            f"{path} cannot be read ({error}), expected what dvc repro writes there"
        ) from None
    if not isinstance(found, dict):
        raise Fault(f"{path} is not a JSON object, expected what dvc repro writes there")
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, keyed by its path relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): digest(path)
        for path in with_bar(files, f"digests of {folder}")
    }


def changed_files(folder: Path, expected: dict[str, str]) -> list[str]:
    """Names of files that are missing or whose SHA-256 is not the expected one."""
    return [
        name
        for name, value in with_bar(expected.items(), f"checking {folder}")
        if not (folder / name).is_file() or digest(folder / name) != value
    ]


def with_bar(
    items: Iterable[Item], doing: str, unit: str = "files", file: TextIO | None = None
) -> Iterable[Item]:
    """The items one by one, with a progress bar after two seconds, by default on stderr."""
    return tqdm(items, desc=doing, unit=f" {unit}", delay=2, leave=False, file=file, disable=None)


def require_files(folder: Path, expected: dict[str, str]) -> None:
    """Raises a Fault for files that are missing or whose SHA-256 is not the expected one."""
    if changed := changed_files(folder, expected):
        raise Fault(
            f"{folder}: damaged, replaced or missing: {', '.join(changed)}; expected the files "
            "that were written there, which dvc repro restores"
        )
