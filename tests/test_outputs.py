"""What stages write is whole or not there, and the same bytes for the same content."""

import hashlib
import math
from pathlib import Path

import pytest

from reward.outputs import digests, read_json, whole_folder, write_json


def test_a_folder_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fill() -> None:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise error

    with pytest.raises(error):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_stage_left_is_no_part_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").touch()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_files_of_a_folder_have_the_usual_modes(tmp_path: Path) -> None:
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


def test_json_never_holds_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"loss": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"loss": math.nan})
    assert read_json(tmp_path / "file.json") == {"loss": 1}


def test_digests_are_sha256_by_relative_path(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"content")
    assert digests(tmp_path) == {"deep/file": hashlib.sha256(b"content").hexdigest()}
