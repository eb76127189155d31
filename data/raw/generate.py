"""Write pairs.json, the committed bilingual sample of preference pairs, beside this file.

Run as ``python data/raw/generate.py``. Each entry of prompts/*.yaml holds a prompt, two good
answers to it and several worse ones; a pair sets a good answer against a worse one. The good one
is picked so that the longer answer of a pair is the right one about half of the time: a reward
model that counts characters should learn nothing here.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML

HERE = Path(__file__).resolve().parent
SEED = "pairs 6"
# wrong_language comes last: the length says nothing there about which good answer to pick, so
# that pair goes to the good answer that the prompt used less.
KINDS = ("wrong", "off_topic", "evasive", "rude", "cut_off", "repetitive", "wrong_language")
HALVED_KINDS = ("wrong", "off_topic")
WORD = re.compile(r"[a-z0-9']+|[\u3400-\u4dbf\u4e00-\u9fff]")
# After a word that ends no sentence, or two characters into a Chinese clause: an answer that is cut
# here is plainly unfinished.
DANGLING = re.compile(
    r"\b(?:a|an|and|are|as|at|because|but|by|for|from|if|into|is|its|of|or|than|that|the|their"
    r"|then|to|when|which|while|with|your)(?= \w)"
    r"|[的是在把被让和与或从将而不很更最都也就还再只](?=[\u4e00-\u9fff])"
    r"|(?<=[，。；：,.;:][\u4e00-\u9fff]{2})(?=[\u4e00-\u9fff]{2})"
)
CLAUSE = re.compile(r".+?(?:[.!?,;](?=[\s\u4e00-\u9fff])\s*|[。！？，；]”?|$)")


class Entry(NamedTuple):
    """A prompt with its two good answers, short and full, and its worse ones."""

    prompt: str
    short: str
    full: str
    wrong: str
    off_topic: str
    evasive: str
    rude: str
    other_language: str


class Pair(NamedTuple):
    """One record of pairs.json."""

    prompt: str
    chosen: str
    rejected: str
    kind: str
    language: str


class Balance:
    """Takes pairs such that neither the longer answer nor one good answer prevails."""

    def __init__(self) -> None:
        self._tally: Counter[tuple[str, ...]] = Counter()

    def take(self, options: list[Pair]) -> Pair:
        """Take the option that most evens out what was taken before; the first one of equals."""
        pair = min(options, key=self._excess)
        self._tally.update(_steps(pair))
        return pair

    def _excess(self, pair: Pair) -> int:
        return sum(self._tally[key] * step for key, step in _steps(pair).items())


def _steps(pair: Pair) -> dict[tuple[str, ...], int]:
    """Say what a pair adds to the tally, above all to how often the longer answer is right.

    The kind weighs twice: within a language, all of wrong_language errs to one side, and the other
    kinds should make up for some of that but not for all.
    """
    longer = 1 if len(pair.chosen) > len(pair.rejected) else -1
    return {
        (pair.language,): longer,
        (pair.language, pair.kind): 2 * longer,
        (pair.prompt, pair.chosen): 1,
    }


def words(text: str) -> list[str]:
    """Split into lower-case English words and single Han characters, without punctuation."""
    return WORD.findall(text.lower())


def shared_runs(
    texts_by_prompt: Mapping[str, Iterable[str]], length: int = 8
) -> list[tuple[str, str, str]]:
    """List (run, prompt, other prompt) for the runs of `length` words that two prompts share.

    Such a run would leak from one split into another. A text of fewer words counts as one run.
    """
    owners: dict[tuple[str, ...], str] = {}
    shared = []
    for prompt, texts in texts_by_prompt.items():
        for text in texts:
            found = words(text)
            for start in range(max(1, len(found) - length + 1)):
                run = tuple(found[start : start + length])
                owner = owners.setdefault(run, prompt)
                if owner != prompt:
                    shared.append((" ".join(run), owner, prompt))
    return shared


def read_entries(path: Path) -> list[Entry]:
    """Read the entries of one source; exit where one lacks a text."""
    entries = []
    for item in YAML(typ="safe").load(path):
        texts = {key: (item.get(key) or "").strip() for key in Entry._fields}
        lacking = [key for key, text in texts.items() if not text]
        if lacking:
            raise SystemExit(f"{path.name}: {texts['prompt']!r} lacks {', '.join(lacking)}.")
        entries.append(Entry(**texts))
    return entries


def check(entries: list[Entry]) -> None:
    """Exit where a prompt, a text of an entry or a run of eight words occurs again."""
    prompt, count = Counter(entry.prompt for entry in entries).most_common(1)[0]
    if count > 1:
        raise SystemExit(f"The prompt {prompt!r} occurs {count} times.")
    for entry in entries:
        if len(set(entry)) < len(entry):
            raise SystemExit(f"The entry {entry.prompt!r} gives one text twice.")
        if not cuts(entry.full):
            raise SystemExit(f"The full answer to {entry.prompt!r} has no place to cut it off.")
    for run, first, second in shared_runs({entry.prompt: entry for entry in entries}):
        raise SystemExit(f"The prompts {first!r} and {second!r} share the words {run!r}.")


def cuts(answer: str) -> list[str]:
    """List the ways to cut the answer off in mid-sentence, at 35% to 80% of its length."""
    ends = [match.end() for match in DANGLING.finditer(answer)]
    return [answer[:end] for end in ends if 0.35 <= end / len(answer) <= 0.8]


def loops(answer: str, space: str) -> list[str]:
    """List the ways the answer can get stuck: it says one clause two or three times over."""
    stuck = []
    for match in CLAUSE.finditer(answer):
        again = space + match.group().strip()
        stuck += [answer[: match.end()].strip() + again * times for times in (2, 3)]
    return stuck


def worse_answers(entry: Entry, kind: str, language: str) -> list[str]:
    """List the answers of the entry that are bad in the way that `kind` names."""
    good = (entry.short, entry.full)
    if kind == "cut_off":
        return [cut for answer in good for cut in cuts(answer)]
    if kind == "repetitive":
        space = " " if language == "en" else ""
        return [loop for answer in good for loop in loops(answer, space)]
    return [entry.other_language if kind == "wrong_language" else getattr(entry, kind)]


def pairs_of(entry: Entry, language: str, balance: Balance) -> Iterator[Pair]:
    """Yield five to seven pairs of the entry, each of another kind."""
    rng = random.Random(f"{SEED} {entry.prompt}")
    for kind in KINDS:
        if kind in HALVED_KINDS and rng.random() < 0.5:
            continue
        options = [
            Pair(entry.prompt, chosen, rejected, kind, language)
            for chosen in (entry.short, entry.full)
            for rejected in worse_answers(entry, kind, language)
        ]
        rng.shuffle(options)
        yield balance.take(options)


def sample(folder: Path) -> str:
    """Return the text of pairs.json for the sources in `folder`."""
    sources = {path: read_entries(path) for path in sorted(folder.glob("*.yaml"))}
    check([entry for entries in sources.values() for entry in entries])
    balance = Balance()
    pairs = [
        pair._asdict()
        for path, entries in sources.items()
        for entry in entries
        for pair in pairs_of(entry, path.name[:2], balance)
    ]
    return json.dumps(pairs, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    (HERE / "pairs.json").write_text(sample(HERE / "prompts"), encoding="utf-8", newline="\n")
