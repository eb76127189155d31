"""Check the preference pairs, turn them into ids and split them by prompt.

    python -m stages.preprocess

Reads preprocess.data and preprocess.test_data, the further test sets of preprocess.sets, the
tokenizer of models/base and the chat template of preprocess.chat_template. Writes the datasets
data/tokenized/{train,validation,test} and data/tokenized/sets/<name> with template.json,
reports/preprocess/figures.json and metrics/preprocess.json.
Two passes: the files to a scratch table on disk, the scratch table to the datasets, so memory
holds a few numbers a pair, however long the texts.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from reward import params
from reward.data import tokenized
from reward.data.columns import IDS, PREFIX
from reward.data.reading import unit
from reward.data.records import BadRecord, Pair, hash64
from reward.data.rows import as_row
from reward.data.sets import Notes, read_sets, write_sets
from reward.data.sources import Source, sources, usable
from reward.data.splitting import (
    Prompts,
    among,
    beginnings,
    contradictions,
    count_votes,
    duplicates,
    split,
)
from reward.data.tokens import Encoder, Template
from reward.outputs import whole_folder, write_json
from reward.params import Positive, Rule, Seed, Switch, Text
from reward.process import Fault, run

BASE = Path("models/base")
TOKENIZED = Path("data/tokenized")
REPORTS = Path("reports/preprocess")
METRICS = Path("metrics/preprocess.json")
SPLITS = ("train", "validation", "test")
BATCH_CHARACTERS = 1 << 19
SHOWN = 10
# No fault of the data: records that say that two answers are equally good are only left out.
NEVER_STOP = {"tie"}
EXAMPLE_CHARACTERS = 400


def is_date(text: str) -> bool:
    """Whether a text is a date in ISO form."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


Share = Annotated[float, Rule("a number above 0 and below 0.5", lambda share: 0 < share < 0.5)]
Date = Annotated[str, Rule('a date in quotes, such as "2026-01-01"', is_date)]
Ids = list[int]


class Rendered(NamedTuple):
    """A pair that passed the checks, its place, and chosen and rejected as text."""

    file: int
    position: int
    pair: Pair
    texts: tuple[str, str]


class BadPlace(NamedTuple):
    """Where a bad record stands and why it is bad; in the order of files and positions."""

    file: int
    position: int
    reason: str
    sentence: str


@dataclass(frozen=True)
class Preprocess:
    """The group `preprocess` of params.yaml, where each key is described."""

    data: Text
    test_data: Text
    sets: Text
    validation_fraction: Share
    test_fraction: Share
    seed: Seed
    template: Text
    chat_template: Text
    date: Date
    append_eos: Switch
    max_length: Positive
    over_length: Literal["stop", "drop", "truncate_prompt"]
    on_bad_record: Literal["stop", "drop"]


def numbers() -> array[int]:
    return array("I")


def hashes() -> array[int]:
    return array("Q")


@dataclass
class Ledger:
    """What was seen: a few numbers of every usable record, and what is wrong with the others."""

    sources: list[Source]
    file: array[int] = field(default_factory=numbers)
    position: array[int] = field(default_factory=numbers)
    prompt: array[int] = field(default_factory=hashes)
    answers: array[int] = field(default_factory=hashes)
    pair: array[int] = field(default_factory=hashes)
    others: array[int] = field(default_factory=hashes)
    owner: array[int] = field(default_factory=numbers)
    begun: array[int] = field(default_factory=hashes)
    chosen: array[int] = field(default_factory=numbers)
    rejected: array[int] = field(default_factory=numbers)
    prefix: array[int] = field(default_factory=numbers)
    columns: set[str] = field(default_factory=set)
    faults: list[BadPlace] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    votes: int = 0
    merged: int = 0

    def add(self, file: int, position: int, pair: Pair, lengths: tuple[int, int, int]) -> None:
        """Note a usable pair with its ids of chosen, rejected and their common prefix."""
        begun = beginnings(pair.prompt)
        self.owner.extend([len(self.file)] * len(begun))
        self.begun.extend(begun)
        self.file.append(file)
        self.position.append(position)
        self.prompt.append(pair.prompt_hash)
        self.answers.append(pair.answers_hash)
        self.pair.append(pair.pair_hash)
        # Files of a folder that is mapped differ in their source: that is no annotator.
        others = {name: value for name, value in pair.columns.items() if name != "source"}
        self.others.append(hash64(sorted(others.items())))
        self.chosen.append(lengths[0])
        self.rejected.append(lengths[1])
        self.prefix.append(lengths[2])
        self.columns.update(pair.columns)

    def bad(self, file: int, position: int, reason: str, sentence: str) -> None:
        """Count a bad record, and keep its place if it is among the first of its reason.

        Those of one reason come in order, those of different reasons need not: a record is
        checked long before its ids are.
        """
        self.dropped[reason] += 1
        if self.dropped[reason] <= SHOWN:
            self.faults.append(BadPlace(file, position, reason, sentence))

    def column(self, name: str) -> npt.NDArray[Any]:
        return np.asarray(getattr(self, name))

    @property
    def prompts(self) -> Prompts:
        return Prompts(self.column("prompt"), self.column("owner"), self.column("begun"))

    def fixed(self) -> npt.NDArray[np.int8]:
        """The index into SPLITS that a record's file has, -1 where prompts are to be split."""
        splits = [SPLITS.index(each.split) if each.split else -1 for each in self.sources]
        return np.array(splits, dtype=np.int8)[self.column("file")]

    def place(self, file: int, position: int) -> str:
        path = self.sources[file].path
        return f"{path}: {unit(path)} {position}"


def main() -> None:
    options = params.load("preprocess", Preprocess)
    template = Template.of(
        options.template,
        options.append_eos,
        options.max_length,
        BASE,
        Path(options.chat_template),
        options.date,
    )
    encoder = Encoder(BASE, template)
    sets = read_sets(Path(options.sets), encoder, drop=options.on_bad_record == "drop")
    ledger = open_ledger(options)
    with whole_folder(TOKENIZED) as folder:
        table = folder / "scratch.arrow"
        tokenize(options, encoder, table, ledger)
        usable = without_repeats(options, ledger)
        parts, columns = assign(options, ledger, usable), sorted(ledger.columns)
        for index, name in enumerate(SPLITS):
            rows = parts == index
            texts = name == "test"
            tokenized.write(folder / name, table, rows, columns, template.tokenizer, texts)
        table.unlink()
        notes = write_sets(
            folder / "sets",
            sets,
            template.tokenizer,
            ledger.prompts.take((parts == 0) | (parts == 1)),
        )
        template.save(folder / "template.json")
    figures = measure(ledger, parts)
    with whole_folder(REPORTS) as folder:
        write_json(folder / "figures.json", figures)
    write_json(METRICS, headline(figures))
    report(ledger.sources + [each.source for each in sets], figures)
    report_sets(notes)
    show_example(encoder)


def open_ledger(options: Preprocess) -> Ledger:
    """An empty ledger of the files to read, those of a test set of its own after the others."""
    data, test_data = Path(options.data), Path(options.test_data)
    found = sources(data)
    tests = sources(test_data) if test_data != data else []
    for source in tests:
        source.split = "test"
    return Ledger(found + tests)


# --- first pass: files to the scratch table --------------------------------------------------


def tokenize(options: Preprocess, encoder: Encoder, table: Path, ledger: Ledger) -> None:
    """Write every usable record's ids to `table`, and what is known of it to the ledger."""
    with tokenized.stream(table) as append:
        for batch, future in encoded(encoder, batches(rendered(encoder, ledger))):
            ids = future.result()
            rows = [
                row
                for item, sides in zip(batch, zip(ids[::2], ids[1::2], strict=True), strict=True)
                if (row := row_of(options, encoder, item, sides, ledger))
            ]
            if rows:
                append(tokenized.batch(rows))


def rendered(encoder: Encoder, ledger: Ledger) -> Iterator[Rendered]:
    """The records that pass the checks, as text; the others are noted in the ledger."""
    for index, source in enumerate(ledger.sources):
        bar = tqdm(source, desc=str(source.path), unit=" pairs", delay=2, disable=None)
        for position, record in bar:
            try:
                pair = usable(record)
                chosen, rejected = (
                    encoder.render(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)
                )
            except BadRecord as fault:
                ledger.bad(index, position, fault.reason, str(fault))
            else:
                yield Rendered(index, position, pair, (chosen, rejected))
        if source.ties:
            ledger.dropped["tie"] += source.ties


def batches(items: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """Lists of pairs of about BATCH_CHARACTERS each, which bounds memory."""
    batch: list[Rendered] = []
    size = 0
    for item in items:
        batch.append(item)
        size += sum(map(len, item.texts))
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(
    encoder: Encoder, batched: Iterable[list[Rendered]]
) -> Iterator[tuple[list[Rendered], Future[list[Ids]]]]:
    """Each batch with its ids, chosen and rejected in turn; the next is encoded meanwhile."""
    waiting: deque[tuple[list[Rendered], Future[list[Ids]]]] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        for batch in batched:
            texts = [text for item in batch for text in item.texts]
            waiting.append((batch, pool.submit(encoder.encode, texts)))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting


def row_of(
    options: Preprocess, encoder: Encoder, item: Rendered, sides: tuple[Ids, Ids], ledger: Ledger
) -> dict[str, Any] | None:
    """The row of the scratch table for a pair, noted in the ledger, or None for a bad one."""
    file, position, pair, texts = item
    try:
        ids = within_length(options, encoder, pair, sides)
        if ids[0] == ids[1]:
            raise BadRecord("identical_tokens", "both answers give the same ids")
    except BadRecord as fault:
        ledger.bad(file, position, fault.reason, str(fault))
        return None
    is_cut = ids != sides
    ledger.truncated += is_cut
    row = as_row(pair, ids, [encoder.decode(each) for each in ids] if is_cut else texts)
    ledger.add(file, position, pair, (len(ids[0]), len(ids[1]), row[PREFIX]))
    return row


def within_length(
    options: Preprocess, encoder: Encoder, pair: Pair, sides: tuple[Ids, Ids]
) -> tuple[Ids, Ids]:
    """Both sides within the maximum length, or a BadRecord."""
    longest = max(map(len, sides))
    if longest <= options.max_length:
        return sides
    sentence = f"has {longest} tokens, at most {options.max_length} fit (preprocess.max_length)"
    if options.over_length != "truncate_prompt":
        raise BadRecord("over_length", sentence)
    cut = encoder.encode_cut(pair.prompt, (pair.chosen, pair.rejected))
    if cut is None:
        raise BadRecord("answer_too_long", f"{sentence}, and its prompt is too short to cut")
    return cut[0], cut[1]


# --- all records together --------------------------------------------------------------------


def overlap(options: Preprocess, ledger: Ledger) -> npt.NDArray[np.bool_]:
    """Which records share their prompt, or its beginning, with a test or validation file.

    Raises the Fault that lists the first ones, unless bad records are to be left out. The test
    files keep all of their records, those of validation all that the test files have not.
    """
    prompts, fixed = ledger.prompts, ledger.fixed()
    shared = np.zeros(len(fixed), dtype=bool)
    rest = np.ones(len(fixed), dtype=bool)
    for name in ("test", "validation"):
        held = (fixed == SPLITS.index(name)) & ~shared
        rest &= ~held
        found = np.zeros(len(fixed), dtype=bool)
        found[rest] = prompts.take(rest).shared_with(prompts.take(held))
        rows = np.flatnonzero(found).tolist()
        if rows and options.on_bad_record == "stop":
            places = dict.fromkeys(
                ledger.place(ledger.file[row], ledger.position[row]) for row in rows
            )
            raise Fault(
                f"{len(places)} records of {options.data} share their prompt with the {name} "
                f"files: {'; '.join([*places][:SHOWN])}; preprocess.on_bad_record drop leaves "
                "them out"
            )
        for row in rows:
            sentence = f"a {name} file has its prompt"
            ledger.bad(ledger.file[row], ledger.position[row], f"in_{name}_set", sentence)
        shared |= found
        rest &= ~found
    return shared


def without_repeats(options: Preprocess, ledger: Ledger) -> npt.NDArray[np.bool_]:
    """Which records of the ledger are used. Raises the Fault that lists the first bad ones."""
    usable = ~overlap(options, ledger)
    rows = np.flatnonzero(usable)
    names = ("pair", "answers", "others")
    pairs, answers, others = (ledger.column(name)[rows] for name in names)
    votes = count_votes(answers, pairs, others)
    contradicted = contradictions(pairs, answers) & ~votes.cast
    repeated = duplicates(pairs) & ~contradicted & ~votes.cast
    ledger.votes, ledger.merged = int(votes.cast.sum()), int(votes.merged.sum())
    for reason, found, sentence in (
        ("contradiction", contradicted, "another record prefers its answers the other way round"),
        ("duplicate", repeated, "an earlier record is the same"),
        ("tie", votes.tied, "as many votes prefer the one answer as the other"),
    ):
        for row in rows[found].tolist():
            ledger.bad(ledger.file[row], ledger.position[row], reason, sentence)
    usable[rows[contradicted | repeated | votes.merged | votes.tied]] = False
    stopping = set(ledger.dropped) if options.on_bad_record == "stop" else {"over_length"}
    if options.over_length == "drop":
        stopping.discard("over_length")
    stopping = (stopping & set(ledger.dropped)) - NEVER_STOP
    if stopping:
        raise Fault(fault_list(ledger, stopping))
    if not usable.any():
        raise Fault(f"{fault_list(ledger, set(ledger.dropped))}; wanted a record that can be used")
    return usable


def fault_list(ledger: Ledger, reasons: set[str]) -> str:
    """The first records that are bad for one of the reasons, their number, and what can be done."""
    listed = sorted(fault for fault in ledger.faults if fault.reason in reasons)[:SHOWN]
    lines = [
        f"{ledger.place(file, position)}: {reason}: {sentence}"
        for file, position, reason, sentence in listed
    ]
    counts = ", ".join(f"{ledger.dropped[reason]} {reason}" for reason in sorted(reasons))
    ways = []
    if reasons - {"over_length"}:
        ways.append("preprocess.on_bad_record drop leaves bad records out")
    if "over_length" in reasons:
        ways.append("preprocess.over_length drop or truncate_prompt deals with long ones")
    return "\n".join([*lines, f"bad records: {counts}; {', '.join(ways)}"])


def assign(
    options: Preprocess, ledger: Ledger, usable: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int8]:
    """The index into SPLITS of every record of the ledger, -1 for those not used."""
    prompts, fixed = ledger.prompts.families, ledger.fixed()
    given = {source.split for source in ledger.sources}
    validation = 0 if "validation" in given else options.validation_fraction
    test = 0 if "test" in given else options.test_fraction
    parts = np.where(usable, fixed, -1).astype(np.int8)
    rest = usable & (fixed < 0)
    parts[rest] = split(prompts[rest], validation, test, options.seed)
    # A prompt of a file that is for training is for training wherever it appears.
    parts[rest] = np.where(among(prompts[rest], prompts[usable & (fixed == 0)]), 0, parts[rest])
    for index, name in enumerate(SPLITS):
        if not (parts == index).any():
            raise Fault(
                f"{options.data}: no pair is left for {name} out of {usable.sum()}; wanted more "
                "prompts, or other values of preprocess.validation_fraction and test_fraction"
            )
    return parts


def measure(ledger: Ledger, parts: npt.NDArray[np.int8]) -> dict[str, Any]:
    """All figures of the pairs; lengths in tokens, of chosen and rejected alike."""
    used = parts >= 0
    prompts = ledger.column("prompt")
    lengths = np.concatenate([ledger.column(side)[used] for side in ("chosen", "rejected")])
    tokens = int(lengths.sum())
    quantiles = np.quantile(lengths, [0.5, 0.9, 0.99], method="nearest").tolist()
    return {
        "pairs": {name: int((parts == i).sum()) for i, name in enumerate(SPLITS)},
        "prompts": {
            name: len(np.unique_counts(prompts[parts == i]).counts) for i, name in enumerate(SPLITS)
        },
        "dropped": dict(+ledger.dropped),
        "votes": ledger.votes,
        "merged": ledger.merged,
        "largest_family": largest_family(ledger, used),
        "truncated": ledger.truncated,
        "tokens": tokens,
        "length": dict(zip(("q50", "q90", "q99"), quantiles, strict=True))
        | {"max": int(lengths.max())},
        "shared_prefix_share": round(2 * int(ledger.column("prefix")[used].sum()) / tokens, 4),
    }


def largest_family(ledger: Ledger, used: npt.NDArray[np.bool_]) -> int:
    """The most prompts that go on from each other; 1 where none does."""
    unique, first = np.unique(ledger.column("prompt")[used], return_index=True)
    families = ledger.prompts.families[used][first]
    return int(np.unique_counts(families).counts.max(initial=len(unique) and 1))


def headline(figures: dict[str, Any]) -> dict[str, int]:
    """The content of metrics/preprocess.json."""
    return {name: sum(figures[name].values()) for name in ("pairs", "dropped")}


def report(read: list[Source], figures: dict[str, Any]) -> None:
    pairs, prompts, length = (figures[key] for key in ("pairs", "prompts", "length"))
    for source in read:
        print(source.said)
    for name in SPLITS:
        print(f"{name:<11}{pairs[name]:>8} pairs of {prompts[name]:>7} prompts")
    dropped = ", ".join(f"{n} {reason}" for reason, n in figures["dropped"].items()) or "none"
    print(f"dropped    {dropped}; prompts cut: {figures['truncated']}")
    if figures["votes"]:
        print(
            f"votes      {figures['votes']} records are votes on pairs that others judge too; "
            f"{figures['merged']} of them are merged into the pair of the majority"
        )
    if figures["largest_family"] > 1:
        print(
            f"dialogues  up to {figures['largest_family']} prompts go on from each other, and stay "
            "in one split"
        )
    print(
        f"tokens     {figures['tokens']:>8}, a text {length['q50']} at the median and "
        f"{length['max']} at most; {figures['shared_prefix_share']:.0%} in shared prefixes"
    )


def report_sets(notes: Mapping[str, Notes]) -> None:
    """Say what of the extra test sets is not as it was in the file."""
    for name, found in notes.items():
        counts = asdict(found)
        if any(counts.values()):
            said = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
            print(f"set        {name}: {said}")


def show_example(encoder: Encoder) -> None:
    """Print the first training pair as the model sees it, special tokens and line breaks too."""
    row = tokenized.first_row(TOKENIZED / SPLITS[0])
    for name, ids in zip(("chosen", "rejected"), IDS, strict=True):
        text = json.dumps(encoder.decode(row[ids]), ensure_ascii=False)
        if len(text) > EXAMPLE_CHARACTERS:
            half = EXAMPLE_CHARACTERS // 2
            text = f"{text[:half]} ... {text[-half:]}"
        print(f"{name:<11}{text}")


if __name__ == "__main__":
    run(main)
