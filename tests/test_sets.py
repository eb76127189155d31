"""Extra test sets: read like other data, judged with the test split, with leaks reported."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from datasets import load_from_disk
from tokenizers import Tokenizer

from reward.data.reading import other_names
from reward.data.records import check
from reward.data.sets import read_sets
from reward.data.tokens import Encoder, Template, as_array
from reward.model.packing import Texts
from reward.outputs import read_json, write_json
from reward.process import Fault
from stages import evaluate, preprocess
from tests.support import write_pairs

PAIR = {"prompt": "Is it raining?", "chosen": "Yes, take a coat.", "rejected": "No idea."}


def write_set(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def encoder(workspace: Path) -> Callable[[int], Encoder]:
    base = workspace / "models" / "base"
    return lambda max_length: Encoder(base, Template.of("en", True, max_length, base))


def test_ids_match_the_splits_of_preprocess(
    workspace: Path,
) -> None:
    data = write_pairs(workspace / "data" / "raw" / "pairs.json", 40)
    preprocess.main()
    (workspace / "data" / "sets" / "same.json").write_text(data.read_text(), encoding="utf-8")
    preprocess.main()
    found = load_from_disk("data/tokenized/sets/same")
    columns = ["id", "prompt_id", "input_ids_j", "input_ids_k", "prefix_length", "kind"]
    expected = {}
    for split in ("train", "validation", "test"):
        for row in load_from_disk(f"data/tokenized/{split}"):
            expected[row["id"]] = {name: row[name] for name in columns}
    assert {row["id"]: {name: row[name] for name in columns} for row in found} == expected
    leaked = len(expected) - len(load_from_disk("data/tokenized/test"))
    assert read_json(Path("data/tokenized/sets/index.json")) == {
        "same": {"bad": 0, "leaked": leaked, "too_long": 0}
    }


def test_pairs_that_are_too_long_are_left_out_and_counted(
    encoder: Callable[[int], Encoder],
) -> None:
    long_prompt = PAIR | {"prompt": "Is it raining? " * 60}
    long_answer = PAIR | {"chosen": "Yes, take a coat. " * 60}
    write_set(Path("data/sets/long.jsonl"), PAIR, long_prompt, long_answer)
    [found] = read_sets(Path("data/sets"), encoder(100), drop=False)
    assert (len(found.rows), found.too_long, found.bad) == (1, 2, 0)


def test_text_with_a_token_that_the_base_lacks_is_a_bad_record(
    workspace: Path, encoder: Callable[[int], Encoder]
) -> None:
    write_set(Path("data/sets/odd.jsonl"), PAIR, PAIR | {"rejected": "<|im_end|>"})
    assert len(read_sets(Path("data/sets"), encoder(100), drop=False)[0].rows) == 2
    path = workspace / "models" / "base" / "config.json"
    number = Tokenizer.from_file(str(path.with_name("tokenizer.json"))).token_to_id("<|im_end|>")
    write_json(path, read_json(path) | {"vocab_size": number})
    message = f"line 2: unknown_id: has the token '<|im_end|>' with the id {number}, but the base"
    with pytest.raises(Fault, match=re.escape(message)):
        read_sets(Path("data/sets"), encoder(100), drop=False)
    [found] = read_sets(Path("data/sets"), encoder(100), drop=True)
    assert (len(found.rows), found.bad) == (1, 1)


def test_answers_with_the_same_ids_are_a_bad_record(encoder: Callable[[int], Encoder]) -> None:
    write_set(Path("data/sets/alike.jsonl"), PAIR)
    found = encoder(100)
    found.encode_arrays = lambda texts: [as_array([1, 2])] * len(texts)  # type: ignore[method-assign]
    with pytest.raises(Fault, match="line 1: identical_tokens: both answers have the same ids"):
        read_sets(Path("data/sets"), found, drop=False)


def test_each_set_is_read_in_its_own_form_with_ties(
    encoder: Callable[[int], Encoder],
) -> None:
    judged: list[dict[str, Any]] = [
        {"prompt": "Is it raining?", "output_1": "No idea.", "output_2": "Yes.", "preference": 2},
        {"prompt": "Is it cold?", "response": ["Yes.", "No."]},
    ]
    write_set(Path("data/sets/farm.jsonl"), judged[0])
    listed = {"prompt": "Is it late?", "responses": ["Yes.", "No.", "Why?"], "ranks": [1, 2, 2]}
    write_set(Path("data/sets/ranked.jsonl"), listed)
    farm, ranked = read_sets(Path("data/sets"), encoder(100), drop=False)
    assert (len(farm.rows), farm.ledger.grade_of("preference").tolist()) == (1, [1])
    assert (len(ranked.rows), ranked.ledger.grade_of("preference").tolist()) == (1, [1, 1, 0.5])
    write_set(Path("data/sets/farm.jsonl"), judged[1])
    with pytest.raises(Fault, match="the columns prompt, response match no known format"):
        read_sets(Path("data/sets"), encoder(100), drop=False)


@pytest.mark.parametrize("name", ["README.md", ".gitkeep"])
def test_folder_without_preference_files_has_no_sets(
    name: str, encoder: Callable[[int], Encoder]
) -> None:
    Path("data/sets", name).write_text("Sets.\n", encoding="utf-8")
    assert read_sets(Path("data/sets"), encoder(100), drop=False) == []
    assert other_names(Path("data/sets")) == []


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([PAIR, {"prompt": "a", "chosen": "b"}], "line 2: missing_key: 'rejected' is missing"),
        (
            [PAIR | {"chosen": "far too long " * 200}],
            "no pairs left to evaluate: 1 too long, 0 bad",
        ),
    ],
)
def test_set_that_cannot_be_judged_is_reported(
    records: list[dict[str, Any]], message: str, encoder: Callable[[int], Encoder]
) -> None:
    write_set(Path("data/sets/bad.jsonl"), *records)
    with pytest.raises(Fault, match=message):
        read_sets(Path("data/sets"), encoder(100), drop=False)


def test_bad_records_are_counted_if_dropped(
    encoder: Callable[[int], Encoder],
) -> None:
    write_set(Path("data/sets/some.jsonl"), PAIR, PAIR | {"chosen": " "}, {"prompt": "a"})
    [found] = read_sets(Path("data/sets"), encoder(100), drop=True)
    assert (len(found.rows), found.bad) == (1, 2)
    Path("data/sets/dataset.yaml").write_text("other.jsonl: {take: 1}\n")
    with pytest.raises(Fault, match=r"other\.jsonl matches none of the files "):
        read_sets(Path("data/sets"), encoder(100), drop=True)


@pytest.mark.usefixtures("workspace")
def test_two_files_for_one_set_are_reported(encoder: Callable[[int], Encoder]) -> None:
    write_set(Path("data/sets/same.jsonl"), PAIR)
    write_set(Path("data/sets/same.json"), PAIR)
    with pytest.raises(Fault, match="data/sets has two files for the set same, expected one"):
        read_sets(Path("data/sets"), encoder(100), drop=False)


@pytest.mark.usefixtures("workspace")
def test_name_that_is_not_utf_8_is_refused(encoder: Callable[[int], Encoder]) -> None:
    write_set(Path("data/sets", os.fsdecode(b"caf\xe9.jsonl")), PAIR)
    with pytest.raises(Fault, match=r"^the path data/sets/caf\\xe9.jsonl is not UTF-8, expected"):
        read_sets(Path("data/sets"), encoder(100), drop=False)


@pytest.mark.parametrize("name", ["test split", "index.json", "scratch.arrow"])
def test_name_with_a_meaning_of_its_own_is_refused(
    encoder: Callable[[int], Encoder], name: str
) -> None:
    write_set(Path(f"data/sets/{name}.jsonl"), PAIR)
    with pytest.raises(Fault, match=f"data/sets has a set named '{name}', which means"):
        read_sets(Path("data/sets"), encoder(100), drop=False)


@pytest.mark.usefixtures("workspace")
def test_metadata_of_a_data_set_is_no_set(encoder: Callable[[int], Encoder]) -> None:
    write_set(Path("data/sets/own.jsonl"), PAIR)
    write_json(Path("data/sets/dataset_info.json"), {"splits": ["test"]})
    assert [each.name for each in read_sets(Path("data/sets"), encoder(100), drop=False)] == ["own"]


@pytest.mark.usefixtures("workspace")
def test_folder_is_no_set_whatever_its_name_is(encoder: Callable[[int], Encoder]) -> None:
    Path("data/sets/parts.parquet").mkdir()
    assert read_sets(Path("data/sets"), encoder(100), drop=False) == []
    assert other_names(Path("data/sets")) == ["parts.parquet/"]


def test_missing_folder_is_reported(encoder: Callable[[int], Encoder]) -> None:
    with pytest.raises(
        Fault, match=r"preprocess.sets nowhere cannot be read: .*; expected a folder"
    ):
        read_sets(Path("nowhere"), encoder(100), drop=False)


def test_sets_are_judged_as_slices_and_leaks_are_counted(
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model is replaced: the first answer always wins, except in the set named wrong."""
    write_pairs(workspace / "data" / "raw" / "pairs.json", 100)
    preprocess.main()
    evaluate.ADAPTER.mkdir()
    template = Path("data/tokenized/template.json").read_text(encoding="utf-8")
    (evaluate.ADAPTER / "template.json").write_text(template, encoding="utf-8")
    known = next(iter(load_from_disk("data/tokenized/train")))["prompt_id"]
    records = json.loads((workspace / "data" / "raw" / "pairs.json").read_text())
    prompts = {check(record).prompt_id: record["prompt"] for record in records}
    write_set(Path("data/sets/right.jsonl"), PAIR, PAIR | {"prompt": prompts[known]})
    write_set(
        Path("data/sets/wrong.jsonl"),
        PAIR | {"prompt": "Snow?", "depth": "deep"},
        PAIR | {"chosen": "Far too long. " * 2000},
    )

    def score(_: None, prompts: list[Texts], __: int) -> torch.Tensor:
        pairs = sum(len(prompt.ids) for prompt in prompts) // 2
        return torch.tensor([0.0, 1.0] if pairs == 1 else [1.0, 0.0] * pairs)

    preprocess.main()
    monkeypatch.setattr(evaluate, "load", lambda *_: None)
    monkeypatch.setattr(evaluate, "require_exact", lambda *_: None)
    monkeypatch.setattr(evaluate, "score", score)
    evaluate.main()
    metrics = read_json(evaluate.REPORTS / "figures.json")
    assert metrics["accuracy"] == 1
    right, wrong = metrics["sets"]["right"], metrics["sets"]["wrong"]
    assert (right["accuracy"], right["pairs"], right["leaked"]) == (1, 2, 1)
    assert (wrong["accuracy"], wrong["pairs"], wrong["leaked"]) == (0, 1, 0)
    assert wrong["too_long"] == 1
    assert wrong["by"] == {
        "depth": {"deep": {"accuracy": 0, "low": 0, "high": 1, "pairs": 1, "prompts": 1}}
    }
    printed = capsys.readouterr().out
    leaked = "the prompts of 1 of its 2 pairs are also in the training or validation split"
    assert f"right: {leaked}" in printed
    assert "left out of wrong as too long: 1 pair" in printed
    assert "of right are too long" not in printed
    assert read_json(evaluate.METRICS)["sets/right"] == 1
    assert read_json(evaluate.METRICS)["sets/wrong"] == 0
    slices = json.loads((evaluate.REPORTS / "slices.json").read_text())
    assert [row["slice"] for row in slices[-2:]] == ["test set: right", "test set: wrong"]
    rewards = pyarrow.parquet.read_table(evaluate.REPORTS / "sets" / "wrong.parquet")
    assert rewards.to_pylist()[0]["margin"] == -1
    assert rewards.to_pylist()[0]["depth"] == "deep"
    shown = (evaluate.REPORTS / "index.html").read_text(encoding="utf-8")
    assert (
        '"test set": ["test split", "right", "wrong"], "kind": ["rude", "short"], "depth": ["deep"]'
        in (shown)
    )
    assert '"summary": "23 test pairs"' in shown
