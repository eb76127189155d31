"""The records of preference files, one by one: JSON, JSON Lines, Parquet, CSV and TSV."""

import codecs
import csv
import gzip
import json
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeVar

from reward.data.dialogue import are_spoken
from reward.data.records import FIELDS, TOOLS, names_of, shortened
from reward.data.values import are_texts
from reward.process import Fault, one_line

TABLES = {".csv": ",", ".tsv": "\t"}
# In many countries, spreadsheets write CSV with semicolons.
SEPARATORS = (",", "\t", ";")
# The beginning of messages in a cell, as JSON or as Python prints them, and of other objects.
MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
OBJECTS = re.compile(r"\s*(\[\s*)?\{")
SUFFIXES = (
    *(".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet"),
    *(f"{table}{end}" for table in TABLES for end in ("", ".gz")),
)
# What holds tools and their arguments.
FUNCTIONS = (TOOLS, "tool_calls")
# Files in a folder that are neither read nor reported as not read.
OTHERS = re.compile(r"\.|(readme|license|dataset\.ya?ml)|.*\.dvc$", re.IGNORECASE)
# What the Hub and save_to_disk of datasets put next to the data.
METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
# What is often saved under the name of the data: how it begins in lower case, what it is, and what
# helps.
IMPOSTORS = (
    ((b"version https://git-lfs",), "a Git LFS pointer", "git lfs pull fetches the file"),
    ((b"<!doctype html", b"<html"), "an HTML page", "download the file itself"),
    ((b"pk\x03\x04",), "a zip file", "unpack it, or save a spreadsheet as CSV in UTF-8"),
)
CHUNK = 1 << 20
# At most this many characters are read to describe an object over several lines in the message.
LONGEST_OBJECT = 1 << 26
LONGEST_CELL = 1 << 30
KANA = "[\u3040-\u30ff]"
# About a fifth of a Chinese text, and a quarter of a Korean one. Bytes that are hanzi in one
# encoding are hangul in another, but those of frequent characters are rare ones there.
CHINESE = "[，。？的一是不了在人有我你这這个個]"
KOREAN = "[이다는을를의에은고요세어서로기도]"
# Apart from no-break spaces, the Western characters beyond ASCII stand alone or in twos, and most
# of them are small letters and punctuation. Icelandic ones are left out, because they are frequent
# in Polish and Turkish text that is decoded wrongly.
WESTERN = r"(?<![^\x00-\x7f\xa0])[¡¿«»‘’“”–—…ß-ïñ-ü]{1,2}(?![^\x00-\x7f\xa0])|\xa0"
# The characters by which an encoding is recognized, and the least share of them in all that is not
# ASCII. To be decodable is not enough: most encodings can decode the text of many others.
ENCODINGS = (
    ("SHIFT_JIS", KANA, 0.25),
    ("EUC-JP", KANA, 0.25),
    ("GB18030", CHINESE, 0.05),
    ("CP950", CHINESE, 0.05),
    ("EUC-KR", KOREAN, 0.1),
    ("WINDOWS-1252", WESTERN, 0.75),
)
# Text has none of these characters.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
# In place of an encoding that is not known.
UNKNOWN = "ENCODING"
# The longest token of JSON, apart from strings, that the end of a chunk can cut in two.
LONGEST_TOKEN = 16

Item = TypeVar("Item")


def files(path: Path) -> list[Path]:
    """The preference files of a path: the file itself, or those directly in the folder, sorted.

    Raises a Fault if there is none, the path cannot be read, or a name is not UTF-8.
    """
    try:
        if not path.exists():
            raise Fault(f"{path} does not exist, expected a file or a folder of preference pairs")
        if not path.is_file() and not path.is_dir():
            raise Fault(
                f"{path} is not a regular file, expected one or a folder of preference pairs; "
                "files are read more than once, so save what a pipe gives as a file"
            )
        found = [path] if path.is_file() else sorted(filter(has_records, path.iterdir()))
    except OSError as error:
        raise Fault(f"{path} cannot be read: {error.strerror}; expected preference pairs") from None
    if not found or (not path.name.endswith(SUFFIXES) and path.is_file()):
        problem = "is not a preference file" if found else f"has no preference file{_folders(path)}"
        raise Fault(f"{path} {problem}, expected a name that ends in {', '.join(SUFFIXES)}")
    for file in found:
        require_utf8(file)
    return found


def require_utf8(path: Path) -> None:
    """Raises a Fault for a path that is not UTF-8, which no JSON or Parquet file can hold."""
    if (shown := printable(path)) != str(path):
        raise Fault(
            f"the path {shown} is not UTF-8, expected one that is; rename the file or its folder"
        )


def printable(path: Path | str) -> str:
    r"""A path as text, in which a byte that is not UTF-8 is written as, for example, \xe9."""
    return str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")


def has_records(path: Path) -> bool:
    """Whether something in a folder is a preference file, by its name."""
    return path.name.endswith(SUFFIXES) and path.name not in METADATA and path.is_file()


def _folders(path: Path) -> str:
    """What to say about the folders in a folder: preference files in them are not found."""
    inside = [name for name in other_names(path) if name.endswith("/")]
    shown = ", ".join(inside[:3])
    return f" (files in {shown} are not read; give {path / inside[0]} instead)" if inside else ""


def other_names(path: Path) -> list[str]:
    """The names of everything in a folder except preference files and notes such as a README.

    The names of folders end with a slash. Empty for a path that is a file.
    """
    found = sorted(path.iterdir()) if path.is_dir() else []
    return [
        printable(child.name) + "/" * child.is_dir()
        for child in found
        if not OTHERS.match(child.name) and not has_records(child)
    ]


def name_of(path: Path) -> str:
    """A file's name without its suffix."""
    return path.name.removesuffix(next(end for end in SUFFIXES if path.name.endswith(end)))


def read(path: Path) -> Iterator[tuple[int, Any]]:
    """The position and content of each record of a file, in order and unchecked.

    Positions are those of `place_of`, from 1. The header of a table is row 1. Only a few records
    are in memory at a time. Raises a Fault if the file ends early or is not what its name says.
    """
    position = 0
    try:
        _refuse_impostor(path)
        for position, record in _reader(path)(path):
            yield position, record
    except UnicodeDecodeError:
        place = "a byte is not UTF-8"
        with suppress(EOFError, OSError, zlib.error):  # compressed, and damaged after that byte
            place = _undecodable(path)
        raise Fault(f"{path}: {place}, expected UTF-8{_conversion(path)}") from None
    except (EOFError, OSError, zlib.error) as error:
        raise Fault(
            f"{path}: cannot be read to the end: {one_line(error)}; expected a complete file"
        ) from None
    if not position:
        raise Fault(f"{path} has no records, expected preference pairs")


def batches(
    items: Iterable[Item], size_of: Callable[[Item], int], most: int
) -> Iterator[list[Item]]:
    """Lists of items with a total size of about `most`, to limit memory; the same in every run."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _refuse_impostor(path: Path) -> None:
    """Raise a Fault for a file that is not the data, but was saved under its name."""
    with path.open("rb") as file:
        start = file.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip().lower()
    for starts, what, advice in IMPOSTORS:
        if start.startswith(starts):
            raise Fault(f"{path} is {what}, expected preference pairs; {advice}")


def place_of(path: Path, position: int) -> str:
    """Where a record is, for messages.

    Positions count the rows of a table, the records of an array, or the lines of JSON Lines.
    """
    reader = _reader(path)
    unit = "record" if reader is _array else "line" if reader is _lines else "row"
    return f"{path}: {unit} {position}"


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[int, Any]]]:
    if path.suffix == ".parquet":
        return _parquet
    if separator_of(path):
        return _table
    with _open(path) as file:
        return _array if _first(file) == "[" else _lines


def separator_of(path: Path) -> str | None:
    """What separates the cells of a table; None for a file that is not a table."""
    return TABLES.get(Path(path.name.removesuffix(".gz")).suffix)


def _table(path: Path) -> Iterator[tuple[int, Any]]:
    """Records of CSV or TSV, keyed by the header. Cells may have line breaks or messages as JSON.

    If the usual separator is not in the header, another one is used, because preferences need more
    than one column.
    """
    csv.field_size_limit(LONGEST_CELL)
    with _open(path) as file:
        first, usual = file.readline(), separator_of(path) or ","
        shown = [usual, *SEPARATORS]
        separator = next((each for each in shown if each in first), usual)
        file.seek(0)
        rows = csv.reader(file, delimiter=separator, strict=True)
        position = 0
        try:
            header = next(rows, [])
            position = 1
            if twice := [name for name in header if header.count(name) > 1]:
                raise Fault(f"{path}: row 1: the column {shortened(twice[0])!r} appears twice")
            for position, cells in enumerate(rows, start=2):
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise Fault(
                        f"{path}: row {position} (line {rows.line_num}) has {len(cells)} cells, "
                        f"expected {len(header)}, as in the header"
                    )
                yield (
                    position,
                    {
                        name: _messages(path, position, name, cell) if OBJECTS.match(cell) else cell
                        for name, cell in zip(header, cells, strict=True)
                    },
                )
        except csv.Error as error:
            raise Fault(
                f"{path}: row {position + 1} (line {rows.line_num}): broken table: {error}; "
                "put cells with line breaks or quotes in double quotes"
            ) from None


def _messages(path: Path, position: int, name: str, cell: str) -> Any:
    """The message or messages in a cell of JSON; a cell with other objects as it is."""
    try:
        found = _DECODER.decode(cell)
        return found if are_spoken(found) else cell
    except (ValueError, RecursionError) as error:
        if not MESSAGES.match(cell):
            return cell
        raise Fault(
            f"{path}: row {position}: {name!r} begins like messages, but is not JSON "
            f"({_reason(error)}); expected messages as json.dumps writes them"
        ) from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    position = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, names = str(file.schema_arrow), file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise Fault(f"{path}: the column {twice[0]!r} appears twice, expected one")
            differs = any(word in schema for word in ("decimal", *FUNCTIONS))
            for batch in file.iter_batches(batch_size=1000):
                try:
                    records = batch.to_pylist()
                except (pyarrow.ArrowException, OverflowError, ValueError):
                    records = _one_by_one(path, batch, position)
                for record in records:
                    position += 1
                    yield position, _as_json(record) if differs else record
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise Fault(
            f"{path}: broken Parquet: {one_line(error)}; expected a complete file"
        ) from None


def _one_by_one(path: Path, batch: Any, before: int) -> Iterator[dict[str, Any]]:
    """The records of a batch, of which Python cannot hold all values.

    Times that it cannot hold (after the year 9999, or in an unknown time zone) become the numbers
    that are stored for them, because they are rarely needed. Raises a Fault for any other value.
    """
    import pyarrow

    for position, row in enumerate(zip(*batch.columns, strict=True), start=before + 1):
        record = {}
        for name, value in zip(batch.schema.names, row, strict=True):
            try:
                record[name] = value.as_py()
            except (pyarrow.ArrowException, OverflowError, ValueError) as error:
                if not pyarrow.types.is_temporal(value.type):
                    raise Fault(
                        f"{place_of(path, position)}: the column {name!r} cannot be read: "
                        f"{one_line(error)}; expected values as in JSON, or no such column"
                    ) from None
                record[name] = value.value
        yield record


def _as_json(value: Any, in_functions: bool = False) -> Any:
    """A value from Parquet as JSON would have it: decimals as floats, and functions without nulls.

    In Parquet all objects of a column have the same keys, so a tool or a call has the arguments of
    all others too, as nulls.
    """
    if isinstance(value, dict):
        return {
            key: _as_json(each, in_functions or key in FUNCTIONS)
            for key, each in value.items()
            if not (in_functions and each is None)
        }
    if isinstance(value, list):
        return [_as_json(each, in_functions) for each in value]
    return float(value) if isinstance(value, Decimal) else value


def _open(path: Path) -> IO[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig", newline="\n")


def _first(file: IO[str]) -> str:
    """The next character that is not white space; empty at the end of the file."""
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
    return "a byte is not UTF-8"


def _conversion(path: Path) -> str:
    """How to convert a file, if its first bytes may be text in another encoding."""
    with suppress(EOFError, OSError, zlib.error):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            encoding = _encoding(file.read(CHUNK))
        if encoding:
            name = shlex.quote(str(path))
            unpacked = f"gunzip -c {name} | " if path.suffix == ".gz" else ""
            source = "" if unpacked else f" {name}"
            known = encoding != UNKNOWN
            what = f"it may be {encoding}" if known else "to convert it, name its encoding"
            return f"; {what}: {unpacked}iconv -f {encoding} -t UTF-8{source} > NEW"
    return ""


def _encoding(content: bytes) -> str | None:
    """The probable encoding, by the byte order mark, the zero bytes or the characters.

    UNKNOWN if none is probable. None for damaged UTF-8 and for bytes that are not text.
    """
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if 0 in content:
        # Counting would mislead: there are hanzi whose second byte is zero.
        wide = "UTF-16LE" if content.index(0) % 2 else "UTF-16BE"
        text = _decoded(content, wide)
        return wide if text and not CONTROL.search(text) else None
    valid = content.decode(errors="ignore")
    lost = len(content) - len(valid.encode())
    if _beyond_ascii(valid) > lost or CONTROL.search(valid):
        return None
    for encoding, typical, share in ENCODINGS:
        text = _decoded(content, encoding)
        if len("".join(re.findall(typical, text))) > share * _beyond_ascii(text):
            return encoding
    return UNKNOWN


def _decoded(content: bytes, encoding: str) -> str:
    """Bytes as text; empty if they are not of the encoding. They may end within a character."""
    with suppress(UnicodeDecodeError):
        return codecs.getincrementaldecoder(encoding)().decode(content)
    return ""


def _beyond_ascii(text: str) -> int:
    return sum(character > "\x7f" for character in text)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Records of JSON Lines, with their line numbers."""
    expected, seen = "expected one record per line, or an array of records", False
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not (text := line.strip()):
                continue
            try:
                record = _DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                if not seen and (spread := _spread(path)):
                    raise Fault(
                        f"{path}: one object over several lines, {_wrapped(spread, expected)}"
                    ) from None
                raise Fault(
                    f"{path}: line {number}: broken JSON: {_reason(error)}, found {text[:20]!r}; "
                    f"{expected}"
                ) from None
            if not seen and (_is_wrapper(record) or (_holds_table(record) and _has_one_line(path))):
                raise Fault(f"{path}: line {number}: an object {_wrapped(record, expected)}")
            seen = True
            yield number, record


def _spread(path: Path) -> dict[str, Any] | None:
    """The object that fills the whole file over several lines, or None."""
    with _open(path) as file:
        text = file.read(LONGEST_OBJECT)
    try:
        found = _DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _wrapped(record: dict[str, Any], expected: str) -> str:
    """The message about an object around records, with a command that extracts them."""
    if _holds_table(record):
        return (
            f"with {names_of(record)}, which hold a whole table; {expected} "
            "(df.to_json(orient='records') of pandas writes it)"
        )
    if {*FIELDS} & record.keys():
        return f"with {names_of(record)}; {expected} (jq -c . puts a record on one line)"
    inside = next((key for key, value in record.items() if isinstance(value, list)), None)
    way = f" (jq -c '.{inside}[]' extracts them)" if inside and inside.isidentifier() else ""
    return f"with {names_of(record)}; {expected}{way}"


def _is_wrapper(record: Any) -> bool:
    """Whether this is an object that contains a list of records, and not a record itself."""
    if not isinstance(record, dict) or record.keys() & set(FIELDS):
        return False
    firsts = [value[0] for value in record.values() if isinstance(value, list) and value]
    return any(isinstance(first, dict) and first.keys() & set(FIELDS) for first in firsts)


def _holds_table(record: Any) -> bool:
    """Whether this is a table in one object, by columns or by rows, as pandas writes it.

    Its cells are in lists of one length, or in objects whose keys are the numbers of rows. A record
    that has only lists has messages in one of them, or no texts.
    """
    values = [*record.values()] if isinstance(record, dict) else []
    if len(values) > 1 and all(isinstance(value, dict) for value in values):
        return any(keys and all(map(str.isdigit, keys)) for keys in ({*record}, {*chain(*values)}))
    if len(values) > 1 and all(isinstance(value, list) for value in values):
        alike = len({*map(len, values)}) == 1 or {"columns", "data"} <= record.keys()
        held = any(isinstance(item, dict) for item in chain(*values))
        return alike and any(map(are_texts, values)) and not held
    return False


def _has_one_line(path: Path) -> bool:
    """Whether a file has only one line, apart from blank ones."""
    with _open(path) as file:
        return len([*islice(filter(str.strip, file), 2)]) == 1


def _array(path: Path) -> Iterator[tuple[int, Any]]:
    """Records of a JSON array. Little more than one record or one chunk is in memory at a time.

    ijson is not used, because its parser silently turns half of a surrogate pair into a question
    mark, so a broken text would be trained on, and because its errors name neither the record nor
    what was found. ijson reads 60,000 records (89 MB) in 0.25 s of processor time if it refuses
    duplicate keys, and this function in 0.39 s. Tokenizing them takes far longer.
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
                # Near the end of the chunk, an error may only mean that the rest is not read yet.
                at_end = error.pos > len(buffer) - LONGEST_TOKEN
                more = file.read(size) if at_end or "Unterminated" in error.msg else ""
                if not more:
                    rest = buffer[error.pos : error.pos + 20]
                    found = repr(rest) if rest else "the end of the file"
                    raise Fault(
                        f"{path}: record {position}: broken JSON: {error.msg}, found {found}; "
                        "expected an array of records"
                    ) from None
                buffer, start, size = buffer[start:] + more, 0, size * 2
                continue
            except (ValueError, RecursionError) as error:
                raise Fault(
                    f"{path}: record {position}: broken JSON: {_reason(error)}; "
                    "expected an array of records"
                ) from None
            yield position, record
            position, start, size = position + 1, end, CHUNK
            if separator == "]":
                break
        if after := (buffer[start:] + file.read(CHUNK)).strip():
            raise Fault(
                f"{path}: found {after[:20]!r} after the array, expected the end of the file"
            )


def _element(text: str, start: int) -> tuple[Any, str, int]:
    """The array element that starts at `start`, the separator after it, and the next index."""
    record, end = _DECODER.raw_decode(text, _skip_space(text, start))
    end = _skip_space(text, end)
    if text[end : end + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' or ']' after the record", text, end)
    return record, text[end], end + 1


def _skip_space(text: str, start: int) -> int:
    while text[start : start + 1] in (" ", "\t", "\r", "\n"):
        start += 1
    return start


def _reason(error: Exception) -> str:
    """Why JSON cannot be read, in plain words."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number with too many digits" if "int_max_str_digits" in str(error) else str(error)


class _DuplicateKey(ValueError):
    pass


def unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values, for json.loads. Raises ValueError for one twice."""
    record = dict(items)
    if len(record) != len(items):
        twice = next(
            name for name, count in Counter(name for name, _ in items).items() if count > 1
        )
        raise _DuplicateKey(f"the key {twice!r} appears twice in one object")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
