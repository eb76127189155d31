"""The forms in which preference data is published: which are recognized, and their pairs.

tests/forms has a small file of each form, and tests/forms/expected.yaml has what each is read as.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from reward.data.answers import Judged, Listed, Meaning, UnknownVerdict
from reward.data.forms import Context, Form
from reward.data.recognition import Known, recognize
from reward.data.records import (
    FIELDS,
    BadRecord,
    Candidates,
    Comparison,
    candidates,
    check,
    parts_of,
)
from reward.data.sources import Source, source_of, sources
from reward.data.values import is_absent
from reward.process import Fault
from tests.support import as_pairs, raws, ties_of

FORMS = Path(__file__).parent / "forms"
EXPECTED: dict[str, dict[str, Any]] = YAML(typ="safe").load(FORMS / "expected.yaml")
ENCODED = "has lists or objects as texts, such as "

Record = dict[str, Any]


def form_of(*records: Record) -> Form:
    return recognize(Path("x.jsonl"), list(records))


def pairs_of(*records: Record) -> list[tuple[list[Record], int]]:
    """The pairs and the number of ties of each record, read under the form of all records."""
    form = form_of(*records)
    read = [form.read(record) for record in records]
    return [(as_pairs(raw), ties_of(raw)) for raw in read]


def read_all(source: Source) -> tuple[list[Record], int]:
    """The pairs and the number of ties of a source."""
    found = raws(source)
    return [pair for raw in found for pair in as_pairs(raw)], sum(map(ties_of, found))


def triples(pairs: list[Record]) -> list[list[Any]]:
    return [[pair.get(key) for key in FIELDS] for pair in pairs]


def write(folder: Path, *records: Any, name: str = "x.jsonl") -> Path:
    path = folder / name
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return path


def fault(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(Fault) as caught:
        function(*arguments)
    return str(caught.value)


def user(text: str) -> Record:
    return {"role": "user", "content": text}


def answer(text: str) -> Record:
    return {"role": "assistant", "content": text}


def system(text: str) -> Record:
    return {"role": "system", "content": text}


PLAIN = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


# --- every form ------------------------------------------------------------------------------


def test_every_file_has_an_expected_result() -> None:
    assert {path.name for path in FORMS.iterdir()} == {*EXPECTED, "expected.yaml"}


@pytest.mark.parametrize("name", EXPECTED)
def test_published_form_gives_its_pairs(name: str) -> None:
    source, expected = source_of(FORMS / name), EXPECTED[name]
    found, ties = read_all(source)
    assert source.form.description == expected["description"]
    assert triples(found) == expected["pairs"]
    assert ties == expected.get("ties", 0)
    checked = [*map(check, raws(source))]
    if "columns" in expected:
        assert checked[0].columns == expected["columns"]
    if "tools" in expected:
        assert parts_of(checked[0].prompt[0])["tools"] == expected["tools"]


@pytest.mark.parametrize("name", EXPECTED)
def test_one_line_names_the_recognized_form(name: str) -> None:
    source = source_of(FORMS / name)
    list(source)
    description = source.description
    assert description.startswith(f"read       {FORMS / name} as {EXPECTED[name]['description']}, ")
    assert description.removesuffix("s").endswith(" record")


@pytest.mark.parametrize("name", ["canonical.jsonl", "rewardbench.jsonl"])
def test_canonical_record_is_passed_on_unchanged(name: str) -> None:
    source = source_of(FORMS / name)
    records = [json.loads(line) for line in (FORMS / name).read_text().splitlines()]
    assert read_all(source) == (records, 0)
    assert all(source.form.read(record).columns is record for record in records)


def test_canonical_messages_keep_their_id() -> None:
    record = {
        "prompt": [system("s"), user("q")],
        "chosen": [{**answer("a"), "weight": None}],
        "rejected": [answer("b")],
        "tools": None,
    }
    [[[found], _]] = pairs_of(record)
    assert check(found) == check(record)


# --- the conversation before the answers -----------------------------------------------------


@pytest.mark.parametrize("role", ["human", "user"])
@pytest.mark.parametrize("speaker", ["gpt", "assistant", "model", "bot"])
@pytest.mark.parametrize("keys", [("role", "content"), ("role", "text"), ("from", "value")])
def test_every_format_of_a_message_is_read(role: str, speaker: str, keys: tuple[str, str]) -> None:
    spoken = [
        dict(zip(keys, turn, strict=True))
        for turn in (("system", "s"), (role, "q"), (speaker, "a"), ("observation", "o"))
    ]
    [[[found], _]] = pairs_of({"messages": spoken, "chosen": "c", "rejected": "r"})
    tool = {"role": "tool", "content": "o"}
    assert found["prompt"] == [system("s"), user("q"), answer("a"), tool]


@pytest.mark.parametrize(
    "name", ["messages", "conversations", "conversation", "context", "dialogue"]
)
def test_every_name_for_a_conversation_is_a_prompt(name: str) -> None:
    [[[found], _]] = pairs_of({name: [user("q")], "chosen": "c", "rejected": "r"})
    assert found == {"prompt": [user("q")], "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize("name", ["question", "instruction", "query", "post", "history", "input"])
def test_every_name_for_a_text_is_a_prompt(name: str) -> None:
    [[[found], _]] = pairs_of({name: "q", "chosen": "c", "rejected": "r"})
    assert found == {"prompt": "q", "chosen": "c", "rejected": "r"}


def test_system_and_history_precede_prompts_and_whole_conversations() -> None:
    before = {"system": "s", "history": [["q", "a"]]}
    head = [system("s"), user("q"), answer("a"), user("Why?")]
    [[[found], _]] = pairs_of(PLAIN | before)
    assert found["prompt"] == head
    whole = {key: [user("Why?"), answer(PLAIN[key])] for key in ("chosen", "rejected")}
    for prompt in ({}, {"prompt": "Why?"}):
        [[[found], _]] = pairs_of(prompt | whole | before)
        pair = check(found)
        assert [*pair.prompt] == [(each["role"], each["content"]) for each in head]
        assert pair.answers[0] == (("assistant", "Because."),)


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("earlier", ["history", "chat_history", "conversation_history"])
def test_every_name_for_what_precedes_the_prompt_is_used(name: str, earlier: str) -> None:
    record = PLAIN | {name: "Be brief.", earlier: [user("Hello."), answer("Hi!")]}
    [[[found], _]] = pairs_of(record)
    assert found["prompt"] == [system("Be brief."), user("Hello."), answer("Hi!"), user("Why?")]


def test_two_different_system_messages_are_refused() -> None:
    record = PLAIN | {"system": "Be brief.", "system_prompt": "Be kind."}
    message = fault(form_of, record)
    assert "system and system_prompt could each be the system message; " in message
    assert message.endswith("{system: system} or x.jsonl: {system: system_prompt}")
    pairs_of(record | {"system_prompt": "Be brief."})


def test_what_the_prompt_repeats_is_used_once() -> None:
    earlier = [user("Hello."), answer("Hi!")]
    for record in (
        PLAIN | {"history": [*earlier, user("Why?")]},
        PLAIN | {"history": earlier, "input": "Why?"},
        PLAIN | {"prompt": [*earlier, user("Why?"), answer("Because.")]},
        {"messages": [*earlier, user("Why?"), answer("Because.")], "rejected": [answer("No.")]}
        | {"chosen": [answer("Because.")]},
    ):
        [[[found], _]] = pairs_of(record)
        assert found["prompt"] == [*earlier, user("Why?")]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": [user("Why?"), {"role": "assistant"}]},
        {"prompt": [{"role": "system"}, user("Why?")], "system": "Be brief."},
        {
            "prompt": [{"role": "system", "content": "Be brief."}, user("Why?")],
            "history": [{"role": "system"}, user("Hi.")],
        },
    ],
)
def test_message_without_content_is_a_bad_record(change: Record) -> None:
    with pytest.raises(BadRecord):
        check(form_of(PLAIN | change).read(PLAIN | change))


def test_system_column_that_repeats_the_system_message_is_used_once() -> None:
    messages = {"messages": [system("s"), user("q")], "system": "s"}
    record = {"chosen": "c", "rejected": "r"} | messages
    [[[found], _]] = pairs_of(record)
    assert found["prompt"] == [system("s"), user("q")]
    with pytest.raises(BadRecord, match="the system message differs from"):
        pairs_of(record | {"system": "t"})


def test_columns_that_first_appear_late_are_used() -> None:
    form = form_of(PLAIN)
    [found] = as_pairs(form.read(PLAIN | {"system": "s", "input": "more"}))
    assert found["prompt"] == [system("s"), user("Why?\nmore")]
    with pytest.raises(BadRecord, match="prompt and question could both be the prompt") as caught:
        form.read(PLAIN | {"question": "Or that?"})
    assert caught.value.reason == "several_kinds"


@pytest.mark.parametrize("first", ["system", "system_message", ""])
@pytest.mark.parametrize("late", ["system", "system_prompt", "system_message"])
def test_system_message_that_first_appears_late_is_used_under_any_name(
    first: str, late: str
) -> None:
    form = form_of(PLAIN | ({first: "s"} if first else {}))
    raw = form.read(PLAIN | {late: "t"})
    assert raw.prompt == [system("t"), user("Why?")]
    assert late not in raw.columns
    both = PLAIN | {"system": "s", "system_prompt": "t"}
    with pytest.raises(BadRecord, match="system and system_prompt differ; name one in "):
        form.read(both)
    assert form.read(both | {"system_prompt": "s"}).prompt == [system("s"), user("Why?")]


@pytest.mark.parametrize("late", ["history", "chat_history", "conversation_history"])
def test_earlier_turns_that_first_appear_late_are_used_under_any_name(late: str) -> None:
    [found] = as_pairs(form_of(PLAIN).read(PLAIN | {late: [["a", "b"]]}))
    assert found["prompt"] == [user("a"), answer("b"), user("Why?")]


def test_lists_and_objects_that_are_not_read_are_named() -> None:
    columns = {"past": [["a", "b"]], "meta": {"id": 3}, "messages": [user("Why?")], "note": "x"}
    record = PLAIN | columns | {"messages": None, "history": [["a", "b"]]}
    assert (
        form_of(record).description == "prompt, history, chosen and rejected (not read: past, meta)"
    )
    assert form_of(PLAIN).description == "prompt, chosen and rejected"


@pytest.mark.parametrize(
    ("prompt", "more", "expected"),
    [
        ("Translate this.", "Hello", "Translate this.\nHello"),
        ("Translate:\nHello", "Hello", "Translate:\nHello"),
        ("Find a synonym of the word", "word", "Find a synonym of the word\nword"),
        ("", "Hello", "Hello"),
    ],
)
def test_input_is_appended_unless_the_prompt_ends_with_it(
    prompt: str, more: str, expected: str
) -> None:
    assert form_of(PLAIN).read(PLAIN | {"prompt": prompt, "input": more}).prompt == expected


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_empty_values_count_as_missing_columns(empty: Any) -> None:
    assert is_absent(empty)
    names = ("system", "input", "history", "images", "question", "messages", "context")
    record = PLAIN | dict.fromkeys(names, empty)
    [[[found], ties]] = pairs_of(record)
    assert ({key: found[key] for key in FIELDS}, ties) == (PLAIN, 0)


def test_blank_system_column_counts_as_missing() -> None:
    [[[found], _]] = pairs_of(PLAIN | {"system": " \n", "history": [["a", "b"]]})
    assert found["prompt"] == [user("a"), {"role": "assistant", "content": "b"}, user("Why?")]


@pytest.mark.parametrize("name", ["system", "input", "weight", "preference"])
def test_empty_cells_of_a_column_that_is_read_are_not_kept(name: str) -> None:
    raw = form_of(PLAIN).read(PLAIN | {name: "", "note": ""})
    assert check(raw).columns == {"note": ""}


@pytest.mark.parametrize(
    "name",
    [
        *("image", "images", "video", "videos", "audio", "audios"),
        *("image_path", "image_urls", "img", "img_base64", "video_file", "pixel_values"),
    ],
)
def test_record_with_media_is_bad(name: str) -> None:
    with pytest.raises(BadRecord, match=f"'{name}' has a value, expected text only") as caught:
        pairs_of(PLAIN | {name: ["a.png"]})
    assert caught.value.reason == "not_text"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("documents", [{"title": "Eggs", "text": "Boil them."}]),
        ("functions", '[{"name": "look"}]'),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_record_with_more_for_the_chat_template_is_bad(name: str, value: Any) -> None:
    with pytest.raises(BadRecord, match=f"'{name}' has a value, which is not supported") as caught:
        pairs_of(PLAIN | {name: value})
    assert caught.value.reason == "unread"
    known = Known(Context(input=name), named=frozenset({"input"}))
    raw = recognize(Path("x.jsonl"), [PLAIN], known).read(PLAIN | {name: "More."})
    assert raw.prompt == "Why?\nMore."
    harmless: list[Any] = [3, False, "sort", [], {"enable_thinking": None}]
    for each in harmless:
        assert pairs_of(PLAIN | {name: each})


def test_part_that_is_not_text_is_named() -> None:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": "x"}]
    with pytest.raises(BadRecord, match="'prompt' has a part of type 'image_url'") as caught:
        pairs_of(PLAIN | {"prompt": [user("") | {"content": parts}]})
    assert caught.value.reason == "not_text"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"system": 3}, "'system' is not a string"),
        ({"history": ["q", "a"]}, "'history' is not a list of .question, answer. lists"),
        ({"history": [["q"]]}, "'history' is not a list of .question, answer. lists"),
        ({"history": [["q", None]]}, "'history' is not a list of .question, answer. lists"),
        ({"input": ["x"]}, "'input' and 'prompt' are not both strings"),
        ({"tools": "look_up"}, "'tools' is a string that is not JSON"),
    ],
)
def test_context_column_of_the_wrong_type_is_bad(change: Record, sentence: str) -> None:
    with pytest.raises(BadRecord, match=sentence) as caught:
        check(form_of(PLAIN).read(PLAIN | change))
    assert caught.value.reason == "wrong_type"


# --- verdicts, ranks and scores --------------------------------------------------------------

TWO = {"prompt": "Why?", "response_0": "A.", "response_1": "B."}


@pytest.mark.parametrize(("value", "chosen"), [(0, "A."), (1, "B."), (1.0, "B."), ("0", "A.")])
def test_verdict_may_be_a_number_or_a_text(value: Any, chosen: str) -> None:
    [[[found], _]] = pairs_of(TWO | {"better_response_id": value})
    assert found["chosen"] == chosen


@pytest.mark.parametrize(
    ("value", "shown"),
    [(2, "2"), (-1, "-1"), (True, "true"), ("A", '"A"'), ([0], "[0]")],
)
@pytest.mark.parametrize("place", [2, 200])
def test_verdict_without_a_meaning_is_an_error_and_is_named(
    tmp_path: Path, place: int, value: Any, shown: str
) -> None:
    records = [TWO | {"better_response_id": 0}] * (place - 1)
    path = write(tmp_path, *records, TWO | {"better_response_id": value})
    found = fault(raws, source_of(path))
    assert found == (
        f"{path}: line {place}: better_response_id is {shown}, "
        "expected 0 for the first answer, 1 for the second; "
        "declare other values in dataset.yaml (answers, verdict, first, second, tie)"
    )


@pytest.mark.parametrize(
    ("record", "inverted"),
    [
        ({"output_1": "A.", "output_2": "B.", "preference": 0}, "0"),
        ({"response1": "A.", "response2": "B.", "overall_preference": 4}, "4"),
        ({"response1": "A.", "response2": "B.", "overall_preference": -0.5}, "-0.5"),
        ({"human_ref_A": "A.", "human_ref_B": "B.", "labels": 2}, "2"),
    ],
)
def test_verdict_on_another_scale_is_an_error(record: Record, inverted: str) -> None:
    with pytest.raises(UnknownVerdict, match=f" is {inverted}, expected "):
        pairs_of({"prompt": "Why?"} | record)


def test_conversation_is_cut_after_the_turn_that_was_judged() -> None:
    """All rows of MT-Bench's human judgments have both turns."""
    record = {
        "conversation_a": [user("Why?"), answer("A."), user("So?"), answer("C.")],
        "conversation_b": [user("Why?"), answer("B."), user("So?"), answer("D.")],
        "winner": "model_b",
    }
    for turn, length in ((1, 2), ("1", 2), (1.0, 2), (2, 4), (3, 4), (None, 4)):
        [[[found], _]] = pairs_of(record | {"turn": turn})
        assert found["chosen"] == record["conversation_b"][:length]
        assert found["rejected"] == record["conversation_a"][:length]


def test_post_or_article_is_the_prompt_of_a_summary() -> None:
    record = {"summaries": [{"text": "A."}, {"text": "B."}], "choice": 1}
    articles = [record | {"info": {"article": "An article."}}] * 2
    for before in (0, 1, 120):
        posts = [record | {"info": {"post": "A post.", "article": None}}] * before
        form = recognize(Path("x.jsonl"), (posts + articles)[:100])
        assert [form.read(each).prompt for each in articles] == ["An article."] * 2


@pytest.mark.parametrize(
    ("verdict", "found"),
    [
        ({}, "is missing, found the keys prompt, response_0, response_1"),
        ({"better_response_id": None}, "is null"),
        ({"better_response_id": ""}, "is empty"),
        ({"better_response_id": " "}, "is empty"),
    ],
)
def test_missing_verdict_is_a_bad_record(verdict: Record, found: str) -> None:
    form = form_of(TWO | {"better_response_id": 0})
    with pytest.raises(BadRecord, match=f"^'better_response_id' {found}$") as caught:
        form.read(TWO | verdict)
    assert caught.value.reason == "missing_key"


@pytest.mark.parametrize("votes", [{}, {"votes": None}, {"votes": []}, {"votes": ""}])
def test_record_without_votes_has_no_verdict(votes: Record) -> None:
    record = {"instruction": "Why?", "response1": "A.", "response2": "B."}
    form = form_of(record | {"votes": [1, 2]})
    with pytest.raises(BadRecord, match=r"^'votes' has no value$") as caught:
        form.read(record | votes)
    assert caught.value.reason == "missing_key"


def test_empty_verdict_may_be_declared_a_tie() -> None:
    form = Judged("response_0", "response_1", "better", Meaning((0,), (1,), ("",)))
    assert form.compared(TWO | {"better": ""}).comparisons == [Comparison(0, 1, 0.5)]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (TWO | {"better_response_id": 0, "response_1": ""}, "response_1"),
        (TWO | {"better_response_id": 1, "response_1": ""}, "response_1"),
        ({"prompt": "Why?", "response_j": "A.", "response_k": ""}, "response_k"),
        ({"prompt": "Why?", "response1": "A.", "response2": "", "votes": [2]}, "response2"),
        ({"messages": [user("q"), answer("a")], "rejected_response": ""}, "rejected_response"),
        ({"prompt": "Why?", "chosen": ["A.", "B."], "rejected": ["C.", ""]}, "rejected"),
        (
            {"prompt": "Why?", "answer_0": "", "answer_1": "B.", "score_0": 1, "score_1": 2},
            "answer 1",
        ),
    ],
)
def test_empty_answer_is_named_by_its_column_or_place(record: Record, name: str) -> None:
    form = form_of({key: value or "B." for key, value in record.items()})
    with pytest.raises(BadRecord, match=f"^'{name}' is empty$"):
        check(form.read(record))


@pytest.mark.parametrize("item", ["C.", [answer("C.")]])
def test_null_in_a_list_of_answers_is_named(item: Any) -> None:
    record = {"prompt": "Why?", "chosen": ["A."], "rejected": [item, None]}
    with pytest.raises(BadRecord, match=r"^item 2 of 'rejected' is null$") as caught:
        pairs_of(record)
    assert caught.value.reason == "missing_key"


RANKED = {"prompt": "Why?", "answers": ["A.", "B.", "C."]}


@pytest.mark.parametrize(
    ("grades", "pairs", "ties"),
    [
        ({"ranks": [1, 2, 3]}, ["AB", "AC", "BC"], 0),
        ({"ranks": [3, 2, 1]}, ["BA", "CA", "CB"], 0),
        ({"ranks": [1, 1, 2]}, ["AC", "BC"], 1),
        ({"ranks": [2, 2, 2]}, [], 3),
        ({"scores": [0.5, 2, -1]}, ["BA", "AC", "BC"], 0),
    ],
)
def test_ranking_is_read_as_all_its_comparisons(
    grades: Record, pairs: list[str], ties: int
) -> None:
    [[found, tied]] = pairs_of(RANKED | grades)
    assert [pair["chosen"][0] + pair["rejected"][0] for pair in found] == pairs
    assert tied == ties


@pytest.mark.parametrize(
    "answers",
    [
        [answer("A."), answer("B.")],
        [[answer("A.")], [answer("B.")]],
        [{"from": "gpt", "value": "A."}, {"from": "gpt", "value": "B."}],
        [[user("Why?"), answer("A.")], [user("Why?"), answer("B.")]],
    ],
    ids=["message", "messages", "other keys", "conversations"],
)
def test_listed_answers_may_be_messages(answers: list[Any]) -> None:
    record = {"prompt": "Why?", "responses": answers, "scores": [1, 2]}
    pair = check(form_of(record).read(record))
    assert pair.prompt == (("user", "Why?"),)
    assert pair.answers == [(("assistant", "A."),), (("assistant", "B."),)]
    assert pair.comparisons == [Comparison(1, 0)]


def test_listed_conversations_need_no_prompt() -> None:
    first, second, third = ([user("Why?"), answer(text)] for text in ("A.", "B.", "C."))
    for record in (
        {"responses": [first, second, third], "ranks": [1, 2, 2]},
        {"chosen": [first], "rejected": [second, third]},
    ):
        pair = check(form_of(record).read(record))
        assert pair.prompt == (("user", "Why?"),)
        assert [*map(len, pair.answers)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ({"ranks": [0, 1, 2]}, "ranks has 0, expected whole numbers from 1"),
        ({"ranks": [1, 1.5, 2]}, "ranks has 1.5, expected whole numbers from 1"),
        ({"ranks": ["best", 2, 3]}, 'ranks has "best", expected'),
        ({"scores": [1, "N/A", 2]}, 'scores has "N/A", expected numbers'),
        ({"scores": [1, float("nan"), 2]}, "scores has NaN, expected numbers"),
    ],
)
def test_rank_or_score_without_a_meaning_is_an_error(grades: Record, message: str) -> None:
    with pytest.raises(UnknownVerdict, match=message):
        pairs_of(RANKED | grades)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ranks": [1, 2]}, "wrong_type"),
        ({"ranks": [1, 2, None]}, "missing_key"),
        ({"ranks": [1, 2, ""]}, "missing_key"),
        ({"answers": ["A."], "ranks": [1]}, "empty"),
    ],
)
def test_list_that_does_not_match_its_answers_is_a_bad_record(change: Record, reason: str) -> None:
    form = form_of(RANKED | {"ranks": [1, 2, 3]})
    with pytest.raises(BadRecord) as caught:
        form.read(RANKED | change)
    assert caught.value.reason == reason


def test_rating_is_named_by_its_column() -> None:
    record = {"prompt": "Why?", "answer_0": "A.", "answer_1": "B.", "score_0": 1, "score_1": 2}
    form = form_of(record)
    with pytest.raises(BadRecord, match=r"^'score_1' is empty$"):
        form.read(record | {"score_1": ""})
    with pytest.raises(UnknownVerdict, match=r'^score_1 has "good", expected numbers'):
        form.read(record | {"score_1": "good"})


def test_order_of_preference_is_read_as_all_comparisons() -> None:
    order = Listed(("answers",), "best_first")
    answers, _, comparisons = order.compared(RANKED)
    assert (answers, comparisons) == (
        ["A.", "B.", "C."],
        [Comparison(0, 1), Comparison(0, 2), Comparison(1, 2)],
    )


# --- preference, votes, weight and margin ----------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, Comparison(0, 1)),
        ({"preference": 0.7}, Comparison(0, 1, 0.7)),
        ({"preference": "0.25"}, Comparison(1, 0, 0.75)),
        ({"preference": 0}, Comparison(1, 0)),
        ({"preference": 0.5}, Comparison(0, 1, 0.5)),
        ({"preference": None}, Comparison(0, 1)),
        ({"votes": [3, 1]}, Comparison(0, 1, 0.75)),
        ({"votes": [1, 3]}, Comparison(1, 0, 0.75)),
        ({"votes": [2, 2]}, Comparison(0, 1, 0.5)),
        ({"votes": "[1, 3]"}, Comparison(1, 0, 0.75)),
        ({"preference": "2e-05"}, Comparison(1, 0, 1 - 2e-5)),
        ({"preference": " +.25 "}, Comparison(1, 0, 0.75)),
        ({"weight": 2, "margin": "1.5"}, Comparison(0, 1, 1, 2, 1.5)),
        ({"weight": 0}, Comparison(0, 1, 1, 0)),
        ({"weight": 1e-31}, Comparison(0, 1, 1, 0)),
        ({"weight": 1e-30, "margin": 1e15}, Comparison(0, 1, 1, 1e-30, 1e15)),
        ({"weight": "heavy", "margin": "wide", "preference": "yes"}, Comparison(0, 1)),
        ({"weight": True, "margin": False, "preference": True}, Comparison(0, 1)),
        ({"votes": 17}, Comparison(0, 1)),
    ],
)
def test_grading_columns_are_read(columns: Record, expected: Comparison) -> None:
    raw = form_of(PLAIN | columns).read(PLAIN | columns)
    assert raw.comparisons == [expected]
    assert raw.answers == ["Because.", "No."]
    kept = columns.keys() & raw.columns.keys()
    assert kept == (columns.keys() if expected == Comparison(0, 1) else set())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"preference": 2}, "preference is 2, expected a number from 0 to 1"),
        ({"preference": -0.1}, "preference is -0.1, expected a number from 0 to 1"),
        (
            {"margin": -1},
            "margin is -1, expected a number from 0 to 1e15 (if it means something else, ",
        ),
        ({"weight": float("inf")}, "weight is Infinity, expected a number from 0 to 1e15"),
        ({"weight": 1e16}, "weight is 1e+16, expected a number from 0 to 1e15"),
        ({"margin": 1e16}, "margin is 1e+16, expected a number from 0 to 1e15"),
        ({"votes": [0, 0]}, "votes is [0, 0], expected two whole numbers, the votes for each"),
        ({"votes": [1.5, 1]}, "votes is [1.5, 1], expected two whole numbers"),
        ({"votes": [float("inf"), 1]}, "votes is [Infinity, 1], expected two whole numbers"),
        ({"votes": [1, 2, 3]}, "votes is [1, 2, 3], expected two whole numbers"),
        ({"preference": "25%"}, 'preference is "25%", expected a number from 0 to 1'),
        ({"preference": "0,25"}, 'preference is "0,25", expected a number from 0 to 1'),
    ],
)
def test_grade_without_a_meaning_is_an_error(columns: Record, message: str) -> None:
    with pytest.raises(UnknownVerdict) as caught:
        pairs_of(PLAIN | columns)
    assert str(caught.value).startswith(message)


def test_grades_that_first_appear_late_are_used() -> None:
    form = form_of(PLAIN)
    assert form.read(PLAIN | {"weight": 3}).comparisons == [Comparison(0, 1, weight=3)]
    assert form.read(PLAIN | {"votes": [1, 3]}).comparisons == [Comparison(1, 0, 0.75)]
    assert form.read(PLAIN | {"preference": 0.25}).comparisons == [Comparison(1, 0, 0.75)]
    with pytest.raises(UnknownVerdict, match='weight is "heavy", expected'):
        form.read(PLAIN | {"weight": "heavy"})
    with pytest.raises(UnknownVerdict, match=r"votes is 17, .* write votes: null"):
        form.read(PLAIN | {"votes": 17})


@pytest.mark.parametrize("odd", ["n/a", "much", [1]])
@pytest.mark.parametrize("name", ["preference", "weight", "margin"])
def test_one_value_that_is_not_a_number_does_not_hide_the_others(name: str, odd: Any) -> None:
    form = form_of(*(PLAIN | {name: value} for value in (0, odd, 1)))
    [found] = form.read(PLAIN | {name: 1}).comparisons
    assert getattr(found, name) == 1
    with pytest.raises(UnknownVerdict, match=f"^{name} is "):
        form.read(PLAIN | {name: odd})


def test_votes_of_a_continued_conversation_are_read() -> None:
    record = {"messages": [user("q"), answer("a")], "rejected_response": "b", "votes": [1, 3]}
    assert form_of(record).read(record).comparisons == [Comparison(1, 0, 0.75)]


@pytest.mark.parametrize("last", [[], [user("q")], [user("q"), {"text": "a"}]])
def test_conversation_without_its_answer_is_bad(last: list[Record]) -> None:
    record = {"messages": [user("q"), answer("a")], "rejected_response": "b"}
    with pytest.raises(BadRecord, match="'messages' does not end with an assistant message"):
        form_of(record).read(record | {"messages": last})


@pytest.mark.parametrize("columns", [{"preference": 0.9}, {"votes": [2, 1]}, {"preference": 0.5}])
def test_margin_of_an_uncertain_pair_is_bad(columns: Record) -> None:
    with pytest.raises(BadRecord, match="'margin' is 1, but no answer is certainly") as caught:
        pairs_of(PLAIN | columns | {"margin": 1})
    assert caught.value.reason == "unsure_margin"
    assert form_of(PLAIN | columns).read(PLAIN | columns | {"margin": 0}).comparisons


def test_weight_of_a_ranking_applies_to_every_comparison() -> None:
    record = RANKED | {"ranks": [2, 1, 1], "weight": 2}
    assert form_of(record).read(record).comparisons == [
        Comparison(1, 0, weight=2),
        Comparison(2, 0, weight=2),
        Comparison(1, 2, 0.5, 2),
    ]


def test_preference_in_alpaca_farm_is_the_number_of_an_answer() -> None:
    record = {"prompt": "Why?", "output_1": "A.", "output_2": "B.", "preference": 1, "weight": 2}
    assert form_of(record).read(record).comparisons == [Comparison(0, 1, weight=2)]


# --- whole texts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is red.", "The sky is"),
        ("Is it so? Yes", "Is it so? Yes, it is", "Is it so?"),
        ("Name it.\nBee", "Name it.\nBeetle", "Name it."),
        ("好吗？很好！", "好吗？很差。", "好吗？"),
        ("他说：“好。”对。", "他说：“好。”错。", "他说：“好。”"),
        ("茶叶放在冰箱", "茶叶放在太阳", "茶叶放在"),
        ("用Python写", "用Perl写", "用"),
        ("하늘은 파란색이다.", "하늘은 파랑새다.", "하늘은"),
        ("山か\u3099赤い", "山か青い", "山"),
    ],
)
def test_texts_are_split_after_the_last_shared_word(
    chosen: str, rejected: str, prompt: str
) -> None:
    [[[found], _]] = pairs_of({"chosen": chosen, "rejected": rejected})
    assert found["prompt"] == prompt
    assert found["prompt"] + found["chosen"] == chosen
    assert found["prompt"] + found["rejected"] == rejected
    assert found["chosen"].strip()


def test_text_with_another_beginning_is_a_bad_record() -> None:
    form = form_of({"chosen": "It is blue.", "rejected": "It is red."})
    with pytest.raises(BadRecord, match="the answers begin differently") as caught:
        form.read({"chosen": "Blue.", "rejected": "Red."})
    assert caught.value.reason == "missing_key"


def test_text_without_turns_in_a_file_with_turns_is_a_bad_record() -> None:
    turns = {key: f"\n\nHuman: q\n\nAssistant: {key}" for key in ("chosen", "rejected")}
    with pytest.raises(BadRecord, match="'rejected' has no Human: and Assistant: turns"):
        form_of(turns).read(turns | {"rejected": "no"})


def test_few_texts_without_turns_do_not_decide_the_form() -> None:
    turns = {key: f"\n\nHuman: q\n\nAssistant: {key}" for key in ("chosen", "rejected")}
    form = form_of(turns, {"chosen": "It is blue.", "rejected": "It is red."}, turns)
    assert as_pairs(form.read(turns))[0]["chosen"] == [user("q"), answer("chosen")]


@pytest.mark.parametrize(
    "asked",
    [
        ["How many bees?", "How many bees?", "How many ants?", "How many ants?"],
        [[user(f"How many bees in hive {n}?")] for n in range(4)],
    ],
)
def test_prompt_of_unknown_name_is_not_replaced_by_a_common_beginning(asked: list[Any]) -> None:
    records = [
        {"asked": each, "chosen": f"<think>\nHm {n}", "rejected": f"<think>\nOh {n}"}
        for n, each in enumerate(asked)
    ]
    assert "none of the columns asked, chosen, rejected is" in fault(form_of, *records)
    same = [record | {"asked": "Answer as a poet."} for record in records]
    assert form_of(*same).whole == "words"
    known = Known(named=frozenset({"prompt"}))
    assert recognize(Path("x.jsonl"), records, known).whole == "words"


def test_accidental_beginnings_are_not_taken_for_prompts() -> None:
    """Answers to 12 prompts begin in 16 ways, which have nothing to do with the prompts."""
    records = []
    for n in range(96):
        start = f"<think>\nOkay, the user {['asks', 'wants', 'needs', 'has'][n % 4]} {n // 4 % 4} "
        pair = {"chosen": f"{start}a{n}", "rejected": f"{start}b{n}"}
        records.append(pair | {"asked": f"Please answer question {n // 8}."})
    message = fault(form_of, *records)
    assert message.endswith(
        "x.jsonl: {prompt: asked, chosen: chosen, rejected: rejected} or "
        "x.jsonl: {prompt: null, chosen: chosen, rejected: rejected}"
    )


def test_names_are_not_taken_for_prompts() -> None:
    records = [
        {"model": f"an-organisation/model-{n % 3}", "chosen": f"{n // 4} is even. Yes, {n}."}
        for n in range(40)
    ]
    for record in records:
        record["rejected"] = record["chosen"].replace("Yes", "No")
    assert form_of(*records).whole == "words"


@pytest.mark.parametrize("role", ["developer", 3, ["a"]])
def test_messages_with_an_unknown_role_are_not_read_as_text(role: Any) -> None:
    odd = json.dumps([{"role": role, "content": "Be kind."}, user("q")])
    assert f"x.jsonl: prompt {ENCODED}" in fault(form_of, PLAIN | {"prompt": odd})
    form_of(PLAIN | {"chosen": '{"from": ["Paris"], "value": 3}'})


@pytest.mark.parametrize("kinds", [1, 12])
def test_column_with_fewer_values_than_prompts_is_not_the_prompt(kinds: int) -> None:
    records = [
        {"kind": f"a kind of question, number {n % kinds}", "chosen": f"What is {n}? It is {n}."}
        for n in range(50)
    ]
    for record in records:
        record["rejected"] = record["chosen"].split("?")[0] + "? No."
    assert form_of(*records).whole == "words"


def test_prompt_of_helpsteer_with_several_turns_is_parsed() -> None:
    prompt = "Hi.\n<extra_id_1>Assistant\nHello!\n\n<extra_id_1>User\nWhy?"
    record = {"prompt": prompt, "response_1": "A.", "response_2": "B.", "preference_strength": 1}
    [[[found], _]] = pairs_of(record)
    assert found["prompt"] == [user("Hi."), answer("Hello!\n"), user("Why?")]
    [[[found], _]] = pairs_of(record | {"prompt": "Hi."})
    assert found["prompt"] == "Hi."


def test_prompt_of_nemo_aligner_becomes_messages() -> None:
    marks = "<extra_id_0>System\n{}\n<extra_id_1>User\nHi.\n<extra_id_1>Assistant\nHello!\n"
    marks += "<extra_id_1>User\nWhy?\n<extra_id_1>Assistant\n"
    for words, before in (("", []), ("Be brief.", [system("Be brief.")])):
        record = {"prompt": marks.format(words), "chosen_response": "A.", "rejected_response": "B."}
        [[[found], _]] = pairs_of(record)
        assert found["prompt"] == [*before, user("Hi."), answer("Hello!"), user("Why?")]


def test_dialogue_under_the_canonical_names_stays_a_text() -> None:
    """As in score files, whose records have these names."""
    prompt = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
    record = {"prompt": prompt, "chosen": " Because.", "rejected": " No."}
    assert pairs_of(record) == [([record], 0)]
    assert as_scored(record) == candidates(record)


def test_dialogues_without_a_prompt_are_scored_as_they_are_trained() -> None:
    head = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
    record = {"chosen": f"{head} Because.", "rejected": f"{head} No."}
    assert as_scored(record) == candidates(record)
    assert candidates(record).prompt == (("user", "Hi."), ("assistant", "Hello!"), ("user", "Why?"))


def as_scored(record: dict[str, Any]) -> Candidates:
    """The prompt and the answers of a record as preprocess reads them."""
    read = check(form_of(record).read(record))
    return Candidates(read.prompt, read.answers)


def test_column_whose_name_has_a_dot_is_read_and_not_kept() -> None:
    names = ("a.text", "b.text", "best.label")
    meaning = Meaning(("A",), ("B",))
    known = Known(Context("ask.text"), Judged(*names, meaning), named=frozenset({"prompt"}))
    record = dict(zip(("ask.text", *names), ("Why?", "Yes.", "No.", "B"), strict=True))
    raw = recognize(Path("x.jsonl"), [record], known).read(record)
    assert (raw.prompt, raw.answers, raw.columns) == ("Why?", ["No.", "Yes."], {})


@pytest.mark.parametrize(
    "value",
    [[user("q")], user("q"), {"from": "gpt", "value": "q"}],
    ids=["messages", "message", "other keys"],
)
@pytest.mark.parametrize("name", ["prompt", "chosen"])
def test_column_of_messages_as_json_texts_is_refused(name: str, value: Any) -> None:
    records = [PLAIN | {name: json.dumps(value)}, PLAIN | {name: f" {json.dumps(value)}"}]
    assert fault(form_of, *records).startswith(f"x.jsonl: {name} {ENCODED}")
    form_of(*records, PLAIN)  # some of them may be what somebody wrote


@pytest.mark.parametrize(
    "text",
    [
        str([user("q"), answer("it's")]),
        str(np.array([user("q"), answer("a")], dtype=object)),
        str([{"from": "human", "value": "q"}]),
        str({"content": "q", "role": "user"}),
    ],
    ids=["Python", "NumPy", "other keys", "message"],
)
@pytest.mark.parametrize("name", ["prompt", "chosen"])
def test_column_of_messages_as_python_prints_them_is_refused(name: str, text: str) -> None:
    records = [PLAIN | {name: text}, PLAIN | {name: f" {text}"}]
    assert fault(form_of, *records).startswith(f"x.jsonl: {name} {ENCODED}")
    form_of(*records, PLAIN)


def test_conversations_as_python_prints_them_are_refused_beside_other_columns() -> None:
    both = {name: str([user("q"), answer(name)]) for name in ("chosen", "rejected")}
    for others in ({}, {"why": "It is a better answer."}):
        assert f"x.jsonl: chosen {ENCODED}" in fault(form_of, both | others)


def test_answers_may_be_json() -> None:
    records = [PLAIN | {"chosen": '["Paris", "Rome"]', "rejected": '{"from": "USD", "value": 3}'}]
    assert as_pairs(form_of(*records).read(records[0]))[0]["chosen"] == '["Paris", "Rome"]'
    turns = [PLAIN | {"prompt": '["turn 1", "turn 2"]'}]
    assert fault(form_of, *turns).startswith(f"x.jsonl: prompt {ENCODED}")
    form_of(PLAIN | {"prompt": "[1, 2]"}, PLAIN | {"prompt": "[broken"})
    form_of(PLAIN | {"chosen": "{'from': 'USD', 'value': 3}"})


LONG = "Tell me about the cat"


def test_answer_without_the_prompt_in_a_file_that_repeats_it_is_a_bad_record() -> None:
    repeated = {"prompt": LONG, "chosen": f"{LONG}: A.", "rejected": f"{LONG}: B."}
    with pytest.raises(BadRecord, match="'chosen' does not begin with the prompt"):
        form_of(repeated).read(repeated | {"chosen": "A."})


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Hello", "Hello! How can I help?", "Hello."),
        ("你好", "你好！有什么可以帮你？", "你好。"),
    ],
)
def test_answers_that_begin_with_the_prompt_by_chance_stay_whole(
    prompt: str, chosen: str, rejected: str
) -> None:
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert form_of(record).whole == ""
    found = check(form_of(record).read(record))
    assert [text for [[_, text]] in found.answers] == [chosen, rejected]


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        ("\n\nHuman: Why?\n\nAssistant:", "the turns of the answers lack the prompt"),
        ("It is", "'chosen' does not begin with the prompt"),
    ],
)
def test_own_prompt_is_not_ignored_in_a_file_of_whole_texts(start: str, sentence: str) -> None:
    whole = {"chosen": f"{start} fine.", "rejected": f"{start} bad."}
    form = form_of(whole)
    assert form.whole
    with pytest.raises(BadRecord, match=sentence):
        form.read(whole | {"prompt": "What about this?"})
    expected = check(form.read(whole))
    for own in (start, *([" Why?", [user("Why?")]] if form.whole == "turns" else [])):
        found = check(form.read(whole | {"prompt": own}))
        assert (found.prompt, found.answers) == (expected.prompt, expected.answers)


def test_repeated_prompt_in_turns_is_parsed_once() -> None:
    prompt = "\n\nHuman: Why?\n\nAssistant:"
    record = {"prompt": prompt, "chosen": f"{prompt} A.", "rejected": f"{prompt} B."}
    [[[found], _]] = pairs_of(record)
    assert found == {"prompt": [user("Why?")], "chosen": "A.", "rejected": "B."}


# --- unknown forms ---------------------------------------------------------------------------

# Their messages are tested in tests/test_bad.py.
UNKNOWN: dict[str, Any] = YAML(typ="safe").load(Path(__file__).parent / "bad" / "forms.yaml")


@pytest.mark.parametrize("name", UNKNOWN)
def test_suggested_entry_without_placeholders_can_be_copied(tmp_path: Path, name: str) -> None:
    """The suggested entry is valid, and the record can be read with it."""
    entry = UNKNOWN[name].get("entry", "COLUMN").partition(" or x.jsonl: ")[0]
    if any(gap in entry for gap in ("COLUMN", "VALUE", "KEY")):
        return
    (tmp_path / "dataset.yaml").write_text(entry, encoding="utf-8")
    record = UNKNOWN[name]["record"]
    source = source_of(write(tmp_path, record))
    assert [*map(check, raws(source))]


def test_message_for_a_single_file_names_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "Where is it?", "answer": "It is here."})
    advice = f"; set preprocess.data to {tmp_path} and write in {tmp_path}/dataset.yaml: "
    assert advice in fault(sources, path)
    assert f"; write in {tmp_path}/dataset.yaml: " in fault(sources, tmp_path)


def test_table_without_a_header_is_described_by_the_beginnings_of_its_cells(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"{'Why? ' * 2000},{'Because. ' * 2000},No.\n" * 2)
    message = fault(source_of, path)
    assert "..., No. (the first row is read as the header) match no known format" in message
    assert len(message) < 600


def test_only_the_first_of_many_names_are_given(tmp_path: Path) -> None:
    many = {f"column {number}": 1 for number in range(1000)}
    shown = f"{', '.join([*many][:20])} and 980 more"
    assert f"the columns {shown} match no known format" in fault(source_of, write(tmp_path, many))
    with pytest.raises(BadRecord, match=r"'chosen' is missing, found the keys .* and 980 more$"):
        check(many)


def test_recognition_looks_at_the_first_hundred_records(tmp_path: Path) -> None:
    empty = {"prompt": "Why?", "chosen": None, "rejected": None}
    path = write(tmp_path, *[empty] * 99, PLAIN)
    assert source_of(path).form.description == "prompt, chosen and rejected"
    path = write(tmp_path, *[empty] * 100, PLAIN)
    message = "chosen and rejected are empty in the first 100 records"
    assert message in fault(source_of, path)


@pytest.mark.parametrize(
    ("columns", "entry"),
    [
        (("dispreferred", "preferred"), "chosen: preferred, rejected: dispreferred"),
        (("less_preferred", "more_preferred"), "chosen: more_preferred, rejected: less_preferred"),
        (("not_accepted", "accepted"), "chosen: accepted, rejected: not_accepted"),
        (("unaccepted", "b"), "chosen: COLUMN, rejected: unaccepted"),
        (("bad", "good"), "chosen: good, rejected: bad"),
    ],
)
def test_suggestion_does_not_invert_the_verdict(columns: tuple[str, str], entry: str) -> None:
    texts = dict.fromkeys(columns, "An answer in words.")
    for names in (columns, columns[::-1]):
        message = fault(form_of, {"prompt": "Why?"} | {name: texts[name] for name in names})
        assert message.endswith(f"{{prompt: prompt, {entry}}}")


def test_suggestion_prefers_answers_to_comments_on_them() -> None:
    names = ("feedback_A", "feedback_B", "response_A", "response_B")
    record = {"instruction": "Why?", "best": "A"} | dict.fromkeys(names, "Words, and more words.")
    assert "answers: [response_A, response_B]" in fault(form_of, record)


def test_prompt_of_whole_conversations_may_be_null(tmp_path: Path) -> None:
    """In Capybara-DPO, the column prompt is not the first turn of the conversations."""
    turns = [user("Hello."), answer("Hi!"), user("Why?")]
    record = {
        "prompt": "Why?",
        "conversation": [{"input": "Hello.", "output": "Hi!"}],
        "chosen": [*turns, answer("Because.")],
        "rejected": [*turns, answer("No.")],
    }
    path = write(tmp_path, record)
    assert fault(source_of, path).endswith(" or x.jsonl: {prompt: null}")
    (tmp_path / "dataset.yaml").write_text("x.jsonl: {prompt: null}\n", encoding="utf-8")
    [[found], _] = read_all(source_of(path))
    assert found["chosen"] == record["chosen"]


def test_answers_of_the_assistant_alone_are_no_conversations() -> None:
    record = {"context_messages": [user("Why?")]}
    record |= {"chosen": [answer("Because.")], "rejected": [answer("No.")]}
    assert "{prompt: context_messages, chosen: chosen, rejected" in fault(form_of, record)


def test_columns_that_begin_within_an_answer_are_not_taken_for_it() -> None:
    whole = {f"full_{name}": f"First, think. {PLAIN[name]}" for name in ("chosen", "rejected")}
    message = fault(form_of, PLAIN | whole)
    assert "can be read as chosen and rejected or as full_chosen and full_rejected" in message


def test_earlier_turns_that_the_prompt_repeats_are_used_once() -> None:
    earlier = [user("Hi."), answer("Hello!")]
    for name in ("history", "chat_history", "conversation_history"):
        for first in ([], [system("s")]):
            whole = [*first, *earlier, user("Why?")]
            [[[found], _]] = pairs_of(PLAIN | {"prompt": whole, name: earlier})
            assert found["prompt"] == whole
            both = {key: [*whole, answer(PLAIN[key])] for key in ("chosen", "rejected")}
            [[[found], _]] = pairs_of(both | {name: earlier})
            assert found["chosen"] == both["chosen"]


def test_earlier_turns_go_after_the_system_message_of_the_prompt() -> None:
    record = PLAIN | {"prompt": [system("s"), user("Why?")], "history": [["Hi.", "Hello!"]]}
    [[[found], _]] = pairs_of(record)
    assert found["prompt"] == [system("s"), user("Hi."), answer("Hello!"), user("Why?")]


@pytest.mark.parametrize("key", ["system", "history"])
def test_message_about_a_column_before_the_prompt_says_how_to_leave_it_out(
    tmp_path: Path, key: str
) -> None:
    record = PLAIN | {f"{key}_message" if key == "system" else f"chat_{key}": {"a": 1}}
    with pytest.raises(BadRecord, match=rf"write {key}: null in dataset.yaml"):
        pairs_of(record)
    path = write(tmp_path, record)
    (tmp_path / "dataset.yaml").write_text(f"x.jsonl: {{{key}: null}}\n", encoding="utf-8")
    [[found], _] = read_all(source_of(path))
    assert found["prompt"] == "Why?"


def test_tools_may_be_beside_the_messages_or_in_their_own_column() -> None:
    tools = [{"name": "look"}]
    answers = {"preferred_output": [answer("A.")], "non_preferred_output": [answer("B.")]}
    prompt = {"messages": [user("Why?")]}
    for own in ({"input": prompt | {"tools": tools}}, {"input": prompt, "tools": tools}):
        record = own | answers
        assert form_of(record).read(record).columns["tools"] == tools


def test_answers_without_their_prompt_are_bad_records_among_conversations(tmp_path: Path) -> None:
    good = {"chosen": [user("Why?"), answer("A.")], "rejected": [user("Why?"), answer("B.")]}
    bad = {"chosen": [answer("A.")], "rejected": [answer("B.")]}
    *first, last = raws(source_of(write(tmp_path, good, good, bad)))
    assert [check(each).prompt for each in first] == [(("user", "Why?"),)] * 2
    with pytest.raises(BadRecord, match="'prompt' is missing"):
        check(last)


DIALOGUES = [
    "\n\nHuman: Why?\n\nAssistant:",
    "<extra_id_0>System\n\n<extra_id_1>User\nWhy?\n<extra_id_1>Assistant\n",
]


@pytest.mark.parametrize("prompt", DIALOGUES)
def test_answers_of_some_records_may_repeat_a_prompt_with_turns(prompt: str) -> None:
    plain = {"prompt": prompt, "chosen_response": "A.", "rejected_response": "B."}
    whole = plain | {"chosen_response": f"{prompt}A.", "rejected_response": f"{prompt}B."}
    for [[found], _] in pairs_of(plain, whole):
        assert found == {"prompt": [user("Why?")], "chosen": "A.", "rejected": "B."}


@pytest.mark.parametrize("prompt", DIALOGUES)
def test_conversations_may_begin_with_a_prompt_with_turns_as_one_message(prompt: str) -> None:
    """As in UltraFeedback, whose prompts from FLAN have such turns."""
    record = {"prompt": prompt, "chosen": [user(prompt), answer("A.")]}
    record |= {"rejected": [user(prompt), answer("B.")]}
    found = check(form_of(record).read(record))
    assert found.prompt == (("user", prompt),)
    assert found.answers == [(("assistant", "A."),), (("assistant", "B."),)]


@pytest.mark.parametrize("text", [{}, {"text": None}, {"text": 3}])
def test_part_without_a_text_is_bad(text: Record) -> None:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "text"} | text]
    with pytest.raises(BadRecord):
        check(form_of(PLAIN).read(PLAIN | {"prompt": [user("") | {"content": parts}]}))


def test_function_is_a_tool() -> None:
    spoken = [user("q"), answer("a"), {"role": "function", "content": "o"}]
    [[[found], _]] = pairs_of({"messages": spoken, "chosen": "c", "rejected": "r"})
    assert found["prompt"][-1] == {"role": "tool", "content": "o"}
