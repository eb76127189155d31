"""Recognize the form of a file by its columns and their values.

A form is a complete set of columns. A file that could be read in two ways is refused, because
training on an inverted verdict would go unnoticed. The message then gives the entries of
dataset.yaml that would decide.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reward.data.answers import (
    CANONICAL,
    UNGRADED,
    Answers,
    Continued,
    Grades,
    Judged,
    Listed,
    Meaning,
    Order,
    Preferred,
    listed,
)
from reward.data.dialogue import (
    are_conversations,
    are_messages,
    are_replies,
    are_spoken,
    spelling,
)
from reward.data.forms import (
    CONVERSATIONS,
    POST,
    PROMPTS,
    REPEATING,
    WHOLES,
    Context,
    Form,
    Whole,
    value_or_article,
)
from reward.data.records import BEFORE, FIELDS, in_words, is_greeting
from reward.data.suggestion import (
    COLUMN,
    Entry,
    Unrecognized,
    entry_of,
    guessed_prompt,
    unknown,
)
from reward.data.transcripts import has_turns, repeats, shared_start
from reward.data.values import (
    Columns,
    JsonRecord,
    are_labels,
    are_texts,
    begins_like_number,
    column_of,
    columns_of,
    is_absent,
    value_at,
)
from reward.process import Fault, counted

# What the prompts of most languages have, and names do not.
SENTENCE = re.compile(r"\w\s+\w|[^\x00-\x7f]")
# The beginning of messages, or of one, as Python prints them.
PRINTED = re.compile(r"\s*(\[\s*\{\s*'(role|content|from|value)'|\{\s*'(role|content)')\s*:")
# How many records at the beginning of a file decide its form.
HEAD = 100
PREFERRED = (
    CANONICAL,
    Preferred("response_chosen", "response_rejected"),
    Preferred("chosen_response", "rejected_response"),
    Preferred("response_j", "response_k"),
    Preferred("chosen_messages", "rejected_messages"),
    # OpenAI's preference fine-tuning
    Preferred("preferred_output", "non_preferred_output"),
    # Math-Step-DPO, whose columns chosen and rejected begin in the middle of a solution
    Preferred("full_chosen", "full_rejected"),
)
# ms-swift: the conversation including the chosen answer, and the rejected answer.
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
    Judged("conversation_a", "conversation_b", "winner", WINNER, "turn"),
)
# PandaLM: the votes of several annotators.
VOTED = Preferred("response1", "response2")
VOTE = Meaning((1,), (2,), (0,))
VOTES = Grades(votes=("votes",), meaning=VOTE, decisive=("votes",))
# WebGPT comparisons
SCORED = (Listed(("answer_0", "answer_1"), "scores", ("score_0", "score_1")),)
BEFORE_IN_WORDS = {"system": "system message", "history": "earlier turns"}
# Where a prompt is if its column has objects: in WebGPT comparisons, and for OpenAI.
INSIDE = ("full_text", "messages")
# Lists of answers: their columns, and in answers that are objects, the keys of the text and of the
# rank or score.
LISTS = ("answers", "completions", "responses")
ANSWER = ("answer", "response", "completion", "text", "content", "output")
RATINGS: dict[Order, tuple[str, ...]] = {
    "ranks": ("rank", "ranks"),
    "scores": ("score", "scores", "overall_score", "rating", "ratings", "pm_score"),
}


@dataclass(frozen=True)
class Known:
    """What dataset.yaml says about a file's columns. What it leaves out is recognized.

    `named` are the keys that it gives, including those that are null.
    """

    context: Context | None = None
    answers: Answers | None = None
    grades: Grades = UNGRADED
    named: frozenset[str] = frozenset()


def recognize(path: Path, records: list[Any], known: Known = Known(), alone: bool = False) -> Form:
    """The form of the file `path`, recognized by its first records.

    `alone` says that params.yaml names the file and not its folder. Raises a Fault for an unknown
    form, or a file that could be read in two ways.
    """
    objects = [record for record in records if isinstance(record, dict)]
    columns = columns_of(objects)
    if not columns and not known.answers:
        return Form(Context("prompt"), CANONICAL, description=CANONICAL.description)
    unread = Unrecognized(path, alone)
    answers = known.answers or _answers(columns, objects, unread)
    conversations = _hold_conversations(objects, answers)
    context = _context(columns, answers, known, unread, conversations)
    _require_decoded(path, objects, context.prompt, answers)
    whole = _whole(objects, context, answers, "prompt" in known.named)
    if context.prompt is None and not whole and not conversations:
        entry = entry_of(answers)
        ways, note = [guessed_prompt(columns, {"prompt": COLUMN} | entry)], ""
        if _whole(objects, context, answers, named=True):
            ways.append({"prompt": None} | entry)
            note = " (prompt: null takes the words that both answers begin with)"
        raise unread.fault(
            f"none of the columns {in_words(columns)} is recognized as the prompt{note}", *ways
        )
    if context.prompt is None and answers == CANONICAL and "prompt" not in known.named:
        context = replace(context, prompt="prompt")
    form = Form(context, answers, _grades(path, columns, answers, known), whole)
    return replace(form, description=_description(form, columns))


def _require_decoded(
    path: Path, records: list[JsonRecord], prompt: str | None, answers: Answers
) -> None:
    """Raise a Fault for a prompt or answers that are texts of messages, or prompts of lists.

    They would be trained on literally. An answer may well be a list in JSON.
    """
    for column in (prompt, *answers.columns):
        values = [value_at(record, column) for record in records] if column else []
        texts = [value for value in values if not is_absent(value)]
        if are_texts(texts) and all(is_encoded(text, column == prompt) for text in texts):
            raise Fault(
                f"{path}: {column} has lists or objects as texts, such as {texts[0][:40]!r}; "
                "expected a text or messages, for example decoded by json.loads or ast.literal_eval"
            )


def is_encoded(text: str, or_texts: bool = False) -> bool:
    """Whether a text is JSON of a message, of messages or, if asked for, of a list of texts.

    It may also begin like messages as Python or NumPy prints them.
    """
    if not text.lstrip().startswith(("[", "{")):
        return False
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return PRINTED.match(text) is not None
    return are_spoken(found) or (or_texts and isinstance(found, list) and are_texts(found))


# --- the answers -----------------------------------------------------------------------------


def _answers(columns: Columns, records: list[JsonRecord], unread: Unrecognized) -> Answers:
    """The answers of the one form that fits the columns. Raises a Fault for none or several."""
    known: tuple[Answers, ...] = (*PREFERRED, *JUDGED, *SCORED)
    found = [form for form in known if _is_complete(form, columns)]
    if _are_votes(columns) and _is_complete(VOTED, columns):
        found.append(VOTED)
    if not found:
        found = [form for form in CONTINUED if _is_complete(form, columns)][:1]
    found += _lists(columns)
    if len(found) == 1:
        return found[0]
    if found:
        ways = " or as ".join(form.description for form in found)
        raise unread.fault(f"can be read as {ways}", *map(entry_of, dict.fromkeys(found[:2])))
    if _is_unpaired(columns):
        raise Fault(
            f"{unread.path}: the columns {in_words(columns)} are single completions with a label "
            "(KTO), not pairs; expected a chosen and a rejected answer to each prompt"
        )
    names = {name for record in records for name in record}
    for form in known:
        own = {*map(column_of, form.columns)}
        if own <= names and (empty := sorted(own - columns.keys())):
            verb = "are" if len(empty) > 1 else "is"
            first = counted(len(records), "record").removeprefix("1 ")
            raise Fault(
                f"{unread.path}: {' and '.join(empty)} {verb} empty in the first {first}, "
                "expected two answers to each prompt"
            )
    raise unknown(columns, unread)


def _is_complete(form: Answers, columns: Columns) -> bool:
    """Whether all columns of a form exist, and its conversations are messages."""
    names = {column_of(path) for path in (*form.columns, *form.verdicts)}
    if not names <= columns.keys():
        return False
    lists = names & {*CONVERSATIONS, "conversation_a", "conversation_b"}
    return all(are_messages(value) for each in lists for value in columns[each])


def _lists(columns: Columns) -> list[Answers]:
    """The forms with a list of answers, one for each column that ranks it."""
    found: list[Answers] = []
    for name in LISTS:
        values = columns.get(name, [])
        if not values or not all(isinstance(value, list) for value in values):
            continue
        items = [item for value in values for item in value]
        rated: list[Answers] = []
        if all(isinstance(item, dict) for item in items):
            inside = columns_of(items)
            texts = [key for key in ANSWER if are_texts(inside.get(key, []))]
            if len(texts) == 1:
                rated = [
                    Listed((f"{name}[].{texts[0]}",), order, (f"{name}[].{key}",))
                    for order, keys in RATINGS.items()
                    for key in keys
                    if key in inside
                ]
        found += rated
        if not rated and (are_texts(items) or are_replies(items)):
            found += [
                Listed((name,), order, (key,))
                for order, keys in RATINGS.items()
                for key in keys
                if all(isinstance(value, list) for value in columns.get(key, [0]))
            ]
    return found


def _are_votes(columns: Columns) -> bool:
    """Whether the column `votes` has lists of values that have a meaning as a VOTE."""
    signs = [
        VOTE.sign(vote)
        for value in columns.get("votes", [None])
        for vote in (value if isinstance(value, list) else [None])
    ]
    return bool(signs) and None not in signs


def _grades(path: Path, columns: Columns, answers: Answers, known: Known) -> Grades:
    """The columns that grade the comparisons, recognized by their names.

    A column with one of these names that never looks like a number, or like counts of votes, means
    something else, and is kept. If only some values look like one, reading the others is an error.

    Raises a Fault for a column in dataset.yaml that cannot grade these answers.
    """
    is_voted = answers == VOTED and not known.answers
    is_pair = isinstance(answers, Preferred | Continued) and not is_voted
    fitting = {"preference": is_pair, "votes": is_pair, "margin": len(answers.columns) == 2}
    for key, fits in fitting.items():
        if getattr(known.grades, key) and not fits:
            raise Fault(
                f"{path}: {key} in dataset.yaml cannot grade {answers.description}; expected an "
                f"entry without {key}, or one that names two columns of answers"
            )
    taken = {column_of(path) for path in (*answers.columns, *answers.verdicts)}

    def column(name: str) -> str | None:
        if name in known.named:
            found: str | None = getattr(known.grades, name)
            return found
        test = _may_be_counts if name == "votes" else begins_like_number
        is_free = name not in taken and (name not in columns or any(map(test, columns[name])))
        return name if is_free else None

    given = VOTES if is_voted else known.grades
    # A column that alone decides is not replaced by another one that has a known name.
    is_open, votes = is_pair and not given.decisive, given.votes
    if not votes and is_open and (found := column("votes")):
        votes = (found,)
    return Grades(
        preference=column("preference") if is_open else given.preference,
        votes=votes,
        meaning=given.meaning,
        margin=known.grades.margin if isinstance(answers, Listed) else column("margin"),
        weight=column("weight"),
        decisive=given.decisive,
    )


def _may_be_counts(value: Any) -> bool:
    """Whether a value may be the numbers of votes for chosen and for rejected."""
    if isinstance(value, str):
        return value.lstrip().startswith("[")
    return isinstance(value, list) and all(map(begins_like_number, value))


def _is_unpaired(columns: Columns) -> bool:
    labels = columns.get("label", [])
    single = {"completion", "response", "answer", "output"} & columns.keys()
    return bool(single) and bool(labels) and all(value in (0, 1) for value in labels)


# --- the prompt ------------------------------------------------------------------------------


def _context(
    columns: Columns, answers: Answers, known: Known, unread: Unrecognized, conversations: bool
) -> Context:
    """The columns before the answers, which may be whole `conversations`.

    Raises a Fault if two columns could be the prompt, the system message or the earlier turns.
    """
    given = known.context or Context()
    taken = {column_of(path) for path in answers.columns}
    prompt = given.prompt
    if "prompt" not in known.named:
        candidates = _prompts(columns, taken)
        if len(candidates) > 1:
            paths = [*candidates.values(), *([None] if conversations else [])]
            ways: list[Entry] = [{"prompt": path} for path in paths]
            asked, *others = candidates
            if others == ["context"] and are_texts(columns[asked] + columns["context"]):
                # What a question is about, rather than another question.
                ways.insert(0, {"prompt": asked, "input": "context"})
            raise unread.fault(f"{' and '.join(candidates)} could each be the prompt", *ways)
        found = [path for each, path in candidates.items() if _is_prompt(each, columns[each])]
        prompt = found[0] if found else None
    rest: dict[str, Any] = {}
    for key, names in BEFORE.items():
        free = [name for name in names if name not in (*taken, column_of(prompt or ""))]
        if free and key not in known.named:
            _require_one(key, columns, unread, free)
            rest[key] = tuple(free) if key in BEFORE_IN_WORDS else free[0]
    rivals = () if "prompt" in known.named else _rivals(prompt, taken)
    return replace(given, prompt=prompt, **rest, rivals=rivals)


def _require_one(key: str, columns: Columns, unread: Unrecognized, names: list[str]) -> None:
    """Raises a Fault if several of these columns have values, and different ones."""
    found = [name for name in names if name in columns]
    if len(found) > 1 and any(columns[name] != columns[found[0]] for name in found):
        raise unread.fault(
            f"{' and '.join(found)} could each be the {BEFORE_IN_WORDS[key]}",
            *({key: name} for name in found),
        )


def _prompts(columns: Columns, taken: set[str]) -> dict[str, str]:
    """The columns that could be the prompt, each with the path to it.

    A column that repeats another one, such as `messages` of UltraFeedback, does not count.
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
    posts = [value_or_article({"info": value}, POST) for value in columns.get("info", [])]
    return {"info": POST} if not found and are_texts(posts) else found


def _prompt_path(name: str, values: list[Any]) -> str:
    """The path to the texts or messages of a prompt column."""
    for key in INSIDE:
        if all(isinstance(value, dict) and key in value for value in values):
            return f"{name}.{key}"
    return name


def _is_prompt(name: str, values: list[Any]) -> bool:
    """Whether the values of the only column with a prompt's name can be prompts."""
    if name in ("prompt", "info") or _prompt_path(name, values) != name:
        return True
    if all(are_messages(value) for value in values):
        return True
    return name not in CONVERSATIONS and all(isinstance(value, str) for value in values)


def _are_turns(values: list[Any]) -> bool:
    """Whether a column holds earlier turns: lists of a question and its answer, or messages."""
    return all(
        isinstance(value, list) and all(isinstance(turn, list | dict) for turn in value)
        for value in values
    )


def _rivals(prompt: str | None, taken: set[str]) -> tuple[str, ...]:
    """Other columns that could be the prompt. A record with a value there is ambiguous."""
    own = column_of(prompt) if prompt else None
    return tuple(name for name in PROMPTS if name not in (own, "input", "history", *taken))


# --- texts that are whole conversations ------------------------------------------------------


def _whole(records: list[JsonRecord], context: Context, answers: Answers, named: bool) -> Whole:
    """How the chosen and rejected texts contain the prompt, if they do in all of the records.

    `named` says that dataset.yaml names the prompt, or that there is none.
    """
    if not isinstance(answers, Preferred):
        return ""
    found: list[tuple[Any, str, str]] = []
    used = []
    for record in records:
        both = [value_at(record, path) for path in answers.columns]
        if any(is_absent(text) for text in both):
            continue
        if not all(isinstance(text, str) for text in both):
            return ""
        prompt = value_at(record, context.prompt) if context.prompt else None
        found.append((prompt, *both))
        used.append(record)
    if not found:
        return ""
    repeated = all(prompt and repeats(prompt, c) and repeats(prompt, r) for prompt, c, r in found)
    if repeated and any(not is_greeting(prompt) for prompt, _, _ in found):
        return "repeated"
    if context.prompt is not None:
        return ""
    # A few without turns are bad records.
    if 2 * sum(has_turns(c) and has_turns(r) for _, c, r in found) > len(found):
        return "turns"
    starts = [c[: shared_start(c, r)] for _, c, r in found]
    if "" in starts or (not named and _may_have_prompt(used, answers, starts)):
        return ""
    return "words"


def _may_have_prompt(records: list[JsonRecord], answers: Answers, starts: list[str]) -> bool:
    """Whether another column may be the prompt, given the beginning of each record's answers.

    Some beginnings, such as `<think>`, say nothing about the prompt. So a column may be the prompt
    if it has messages or sentences, and several of them where the beginning is the same. Texts that
    all differ may be the prompt in any case.
    """
    for name, values in columns_of(records).items():
        if name in answers.columns:
            continue
        if not all(map(are_messages, values)) and (not are_texts(values) or are_labels(values)):
            continue
        texts = [repr(record.get(name)) for record in records]
        if len({*texts}) == len(texts):
            return True
        several = len({*zip(starts, texts, strict=True)}) > len({*starts})
        if several and any(SENTENCE.search(text) for text in texts):
            return True
    return False


def _hold_conversations(records: list[JsonRecord], answers: Answers) -> bool:
    """Whether the answers are messages, and some of them whole conversations.

    If only a few have no more than the assistant's messages, those are bad records.
    """
    if isinstance(answers, Continued):
        return True
    values = [value_at(record, path) for record in records for path in answers.columns]
    given = [each for value in values if not is_absent(value) for each in listed(value)]
    return all(map(are_messages, given)) and (not given or any(map(are_conversations, given)))


# --- in words --------------------------------------------------------------------------------


def _description(form: Form, columns: Columns) -> str:
    """A form in words, such as `conversations with from/value, chosen and rejected`.

    Lists and objects that it does not read are named, because they are not kept as columns either.
    """
    before = [
        name + _spelled(columns[name])
        for name in dict.fromkeys(map(column_of, form.context.columns))
        if name in columns
    ]
    answers = form.answers.description
    if isinstance(form.answers, Preferred):
        answers += _spelled(columns.get(form.answers.chosen, []))
    answers += form.grades.description(columns) + WHOLES[form.whole]
    read = {*form.used, *form.looked_at, *FIELDS, *REPEATING}
    unread = [
        name
        for name, values in columns.items()
        if name not in read and any(isinstance(value, list | dict) for value in values)
    ]
    return ", ".join([*before, answers]) + (f" (not read: {in_words(unread)})" if unread else "")


def _spelled(values: list[Any]) -> str:
    """The keys of a column's messages, if they are not role and content."""
    for value in values:
        first = value[0] if isinstance(value, list) and value else value
        keys = spelling(first)
        if keys and keys != ("role", "content"):
            return f" with {'/'.join(keys)}"
    return ""
