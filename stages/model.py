"""The reward model: a quantized base, LoRA on it, a scalar head; its rewards of a pack."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    logging,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from stages import attention, layers
from stages.outputs import digests, read_json, recorded, require_files, write_json
from stages.packing import Pack, Texts, pack, plan, tokens
from stages.params import Switch
from stages.process import Fault

DIGESTS, ADAPTER_WEIGHTS = "digests.json", "adapter_model.safetensors"
# What an exported folder has besides the adapter: two folders, and what is known of its rewards.
EXPORTED_BASE, MERGED, REWARD = "base", "merged", "reward.json"
# Keys of configurations by which transformers and PEFT import what they name.
NAMING_CODE = {"auto_map", "auto_mapping", "custom_pipelines", "megatron_config"}

# How far a pack may be from its texts alone, as a share of the hidden states' norm.
EXACT, EXACT_IN_HALF = 1e-3, 0.05

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class Quantization:
    """The group `quantization` of params.yaml, where each key is described."""

    bits: Literal[4, "none"]
    quant_type: Literal["nf4", "fp4"]
    double_quant: Switch
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"]

    @property
    def dtype(self) -> torch.dtype:
        """`auto` is bf16 on a GPU that has it, else fp32: a CPU is exact, and fast, in it."""
        if self.compute_dtype != "auto":
            return DTYPES[self.compute_dtype]
        half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32

    @property
    def recipe(self) -> dict[str, Any] | None:
        """Arguments of BitsAndBytesConfig, as JSON holds them; None for an unquantized base."""
        if self.bits == "none":
            return None
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": str(self.dtype).removeprefix("torch."),
        }


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stock(base: Path, quantization: Quantization) -> PreTrainedModel:
    """The base on the device, as transformers has it: a sequence classifier of one label.

    One that is stored in 4 bits stays as it is. Code that comes with a base never runs. Raises a
    Fault for a model that transformers has no classifier over, or that has no score head.
    """
    config = read_json(base / "config.json")
    if (kind := config.get("model_type")) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise Fault(
            f"{base}: transformers has no classifier over {kind}, wanted a decoder model that has"
        )
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    recipe = None if "quantization_config" in config else quantization.recipe
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=1,
        dtype=quantization.dtype,
        # Not even as None: that would hide what is stored.
        **({"quantization_config": BitsAndBytesConfig(**recipe)} if recipe else {}),
        device_map={"": device()},
        trust_remote_code=False,
        use_safetensors=True,
    )
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise Fault(f"{base}: {type(model).__name__} has no score head, wanted a decoder model")
    keep_weights_unpacked(model)
    return model


def load_base(base: Path, quantization: Quantization) -> PreTrainedModel:
    """The base as a classifier that is frozen, its head not yet made.

    Its attention is that over packs, its own dropout is off. Raises a Fault for a model that has no
    score head, or that takes no attention but its own.
    """
    model = stock(base, quantization)
    model.set_attn_implementation(attention.NAME)
    if model.config._attn_implementation != attention.NAME:
        raise Fault(
            f"{base}: {type(model).__name__} takes no attention but its own, wanted a decoder "
            "that supports transformers' attention interface"
        )
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    attention.prune(model.base_model)
    return model.requires_grad_(False)


def keep_weights_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place at the first pass in eval mode.

    It does so on processors with AVX512-BF16; passes without gradient then compute in bf16, and
    training that follows reads the repacked bytes as if they were plain ones, without an error.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def new_head(model: PreTrainedModel, seed: int) -> None:
    """Give the model a fresh scalar head: fp32, unquantized, from a seed of its own."""
    features = head_of(model).in_features
    head = nn.Linear(features, 1, bias=False, dtype=torch.float32)
    weight = torch.randn(1, features, generator=torch.Generator().manual_seed(seed))
    head.weight.data = weight / features**0.5
    model.score = head.to(device())


def head_of(model: nn.Module) -> nn.Linear:
    """The scalar head of a classifier; PEFT's wrapper of it behaves as one."""
    return cast(nn.Linear, model.score)


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """LoRA in fp32 on the named projections of a base that load_base has loaded.

    Raises a Fault for names that the model lacks.
    """
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    wanted = set(config.target_modules or ())
    if missing := sorted(wanted - linear):
        raise Fault(
            f"params.yaml: lora.target_modules names {', '.join(missing)}, which "
            f"{type(model).__name__} lacks; it has {', '.join(sorted(linear))}"
        )
    config.task_type = TaskType.SEQ_CLS
    with silent_peft():
        adapted = get_peft_model(model, config)
    layers.fuse(adapted)
    return adapted


def load(base: Path, adapter: Path, quantization: Quantization) -> PeftModel:
    """A trained reward model, ready to score.

    Raises a Fault for files that are damaged, and where the base is another one, or would not be
    quantized and computed as in training: an adapter is right on the base that it was trained on.
    """
    require_sealed(adapter, base)
    trained, here = read_json(adapter / "quantization.json"), quantization.recipe
    if trained != here:
        raise Fault(
            f"{adapter} was trained on a base quantized by {trained}, here it would be {here}; "
            "set quantization.compute_dtype to what it was, or train again on this machine"
        )
    return adapt(load_base(base, quantization), adapter)


def load_exported(folder: Path) -> PeftModel:
    """The reward model of an exported folder, ready to score, on its own base or the Hub's.

    Raises a Fault for code, for files that are damaged, and for a base that cannot be had from the
    Hub.
    """
    require_no_code(folder)
    record = recorded(folder / DIGESTS)
    if ADAPTER_WEIGHTS not in record["files"]:
        raise Fault(f"{folder} has no {ADAPTER_WEIGHTS} in its {DIGESTS}, wanted a whole export")
    merged = f"{MERGED}/"
    require_files(folder, {k: v for k, v in record["files"].items() if not k.startswith(merged)})
    base = folder / EXPORTED_BASE
    if not base.is_dir():
        base = hub_base(folder, record["base"])
    return adapt(load_base(base, exported_quantization(folder)), folder)


def require_no_code(folder: Path) -> None:
    """Raises a Fault for a folder from anywhere that has code, or a configuration that names some.

    Digests tell that a folder is whole, not who made it.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    code = [path for path in files if path.suffix in (".py", ".pyc", ".so")]
    code += [path for path in files if path.name.endswith("config.json") and names_code(path)]
    if code:
        names = ", ".join(path.relative_to(folder).as_posix() for path in code)
        raise Fault(
            f"{folder}: {names} is code, or names some, wanted weights and configurations alone; "
            "nothing of the folder was loaded"
        )


def names_code(path: Path) -> bool:
    """Whether a configuration names code anywhere in it."""
    parts = [recorded(path)]
    while parts:
        part = parts.pop()
        if any(part.get(key) for key in NAMING_CODE):
            return True
        values = [item for value in part.values() for item in as_list(value)]
        parts += [value for value in values if isinstance(value, dict)]
    return False


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def exported_quantization(folder: Path) -> Quantization:
    """How the base of an exported folder was quantized and computed in training."""
    recipe = read_json(folder / "quantization.json")
    dtype = read_json(folder / REWARD)["dtype"]
    if recipe is None:
        return Quantization("none", "nf4", False, dtype)
    double = recipe["bnb_4bit_use_double_quant"]
    return Quantization(4, recipe["bnb_4bit_quant_type"], double, dtype)


def hub_base(folder: Path, files: dict[str, str]) -> Path:
    """Weights and configuration of the base that an exported folder names, from the Hub's cache.

    `files` are the SHA-256 of the base's files. Raises a Fault where they cannot be had.
    """
    from huggingface_hub import errors, snapshot_download

    config = read_json(folder / "adapter_config.json")
    name, revision = config["base_model_name_or_path"], config["revision"]
    wanted = {k: v for k, v in files.items() if k == "config.json" or k.startswith("model")}
    try:
        path = snapshot_download(name, revision=revision, allow_patterns=sorted(wanted))
    # The root of all errors of the HTTP library, which is httpx or httpx2 by the Hub's version.
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        raise Fault(
            f"{folder}: its base {name} at {revision} cannot be had ({type(error).__name__}), "
            "wanted the Hub, a mirror in HF_ENDPOINT, or the model in its cache"
        ) from None
    require_files(Path(path), wanted)
    return Path(path)


def adapt(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """A base that load_base has loaded with adapter and head of a folder, ready to score."""
    new_head(model, seed=0)
    with silent_peft():
        adapted = PeftModel.from_pretrained(model, adapter).eval()
    layers.fuse(adapted)
    return adapted


@contextmanager
def silent_peft() -> Iterator[None]:
    """PEFT asks for a property that transformers has renamed, and each wrapping warns of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def save(model: PeftModel, folder: Path, base: str, quantization: Quantization) -> None:
    """Write adapter, head and the recipe of the base; the same bytes for the same weights.

    `base` is what base_model_name_or_path will say. PEFT writes its model card and the target
    modules in the order of a set: the one is removed, the other sorted.
    """
    model.save_pretrained(str(folder), safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = base
    write_json(path, config)
    write_json(folder / "quantization.json", quantization.recipe)


def rewards(model: PeftModel, batch: Pack) -> Tensor:
    """The reward of every text, prompt by prompt: fp32, [texts]."""
    return head_of(model.get_base_model())(last_hidden(model, batch).float())[:, 0]


def last_hidden(model: PeftModel, batch: Pack) -> Tensor:
    """The base's output at the last token of every text, prompt by prompt: [texts, hidden size]."""
    hidden = (
        cast(PreTrainedModel, model.get_base_model())
        .base_model(
            input_ids=batch.input_ids.to(device()),
            position_ids=batch.position_ids.to(device()),
            plan=attention.Plan(batch.layout, device()),
            use_cache=False,
        )
        .last_hidden_state[0]
    )
    if len(hidden) != len(batch.order):
        hidden = hidden[batch.layout.ends]
    return cast(Tensor, hidden[batch.order.to(device())])


@torch.no_grad()
def score(model: PeftModel, prompts: Sequence[Texts], tokens_per_pack: int) -> Tensor:
    """The reward of every text, prompt by prompt, on the CPU: fp32, [texts].

    Prompts of like length share a pack, and packs are halved where memory does not suffice. Raises
    a Fault where it does not suffice for the texts of one prompt.
    """
    lengths = [tokens(texts) for texts in prompts]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    results = [torch.empty(0)] * len(prompts)
    done = 0
    with (
        evaluating(model),
        tqdm(
            total=len(order), desc="scoring", unit=" prompts", delay=2, leave=None, disable=None
        ) as bar,
    ):
        while done < len(order):
            rest = order[done:]
            for group in plan([lengths[index] for index in rest], tokens_per_pack):
                indices = [rest[place] for place in group]
                found = fits(rewards, model, pack([prompts[index] for index in indices]))
                if found is None:
                    tokens_per_pack = halved([lengths[index] for index in indices], "scoring")
                    break
                parts = found.cpu().split([len(prompts[index].ids) for index in indices])
                for index, part in zip(indices, parts, strict=True):
                    results[index] = part
                done += len(indices)
                bar.update(len(indices))
    return torch.cat(results)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def fits(work: Callable[..., Tensor], *arguments: Any) -> Tensor | None:
    """What `work` returns, or None if memory did not suffice; what it held is let go."""
    try:
        return work(*arguments)
    except (MemoryError, RuntimeError) as error:
        # PyTorch has an error of its own for the memory of a GPU alone.
        on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
    torch.cuda.empty_cache()
    return None


def halved(lengths: Sequence[int], place: str) -> int:
    """The tokens of a pack half of the one that did not fit, which held prompts of these lengths.

    Raises a Fault for a single prompt, which names the place in the work.
    """
    if len(lengths) == 1:
        raise Fault(
            f"{place}: the texts of one prompt, {lengths[0]} tokens, need more memory than is "
            "free; lower preprocess.max_length, or set train.gradient_checkpointing if in training"
        )
    return sum(lengths) // 2


@contextmanager
def as_in_transformers(model: PeftModel) -> Iterator[PreTrainedModel]:
    """The classifier for a while with attention and layers as transformers and PEFT have them."""
    classifier = cast(PreTrainedModel, model.get_base_model())
    ours = {
        module: module.__dict__.pop("forward")
        for module in classifier.modules()
        if "forward" in module.__dict__
    }
    classifier.set_attn_implementation("sdpa" if classifier._supports_sdpa else "eager")
    try:
        yield classifier
    finally:
        classifier.set_attn_implementation(attention.NAME)
        for module, forward in ours.items():
            module.forward = forward


@torch.no_grad()
def require_exact(model: PeftModel, texts: Texts) -> None:
    """Raises a Fault unless texts in a pack have the hidden states that transformers gives them.

    Whatever is not plain causal attention, with or without a window, shows in a text that is long
    enough for it; so this is for the longest there is.
    """
    with evaluating(model):
        found = last_hidden(model, pack([texts])).float()
        with as_in_transformers(model) as classifier:
            wanted = torch.cat(
                [
                    classifier.base_model(
                        input_ids=torch.tensor(np.asarray(ids)[None], device=device()),
                        use_cache=False,
                    ).last_hidden_state[:, -1]
                    for ids in texts.ids
                ]
            ).float()
    difference = ((found - wanted).norm() / wanted.norm()).item()
    allowed = EXACT if classifier.dtype == torch.float32 else EXACT_IN_HALF
    if difference > allowed:
        raise Fault(
            f"{type(classifier).__name__}: a pair of {tokens(texts)} tokens in one row differs by "
            f"{difference:.2g} from its two texts alone, at most {allowed} is allowed; wanted a "
            "decoder with plain causal attention"
        )


def base_record(base: Path) -> dict[str, Any]:
    """What fetch recorded of the base model: name, kind, revision, files with their SHA-256."""
    return recorded(base / "base.json")


def seal(adapter: Path, base: Path) -> None:
    """Record the SHA-256 of all files of an adapter's folder, and of the base that it is for."""
    files = digests(adapter)
    files.pop(DIGESTS, None)
    write_json(adapter / DIGESTS, {"base": base_record(base)["files"], "files": files})


def require_sealed(adapter: Path, base: Path) -> None:
    """Raises a Fault unless adapter and base are the files that were sealed together.

    A base with code in it is none that fetch wrote.
    """
    if code := sorted(path.name for path in base.glob("*.py")):
        raise Fault(f"{base} has code, {', '.join(code)}, wanted what fetch leaves there")
    found, files = recorded(adapter / DIGESTS), base_record(base)["files"]
    if found["base"] != files:
        differing = sorted({name for name, _ in found["base"].items() ^ files.items()})
        raise Fault(
            f"{adapter} was trained on another base than {base}: {', '.join(differing)} differ, "
            "wanted the same; run dvc repro"
        )
    require_files(adapter, found["files"])
    require_files(base, files)
