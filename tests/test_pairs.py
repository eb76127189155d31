"""Preference records: reading files, refusing bad records, and splitting."""

import csv
import gzip
import hashlib
import itertools
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reward.data import reading
from reward.data import records as pairs
from reward.data.reading import SUFFIXES, files, other_names, place_of, read
from reward.data.records import BadRecord, Comparison, Messages, Raw, check, hash64
from reward.data.splitting import (
    Ballots,
    Hashes,
    Prompts,
    among,
    beginnings,
    combined,
    contradictions,
    count_votes,
    duplicates,
    first_places,
    number_answers,
    split,
)
from reward.process import Fault

RECORDS: list[dict[str, Any]] = [
    {
        "prompt": "怎么煮鸡蛋？😀",
        "chosen": "冷水下锅。\n八分钟。",
        "rejected": "不知道]}",
        "kind": "a",
    },
    {"prompt": 'a "quote", a \\ and\ttab', "chosen": "yes [1, 2", "rejected": "no {", "kind": "b"},
    {"prompt": "three", "chosen": "\u2028 \x85 line?", "rejected": "é", "kind": "c"},
]


def as_array(records: list[Any]) -> bytes:
    return json.dumps(records, ensure_ascii=False, indent=1).encode()


def as_lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def contents(path: Path) -> list[Any]:
    return [record for _, record in read(path)]


def positions(path: Path) -> list[int]:
    return [position for position, _ in read(path)]


def fault(path: Path) -> str:
    with pytest.raises(Fault) as caught:
        contents(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [as_array, as_lines])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
def test_arrays_and_lines_are_read_under_every_name(
    tmp_path: Path, form: Callable[[list[Any]], bytes], suffix: str
) -> None:
    path = write(tmp_path / f"p{suffix}", form(RECORDS))
    assert list(read(path)) == list(enumerate(RECORDS, start=1))
    unit = "record" if form is as_array else "line"
    assert place_of(path, 3) == f"{path}: {unit} 3"


def test_parquet_gives_the_same_records(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), path)
    assert list(read(path)) == list(enumerate(RECORDS, start=1))
    assert place_of(path, 3) == f"{path}: row 3"


def test_parquet_gives_what_json_would_have(tmp_path: Path) -> None:
    """Parquet gives all objects of a column the same keys, and has decimals."""
    tools = [
        [{"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}],
        [{"name": "add", "parameters": {"properties": {"x": {"type": "number"}}}}],
    ]
    calls = [{"city": "Paris"}, {"x": 1}]
    records: list[Any] = [
        {
            "tools": tool,
            "chosen": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": call}]}],
            "note": None,
            "scores": [{"value": Decimal("0.25")}],
        }
        for tool, call in zip(tools, calls, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "p.parquet")
    for record in records:
        record["scores"] = [{"value": 0.25}]
    assert contents(tmp_path / "p.parquet") == records


def test_parquet_messages_give_the_same_id_as_json(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    record = {
        "prompt": "hi",
        "chosen": [*turns, {"role": "assistant", "content": "good"}],
        "rejected": [*turns, {"role": "assistant", "content": "bad"}],
    }
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "p.parquet")
    assert check(contents(tmp_path / "p.parquet")[0]) == check(record)


@pytest.mark.parametrize(
    ("type_", "stored"),
    [
        (pa.timestamp("us"), 1 << 58),
        (pa.date32(), 10_000_000),
        (pa.duration("s"), 1 << 60),
        (pa.timestamp("ms", "Mars/Olympus"), 5),
    ],
)
def test_times_that_python_lacks_do_not_stop_a_parquet_file(
    tmp_path: Path, type_: pa.DataType, stored: int
) -> None:
    path = tmp_path / "p.parquet"
    times = pa.array([None, None, stored], type_)
    pq.write_table(pa.Table.from_pylist(RECORDS).append_column("time", times), path)
    read_as = [None, None, stored]
    expected = [record | {"time": time} for record, time in zip(RECORDS, read_as, strict=True)]
    assert list(read(path)) == list(enumerate(expected, start=1))


@pytest.mark.parametrize("form", [as_array, as_lines])
def test_bom_and_crlf_change_nothing(tmp_path: Path, form: Callable[[list[Any]], bytes]) -> None:
    content = b"\xef\xbb\xbf" + form(RECORDS).replace(b"\n", b"\r\n")
    assert contents(write(tmp_path / "p.json", content)) == RECORDS


def test_positions_of_json_lines_are_line_numbers(tmp_path: Path) -> None:
    content = b"\n \r\n" + as_lines(RECORDS[:1]) + b"\n\n" + as_lines(RECORDS[1:]).rstrip()
    assert positions(write(tmp_path / "p.jsonl", content)) == [3, 6, 7]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 50])
def test_array_is_read_correctly_wherever_a_chunk_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(reading, "CHUNK", chunk)
    odd: list[Any] = [
        *RECORDS,
        -1.5e-7,
        1234567,
        True,
        None,
        "",
        [],
        {},
        {"a": [{"b": "😀"}, -0.0]},
    ]
    for content in (json.dumps(odd), json.dumps(odd, indent=3), json.dumps(odd) + "\n \n"):
        assert contents(write(tmp_path / "p.json", content.encode())) == odd


def test_records_longer_than_a_chunk_are_read(tmp_path: Path) -> None:
    long = [{"prompt": "x" * 3_000_000, "chosen": "a", "rejected": "b"}] * 2
    assert contents(write(tmp_path / "p.json", as_array(long))) == long


def test_array_of_30_mb_is_read_with_8_mb_of_memory(tmp_path: Path) -> None:
    one = json.dumps({"prompt": "word " * 80, "chosen": "yes " * 80, "rejected": "no " * 80})
    path = write(tmp_path / "p.json", f"[{','.join([one] * 30_000)}]".encode())
    assert path.stat().st_size > 28_000_000
    tracemalloc.start()
    assert sum(1 for _ in read(path)) == 30_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_files_of_a_folder_are_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b.json", "a.jsonl.gz", "c.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "README.md").touch()
    (tmp_path / "d.json").mkdir()
    assert [path.name for path in files(tmp_path)] == ["a.jsonl.gz", "b.json", "c.parquet"]


def test_metadata_of_a_data_set_is_not_read(tmp_path: Path) -> None:
    """A folder as `hf download` or `save_to_disk` of datasets writes it."""
    names = ["dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"]
    for name in names:
        (tmp_path / name).write_text('{\n "splits": ["train"]\n}')
    (tmp_path / "data").mkdir()
    with pytest.raises(
        Fault, match=r"preference file \(files in data/ are not read; give .*data inst"
    ):
        files(tmp_path)
    (tmp_path / "p.json").touch()
    assert files(tmp_path) == [tmp_path / "p.json"]
    assert other_names(tmp_path) == ["data/", *names]
    assert files(tmp_path / "state.json") == [tmp_path / "state.json"]


@pytest.mark.parametrize("name", ["nothing.json", "notes.txt", "empty"])
def test_path_without_preference_files_is_a_fault(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(Fault, match=rf"{name}.*expected"):
        files(tmp_path / name)


@pytest.mark.parametrize("name", ["p.jsonl", "pipe"])
def test_pipe_is_a_fault(tmp_path: Path, name: str) -> None:
    """A named pipe, or the output of another command as bash gives it with <(...)."""
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(Fault) as caught:
        files(path)
    assert str(caught.value) == (
        f"{path} is not a regular file, expected one or a folder of preference pairs; "
        "files are read more than once, so save what a pipe gives as a file"
    )


def test_name_that_is_not_utf_8_is_a_fault(tmp_path: Path) -> None:
    """As in an old zip file."""
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.touch()
    for given in (path, tmp_path):
        with pytest.raises(Fault) as caught:
            files(given)
        assert str(caught.value) == (
            rf"the path {tmp_path}/caf\xe9.jsonl is not UTF-8, expected one that is; "
            "rename the file or its folder"
        )
    path.rename(path.with_suffix(".txt"))
    assert other_names(tmp_path) == [r"caf\xe9.txt"]


# --- broken files ----------------------------------------------------------------------------
# tests/bad has more of them, with their complete messages.


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf", b"[]", b"[ \n]\n"])
def test_file_without_a_record_is_a_fault(tmp_path: Path, content: bytes) -> None:
    assert "has no records, expected" in fault(write(tmp_path / "p.json", content))


@pytest.mark.parametrize("form", [as_array, as_lines])
def test_truncated_file_is_a_fault_or_gives_whole_records(
    tmp_path: Path, form: Callable[[list[Any]], bytes]
) -> None:
    whole = form(RECORDS)
    for end in range(len(whole) - 1):
        path = write(tmp_path / "p.json", whole[:end])
        try:
            found = contents(path)
        except Fault:
            continue
        assert form is as_lines, "a truncated array must never be read"
        assert found == RECORDS[: len(found)]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{\n"data": [', "line 1: broken JSON.*expected one record per line"),
        (as_lines(RECORDS) + b"\n\n{,}", "line 6: broken JSON"),
    ],
)
def test_broken_lines_are_a_fault_with_their_place(
    tmp_path: Path, content: bytes, found: str
) -> None:
    assert re.search(found, fault(write(tmp_path / "p.jsonl", content)))


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_byte_that_is_not_utf8_is_named_with_its_position(tmp_path: Path, suffix: str) -> None:
    content = as_lines(RECORDS).replace(b"three", b"thr\xffee")
    path = write(tmp_path / f"p{suffix}", content)
    place = content.index(b"\xff") + 1
    assert f"line 3: byte {place} of the file is 0xff" in fault(path)


def test_parquet_with_two_columns_of_a_name_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    table = pa.Table.from_pylist(RECORDS)
    pq.write_table(table.append_column("chosen", table["rejected"]), path)
    assert fault(path) == f"{path}: the column 'chosen' appears twice, expected one"


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (
            pa.array([b"a", b"b", b"caf\xe9"]).view(pa.string()),
            "'utf-8' codec can't decode byte 0xe9 in position 3: unexpected end of data",
        ),
        (
            pa.StructArray.from_arrays([pa.array([1, 2, 3])] * 2, ["x", "x"]).take([None, None, 2]),
            "Converting to Python dictionary is not supported when duplicate field names",
        ),
    ],
)
def test_column_that_python_cannot_hold_is_a_fault_with_its_place(
    tmp_path: Path, values: pa.Array, found: str
) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS).append_column("note", values), path)
    message = fault(path)
    assert message.startswith(f"{path}: row 3: the column 'note' cannot be read: {found}")
    assert message.endswith("; expected values as in JSON, or no such column")


def test_name_of_a_parquet_column_that_is_not_utf8_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"kind", b"k\xefnd"))
    assert f"{path}: broken Parquet: " in fault(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "a Git LFS pointer, expected preference pairs; git lfs pull fetches the file",
        ),
        (
            b"\n<!DOCTYPE html>\n<html><body>Sign in, please</body></html>",
            "an HTML page, expected preference pairs; download the file itself",
        ),
        (
            b"\xef\xbb\xbf<html><body>404</body></html>",
            "an HTML page, expected preference pairs; download the file itself",
        ),
        (
            b"PK\x03\x04\x14\x00",
            "a zip file, expected preference pairs; "
            "unpack it, or save a spreadsheet as CSV in UTF-8",
        ),
    ],
)
def test_other_file_under_the_name_of_the_data_is_named(
    tmp_path: Path, suffix: str, content: bytes, found: str
) -> None:
    path = tmp_path / f"p{suffix}"
    path.write_bytes(content)
    assert fault(path) == f"{path} is {found}"


TEXTS = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}
CONVERSATION = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
# As DataFrame.to_json writes them with orient="columns", "index" and "split", and to_dict("list").
WHOLE_TABLES: dict[str, Any] = {
    "columns": {name: dict(zip("01", cells, strict=True)) for name, cells in TEXTS.items()},
    "index": {number: dict(zip(TEXTS, "ace", strict=True)) for number in "01"},
    "split": {"columns": [*TEXTS], "index": [0, 1], "data": [[*"ace"], [*"bdf"]]},
    "lists": TEXTS,
    "lists of messages": TEXTS | {"chosen": [CONVERSATION, CONVERSATION]},
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", WHOLE_TABLES)
def test_table_in_one_object_is_named(tmp_path: Path, name: str, indent: int | None) -> None:
    content = json.dumps(WHOLE_TABLES[name], indent=indent).encode()
    found = fault(write(tmp_path / "p.json", content + b"\n\n"))
    assert ", which hold a whole table; expected one record per line, or an array of rec" in found
    assert found.endswith("(df.to_json(orient='records') of pandas writes it)")
    if indent is None:
        assert contents(write(tmp_path / "p.jsonl", content + b"\n" + content))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": CONVERSATION[:1], "chosen": CONVERSATION[1:], "rejected": CONVERSATION[1:]},
        {"prompt": CONVERSATION[:1], "chosen": ["a"], "rejected": ["b"]},
        {"prompt": CONVERSATION[0], "chosen": CONVERSATION[1], "rejected": CONVERSATION[1]},
        {"answers": [CONVERSATION, CONVERSATION], "scores": [2, 1]},
        {"chosen": CONVERSATION, "rejected": CONVERSATION},
        {"ask": {"text": "q"}, "good": {"text": "a"}, "bad": {"text": "b"}},
        {"turns": ["q"], "answers": ["a", "b"], "ranks": [1, 2]},
        {"ask": {}, "good": {}},
    ],
    ids=["messages", "texts", "single messages", "conversations", "pair", "paths", "lists", "none"],
)
def test_only_record_of_a_file_is_not_taken_for_a_table(tmp_path: Path, record: Any) -> None:
    assert contents(write(tmp_path / "p.json", json.dumps(record).encode())) == [record]


# --- tables ----------------------------------------------------------------------------------

CELLS = [{"prompt": 'say "hi",\nthen go', "chosen": "好", "rejected": ""}] * 2


def as_table(separator: str, end: str) -> bytes:
    quoted = separator.join(('"say ""hi"",\nthen go"', "好", ""))
    return end.join([separator.join(CELLS[0]), quoted, "", quoted, ""]).encode()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("suffix", "separator"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ","), (".tsv.gz", "\t")]
)
def test_tables_are_read_by_their_header(
    tmp_path: Path, suffix: str, separator: str, end: str, mark: bytes
) -> None:
    path = write(tmp_path / f"p{suffix}", mark + as_table(separator, end))
    assert list(read(path)) == [(2, CELLS[0]), (4, CELLS[1])]
    assert place_of(path, 4) == f"{path}: row 4"
    assert files(tmp_path) == [path]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"a,b\n1,2\n1,2,3\n", r"row 3 \(line 3\) has 3 cells, expected 2, as in the header"),
        (b'a,b\n"1\n",2\n1\n', r"row 3 \(line 4\) has 1 cells"),
        (b"a,b,a\n1,2,3\n", "row 1: the column 'a' appears twice"),
        (b",".join([b"a" * 999] * 2) + b"\n1,2\n", r"the column 'a{80}\.\.\.' appears twice"),
        (b'a,b\n"1,2\n', r"row 2 \(line 2\): broken table: "),
        (b'a,b\n"1"x,2\n', r"row 2 \(line 2\): broken table: "),
        (b'"a"x,b\n1,2\n', r"row 1 \(line 1\): broken table: "),
        (b"a,b\n", "has no records"),
        (b"", "has no records"),
    ],
)
def test_broken_table_is_a_fault_with_its_place(tmp_path: Path, content: bytes, found: str) -> None:
    assert re.search(found, fault(write(tmp_path / "p.csv", content)))


@pytest.mark.parametrize("separator", [";", "\t"])
def test_separator_of_a_table_is_detected(tmp_path: Path, separator: str) -> None:
    rows = [["prompt", "chosen", "rejected"], ["Why, please?", "a, b", "c"]]
    path = tmp_path / "p.csv"
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    [(position, record)] = read(path)
    assert (position, record) == (2, dict(zip(*rows, strict=True)))


def test_cell_may_contain_messages_as_json(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": 'Say "hi", please.'}]
    other = '[{"name": "an answer in JSON"}]'
    path = tmp_path / "p.tsv"
    with path.open("w", newline="") as file:
        rows = [["prompt", "chosen"], [json.dumps(messages), other]]
        csv.writer(file, delimiter="\t").writerows(rows)
    assert [record for _, record in read(path)] == [{"prompt": messages, "chosen": other}]
    others = [{"from": "gpt", "value": "a"}, [{"name": "b", "role": "tool", "content": "c"}]]
    with path.open("w", newline="") as file:
        plain = ["{broken", "{}", '{"from": "USD", "value": 3}']
        cells = [*map(json.dumps, others), *plain]
        csv.writer(file, delimiter="\t").writerows([["a", "b", "c", "d", "e"], cells])
    assert [[*record.values()] for _, record in read(path)] == [[*others, *plain]]
    path.write_text("prompt\tchosen\n\"[{'role': 'user', 'content': 'hi'}]\"\tb\n")
    with pytest.raises(Fault, match="row 2: 'prompt' begins like messages, but is not JSON"):
        list(read(path))


def test_cell_longer_than_the_limit_of_csv_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", b"a,b\n" + b"x" * 200_000 + b",y\n")
    assert contents(path) == [{"a": "x" * 200_000, "b": "y"}]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("问题,好的回答,差的回答\n怎么煮鸡蛋？,八分钟。,不知道。\n", "GB18030"),
        ("question,good,bad\n怎样煮鸡蛋？,水开后煮八分钟。,不知道。\n", "GB18030"),
        ("question,good,bad\nWhat does 你好 mean?,Hello.,No idea.\n", "GB18030"),
        ("question,good,bad\n怎樣煮雞蛋？,水開後煮八分鐘。,不知道。\n", "CP950"),
        ("question,good,bad\n계란을 어떻게 삶나요?,팔 분 동안 삶으세요.,몰라요.\n", "EUC-KR"),
        ("question,good,bad\nWhat does 안녕하세요 mean?,Hello.,No idea.\n", "EUC-KR"),
        ("質問,よい答え,わるい答え\nたまごはどうゆでますか,八分です,しらない\n", "SHIFT_JIS"),
        ("質問,よい答え,わるい答え\nたまごはどうゆでますか,八分です,しらない\n", "EUC-JP"),
        ("question,bonne réponse,autre\nOù ça ?,À côté – là.,Où\n", "WINDOWS-1252"),
        ("question,bonne réponse,autre\nEt ?,«\xa0Créée l’été…\xa0»,Où\n", "WINDOWS-1252"),
        ("Frage,gut,schlecht\nWie?,Größere Füße.,Übermäßig süß.\n", "WINDOWS-1252"),
        ("question,good,bad\nWhat?,“I don’t know…” he said.,“A cat.”\n", "WINDOWS-1252"),
        ("问题,好,差\nWhere is it?,here,there\n", "UTF-16"),
        ("question,good,bad\nWhere is it?,here,there ü\n", "UTF-16LE"),
        (f"question,good,bad\n怎样煮鸡蛋？,{'水开后煮八分钟。' * 30},不知道。\n", "UTF-16LE"),
        ("question,good,bad\nWhere is it?,here,there ü\n", "UTF-16BE"),
    ],
)
def test_other_encoding_is_named_with_a_way_to_convert_it(
    tmp_path: Path, text: str, encoding: str
) -> None:
    path = write(tmp_path / "a b.csv", text.encode(encoding))
    expected = f"expected UTF-8; it may be {encoding}: iconv -f {encoding} -t UTF-8 '{path}' > NEW"
    assert fault(path).endswith(expected)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Как сварить яйцо?,Восемь минут в воде.,Не знаю.", "WINDOWS-1251"),
        ("Как сварить яйцо?,Восемь минут в воде.,Не знаю.", "KOI8-R"),
        ("Translate the word яйцо into English, please.,An egg.,A cat.", "WINDOWS-1251"),
        ("Πώς βράζω ένα αυγό;,Οκτώ λεπτά σε νερό.,Δεν ξέρω.", "WINDOWS-1253"),
        ("ต้มไข่อย่างไร,แปดนาทีในน้ำเดือด,ไม่รู้", "CP874"),
        ("When is 春节?,In winter.,No idea.", "GB18030"),
        ("What is 茶?,Tea.,No idea.", "GB18030"),
        ("When is 春節?,In winter.,No idea.", "CP950"),
        ("Jak ugotować jajko?,Osiem minut we wrzącej wodzie.,Może być.", "WINDOWS-1250"),
        ("Yumurta nasıl haşlanır?,Sekiz dakika kaynar suda.,Bilmiyorum.", "WINDOWS-1254"),
    ],
)
def test_no_wrong_encoding_is_named(tmp_path: Path, text: str, encoding: str) -> None:
    """With wrong advice, the model would be trained on garbled text."""
    path = write(tmp_path / "p.csv.gz", f"question,good,bad\n{text}\n".encode(encoding))
    expected = f"name its encoding: gunzip -c {path} | iconv -f ENCODING -t UTF-8 > NEW"
    assert fault(path).endswith(f"expected UTF-8; to convert it, {expected}")


@pytest.mark.parametrize("text", ["é, è, à", "怎么煮鸡蛋？", "Как?"])
def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "p.csv", f"a,b,c\n{text}".encode() + b" \xe9\n")
    assert fault(path).endswith("expected UTF-8")


# --- forms of a record -----------------------------------------------------------------------


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [turn(role, content) for role, content in turns]


USER, GOOD, BAD = ("user", "hi"), ("assistant", "good"), ("assistant", "bad")
SYSTEM, MORE = ("system", "be kind"), ("user", "and then?")
FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "hi", "chosen": "good", "rejected": "bad"},
    "message prompt, texts": {"prompt": messages(USER), "chosen": "good", "rejected": "bad"},
    "messages": {
        "prompt": messages(USER),
        "chosen": messages(GOOD),
        "rejected": messages(BAD),
    },
    "no prompt": {"chosen": messages(USER, GOOD), "rejected": messages(USER, BAD)},
    "null prompt": {
        "prompt": None,
        "chosen": messages(USER, GOOD),
        "rejected": messages(USER, BAD),
    },
    "repeated text prompt": {
        "prompt": "hi",
        "chosen": messages(USER, GOOD),
        "rejected": messages(USER, BAD),
    },
    "repeated message prompt": {
        "prompt": messages(USER),
        "chosen": messages(USER, GOOD),
        "rejected": messages(USER, BAD),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_record_gives_the_same_pair(form: str) -> None:
    pair, plain = check(FORMS[form]), check(FORMS["texts"])
    assert (pair.prompt, pair.answers[0], pair.answers[1]) == ((USER,), (GOOD,), (BAD,))
    assert pair.prompt_hash == plain.prompt_hash


LONG = "Why is the sky blue, then?"


@pytest.mark.parametrize("prompt", [LONG, "\n\nHuman: hi\n\nAssistant:", "怎样洗毛衣？"])
def test_prompt_repeated_in_both_texts_is_used_once(prompt: str) -> None:
    pair = check({"prompt": prompt, "chosen": f"{prompt} Good.", "rejected": f"{prompt} Bad."})
    plain = check({"prompt": prompt, "chosen": " Good.", "rejected": " Bad."})
    assert (pair.prompt, pair.answers[0], pair.answers[1]) == (
        plain.prompt,
        plain.answers[0],
        plain.answers[1],
    )


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        (LONG, f"{LONG} Good.", "Bad."),
        (LONG, f"{LONG[:-1]} Good.", f"{LONG[:-1]} Bad."),
        ("Hello!", "Hello! Welcome.", "Hello! Go."),
        ("你好！", "你好！欢迎。", "你好！走开。"),
    ],
)
def test_texts_that_do_not_both_repeat_the_prompt_stay_whole(
    prompt: str, chosen: str, rejected: str
) -> None:
    pair = check({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert (pair.answers[0], pair.answers[1]) == (
        (("assistant", chosen),),
        (("assistant", rejected),),
    )


def test_answer_that_equals_the_prompt_is_empty() -> None:
    with pytest.raises(BadRecord, match="'rejected' is empty"):
        check({"prompt": LONG, "chosen": f"{LONG} Good.", "rejected": LONG})


def test_text_conversations_become_messages() -> None:
    head = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
    pair = check({"chosen": f"{head} Like this.", "rejected": f"{head} Like that."})
    assert pair.prompt == (("user", "hi"), ("assistant", "hello"), ("user", "how?"))
    assert pair.answers == [(("assistant", "Like this."),), (("assistant", "Like that."),)]


def test_conversations_that_diverge_early_are_split_there() -> None:
    head = "\n\nHuman: hi\n\nAssistant:"
    pair = check({"chosen": f"{head} a\n\nHuman: b\n\nAssistant: c", "rejected": f"{head} d"})
    assert pair.prompt == (("user", "hi"),)
    assert pair.answers[0] == (("assistant", "a"), ("user", "b"), ("assistant", "c"))
    assert pair.answers[1] == (("assistant", "d"),)


def test_answers_with_a_common_beginning_are_not_a_conversation() -> None:
    with pytest.raises(BadRecord, match="'prompt' is missing"):
        check({"promt": "typo", "chosen": "The sky is blue.", "rejected": "The sky is red."})


def test_message_conversations_keep_system_and_earlier_turns_in_the_prompt() -> None:
    head = (SYSTEM, USER, GOOD, MORE)
    record = {"chosen": messages(*head, GOOD), "rejected": messages(*head, BAD)}
    pair = check(record)
    assert (pair.prompt, pair.answers[0], pair.answers[1]) == (head, (GOOD,), (BAD,))
    assert check(record | {"prompt": messages(*head)}).prompt == head


def test_system_message_before_the_repeated_prompt_joins_it() -> None:
    chosen, rejected = messages(SYSTEM, USER, GOOD), messages(SYSTEM, USER, BAD)
    pair = check({"prompt": "hi", "chosen": chosen, "rejected": rejected})
    assert (pair.prompt, pair.answers[0], pair.answers[1]) == ((SYSTEM, USER), (GOOD,), (BAD,))


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_empty_system_message_counts_as_none(empty: Any) -> None:
    silent = {"role": "system", "content": empty}
    spoken = check({"prompt": messages(USER), "chosen": "good", "rejected": "bad"})
    for record in (
        {"prompt": [silent, *messages(USER)], "chosen": "good", "rejected": "bad"},
        {
            "chosen": [silent, *messages(USER, ("assistant", "good"))],
            "rejected": [silent, *messages(USER, ("assistant", "bad"))],
        },
    ):
        found = check(record)
        assert (found.prompt, found.answers) == (spoken.prompt, spoken.answers)
    with pytest.raises(BadRecord, match=r"^'prompt' is empty$"):
        check({"prompt": [silent], "chosen": "good", "rejected": "bad"})


def test_empty_system_message_with_a_thought_is_bad() -> None:
    silent = {"role": "system", "content": "", "reasoning_content": "Hm."}
    with pytest.raises(BadRecord, match=r"^a message of 'prompt' is empty$"):
        check({"prompt": [silent, *messages(USER)], "chosen": "good", "rejected": "bad"})


def test_empty_message_is_named_as_one_of_the_prompt() -> None:
    head = messages(USER, ("assistant", " "), MORE)
    with pytest.raises(BadRecord, match=r"^a message of 'prompt' is empty$"):
        check({"prompt": head, "chosen": "good", "rejected": "bad"})


def test_shared_first_answer_is_not_part_of_the_prompt() -> None:
    pair = check({"chosen": messages(USER, GOOD, MORE, GOOD), "rejected": messages(USER, GOOD)})
    assert (pair.prompt, pair.answers[1]) == ((USER,), (GOOD,))


# --- message parts other than text -----------------------------------------------------------

LOOK = {"type": "function", "function": {"name": "look", "arguments": {"at": "ü"}}}
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
PARTS: dict[str, Any] = {
    "reasoning_content": "let me see",
    "tool_calls": [LOOK],
    "name": "Ann",
    "tool_call_id": "7",
}


def with_answer(**parts: Any) -> dict[str, Any]:
    answer = turn("assistant", "bad") | parts
    return {"prompt": "hi", "chosen": [answer], "rejected": messages(BAD)}


@pytest.mark.parametrize("part", PARTS)
def test_answers_that_differ_only_in_a_part_are_a_pair(part: str) -> None:
    pair = check(with_answer(**{part: PARTS[part]}))
    assert pair.answers[1] == (BAD,)
    assert pair.answers[0][0][:2] == BAD
    assert pairs.parts_of(pair.answers[0][0]) == {part: PARTS[part]}
    assert pairs.parts_of(BAD) == {}


@pytest.mark.parametrize("empty", [None, "", [], {}])
@pytest.mark.parametrize("part", PARTS)
def test_empty_part_counts_as_missing(part: str, empty: Any) -> None:
    with pytest.raises(BadRecord, match="are the same"):
        check(with_answer(**{part: empty}))


@pytest.mark.parametrize("answer", [{"content": None}, {}])
def test_tool_call_may_have_no_text(answer: dict[str, Any]) -> None:
    answer = {"role": "assistant", "tool_calls": [LOOK]} | answer
    [found] = check({"prompt": "hi", "chosen": [answer], "rejected": messages(BAD)}).answers[0]
    assert found[:2] == ("assistant", "")
    assert pairs.parts_of(found) == {"tool_calls": [LOOK], "content": None}


def test_tools_are_the_first_message_of_the_prompt() -> None:
    for form in FORMS.values():
        pair = check(form | {"tools": [SCHEMA]})
        assert [message[:2] for message in pair.prompt] == [("tools", ""), USER]
        assert pairs.parts_of(pair.prompt[0]) == {"tools": [SCHEMA]}
    for tools in ([SCHEMA], json.dumps([SCHEMA])):
        asked = pairs.candidates({"prompt": "hi", "answer": "a", "tools": tools})
        assert asked.prompt == pair.prompt


def test_hashes_and_ids_depend_on_parts_and_tools() -> None:
    records: list[dict[str, Any]] = [
        FORMS["messages"],
        FORMS["messages"] | {"tools": [SCHEMA]},
        FORMS["messages"] | {"tools": [SCHEMA, SCHEMA]},
        FORMS["messages"] | {"prompt": [turn("user", "hi") | {"name": "Ann"}]},
        FORMS["messages"] | {"prompt": [turn("user", "hi") | {"name": "Bob"}]},
    ]
    checked = [check(record) for record in records]
    assert len({pair.ids[0] for pair in checked}) == len(records)
    assert len({pair.prompt_hash for pair in checked}) == len(records)
    assert check(FORMS["messages"] | {"tools": json.dumps([SCHEMA])}) == checked[1]
    for empty in (None, "", "[]", "null"):
        assert check(FORMS["messages"] | {"tools": empty}) == checked[0]
    assert check(FORMS["messages"] | {"tools": []}) == checked[0]


def test_prompt_counts_as_repeated_only_with_its_parts() -> None:
    named = turn("user", "hi") | {"name": "Ann"}
    good, bad = messages(GOOD)[0], messages(BAD)[0]
    record = {"prompt": [named], "chosen": [named, good], "rejected": [named, bad]}
    assert check(record).answers[0] == (GOOD,)
    with pytest.raises(BadRecord, match="begins with a message"):
        check(record | {"chosen": messages(USER, GOOD)})


# --- refused records -------------------------------------------------------------------------
# tests/bad has more of them, with their complete messages.

PLAIN = FORMS["texts"]


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("reason", "sentence", "record"),
    [
        ("missing_key", "first messages differ", {"chosen": messages(SYSTEM, GOOD),
                                                  "rejected": messages(SYSTEM, BAD)}),
        ("wrong_type", "'name' in 'chosen' is a number, expected a string", with_answer(name=3)),
        ("wrong_type", "'tool_calls' in 'chosen' is a string, expected a list of objects",
         with_answer(tool_calls="look")),
        ("wrong_type", "an item of 'tool_calls' in 'chosen' has the key id, expected a function",
         with_answer(tool_calls=[LOOK, {"id": 3}])),
        ("wrong_type", "'tools' is a string that is not JSON", PLAIN | {"tools": "look"}),
        ("wrong_type", "an item of 'tools' is a string, expected", PLAIN | {"tools": ["look"]}),
        ("unread", "a message of 'chosen' has 'images', which", with_answer(images=["a.png"])),
        ("unread", "a message of 'chosen' has 'thinking', which", with_answer(thinking="so")),
        ("unread", "a message of 'chosen' has 'thought', which", with_answer(thought="so")),
        ("unread", "a message of 'chosen' has 'tool_plan', which", with_answer(tool_plan="so")),
        ("not_text", "'chosen' contains a value that is not JSON",
         with_answer(tool_calls=[{"name": "look", "arguments": b"x"}])),
        ("not_text", "not valid text", PLAIN | {"tools": [{"name": "\ud800"}]}),
        ("not_text", "'tools' contains a value that is not JSON",
         PLAIN | {"tools": [{"name": "look", "default": b"x"}]}),
        ("not_text", "'tools' has a value that is nested too deeply",
         PLAIN | {"tools": [{"name": "look", "default": nested(20_000)}]}),
        ("empty", "'chosen' is empty",
         {"prompt": "hi", "chosen": [turn("assistant", "") | {"name": "Ann"}],
          "rejected": messages(BAD)}),
        ("prompt_differs", "the last message of 'prompt' is the assistant's and none of the",
         {"prompt": messages(USER, GOOD), "chosen": "Fine.", "rejected": "Bad."}),
        ("empty", "'rejected' has no assistant message",
         {"prompt": "hi", "chosen": messages(USER, GOOD), "rejected": messages(USER)}),
        ("empty", "'chosen' has no assistant message",
         {"prompt": "hi", "chosen": messages(GOOD, MORE), "rejected": messages(BAD)}),
        ("identical_answers", "are the same",
         {"chosen": messages(USER, BAD), "rejected": messages(USER, BAD)}),
    ],
)  # fmt: skip
def test_unusable_record_is_refused_with_its_reason(
    reason: str, sentence: str, record: Any
) -> None:
    with pytest.raises(BadRecord, match=sentence) as caught:
        check(record)
    assert caught.value.reason == reason


# --- several answers --------------------------------------------------------------------------


def ranking(answers: list[Any], comparisons: list[Comparison], prompt: Any = "Why?") -> Raw:
    names = [f"answer {place + 1}" for place in range(len(answers))]
    return Raw(prompt, answers, names, comparisons, {"kind": "x"})


def test_ranking_has_the_ids_of_its_pairs() -> None:
    comparisons = [Comparison(0, 1), Comparison(2, 0), Comparison(2, 1, 0.5)]
    answers = ["a", "b", "c"]
    found = check(ranking(answers, comparisons))
    pairs = [("a", "b"), ("c", "a"), ("c", "b")]
    assert found.ids == [
        check({"prompt": "Why?", "chosen": j, "rejected": k}).ids[0] for j, k in pairs
    ]
    assert (found.comparisons, found.faults) == (comparisons, [])
    assert found.answers == [(("assistant", answer),) for answer in answers]


def test_prompt_is_the_common_beginning_of_all_answers() -> None:
    asked = [turn("user", "q"), turn("assistant", "a"), turn("user", "more")]
    rest = [[*asked, turn("assistant", each)] for each in "xyz"]
    found = check(ranking(rest, [Comparison(0, 1), Comparison(1, 2)], prompt=None))
    assert [message[1] for message in found.prompt] == ["q", "a", "more"]
    assert [answer[0][1] for answer in found.answers] == ["x", "y", "z"]
    shorter = [asked[0], turn("assistant", "z")]
    found = check(ranking([rest[0], rest[1], shorter], [Comparison(0, 2)], prompt=None))
    assert [message[1] for message in found.prompt] == ["q"]
    assert [len(answer) for answer in found.answers] == [3, 3, 1]
    with pytest.raises(BadRecord, match="'answer 2' is empty"):
        check(ranking(["a", " ", "c"], [Comparison(0, 1)]))


def test_equal_answers_are_left_out_if_tied_and_bad_otherwise() -> None:
    tie, other = Comparison(0, 1, 0.5), Comparison(2, 0)
    found = check(ranking(["a", "a", "c"], [tie, other]))
    assert (found.comparisons, found.faults) == ([other], [])
    found = check(ranking(["a", "a", "c"], [Comparison(0, 1), other]))
    assert (found.comparisons, len(found.ids)) == ([other], 1)
    assert [fault.reason for fault in found.faults] == ["identical_answers"]
    assert str(found.faults[0]) == "'answer 1' and 'answer 2' are the same"
    assert check(ranking(["a", "a"], [tie])).comparisons == []


def test_comparison_without_weight_is_left_out_and_counted() -> None:
    found = check(ranking(["a", "b", "c"], [Comparison(0, 1, weight=0), Comparison(0, 2)]))
    assert found.comparisons == [Comparison(0, 2)]
    assert [fault.reason for fault in found.faults] == ["no_weight"]


# --- identity and kept columns ---------------------------------------------------------------


def test_id_is_the_digest_of_the_compact_json_of_the_raw_record() -> None:
    record = {"prompt": '你"好', "chosen": "é\n", "rejected": "b", "kind": "x"}
    text = '["你\\"好","é\\n","b"]'
    assert check(record).ids[0] == hashlib.sha256(text.encode()).hexdigest()[:16]
    text = '[null,[{"role":"user","content":"hi"},{"role":"assistant","content":"good"}],'
    text += '[{"role":"user","content":"hi"},{"role":"assistant","content":"bad"}]]'
    assert check(FORMS["no prompt"]).ids[0] == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_scalar_columns_are_kept_as_text_and_reserved_names_are_renamed() -> None:
    more = {"kind": "a", "score": 1.5, "n": 2, "flag": True, "tags": ["x"], "none": None}
    ours = {"id": "7", "margin": 3, "prompt_id": "p", "test set": "t"}
    assert check(PLAIN | more | ours).columns == {
        **{"kind": "a", "score": "1.5", "n": "2", "flag": "True"},
        **{"raw_id": "7", "raw_margin": "3", "raw_prompt_id": "p", "raw_test set": "t"},
    }
    taken = {"raw_id": "x", "id": 7, "raw_raw_id": "y"}
    assert check(PLAIN | taken).columns == {"raw_id": "x", "raw_raw_raw_id": "7", "raw_raw_id": "y"}


# --- all records together --------------------------------------------------------------------


def test_duplicates_and_contradictions_match_pairwise_comparison() -> None:
    generator = np.random.default_rng(0)
    records = [
        (f"p{generator.integers(3)}", f"a{answers[0]}", f"a{answers[1]}")
        for answers in (generator.choice(4, 2, replace=False) for _ in range(40))
    ]
    prompt, one, other = np.array([[*map(hash64, record)] for record in records], np.uint64).T
    found = combined(prompt, one, other)
    answers = combined(prompt, np.minimum(one, other), np.maximum(one, other))
    assert duplicates(found).tolist() == [r in records[:i] for i, r in enumerate(records)]
    assert contradictions(found, answers).tolist() == [
        (prompt, rejected, chosen) in records for prompt, chosen, rejected in records
    ]


@pytest.mark.parametrize("seed", range(5))
def test_answers_are_numbered_in_order_of_appearance(seed: int) -> None:
    generator = np.random.default_rng(seed)
    prompts = generator.integers(0, 6, 50).astype(np.uint64)
    answers = generator.integers(0, 7, (50, 2)).astype(np.uint64)
    known: dict[int, list[int]] = {}
    expected = []
    for prompt, both in zip(prompts.tolist(), answers.tolist(), strict=True):
        of_prompt = known.setdefault(prompt, [])
        of_prompt += [answer for answer in dict.fromkeys(both) if answer not in of_prompt]
        expected.append([of_prompt.index(answer) for answer in both])
    numbers = number_answers(prompts, answers)
    assert numbers.tolist() == expected
    first = first_places(prompts, numbers)
    found = list(zip(prompts[first // 2], answers.ravel()[first], strict=True))
    assert found == [(prompt, answer) for prompt, listed in known.items() for answer in listed]
    assert first.tolist() == [
        next(
            place
            for place, answer in enumerate(answers.ravel())
            if (prompts[place // 2], answer) == each
        )
        for each in found
    ]


def test_combined_hashes_differ_if_any_hash_differs() -> None:
    generator = np.random.default_rng(0)
    triples = np.array([*itertools.product(range(12), repeat=3)], np.uint64)
    for columns in (triples, triples << np.uint64(60), generator.permutation(triples)):
        assert len(set(combined(*columns.T).tolist())) == len(triples)


def test_families_match_a_search_for_the_shortest_prefix() -> None:
    """A prompt belongs to the family of the shortest prompt that is a prefix of it."""
    generator = np.random.default_rng(1)
    prompts: list[Messages] = [
        tuple(("user", str(turn)) for turn in generator.integers(0, 2, generator.integers(1, 5)))
        for _ in range(60)
    ]
    owner, begun = zip(
        *((row, each) for row, prompt in enumerate(prompts) for each in beginnings(prompt)),
        strict=True,
    )
    own = np.array([hash64([prompt]) for prompt in prompts], np.uint64)
    found = Prompts(own, np.array(owner), np.array(begun, np.uint64))
    shortest = [
        min((other for other in prompts if prompt[: len(other)] == other), key=len)
        for prompt in prompts
    ]
    assert found.families.tolist() == [hash64([prompt]) for prompt in shortest]
    some = np.arange(60) % 3 == 0
    others = [prompt for prompt, is_one in zip(prompts, some, strict=True) if not is_one]
    assert found.take(some).shared_with(found.take(~some)).tolist() == [
        any(prompt[: len(other)] == other or other[: len(prompt)] == prompt for other in others)
        for prompt, is_one in zip(prompts, some, strict=True)
        if is_one
    ]


@pytest.mark.parametrize(
    ("first", "more"),
    [
        ("\n\nHuman: Hi.\n\nAssistant:", " Hello!\n\nHuman: Why?\n\nAssistant:"),
        ("\n\nHuman: Hi.", "\n\nAssistant: Hello!\n\nHuman: Why?"),
        ("Hi.", "\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nWhy?"),
        ("Hi.", " \n"),
        (
            "<extra_id_1>User\nHi.\n<extra_id_1>Assistant\n",
            "Hello!\n<extra_id_1>User\nWhy?\n<extra_id_1>Assistant\n",
        ),
    ],
)
def test_text_in_turns_continues_its_earlier_prompts(first: str, more: str) -> None:
    own, earlier = ((("system", "Be brief."), ("user", text)) for text in (first + more, first))
    found = beginnings(own)
    assert found[0] == hash64([own[:1]])
    assert hash64([earlier]) in found
    assert hash64([own]) not in found


def test_votes_match_a_count_of_every_group() -> None:
    generator = np.random.default_rng(2)
    answers, columns = (generator.integers(0, most, 300) for most in (60, 3))
    first = generator.choice([0, 0.25, 0.5, 1], 300, p=[0.4, 0.1, 0.1, 0.4])
    weight, margin = generator.choice([1, 2], 300), generator.choice([0, 3], 300)
    verdicts = combined(answers.astype(np.uint64), (first * 4).astype(np.uint64))
    ballots = Ballots(answers.astype(np.uint64), verdicts, first, weight * 1.0, margin * 1.0)
    found = count_votes(ballots, columns.astype(np.uint64))
    results = dict(zip(found.rows.tolist(), zip(*found[3:], strict=True), strict=True))
    for group in range(60):
        rows = np.flatnonzero(answers == group)
        if len(set(columns[rows])) < 2:
            assert not (found.cast[rows] | found.merged[rows]).any()
            continue
        assert found.cast[rows].all()
        ballots_cast: dict[tuple[float, int], int] = {}
        for row in rows:
            ballots_cast.setdefault((first[row], columns[row]), int(row))
        votes = [*ballots_cast.values()]
        total = sum(weight[votes])
        share = sum(weight[votes] * first[votes]) / total
        [kept] = [row for row in rows if not found.merged[row]]
        agree = [row for row in rows if (first[row] - 0.5) * (share - 0.5) > 0]
        assert kept == (rows[0] if share == 0.5 else agree[0])
        preference, mean, agreed = results.pop(kept)
        assert preference == pytest.approx(max(share, 1 - share))
        assert mean == pytest.approx(total / len(votes))
        is_sure = preference == 1
        expected = sum(weight[votes] * margin[votes]) / total if is_sure else 0
        assert agreed == pytest.approx(expected)
    assert not results
    none = Ballots(*np.zeros((2, 0), dtype=np.uint64), *np.zeros((3, 0)))
    assert not len(count_votes(none, none.answers).cast)


@pytest.mark.parametrize("known", [[], [3], [2**64 - 1, 0, 5, 5]])
def test_among_finds_members(known: list[int]) -> None:
    values = [0, 5, 3, 5, 2**64 - 1, 7]
    found = among(np.array(values, np.uint64), np.array(known, np.uint64))
    assert found.tolist() == [value in known for value in values]


def test_empty_input_has_no_duplicates_or_contradictions() -> None:
    none = np.array([], dtype=np.uint64)
    assert not len(duplicates(none))
    assert not len(contradictions(none, none))


def prompts(count: int, start: int = 0) -> Hashes:
    numbers = range(start, start + count)
    return np.array([hash64(f"prompt {number}") for number in numbers], dtype=np.uint64)


def test_records_of_a_prompt_are_never_in_two_splits() -> None:
    unique = prompts(50)
    repeated = np.concatenate([unique, unique[::-1], unique])
    parts = split(repeated, 0.2, 0.2, 0)
    for prompt in unique:
        assert len(set(parts[repeated == prompt].tolist())) == 1


def test_split_has_the_requested_fractions() -> None:
    assert np.bincount(split(prompts(100), 0.1, 0.2, 0)).tolist() == [70, 10, 20]
    assert np.bincount(split(prompts(3), 0.01, 0.01, 0)).tolist() == [1, 1, 1]
    assert np.bincount(split(prompts(100), 0.1, 0, 0)).tolist() == [90, 10]


def test_split_does_not_depend_on_the_order_of_records() -> None:
    found = prompts(60)
    order = np.random.default_rng(0).permutation(60)
    assert (split(found[order], 0.2, 0.2, 0) == split(found, 0.2, 0.2, 0)[order]).all()


def test_split_depends_on_the_seed() -> None:
    found = prompts(60)
    assert (split(found, 0.2, 0.2, 0) != split(found, 0.2, 0.2, 1)).any()


def test_added_records_keep_the_order_of_the_others() -> None:
    """Growth can move prompts across the borders between splits, but never past each other."""
    before, added = prompts(60), prompts(60, start=60)
    old = split(before, 0.2, 0.2, 0)
    new = split(np.concatenate([before, added]), 0.2, 0.2, 0)[:60]
    order = {2: 0, 1: 1, 0: 2}
    for i in range(60):
        for j in range(60):
            if order[int(old[i])] < order[int(old[j])]:
                assert order[int(new[i])] <= order[int(new[j])]
