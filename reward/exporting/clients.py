"""The clients of an exported reward model: each scores the test pairs in its own way.

    python -m reward.exporting.clients EXPORT PAIRS BASE found.json light 4096

reads an exported folder, pairs and the original base, and writes what each client found. Export
runs it in a fresh process, in a folder where nothing is, on a copy of what it is about to finish.
Clients that know of no packs take ids or text, right- and left-padded, one by one, ending in eos.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import (
    AutoModelForSequenceClassification,
    logging,
    pipeline,
)

from reward.data import tokenized
from reward.exporting.clients_trl import HEAVY
from reward.exporting.exported import (
    BATCH,
    MERGED,
    Exported,
    Forms,
    Found,
    exported_quantization,
    load_exported,
    paired,
)
from reward.model.base import (
    Quantization,
    adapt,
    device,
    keep_weights_unpacked,
    load_base,
    silent_peft,
)
from reward.model.packing import Texts, pairs_of
from reward.model.scoring import score
from reward.process import processors, run

ORIGINAL = "original_base"


def main() -> None:
    parser = argparse.ArgumentParser(description="Score pairs with an exported reward model.")
    for name in ("folder", "pairs", "base", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("clients", choices=["light", "all"])
    parser.add_argument("tokens_per_pack", type=int)
    given = parser.parse_args()
    torch.set_num_threads(processors())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    exported = Exported(given.folder, pairs_of(tokenized.load(given.pairs, given.base)))
    found = {"packs": by_packs(exported, given.tokens_per_pack)}
    clients = LIGHT if given.clients == "light" else LIGHT | HEAVY
    whole = (exported.folder / MERGED).is_dir()
    for name, client in clients.items():
        if whole or not name.endswith("merged"):
            found[name] = client(exported)
    if exported_quantization(exported.folder).bits == 4:
        found[ORIGINAL] = on_original_base(exported, given.base, given.tokens_per_pack)
    # A reward may be NaN, which export is to say.
    given.out.write_text(json.dumps(found), encoding="utf-8")


# --- here ------------------------------------------------------------------------------------


def by_packs(exported: Exported, tokens_per_pack: int) -> Forms:
    """Packs, and packs of texts that end in eos: what the other clients must find of those."""
    model = load_exported(exported.folder)
    ended = [Texts(ids, 0) for ids in exported.ended.values()]
    rewards = score(model, exported.pairs, tokens_per_pack).tolist()
    of_ended = score(model, ended, tokens_per_pack).tolist() if ended else []
    return {
        "packs": paired(range(len(exported.pairs)), rewards),
        "eos": paired(list(exported.ended), of_ended),
    }


def on_original_base(exported: Exported, base: Path, tokens_per_pack: int) -> Forms:
    """The adapter on the base as it was before it was quantized."""
    quantization = Quantization("none", "nf4", False, "float32")
    model = adapt(load_base(base, quantization), exported.folder)
    rewards = score(model, exported.pairs, tokens_per_pack).tolist()
    return {"packs": paired(range(len(exported.pairs)), rewards)}


# --- PEFT and transformers -------------------------------------------------------------------


def peft(exported: Exported) -> Forms:
    with chdir(exported.folder), silent_peft():
        model = AutoPeftModelForSequenceClassification.from_pretrained(".", **exported.arguments)
    keep_weights_unpacked(model)
    return by_ids(exported, model)


def transformers_adapter(exported: Exported) -> Forms:
    return by_ids(exported, exported.load_adapter())


def transformers_merged(exported: Exported) -> Forms:
    folder = exported.folder / MERGED
    model = AutoModelForSequenceClassification.from_pretrained(folder, device_map={"": device()})
    return by_ids(exported, model)


def by_ids(exported: Exported, model: Any) -> Forms:
    model.eval()
    some = {index: exported.ids[index] for index in exported.sample}

    def rewards(
        pairs: dict[int, list[list[int]]], side: str = "right", batch: int = BATCH
    ) -> Found:
        texts = [ids for pair in pairs.values() for ids in pair]
        return paired(list(pairs), of_ids(model, exported.tokenizer, texts, side, batch))

    return {
        "right": rewards(exported.ids),
        "left": rewards(some, "left"),
        "single": rewards(some, batch=1),
        "eos": rewards(exported.ended),
    }


@torch.no_grad()
def of_ids(
    model: Any, tokenizer: Any, texts: Sequence[list[int]], side: str, batch: int
) -> list[float]:
    """Rewards of texts, in padded batches."""
    rewards: list[float] = []
    for start in range(0, len(texts), batch):
        some = {"input_ids": texts[start : start + batch]}
        rows = tokenizer.pad(some, padding_side=side, return_tensors="pt")
        rewards += model(**rows.to(device())).logits[:, 0].tolist()
    return rewards


def pipeline_adapter(exported: Exported) -> Forms:
    model = exported.load_adapter()
    # A base of the Hub does not say that it is a regression.
    scorer = pipeline(
        "text-classification",
        model,
        tokenizer=exported.tokenizer,
        function_to_apply="none",
    )
    return by_pipeline(exported, scorer)


def pipeline_merged(exported: Exported) -> Forms:
    scorer = pipeline("text-classification", str(exported.folder / MERGED), device=device())
    return by_pipeline(exported, scorer)


def by_pipeline(exported: Exported, scorer: Any) -> Forms:
    some = {index: exported.texts[index] for index in exported.sample if index in exported.texts}
    eos = exported.tokenizer.eos_token
    ended = {index: [text + eos for text in some[index]] for index in some if eos is not None}

    def rewards(pairs: dict[int, list[str]], side: str = "right", batch: int = BATCH) -> Found:
        if not pairs:
            return {}
        scorer.tokenizer.padding_side = side
        texts = [text for pair in pairs.values() for text in pair]
        found = scorer(texts, batch_size=batch, padding=True, add_special_tokens=False)
        return paired(list(pairs), [each["score"] for each in found])

    return {
        "right": rewards(exported.texts),
        "left": rewards(some, "left"),
        "single": rewards(some, batch=1),
        "eos": rewards(ended),
    }


LIGHT: dict[str, Callable[[Exported], Forms]] = {
    "peft": peft,
    "transformers_adapter": transformers_adapter,
    "transformers_merged": transformers_merged,
    "pipeline_adapter": pipeline_adapter,
    "pipeline_merged": pipeline_merged,
}

if __name__ == "__main__":
    run(main)
