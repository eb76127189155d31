"""Texts that are whole conversations, and where their prompt ends.

HH is Anthropic's data set hh-rlhf.
"""

import re
import unicodedata
from typing import Any

# HH has a few turns of "Hum:" where "Human:" was meant.
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Hum|Assistant):")
FIRST_TURN = re.compile(r"\s*(?:Human|Hum):")
# In HelpSteer2, between the turns of a prompt, which begins and ends with the user's. NeMo-Aligner
# marks the system message and the first turn, too, and ends with the assistant's.
MARKED_TURN = re.compile(r"(?:\A|\n)<extra_id_[01]>(System|User|Assistant)\n")
# The marks of the assistant's turns, after which a conversation may go on.
ANSWERED = re.compile(r"\n\nAssistant:|\n<extra_id_1>Assistant\n")
SENTENCE_END = re.compile(r"[。！？!?…；][」』”’）)]*")

JsonMessage = dict[str, str]


def has_turns(text: str) -> bool:
    """Whether a text is a conversation as in HH, in turns that begin with Human: or Assistant:."""
    return bool(FIRST_TURN.match(text)) and "\n\nAssistant:" in text


def turns(text: str) -> list[JsonMessage]:
    """The messages of a conversation as in HH. An empty last turn, as in a prompt, is left out."""
    _, *parts = TURN.split(text)
    speakers, contents = parts[::2], parts[1::2]
    found = [
        {"role": "assistant" if speaker == "Assistant" else "user", "content": content.strip()}
        for speaker, content in zip(speakers, contents, strict=True)
    ]
    return found[:-1] if found and not found[-1]["content"] else found


def prompt_ends(text: str) -> list[int]:
    """Where earlier prompts may end in a text: on both sides of each mark of the assistant's turns.

    Also before white space at the end of the text, because a prompt with white space at its end
    counts as one that continues the prompt without it.
    """
    ends = {len(text.rstrip()), *(end for mark in ANSWERED.finditer(text) for end in mark.span())}
    return sorted(ends - {0, len(text)})


def marked_turns(text: str) -> list[JsonMessage] | None:
    """The messages of a prompt as in HelpSteer2 or NeMo-Aligner; None without marks of turns.

    An empty system message and an empty last turn are left out.
    """
    first, *parts = MARKED_TURN.split(text)
    if not parts:
        return None
    speakers, contents = parts[::2], parts[1::2]
    if first or speakers[0] == "Assistant":
        speakers, contents = ["User", *speakers], [first, *contents]
    found = [
        {"role": speaker.lower(), "content": content}
        for speaker, content in zip(speakers, contents, strict=True)
    ]
    found = [each for each in found if each["role"] != "system" or each["content"].strip()]
    return found[:-1] if found[-1:] == [{"role": "assistant", "content": ""}] else found


def shared_start(chosen: str, rejected: str) -> int:
    """The length of the prompt with which two texts begin, in characters.

    The prompt ends with the last word that they share, without the white space after it, and is
    shorter than either text. Chinese and Japanese have no white space between words. There, it ends
    with the last shared sentence, or else with the last shared character.
    """
    shorter = min(len(chosen.rstrip()), len(rejected.rstrip()))
    differ = (place for place in range(shorter) if chosen[place] != rejected[place])
    cut = max(0, min(next(differ, shorter), shorter - 1))
    while cut and any(_within_word(text, cut) for text in (chosen, rejected)):
        cut -= 1
    if cut and _is_ideographic(chosen[cut - 1]):
        ends = [found.end() for found in SENTENCE_END.finditer(chosen, 0, cut)]
        cut = ends[-1] if ends else cut
    return len(chosen[:cut].rstrip())


def repeats(prompt: Any, answer: Any) -> bool:
    """Whether an answer is a text that begins with its prompt."""
    return isinstance(prompt, str) and isinstance(answer, str) and answer.startswith(prompt)


def _within_word(text: str, cut: int) -> bool:
    """Whether a cut would split a word, or a letter from its combining mark."""
    before, after = text[cut - 1], text[cut]
    if unicodedata.combining(after):
        return True
    if before.isspace() or after.isspace():
        return False
    return not (_is_ideographic(before) or _is_ideographic(after))


def _is_ideographic(character: str) -> bool:
    """Whether a character belongs to a script without white space between words.

    Punctuation marks of these scripts count too.
    """
    return unicodedata.east_asian_width(character) in "WF" and not "가" <= character <= "힣"
