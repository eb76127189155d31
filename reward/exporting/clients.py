"""The clients of an exported reward model: each scores the test pairs in its own way.

    python -m reward.exporting.clients request.json

request.json is a `Request`. The rewards are written to found.parquet in the same folder, with the
columns client, form, pair (its index), reward_chosen and reward_rejected. Export runs this module
on the folder that it is about to finish, in a new process with an empty working directory. The
process ends when export ends. All clients except packs get ids or text in several forms: padded on
the right or on the left, one text at a time, or with eos at the end.
"""

import gc
import json
import sys
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    logging,
    pipeline,
)

from reward.data import tokenized
from reward.exporting.clients_trl import HEAVY
from reward.exporting.exported import (
    EXPORTED_BASE,
    MERGED,
    exported_quantization,
    load_exported,
)
from reward.exporting.inputs import (
    EOS,
    LEFT,
    RIGHT,
    SINGLE,
    Client,
    Exported,
    Form,
    Score,
    once,
    paired,
)
from reward.model import group
from reward.model.base import (
    Quantization,
    adapt,
    device,
    keep_weights_unpacked,
    load_base,
    silent_peft,
)
from reward.model.launching import distribute
from reward.model.memory import within_memory
from reward.model.packing import Texts, pairs_of
from reward.model.rankings import Comparison, Ranking, rankings_of, sides
from reward.model.scoring import score
from reward.outputs import read_json, with_bar, writing
from reward.process import command_line, free_memory, run, threads

CLIENT, FORM, FOUND, LEFT_OUT = "client", "form", "found.parquet", b"left_out"


@dataclass(frozen=True)
class Request:
    """What to score with which clients: the paths of an exported folder, its pairs and its base.

    The client `packs` scores all pairs, in packs of at most `tokens_per_pack` tokens as in the
    evaluation. The other clients score the pairs with the indices `compared`.
    """

    folder: str
    pairs: str
    base: str
    clients: Literal["light", "all"]
    tokens_per_pack: int
    compared: list[int]


def main() -> None:
    """Handle the request, with one process for each GPU."""
    parser = command_line("reward.exporting.clients", __doc__)
    parser.add_argument(
        "request", type=Path, help="JSON file; found.parquet is written to its folder"
    )
    path = parser.parse_args().request
    request = Request(**read_json(path))
    distribute(
        lambda: handle(request, path.with_name(FOUND)),
        "reward.exporting.clients",
        arguments=sys.argv[1:],
    )


def handle(request: Request, output: Path) -> None:
    """Score the pairs with all clients and write the rewards."""
    torch.set_num_threads(threads())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if (found := find(request)) is not None:
        with writing(output):
            pyarrow.parquet.write_table(found, output)


def find(request: Request) -> pa.Table | None:
    """The rewards of the clients and, if the base is quantized, those on the original base.

    Clients that do not fit in memory are left out and named in the table's metadata. Several
    processes share the packs. Then the first one runs the other clients, and the others return
    None.
    """
    folder, base = Path(request.folder), Path(request.base)
    dataset = tokenized.load(Path(request.pairs), base)
    messages = tokenized.conversations(dataset, tokenized.load_answers(Path(request.pairs), base))
    pairs, ranked = pairs_of(dataset), rankings_of(dataset)
    exported = Exported(
        folder, pairs, ranked, messages, base, request.tokens_per_pack, request.compared
    )
    clients = select(request.clients, merged=(folder / MERGED).is_dir())
    if exported_quantization(folder).bits == 4:
        clients.append(ORIGINAL)
    found, left_out = [found_by(PACKS, exported)], []
    leads = group.leads()
    group.leave()
    if not leads:
        return None
    # export captures stderr and shows stdout.
    for client in with_bar(clients[1:], "checking the export", "clients", sys.stdout):
        fitting = fits(client, exported)
        table = within_memory(found_by, client, exported) if fitting else None
        if table is None:
            left_out.append(client.name)
        else:
            found.append(table)
    return pa.concat_tables(found).replace_schema_metadata({LEFT_OUT: json.dumps(left_out)})


def fits(client: Client, exported: Exported) -> bool:
    """Whether the weights of a client fit in free memory. If not, the system kills the process.

    On a GPU this is always true, because running out of memory is an ordinary error there.
    """
    if device().type == "cuda":
        return True
    folder = exported.folder / (MERGED if client.merged else EXPORTED_BASE)
    if client == ORIGINAL or not folder.is_dir():
        folder = exported.base
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) < free_memory()


def found_by(client: Client, exported: Exported) -> pa.Table:
    """The rewards of a client in all its forms."""
    # The previous client's model has reference cycles, so only the garbage collector frees it.
    gc.collect()
    torch.cuda.empty_cache()
    rewards = client.open(exported)
    tables = []
    for form in client.forms:
        table = rewards(form)
        for place, (name, value) in enumerate(((CLIENT, client.name), (FORM, form.name))):
            table = table.add_column(place, name, pa.array([value] * len(table), pa.string()))
        tables.append(table)
    return pa.concat_tables(tables)


# --- packs -----------------------------------------------------------------------------------


def packs(exported: Exported) -> Score:
    return by_packs(exported, load_exported(exported.folder))


def original_base(exported: Exported) -> Score:
    """The adapter on the base before quantization, with the compute dtype of training."""
    dtype = exported_quantization(exported.folder).compute_dtype
    base = load_base(exported.base, Quantization.unquantized(dtype))
    return by_packs(exported, adapt(base, exported.folder))


def by_packs(exported: Exported, model: PeftModel) -> Score:
    def rewards(form: Form) -> pa.Table:
        ranked = exported.rankings
        if form.ended:
            ranked = [
                Ranking(Texts(ids, 0), [Comparison(index, 0, 1)])
                for index, ids in exported.ended.items()
            ]
        if not ranked:
            return paired([], [])
        found = score(model, [each.texts for each in ranked], exported.tokens_per_pack)
        j, k, pairs = sides(found, ranked)
        return paired(pairs.tolist(), torch.stack([j, k], 1).flatten().tolist())

    return rewards


# --- PEFT and transformers -------------------------------------------------------------------


def peft(exported: Exported) -> Score:
    with chdir(exported.folder), silent_peft():
        model = AutoPeftModelForSequenceClassification.from_pretrained(".", **exported.arguments)
    keep_weights_unpacked(model)
    return by_ids(exported, model)


def transformers_adapter(exported: Exported) -> Score:
    return by_ids(exported, exported.load_adapter())


def transformers_merged(exported: Exported) -> Score:
    folder = exported.folder / MERGED
    model = AutoModelForSequenceClassification.from_pretrained(folder, device_map={"": device()})
    return by_ids(exported, model)


def by_ids(exported: Exported, model: Any) -> Score:
    model.eval()

    def rewards(form: Form) -> pa.Table:
        pairs = exported.ids_of(form)
        texts = [tuple(ids) for pair in pairs.values() for ids in pair]
        return paired(list(pairs), once(texts, of_ids, model, exported.tokenizer, form))

    return rewards


@torch.no_grad()
def of_ids(texts: Sequence[tuple[int, ...]], model: Any, tokenizer: Any, form: Form) -> list[float]:
    """The rewards of texts, in padded batches."""
    rewards: list[float] = []
    for start in range(0, len(texts), form.batch):
        some = {"input_ids": [*map(list, texts[start : start + form.batch])]}
        rows = tokenizer.pad(some, padding_side=form.side, return_tensors="pt")
        rewards += model(**rows.to(device()), use_cache=False).logits[:, 0].tolist()
    return rewards


def pipeline_adapter(exported: Exported) -> Score:
    model = exported.load_adapter()
    # The configuration of a base on the Hub does not say that the model is a regression, so the
    # pipeline would apply a sigmoid.
    scorer = pipeline(
        "text-classification",
        model,
        tokenizer=exported.tokenizer,
        function_to_apply="none",
    )
    return by_pipeline(exported, scorer)


def pipeline_merged(exported: Exported) -> Score:
    scorer = pipeline("text-classification", str(exported.folder / MERGED), device=device())
    return by_pipeline(exported, scorer)


def by_pipeline(exported: Exported, scorer: Any) -> Score:
    def rewards(form: Form) -> pa.Table:
        pairs = exported.texts_of(form)
        if not pairs:
            return paired([], [])
        scorer.tokenizer.padding_side = form.side

        def scored(texts: Sequence[str]) -> list[float]:
            found = scorer(texts, batch_size=form.batch, padding=True, add_special_tokens=False)
            return [each["score"] for each in found]

        return paired(list(pairs), once([text for pair in pairs.values() for text in pair], scored))

    return rewards


# --- the list of clients ---------------------------------------------------------------------

PACKED = Form("packs")
# The other clients' rewards of texts that end in eos are compared with those of packs with eos.
PACKS = Client("packs", packs, (PACKED, EOS), merged=False)
ORIGINAL = Client("original_base", original_base, (PACKED,), merged=False)
EVERY_FORM = (RIGHT, LEFT, SINGLE, EOS)
LIGHT = (
    Client("peft", peft, EVERY_FORM, merged=False),
    Client("transformers_adapter", transformers_adapter, EVERY_FORM, merged=False),
    Client("transformers_merged", transformers_merged, EVERY_FORM, merged=True),
    Client("pipeline_adapter", pipeline_adapter, EVERY_FORM, merged=False),
    Client("pipeline_merged", pipeline_merged, EVERY_FORM, merged=True),
)


def select(which: str, merged: bool) -> list[Client]:
    """Packs and the light clients, or all clients; those of the merged model if there is one."""
    clients = (PACKS, *LIGHT, *(HEAVY if which == "all" else ()))
    return [client for client in clients if merged or not client.merged]


if __name__ == "__main__":
    run(main)
