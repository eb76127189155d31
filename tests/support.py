"""What test modules share beside the fixtures: groups of params, small models, pairs, limits."""

import json
import random
import resource
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet

from reward.exporting import clients
from reward.exporting.clients import FOUND, Request
from reward.model.base import Quantization
from reward.model.packing import Texts
from reward.model.trainer import Train
from stages.evaluate import Evaluate
from stages.export import Export
from stages.fetch import Base
from stages.preprocess import Preprocess
from stages.train import Lora

ROOT = Path(__file__).parent.parent
GROUPS: dict[str, type[Any]] = {
    "base": Base,
    "preprocess": Preprocess,
    "quantization": Quantization,
    "lora": Lora,
    "train": Train,
    "evaluate": Evaluate,
    "export": Export,
}
VOCABULARY = 300
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEPARATE = ["q_proj", "k_proj", "v_proj"]
FAMILIES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "qwen2": (SEPARATE, {}),
    "qwen3": (SEPARATE, {"head_dim": 24}),
    "llama": (SEPARATE, {}),
    "mistral": (SEPARATE, {"sliding_window": None}),
    "gemma": (SEPARATE, {"head_dim": 16, "num_key_value_heads": 1}),
    "phi": (SEPARATE, {}),
    "phi3": (["qkv_proj"], {"sliding_window": None}),
    "gpt_neox": (["query_key_value"], {}),
}


def write_pairs(path: Path, count: int = 40) -> Path:
    """Distinct small pairs over count / 2 prompts, with a `kind`, as a JSON array."""
    pairs = [
        {
            "prompt": f"Name a word that rhymes with number {index // 2}.",
            "chosen": f"A good and kind answer about {index}, since you ask.",
            "rejected": f"No. {'Go away! ' * (index % 3)}Nobody cares about {index}",
            "kind": "rude" if index % 2 else "short",
        }
        for index in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(pairs, ensure_ascii=False), encoding="utf-8")
    return path


def prompts_of(seed: int, count: int = 5) -> list[Texts]:
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(least, most))]

    prompts = []
    for index in range(count):
        prefix = ids(1, 20) if index else []
        prompts.append(Texts([prefix + ids(1, 25) for _ in range(2)], len(prefix)))
    return prompts


def score_here(request: Request, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """What export's fresh process does, in this one, which has imported the libraries already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyarrow.parquet.write_table(clients.find(request), elsewhere / FOUND)
    return subprocess.CompletedProcess([], 0)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A limit on the size of files that are written, which a full disk is for each of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
