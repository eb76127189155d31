"""The preference record: read it from files, check it, split by prompt.

A record has `chosen` and `rejected`, texts or lists of {role, content} messages, and `prompt`: a
text, a list of messages, or nothing, when the two conversations stand whole in `chosen` and
`rejected`. Further columns with a single value are kept. A record that is only to be scored may
have any number of `answers`, or one `answer`, instead.
"""

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from stages.process import Fault

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
ROLES = ("system", "user", "assistant", "tool")
FIELDS = ("prompt", "chosen", "rejected")
# Columns of the tokenized data, of rewards.parquet and of the page of judgements.
RESERVED = (
    "test set",
    *("id", "prompt_id", "prefix_length", "margin"),
    *("reward_chosen", "reward_rejected", "tokens_chosen", "tokens_rejected"),
    *(f"{name}_{side}" for name in ("input_ids", "attention_mask") for side in "jk"),
)
LAST_TURN = "\n\nAssistant:"
CHUNK = 1 << 20
# Characters of the longest piece of JSON, a string apart, that the end of a chunk can cut in two.
LONGEST_TOKEN = 16

Message = tuple[str, str]
Messages = tuple[Message, ...]
Hashes = npt.NDArray[np.uint64]


class BadRecord(Exception):
    """A record that cannot be used: `reason` is a word to count by, the sentence for people."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True)
class Pair:
    """A checked record. A text is one message of the user or the assistant."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    id: str
    columns: dict[str, str] = field(default_factory=dict)

    @cached_property
    def prompt_hash(self) -> int:
        """64 bits that are equal for equal prompts, whatever form they came in."""
        return _hash([self.prompt])

    @property
    def prompt_id(self) -> str:
        """The prompt's hash in hex, the column of the tokenized data."""
        return f"{self.prompt_hash:016x}"

    @cached_property
    def pair_hash(self) -> int:
        """64 bits that are equal for equal records."""
        return _bits(self.prompt_hash.to_bytes(8) + b"".join(self._answers))

    @cached_property
    def answers_hash(self) -> int:
        """64 bits that are equal for the same prompt and answers, whichever is the chosen one."""
        return _bits(self.prompt_hash.to_bytes(8) + b"".join(sorted(self._answers)))

    @cached_property
    def _answers(self) -> list[bytes]:
        return [_sha256(answer) for answer in (self.chosen, self.rejected)]


@dataclass(frozen=True)
class Candidates:
    """A prompt and the answers to it that are to be scored; an answer may be empty."""

    prompt: Messages
    answers: list[Messages]


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _sha256(content: object) -> bytes:
    """SHA-256 of the compact JSON of `content` in UTF-8."""
    return hashlib.sha256(_ENCODER.encode(content).encode()).digest()


def _bits(digested: bytes) -> int:
    """The first 64 bits of the SHA-256 of some bytes."""
    return int.from_bytes(hashlib.sha256(digested).digest()[:8])


def _hash(content: object) -> int:
    """The first 64 bits of the SHA-256 of the compact JSON of `content`."""
    return int.from_bytes(_sha256(content)[:8])


# --- reading ---------------------------------------------------------------------------------


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
                raise Fault(f"{path}: line {number}: an object with {_names(record)}; {wanted}")
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
    """Records of a JSON array; holds little more than one record, or one chunk, in memory."""
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


# --- checking --------------------------------------------------------------------------------


def check(record: Any) -> Pair:
    """A raw record as a Pair. Raises BadRecord with one of the reasons `missing_key`,
    `wrong_type`, `unknown_role`, `not_text`, `empty`, `prompt_differs`, `identical_answers`."""
    if not isinstance(record, dict):
        raise BadRecord("wrong_type", f"is {_kind(record)}, wanted an object")
    for key in ("chosen", "rejected"):
        if key not in record:
            raise BadRecord("missing_key", f"{key!r} is missing, found {_names(record)}")
    raw = [record.get(key) for key in FIELDS]
    prompt, chosen, rejected = _conversations(*raw)
    columns = _columns(record)
    try:
        identity = _sha256(raw).hex()[:16]
        "".join([*columns, *columns.values()]).encode()
    except (UnicodeEncodeError, TypeError) as error:
        raise BadRecord("not_text", f"holds what is no text: {error}") from None
    for key, messages in zip(FIELDS, (prompt, chosen, rejected), strict=True):
        if not all(content.strip() for _, content in messages):
            raise BadRecord("empty", f"{key!r} is empty")
    if chosen == rejected:
        raise BadRecord("identical_answers", "'chosen' and 'rejected' are the same")
    return Pair(prompt, chosen, rejected, identity, columns)


def candidates(record: Any) -> Candidates:
    """What a raw record has to score: the two answers of a pair, its `answers`, or its `answer`.

    Raises BadRecord as `check` does.
    """
    given = [key for key in ("answer", "answers") if isinstance(record, dict) and key in record]
    if not given:
        pair = check(record)
        return Candidates(pair.prompt, [pair.chosen, pair.rejected])
    if len(given) > 1 or {"chosen", "rejected"} & record.keys():
        wanted = "wanted 'answer', 'answers', or a pair"
        raise BadRecord("several_kinds", f"has {_names(record)}, {wanted}")
    if "prompt" not in record:
        raise BadRecord("missing_key", f"'prompt' is missing, found {_names(record)}")
    prompt = _messages("prompt", record["prompt"], "user")
    if not all(content.strip() for _, content in prompt):
        raise BadRecord("empty", "'prompt' is empty")
    answers = [
        _behind(prompt, key, _messages(key, value)) for key, value in _answers(record, given[0])
    ]
    try:
        _sha256([prompt, answers])
    except UnicodeEncodeError as error:
        raise BadRecord("not_text", f"holds what is no text: {error}") from None
    return Candidates(prompt, answers)


def _answers(record: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    """Each answer with what messages call it."""
    found = record[key]
    if key == "answer":
        return [(key, found)]
    if not isinstance(found, list):
        raise BadRecord("wrong_type", f"{key!r} is {_kind(found)}, wanted a list of answers")
    if not found:
        raise BadRecord("empty", f"{key!r} is an empty list")
    return [(f"answers[{index}]", value) for index, value in enumerate(found)]


def _conversations(prompt: Any, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected as messages, nothing of the prompt left in the answers."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = _split_texts(chosen, rejected)
        head = _messages("prompt", prompt, "user")
        return head, (("assistant", chosen),), (("assistant", rejected),)
    for key, value, other in (("chosen", chosen, rejected), ("rejected", rejected, chosen)):
        if isinstance(value, str) and isinstance(other, list):
            raise BadRecord("wrong_type", f"{key!r} is a text, wanted both lists, or both texts")
    answers = _messages("chosen", chosen), _messages("rejected", rejected)
    head = _shared_prompt(*answers)
    if prompt is not None:
        asked = _messages("prompt", prompt, "user")
        # The answers may repeat the prompt, and may begin with a system message that it lacks.
        if tuple(message for message in head if message[0] != "system") != asked:
            head = asked
    elif not any(role == "user" for role, _ in head):
        raise BadRecord("missing_key", "'prompt' is missing, and the first messages differ")
    return head, _behind(head, "chosen", answers[0]), _behind(head, "rejected", answers[1])


def _behind(prompt: Messages, key: str, messages: Messages) -> Messages:
    """The answer in messages that may repeat their prompt."""
    repeated = messages[: len(prompt)] == prompt
    answer = messages[len(prompt) :] if repeated else messages
    if not answer or answer[-1][0] != "assistant":
        raise BadRecord("empty", f"{key!r} has no answer of the assistant's after the prompt")
    if answer[0][0] != "assistant":
        raise BadRecord(
            "prompt_differs",
            f"{key!r} begins with another message than the prompt: {answer[0][1][:40]!r}",
        )
    return answer


def _shared_prompt(chosen: Messages, rejected: Messages) -> Messages:
    """The messages with which both begin, up to the last one that is not the assistant's."""
    count = 0
    for index, (left, right) in enumerate(zip(chosen, rejected, strict=False), start=1):
        if left != right:
            break
        if left[0] != "assistant":
            count = index
    return chosen[:count]


def _messages(key: str, value: Any, role: str = "assistant") -> Messages:
    """A list of messages, or a text as one message of `role`."""
    if isinstance(value, str):
        return ((role, value),)
    if not isinstance(value, list):
        wanted = "a text or a list of messages"
        raise BadRecord("wrong_type", f"{key!r} is {_kind(value)}, wanted {wanted}")
    if not value:
        raise BadRecord("empty", f"{key!r} is an empty list")
    return tuple(_message(key, item) for item in value)


def _message(key: str, item: Any) -> Message:
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        found = f"has {_names(item)}" if isinstance(item, dict) else f"is {_kind(item)}"
        raise BadRecord("wrong_type", f"a message of {key!r} {found}, wanted role and content")
    role, content = item["role"], item["content"]
    if role not in ROLES:
        raise BadRecord("unknown_role", f"{key!r} has the role {role!r}, known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRecord("wrong_type", f"a content in {key!r} is {_kind(content)}, wanted a text")
    return role, content


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two conversations in the form of HH, cut behind the last turn marker that they share.

    Without a marker nothing tells the prompt from answers that happen to begin alike.
    """
    cut = len(chosen)
    while (cut := chosen.rfind(LAST_TURN, 0, cut)) >= 0:
        head = chosen[: cut + len(LAST_TURN)]
        if rejected.startswith(head):
            return head, chosen[len(head) :], rejected[len(head) :]
    raise BadRecord(
        "missing_key",
        f"'prompt' is missing, and the answers are no conversations that share {LAST_TURN!r}",
    )


def _columns(record: dict[str, Any]) -> dict[str, str]:
    """The further single values as texts; one named like a column of ours is kept as raw_<name>."""
    return {
        f"raw_{key}" if key in RESERVED else key: str(value)
        for key, value in record.items()
        if key not in FIELDS and isinstance(value, str | int | float)
    }


def _kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    names |= {bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    names[bytes] = "bytes"
    return names.get(type(value), f"a {type(value).__name__}")


def _names(record: dict[str, Any]) -> str:
    shown = (key if key.isprintable() else repr(key) for key in sorted(record))
    return "the keys " + ", ".join(shown) if record else "no key"


# --- all records together --------------------------------------------------------------------


def among(values: Hashes, known: Hashes) -> npt.NDArray[np.bool_]:
    """Which of the values stand among the known ones. Shape [values]."""
    known = np.sort(known)
    left, right = (np.searchsorted(known, values, side) for side in ("left", "right"))
    return np.asarray(left != right)


def duplicates(pairs: Hashes) -> npt.NDArray[np.bool_]:
    """Which records repeat an earlier one. Shape [records] in and out."""
    order = np.argsort(pairs, kind="stable")
    repeated = np.zeros(len(pairs), dtype=bool)
    repeated[order[1:]] = pairs[order[1:]] == pairs[order[:-1]]
    return repeated


def contradictions(pairs: Hashes, answers: Hashes) -> npt.NDArray[np.bool_]:
    """Which records another one contradicts: same prompt and answers, chosen the other way round.

    Shapes [records]. Every record of a contradiction is named, for nothing tells which is right.
    """
    order = np.lexsort((pairs, answers))
    left, right = order[:-1], order[1:]
    mixed = (answers[left] == answers[right]) & (pairs[left] != pairs[right])
    return among(answers, answers[right[mixed]])


def split(prompts: Hashes, validation: float, test: float, seed: int) -> npt.NDArray[np.int8]:
    """0 for train, 1 for validation, 2 for test, the same for all records of a prompt.

    The share of prompts is the nearest to the one asked for, at least one prompt where the share
    is above 0. A prompt's rank is a hash of it and the seed, so the order of records is nothing.
    """
    # np.unique and np.isin hash, which takes several times the memory and the time of sorting.
    unique = np.unique_counts(prompts).values
    ranks = np.fromiter((_hash([seed, int(prompt)]) for prompt in unique), np.uint64, len(unique))
    sizes = [max(1, round(share * len(unique))) if share else 0 for share in (test, validation)]
    parts = np.zeros(len(unique), dtype=np.int8)
    order = np.argsort(ranks, kind="stable")
    parts[order[: sizes[0]]] = 2
    parts[order[sizes[0] : sum(sizes)]] = 1
    return np.asarray(parts[np.searchsorted(unique, prompts)])
