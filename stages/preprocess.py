"""Check the preference pairs, turn them into token ids and split them by prompt.

    python -m stages.preprocess

Reads preprocess.data, the extra test sets of preprocess.sets, the tokenizer of models/base and the
chat template of preprocess.chat_template. Writes the datasets
data/tokenized/{train,validation,test} and data/tokenized/sets/<name> with template.json and
licenses.json, reports/preprocess/figures.json and metrics/preprocess.json.

There are two passes: from the files to a scratch table on disk, and from there to the datasets.
Memory holds only a few numbers per pair, however long the texts are.
"""

from __future__ import annotations

import gc
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reward import params
from reward.data import tokenized
from reward.data.columns import IDS, PREFERENCE, TIE
from reward.data.ledger import SHOWN, Ledger, Rendered
from reward.data.prefixes import TokenIds
from reward.data.reading import batches, other_names
from reward.data.records import PARTS, TOOLS, BadRecord, Record
from reward.data.rows import as_row, compare
from reward.data.sets import Notes, read_sets, write_sets
from reward.data.sources import Source, sources
from reward.data.splitting import among, contradictions, count_votes, duplicates, portions, split
from reward.data.tokenized import Row
from reward.data.tokens import TOKENIZER_CONFIG, Encoder, Template, as_array
from reward.outputs import whole_folder, write_json
from reward.params import Positive, Rule, Seed, Switch, Text
from reward.process import Fault, counted
from reward.stage import reads, run_stage

BASE = Path("models/base")
TOKENIZED = Path("data/tokenized")
REPORTS = Path("reports/preprocess")
METRICS = Path("metrics/preprocess.json")
SPLITS = ("train", "validation", "test")
BATCH_CHARACTERS = 1 << 19
# Not an error in the data: a weight of 0 is a way to leave a comparison out.
NEVER_STOP = {"no_weight"}
EXAMPLE_CHARACTERS = 400
# Python looks for garbage in reference cycles after this many new objects.
OBJECTS = 100_000


def is_date(text: str) -> bool:
    """Whether a string is a date in ISO form."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


Share = Annotated[float, Rule("a number above 0 and below 0.5", lambda share: 0 < share < 0.5)]
Date = Annotated[str, Rule('a date in quotes, such as "2026-01-01"', is_date)]


@dataclass(frozen=True)
class Preprocess:
    """The group `preprocess` of params.yaml, which describes each key."""

    data: Text
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


def main() -> None:
    options = params.load("preprocess", Preprocess)
    # Arrow's own allocator would keep five times the memory that is in use at any time.
    pa.set_memory_pool(pa.system_memory_pool())
    for path in (options.data, options.sets, options.chat_template):
        reads(Path(path))
    encoder = encoder_of(options)
    sets = read_sets(Path(options.sets), encoder, drop=options.on_bad_record == "drop")
    ledger = Ledger(sources(Path(options.data)))
    with whole_folder(TOKENIZED) as folder:
        table = folder / "scratch.arrow"
        with collecting_rarely():
            tokenize(options, encoder, table, ledger)
        parts = assign(options, ledger, without_repeats(options, ledger))
        tokenizer = encoder.template.tokenizer
        write_splits(folder, table, ledger, parts, tokenizer)
        table.unlink()
        trained_on = ledger.prompts.take((parts == 0) | (parts == 1))
        notes = write_sets(folder / "sets", sets, tokenizer, trained_on)
        encoder.template.save(folder / "template.json")
        write_json(folder / "licenses.json", licenses(ledger.sources))
    figures = measure(ledger, parts)
    with whole_folder(REPORTS) as folder:
        write_json(folder / "figures.json", figures)
    write_json(METRICS, headline(figures))
    report(ledger.sources + [each.source for each in sets], figures)
    report_other_files(Path(options.data), Path(options.sets))
    report_unused(options)
    report_sets(notes)
    show_example(encoder)


def encoder_of(options: Preprocess) -> Encoder:
    """The base's tokenizer with the template. Raises a Fault for a template that cannot be used."""
    chat_template = Path(options.chat_template)
    template = Template.of(
        options.template, options.append_eos, options.max_length, BASE, chat_template, options.date
    )
    encoder = Encoder(BASE, template)
    encoder.require_portable()
    return encoder


def licenses(found: Iterable[Source]) -> list[str | None]:
    """The licences that dataset.yaml names for the files, without repeats.

    If it names one for some of the files only, None is the last.
    """
    names = {source.entry.license for source in found}
    known = sorted(name for name in names if name)
    return [*known, None] if known and None in names else [*known]


# --- first pass: files to the scratch table --------------------------------------------------


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Collect cyclic garbage rarely, because none of the millions of lists made here is in a cycle.

    With a threshold of 700 objects, the default of Python 3.11, the collection takes a fifth of the
    time outside the tokenizer.
    """
    usual = gc.get_threshold()
    gc.set_threshold(OBJECTS, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def tokenize(options: Preprocess, encoder: Encoder, table: Path, ledger: Ledger) -> None:
    """Write the ids of every usable record to `table`, and its numbers to the ledger."""
    batched = batches(ledger.rendered(encoder), Rendered.characters, BATCH_CHARACTERS)
    with tokenized.stream(table) as append:
        for batch, future in encoded_ahead(encoder, batched):
            ids = iter(future.result())
            found = (
                row_of(options, encoder, item, [*islice(ids, len(item.texts))], ledger)
                for item in batch
            )
            if rows := [row for row in found if row]:
                append(tokenized.batch(rows))


def encoded_ahead(
    encoder: Encoder, batched: Iterable[list[Rendered]]
) -> Iterator[tuple[list[Rendered], Future[list[TokenIds]]]]:
    """Each batch with the ids of all its texts, while the next two batches are encoded.

    Two, because turning ids into arrays needs Python's global lock: while one batch waits for it,
    the tokenizer's threads work on the other.
    """
    waiting: deque[tuple[list[Rendered], Future[list[TokenIds]]]] = deque()
    with ThreadPoolExecutor(max_workers=2) as pool:
        for batch in batched:
            texts = [text for item in batch for text in item.texts]
            waiting.append((batch, pool.submit(encoder.encode_arrays, texts)))
            if len(waiting) > 2:
                yield waiting.popleft()
        yield from waiting


def row_of(
    options: Preprocess, encoder: Encoder, item: Rendered, encoded: list[TokenIds], ledger: Ledger
) -> Row | None:
    """The row of a record for the scratch table, or None if no comparison is left.

    Adds the record to the ledger.
    """
    file, position, record, texts = item
    ids = encoded
    if options.over_length == "truncate_prompt" and max(map(len, ids)) > options.max_length:
        try:
            ids = cut(encoder, record, encoded)
        except BadRecord as fault:
            ledger.bad(file, position, fault)
            return None
    is_cut = ids is not encoded and not all(map(np.array_equal, ids, encoded))
    kept = compare(record, ids, options.max_length, encoder.unknown)
    for each in kept.faults:
        ledger.bad(file, position, over_length(options, each))
    if not kept.compared:
        return None
    if is_cut:
        texts = [encoder.decode(each.tolist()) for each in ids]
    ledger.truncated += is_cut
    ledger.add(file, position, record, ids, kept)
    return as_row(record, ids, texts, kept.compared)


def cut(encoder: Encoder, record: Record, encoded: list[TokenIds]) -> list[TokenIds]:
    """The ids of each answer with the prompt cut, or the given ids if cutting is not enough.

    Answers that are too long even so, the longest first, are left as they are. Raises BadRecord as
    `Encoder.encode_cut` does.
    """
    kept = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))
    while len(kept) > 1:
        found = encoder.encode_cut(record.prompt, [record.answers[place] for place in kept])
        if found:
            shorter = dict(zip(kept, map(as_array, found), strict=True))
            return [shorter.get(place, ids) for place, ids in enumerate(encoded)]
        kept.pop()
    return encoded


def over_length(options: Preprocess, fault: BadRecord) -> BadRecord:
    """A fault with the parameter if it is about length, and about the answer if prompts are cut."""
    if fault.reason != "over_length":
        return fault
    sentence = f"{fault} (preprocess.max_length)"
    if options.over_length == "truncate_prompt":
        return BadRecord("answer_too_long", f"{sentence}, and the prompt is too short to cut")
    return BadRecord(fault.reason, sentence)


# --- all records together --------------------------------------------------------------------


def overlap(options: Preprocess, ledger: Ledger) -> npt.NDArray[np.bool_]:
    """Which records have a prompt that is, begins or continues one of a test or validation file.

    Raises a Fault that lists the first ones, unless bad records are left out. The test files keep
    all of their records, and the validation files those whose prompts are not in the test files.
    """
    prompts, fixed = ledger.prompts, ledger.fixed(SPLITS)
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
                f"{options.data}: the prompts of {counted(len(places), 'record')} are also in the "
                f"{name} files: {'; '.join([*places][:SHOWN])}; to leave them out, set "
                "preprocess.on_bad_record to drop"
            )
        ledger.bad_rows(rows, BadRecord(f"in_{name}_set", f"its prompt is in a {name} file"))
        shared |= found
        rest &= ~found
    return shared


def without_repeats(options: Preprocess, ledger: Ledger) -> npt.NDArray[np.bool_]:
    """Which records of the ledger are used. Raises a Fault that lists the first bad ones."""
    used, judges = ~overlap(options, ledger), ledger.judges
    cast, merged, contradicted, repeated = np.zeros((4, len(used)), dtype=bool)
    for rows in portions(ledger.column("prompt"), used):
        ballots = ledger.ballots(rows)
        votes = count_votes(ballots, judges[rows])
        ledger.grade(rows[votes.rows], votes.preference, votes.weight, votes.margin)
        cast[rows], merged[rows] = votes.cast, votes.merged
        contradicted[rows] = contradictions(ballots.verdicts, ballots.answers)
        repeated[rows] = duplicates(ballots.verdicts)
    contradicted &= ~cast
    repeated &= ~contradicted & ~cast
    ledger.votes, ledger.merged = int(cast.sum()), int(merged.sum())
    contradiction = "another record gives the same answers a different verdict"
    ledger.bad_rows(np.flatnonzero(contradicted), BadRecord("contradiction", contradiction))
    ledger.bad_rows(np.flatnonzero(repeated), BadRecord("duplicate", "repeats an earlier record"))
    used &= ~(contradicted | repeated | merged)
    if reasons := refused(options, ledger):
        raise Fault(f"{ledger.listed(reasons)}; {', '.join(remedies(options, reasons))}")
    if not used.any():
        reasons = set(ledger.dropped)
        message = "; ".join([ledger.listed(reasons), *remedies(options, reasons)])
        raise Fault(f"{message}; expected at least one usable record")
    return used


def refused(options: Preprocess, ledger: Ledger) -> set[str]:
    """The reasons of bad records that params.yaml does not allow preprocess to leave out."""
    reasons = set(ledger.dropped) - NEVER_STOP
    if options.on_bad_record == "drop":
        reasons &= {"over_length"}
    return reasons - {"over_length"} if options.over_length == "drop" else reasons


def remedies(options: Preprocess, reasons: set[str]) -> list[str]:
    """Which parameters would let preprocess go on despite these reasons."""
    ways = []
    if reasons - {"over_length"} - NEVER_STOP and options.on_bad_record == "stop":
        ways.append("to leave them out, set preprocess.on_bad_record to drop")
    if "over_length" in reasons:
        others = ["drop", "truncate_prompt"][options.over_length == "drop" :]
        ways.append(
            f"for texts that are too long, set preprocess.over_length to {' or '.join(others)}"
        )
    return ways


def assign(
    options: Preprocess, ledger: Ledger, used: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int8]:
    """The index into SPLITS of every record of the ledger, -1 for unused ones."""
    prompts, fixed = ledger.prompts.families, ledger.fixed(SPLITS)
    given = {source.split for source in ledger.sources}
    validation = 0 if "validation" in given else options.validation_fraction
    test = 0 if "test" in given else options.test_fraction
    parts = np.where(used, fixed, -1).astype(np.int8)
    rest = used & (fixed < 0)
    parts[rest] = split(prompts[rest], validation, test, options.seed)
    # A prompt in a training file is used for training wherever it appears.
    parts[rest] = np.where(among(prompts[rest], prompts[used & (fixed == 0)]), 0, parts[rest])
    judged = ledger.grade_of(PREFERENCE) > TIE
    for index, name in enumerate(SPLITS):
        if not (judged & (parts == index)).any():
            but_ties = " except ties" if (parts == index).any() else ""
            raise Fault(
                f"{options.data}: no pairs{but_ties} left for {name}, out of {used.sum()}; "
                "expected more prompts, or other values of preprocess.validation_fraction and "
                "test_fraction"
            )
    return parts


# --- second pass: the scratch table to the datasets ------------------------------------------


def write_splits(
    folder: Path, table: Path, ledger: Ledger, parts: npt.NDArray[np.int8], tokenizer: str
) -> None:
    """Write each split as a dataset, one after another to save memory."""
    late = ledger.late(parts >= 0)
    for index, name in enumerate(SPLITS):
        ledger.write(folder / name, table, parts == index, late, tokenizer, texts=name == "test")


# --- figures ---------------------------------------------------------------------------------


def measure(ledger: Ledger, parts: npt.NDArray[np.int8]) -> dict[str, Any]:
    """All figures of the pairs. `length` has quantiles over all texts, in tokens."""
    used = parts >= 0
    lengths = np.concatenate([ledger.column(side)[used] for side in ("chosen", "rejected")])
    tokens, most = int(lengths.sum()), int(lengths.max())
    preference = ledger.grade_of(PREFERENCE)
    quantiles = np.quantile(lengths, [0.5, 0.9, 0.99], method="nearest", overwrite_input=True)
    return {
        "pairs": {name: int((parts == i).sum()) for i, name in enumerate(SPLITS)},
        "prompts": {name: prompts_of(ledger, parts == i) for i, name in enumerate(SPLITS)},
        "dropped": dict(+ledger.dropped),
        "ties": int((used & (preference == TIE)).sum()),
        "soft": int((used & (preference > TIE) & (preference < 1)).sum()),
        "votes": ledger.votes,
        "merged": ledger.merged,
        "largest_family": largest_family(ledger, used),
        "truncated": ledger.truncated,
        "tokens": tokens,
        "length": dict(zip(("q50", "q90", "q99"), quantiles.tolist(), strict=True)) | {"max": most},
        "shared_prefix_share": round(2 * int(ledger.column("prefix")[used].sum()) / tokens, 4),
    }


def prompts_of(ledger: Ledger, rows: npt.NDArray[np.bool_]) -> int:
    """The number of different prompts in the comparisons selected by `rows`."""
    prompts = ledger.column("prompt")
    return sum(len(np.unique_counts(prompts[each]).values) for each in portions(prompts, rows))


def largest_family(ledger: Ledger, used: npt.NDArray[np.bool_]) -> int:
    """The number of prompts in the largest family; 1 if no prompt continues another."""
    prompts, families, largest = ledger.column("prompt"), ledger.prompts.families, 0
    for rows in portions(families, used):
        _, first = np.unique(prompts[rows], return_index=True)
        found = np.unique_counts(families[rows][first]).counts
        largest = max(largest, int(found.max(initial=0)))
    return largest


def headline(figures: dict[str, Any]) -> dict[str, int]:
    """The content of metrics/preprocess.json."""
    return {name: sum(figures[name].values()) for name in ("pairs", "dropped")}


def report(read: list[Source], figures: dict[str, Any]) -> None:
    """Print what was read and how much of it is in each split."""
    pairs, prompts, length = (figures[key] for key in ("pairs", "prompts", "length"))
    for source in read:
        print(source.description)
    for name in SPLITS:
        print(f"{name:<11}{pairs[name]:>8} pairs of {prompts[name]:>7} prompts")
    dropped = ", ".join(f"{n} {reason}" for reason, n in figures["dropped"].items()) or "none"
    print(f"dropped    {dropped}; prompts cut: {figures['truncated']}")
    report_clients(figures)
    if figures["ties"] or figures["soft"]:
        print(
            f"graded     ties: {figures['ties']}; preferences that are not certain: "
            f"{figures['soft']}"
        )
    if figures["votes"]:
        print(
            f"votes      {figures['votes']} records are votes on pairs that other records judge "
            f"too; {figures['merged']} of them are merged into the first record of the majority"
        )
    if figures["largest_family"] > 1:
        print(
            f"dialogues  up to {figures['largest_family']} prompts continue each other; all of "
            "them are in the same split"
        )
    print(
        f"tokens     {figures['tokens']:>8}, {length['q50']} per text at the median and "
        f"{length['max']} at most; {figures['shared_prefix_share']:.0%} in shared prefixes"
    )


def report_clients(figures: dict[str, Any]) -> None:
    """Print how many texts clients of the model cannot score as training saw them."""
    if count := figures["truncated"]:
        print(
            f"clients    the prompts of {counted(count, 'record')} were cut, so their whole texts "
            "are too long for clients: score and serve refuse them, others cut off their beginning"
        )
    if count := sum(figures["dropped"].get(reason, 0) for reason in ("needs_chat", TOOLS, *PARTS)):
        print(
            "clients    none can score conversations like those of "
            f"{counted(count, 'dropped record')}, because preprocess.template cannot render them"
        )


def report_other_files(*folders: Path) -> None:
    """Print which files in the folders are not read, because they may be meant for training."""
    for folder in folders:
        if names := other_names(folder):
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            print(f"not read   {', '.join(names[:SHOWN])}{more} in {folder}")


def report_unused(options: Preprocess) -> None:
    """Print that the chat template is not used, if one was named and the template is another."""
    if options.template != "chat" and Path(options.chat_template) != BASE / TOKENIZER_CONFIG:
        print(
            f"not used   {options.chat_template} (preprocess.chat_template), because "
            "preprocess.template is not chat"
        )


def report_sets(notes: Mapping[str, Notes]) -> None:
    """Print how many pairs of the extra test sets were left out or have leaked."""
    for name, found in notes.items():
        counts = asdict(found)
        if any(counts.values()):
            shown = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
            print(f"set        {name}: {shown}")


def show_example(encoder: Encoder) -> None:
    """Print the first training pair as the model sees it, with special tokens and line breaks."""
    row = tokenized.first_row(TOKENIZED / SPLITS[0])
    for name, ids in zip(("chosen", "rejected"), IDS, strict=True):
        text = json.dumps(encoder.decode(row[ids]), ensure_ascii=False)
        if len(text) > EXAMPLE_CHARACTERS:
            half = EXAMPLE_CHARACTERS // 2
            text = f"{text[:half]} ... {text[-half:]}"
        print(f"{name:<11}{text}")


if __name__ == "__main__":
    run_stage("stages.preprocess", __doc__, main)
