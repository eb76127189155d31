"""A tokenized split: a folder that `datasets.load_from_disk` reads, one row a comparison.

Its rows are written in two steps, so that memory holds one batch of them: to a scratch table,
before it is known which rows go where, and from there to the folder. Where people and other
programs are to read the answers, the folder `answers` inside it has their texts, one row an answer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reward.data.columns import (
    ANSWER,
    ANSWERS,
    CONVERSATION,
    GRADES,
    ID,
    IDS,
    MASKS,
    PREFIX,
    PROMPT,
    PROMPT_ID,
    RESPONSE,
    TEXT,
)
from reward.outputs import digest, read_json, write_json, writing
from reward.process import Fault

if TYPE_CHECKING:
    from datasets import Dataset, Features

Row = Mapping[str, Any]
Indices = npt.NDArray[np.integer]
Append = Callable[[pa.RecordBatch | pa.Table], None]

DATA = "data-00000-of-00001.arrow"
# In the schema of the data: the SHA-256 of the tokenizer.json that the ids are of.
TOKENIZER = b"tokenizer"
KEPT = "columns"
TEXTS = ("text_j", "text_k")
# The folder of the texts in that of a split, and how many of its rows are gathered at once.
ANSWERS_OF = "answers"
GATHERED = 1000
SCRATCH = pa.schema(
    {
        ID: pa.string(),
        PROMPT_ID: pa.string(),
        **dict.fromkeys(IDS, pa.list_(pa.int32())),
        PREFIX: pa.int32(),
        **dict.fromkeys((*CONVERSATION, *TEXTS), pa.string()),
        KEPT: pa.map_(pa.string(), pa.string()),
    }
)


@contextmanager
def stream(path: Path, schema: pa.Schema = SCRATCH) -> Iterator[Append]:
    """What appends batches to a new stream of Arrow; one of a scratch table unless it is said."""
    with writing(path):
        sink = pa.OSFile(str(path), "wb")
        writer = pa.ipc.new_stream(sink, schema)

    def append(part: pa.RecordBatch | pa.Table) -> None:
        with writing(path):
            writer.write(part)

    try:
        yield append
    finally:
        with writing(path), sink:
            writer.close()


def batch(rows: Iterable[Row]) -> pa.RecordBatch:
    """Rows as a batch of the scratch table; their `columns` are pairs of name and text."""
    return pa.RecordBatch.from_pylist(list(rows), SCRATCH)


def write(
    folder: Path,
    table: Path,
    wanted: npt.NDArray[np.bool_],
    late: Mapping[str, npt.NDArray[Any]],
    columns: list[str],
    tokenizer: str,
) -> None:
    """The wanted rows of a scratch table, with these kept columns, as a new folder.

    `late` are the columns that are known only once all rows are, ANSWERS and GRADES, of the wanted
    rows. The `tokenizer` is the SHA-256 of the tokenizer that made the ids. The folder's
    fingerprint begins the digest of its data.
    """
    from datasets import Features, List, Value

    masks = dict.fromkeys(MASKS, List(Value("int8")))
    ids = dict.fromkeys(IDS, List(Value("int32")))
    sides = [item for pair in zip(ids.items(), masks.items(), strict=True) for item in pair]
    features = Features(
        {
            ID: Value("string"),
            PROMPT_ID: Value("string"),
            **dict.fromkeys(ANSWERS, Value("int32")),
            **dict(sides),
            PREFIX: Value("int32"),
            **dict.fromkeys(GRADES, Value("float64")),
            **{name: Value("string") for name in columns},
        }
    )
    start = done = 0
    with pa.OSFile(str(table)) as source, new_folder(folder, features, tokenizer) as append:
        for part in pa.ipc.open_stream(source):
            rows = part.filter(pa.array(wanted[start : start + len(part)]))
            start += len(part)
            if len(rows):
                known = {name: each[done : done + len(rows)] for name, each in late.items()}
                append(_widened(rows, known, features.arrow_schema, columns))
                done += len(rows)


def write_answers(
    folder: Path, table: Path, sides: Indices, numbers: Indices, tokenizer: str
) -> None:
    """The texts of answers from a scratch table, as a new folder in that of a split.

    `sides` are the places of the answers, twice the row and 1 for what is rejected in it, `numbers`
    those within their prompts. Shapes [answers].
    """
    from datasets import Features, Value

    texts = dict.fromkeys((PROMPT, RESPONSE, TEXT), Value("string"))
    features = Features({PROMPT_ID: Value("string"), ANSWER: Value("int32"), **texts})
    with (
        pa.memory_map(str(table)) as source,
        new_folder(folder / ANSWERS_OF, features, tokenizer) as append,
    ):
        parts = pa.ipc.open_stream(source).read_all().to_batches()
        ends = np.cumsum([len(part) for part in parts])
        for start in range(0, len(sides), GATHERED):
            found = sides[start : start + GATHERED]
            rows = _gathered(parts, ends, found // 2)
            second = pa.array(found % 2 == 1)
            response, text = (
                pc.if_else(second, rows[k], rows[j]) for j, k in (CONVERSATION[1:], TEXTS)
            )
            known = rows[PROMPT_ID], numbers[start : start + GATHERED], rows[PROMPT]
            data = dict(zip(features, (*known, response, text), strict=True))
            append(pa.table(data).cast(features.arrow_schema))


def _gathered(parts: list[pa.RecordBatch], ends: Indices, rows: Indices) -> pa.Table:
    """Rows of batches, in any order; the batches end before the rows `ends`."""
    which = np.searchsorted(ends, rows, "right")
    order = np.argsort(which, kind="stable")
    taken = [
        parts[index].take(rows[order[which[order] == index]] - (ends[index] - len(parts[index])))
        for index in np.unique(which)
    ]
    return pa.Table.from_batches(taken).take(np.argsort(order))


@contextmanager
def new_folder(folder: Path, features: "Features", tokenizer: str) -> Iterator[Append]:
    """What appends batches to a new folder that `datasets.load_from_disk` reads."""
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
    late: Mapping[str, npt.NDArray[Any]],
    schema: pa.Schema,
    columns: list[str],
) -> pa.Table:
    """A batch of the scratch table with what was not in it, and the kept columns spelt out."""
    data = {name: part[name] for name in SCRATCH.names if name in schema.names} | dict(late)
    for ids, mask in zip(IDS, MASKS, strict=True):
        ones = np.ones(len(part[ids].values), dtype=np.int8)
        data[mask] = pa.ListArray.from_arrays(part[ids].offsets, ones)
    for name in columns:
        data[name] = pc.map_lookup(part[KEPT], name, "first")
    return pa.table(data).select(schema.names).cast(schema)


def first_row(path: Path) -> Row:
    """The first row of a tokenized split."""
    with pa.memory_map(str(path / DATA)) as source:
        [row] = pa.ipc.open_stream(source).read_next_batch().slice(0, 1).to_pylist()
    return dict(row)


def load(path: Path, base: Path) -> "Dataset":
    """A tokenized split. Raises a Fault if it is damaged, or has ids of another tokenizer."""
    from datasets import Dataset

    try:
        state = read_json(path / "state.json")
        whole = digest(path / DATA)[:16] == state["_fingerprint"]
        # What is damaged may be anything, so nothing is read of it.
        found = Dataset.load_from_disk(str(path)) if whole else None
        with pa.memory_map(str(path / DATA)) as source:
            tokenizer = pa.ipc.open_stream(source).schema.metadata[TOKENIZER].decode()
        here = digest(base / "tokenizer.json")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise Fault(f"{path} cannot be read ({reason}), wanted a split of preprocess") from None
    if found is None:
        raise Fault(f"{path} is damaged, wanted a split as preprocess wrote it; run dvc repro")
    if tokenizer != here:
        raise Fault(
            f"{path} has ids of another tokenizer than that of {base}, wanted the same; "
            "run dvc repro"
        )
    return found


def answers(path: Path, base: Path) -> "Dataset":
    """The texts of a tokenized split, one row an answer. Raises a Fault as `load` does.

    Its columns: `prompt_id` and `answer`, the number, as the comparisons name it in ANSWERS;
    `prompt` and `response`, messages as JSON; `text`, what the template made of both. The answers
    of a prompt follow each other by their numbers.
    """
    return load(path / ANSWERS_OF, base)


def conversations(pairs: "Dataset", found: "Dataset") -> list[tuple[str, str, str]]:
    """Prompt, chosen and rejected of each comparison, messages as JSON, from its `answers`."""
    keys = zip(found[PROMPT_ID], found[ANSWER], strict=True)
    texts = dict(zip(keys, zip(found[PROMPT], found[RESPONSE], strict=True), strict=True))
    result = []
    for prompt, j, k in zip(*(pairs[name] for name in (PROMPT_ID, *ANSWERS)), strict=True):
        (asked, chosen), (_, rejected) = texts[prompt, j], texts[prompt, k]
        result.append((asked, chosen, rejected))
    return result
