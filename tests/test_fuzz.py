"""Whatever the bytes, records and entries, there are pairs or a message, and nothing else."""

import gzip
import io
import json
import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.data.mapping import BEFORE, GRADED, ORDERED, read_mapping
from reward.data.reading import SUFFIXES, read
from reward.data.records import FIELDS, PARTS, ROLES, TOOLS, BadRecord, Record, check, parts_of
from reward.data.sources import sources
from reward.process import Fault

RECORDS: list[dict[str, Any]] = [
    {"prompt": "one", "chosen": "yes", "rejected": "no", "kind": "a"},
    {"prompt": "二", "chosen": "是👍", "rejected": "", "n": -1.5e3},
    {
        "prompt": [{"role": "user", "content": "three"}],
        "chosen": [{"role": "assistant", "content": "x"}],
        "rejected": [{"role": "assistant", "content": "y"}],
    },
]
# The same examples each time, so that a failure in CI can be reproduced.
FEW = settings(max_examples=600, deadline=None, derandomize=True)
MANY = settings(max_examples=2000, deadline=None, derandomize=True)


def as_parquet(records: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue()


ARRAY = json.dumps(RECORDS, ensure_ascii=False, indent=1).encode()
LINES = b"\n".join(json.dumps(record).encode() for record in RECORDS)
WHOLE = {
    "array.json": ARRAY,
    "lines.jsonl": LINES,
    "array.json.gz": gzip.compress(ARRAY, mtime=0),
    "lines.jsonl.gz": gzip.compress(LINES, mtime=0),
    "texts.parquet": as_parquet(RECORDS[:1]),
    "messages.parquet": as_parquet(RECORDS[2:]),
}
INTERESTING = [
    b"",
    b"\0",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b"\xff",
    b"\xed\xa0",
]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """Name and content of a valid file with a few edits, or random bytes with a known suffix."""
    if draw(st.integers(0, 4)) == 0:
        return f"any{draw(st.sampled_from(SUFFIXES))}", draw(st.binary(max_size=300))
    name = draw(st.sampled_from(sorted(WHOLE)))
    content = WHOLE[name]
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([0, 1, 1, 2, 8, 10_000]))
        new = draw(st.sampled_from(INTERESTING) | st.binary(max_size=4))
        content = content[:start] + new + content[start + length :]
    return name, content


@FEW
@given(damaged())
def test_any_file_gives_pairs_or_a_message(file: tuple[str, bytes]) -> None:
    name, content = file
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        message, last = "", 0
        try:
            for position, record in read(path):
                assert position > last
                last = position
                judge(record)
        except Fault as fault:
            message = str(fault)
        assert re.fullmatch(rf"({re.escape(str(path))}.*expected .*)?", message)


TEXT = st.text(max_size=8) | st.sampled_from(["", " ", "a", "\ud800", "\n\nAssistant:", "x" * 500])
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
CALL = st.fixed_dictionaries({"name": TEXT, "arguments": LEAF})
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(ROLES) | LEAF,
        "content": LEAF,
        "tool_calls": st.lists(CALL, max_size=2) | LEAF,
        **dict.fromkeys([part for part in PARTS if part != "tool_calls"], LEAF),
    },
)
ANYTHING = st.recursive(
    LEAF | st.lists(MESSAGE, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
RECORD = st.fixed_dictionaries({}, optional=dict.fromkeys([*FIELDS, TOOLS, "id", "kind"], ANYTHING))


@MANY
@given(RECORD | ANYTHING)
def test_any_value_is_a_pair_or_is_refused_with_a_reason(record: Any) -> None:
    judge(record)


FORMS = [
    [record for _, record in read(path)]
    for path in sorted((Path(__file__).parent / "forms").iterdir())
    if path.suffix != ".yaml"
]
NAMES = sorted({name for form in FORMS for record in form for name in record})


@st.composite
def changed(draw: st.DrawFn) -> list[dict[str, Any]]:
    """The records of a published form, with a few other values and columns."""
    records = [dict(record) for record in draw(st.sampled_from(FORMS))]
    for _ in range(draw(st.integers(0, 3))):
        record = draw(st.sampled_from(records))
        name = draw(st.sampled_from([*record, *NAMES]))
        record[name] = draw(ANYTHING | st.sampled_from([*record.values()]))
        if draw(st.booleans()):
            del record[draw(st.sampled_from(sorted(record)))]
        if not record:
            record["prompt"] = ""
    return records


def values_of(names: list[str]) -> dict[str, st.SearchStrategy[Any]]:
    """What each key of dataset.yaml that is about columns may be, for columns of these names."""
    name = st.sampled_from(names)
    column = name | st.builds(str.__add__, name, st.sampled_from(["[0]", "[].text", ".content"]))
    columns = column | st.lists(column, min_size=2, max_size=2)
    value = st.integers(0, 2) | st.sampled_from(["A", "B", "model_a"])
    return {
        **dict.fromkeys((*BEFORE, *GRADED), column | st.none()),
        **dict.fromkeys(("chosen", "rejected", "verdict"), column),
        **dict.fromkeys(("answers", "votes", *ORDERED), columns),
        **dict.fromkeys(("first", "second", "tie"), value | st.lists(value, max_size=2)),
        "order": st.just("best_first"),
        "where": st.dictionaries(column, value, max_size=1),
        "take": st.sampled_from([1, 0.5]),
    }


def mapping(folder: str, entry: dict[str, Any]) -> Path:
    """Write a dataset.yaml with this entry for x.jsonl."""
    (Path(folder) / "dataset.yaml").write_text(json.dumps({"x.jsonl": entry}))
    return Path(folder)


ENTRY = values_of(["a", "b"]) | {"take": LEAF, "seed": LEAF, "split": LEAF}


@settings(FEW, max_examples=300)
@given(st.lists(st.sampled_from(sorted(ENTRY)), max_size=5), st.data())
def test_any_entry_is_read_or_refused(keys: list[str], data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = mapping(folder, {key: data.draw(ENTRY[key]) for key in keys})
        with suppress(Fault):
            read_mapping(path)


# Keys that together say which answer is better.
WAYS = [
    (),
    ("chosen", "rejected"),
    ("answers", "verdict", "first", "second"),
    ("answers", "order"),
    *(("answers", way) for way in (*ORDERED, "votes", "preference")),
]


@settings(FEW, max_examples=200)
@given(changed(), st.data())
def test_any_form_and_entry_give_pairs_or_a_message(
    records: list[dict[str, Any]], data: st.DataObject
) -> None:
    values = values_of(sorted({name for record in records for name in record}))
    others = st.lists(st.sampled_from([*BEFORE, *GRADED, "where", "take"]), max_size=2)
    keys = (*data.draw(st.sampled_from(WAYS)), *data.draw(others))
    with TemporaryDirectory() as folder:
        path = mapping(folder, {key: data.draw(values[key]) for key in keys})
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (path / "x.jsonl").write_text(lines)
        message = ""
        try:
            [source] = sources(path)
            for position, record in source:
                with suppress(BadRecord):
                    check(source.raw(position, record))
        except Fault as fault:
            message = str(fault)
        assert not message or message.startswith(folder)


def judge(record: Any) -> None:
    """A checked record has all that later stages rely on; any other is refused with a reason."""
    pair: Record | None = None
    reason = ""
    try:
        pair = check(record)
    except BadRecord as fault:
        reason = f"{fault.reason}: {fault}"
    if pair is None:
        assert re.fullmatch(r"[a-z_]+: .+", reason)
        return
    assert pair.answers[0] != pair.answers[1]
    turns = pair.prompt[1:] if pair.prompt[0][0] == TOOLS else pair.prompt
    for messages in (turns, pair.answers[0], pair.answers[1]):
        assert messages
        for message in messages:
            assert message[0] in ROLES
            assert message[1].strip() or "tool_calls" in parts_of(message)
    assert pair.answers[0][0][0] == pair.answers[1][0][0] == "assistant"
    texts = [
        text
        for messages in (pair.prompt, pair.answers[0], pair.answers[1])
        for message in messages
        for text in message
    ]
    for text in (*texts, *pair.columns, *pair.columns.values()):
        text.encode()
