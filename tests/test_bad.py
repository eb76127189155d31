"""Bad input gets a one-sentence message and exit status 1, and writes nothing; odd input is read.

In tests/bad, data has one bad file per case, params.yaml has bad values for every parameter, and
forms.yaml has records of unknown forms. The cases pin the place of a fault, the words of the reason
and the value found; messages.txt has the complete messages. After changing any wording, regenerate
it and read the diff:

    ACCEPT=1 python -m pytest tests/test_bad.py
"""

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from reward.data.reading import read
from reward.data.recognition import recognize
from reward.data.records import check
from reward.process import Fault, run
from stages import evaluate, export, fetch, preprocess, train
from tests.support import ROOT

BAD = Path(__file__).parent / "bad"
MESSAGES = BAD / "messages.txt"
HOW = "if the new wording is right: ACCEPT=1 python -m pytest tests/test_bad.py"
SetParams = Callable[..., None]
FILES: dict[str, list[str]] = YAML(typ="safe").load(BAD / "data.yaml")
VALUES: dict[str, dict[str, list[Any]]] = YAML(typ="safe").load(BAD / "params.yaml")
FORMS: dict[str, dict[str, Any]] = YAML(typ="safe").load(BAD / "forms.yaml")
PARAMS: dict[str, dict[str, Any]] = YAML(typ="safe").load(ROOT / "params.yaml")
BLANKS = "," + " " * 200_000
KEYS = [f"{group}.{key}" for group, keys in PARAMS.items() for key in keys]
READERS = {
    "base": fetch.main,
    "preprocess": preprocess.main,
    "quantization": train.main,
    "lora": train.main,
    "train": train.main,
    "evaluate": evaluate.main,
    "export": export.main,
}


@pytest.fixture
def message_of(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[], None]], str]:
    """Run a stage that must exit with status 1 and change nothing; return its message."""

    def run_it(main: Callable[[], None]) -> str:
        before = sorted(workspace.rglob("*"))
        with pytest.raises(SystemExit) as caught:
            run(main)
        assert caught.value.code == 1
        assert sorted(workspace.rglob("*")) == before
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err.rstrip("\n")

    return run_it


# --- complete messages -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def check_message() -> Iterator[Callable[[str, str], None]]:
    """Compare the message of a case with messages.txt, or accept it."""
    head, *sections = MESSAGES.read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    messages = {case: message for case, _, message in (each.partition("\n") for each in sections)}
    accept = bool(os.environ.get("ACCEPT"))
    assert accept or list(messages) == CASES, HOW

    def compare(case: str, message: str) -> None:
        message = "\n".join(f"  {line}" for line in without_library_words(message).split("\n"))
        if accept:
            messages[case] = message
        assert messages[case] == message, HOW

    yield compare
    if accept:
        kept = [f"{case}\n{messages[case]}" for case in CASES if case in messages]
        MESSAGES.write_text("\n\n".join([head, *kept]) + "\n", encoding="utf-8")


def without_library_words(message: str) -> str:
    """The message with an ellipsis for the words of Python and libraries, which change."""
    return re.sub(r"(broken \w+|to the end): ([A-Z]|while ).+?(, found|; |$)", r"\1: …\3", message)


# --- preference files ------------------------------------------------------------------------


def test_every_bad_file_has_a_message() -> None:
    assert {path.name for path in (BAD / "data").iterdir()} == FILES.keys()
    assert len(FILES) >= 80


@pytest.mark.parametrize("name", FILES)
def test_bad_file_is_reported(
    name: str,
    set_params: SetParams,
    message_of: Callable[..., str],
    check_message: Callable[..., None],
) -> None:
    path = Path("data/raw") / name
    path.parent.mkdir(parents=True)
    shutil.copy(BAD / "data" / name, path)
    set_params("preprocess", data=str(path))
    found = message_of(preprocess.main)
    assert found.startswith(str(path))
    assert [word for word in FILES[name] if word not in found] == []
    check_message(f"data/{name}", found)


def test_there_are_many_unknown_forms() -> None:
    assert len(FORMS) >= 25


@pytest.mark.parametrize("name", FORMS)
def test_unknown_form_is_reported_with_the_entry_to_write(
    name: str, check_message: Callable[..., None]
) -> None:
    with pytest.raises(Fault) as caught:
        recognize(Path("data/mine/x.jsonl"), [FORMS[name]["record"]])
    found = str(caught.value)
    assert found.startswith("data/mine/x.jsonl: ")
    assert [word for word in FORMS[name]["words"] if word not in found] == []
    assert found.endswith(FORMS[name].get("entry", ""))
    assert ("dataset.yaml" in found) == ("entry" in FORMS[name])
    check_message(f"forms/{name}", found)


def test_record_of_another_type_after_25_mb_is_found(
    workspace: Path, set_params: SetParams, message_of: Callable[..., str]
) -> None:
    """Readers that infer types from the start of a file fail here without naming a line."""
    path = workspace / "data" / "pairs.jsonl"
    # The filler is whitespace between values, because tokenizing text would take most of the time.
    lines = [
        json.dumps({"prompt": f"a{n}", "chosen": "b", "rejected": "c"}, separators=(BLANKS, ": "))
        for n in range(65)
    ]
    bad = json.dumps({"prompt": "a", "chosen": ["b"], "rejected": {"c": 1}})
    path.write_text("\n".join([*lines, bad]) + "\n")
    assert path.stat().st_size > 25_000_000
    set_params("preprocess", data=str(path))
    assert f"{path}: line 66: wrong_type: " in message_of(preprocess.main)


# --- parameters ------------------------------------------------------------------------------


def test_every_key_has_bad_values() -> None:
    assert list(VALUES) == KEYS
    assert all(sum(map(len, words.values())) >= 2 for words in VALUES.values())


@pytest.mark.parametrize("key", KEYS)
def test_bad_values_are_reported(
    key: str,
    set_params: SetParams,
    message_of: Callable[..., str],
    check_message: Callable[..., None],
) -> None:
    group, _, name = key.partition(".")
    lines = []
    for word, values in VALUES[key].items():
        for value in values:
            set_params(group, **{name: value})
            found = message_of(READERS[group])
            assert found.startswith((f"params.yaml: {key} ", f"{value} ", f"{value}: ")), found
            in_file = {"None": "null", "True": "true", "False": "false"}
            assert in_file.get(str(value), str(value)) in found
            assert word in found
            lines.append(found)
    check_message(f"params/{key}", "\n".join(lines))


@pytest.mark.parametrize("key", KEYS)
def test_missing_and_misspelt_keys_are_named(
    key: str, workspace: Path, message_of: Callable[..., str]
) -> None:
    yaml, path = YAML(), workspace / "params.yaml"
    content = yaml.load(path)
    group, _, name = key.partition(".")
    content[group][f"{name}x"] = content[group].pop(name)
    yaml.dump(content, path)
    missing, unknown = sorted(message_of(READERS[group]).splitlines())
    assert missing.startswith(f"params.yaml: {key} is missing, must be ")
    assert unknown.startswith(f"params.yaml: {key}x is unknown, expected one of ")


@pytest.mark.parametrize("group", PARAMS)
def test_group_that_is_not_a_mapping_is_named(
    group: str, workspace: Path, message_of: Callable[..., str]
) -> None:
    yaml, path = YAML(), workspace / "params.yaml"
    content = yaml.load(path)
    for value in (None, 3, "r: 4", ["r", 4]):
        content[group] = value
        yaml.dump(content, path)
        found = message_of(READERS[group])
        assert found.startswith(f"params.yaml: the group {group} is ")
        assert found.endswith(", must be a mapping of keys to values")


BROKEN: dict[str, tuple[bytes | None, str]] = {
    "a truncated list": (b"train: [1, 2", "broken YAML"),
    "a tab": (b"train:\n\tr: 4\n", "broken YAML"),
    "a duplicate key": (b"base: {}\nbase: {}\n", "duplicate key"),
    "an undefined alias": (b"base: &a [*a]\nbase2: *b\n", "undefined alias"),
    "not UTF-8": (b"\xff\xfe\xfd", "broken YAML"),
    "a null byte": (b"base: \x00\n", "broken YAML"),
    "an empty file": (b"", "the group base is null"),
    "a list": (b"- base\n", "the group base is null"),
    "a Python call": (b"base: !!python/object/apply:os.system [ls]\n", "broken YAML"),
    "a missing file": (None, "does not exist"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_params_file_is_reported(
    name: str, workspace: Path, message_of: Callable[..., str], check_message: Callable[..., None]
) -> None:
    path = workspace / "params.yaml"
    content, word = BROKEN[name]
    path.unlink() if content is None else path.write_bytes(content)
    found = message_of(fetch.main)
    assert found.startswith("params.yaml")
    assert word in found
    assert "\n" not in found
    check_message(f"params.yaml/{name}", found.replace(str(workspace), "…"))


CASES = sorted(
    [
        *(f"data/{name}" for name in FILES),
        *(f"forms/{name}" for name in FORMS),
        *(f"params/{key}" for key in VALUES),
        *(f"params.yaml/{name}" for name in BROKEN),
    ]
)


# --- odd but valid ---------------------------------------------------------------------------

ODD: dict[str, str] = {
    "emoji": "👩‍👩‍👧 says 🇪🇺 and 👍🏽",
    "right to left": "שלום, \u202eabc\u202c مرحبا",
    "combining": "e\u0301 and \u0300 alone",
    "control": "a\u0000b\u0007\u001b[31m",
    "separators": "one\u2028two\u2029three\u0085four\x0bfive",
    "BOM inside": "\ufeffa\ufeff",
    "JSON in a text": '{"prompt": "x"}, ["y"]\\n',
    "HTML": "<script>alert(1)</script> &amp;",
    "templates": "{prompt} {answer} {{ messages }} {% raw %}",
    "special tokens": "<|endoftext|><|im_start|>system</s>",
    "a million characters": "ab 中 " * 200_000,
    "last plane": "\U0010ffff\U00020000",
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz"])
def test_odd_text_is_read_unchanged(tmp_path: Path, name: str, escaped: bool, suffix: str) -> None:
    record = {
        "prompt": ODD[name],
        "chosen": f"yes {ODD[name]}",
        "rejected": "no",
        "kind": ODD[name],
    }
    content = json.dumps([record] if suffix == ".json" else record, ensure_ascii=escaped).encode()
    path = tmp_path / f"odd{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    [(position, found)] = read(path)
    assert (position, found) == (1, record)
    pair = check(found)
    assert (pair.prompt[0][1], pair.answers[0][0][1]) == (record["prompt"], record["chosen"])
    assert pair.columns == {"kind": ODD[name]}


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n\r\n \t\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_line_endings_blank_lines_and_bom_change_nothing(
    tmp_path: Path, end: bytes, mark: bytes, last: bool
) -> None:
    records = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    lines = [json.dumps(record).encode() for record in records]
    path = tmp_path / "odd.jsonl"
    path.write_bytes(mark + end.join(lines) + (end if last else b""))
    assert [record for _, record in read(path)] == records


def test_odd_texts_pass_through_preprocess(set_params: SetParams) -> None:
    records = [
        {"prompt": f"{index} {text}", "chosen": f"good {index}", "rejected": f"bad {index}"}
        for index, text in enumerate(ODD.values())
    ]
    Path("odd.json").write_text(json.dumps(records))
    set_params("preprocess", data="odd.json", over_length="truncate_prompt")
    preprocess.main()
    metrics = json.loads((preprocess.REPORTS / "figures.json").read_text())
    assert sum(metrics["pairs"].values()) == len(ODD)
    assert (metrics["dropped"], metrics["truncated"]) == ({}, 1)
