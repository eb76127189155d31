"""Shared helpers that are not fixtures: param groups, small models, pairs, limits."""

import json
import random
import resource
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet
import pytest
from ruamel.yaml import YAML

from reward import params
from reward.after_training import Evaluate, Export
from reward.data import tokenized
from reward.data.columns import TIE
from reward.data.records import BadRecord, Raw
from reward.data.sources import Source as Pairs
from reward.exporting import clients
from reward.exporting.clients import FOUND, Request
from reward.model import layers
from reward.model.base import Quantization
from reward.model.checkpoints import Run
from reward.model.converting import conversion_of
from reward.model.packing import Texts
from reward.model.pairwise import Labels, losses
from reward.model.trainer import RewardTrainer, Train
from reward.outputs import read_json, write_json
from stages import train
from stages.fetch import Base, Source, convert_weights
from stages.preprocess import Preprocess
from stages.train import Lora

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

ROOT = Path(__file__).parent.parent
PARAMS = ROOT / "tests" / "params.yaml"
SetParams = Callable[..., None]
GROUPS: dict[str, type[Any]] = {
    "base": Base,
    "preprocess": Preprocess,
    "quantization": Quantization,
    "lora": Lora,
    "train": Train,
    "evaluate": Evaluate,
    "export": Export,
}
# The files of an exported folder with base and merged model.
EXPORTED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "digests.json",
    "quantization.json",
    "reward.json",
    "template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
    *(
        f"{folder}/{name}"
        for folder in ("base", "merged")
        for name in (
            *("config.json", "model.safetensors"),
            *("tokenizer.json", "tokenizer_config.json"),
        )
    ),
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
SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
# Rotates 12 of the 16 dimensions of a head; the factors change for texts of more than 64 tokens.
LONGROPE = {
    "sliding_window": None,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    },
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0884,
    "logits_scaling": 8.0,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": True,
}
GEMMA3 = {
    "head_dim": 16,
    "sliding_window": 7,
    "layer_types": [SLIDING, FULL, SLIDING],
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    },
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
# Latent attention, a dense first layer, then experts with a shared one.
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
# The rows of the table in docs/models.md: model type, shape, projections with adapters.
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Qwen2, Qwen2.5": ("qwen2", {"tie_word_embeddings": True}, SEPARATE),
    "Qwen3": ("qwen3", {"head_dim": 24}, SEPARATE),
    "Llama 2": ("llama", {"num_key_value_heads": 4}, SEPARATE),
    "Llama 3, 3.1, 3.2": ("llama", LLAMA3, SEPARATE),
    "Mistral": ("mistral", {"sliding_window": None}, SEPARATE),
    "Gemma": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}, SEPARATE),
    "Gemma 3": ("gemma3", GEMMA3, SEPARATE),
    "Phi": ("phi", {}, SEPARATE),
    "Phi-3": ("phi3", {"sliding_window": None}, ["qkv_proj"]),
    "Phi-4-mini": ("phi3", LONGROPE, ["qkv_proj"]),
    "OLMo 2": ("olmo2", {}, SEPARATE),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0, 1]}, SEPARATE),
    "Granite": ("granite", GRANITE, SEPARATE),
    "GPT-NeoX": ("gpt_neox", {"rotary_pct": 0.25}, ["query_key_value"]),
    "OPT": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32}, SEPARATE),
    "GPT-2": ("gpt2", {}, ["c_attn"]),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}, SEPARATE),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS | {"head_dim": 16, "mlp_only_layers": [0]}, SEPARATE),
    "DeepSeek-V2": ("deepseek_v2", LATENT, ["q_proj", "kv_b_proj"]),
    "DeepSeek-V3": ("deepseek_v3", LATENT | {"q_lora_rank": 16}, ["q_b_proj", "kv_b_proj"]),
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def save_family(name: str, folder: Path, **more: Any) -> "PreTrainedModel":
    """Save a tiny random model of a family in its published format, and return it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, shape, _ = FAMILIES[name]
    torch.manual_seed(0)
    shape = SHAPE | shape | more
    if kind == "gemma3":
        shape = {"text_config": shape, "vision_config": VISION, "mm_tokens_per_image": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, initialized to ones and zeros
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def fetched(name: str, folder: Path, **more: Any) -> Path:
    """A tiny random model of a family as fetch writes it, without a tokenizer."""
    source = folder / "source"
    save_family(name, source, **more)
    config = read_json(source / "config.json")
    if (conversion := conversion_of(config)) is None:
        return source
    here = folder / "fetched"
    here.mkdir()
    origin = Source("local", "", [path.name for path in source.iterdir()], source.joinpath)
    convert_weights(Base("tiny", "main", 0), origin, here, conversion)
    write_json(here / "config.json", conversion.config)
    return here


def write_pairs(path: Path, count: int = 40) -> Path:
    """Write distinct small pairs for count / 2 prompts, with a `kind`, as a JSON array."""
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


def built() -> "PeftModel":
    """The model of the working directory with new adapters, as train builds it."""
    return train.build(
        params.load("train", Train),
        params.load("lora", Lora),
        params.load("quantization", Quantization),
    )


def new_trainer() -> RewardTrainer:
    """A trainer for the tokenized pairs of the working directory, at its first step."""
    options = params.load("train", Train)
    pairs, validation = (tokenized.load(path, train.BASE) for path in train.SPLITS)
    run, steps = Run(Path("models/checkpoints/run")), train.steps(options, pairs)
    return RewardTrainer(built(), options, run, steps, validation, train.REPORTS)


def set_params(group: str, path: Path = Path("params.yaml"), **values: Any) -> None:
    """Change values in a params.yaml: set_params("lora", r=8)."""
    content = YAML().load(path)
    content[group].update(values)
    YAML().dump(content, path)


def compute_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers have the operations of a GPU, also where only large tensors have them there."""
    monkeypatch.setattr(layers, "prefers_few_operations", lambda device: True)
    monkeypatch.setattr(layers, "LARGE", -(2**30))
    monkeypatch.setattr(layers, "memory_of", lambda device: 2**40)


def train_killed_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Train from scratch, kill the run at its second step and run it again.

    Returns how many steps were done before each step that began.
    """
    for path in (train.ADAPTER, Path("models/checkpoints")):
        shutil.rmtree(path)
    original, steps = RewardTrainer.training_step, []

    def killed_at_the_second(self: Any, *arguments: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(RewardTrainer, "training_step", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train.main()
    train.main()
    return steps


def chosen_and_rejected(rewards: "Tensor") -> "tuple[Tensor, Tensor]":
    """Split rewards that alternate between the chosen and the rejected text of each pair."""
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    return chosen, rejected


def pair_losses(rewards: "Tensor") -> "Tensor":
    """The loss of each pair, from rewards that alternate between chosen and rejected."""
    return losses(
        *chosen_and_rejected(rewards), Labels.certain(len(rewards) // 2).to(rewards.device)
    )


def raws(source: Pairs) -> list[Raw]:
    """What the records of a source mean, without those that are bad."""
    found = []
    for position, record in source:
        with suppress(BadRecord):
            found.append(source.raw(position, record))
    return found


def as_pairs(raw: Raw) -> list[dict[str, Any]]:
    """The comparisons of a record as canonical pairs, without ties."""
    return [
        raw.columns
        | {"prompt": raw.prompt, "chosen": raw.answers[each.j], "rejected": raw.answers[each.k]}
        for each in raw.comparisons
        if each.preference > TIE
    ]


def ties_of(raw: Raw) -> int:
    return sum(each.preference == TIE for each in raw.comparisons)


def random_prompts(seed: int, count: int = 5) -> list[Texts]:
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(least, most))]

    prompts = []
    for index in range(count):
        prefix = ids(1, 20) if index else []
        prompts.append(Texts([prefix + ids(1, 25) for _ in range(2)], len(prefix)))
    return prompts


def run_clients_here(request: Request, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """Run export's clients in this process, which has already imported the libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyarrow.parquet.write_table(clients.find(request), elsewhere / FOUND)
    return subprocess.CompletedProcess([], 0)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of written files, so that writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
