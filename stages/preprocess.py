"""Check the preference pairs, turn them into ids and split them by prompt.

    python -m stages.preprocess

Reads preprocess.data and preprocess.test_data, and the tokenizer of models/base. Writes the
datasets data/tokenized/{train,validation,test} with template.json, and metrics/preprocess.json.
Two passes: the files to a scratch table on disk, the scratch table to the datasets, so memory
holds a few numbers a pair, however long the texts.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from stages import params
from stages.outputs import digest, whole_folder, write_json
from stages.pairs import (
    BadRecord,
    Pair,
    check,
    contradictions,
    duplicates,
    files,
    read,
    split,
)
from stages.params import Positive, Rule, Seed, Text
from stages.process import Fault, run
from stages.tokens import Encoder, Template, prefix_length

BASE = Path("models/base")
TOKENIZED = Path("data/tokenized")
METRICS = Path("metrics/preprocess.json")
SPLITS = ("train", "validation", "test")
BATCH = 1024
SHOWN = 10

Share = Annotated[float, Rule("a number from 0 up to, not including, 0.5", lambda s: 0 <= s < 0.5)]
Ids = list[int]


@dataclass(frozen=True)
class Preprocess:
    """The group `preprocess` of params.yaml, where each key is described."""

    data: Text
    test_data: Text
    validation_fraction: Share
    test_fraction: Share
    seed: Seed
    template: Text
    append_eos: Annotated[bool, Rule("true or false")]
    max_length: Positive
    over_length: Literal["stop", "drop", "truncate_prompt"]
    on_bad_record: Literal["stop", "drop"]


@dataclass
class Ledger:
    """What was seen: a few numbers of every usable record, and what is wrong with the others."""

    files: list[Path] = field(default_factory=list)
    file: array[int] = field(default_factory=lambda: array("H"))
    position: array[int] = field(default_factory=lambda: array("L"))
    prompt: array[int] = field(default_factory=lambda: array("Q"))
    answers: array[int] = field(default_factory=lambda: array("Q"))
    pair: array[int] = field(default_factory=lambda: array("Q"))
    chosen: array[int] = field(default_factory=lambda: array("L"))
    rejected: array[int] = field(default_factory=lambda: array("L"))
    prefix: array[int] = field(default_factory=lambda: array("L"))
    columns: set[str] = field(default_factory=set)
    faults: list[tuple[int, int, str]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0

    def bad(self, file: int, position: int, fault: BadRecord) -> None:
        """Count a bad record, keep its sentence if it is among the first."""
        self.dropped[fault.reason] += 1
        if sum(self.dropped.values()) <= SHOWN:
            self.faults.append((file, position, f"{fault.reason}: {fault}"))

    def place(self, file: int, position: int) -> str:
        unit = {".jsonl": "line", ".parquet": "row"}
        name = self.files[file]
        return (
            f"{name}: {unit.get(name.with_suffix('').suffix or name.suffix, 'record')} {position}"
        )


def main() -> None:
    group = params.load("preprocess", Preprocess)
    template = Template.of(group.template, group.append_eos, group.max_length, BASE)
    encoder = Encoder(BASE, template)
    TOKENIZED.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=TOKENIZED.parent, prefix="scratch-") as scratch:
        table = Path(scratch) / "pairs.arrow"
        ledger = Ledger()
        first_test_file = tokenize(group, encoder, table, ledger)
        usable = without_repeats(group, ledger)
        parts = assign(group, ledger, usable, first_test_file)
        metrics = measure(ledger, parts)
        with whole_folder(TOKENIZED) as folder:
            template.save(folder / "template.json")
            for index, name in enumerate(SPLITS):
                write_dataset(folder / name, table, parts == index, sorted(ledger.columns))
    write_json(METRICS, metrics)
    report(metrics)


# --- first pass: files to the scratch table --------------------------------------------------


SCRATCH = pa.schema(
    {
        "id": pa.string(),
        "prompt_id": pa.string(),
        "input_ids_j": pa.list_(pa.int32()),
        "input_ids_k": pa.list_(pa.int32()),
        "prefix_length": pa.int32(),
        "columns": pa.string(),
    }
)


def tokenize(group: Preprocess, encoder: Encoder, table: Path, ledger: Ledger) -> int:
    """Write every usable record's ids to `table`. Returns the index of the first test file."""
    ledger.files = files(Path(group.data))
    first_test_file = len(ledger.files)
    if group.test_data != group.data:
        ledger.files += files(Path(group.test_data))
    with pa.OSFile(str(table), "wb") as sink, pa.ipc.new_stream(sink, SCRATCH) as writer:
        records = checked(ledger)
        while batch := list(islice(records, BATCH)):
            rows = encode(group, encoder, batch, ledger)
            writer.write_table(pa.Table.from_pylist(rows, schema=SCRATCH))
    return first_test_file


def checked(ledger: Ledger) -> Iterator[tuple[int, int, Pair]]:
    """File index, position (from 1) and pair of every record that passes the checks."""
    for index, path in enumerate(ledger.files):
        bar = tqdm(read(path), desc=str(path), unit=" pairs", delay=2, disable=None)
        for position, record in enumerate(bar, start=1):
            try:
                yield index, position, check(record)
            except BadRecord as fault:
                ledger.bad(index, position, fault)


def encode(
    group: Preprocess,
    encoder: Encoder,
    batch: Sequence[tuple[int, int, Pair]],
    ledger: Ledger,
) -> list[dict[str, Any]]:
    """The rows of the scratch table for a batch of records; notes each in the ledger."""
    rendered = []
    for file, position, pair in batch:
        try:
            texts = [encoder.render(pair.prompt, side) for side in (pair.chosen, pair.rejected)]
            rendered.append((file, position, pair, texts))
        except BadRecord as fault:
            ledger.bad(file, position, fault)
    ids = encoder.encode([text for *_, texts in rendered for text in texts])
    rows = []
    for (file, position, pair, texts), sides in zip(
        rendered, zip(ids[::2], ids[1::2], strict=True), strict=True
    ):
        try:
            chosen, rejected = within_length(group, encoder, texts, sides, ledger)
            if chosen == rejected:
                raise BadRecord("identical_tokens", "both answers give the same ids")
        except BadRecord as fault:
            ledger.bad(file, position, fault)
            continue
        prefix = prefix_length(chosen, rejected)
        note(ledger, file, position, pair, (len(chosen), len(rejected), prefix))
        rows.append(
            {
                "id": pair.id,
                "prompt_id": f"{pair.prompt_hash:016x}",
                "input_ids_j": chosen,
                "input_ids_k": rejected,
                "prefix_length": prefix,
                "columns": json.dumps(pair.columns),
            }
        )
    return rows


def within_length(
    group: Preprocess, encoder: Encoder, texts: Any, sides: tuple[Ids, Ids], ledger: Ledger
) -> tuple[Ids, Ids]:
    """Both sides within the maximum length, or a BadRecord."""
    longest = max(map(len, sides))
    if longest <= group.max_length:
        return sides
    sentence = f"has {longest} tokens, at most {group.max_length} fit (preprocess.max_length)"
    if group.over_length != "truncate_prompt":
        raise BadRecord("over_length", sentence)
    cut = encoder.encode_cut(texts)
    if cut is None:
        raise BadRecord("answer_too_long", f"{sentence}, and its prompt is too short to cut")
    ledger.truncated += 1
    return cut[0], cut[1]


def note(
    ledger: Ledger, file: int, position: int, pair: Pair, lengths: tuple[int, int, int]
) -> None:
    ledger.file.append(file)
    ledger.position.append(position)
    ledger.prompt.append(pair.prompt_hash)
    ledger.answers.append(pair.answers_hash)
    ledger.pair.append(pair.pair_hash)
    for column, length in zip(
        (ledger.chosen, ledger.rejected, ledger.prefix), lengths, strict=True
    ):
        column.append(length)
    ledger.columns.update(pair.columns)


# --- all records together --------------------------------------------------------------------


def without_repeats(group: Preprocess, ledger: Ledger) -> npt.NDArray[np.bool_]:
    """Which records of the ledger are used. Raises the Fault that lists the first bad ones."""
    pairs = np.frombuffer(ledger.pair, dtype=np.uint64)
    answers = np.frombuffer(ledger.answers, dtype=np.uint64)
    contradicted, repeated = contradictions(pairs, answers), duplicates(pairs)
    repeated &= ~contradicted
    for reason, found, sentence in (
        ("contradiction", contradicted, "another record prefers its answers the other way round"),
        ("duplicate", repeated, "an earlier record is the same"),
    ):
        ledger.dropped[reason] += int(found.sum())
        ledger.faults += [
            (ledger.file[row], ledger.position[row], f"{reason}: {sentence}")
            for row in np.flatnonzero(found)[:SHOWN].tolist()
        ]
    stopping = +ledger.dropped
    if group.on_bad_record == "drop":
        stopping = Counter({"over_length": stopping["over_length"]})
    if group.over_length == "drop":
        stopping["over_length"] = 0
    if stopping.total():
        raise Fault(fault_list(ledger, +stopping))
    usable = ~(contradicted | repeated)
    if not usable.any():
        raise Fault(fault_list(ledger, +ledger.dropped) + "\nno record is left")
    return usable


def fault_list(ledger: Ledger, stopping: Counter[str]) -> str:
    """The first bad records with their places, and how to go on without them."""
    listed = sorted(fault for fault in ledger.faults if fault[2].split(":")[0] in stopping)[:SHOWN]
    lines = [f"{ledger.place(file, position)}: {text}" for file, position, text in listed]
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(stopping.items()))
    ways = []
    if stopping.keys() - {"over_length"}:
        ways.append("preprocess.on_bad_record drop leaves bad records out")
    if "over_length" in stopping:
        ways.append("preprocess.over_length drop or truncate_prompt deals with long ones")
    return "\n".join([*lines, f"bad records: {counts}; {', '.join(ways)}"])


def assign(
    group: Preprocess, ledger: Ledger, usable: npt.NDArray[np.bool_], first_test_file: int
) -> npt.NDArray[np.int8]:
    """The index into SPLITS of every record of the ledger, -1 for those not used."""
    prompts = np.frombuffer(ledger.prompt, dtype=np.uint64)
    tested = np.frombuffer(ledger.file, dtype=np.uint16) >= first_test_file
    parts = np.full(len(prompts), -1, dtype=np.int8)
    if group.test_data == group.data:
        parts[usable] = split(
            prompts[usable], group.validation_fraction, group.test_fraction, group.seed
        )
    else:
        rest = usable & ~tested
        parts[rest] = split(prompts[rest], group.validation_fraction, 0, group.seed)
        parts[usable & tested] = 2
        leaked = np.flatnonzero(tested & usable & np.isin(prompts, prompts[rest]))
        if len(leaked):
            places = [
                ledger.place(ledger.file[row], ledger.position[row]) for row in leaked[:SHOWN]
            ]
            raise Fault(
                f"{len(leaked)} test records have a prompt that stands in {group.data} too, "
                f"wanted none: {'; '.join(places)}"
            )
    for index, name in enumerate(SPLITS):
        if not (parts == index).any():
            raise Fault(
                f"{group.data}: no pair is left for {name} out of {len(prompts)}; wanted more "
                f"prompts, or other values of preprocess.validation_fraction and test_fraction"
            )
    return parts


def measure(ledger: Ledger, parts: npt.NDArray[np.int8]) -> dict[str, Any]:
    """The content of metrics/preprocess.json; lengths in tokens, of chosen and rejected alike."""
    used = parts >= 0
    prompts = np.frombuffer(ledger.prompt, dtype=np.uint64)
    chosen, rejected, prefix = (
        np.frombuffer(column, dtype=np.uint64)[used].astype(np.int64)
        for column in (ledger.chosen, ledger.rejected, ledger.prefix)
    )
    lengths = np.concatenate([chosen, rejected])
    tokens = int(lengths.sum())
    quantiles = np.quantile(lengths, [0.5, 0.9, 0.99], method="nearest").tolist()
    return {
        "pairs": {name: int((parts == i).sum()) for i, name in enumerate(SPLITS)},
        "prompts": {name: len(np.unique(prompts[parts == i])) for i, name in enumerate(SPLITS)},
        "dropped": dict(+ledger.dropped),
        "truncated": ledger.truncated,
        "tokens": tokens,
        "length": dict(zip(("q50", "q90", "q99"), quantiles, strict=True))
        | {"max": int(lengths.max())},
        "shared_prefix_share": round(2 * int(prefix.sum()) / tokens, 4),
    }


# --- second pass: the scratch table to the datasets ------------------------------------------


def write_dataset(
    folder: Path, table: Path, chosen_rows: npt.NDArray[np.bool_], columns: list[str]
) -> None:
    """The rows of the scratch table as a folder that `datasets.load_from_disk` reads."""
    from datasets import DatasetInfo, Features, List, Value

    ids, mask = List(Value("int32")), List(Value("int8"))
    features = Features(
        {
            "id": Value("string"),
            "prompt_id": Value("string"),
            "input_ids_j": ids,
            "attention_mask_j": mask,
            "input_ids_k": ids,
            "attention_mask_k": mask,
            "prefix_length": Value("int32"),
            **{name: Value("string") for name in columns},
        }
    )
    schema, name = features.arrow_schema, "data-00000-of-00001.arrow"
    folder.mkdir()
    start = 0
    with (
        pa.memory_map(str(table)) as source,
        pa.OSFile(str(folder / name), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for batch in pa.ipc.open_stream(source):
            mask_here = chosen_rows[start : start + len(batch)]
            start += len(batch)
            writer.write_table(widened(batch.filter(pa.array(mask_here)), schema, columns))
    DatasetInfo(features=features).write_to_directory(str(folder))
    write_json(
        folder / "state.json",
        {
            "_data_files": [{"filename": name}],
            "_fingerprint": digest(folder / name)[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    )


def widened(batch: pa.RecordBatch, schema: pa.Schema, columns: list[str]) -> pa.Table:
    """A batch of the scratch table with the attention masks and the kept columns spelt out."""
    rows = [json.loads(text) for text in batch["columns"].to_pylist()]
    kept = {name: [row.get(name) for row in rows] for name in columns}
    data: dict[str, Any] = {name: batch[name] for name in SCRATCH.names[:-1]}
    for side in "jk":
        ids = batch[f"input_ids_{side}"]
        ones = np.ones(len(ids.flatten()), dtype=np.int8)
        offsets = np.concatenate([[0], np.cumsum(ids.value_lengths().fill_null(0))])
        data[f"attention_mask_{side}"] = pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), pa.array(ones)
        )
    return pa.table(data | kept).select(schema.names).cast(schema)


def report(metrics: dict[str, Any]) -> None:
    pairs, prompts, length = (metrics[key] for key in ("pairs", "prompts", "length"))
    for name in SPLITS:
        print(f"{name:<11}{pairs[name]:>8} pairs of {prompts[name]:>7} prompts")
    dropped = ", ".join(f"{n} {reason}" for reason, n in metrics["dropped"].items()) or "none"
    print(f"dropped    {dropped}; prompts cut: {metrics['truncated']}")
    print(
        f"tokens     {metrics['tokens']:>8}, a text {length['q50']} at the median and "
        f"{length['max']} at most; {metrics['shared_prefix_share']:.0%} in shared prefixes"
    )


if __name__ == "__main__":
    run(main)
