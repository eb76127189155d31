"""dataset.yaml: the meaning of columns, the selection of records, and the split of each file."""

import json
from pathlib import Path
from typing import Any

import pytest

from reward.data.mapping import read_mapping
from reward.data.records import FIELDS, BadRecord, Comparison, check
from reward.data.sources import Source, sources
from reward.process import Fault
from stages.preprocess import licenses
from tests.support import as_pairs, raws

Record = dict[str, Any]
TWO = {"ask": "Why?", "left": "A.", "right": "B.", "vote": "l"}


def write(folder: Path, mapping: str, *records: Any, name: str = "x.jsonl") -> Path:
    (folder / "dataset.yaml").write_text(mapping, encoding="utf-8")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


def read(folder: Path) -> tuple[Source, list[Record]]:
    [source] = sources(folder)
    return source, [pair for raw in raws(source) for pair in as_pairs(raw)]


def triples(folder: Path) -> list[list[Any]]:
    return [[pair[key] for key in FIELDS] for pair in read(folder)[1]]


def fault(folder: Path) -> str:
    with pytest.raises(Fault) as caught:
        read(folder)
    return str(caught.value)


# --- columns ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "record", "expected"),
    [
        (
            "{prompt: ask, answers: [left, right], verdict: vote, first: l, second: [r], tie: [s]}",
            TWO | {"vote": "r"},
            [["Why?", "B.", "A."]],
        ),
        (
            "{prompt: ask, chosen: good, rejected: bad, system: who}",
            {"ask": "Why?", "good": "A.", "bad": "B.", "who": "s"},
            [
                [
                    [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}],
                    "A.",
                    "B.",
                ]
            ],
        ),
        (
            "{prompt: 问题, chosen: 好的回答, rejected: 差的回答}",
            {"问题": "为什么？", "好的回答": "因为。", "差的回答": "不。"},
            [["为什么？", "因为。", "不。"]],
        ),
        (
            "{prompt: 'info.post', answers: ['texts[1].t', 'texts[0].t'], scores: [b, a]}",
            {"info": {"post": "Why?"}, "texts": [{"t": "A."}, {"t": "B."}], "a": 1, "b": 0},
            [["Why?", "A.", "B."]],
        ),
        (
            "{prompt: ask, answers: 'out[].text', ranks: 'out[].place'}",
            {"ask": "Why?", "out": [{"text": "A.", "place": 2}, {"text": "B.", "place": 1}]},
            [["Why?", "B.", "A."]],
        ),
        (
            "{prompt: ask, answers: out, order: best_first}",
            {"ask": "Why?", "out": ["A.", "B.", "C."]},
            [["Why?", "A.", "B."], ["Why?", "A.", "C."], ["Why?", "B.", "C."]],
        ),
        (
            "{prompt: ask}",
            {"ask": "Why?", "chosen": "A.", "rejected": "B."},
            [["Why?", "A.", "B."]],
        ),
        (
            "{prompt: question}",
            {"question": "Why?", "context": "Aside.", "chosen": "A.", "rejected": "B."},
            [["Why?", "A.", "B."]],
        ),
        (
            "{system: null, input: null}",
            {"prompt": "Why?", "system": "v1", "input": "x", "chosen": "A.", "rejected": "B."},
            [["Why?", "A.", "B."]],
        ),
        (
            "{prompt: a.b, chosen: c, rejected: r}",
            {"a.b": "Why?", "c": "A.", "r": "B."},
            [["Why?", "A.", "B."]],
        ),
    ],
)
def test_entry_defines_the_meaning_of_columns(
    tmp_path: Path, entry: str, record: Record, expected: list[Any]
) -> None:
    assert triples(write(tmp_path, f"x.jsonl: {entry}\n", record)) == expected


def test_unmapped_verdict_is_an_error_and_a_mapped_tie_is_not(tmp_path: Path) -> None:
    mapping = "'*.jsonl': {prompt: ask, answers: [left, right], verdict: vote, first: l, second: r"
    records = [TWO, TWO | {"vote": "same"}]
    folder = write(tmp_path, f"{mapping}, tie: same}}", *records)
    source, found = read(folder)
    assert (len(found), source.taken) == (1, 2)
    assert source.description.endswith(
        " as ask, left and right with vote (l for the first answer, r for the second, "
        "same for a tie), 2 records"
    )
    write(tmp_path, f"{mapping}}}", *records)
    assert fault(folder) == (
        f'{folder}/x.jsonl: line 2: vote is "same", '
        "expected l for the first answer, r for the second; "
        "declare other values in dataset.yaml (answers, verdict, first, second, tie)"
    )


@pytest.mark.parametrize(
    ("entry", "columns", "expected"),
    [
        ("answers: [left, right], preference: p", {"p": 0.2}, Comparison(1, 0, 0.8)),
        ("answers: [left, right], preference: p", {"p": 0.49999999}, Comparison(0, 1, 0.5)),
        ("answers: [left, right], preference: p", {"p": 0.2, "votes": [3, 1]},
         Comparison(1, 0, 0.8)),
        ("answers: [left, right], votes: [for, against]", {"for": 3, "against": "1"},
         Comparison(0, 1, 0.75)),
        ("answers: [left, right], votes: v", {"v": [1, 3]}, Comparison(1, 0, 0.75)),
        ("answers: [left, right], votes: v, first: l, second: r, tie: s",
         {"v": ["l", "r", "s", "l"]}, Comparison(0, 1, 0.625)),
        ("chosen: left, rejected: right, votes: v, first: l, second: r",
         {"v": ["r", "r", "l", "r", "r"]}, Comparison(1, 0, 0.8)),
        ("chosen: left, rejected: right, margin: gap, weight: w", {"gap": 2, "w": 3},
         Comparison(0, 1, 1, 3, 2)),
        ("answers: [left, right], verdict: vote, first: l, second: r, margin: gap", {"gap": 2},
         Comparison(0, 1, margin=2)),
        ("answers: [left, right], scores: [s, t], margin: gap", {"s": 1, "t": 3, "gap": 2},
         Comparison(1, 0, margin=2)),
        ("answers: [left, right], scores: [s, t]", {"s": 1, "t": 3, "margin": -2},
         Comparison(1, 0)),
        ("answers: [left, right], verdict: margin, first: -1, second: 1", {"margin": -1},
         Comparison(0, 1)),
        ("chosen: left, rejected: right, weight: null, margin: null", {"weight": 9, "margin": -9},
         Comparison(0, 1)),
        ("chosen: left, rejected: right, votes: null", {"votes": [0, 1]}, Comparison(0, 1)),
        ("chosen: left, rejected: right, preference: p", {"p": None}, Comparison(0, 1)),
    ],
)  # fmt: skip
def test_entry_defines_what_grades_a_comparison(
    tmp_path: Path, entry: str, columns: Record, expected: Comparison
) -> None:
    folder = write(tmp_path, f"x.jsonl: {{prompt: ask, {entry}}}", TWO | columns)
    [source] = sources(folder)
    [raw] = raws(source)
    assert raw.comparisons == [expected]


@pytest.mark.parametrize(
    ("verdict", "columns", "named"),
    [
        ("preference: p", {"p": None}, "'p'"),
        ("votes: [for, against]", {"for": None, "against": None}, "'for and against'"),
        ("votes: v", {}, "'v'"),
        ("preference: p", {"p": None, "votes": [3, 1]}, "'p'"),
        ("votes: v", {"preference": 0.8}, "'v'"),
    ],
)
def test_comparison_without_a_verdict_is_a_bad_record(
    tmp_path: Path, verdict: str, columns: Record, named: str
) -> None:
    given = {"p": 1, "for": 1, "against": 0, "v": [1, 0]}
    entry = f"x.jsonl: {{prompt: ask, answers: [left, right], {verdict}}}"
    [source] = sources(write(tmp_path, entry, TWO | given, TWO | columns))
    _, second = source
    with pytest.raises(BadRecord, match=f"{named} has no value"):
        source.raw(*second)


PANDALM = {"instruction": "Why?", "response1": "A.", "response2": "B.", "votes": [2, 2, 1, 2]}


def test_what_grades_a_recognized_verdict_is_read(tmp_path: Path) -> None:
    write(tmp_path, "x.jsonl: {weight: w}", PANDALM | {"w": 3})
    [raw] = raws(*sources(tmp_path))
    assert raw.comparisons == [Comparison(1, 0, 0.75, 3)]


@pytest.mark.parametrize(
    ("key", "record", "form"),
    [
        ("margin", {"prompt": "Why?", "answers": [{"text": "A.", "rank": 1}] * 3}, "answers"),
        ("votes", {"prompt": "Why?", "answers": [{"text": "A.", "rank": 1}] * 3}, "answers"),
        (
            "preference",
            {"prompt": "Why?", "response_0": "A.", "response_1": "B.", "better_response_id": 0},
            "response_0 and response_1 with better_response_id",
        ),
        ("votes", PANDALM, "response1 and response2"),
    ],
)
def test_what_cannot_grade_the_recognized_answers_is_refused(
    tmp_path: Path, key: str, record: Record, form: str
) -> None:
    write(tmp_path, f"x.jsonl: {{{key}: other}}", record | {"other": 1})
    message = fault(tmp_path)
    assert message.startswith(f"{tmp_path}/x.jsonl: {key} in dataset.yaml cannot grade {form}")
    write(tmp_path, f"x.jsonl: {{{key}: null}}", record)
    assert len(sources(tmp_path)) == 1


def test_yes_no_and_table_cells_are_read_as_text(tmp_path: Path) -> None:
    write(
        tmp_path,
        "x.csv: {prompt: ask, answers: [a, b], verdict: better, first: [yes, 1], second: no}",
    )
    (tmp_path / "x.jsonl").unlink()
    rows = "ask,a,b,better\nWhy?,A.,B.,yes\nHow?,A.,B.,no\nWho?,A.,B.,1\n"
    (tmp_path / "x.csv").write_text(rows)
    assert triples(tmp_path) == [["Why?", "A.", "B."], ["How?", "B.", "A."], ["Who?", "A.", "B."]]


# --- selection of records --------------------------------------------------------------------


def numbered(count: int) -> list[Record]:
    return [
        {"prompt": f"{n}?", "chosen": "A.", "rejected": "B.", "lang": "zh" if n % 4 else "en"}
        for n in range(count)
    ]


def prompts(folder: Path) -> list[int]:
    return [int(pair["prompt"][:-1]) for pair in read(folder)[1]]


def test_where_selects_records_with_one_of_the_values(tmp_path: Path) -> None:
    folder = write(tmp_path, "x.jsonl: {where: {lang: [en, fr]}}", *numbered(20))
    assert prompts(folder) == [0, 4, 8, 12, 16]
    source, _ = read(folder)
    assert source.description.endswith(" as prompt, chosen and rejected, 5 of 20 records")


def test_where_compares_ids_that_are_not_floats(tmp_path: Path) -> None:
    ids = [2**53, 2**53 + 1, str(2**53 + 1), float(2**53)]
    records = [record | {"number": own} for record, own in zip(numbered(4), ids, strict=True)]
    folder = write(tmp_path, f"x.jsonl: {{where: {{number: {2**53 + 1}}}}}", *records)
    assert prompts(folder) == [1, 2]


def test_where_without_a_match_is_named_even_with_take(tmp_path: Path) -> None:
    entry = "{prompt: ask, chosen: left, rejected: right, where: {vote: r}, take: 1}"
    message = fault(write(tmp_path, f"x.jsonl: {entry}", TWO))
    assert "x.jsonl: where (vote) matches no record (of 1)" in message


def test_take_samples_by_seed_and_larger_samples_contain_smaller_ones(tmp_path: Path) -> None:
    def drawn(keys: str) -> list[int]:
        return prompts(write(tmp_path, f"x.jsonl: {{{keys}}}", *numbered(100)))

    ten, thirty = drawn("take: 10"), drawn("take: 30")
    assert (len(ten), len(thirty)) == (10, 30)
    assert set(ten) < set(thirty)
    assert ten == sorted(ten) == drawn("take: 0.1, seed: 0")
    assert drawn("take: 10, seed: 1") != ten
    assert set(drawn("take: 5, where: {lang: en}")) < set(range(0, 100, 4))
    write(tmp_path, "x.jsonl: {take: 30, where: {lang: en}}", *numbered(100))
    assert (
        fault(tmp_path) == f"{tmp_path}/x.jsonl: take is 30, but it can draw from only 25 records"
    )


def test_records_name_their_source(tmp_path: Path) -> None:
    records = [*numbered(1), numbered(2)[1] | {"source": "web"}]
    folder = write(tmp_path, "x.jsonl:\n", *records)
    assert [check(pair).columns["source"] for pair in read(folder)[1]] == ["x", "web"]
    write(tmp_path, "x.jsonl: {source: mine}", *records)
    assert [check(pair).columns["source"] for pair in read(folder)[1]] == ["mine", "mine"]
    (tmp_path / "dataset.yaml").unlink()
    assert "source" not in check(read(folder)[1][0]).columns


def test_licences_are_collected_from_entries(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"):
        write(
            tmp_path,
            "{b.jsonl: {license: mit}, '[cd].jsonl': {license: 中文}}",
            *numbered(1),
            name=name,
        )
    assert licenses(sources(tmp_path)) == ["mit", "中文", None]
    (tmp_path / "a.jsonl").unlink()
    assert licenses(sources(tmp_path)) == ["mit", "中文"]
    (tmp_path / "dataset.yaml").unlink()
    assert licenses(sources(tmp_path)) == []
    write(tmp_path, "x.jsonl: {license: [mit]}", *numbered(1))
    assert fault(tmp_path).endswith("x.jsonl: license is ['mit'], expected a non-empty string")


# --- splits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test.jsonl", "test"),
        ("test-00000-of-00001.jsonl", "test"),
        ("validation_1.jsonl", "validation"),
        ("train.jsonl", None),
        ("testimonies.jsonl", None),
        ("contest_value.jsonl", None),
        ("unit_test_generation.jsonl", None),
        ("train_without_val.jsonl", None),
        ("train-dev.jsonl", None),
        ("身份验证.jsonl", None),
        ("训练集.jsonl", None),
    ],
)
def test_file_name_in_a_folder_sets_its_split(tmp_path: Path, name: str, split: str | None) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(numbered(1)[0]))
    assert [source.split for source in sources(tmp_path)] == [split]
    assert [source.split for source in sources(path)] == [None]


@pytest.mark.parametrize(
    "name",
    [
        *("val.jsonl", "val-00000.jsonl", "my_test.jsonl", "dpo-held-out.jsonl", "Dev2.jsonl"),
        *("偏好test.jsonl", "v2test.jsonl", "my_test-00000-of-00001.jsonl"),
        *("测试集.jsonl", "偏好-验证集.jsonl", "my评测数据2.jsonl", "test测试.jsonl"),
        *("my_test_set.jsonl", "dpo-val-data.jsonl", "my_dev_v2.jsonl", "training_eval.jsonl"),
    ],
)
def test_other_name_of_a_test_file_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, f"{name}: {{split: train}}", *numbered(1), name=name)
    assert [source.split for source in sources(tmp_path)] == ["train"]
    (tmp_path / "dataset.yaml").unlink()
    assert f"{name} is named like a test or validation set, but would be " in fault(tmp_path)


def test_entry_overrides_the_split(tmp_path: Path) -> None:
    write(tmp_path, "test.jsonl: {split: train}", *numbered(1), name="test.jsonl")
    source, _ = read(tmp_path)
    assert source.split == "train"
    assert source.description.endswith(", 1 record for train")


# --- faults ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("x.jsonl: {promt: a}", "x.jsonl: promt is unknown, expected one of prompt, input, system"),
        ("x.jsonl: [a]", "x.jsonl: is ['a'], expected keys and values"),
        ("- a", " has no entries, expected the name of a file and the keys of its entry"),
        ("", " has no entries"),
        ("x.jsonl: {prompt: a", " broken YAML: "),
        ("x.jsonl: {seed: 1}\nx.jsonl: {seed: 2}", " broken YAML: "),
        ("x.jsonl: {prompt: 3}", "prompt is 3, expected the name of a column, or null for none"),
        ("x.jsonl: {take: 0}", "take is 0, expected a number of records, or a share above 0"),
        ("x.jsonl: {take: 1.5}", "take is 1.5, expected a number of records, or a share above 0"),
        ("x.jsonl: {take: true}", "take is true, expected a number of records, or a share above 0"),
        ("x.jsonl: {split: dev}", "split is 'dev', expected train, validation or test"),
        ("x.jsonl: {seed: a}", "seed is 'a', expected an integer"),
        ("x.jsonl: {where: en}", "where is 'en', expected columns, each with the values"),
        ("x.jsonl: {chosen: a}", "expected chosen and rejected, or answers"),
        (
            "x.jsonl: {answers: [a, b]}",
            "expected answers with one of verdict, ranks, scores, order, votes, preference",
        ),
        (
            "x.jsonl: {verdict: a}",
            "expected answers with one of verdict, ranks, scores, order, vot",
        ),
        (
            "x.jsonl: {answers: [a, b], ranks: [c, d], scores: [e, f]}",
            "expected answers with one of verdict, ranks, scores, order, votes, preference",
        ),
        *(
            (f"x.jsonl: {{{ways}}}", "x.jsonl: expected answers with one of verdict, ranks")
            for ways in (
                "scores: s, verdict: v, first: 1, second: 2",
                "ranks: r, scores: s",
                "order: best_first, verdict: v",
                "chosen: a, rejected: b, scores: s, verdict: v, first: 1, second: 2",
            )
        ),
        ("x.jsonl: {answers: [a, b, c], ranks: [r, s, t], margin: m}", "margin needs two columns"),
        ("x.jsonl: {answers: a, order: best_first, margin: m}", "margin needs two columns"),
        (
            "x.jsonl: {answers: [a, b, c], verdict: v, first: 1, second: 2}",
            "verdict needs two columns in answers",
        ),
        ("x.jsonl: {answers: [a, b], verdict: v, first: 1}", "verdict needs first and second"),
        (
            "x.jsonl: {answers: [a, b], verdict: v, first: 1, second: ['1']}",
            "first, second and tie share a value",
        ),
        ("x.jsonl: {answers: [a, b], ranks: r}", "answers and ranks must both be one column"),
        ("x.jsonl: {answers: [a, b], ranks: [r, s, t]}", "ranks has 3 columns, answers has 2"),
        (
            "x.jsonl: {answers: a, order: worst_first}",
            "order is 'worst_first', expected best_first",
        ),
        ("x.jsonl: {answers: [a, b, c], votes: v}", "votes needs two columns in answers"),
        ("x.jsonl: {chosen: a, rejected: b, votes: [c]}", "votes is ['c'], expected the name of a"),
        (
            "x.jsonl: {chosen: a, rejected: b, votes: v, preference: p}",
            "votes and preference both say how certain a verdict is",
        ),
        (
            "x.jsonl: {chosen: a, rejected: b, votes: [v, w], first: 1, second: 2}",
            "first, second and tie need a verdict, or a single column of votes",
        ),
        (
            "x.jsonl: {chosen: a, rejected: b, votes: v, first: 1}",
            "single votes need first and second",
        ),
        ("x.jsonl: {weight: [a]}", "weight is ['a'], expected the name of a column, or null"),
        ("y.jsonl: {prompt: a}", "y.jsonl matches none of the files x.jsonl"),
        (
            "'x*': {prompt: ask}\n'*.jsonl': {prompt: ask}",
            "x.jsonl matches x* and *.jsonl, expected only one entry",
        ),
        (
            "x.jsonl: {prompt: aks, chosen: left, rejected: right}",
            "prompt is 'aks', which is not a column; found the keys ask, left, right, vote",
        ),
        (
            "x.jsonl: {where: {lang: en}}",
            "where is 'lang', which is not a column; found the keys ask",
        ),
    ],
)
def test_fault_in_an_entry_is_reported(tmp_path: Path, mapping: str, message: str) -> None:
    found = fault(write(tmp_path, mapping, TWO))
    assert found.startswith(f"{tmp_path}/dataset.yaml")
    assert message in found
    assert "\n" not in found


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    found = fault(write(tmp_path, "x.jsonl: {take: 0, split: dev}\ny: {a: b}", TWO))
    assert [line.split(": ")[2].split(" ")[0] for line in found.splitlines()] == [
        "take",
        "split",
        "a",
    ]


def test_entry_for_a_file_that_is_read_by_itself_is_refused(tmp_path: Path) -> None:
    """DVC watches the file that params.yaml names, and would miss a change of dataset.yaml."""
    write(tmp_path, "x.jsonl: {prompt: ask, chosen: left, rejected: right}", TWO)
    with pytest.raises(
        Fault, match=r"has an entry for x\.jsonl; set preprocess\.data to the folder"
    ):
        sources(tmp_path / "x.jsonl")
    write(tmp_path, "y.jsonl:\n", *numbered(1))
    # DVC does not see that file, so it changes no record.
    [source] = sources(tmp_path / "x.jsonl")
    assert source.name is None


def test_folder_without_dataset_yaml_has_no_mapping(tmp_path: Path) -> None:
    assert read_mapping(tmp_path) is None


def test_share_draws_at_least_one_record(tmp_path: Path) -> None:
    folder = write(tmp_path, "x.jsonl: {take: 0.001}", *numbered(100))
    assert len(prompts(folder)) == 1
