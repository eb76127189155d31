"""A tokenized split: a folder that `datasets.load_from_disk` reads, one row a pair.

Its rows are written in two steps, so that memory holds one batch of them: to a scratch table,
before it is known which rows go where, and from there to the folder.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reward.data.columns import CONVERSATION, ID, IDS, MASKS, PREFIX, PROMPT_ID, TEXTS
from reward.outputs import digest, read_json, write_json, writing
from reward.process import Fault

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]
Append = Callable[[pa.RecordBatch | pa.Table], None]

DATA = "data-00000-of-00001.arrow"
# In the schema of the data: the SHA-256 of the tokenizer.json that the ids are of.
TOKENIZER = b"tokenizer"
KEPT = "columns"
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
    columns: list[str],
    tokenizer: str,
    texts: bool = True,
) -> None:
    """The wanted rows of a scratch table, with these kept columns, as a new folder.

    With their `texts` people and other programs can read the pairs; training does without. The
    `tokenizer` is the SHA-256 of the tokenizer that made the ids. The folder's fingerprint begins
    the digest of its data.
    """
    from datasets import DatasetInfo, Features, List, Value

    masks = dict.fromkeys(MASKS, List(Value("int8")))
    ids = dict.fromkeys(IDS, List(Value("int32")))
    sides = [item for pair in zip(ids.items(), masks.items(), strict=True) for item in pair]
    features = Features(
        {
            ID: Value("string"),
            PROMPT_ID: Value("string"),
            **dict(sides),
            PREFIX: Value("int32"),
            **dict.fromkeys((*CONVERSATION, *TEXTS) if texts else (), Value("string")),
            **{name: Value("string") for name in columns},
        }
    )
    schema = features.arrow_schema
    schema = schema.with_metadata(schema.metadata | {TOKENIZER: tokenizer.encode()})
    with writing(folder):
        folder.mkdir(parents=True)
    start = 0
    with pa.OSFile(str(table)) as source, stream(folder / DATA, schema) as append:
        for part in pa.ipc.open_stream(source):
            rows = part.filter(pa.array(wanted[start : start + len(part)]))
            start += len(part)
            if len(rows):
                append(_widened(rows, schema, columns))
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


def _widened(part: pa.RecordBatch, schema: pa.Schema, columns: list[str]) -> pa.Table:
    """A batch of the scratch table with the attention masks and the kept columns spelt out."""
    data = {name: part[name] for name in SCRATCH.names if name != KEPT}
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
