"""Stages write outputs completely or not at all, with the same bytes for the same content."""

import contextlib
import errno
import hashlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reward import outputs
from reward.outputs import (
    copy_file,
    digests,
    link_folder,
    partial_folder,
    read_json,
    whole_folder,
    write_json,
    write_text,
    writing,
)
from reward.process import Fault
from tests.support import file_size_limit


def test_complete_folder_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folder_behind_a_link_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "out"
    target.mkdir(parents=True)
    (target / "old").touch()
    link.symlink_to(target)
    with whole_folder(link) as folder:
        (folder / "new").touch()
    assert link.is_symlink()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interrupted_folder_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fill() -> None:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise error

    with pytest.raises(error):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_stage_are_discarded(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").touch()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_partial_folder_starts_empty_and_is_removed(
    tmp_path: Path, error: type[BaseException] | None
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "of a killed stage").touch()
    with (
        contextlib.suppress(ValueError, KeyboardInterrupt),
        partial_folder(tmp_path / "out") as folder,
    ):
        assert [*folder.iterdir()] == []
        (folder / "new").touch()
        if error:
            raise error
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("hard_links", [True, False])
def test_linked_folder_uses_hard_links_where_possible(
    tmp_path: Path, hard_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(os, "link", refused)
    write_json(tmp_path / "from" / "deep" / "file.json", "content")
    link_folder(tmp_path / "from", tmp_path / "to")
    ours, theirs = (tmp_path / side / "deep" / "file.json" for side in ("from", "to"))
    assert ours.samefile(theirs) == hard_links
    assert ours.read_bytes() == theirs.read_bytes()
    (tmp_path / "to" / "more").touch()
    assert [path.name for path in (tmp_path / "from").iterdir()] == ["deep"]


def test_files_in_a_folder_have_default_modes(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as folder:
        (folder / "private").touch(mode=0o600)
        (folder / "plain").touch()
        usual = (folder / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {usual}


def test_json_is_sorted_readable_and_ends_with_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_json(path, {"b": "中文", "a": [1.5]})
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    1.5\n  ],\n  "b": "中文"\n}\n'
    assert read_json(path) == {"a": [1.5], "b": "中文"}
    assert [child.name for child in path.parent.iterdir()] == ["file.json"]


def test_json_never_contains_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"loss": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"loss": math.nan})
    assert read_json(tmp_path / "file.json") == {"loss": 1}


def test_digests_are_sha256_by_relative_path(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"content")
    assert digests(tmp_path) == {"deep/file": hashlib.sha256(b"content").hexdigest()}


# --- errors during a write -------------------------------------------------------------------


def raised(path: Path, error: Exception, room: int = 1 << 20) -> Exception:
    """The exception from a write to `path` if `error` is raised during the write."""
    try:
        with writing(path, room):
            raise error
    except Exception as found:
        return found


@pytest.mark.parametrize(
    ("number", "end"),
    [
        (errno.ENOSPC, "No space left on device; free some space"),
        (errno.EDQUOT, "Disk quota exceeded; free some space"),
        (errno.EFBIG, "File too large; free some space"),
        (errno.EACCES, "Permission denied; allow writing there"),
        (errno.EROFS, "Read-only file system; allow writing there"),
        (errno.EIO, "Input/output error; check the disk"),
    ],
)
@pytest.mark.parametrize("place", ["out", "out/file", "out.partial/file", "."])
def test_failed_write_is_reported(tmp_path: Path, number: int, end: str, place: str) -> None:
    error = OSError(number, os.strerror(number), tmp_path / place)
    found = raised(tmp_path / "out", error)
    assert isinstance(found, Fault)
    named = tmp_path / ("out" if "free some space" in end else place)
    assert str(found) == f"{named} cannot be written: {end}, then run the same command again"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOTDIR, errno.EISDIR])
def test_failed_read_elsewhere_is_not_a_failed_write(tmp_path: Path, number: int) -> None:
    error = OSError(number, os.strerror(number), tmp_path / "source")
    assert raised(tmp_path / "out", error) is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("PytorchStreamWriter failed: No space left on device (os error 28)"),
        OSError("iostream error"),
        OSError(errno.EIO, "Input/output error"),
        KeyError("errno 28"),
    ],
)
def test_error_without_errno_is_a_bug_if_the_disk_works(tmp_path: Path, error: Exception) -> None:
    assert raised(tmp_path / "out", error) is error
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("written", "room", "fails"),
    [
        (3_000_000, 1 << 20, True),  # the partial file shows how large a file may become
        (0, 1 << 20, False),
        (0, 4 << 20, True),  # without a partial file, only the required space counts
    ],
)
def test_error_without_errno_is_reported_if_the_disk_is_full(
    tmp_path: Path, written: int, room: int, fails: bool
) -> None:
    if written:
        (tmp_path / "half").write_bytes(bytes(written))
    error = RuntimeError("of a library")
    with file_size_limit(3_000_000):
        found = raised(tmp_path / "out", error, room)
    assert (found is not error) is fails
    if fails:
        assert str(found).startswith(f"{tmp_path}/out cannot be written: File too large; free")
    assert [path.name for path in tmp_path.iterdir()] == (["half"] if written else [])


def test_fault_inside_a_write_passes_through(tmp_path: Path) -> None:
    fault = Fault("file: found this, expected that")
    assert raised(tmp_path / "gone" / "out", fault) is fault


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOSPC])
def test_failed_read_inside_whole_folder_is_not_a_failed_write(tmp_path: Path, number: int) -> None:
    error = OSError(number, os.strerror(number), tmp_path / "source")
    with pytest.raises(OSError, match="source") as found, whole_folder(tmp_path / "out"):
        raise error
    assert found.value is error
    assert [*tmp_path.iterdir()] == []


def unreadable(source: Path) -> None:
    source.unlink()
    source.mkdir()


@pytest.mark.parametrize(
    ("damage", "end"),
    [(Path.unlink, "No such file or directory"), (unreadable, "Is a directory")],
)
def test_copy_names_the_source_that_cannot_be_read(
    tmp_path: Path, damage: Callable[[Path], None], end: str
) -> None:
    source = tmp_path / "source"
    write_text(source, "content")
    copy_file(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "content"
    damage(source)
    with pytest.raises(Fault) as fault:
        copy_file(source, tmp_path / "other")
    assert str(fault.value) == (f"{source} cannot be read: {end}; expected a readable file")


@pytest.mark.parametrize("named", [True, False])
def test_copy_names_the_side_that_fails_halfway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """sendfile names both files; read and write name neither."""
    source, target = tmp_path / "source", tmp_path / "target"

    def failing(number: int) -> Callable[..., None]:
        def copyfile(*_: object) -> None:
            names = (source, None, target) if named else ()
            raise OSError(number, os.strerror(number), *names)

        return copyfile

    monkeypatch.setattr(shutil, "copyfile", failing(errno.EIO))
    with pytest.raises(Fault, match=r"/source cannot be read: Input/output error"):
        outputs.copy_file(source, target)
    monkeypatch.setattr(shutil, "copyfile", failing(errno.ENOSPC))
    with pytest.raises(Fault, match=r"/target cannot be written: No space left"):
        outputs.copy_file(source, target)


def test_failed_write_keeps_the_old_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    before = path.read_bytes()
    with file_size_limit(1000), pytest.raises(Fault, match="cannot be written"):
        write_json(path, ["new"] * 1000)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]
