"""A tokenized split: a folder that `datasets.load_from_disk` reads, one row per comparison.

Rows are written in two steps: to a scratch table, before it is known which split they belong to,
and from there to the folder. Only one batch is in memory at a time. If people or other programs
read the answers of a split, it has a folder `answers` with their texts, one row per answer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reward.data.columns import (
    ANSWER,
    ANSWERS,
    COMPARISON,
    GRADES,
    ID,
    IDS,
    MASKS,
    PREFIX,
    PROMPT,
    PROMPT_ID,
    RESPONSE,
    RESPONSES,
    TEXT,
)
from reward.outputs import digest, read_json, write_json, writing
from reward.process import Fault, one_line

if TYPE_CHECKING:
    from datasets import Dataset, Features

Indices = npt.NDArray[np.integer]
Append = Callable[[pa.RecordBatch | pa.Table], None]

DATA = "data-00000-of-00001.arrow"
# Key in the schema's metadata: the SHA-256 of the tokenizer.json that made the ids.
TOKENIZER = b"tokenizer"
KEPT, COMPARED, OWN_IDS = "columns", "comparisons", "input_ids"
# The folder with the texts of a split, and how many of its rows are in memory at a time.
ANSWERS_OF = "answers"
GATHERED = 10_000
INTEGERS = pa.list_(pa.int32())
ANSWER_TYPE = pa.struct({OWN_IDS: INTEGERS, RESPONSE: pa.string(), TEXT: pa.string()})
COMPARISON_TYPE = pa.struct({ID: pa.string(), **dict.fromkeys((*ANSWERS, PREFIX), pa.int32())})
# One row per record, so that what its comparisons share is stored once.
SCRATCH = pa.schema(
    {
        PROMPT_ID: pa.string(),
        PROMPT: pa.string(),
        KEPT: pa.map_(pa.string(), pa.string()),
        ANSWERS_OF: pa.list_(ANSWER_TYPE),
        COMPARED: pa.list_(COMPARISON_TYPE),
    }
)


class TokenizedComparison(NamedTuple):
    """A comparison: its id, the indices of its answers in the record, and its prefix length."""

    id: str
    j: int
    k: int
    prefix: int


class Row(NamedTuple):
    """A row of the scratch table: the answers of a record as ids, as JSON messages, and as text."""

    prompt_id: str
    prompt: str
    columns: Mapping[str, str]
    ids: Sequence[npt.NDArray[np.int32]]
    responses: Sequence[str]
    texts: Sequence[str]
    comparisons: Sequence[TokenizedComparison]


@contextmanager
def stream(
    path: Path,
    schema: pa.Schema = SCRATCH,
    new: Callable[[pa.NativeFile, pa.Schema], Any] = pa.ipc.new_stream,
) -> Iterator[Append]:
    """A function that appends batches to a new Arrow stream, by default a scratch table.

    With `new=pa.ipc.new_file`, it is a file instead, whose batches can be read in any order.
    """
    with writing(path):
        sink = pa.OSFile(str(path), "wb")
        writer = new(sink, schema)

    def append(part: pa.RecordBatch | pa.Table) -> None:
        with writing(path):
            writer.write(part)

    try:
        yield append
    finally:
        with writing(path), sink:
            writer.close()


def batch(rows: Sequence[Row]) -> pa.RecordBatch:
    """One or more rows as a batch of the scratch table, built column by column."""
    ids = [each for row in rows for each in row.ids]
    answers = pa.StructArray.from_arrays(
        [
            pa.ListArray.from_arrays(_offsets([*map(len, ids)]), np.concatenate(ids)),
            pa.array([text for row in rows for text in row.responses], pa.string()),
            pa.array([text for row in rows for text in row.texts], pa.string()),
        ],
        fields=[*ANSWER_TYPE],
    )
    compared = [each for row in rows for each in row.comparisons]
    comparisons = pa.StructArray.from_arrays(
        [
            pa.array(each, kind.type)
            for each, kind in zip(zip(*compared, strict=True), COMPARISON_TYPE, strict=True)
        ],
        fields=[*COMPARISON_TYPE],
    )
    columns = [item for row in rows for item in row.columns.items()]
    data = [
        pa.array([row.prompt_id for row in rows]),
        pa.array([row.prompt for row in rows]),
        pa.MapArray.from_arrays(
            _offsets([len(row.columns) for row in rows]),
            pa.array([name for name, _ in columns], pa.string()),
            pa.array([value for _, value in columns], pa.string()),
        ),
        pa.ListArray.from_arrays(_offsets([len(row.ids) for row in rows]), answers),
        pa.ListArray.from_arrays(_offsets([len(row.comparisons) for row in rows]), comparisons),
    ]
    return pa.RecordBatch.from_arrays(data, schema=SCRATCH)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    """Where each list begins in their concatenation, and where the last one ends: [lists + 1]."""
    return pa.array(np.cumsum([0, *lengths], dtype=np.int32))


def write(
    folder: Path,
    table: Path,
    selected: npt.NDArray[np.bool_],
    late: Mapping[str, npt.NDArray[Any]],
    columns: list[str],
    tokenizer: str,
) -> None:
    """Write the selected comparisons of a scratch table to a new folder.

    `selected` is [comparisons], and so are `late`, ANSWERS and GRADES, which are known only after
    all records are read. `columns` are the extra columns to write. `tokenizer` is the
    SHA-256 of the tokenizer that made the ids. The folder's fingerprint is the beginning of the
    SHA-256 of its data.
    """
    from datasets import Features, List, Value

    sides: dict[str, Any] = {}
    for ids, mask in zip(IDS, MASKS, strict=True):
        sides |= {ids: List(Value("int32")), mask: List(Value("int8"))}
    features = Features(
        {
            ID: Value("string"),
            PROMPT_ID: Value("string"),
            **dict.fromkeys(ANSWERS, Value("int32")),
            **sides,
            PREFIX: Value("int32"),
            **dict.fromkeys(GRADES, Value("float64")),
            **{name: Value("string") for name in columns},
        }
    )
    start = 0
    with pa.OSFile(str(table)) as source, new_folder(folder, features, tokenizer) as append:
        for part in pa.ipc.open_stream(source):
            count = len(part[COMPARED].values)
            rows = np.flatnonzero(selected[start : start + count])
            if len(rows):
                known = {name: each[start + rows] for name, each in late.items()}
                append(_widened(part, rows, known, features.arrow_schema, columns))
            start += count


def write_answers(
    folder: Path, table: Path, sides: Indices, numbers: Indices, tokenizer: str
) -> None:
    """Write texts of answers from a scratch table to a new folder inside the folder of a split.

    `sides` says where each answer is: twice the index of a comparison, plus 1 if it is the rejected
    one. `numbers` are the numbers of the answers within their prompts. Shapes [answers]. The texts
    are first written to a separate table in the order of the scratch table, so that they are never
    all in memory.
    """
    from datasets import Features, Value

    texts = dict.fromkeys((PROMPT, RESPONSE, TEXT), Value("string"))
    features = Features({PROMPT_ID: Value("string"), ANSWER: Value("int32"), **texts})
    schema, own, order = features.arrow_schema, table.with_name(ANSWERS_OF), np.argsort(sides)
    ends = _write_in_order(own, table, sides[order], numbers[order], schema)
    places = np.argsort(order)
    with pa.OSFile(str(own)) as source, new_folder(folder / ANSWERS_OF, features, tokenizer) as add:
        reader = pa.ipc.open_file(source)
        for start in range(0, len(sides), GATHERED):
            add(_gathered(reader, ends, places[start : start + GATHERED]))
    own.unlink()


def _write_in_order(
    path: Path, table: Path, sides: Indices, numbers: Indices, schema: pa.Schema
) -> Indices:
    """Write answers to a file in the order of a scratch table. Returns the end of each batch."""
    start, ends = 0, [0]
    with pa.OSFile(str(table)) as source, stream(path, schema, pa.ipc.new_file) as append:
        for part in pa.ipc.open_stream(source):
            count = len(part[COMPARED].values)
            found = slice(ends[-1], int(np.searchsorted(sides, 2 * (start + count))))
            rows, is_second = np.divmod(sides[found] - 2 * start, 2)
            start += count
            if len(rows):
                places = np.where(is_second, *reversed(_places(part, rows)))
                records = pa.array(_records(part)[rows])
                data = {name: part[name].take(records) for name in (PROMPT_ID, PROMPT)}
                answers = part[ANSWERS_OF].values.take(pa.array(places))
                data |= {name: answers.field(name) for name in (RESPONSE, TEXT)}
                data[ANSWER] = pa.array(numbers[found], pa.int32())
                append(
                    pa.RecordBatch.from_arrays([data[name] for name in schema.names], schema=schema)
                )
                ends.append(found.stop)
    return np.array(ends[1:])


def _gathered(reader: pa.RecordBatchFileReader, ends: Indices, places: Indices) -> pa.Table:
    """The rows at `places` in a file whose batches end before the rows `ends`."""
    which = np.searchsorted(ends, places, "right")
    order = np.argsort(which, kind="stable")
    taken = []
    for index in np.unique(which):
        part = reader.get_batch(int(index))
        rows = places[order[which[order] == index]] - (ends[index] - len(part))
        taken.append(part.take(pa.array(rows)))
    return pa.Table.from_batches(taken).take(pa.array(np.argsort(order)))


def _records(part: pa.RecordBatch) -> Indices:
    """The record of each comparison of a batch: [comparisons]."""
    counts = np.diff(part[COMPARED].offsets.to_numpy())
    return np.repeat(np.arange(len(part)), counts)


def _places(part: pa.RecordBatch, rows: Indices) -> list[Indices]:
    """The indices of the answers j and k of some comparisons in a batch: two of [rows]."""
    starts = part[ANSWERS_OF].offsets.to_numpy()[:-1][_records(part)[rows]]
    compared = part[COMPARED].values
    return [starts + compared.field(side).to_numpy()[rows] for side in ANSWERS]


@contextmanager
def new_folder(folder: Path, features: "Features", tokenizer: str) -> Iterator[Append]:
    """A function that appends batches to a new folder that `datasets.load_from_disk` reads."""
    from datasets import DatasetInfo

    with writing(folder):
        folder.mkdir(parents=True)
    schema = features.arrow_schema
    schema = schema.with_metadata(schema.metadata | {TOKENIZER: tokenizer.encode()})

    with stream(folder / DATA, schema) as append:
        yield lambda part: append(part.replace_schema_metadata(schema.metadata))
    with writing(folder):
        DatasetInfo(features=features).write_to_directory(str(folder))
    write_json(
        folder / "state.json",
        {
            "_data_files": [{"filename": DATA}],
            "_fingerprint": digest(folder / DATA)[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    )


def _widened(
    part: pa.RecordBatch,
    rows: Indices,
    late: Mapping[str, npt.NDArray[Any]],
    schema: pa.Schema,
    columns: list[str],
) -> pa.Table:
    """Some comparisons of a batch of the scratch table, as rows of a split."""
    compared = part[COMPARED].values.take(pa.array(rows))
    records = pa.array(_records(part)[rows])
    data = {name: compared.field(name) for name in (ID, PREFIX)} | dict(late)
    data[PROMPT_ID] = part[PROMPT_ID].take(records)
    answers = part[ANSWERS_OF].values.field(OWN_IDS)
    for ids, mask, places in zip(IDS, MASKS, _places(part, rows), strict=True):
        data[ids] = answers.take(pa.array(places))
        ones = np.ones(len(data[ids].values), dtype=np.int8)
        data[mask] = pa.ListArray.from_arrays(data[ids].offsets, ones)
    for name in columns:
        data[name] = pc.map_lookup(part[KEPT].take(records), name, "first")
    return pa.table(data).select(schema.names).cast(schema)


def first_row(path: Path) -> dict[str, Any]:
    """The first row of a tokenized split."""
    with pa.memory_map(str(path / DATA)) as source:
        [row] = pa.ipc.open_stream(source).read_next_batch().slice(0, 1).to_pylist()
    return dict(row)


def load(path: Path, base: Path, columns: Sequence[str] = COMPARISON) -> "Dataset":
    """A tokenized split.

    Raises a Fault if it is damaged, if another tokenizer made its ids, or if it lacks one of the
    columns.
    """
    from datasets import Dataset

    try:
        state = read_json(path / "state.json")
        whole = digest(path / DATA)[:16] == state["_fingerprint"]
        # A damaged file may contain anything, so it is not parsed.
        found = Dataset.load_from_disk(str(path)) if whole else None
        with pa.memory_map(str(path / DATA)) as source:
            tokenizer = pa.ipc.open_stream(source).schema.metadata[TOKENIZER].decode()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise Fault(
            f"{path} cannot be read ({one_line(error)}), expected a split that preprocess wrote"
        ) from None
    if found is None:
        raise Fault(f"{path} is damaged, expected the bytes that preprocess wrote; run dvc repro")
    if not (own := base / "tokenizer.json").is_file():
        raise Fault(f"{own} is missing, expected what fetch wrote; run dvc repro")
    if tokenizer != digest(own):
        raise Fault(
            f"{path} was made with a different tokenizer from that of {base}; run dvc repro"
        )
    if missing := [name for name in columns if name not in found.column_names]:
        raise Fault(
            f"{path} lacks {', '.join(missing)}, so another version of this project wrote it; run "
            "dvc repro"
        )
    return found


def load_answers(path: Path, base: Path) -> "Dataset":
    """The texts of a tokenized split, one row per answer. Raises a Fault as `load` does.

    The columns are `prompt_id` and `answer`, the number that the columns ANSWERS of the comparisons
    refer to; `prompt` and `response`, messages as JSON; and `text`, both as rendered by the
    template. The answers to one prompt are consecutive, in the order of their numbers.
    """
    return load(path / ANSWERS_OF, base, RESPONSES)


def conversations(pairs: "Dataset", found: "Dataset") -> list[tuple[str, str, str]]:
    """Prompt, chosen and rejected of each comparison, as JSON messages, from `load_answers`."""
    keys = zip(found[PROMPT_ID][:], found[ANSWER][:], strict=True)
    texts = dict(zip(keys, zip(found[PROMPT][:], found[RESPONSE][:], strict=True), strict=True))
    result = []
    for prompt, j, k in zip(*(pairs[name][:] for name in (PROMPT_ID, *ANSWERS)), strict=True):
        (question, chosen), (_, rejected) = texts[prompt, j], texts[prompt, k]
        result.append((question, chosen, rejected))
    return result
