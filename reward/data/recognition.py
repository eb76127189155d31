"""Which form a file has: known columns with the values that they should have, or a Fault.

A form is a full set of columns. What could be read in two ways is refused with the entry of
dataset.yaml that decides it, because an inverted verdict would be trained on in silence.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reward.data.dialogue import are_messages, has_turns, shared_start, spelling
from reward.data.forms import (
    CANONICAL,
    WHOLES,
    Answers,
    Context,
    Continued,
    Form,
    Judged,
    Listed,
    Meaning,
    Order,
    Preferred,
    Record,
    Whole,
    is_absent,
    repeats,
    top,
    value_at,
)
from reward.process import Fault

HEAD = 100
MAPPING = "dataset.yaml"
COLUMN, VALUE, KEY = "COLUMN", "VALUE", "KEY"

# The prompt's names: those of texts, those of messages, and those of either.
TEXTS = ("question", "instruction", "query", "post")
CONVERSATIONS = ("messages", "conversations", "conversation", "context", "dialogue")
PROMPTS = ("prompt", *TEXTS, *CONVERSATIONS, "history", "input")

PREFERRED = (
    CANONICAL,
    Preferred("response_chosen", "response_rejected"),
    Preferred("chosen_response", "rejected_response"),
    Preferred("response_j", "response_k"),
    Preferred("chosen_messages", "rejected_messages"),
)
# Of ms-swift: the conversation whole with its answer, and the other answer.
CONTINUED: tuple[Answers, ...] = (
    Continued("messages", "rejected_response"),
    Preferred("messages", "rejected_messages"),
)
STRENGTH = Meaning((-3, -2, -1), (1, 2, 3), (0,))
WINNER = Meaning(("model_a",), ("model_b",), ("tie", "tie (bothbad)", "both_bad"))
JUDGED = (
    # PKU-SafeRLHF
    Judged("response_0", "response_1", "better_response_id", Meaning((0,), (1,))),
    # AlpacaFarm
    Judged("output_1", "output_2", "preference", Meaning((1,), (2,))),
    # HelpSteer3 and HelpSteer2
    Judged("response1", "response2", "overall_preference", STRENGTH),
    Judged("response_1", "response_2", "preference_strength", STRENGTH),
    # Stanford Human Preferences
    Judged("human_ref_A", "human_ref_B", "labels", Meaning((1,), (0,))),
    # summarize_from_feedback
    Judged("summaries[0].text", "summaries[1].text", "choice", Meaning((0,), (1,))),
    # Chatbot Arena
    Judged("conversation_a", "conversation_b", "winner", WINNER),
)
# WebGPT comparisons
SCORED = (Listed(("answer_0", "answer_1"), "scores", ("score_0", "score_1")),)
# Lists of answers: their names, the text in an answer that is an object, and what ranks it.
LISTS = ("answers", "completions", "responses")
ANSWER = ("answer", "response", "completion", "text", "content", "output")
WORTHS: dict[Order, tuple[str, ...]] = {
    "ranks": ("rank", "ranks"),
    "scores": ("score", "scores", "overall_score", "rating", "ratings", "pm_score"),
}

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Known:
    """What dataset.yaml says of a file's columns; what it leaves out is recognized."""

    context: Context | None = None
    answers: Answers | None = None
    named: frozenset[str] = frozenset()


def recognize(path: Path, records: list[Any], known: Known = Known(), alone: bool = False) -> Form:
    """The form of the file `path` by its first records.

    `alone` says that it is not one of a folder's. Raises a Fault for a form that is not known, or
    could be read in two ways.
    """
    objects = [record for record in records if isinstance(record, dict)]
    columns = columns_of(objects)
    if not columns and not known.answers:
        return Form(Context("prompt"), CANONICAL, said=CANONICAL.said)
    place = f"{path}: "
    folder = f" (and the folder {path.parent} in params.yaml)" if alone else ""
    advice = f"expected in {path.parent / MAPPING}{folder}"
    answers = known.answers or _answers(columns, place, advice, path.name)
    context = _context(columns, answers, known, place, advice, path.name)
    whole = _whole(objects, context, answers)
    if context.prompt is None and not whole and not _hold_conversations(objects, answers):
        entry = {"prompt": COLUMN} | entry_of(answers)
        raise Fault(
            f"{place}no column of {_names(columns)} is the prompt of {answers.said}; "
            f"{advice}: {flow(path.name, _guessed_prompt(columns, entry))}"
        )
    if context.prompt is None and answers == CANONICAL:
        context = replace(context, prompt="prompt")
    form = Form(context, answers, whole)
    return replace(form, said=_said(form, columns))


def columns_of(records: Iterable[Record]) -> Columns:
    """The values of each column, without those that are as good as absent."""
    columns: Columns = {}
    for record in records:
        for name, value in record.items():
            if not is_absent(value):
                columns.setdefault(name, []).append(value)
    return columns


# --- the answers -----------------------------------------------------------------------------


def _answers(columns: Columns, place: str, advice: str, name: str) -> Answers:
    """The answers of the only form that the columns have. Raises a Fault for none and for two."""
    known: tuple[Answers, ...] = (*PREFERRED, *JUDGED, *SCORED)
    found = [form for form in known if _is_complete(form, columns)]
    if not found:
        found = [form for form in CONTINUED if _is_complete(form, columns)][:1]
    found += _lists(columns)
    if len(found) == 1:
        return found[0]
    if found:
        ways = " or as ".join(form.said for form in found)
        entries = " or ".join(flow(name, entry_of(form)) for form in dict.fromkeys(found[:2]))
        raise Fault(f"{place}can be read as {ways}; {advice}: {entries}")
    if _is_unpaired(columns):
        raise Fault(
            f"{place}the columns {_names(columns)} are single completions with a label (KTO), "
            "which are no pairs: nothing compares two answers; expected a chosen and a rejected "
            "answer to each prompt"
        )
    raise Fault(_unknown(columns, place, advice, name))


def _is_complete(form: Answers, columns: Columns) -> bool:
    """Whether all columns of a form are there, its conversations being messages."""
    paths = [*form.columns]
    if isinstance(form, Judged):
        paths.append(form.verdict)
    if isinstance(form, Listed):
        paths += form.worths
    names = {top(path) for path in paths}
    if not names <= columns.keys():
        return False
    lists = names & {*CONVERSATIONS, "conversation_a", "conversation_b"}
    return all(are_messages(value) for each in lists for value in columns[each])


def _lists(columns: Columns) -> list[Answers]:
    """The forms that a list of answers has, one for each column that ranks it."""
    found: list[Answers] = []
    for name in LISTS:
        values = columns.get(name, [])
        if not values or not all(isinstance(value, list) for value in values):
            continue
        items = [item for value in values for item in value]
        if all(isinstance(item, dict) for item in items):
            inside = columns_of(items)
            texts = [key for key in ANSWER if _are_texts(inside.get(key, []))]
            if len(texts) == 1:
                found += [
                    Listed((f"{name}[].{texts[0]}",), order, (f"{name}[].{key}",))
                    for order, keys in WORTHS.items()
                    for key in keys
                    if key in inside
                ]
        elif _are_texts(items):
            found += [
                Listed((name,), order, (key,))
                for order, keys in WORTHS.items()
                for key in keys
                if all(isinstance(value, list) for value in columns.get(key, [0]))
            ]
    return found


def _are_texts(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)


def _is_unpaired(columns: Columns) -> bool:
    labels = columns.get("label", [])
    single = {"completion", "response", "answer", "output"} & columns.keys()
    return bool(single) and bool(labels) and all(value in (0, 1) for value in labels)


# --- the prompt ------------------------------------------------------------------------------


def _context(
    columns: Columns, answers: Answers, known: Known, place: str, advice: str, name: str
) -> Context:
    """The columns before the answers. Raises a Fault where two could be the prompt."""
    given = known.context or Context()
    taken = {top(path) for path in answers.columns}
    prompt = given.prompt
    candidates = _prompts(columns, taken)
    if "prompt" not in known.named:
        if len(candidates) > 1:
            entries = " or ".join(flow(name, {"prompt": each}) for each in candidates.values())
            raise Fault(
                f"{place}each of {' and '.join(candidates)} could be the prompt; "
                f"{advice}: {entries}"
            )
        found = [path for each, path in candidates.items() if _is_prompt(each, columns[each])]
        prompt = found[0] if found else None
    rest = {
        each: getattr(given, each) if each in known.named else each
        for each in ("input", "system", "history")
        if each in known.named or (each not in taken and each != top(prompt or ""))
    }
    rivals = () if "prompt" in known.named else _rivals(prompt, taken)
    return Context(prompt, **rest, rivals=rivals)


def _prompts(columns: Columns, taken: set[str]) -> dict[str, str]:
    """The columns that could be the prompt, each with the path to it.

    One that says only what another says too is none, as `messages` of UltraFeedback.
    """
    found: dict[str, str] = {}
    for name in PROMPTS:
        if name not in columns or name in taken:
            continue
        if all(columns[name] != columns.get(other) for other in {*found, *taken}):
            found[name] = _prompt_path(name, columns[name])
    for name in ("input", "history"):
        if len(found) > 1 and (name == "input" or _are_turns(columns.get(name, []))):
            found.pop(name, None)
    if not found and "info" in columns:
        # summarize_from_feedback: posts, and articles
        path = next((key for key in ("post", "article") if _are_texts(_inside(columns, key))), None)
        found = {"info": f"info.{path}"} if path else {}
    return found


def _inside(columns: Columns, key: str) -> list[Any]:
    return [value.get(key) for value in columns["info"] if isinstance(value, dict)]


def _prompt_path(name: str, values: list[Any]) -> str:
    """The path to the texts or messages of a prompt column."""
    # WebGPT comparisons
    inside = all(isinstance(value, dict) and "full_text" in value for value in values)
    return f"{name}.full_text" if inside else name


def _is_prompt(name: str, values: list[Any]) -> bool:
    """Whether the only column with a prompt's name holds what such a column should."""
    if name in ("prompt", "info"):
        return True
    if all(are_messages(value) for value in values):
        return True
    return name not in CONVERSATIONS and all(
        isinstance(value, str) or (isinstance(value, dict) and "full_text" in value)
        for value in values
    )


def _are_turns(values: list[Any]) -> bool:
    """Whether a column holds earlier turns: lists of a question and its answer, or messages."""
    return all(
        isinstance(value, list) and all(isinstance(turn, list | dict) for turn in value)
        for value in values
    )


def _rivals(prompt: str | None, taken: set[str]) -> tuple[str, ...]:
    """Other names of a prompt: a record in which one has a value could be read in two ways."""
    own = top(prompt) if prompt else None
    return tuple(name for name in PROMPTS if name not in (own, "input", "history", *taken))


# --- texts that are whole conversations ------------------------------------------------------


def _whole(records: list[Record], context: Context, answers: Answers) -> Whole:
    """How texts of chosen and rejected hold the prompt, if all of the first records do."""
    if not isinstance(answers, Preferred):
        return ""
    found = []
    for record in records:
        both = [value_at(record, path) for path in answers.columns]
        if any(is_absent(text) for text in both):
            continue
        if not all(isinstance(text, str) for text in both):
            return ""
        prompt = value_at(record, context.prompt) if context.prompt else None
        found.append((prompt, *both))
    if not found:
        return ""
    if all(prompt and repeats(prompt, c) and repeats(prompt, r) for prompt, c, r in found):
        return "repeated"
    if context.prompt is not None:
        return ""
    if all(has_turns(c) and has_turns(r) for _, c, r in found):
        return "turns"
    if all(shared_start(c, r) for _, c, r in found) and not _sentences(records, answers):
        return "words"
    return ""


def _sentences(records: list[Record], answers: Answers) -> list[str]:
    """Other columns that hold sentences, one of which may be the prompt."""
    columns = columns_of(records)
    return [
        name
        for name, values in columns.items()
        if name not in answers.columns
        and _are_texts(values)
        and not _are_labels(values)
        and len({*values}) == len(values)
    ]


def _hold_conversations(records: list[Record], answers: Answers) -> bool:
    """Whether the answers are messages from the first turn on, in all records that have them."""
    if isinstance(answers, Continued):
        return True
    for record in records:
        for path in answers.columns:
            value = value_at(record, path)
            if not is_absent(value) and not are_messages(value):
                return False
    return True


# --- what is said ----------------------------------------------------------------------------


def _said(form: Form, columns: Columns) -> str:
    """A form in the words of its columns: `conversations with from/value, chosen and rejected`."""
    before = [
        name + _spelled(columns[name])
        for name in dict.fromkeys(map(top, form.context.columns))
        if name in columns
    ]
    answers = form.answers.said
    if isinstance(form.answers, Preferred):
        answers += _spelled(columns.get(form.answers.chosen, []))
    return ", ".join([*before, answers + WHOLES[form.whole]])


def _spelled(values: list[Any]) -> str:
    """How the messages of a column are spelled, where they are not role and content."""
    for value in values:
        first = value[0] if isinstance(value, list) and value else value
        keys = spelling(first)
        if keys and keys != ("role", "content"):
            return f" with {'/'.join(keys)}"
    return ""


def _names(columns: Columns) -> str:
    return ", ".join(name if name.isprintable() else repr(name) for name in columns)


# --- the entry of dataset.yaml that would help -----------------------------------------------

ENTRY = dict[str, Any]
BETTER = ("chosen", "prefer", "better", "good", "accept", "positive", "win", "好", "优")
WORSE = ("reject", "dispref", "worse", "bad", "negative", "lose", "loser", "差", "劣")
ASKED = ("prompt", "question", "query", "instruction", "input", "ask", "user", "问", "题", "指令")
VERDICTS = ("prefer", "label", "winner", "better", "choice", "verdict", "vote", "best", "选", "胜")
RANKERS = ("rank", "score", "rating")
TWINS: tuple[set[str], ...] = (
    {"0", "1"},
    {"1", "2"},
    {"a", "b"},
    {"A", "B"},
    {"j", "k"},
    {"x", "y"},
)
TWINS += ({"左", "右"}, {"甲", "乙"}, {"一", "二"})


def entry_of(answers: Answers) -> ENTRY:
    """The entry that gives the answers their meaning."""
    if isinstance(answers, Preferred):
        return {"chosen": answers.chosen, "rejected": answers.rejected}
    if isinstance(answers, Judged):
        meaning = answers.meaning
        entry: ENTRY = {"answers": [*answers.columns], "verdict": answers.verdict}
        entry |= {"first": [*meaning.first], "second": [*meaning.second]}
        return entry | ({"tie": [*meaning.tie]} if meaning.tie else {})
    if isinstance(answers, Listed):
        both = [
            paths[0] if len(paths) == 1 else [*paths] for paths in (answers.answers, answers.worths)
        ]
        return {"answers": both[0], answers.order: both[1]}
    return dict(zip(("chosen", "rejected"), answers.columns, strict=True))


def flow(name: str, entry: ENTRY) -> str:
    """An entry of dataset.yaml on one line, as it can be copied there."""
    parts = ", ".join(f"{key}: {_scalar(value)}" for key, value in entry.items())
    return f"{_scalar(name)}: {{{parts}}}"


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str):
        safe = re.fullmatch(r"[^\W\d][\w.\[\]() /-]*", value) and "[" not in value
        word = value.lower() not in ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
        return value if safe and word else json.dumps(value, ensure_ascii=False)
    return json.dumps(value, default=str)


def _unknown(columns: Columns, place: str, advice: str, name: str) -> str:
    """The sentence on columns that are no known form."""
    entry, notes = _guess(columns)
    missing = [key for key, value in entry.items() if value in (COLUMN, VALUE) or key == KEY]
    verb = "is" if len(missing) == 1 else "are"
    lacking = f"{', '.join(missing)} {verb} missing" if missing else "their meaning must be said"
    noted = "".join(f"; {note}" for note in notes)
    return (
        f"{place}the columns {_names(columns)} are not a known form: {lacking}{noted}; "
        f"{advice}: {flow(name, entry)}"
    )


def _guess(columns: Columns) -> tuple[ENTRY, list[str]]:
    """The entry as far as the columns tell, and what their values are where that matters."""
    texts = [name for name, values in columns.items() if _can_be_text(values)]
    twins = _twins(texts)
    lists = [name for name, values in columns.items() if _can_be_answers(values)]
    if twins:
        return _guessed_verdict(columns, {"answers": [*twins]}, texts)
    if lists and not _like(texts, BETTER):
        return _guessed_order(columns, lists[0])
    entry: ENTRY = {"prompt": COLUMN}
    for key, words in (("chosen", BETTER), ("rejected", WORSE)):
        entry[key] = _like([name for name in texts if name not in entry.values()], words) or COLUMN
    return _guessed_prompt(columns, entry), []


def _guessed_prompt(columns: Columns, entry: ENTRY) -> ENTRY:
    """The entry with the column that is called like a prompt, or is the only text left."""
    used = set(json.dumps([*entry.values()], ensure_ascii=False).split('"'))
    left = [name for name, values in columns.items() if name not in used and _can_be_text(values)]
    known = [name for name in PROMPTS if name in left]
    prompt = known[0] if known else _like(left, ASKED) or (left[0] if len(left) == 1 else COLUMN)
    return {"prompt": prompt} | {key: value for key, value in entry.items() if key != "prompt"}


def _guessed_verdict(columns: Columns, entry: ENTRY, texts: list[str]) -> tuple[ENTRY, list[str]]:
    """The entry of two answers with the column that may say which is better."""
    labels = [name for name in columns if name not in texts and _are_labels(columns[name])]
    numbers = _twins([name for name in labels if _are_numbers(columns[name])])
    verdict = _like(labels, VERDICTS) or (labels[0] if len(labels) == 1 else None)
    notes: list[str] = []
    if numbers and not _like(labels, VERDICTS):
        key, notes = _guessed_key(numbers[0], " and ".join(numbers))
        entry |= {key: [*numbers]}
    else:
        entry |= {"verdict": verdict or COLUMN, "first": VALUE, "second": VALUE}
    if "verdict" in entry and verdict:
        one, other = entry["answers"]
        values = ", ".join(sorted({_scalar(value) for value in columns[verdict]})[:6])
        meant = f"first takes what prefers {one}, second what prefers {other}"
        notes = [f"{verdict} has {values}: {meant}"]
    return _guessed_prompt(columns, entry), notes


def _guessed_key(number: str, named: str) -> tuple[str, list[str]]:
    """What numbers with such a name are, if it says so: 1 may be the best or the worst."""
    for key, words in (("ranks", ("rank",)), ("scores", ("score", "rating", "reward"))):
        if any(word in number.lower() for word in words):
            return key, []
    return KEY, [f"{KEY} is ranks, if 1 is the best of {named}, or scores, if more is better"]


def _guessed_order(columns: Columns, name: str) -> tuple[ENTRY, list[str]]:
    """The entry of a list of answers."""
    items = [item for value in columns[name] for item in value]
    entry: ENTRY = {"answers": name}
    number = next((key for key in columns if _like([key], RANKERS)), None)
    if all(isinstance(item, dict) for item in items):
        inside = columns_of(items)
        text = next((key for key in inside if _can_be_text(inside[key])), COLUMN)
        entry = {"answers": f"{name}[].{text}"}
        number = next((f"{name}[].{key}" for key in inside if _are_numbers(inside[key])), None)
    if number:
        key, notes = _guessed_key(number, number)
        return _guessed_prompt(columns, entry | {key: number}), notes
    notes = [f"nothing says which of {name} are better (best_first, if they are in that order)"]
    return _guessed_prompt(columns, entry | {"order": VALUE}), notes


def _like(names: list[str], words: tuple[str, ...]) -> str | None:
    """The first column whose name has one of the words in it."""
    return next((name for name in names if any(word in name.lower() for word in words)), None)


def _twins(names: list[str]) -> tuple[str, str] | None:
    """Two columns whose names differ in a number or a letter that counts them."""
    for one in names:
        for other in names:
            if len(one) == len(other) and one < other:
                differ = [{a, b} for a, b in zip(one, other, strict=True) if a != b]
                if len(differ) == 1 and differ[0] in TWINS:
                    return one, other
    return None


def _can_be_text(values: list[Any]) -> bool:
    if all(are_messages(value) for value in values):
        return True
    return _are_texts(values) and not _are_labels(values)


def _can_be_answers(values: list[Any]) -> bool:
    """Whether these are lists of texts or of objects that are no messages."""
    return all(
        isinstance(value, list)
        and all(isinstance(item, str | dict) for item in value)
        and not are_messages(value)
        for value in values
    )


def _are_labels(values: list[Any]) -> bool:
    """Whether these are numbers, or single short words."""
    return all(
        isinstance(value, int | float)
        or (isinstance(value, str) and len(value) <= 12 and re.fullmatch(r"\w[\w .-]*", value))
        for value in values
    )


def _are_numbers(values: list[Any]) -> bool:
    return bool(values) and all(
        isinstance(value, int | float)
        or (isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value))
        for value in values
    )
