"""The preference record: read it from files, check it, split by prompt.

A record has `chosen` and `rejected`, texts or lists of {role, content} messages, and `prompt`: a
text, a list of messages, or nothing, when the two conversations stand whole in `chosen` and
`rejected`. Further columns with a single value are kept.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from stages.process import Fault

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
ROLES = ("system", "user", "assistant", "tool")
RESERVED = (
    *("id", "prompt_id", "prefix_length"),
    *(f"{name}_{side}" for name in ("input_ids", "attention_mask") for side in "jk"),
)

Message = tuple[str, str]
Hashes = npt.NDArray[np.uint64]


class BadRecord(Exception):
    """A record that cannot be used: `reason` is a word to count by, the sentence for people."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True)
class Pair:
    """A checked record. A text is one message of the user or the assistant."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    id: str
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def prompt_hash(self) -> int:
        """64 bits that are equal for equal prompts, whatever form they came in."""
        return _hash([self.prompt])

    @property
    def answers_hash(self) -> int:
        """64 bits that are equal for the same prompt and answers, whichever is the chosen one."""
        return _hash([self.prompt, *sorted([self.chosen, self.rejected])])

    @property
    def pair_hash(self) -> int:
        """64 bits that are equal for equal records."""
        return _hash([self.prompt, self.chosen, self.rejected])


def _hash(content: object) -> int:
    return int.from_bytes(hashlib.sha256(_compact(content)).digest()[:8], "big")


def _compact(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


# --- reading ---------------------------------------------------------------------------------


def files(path: Path) -> list[Path]:
    """The preference files that a path names: itself, or those directly in the folder, sorted."""
    if not path.exists():
        raise Fault(f"{path} is not here, wanted a file or a folder of preference pairs")
    if path.is_file():
        found = [path]
    else:
        found = sorted(child for child in path.iterdir() if child.is_file())
        found = [child for child in found if child.name.endswith(SUFFIXES)]
    if not found or (not path.name.endswith(SUFFIXES) and path.is_file()):
        raise Fault(f"{path}: no preference file, wanted one that ends in {', '.join(SUFFIXES)}")
    return found


def read(path: Path) -> Iterator[Any]:
    """The records of one file in their order, a few at a time, unchecked.

    Raises a Fault where the file ends early or is not what its name says.
    """
    count = 0
    try:
        for record in _parquet(path) if path.suffix == ".parquet" else _json(path):
            count += 1
            yield record
    except UnicodeDecodeError as error:
        raise Fault(f"{path}: not UTF-8 after record {count}: {error.reason}") from None
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise Fault(f"{path}: cannot be read after record {count}: {error}") from None
    if not count:
        raise Fault(f"{path} holds no record, wanted preference pairs")


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise Fault(f"{path}: broken Parquet: {error}") from None


def _json(path: Path) -> Iterator[Any]:
    """Records of a JSON array or of JSON Lines, told apart by the first character."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        yield from _array(path, file) if first == "[" else _lines(path, first, file)


def _lines(path: Path, first: str, file: IO[str]) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        text = (first + line if number == 1 else line).strip()
        if not text:
            continue
        try:
            yield _DECODER.decode(text)
        except ValueError as error:
            raise Fault(
                f"{path}: line {number}: broken JSON: {error}; wanted one record a line, "
                "or an array of records"
            ) from None


def _array(path: Path, file: IO[str]) -> Iterator[Any]:
    """Records of an array whose `[` has been read; holds little more than one record in memory."""
    buffer, start, count, size = "", 0, 0, 1 << 20
    while True:
        start = _skip_space(buffer, start)
        try:
            if buffer[start : start + 1] == "]" and not count:
                return
            record, end = _DECODER.raw_decode(buffer, start)
            after = _skip_space(buffer, end)
            separator = buffer[after : after + 1]
            complete = bool(separator)
        except _DuplicateKey as error:
            raise Fault(f"{path}: record {count + 1}: broken JSON: {error}") from None
        except json.JSONDecodeError as error:
            complete = False
            fault = f"{error.msg}, found {buffer[error.pos : error.pos + 20]!r}"
            cut = error.msg.startswith("Unterminated") or error.pos >= len(buffer) - 16
            if not cut:
                raise Fault(f"{path}: record {count + 1}: broken JSON: {fault}") from None
        else:
            fault = "wanted ',' or ']' after it, found the end"
        if not complete:
            more = file.read(size)
            if not more:
                raise Fault(f"{path}: record {count + 1}: broken JSON: {fault}") from None
            buffer, start, size = buffer[start:] + more, 0, size * 2
            continue
        yield record
        count, size, start = count + 1, 1 << 20, after + 1
        if separator == "]":
            break
        if separator != ",":
            found = buffer[after : after + 20]
            raise Fault(f"{path}: record {count}: wanted ',' or ']' after it, found {found!r}")
    rest = buffer[start:].strip() or file.read(1 << 20).strip()
    if rest:
        raise Fault(f"{path}: wanted the end after the array, found {rest[:20]!r}")


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    return start


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
    `wrong_type`, `empty`, `unknown_role`, `no_prompt`, `not_text` and `identical_answers`."""
    if not isinstance(record, dict):
        raise BadRecord("wrong_type", f"is {_kind(record)}, wanted an object")
    for key in ("chosen", "rejected"):
        if key not in record:
            raise BadRecord("missing_key", f"{key!r} is missing, found {_names(record)}")
    raw = [record.get("prompt"), record["chosen"], record["rejected"]]
    try:
        identity = hashlib.sha256(_compact(raw)).hexdigest()[:16]
    except (UnicodeEncodeError, TypeError) as error:
        raise BadRecord("not_text", f"holds what is no text: {error}") from None
    prompt, chosen, rejected = _conversations(*raw)
    for key, messages in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not all(content.strip() for _, content in messages):
            raise BadRecord("empty", f"{key!r} is empty")
    if chosen == rejected:
        raise BadRecord("identical_answers", "'chosen' and 'rejected' are the same")
    return Pair(prompt, chosen, rejected, identity, _columns(record))


def _conversations(prompt: Any, chosen: Any, rejected: Any) -> tuple[tuple[Message, ...], ...]:
    """Prompt, chosen and rejected as messages, nothing of the prompt left in the answers."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = _split_texts(chosen, rejected)
        return (
            _messages("prompt", prompt, "user"),
            (("assistant", chosen),),
            (("assistant", rejected),),
        )
    answers = [_messages(key, value) for key, value in (("chosen", chosen), ("rejected", rejected))]
    if prompt is None:
        head = _shared(*answers)
        if not head:
            raise BadRecord("no_prompt", "there is no 'prompt', and the first messages differ")
    else:
        head = _messages("prompt", prompt, "user")
    left, right = (
        answer[len(head) :] if answer[: len(head)] == head else answer for answer in answers
    )
    for key, answer in (("chosen", left), ("rejected", right)):
        if not answer or answer[-1][0] != "assistant":
            raise BadRecord("empty", f"{key!r} has no answer of the assistant's after the prompt")
    return head, left, right


def _messages(key: str, value: Any, role: str | None = None) -> tuple[Message, ...]:
    """A list of messages, or a text as one message of `role`, where a role is given."""
    if isinstance(value, str) and role:
        return ((role, value),)
    if not isinstance(value, list):
        wanted = "both answers to be texts, or both lists of messages"
        raise BadRecord("wrong_type", f"{key!r} is {_kind(value)}, wanted {wanted}")
    if not value:
        raise BadRecord("empty", f"{key!r} is an empty list")
    return tuple(_message(key, item) for item in value)


def _message(key: str, item: Any) -> Message:
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        found = _names(item) if isinstance(item, dict) else _kind(item)
        raise BadRecord("wrong_type", f"a message of {key!r} is {found}, wanted role and content")
    role, content = item["role"], item["content"]
    if role not in ROLES:
        raise BadRecord("unknown_role", f"{key!r} has the role {role!r}, known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRecord("wrong_type", f"a content in {key!r} is {_kind(content)}, wanted a text")
    return role, content


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common beginning of two texts, up to the last turn marker or space, as the prompt."""
    length = len(_shared(chosen, rejected))
    marker = "\n\nAssistant:"
    cut = chosen.rfind(marker, 0, length)
    cut = (
        cut + len(marker)
        if cut >= 0
        else 1 + max(chosen.rfind(space, 0, length) for space in (" ", "\n"))
    )
    if not chosen[:cut].strip():
        raise BadRecord("no_prompt", "there is no 'prompt', and the texts begin differently")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _shared(left: Any, right: Any) -> Any:
    """The longest common beginning of two sequences."""
    length = min(len(left), len(right))
    same = next((i for i in range(length) if left[i] != right[i]), length)
    return left[:same]


def _columns(record: dict[str, Any]) -> dict[str, str]:
    """The further single values as texts; one named like a column of ours is kept as raw_<name>."""
    return {
        f"raw_{key}" if key in RESERVED else key: str(value)
        for key, value in record.items()
        if key not in ("prompt", "chosen", "rejected") and isinstance(value, str | int | float)
    }


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), repr(value))


def _names(record: dict[str, Any]) -> str:
    return "the keys " + ", ".join(sorted(map(str, record))) if record else "no key"


# --- all records together --------------------------------------------------------------------


def duplicates(pairs: Hashes) -> npt.NDArray[np.bool_]:
    """Which records repeat an earlier one. Shape [records] in and out."""
    repeated = np.ones(len(pairs), dtype=bool)
    repeated[np.unique(pairs, return_index=True)[1]] = False
    return repeated


def contradictions(pairs: Hashes, answers: Hashes) -> npt.NDArray[np.bool_]:
    """Which records another one contradicts: same prompt and answers, chosen the other way round.

    Shapes [records]. Every record of a contradiction is named, for nothing tells which is right.
    """
    groups, inverse = np.unique(answers, return_inverse=True)
    lowest = np.full(len(groups), np.iinfo(np.uint64).max, dtype=np.uint64)
    highest = np.zeros(len(groups), dtype=np.uint64)
    np.minimum.at(lowest, inverse, pairs)
    np.maximum.at(highest, inverse, pairs)
    return np.asarray((lowest != highest)[inverse])


def split(prompts: Hashes, validation: float, test: float, seed: int) -> npt.NDArray[np.int8]:
    """0 for train, 1 for validation, 2 for test, the same for all records of a prompt.

    The share of prompts is the nearest to the one asked for, at least one prompt where the share
    is above 0. A prompt's rank is a hash of it and the seed, so the order of records is nothing.
    """
    unique, inverse = np.unique(prompts, return_inverse=True)
    ranks = np.array([_hash([seed, int(prompt)]) for prompt in unique], dtype=np.uint64)
    sizes = [max(1, round(share * len(unique))) if share else 0 for share in (test, validation)]
    parts = np.zeros(len(unique), dtype=np.int8)
    order = np.argsort(ranks, kind="stable")
    parts[order[: sizes[0]]] = 2
    parts[order[sizes[0] : sum(sizes)]] = 1
    return np.asarray(parts[inverse])
