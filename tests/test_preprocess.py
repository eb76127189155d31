"""The preprocess stage: what it writes, what it counts, and when it stops."""

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from datasets import load_from_disk
from tokenizers import Tokenizer

from benchmarks import preprocess as benchmark
from reward.data import tokenized
from reward.data.prefixes import TokenIds
from reward.data.records import check
from reward.data.rows import as_json
from reward.data.tokens import Encoder, Template
from reward.judging.page import readable
from reward.outputs import digests, read_json
from reward.process import Fault
from stages import preprocess
from tests.support import ROOT, write_pairs

SetParams = Callable[..., None]
COLUMNS = ["id", "prompt_id", "answer_j", "answer_k", "input_ids_j", "attention_mask_j"]
COLUMNS += ["input_ids_k", "attention_mask_k", "prefix_length", "preference", "weight", "margin"]


@pytest.fixture
def data(workspace: Path) -> Path:
    """The file that params.yaml names, with 40 pairs over 20 prompts."""
    return write_pairs(workspace / "data" / "raw" / "pairs.json")


def records(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def rewrite(path: Path, content: list[Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def run() -> dict[str, Any]:
    preprocess.main()
    figures: dict[str, Any] = read_json(preprocess.REPORTS / "figures.json")
    pairs, dropped = (sum(figures[name].values()) for name in ("pairs", "dropped"))
    assert read_json(preprocess.METRICS) == {"pairs": pairs, "dropped": dropped}
    return figures


def fault() -> str:
    with pytest.raises(Fault) as caught:
        preprocess.main()
    assert not preprocess.METRICS.exists()
    assert not preprocess.REPORTS.exists()
    assert not list(Path("data").glob("tokenized*"))
    return str(caught.value)


def written() -> dict[str, list[dict[str, Any]]]:
    return {
        name: load_from_disk(str(preprocess.TOKENIZED / name)).to_list()
        for name in preprocess.SPLITS
    }


def pair(index: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"question {index}", "chosen": "good", "rejected": "bad"} | changes


# --- output ----------------------------------------------------------------------------------


def test_every_pair_is_written_with_the_ids_of_the_article(data: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(preprocess.BASE)
    run()
    rows = {row["id"]: row for part in written().values() for row in part}
    assert len(rows) == 40
    for record in records(data):
        prompt, chosen, rejected = (record[key] for key in ("prompt", "chosen", "rejected"))
        text = json.dumps([prompt, chosen, rejected], ensure_ascii=False, separators=(",", ":"))
        row = rows[hashlib.sha256(text.encode()).hexdigest()[:16]]
        for side, answer in (("j", chosen), ("k", rejected)):
            article = tokenizer("问:" + prompt + "\n\n答:" + answer, truncation=True)
            assert row[f"input_ids_{side}"] == article["input_ids"]
            assert row[f"attention_mask_{side}"] == article["attention_mask"]
        left, right, prefix = row["input_ids_j"], row["input_ids_k"], row["prefix_length"]
        assert left[:prefix] == right[:prefix]
        assert left[prefix] != right[prefix] or prefix == min(len(left), len(right)) - 1
        assert row["kind"] == record["kind"]


@pytest.mark.usefixtures("data")
def test_outputs_are_three_datasets_a_template_and_metrics() -> None:
    run()
    files = sorted(str(path.relative_to("data")) for path in Path("data").rglob("*.*"))
    assert files == sorted(
        [
            *("raw/pairs.json", "tokenized/licenses.json", "tokenized/sets/index.json"),
            "tokenized/template.json",
            *(
                f"tokenized/{name}/{file}"
                for name in (*preprocess.SPLITS, "test/answers")
                for file in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")
            ),
        ]
    )
    for name, part in written().items():
        assert list(part[0]) == [*COLUMNS, "kind"], name
    template = Template.load(preprocess.TOKENIZED / "template.json")
    assert template == Template.of("zh", False, 2040, preprocess.BASE)


@pytest.mark.usefixtures("data")
def test_second_run_writes_the_same_bytes() -> None:
    run()
    first = digests(Path("data")), digests(Path("metrics"))
    run()
    assert (digests(Path("data")), digests(Path("metrics"))) == first


@pytest.mark.usefixtures("data")
def test_metrics_match_what_was_written() -> None:
    metrics, parts = run(), written()
    assert metrics["pairs"] == {name: len(rows) for name, rows in parts.items()}
    assert metrics["prompts"] == {"train": 14, "validation": 2, "test": 4}
    rows = [row for part in parts.values() for row in part]
    lengths = sorted(len(row[f"input_ids_{side}"]) for row in rows for side in "jk")
    assert metrics["tokens"] == sum(lengths)
    assert metrics["length"]["max"] == lengths[-1]
    assert metrics["length"]["q50"] in lengths[39:41]
    shared = 2 * sum(row["prefix_length"] for row in rows) / sum(lengths)
    assert metrics["shared_prefix_share"] == pytest.approx(shared, abs=1e-4)
    assert metrics["dropped"] == {}
    assert metrics["truncated"] == 0


def test_columns_of_some_records_are_null_in_the_others(data: Path) -> None:
    rewrite(data, [pair(0, source="web", id="7"), *map(pair, range(1, 20))])
    run()
    rows = [row for part in written().values() for row in part]
    assert sorted((row["source"] or "", row["raw_id"] or "") for row in rows)[-2:] == [
        ("", ""),
        ("web", "7"),
    ]


@pytest.mark.usefixtures("data")
def test_rows_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    whole = written()
    monkeypatch.setattr(preprocess, "BATCH_CHARACTERS", 200)
    run()
    assert written() == whole


def test_split_of_a_prompt_does_not_depend_on_the_order_of_records(data: Path) -> None:
    def split_of() -> dict[str, str]:
        return {row["id"]: name for name, rows in written().items() for row in rows}

    run()
    first, found = split_of(), records(data)
    rewrite(data, found[::-1])
    run()
    assert split_of() == first


@pytest.mark.usefixtures("data")
def test_prompts_of_the_test_split_depend_on_the_seed(set_params: SetParams) -> None:
    found = []
    for seed in (0, 1):
        set_params("preprocess", seed=seed)
        run()
        found.append({row["prompt_id"] for row in written()["test"]})
    assert found[0] != found[1]


@pytest.mark.usefixtures("data")
def test_chat_template_and_date_are_those_of_params(set_params: SetParams) -> None:
    own = "Mine, {{ strftime_now('%Y-%m-%d') }}:{% for each in messages %} {{ each.content }}"
    Path("own.jinja").write_text(own + "{% endfor %}")
    set_params("preprocess", template="chat", chat_template="own.jinja", date="2031-12-25")
    run()
    texts = load_from_disk(str(preprocess.TOKENIZED / "test" / "answers"))["text"]
    assert all(each.startswith("Mine, 2031-12-25: Name a word") for each in texts)


def test_folder_with_every_format_is_one_data_set(
    data: Path, workspace: Path, set_params: SetParams
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found, folder = records(data), workspace / "mixed"
    run()
    whole = {name: sorted(row["id"] for row in rows) for name, rows in written().items()}
    folder.mkdir()
    rewrite(folder / "a.json", found[:10])
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, found[10:20])))
    (folder / "c.json.gz").write_bytes(gzip.compress(json.dumps(found[20:30]).encode()))
    pq.write_table(pa.Table.from_pylist(found[30:]), folder / "d.parquet")
    set_params("preprocess", data="mixed")
    run()
    assert {name: sorted(row["id"] for row in rows) for name, rows in written().items()} == whole


# --- the splits ------------------------------------------------------------------------------


def test_no_prompt_appears_in_two_splits_whatever_its_form(data: Path) -> None:
    as_messages = [
        pair(i, prompt=[{"role": "user", "content": f"question {i}"}], chosen="better")
        for i in range(20)
    ]
    rewrite(data, [*map(pair, range(20)), *as_messages])
    run()
    prompts = [{row["prompt_id"] for row in rows} for rows in written().values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 20


@pytest.mark.parametrize("changes", [{}, {"chosen": "bad", "rejected": "good"}, {"chosen": "fine"}])
def test_training_records_with_a_test_prompt_are_listed_or_left_out(
    data: Path, workspace: Path, set_params: SetParams, changes: dict[str, str]
) -> None:
    rewrite(data, [pair(i) for i in range(20)])
    rewrite(workspace / "data" / "raw" / "test.json", [pair(30), pair(7, **changes)])
    set_params("preprocess", data="data/raw", on_bad_record="stop")
    message = "data/raw: the prompts of 1 record are also in the test files: "
    assert message + "data/raw/pairs.json: record 8; " in fault()
    set_params("preprocess", on_bad_record="drop")
    metrics = run()
    assert metrics["dropped"] == {"in_test_set": 1}
    assert metrics["pairs"] == {"train": 17, "validation": 2, "test": 2}
    assert [row["prompt_id"] for row in written()["test"]] == [
        check(each).prompt_id for each in (pair(30), pair(7))
    ]


def dialogue(index: int, turns: int) -> dict[str, Any]:
    """A pair whose prompt is the first `turns` turns of dialogue `index`."""
    messages = [
        {"role": role, "content": f"{role} {index} {turn}"}
        for turn in range(turns)
        for role in ("user", "assistant")
    ][:-1]
    return pair(index, prompt=messages) | {
        side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")
    }


def in_turns(index: int, turns: int) -> dict[str, Any]:
    """The same pair as `dialogue` as texts in the format of HH."""
    names = {"user": "Human", "assistant": "Assistant"}
    messages = dialogue(index, turns)["prompt"]
    spoken = [f"\n\n{names[each['role']]}: {each['content']}" for each in messages]
    return pair(index, prompt="".join([*spoken, "\n\nAssistant:"]))


@pytest.mark.parametrize("dialogue", [dialogue, in_turns])
def test_continued_dialogues_stay_in_one_split(
    data: Path, set_params: SetParams, dialogue: Callable[[int, int], dict[str, Any]]
) -> None:
    rewrite(data, [dialogue(index, turns) for turns in (3, 1, 2) for index in range(15)])
    set_params("preprocess", template="chat")
    metrics = run()
    assert metrics["largest_family"] == 3
    assert metrics["pairs"] == {"train": 30, "validation": 6, "test": 9}
    prompts = [{row["prompt_id"] for row in rows} for rows in written().values()]
    for index in range(15):
        family = {check(dialogue(index, turns)).prompt_id for turns in (1, 2, 3)}
        assert sum(bool(family & found) for found in prompts) == 1


@pytest.mark.parametrize("name", ["test", "validation"])
def test_dialogues_that_begin_or_continue_one_of_a_split_file_are_listed_or_left_out(
    workspace: Path, set_params: SetParams, name: str
) -> None:
    leaks = [dialogue(20, 1), dialogue(21, 3)]
    held = [dialogue(20, 2), dialogue(21, 2), dialogue(22, 2)]
    others = {"pairs": [*(dialogue(index, 1) for index in range(20)), *leaks], name: held}
    folder_of(workspace, set_params, **others)
    set_params("preprocess", template="chat")
    assert (
        f"mine: the prompts of 2 records are also in the {name} files: mine/pairs.json: record 21; "
        "mine/pairs.json: record 22; "
    ) in fault()
    set_params("preprocess", on_bad_record="drop")
    assert run()["dropped"] == {f"in_{name}_set": 2}
    assert {row["prompt_id"] for row in written()[name]} == {check(each).prompt_id for each in held}


def test_dialogues_of_a_set_that_begin_or_continue_one_of_training_have_leaked(
    workspace: Path, set_params: SetParams
) -> None:
    pairs = [dialogue(index, 2) for index in range(10)]
    folder_of(
        workspace, set_params, pairs=pairs, validation=[dialogue(20, 2)], test=[dialogue(30, 2)]
    )
    turns = {0: (1,), 1: (3,), 20: (1, 3), 30: (1, 3), 40: (2,)}
    extra = [dialogue(index, count) for index, counts in turns.items() for count in counts]
    rewrite(workspace / "data" / "sets" / "extra.json", extra)
    set_params("preprocess", template="chat")
    run()
    index = read_json(preprocess.TOKENIZED / "sets" / "index.json")
    assert index == {"extra": {"bad": 0, "leaked": 4, "too_long": 0}}


def test_prompt_of_both_split_files_stays_in_test(workspace: Path, set_params: SetParams) -> None:
    contents = {"test": [pair(30), pair(31)], "validation": [pair(31, chosen="fine"), pair(32)]}
    folder_of(workspace, set_params, pairs=[*map(pair, range(20)), pair(31)], **contents)
    set_params("preprocess", on_bad_record="drop")
    assert run()["dropped"] == {"in_test_set": 2}
    prompts = {name: {row["prompt_id"] for row in rows} for name, rows in written().items()}
    assert prompts["test"] == {check(pair(index)).prompt_id for index in (30, 31)}
    assert prompts["validation"] == {check(pair(32)).prompt_id}


def vote(index: int, annotator: str, reverse: bool = False) -> dict[str, Any]:
    answers = ("bad", "good") if reverse else ("good", "bad")
    return pair(index, chosen=answers[0], rejected=answers[1], annotator=annotator)


def test_votes_are_merged_into_the_share_of_the_majority(data: Path, set_params: SetParams) -> None:
    votes = [vote(20, name, name in "de") for name in "abcde"]
    lost = [vote(21, name, name in "bcd") for name in "abcd"]
    even = [vote(22, "a"), vote(22, "b", reverse=True)]
    again = [vote(23, "a"), vote(23, "a"), vote(23, "b", reverse=True)]
    rewrite(data, [*map(pair, range(20)), *votes, *lost, *even, *again])
    set_params("preprocess", on_bad_record="stop")
    metrics = run()
    assert metrics["dropped"] == {}
    assert (metrics["votes"], metrics["merged"]) == (14, 10)
    assert (metrics["ties"], metrics["soft"]) == (2, 2)
    rows = {row["prompt_id"]: row for part in written().values() for row in part}
    assert len(rows) == 24
    preferences = [rows[check(vote(20 + n, "a")).prompt_id]["preference"] for n in range(4)]
    assert preferences == [0.6, 0.75, 0.5, 0.5]
    assert rows[check(vote(20, "a")).prompt_id]["id"] == check(vote(20, "a")).ids[0]
    assert rows[check(vote(21, "b", True)).prompt_id]["id"] == check(vote(21, "b", True)).ids[0]


@pytest.mark.parametrize("shares", [(0.7, 0.2, 0.6), (0.2, 0.7, 0.6), (0.6, 0.2, 0.7)])
def test_votes_that_are_even_are_a_tie_in_any_order(data: Path, shares: tuple[float, ...]) -> None:
    """In float64, the shares of these votes differ from 0.5."""
    votes = [vote(20, name) | {"preference": p} for name, p in zip("abc", shares, strict=True)]
    rewrite(data, [*(vote(index, "abc"[index % 3]) for index in range(20)), *votes])
    assert run()["ties"] == 1
    preferences = [row["preference"] for part in written().values() for row in part]
    assert sorted(preferences)[:2] == [0.5, 1]


def test_votes_with_an_empty_column_are_votes_on_the_same_pair(data: Path) -> None:
    votes = [vote(index, name, name in "ab") for index in (21, 20) for name in "abcde"]
    for each in votes[7:]:
        each["comment"] = "hm"
    rewrite(data, [*map(pair, range(20)), *votes])
    assert run()["merged"] == 8


def test_dataset_yml_is_a_fault(workspace: Path, set_params: SetParams) -> None:
    folder = folder_of(workspace, set_params, pairs=[*map(pair, range(20))])
    (folder / "dataset.yml").write_text("pairs.json: {seed: 1}\n")
    assert "mine/dataset.yml is not read; rename it to dataset.yaml" in fault()


def test_records_that_differ_in_no_other_column_are_not_votes(data: Path) -> None:
    rewrite(data, [*map(pair, range(20)), pair(3), pair(4, chosen="bad", rejected="good")])
    assert "bad records: 2 contradiction, 1 duplicate" in fault()


def test_record_number_is_not_an_annotator(data: Path, set_params: SetParams) -> None:
    found = [pair(i % 20, id=str(i), kind="rude" if i % 2 else "short") for i in range(20)]
    found += [pair(7, id="20", kind="rude", chosen="bad", rejected="good")]
    rewrite(data, found)
    assert "2 contradiction" in fault()
    # If a whole record appears twice, so does its number.
    rewrite(data, [*found, found[3], found[4]])
    set_params("preprocess", on_bad_record="drop")
    figures = run()
    assert (figures["votes"], figures["dropped"]) == (0, {"contradiction": 2, "duplicate": 2})


def test_files_of_a_mapped_folder_are_not_annotators(
    workspace: Path, set_params: SetParams
) -> None:
    other = [pair(3), pair(4, chosen="bad", rejected="good")]
    folder = folder_of(workspace, set_params, one=[*map(pair, range(20))], two=other)
    (folder / "dataset.yaml").write_text("two.json: {source: another}\n")
    assert "bad records: 2 contradiction, 1 duplicate" in fault()


def folder_of(workspace: Path, set_params: SetParams, **contents: list[dict[str, Any]]) -> Path:
    """Use a folder with a file for each list of records as preprocess.data."""
    folder = workspace / "mine"
    folder.mkdir()
    for name, found in contents.items():
        rewrite(folder / f"{name}.json", found)
    set_params("preprocess", data="mine")
    return folder


def test_files_named_test_and_validation_are_those_splits(
    workspace: Path, set_params: SetParams
) -> None:
    parts = {"train": range(10), "validation": range(10, 12), "test": range(12, 15)}
    contents = {name: [pair(i) for i in indices] for name, indices in parts.items()}
    folder_of(workspace, set_params, **contents)
    assert run()["pairs"] == {"train": 10, "validation": 2, "test": 3}
    prompts = {name: {row["prompt_id"] for row in rows} for name, rows in written().items()}
    assert all(
        prompts[name] == {check(record).prompt_id for record in found}
        for name, found in contents.items()
    )


def test_prompts_are_split_if_only_one_split_is_a_file(
    workspace: Path, set_params: SetParams
) -> None:
    folder_of(workspace, set_params, pairs=[*map(pair, range(20))], test=[pair(30), pair(31)])
    assert run()["pairs"] == {"train": 18, "validation": 2, "test": 2}


@pytest.mark.parametrize("name", ["test", "validation"])
def test_prompt_of_a_split_file_in_the_other_data_is_a_fault(
    workspace: Path, set_params: SetParams, name: str
) -> None:
    others = {"pairs": [*map(pair, range(20))], name: [pair(30), pair(7, chosen="fine")]}
    folder_of(workspace, set_params, **others)
    message = (
        f"mine: the prompts of 1 record are also in the {name} files: mine/pairs.json: record 8; "
    )
    assert fault() == f"{message}to leave them out, set preprocess.on_bad_record to drop"


def test_prompt_of_a_training_file_is_never_held_out(
    workspace: Path, set_params: SetParams
) -> None:
    shared = [pair(i, chosen="better") for i in range(20)]
    contents = {"all": [*map(pair, range(20))], "more": [*shared, *map(pair, range(20, 60))]}
    folder = folder_of(workspace, set_params, **contents)
    (folder / "dataset.yaml").write_text("all.json: {split: train, source: first}\n")
    run()
    parts = written()
    train = {row["prompt_id"] for row in parts["train"]}
    assert {check(record).prompt_id for record in shared} <= train
    assert not train & {row["prompt_id"] for name in ("validation", "test") for row in parts[name]}
    assert {row["source"] for row in parts["train"]} == {"first", "more"}


def test_ranking_has_a_row_per_comparison_and_tokenizes_answers_once(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["first", "second", "third", "fourth"]
    rewrite(
        data,
        [
            {"prompt": f"question {i}", "answers": answers, "ranks": [1, 2, 2, 3], "kind": "x"}
            for i in range(20)
        ],
    )
    encode, encoded = Encoder.encode_arrays, []

    def counting(encoder: Encoder, texts: list[str]) -> list[TokenIds]:
        encoded.extend(texts)
        return encode(encoder, texts)

    monkeypatch.setattr(Encoder, "encode_arrays", counting)
    metrics = run()
    assert len(encoded) == len(set(encoded)) == 80
    assert (sum(metrics["pairs"].values()), metrics["ties"]) == (120, 20)
    tokenizer = Tokenizer.from_file(str(preprocess.BASE / "tokenizer.json"))
    for part in written().values():
        for row in part:
            texts = [answers[row[f"answer_{side}"]] for side in "jk"]
            for side, text in zip("jk", texts, strict=True):
                assert tokenizer.decode(row[f"input_ids_{side}"]).endswith(f"答:{text}")
            ranks = [[1, 2, 2, 3][answers.index(text)] for text in texts]
            assert row["preference"] == (0.5 if ranks[0] == ranks[1] else 1)
            assert ranks[0] <= ranks[1]
            assert row["kind"] == "x"
    rows = load_from_disk(str(preprocess.TOKENIZED / "test" / "answers"))
    assert rows["answer"] == [0, 1, 2, 3] * 4
    assert [json.loads(each)[0]["content"] for each in rows["response"]] == answers * 4


def test_rows_have_the_grades_of_their_records(data: Path) -> None:
    graded = [
        pair(i, preference=i / 40, weight=1 + i % 3) | ({"margin": 2} if i in (0, 40) else {})
        for i in range(41)
    ]
    rewrite(data, [*graded, pair(50, weight=0)])
    metrics = run()
    assert metrics["dropped"] == {"no_weight": 1}
    assert (metrics["ties"], metrics["soft"]) == (1, 38)
    rows = {row["prompt_id"]: row for part in written().values() for row in part}
    texts = Encoder(preprocess.BASE, Template.load(preprocess.TOKENIZED / "template.json"))
    for i, record in enumerate(graded):
        row = rows[check(record).prompt_id]
        better = "chosen" if i >= 20 else "rejected"
        assert texts.decode(row["input_ids_j"]).endswith(record[better])
        assert row["preference"] == max(i / 40, 1 - i / 40)
        assert (row["weight"], row["margin"]) == (1 + i % 3, 2 if i in (0, 40) else 0)


@pytest.mark.parametrize("other", [{"preference": 0.5}, {"preference": 0.8}, {"preference": 0}])
def test_records_that_judge_the_same_answers_differently_are_contradictions(
    data: Path, other: dict[str, Any]
) -> None:
    alike = {"chosen": pair(1)["rejected"], "rejected": pair(1)["chosen"], "preference": 0}
    rewrite(data, [*map(pair, range(20)), pair(1, **other)])
    assert "2 contradiction" in fault()
    rewrite(data, [*map(pair, range(20)), pair(1, **alike)])
    assert "1 duplicate" in fault()


def test_split_of_only_ties_is_a_fault(workspace: Path, set_params: SetParams) -> None:
    ties = [pair(30 + i, preference=0.5) for i in range(3)]
    folder_of(workspace, set_params, pairs=[*map(pair, range(20))], test=ties)
    assert "no pairs except ties left for test, out of 23; expected more prompts" in fault()


def test_answer_that_is_too_long_is_dropped_with_its_comparisons(
    data: Path, set_params: SetParams
) -> None:
    ranked = {"answers": ["good", "bad", "x " * 400], "ranks": [1, 2, 3]}
    rewrite(data, [{"prompt": f"question {i}"} | ranked for i in range(20)])
    set_params("preprocess", max_length=100, over_length="drop")
    metrics = run()
    assert (sum(metrics["pairs"].values()), metrics["dropped"]) == (20, {"over_length": 40})
    set_params("preprocess", over_length="truncate_prompt", on_bad_record="drop")
    assert run()["dropped"] == {"answer_too_long": 40}


def test_ties_are_kept_and_counted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = [
        {"prompt": f"question {i}", "response1": "a", "response2": "b", "overall_preference": i % 3}
        for i in range(30)
    ]
    rewrite(data, judged)
    metrics = run()
    assert (metrics["dropped"], metrics["ties"]) == ({}, 10)
    assert sum(metrics["pairs"].values()) == 30
    rows = [row for part in written().values() for row in part]
    assert sum(row["preference"] == 0.5 for row in rows) == 10
    printed = capsys.readouterr().out
    assert printed.startswith(
        "read       data/raw/pairs.json as prompt, response1 and response2 with "
    )
    assert ", 30 records\n" in printed
    assert "\ngraded     ties: 10; preferences that are not certain: 0\n" in printed


def test_each_file_is_reported_with_its_form(
    workspace: Path, set_params: SetParams, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(workspace, set_params, a=[*map(pair, range(20))], test=[pair(30)])
    rewrite(workspace / "data" / "sets" / "own.json", [pair(40)])
    run()
    assert capsys.readouterr().out.splitlines()[:3] == [
        "read       mine/a.json as prompt, chosen and rejected, 20 records",
        "read       mine/test.json as prompt, chosen and rejected, 1 record for test",
        "read       data/sets/own.json as prompt, chosen and rejected, 1 record",
    ]


def test_too_few_prompts_for_three_splits_is_a_fault(data: Path) -> None:
    rewrite(data, [pair(0), pair(1)])
    assert "no pairs left for train, out of 2; expected more prompts" in fault()


# --- bad records -----------------------------------------------------------------------------


def bad_records() -> list[Any]:
    """Good and bad records, with every reason for dropping once."""
    return [
        *map(pair, range(20)),
        {"prompt": "question 21", "chosen": "good"},
        "text",
        pair(23, rejected=" "),
        pair(24, rejected="good"),
        pair(3),
        pair(26),
        pair(26, chosen="bad", rejected="good"),
        pair(28, chosen="e\u0301", rejected="é"),
        pair(29, prompt=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]),
    ]


def test_bad_records_stop_the_stage_and_are_listed_in_order(data: Path) -> None:
    rewrite(data, bad_records())
    lines = fault().splitlines()
    reasons = ["missing_key", "wrong_type", "empty", "identical_answers", "duplicate"]
    reasons += ["contradiction", "contradiction", "identical_tokens", "needs_chat"]
    assert [line.split(": ")[:3] for line in lines[:-1]] == [
        ["data/raw/pairs.json", f"record {position}", reason]
        for position, reason in enumerate(reasons, start=21)
    ]
    assert lines[-1].startswith("bad records: 2 contradiction, 1 duplicate, 1 empty, ")
    assert lines[-1].endswith("to leave them out, set preprocess.on_bad_record to drop")


def test_bad_records_are_dropped_and_counted_by_reason(
    data: Path, set_params: SetParams, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(data, bad_records())
    set_params("preprocess", on_bad_record="drop")
    metrics = run()
    assert sum(metrics["pairs"].values()) == 20
    assert metrics["dropped"] == {
        **{"contradiction": 2, "duplicate": 1, "empty": 1, "identical_answers": 1},
        **{"identical_tokens": 1, "missing_key": 1, "needs_chat": 1, "wrong_type": 1},
    }
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("clients ")]
    assert printed == [
        "clients    none can score conversations like those of 1 dropped record, because "
        "preprocess.template cannot render them"
    ]


def test_first_ten_faults_are_listed(workspace: Path, set_params: SetParams) -> None:
    """They are the first ten by file and position, whichever check found them."""
    folder = workspace / "many"
    folder.mkdir()
    kinds: list[Callable[[int], Any]] = [
        pair,
        lambda i: pair(i, chosen="bad"),
        lambda i: pair(i, chosen="e\u0301", rejected="é"),
        lambda i: pair(0),
    ]
    first = [kinds[i % 4](i) for i in range(12)]
    (folder / "a.jsonl").write_text("\n\n".join(map(json.dumps, first)), encoding="utf-8")
    rewrite(folder / "b.json", [kinds[1](i) for i in range(100, 130)])
    set_params("preprocess", data="many")
    places = [line.split(": ")[:2] for line in fault().splitlines()[:-1]]
    lines = [2 * i + 1 for i in range(12) if i % 4]
    expected = [["many/a.jsonl", f"line {number}"] for number in lines]
    assert places == [*expected, ["many/b.json", "record 1"]]


def test_fault_lists_the_reasons_if_nothing_is_left(data: Path, set_params: SetParams) -> None:
    rewrite(data, [pair(0, chosen="bad"), 3])
    set_params("preprocess", on_bad_record="drop")
    message = fault()
    assert "record 1: identical_answers" in message
    assert "record 2: wrong_type" in message


def test_broken_file_leaves_no_output(data: Path) -> None:
    data.write_bytes(data.read_bytes()[:-1])
    assert "record 40: broken JSON" in fault()


# --- long texts ------------------------------------------------------------------------------


def long_records() -> list[dict[str, Any]]:
    too_long = [pair(20, prompt="1 why " * 50), pair(21, chosen="so " * 100)]
    return [*map(pair, range(20)), *too_long]


def test_long_texts_stop_the_stage_by_default(data: Path, set_params: SetParams) -> None:
    rewrite(data, long_records())
    set_params("preprocess", max_length=40, on_bad_record="drop")
    lines = fault().splitlines()
    assert "record 21: over_length: has" in lines[0]
    assert "expected at most 40 (" in lines[0]
    assert lines[2].startswith(
        "bad records: 2 over_length; for texts that are too long, set preprocess.over_length to "
    )


def test_long_texts_are_dropped_and_counted(data: Path, set_params: SetParams) -> None:
    rewrite(data, long_records())
    set_params("preprocess", max_length=40, over_length="drop")
    metrics = run()
    assert metrics["dropped"] == {"over_length": 2}
    assert sum(metrics["pairs"].values()) == 20
    assert metrics["length"]["max"] <= 40


def test_dropped_long_texts_are_not_listed_among_the_faults(
    data: Path, set_params: SetParams
) -> None:
    long = [pair(i, prompt=f"{i} why " * 50) for i in range(15)]
    rewrite(data, [*long, pair(20, chosen="bad")])
    set_params("preprocess", max_length=40, over_length="drop")
    lines = fault().splitlines()
    assert len(lines) == 2
    assert "record 16: identical_answers" in lines[0]


def test_long_prompts_are_truncated_and_counted(
    data: Path, set_params: SetParams, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(data, long_records())
    set_params("preprocess", max_length=40, over_length="truncate_prompt", on_bad_record="drop")
    metrics = run()
    assert metrics["dropped"] == {"answer_too_long": 1}
    assert metrics["truncated"] == 1
    assert metrics["length"]["max"] == 40
    assert sum(metrics["pairs"].values()) == 21
    assert "\nclients    the prompts of 1 record were cut, so " in (capsys.readouterr().out)


def test_answer_too_long_by_itself_does_not_lose_the_others(
    workspace: Path, set_params: SetParams
) -> None:
    ranked = {
        "prompt": "a " * 60,
        "answers": ["b", "c " * 50, "d", "e " * 60],
        "ranks": [1, 2, 3, 4],
    }
    folder_of(workspace, set_params, ranked=[ranked], pairs=[*map(pair, range(20))])
    set_params("preprocess", max_length=40, over_length="truncate_prompt", on_bad_record="drop")
    metrics = run()
    assert metrics["dropped"] == {"answer_too_long": 5}
    assert metrics["truncated"] == 1
    assert sum(metrics["pairs"].values()) == 21
    rewrite(workspace / "mine" / "ranked.json", [ranked | {"prompt": "a"}])
    assert run()["truncated"] == 0


def test_answer_too_long_by_itself_stops_the_stage(data: Path, set_params: SetParams) -> None:
    rewrite(data, long_records())
    set_params("preprocess", max_length=40, over_length="truncate_prompt")
    assert "record 22: answer_too_long" in fault().splitlines()[0]


# --- the process -----------------------------------------------------------------------------


@pytest.mark.usefixtures("data")
def test_preprocess_runs_without_torch() -> None:
    code = (
        "import sys; from stages import preprocess; preprocess.main();"
        "sys.exit(str([name for name in sys.modules if name.split('.')[0] == 'torch'] or ''))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert result.stderr.strip() == ""
    assert "train" in result.stdout
    assert read_json(preprocess.METRICS)["pairs"] == 40


@pytest.mark.usefixtures("data")
def test_fault_is_one_sentence_and_status_1(set_params: SetParams) -> None:
    set_params("preprocess", data="gone.json")
    result = subprocess.run(
        [sys.executable, "-m", "stages.preprocess"],
        env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    expected = "gone.json does not exist, expected a file or a folder of preference pairs\n"
    assert result.stderr == expected


def test_first_training_pair_is_shown_as_the_model_sees_it(
    data: Path, set_params: SetParams, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(data, [pair(index, rejected="bad\n" * 300) for index in range(20)])
    set_params("preprocess", append_eos=True)
    run()
    chosen, rejected = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r'chosen     "问:question \d+\\n\\n答:good<\|endoftext\|>"', chosen)
    assert rejected.startswith('rejected   "问:question ')
    assert rejected.endswith('bad\\nbad\\n<|endoftext|>"')
    assert len(rejected) == 11 + preprocess.EXAMPLE_CHARACTERS + len(" ... ")


def test_texts_of_answers_are_kept_only_for_test_prompts(data: Path, set_params: SetParams) -> None:
    rewrite(data, [dialogue(index, 1 + index % 2) for index in range(20)])
    set_params("preprocess", template="chat")
    run()
    parts = written()
    assert not (preprocess.TOKENIZED / "train" / "answers").exists()
    texts = {
        (row["prompt_id"], row["answer"]): row
        for row in load_from_disk(str(preprocess.TOKENIZED / "test" / "answers"))
    }
    records = {check(dialogue(index, 1 + index % 2)).ids[0]: index for index in range(20)}
    tokenizer = Tokenizer.from_file(str(preprocess.BASE / "tokenizer.json"))
    for row in parts["test"]:
        record = dialogue(records[row["id"]], 1 + records[row["id"]] % 2)
        for side, name in (("j", "chosen"), ("k", "rejected")):
            answer = texts[row["prompt_id"], row[f"answer_{side}"]]
            assert json.loads(answer["prompt"]) == record["prompt"]
            assert json.loads(answer["response"]) == record[name]
            ids = tokenizer.encode(answer["text"], add_special_tokens=False).ids
            assert ids == row[f"input_ids_{side}"]


def test_answers_of_scattered_records_are_grouped_by_prompt(
    data: Path, set_params: SetParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [pair(i, chosen=f"good {n}") for n in range(8) for i in range(40)]
    rewrite(data, random.Random(0).sample(pairs, len(pairs)))
    set_params("preprocess", test_fraction=0.4)
    run()
    expected = load_from_disk(str(preprocess.TOKENIZED / "test" / "answers")).to_list()
    monkeypatch.setattr(preprocess, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(tokenized, "GATHERED", 7)
    run()
    found = load_from_disk(str(preprocess.TOKENIZED / "test" / "answers")).to_list()
    assert found == expected
    prompts = list(dict.fromkeys(row["prompt_id"] for row in written()["test"]))
    keys = [(row["prompt_id"], row["answer"]) for row in found]
    assert keys == [(prompt, number) for prompt in prompts for number in range(9)]
    texts = {key: row["text"] for key, row in zip(keys, found, strict=True)}
    tokenizer = Tokenizer.from_file(str(preprocess.BASE / "tokenizer.json"))
    for row in written()["test"]:
        for side in "jk":
            text = texts[row["prompt_id"], row[f"answer_{side}"]]
            assert tokenizer.encode(text).ids == row[f"input_ids_{side}"]


def test_several_messages_are_shown_with_their_roles() -> None:
    turns = (("user", "a"), ("assistant", "b", '{"tool_calls": [1]}'))
    assert readable(as_json(turns[:1])) == "a"
    assert readable(as_json(turns)) == "user: a\n\nassistant: b\ntool_calls: [1]"
    silent = (("assistant", "", '{"tool_calls":[1],"content":null}'),)
    assert readable(as_json(silent)) == "assistant: \ntool_calls: [1]"


# --- messages --------------------------------------------------------------------------------


def test_other_files_in_a_folder_are_named(
    data: Path, set_params: SetParams, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("README.md", ".gitignore", "pairs.json.dvc", "notes.xlsx", "more.jsonl.zst"):
        (data.parent / name).write_text("x")
    (data.parent / "older").mkdir()
    set_params("preprocess", data="data/raw")
    run()
    assert "not read   more.jsonl.zst, notes.xlsx, older/ in data/raw\n" in capsys.readouterr().out


@pytest.mark.usefixtures("data")
def test_chat_template_that_is_not_used_is_named(
    set_params: SetParams, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("chat.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    unused = "\nnot used   chat.jinja (preprocess.chat_template), because preprocess.template is"
    for template, named in (("zh", True), ("chat", False)):
        set_params("preprocess", chat_template="chat.jinja", template=template)
        run()
        assert (unused in capsys.readouterr().out) == named
    set_params("preprocess", chat_template="./models/base/tokenizer_config.json", template="zh")
    run()
    assert "not used" not in capsys.readouterr().out


def test_fault_suggests_no_parameter_that_is_already_set(data: Path, set_params: SetParams) -> None:
    rewrite(data, [pair(1, chosen="x " * 3000), pair(2, chosen="")])
    set_params("preprocess", on_bad_record="drop", over_length="drop")
    message = fault()
    assert "preprocess.on_bad_record" not in message
    assert "; for texts that are too long, set preprocess.over_length to truncate_prompt" in message


# --- the benchmark ---------------------------------------------------------------------------


@pytest.mark.parametrize("template", benchmark.TEMPLATES)
def test_benchmark_makes_a_folder_that_the_stage_reads(
    template: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(seed=0, tokenizer=tiny_base)
    with benchmark.workspace(options, 40, benchmark.SHORT, template) as folder:
        monkeypatch.chdir(folder)
        figures = run()
        assert sum(figures["pairs"].values()) == 40
        assert figures["tokens"] > 0
        assert ("<|im_start|>" in Path("data/tokenized/template.json").read_text()) == (
            template == "chat"
        )
        monkeypatch.chdir(tiny_base)


@pytest.mark.usefixtures("data")
def test_template_that_export_would_refuse_is_refused_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Encoder, "require_portable", Mock(side_effect=Fault("no chat template")))
    monkeypatch.delattr(preprocess, "sources")
    with pytest.raises(Fault, match="no chat template"):
        preprocess.main()
