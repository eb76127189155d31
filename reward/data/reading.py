"""The records of preference files, one by one, with their places: JSON, JSON Lines and Parquet."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from reward.data.records import FIELDS, names_of
from reward.process import Fault

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
CHUNK = 1 << 20
# Characters of the longest piece of JSON, a string apart, that the end of a chunk can cut in two.
LONGEST_TOKEN = 16


def files(path: Path) -> list[Path]:
    """The preference files that a path names: itself, or those directly in the folder, sorted."""
    try:
        if not path.exists():
            raise Fault(f"{path} is not here, wanted a file or a folder of preference pairs")
        found = [path] if path.is_file() else sorted(filter(Path.is_file, path.iterdir()))
    except OSError as error:
        raise Fault(f"{path} cannot be read: {error.strerror}; wanted preference pairs") from None
    if not path.is_file():
        found = [child for child in found if child.name.endswith(SUFFIXES)]
    if not found or (not path.name.endswith(SUFFIXES) and path.is_file()):
        raise Fault(f"{path}: no preference file, wanted one that ends in {', '.join(SUFFIXES)}")
    return found


def read(path: Path) -> Iterator[tuple[int, Any]]:
    """Position and content of the records of one file in their order, a few at a time, unchecked.

    The position is what `unit` calls it, from 1. Raises a Fault where the file ends early or is
    not what its name says.
    """
    position = 0
    try:
        reader = {"row": _parquet, "record": _array, "line": _lines}[unit(path)]
        for position, record in reader(path):
            yield position, record
    except UnicodeDecodeError:
        place = "some byte is not UTF-8"
        with suppress(EOFError, OSError, zlib.error):  # compressed, and damaged behind that byte
            place = _undecodable(path)
        raise Fault(f"{path}: {place}, wanted UTF-8") from None
    except (EOFError, OSError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise Fault(f"{path}: cannot be read to its end: {reason}; wanted a whole file") from None
    if not position:
        raise Fault(f"{path} holds no record, wanted preference pairs")


def unit(path: Path) -> str:
    """What the records of a file are counted by: its rows, the records of an array, its lines."""
    if path.suffix == ".parquet":
        return "row"
    with _open(path) as file:
        return "record" if _first(file) == "[" else "line"


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    position = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    position += 1
                    yield position, record
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise Fault(f"{path}: broken Parquet: {reason}; wanted a whole file") from None


def _open(path: Path) -> IO[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig", newline="\n")


def _first(file: IO[str]) -> str:
    """The next character that is no white space; nothing at the end of the file."""
    while (character := file.read(1)).isspace():
        pass
    return character


def _undecodable(path: Path) -> str:
    """The place of the first byte of a file that is not UTF-8."""
    decoder, lines, done = codecs.getincrementaldecoder("utf-8")(), 0, 0
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        chunk = b"begin"
        while chunk:
            chunk, held = file.read(CHUNK), decoder.getstate()[0]
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                lines += (held + chunk).count(b"\n", 0, error.start) + 1
                byte = error.object[error.start]
                offset = done - len(held) + error.start + 1
                return f"line {lines}: byte {offset} of the file is {byte:#04x}, {error.reason}"
            lines += chunk.count(b"\n")
            done += len(chunk)
    return "some byte is not UTF-8"


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Records of JSON Lines, with the numbers of their lines."""
    wanted, seen = "wanted one record a line, or an array of records", False
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not (text := line.strip()):
                continue
            try:
                record = _DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                raise Fault(
                    f"{path}: line {number}: broken JSON: {_why(error)}, found {text[:20]!r}; "
                    f"{wanted}"
                ) from None
            if not seen and _is_wrapper(record):
                raise Fault(f"{path}: line {number}: an object with {names_of(record)}; {wanted}")
            seen = True
            yield number, record


def _is_wrapper(record: Any) -> bool:
    """Whether this is an object around a list of records, and no record itself."""
    return (
        isinstance(record, dict)
        and not record.keys() & set(FIELDS)
        and any(isinstance(value, list) for value in record.values())
    )


def _array(path: Path) -> Iterator[tuple[int, Any]]:
    """Records of a JSON array; holds little more than one record, or one chunk, in memory.

    Not by ijson: with duplicate keys refused it read 60,000 records of 89 MB in 0.25 s of processor
    time, against 0.39 s here, which is nothing beside tokenizing them. But its parser turns half of
    a surrogate pair into a question mark without an error, so that a broken text would be trained
    on, and names neither the record nor what was found where an array is broken.
    """
    with _open(path) as file:
        _first(file)
        buffer, start, position, size = _first(file), 0, 1, CHUNK
        if buffer == "]":
            return
        while True:
            try:
                record, separator, end = _element(buffer, start)
            except json.JSONDecodeError as error:
                # At the end of the chunk an error says nothing: the rest may be in the next one.
                at_end = error.pos > len(buffer) - LONGEST_TOKEN
                more = file.read(size) if at_end or "Unterminated" in error.msg else ""
                if not more:
                    found = repr(buffer[error.pos : error.pos + 20] or "the end of the file")
                    raise Fault(
                        f"{path}: record {position}: broken JSON: {error.msg}, found {found}; "
                        "wanted an array of records"
                    ) from None
                buffer, start, size = buffer[start:] + more, 0, size * 2
                continue
            except (ValueError, RecursionError) as error:
                raise Fault(
                    f"{path}: record {position}: broken JSON: {_why(error)}; "
                    "wanted an array of records"
                ) from None
            yield position, record
            position, start, size = position + 1, end, CHUNK
            if separator == "]":
                break
        if rest := (buffer[start:] + file.read(CHUNK)).strip():
            raise Fault(f"{path}: found {rest[:20]!r} behind the array, wanted the end of the file")


def _element(text: str, start: int) -> tuple[Any, str, int]:
    """The array element that starts at `start`, the separator after it, the index after that."""
    record, end = _DECODER.raw_decode(text, _skip_space(text, start))
    end = _skip_space(text, end)
    if text[end : end + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' or ']' after the record", text, end)
    return record, text[end], end + 1


def _skip_space(text: str, start: int) -> int:
    while text[start : start + 1] in (" ", "\t", "\r", "\n"):
        start += 1
    return start


def _why(error: Exception) -> str:
    """Why JSON cannot be read, without the words that are for programmers."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number with too many digits" if "int_max_str_digits" in str(error) else str(error)


class _DuplicateKey(ValueError):
    pass


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(items)
    if len(record) != len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise _DuplicateKey(f"the key {twice!r} stands twice in one object")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
