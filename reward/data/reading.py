"""The records of preference files, one by one: JSON, JSON Lines, Parquet, CSV and TSV."""

import codecs
import csv
import gzip
import json
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from reward.data.records import FIELDS, names_of
from reward.process import Fault

TABLES = {".csv": ",", ".tsv": "\t"}
# Spreadsheets of many countries write semicolons to what they call CSV.
SEPARATORS = (",", "\t", ";")
# How messages in a cell begin: as JSON, or as Python prints them.
MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
SUFFIXES = (
    *(".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet"),
    *(f"{table}{end}" for table in TABLES for end in ("", ".gz")),
)
# What a folder may hold besides preference files without a word.
OTHERS = re.compile(r"\.|(readme|license|dataset\.ya?ml)|.*\.dvc$", re.IGNORECASE)
CHUNK = 1 << 20
# Of a file with one object over several lines, what is read to say what it holds.
LONGEST_OBJECT = 1 << 26
LONGEST_CELL = 1 << 30
# Of Japanese texts a good part is kana, and Chinese ones are nearly all in the smaller GB2312.
KANA = ("\u3040", "\u30ff")
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


def not_read(path: Path) -> list[str]:
    """What a folder has besides preference files and notes: its names, those of folders with a /.

    None of a path that is a file.
    """
    found = sorted(path.iterdir()) if path.is_dir() else []
    return [
        child.name + "/" * child.is_dir()
        for child in found
        if not OTHERS.match(child.name) and not (child.is_file() and child.name.endswith(SUFFIXES))
    ]


def name_of(path: Path) -> str:
    """A file's name without its ending."""
    return path.name.removesuffix(next(end for end in SUFFIXES if path.name.endswith(end)))


def read(path: Path) -> Iterator[tuple[int, Any]]:
    """Position and content of the records of one file in their order, a few at a time, unchecked.

    The position is what `unit` calls it, from 1; the header of a table is its row 1. Raises a Fault
    where the file ends early or is not what its name says.
    """
    position = 0
    try:
        for position, record in _reader(path)(path):
            yield position, record
    except UnicodeDecodeError:
        place = "some byte is not UTF-8"
        with suppress(EOFError, OSError, zlib.error):  # compressed, and damaged behind that byte
            place = _undecodable(path)
        raise Fault(f"{path}: {place}, wanted UTF-8{_conversion(path)}") from None
    except (EOFError, OSError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise Fault(f"{path}: cannot be read to its end: {reason}; wanted a whole file") from None
    if not position:
        raise Fault(f"{path} holds no record, wanted preference pairs")


def unit(path: Path) -> str:
    """What the records of a file are counted by: its rows, the records of an array, its lines."""
    reader = _reader(path)
    return "record" if reader is _array else "line" if reader is _lines else "row"


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[int, Any]]]:
    if path.suffix == ".parquet":
        return _parquet
    if _separator(path):
        return _table
    with _open(path) as file:
        return _array if _first(file) == "[" else _lines


def _separator(path: Path) -> str | None:
    """What separates the cells of a table; None for a file that is no table."""
    return TABLES.get(Path(path.name.removesuffix(".gz")).suffix)


def _table(path: Path) -> Iterator[tuple[int, Any]]:
    """Records of CSV or TSV, by the names in its header; a cell may hold line breaks.

    Or messages, as JSON. Where the header is not separated as the file's name says, it shows what
    else separates the cells: preferences in a single column do not exist.
    """
    csv.field_size_limit(LONGEST_CELL)
    with _open(path) as file:
        first, usual = file.readline(), _separator(path) or ","
        shown = [usual, *SEPARATORS]
        separator = next((each for each in shown if each in first), usual)
        file.seek(0)
        rows = csv.reader(file, delimiter=separator, strict=True)
        position = 1
        try:
            header = next(rows, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise Fault(f"{path}: row 1: the column {twice[0]!r} is there twice")
            for position, cells in enumerate(rows, start=2):
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise Fault(
                        f"{path}: row {position} (line {rows.line_num}) has {len(cells)} cells, "
                        f"expected the {len(header)} of the header"
                    )
                yield (
                    position,
                    {
                        name: _messages(path, position, name, cell)
                        if MESSAGES.match(cell)
                        else cell
                        for name, cell in zip(header, cells, strict=True)
                    },
                )
        except csv.Error as error:
            raise Fault(
                f"{path}: row {position + 1} (line {rows.line_num}): broken table: {error}; "
                "expected cells with line breaks or quotes in double quotes"
            ) from None


def _messages(path: Path, position: int, name: str, cell: str) -> Any:
    """The messages that a cell holds as JSON."""
    try:
        return _DECODER.decode(cell)
    except (ValueError, RecursionError) as error:
        raise Fault(
            f"{path}: row {position}: {name!r} begins like messages, but is not JSON "
            f"({_why(error)}); expected messages as json.dumps writes them"
        ) from None


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


def _conversion(path: Path) -> str:
    """How a file in another encoding is converted, if its first bytes tell which it is."""
    with suppress(EOFError, OSError, zlib.error):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            encoding = _encoding(file.read(CHUNK))
        if encoding:
            name = shlex.quote(str(path))
            unpacked = f"gunzip -c {name} | " if path.suffix == ".gz" else ""
            source = "" if unpacked else f" {name}"
            return f"; it may be {encoding}: {unpacked}iconv -f {encoding} -t UTF-8{source} > NEW"
    return ""


def _encoding(content: bytes) -> str | None:
    """The encoding of a text by its mark, its zeros, or the characters that it would hold."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    even, odd = content[::2].count(0), content[1::2].count(0)
    if max(even, odd) * 5 > len(content) and min(even, odd) * 5 < max(even, odd):
        return "UTF-16LE" if odd > even else "UTF-16BE"
    if any(byte < 32 and byte not in b"\t\n\r" for byte in content):
        return None
    japanese, hanzi, usual = (
        [character for character in content.decode(encoding, errors="ignore") if character > "\x7f"]
        for encoding in ("shift_jis", "gb18030", "gb2312")
    )
    kana = sum(KANA[0] <= character <= KANA[1] for character in japanese)
    if kana * 4 > len(japanese) and _decodes(content, "shift_jis"):
        return "SHIFT_JIS"
    if len(usual) * 10 >= len(hanzi) * 9 and _decodes(content, "gb18030"):
        return "GB18030"
    return "WINDOWS-1252" if _decodes(content, "windows-1252") else None


def _decodes(content: bytes, encoding: str) -> bool:
    """Whether bytes, the last of which may be half a character, are text in an encoding."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(content)
    except UnicodeDecodeError:
        return False
    return True


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
                if not seen and (spread := _spread(path)):
                    raise Fault(
                        f"{path}: {_wrapped(spread)} over several lines; {wanted}"
                    ) from None
                raise Fault(
                    f"{path}: line {number}: broken JSON: {_why(error)}, found {text[:20]!r}; "
                    f"{wanted}"
                ) from None
            if not seen and _is_wrapper(record):
                raise Fault(f"{path}: line {number}: {_wrapped(record)}; {wanted}")
            seen = True
            yield number, record


def _spread(path: Path) -> dict[str, Any] | None:
    """The object that a file holds over several lines, if it holds nothing else."""
    with _open(path) as file:
        text = file.read(LONGEST_OBJECT)
    try:
        found = _DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _wrapped(record: dict[str, Any]) -> str:
    """An object around records in words, with how to take them out of it."""
    inside = next((key for key, value in record.items() if isinstance(value, list)), None)
    way = f" (jq -c '.{inside}[]' takes them out)" if inside and inside.isidentifier() else ""
    return f"an object with {names_of(record)}{way}"


def _is_wrapper(record: Any) -> bool:
    """Whether this is an object around a list of records, and no record itself."""
    if not isinstance(record, dict) or record.keys() & set(FIELDS):
        return False
    firsts = [value[0] for value in record.values() if isinstance(value, list) and value]
    return any(isinstance(first, dict) and first.keys() & set(FIELDS) for first in firsts)


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
