"""The reward model: a quantized base, LoRA on it, a scalar head; its rewards of a pack."""

import json
import math
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from safetensors.torch import load as tensors_of
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    logging,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from reward.model import attention, layers
from reward.model.head import is_classifier
from reward.outputs import digests, read_json, recorded, require_files, write_json, writing
from reward.params import Switch
from reward.process import Fault, free_memory

DIGESTS, ADAPTER_WEIGHTS = "digests.json", "adapter_model.safetensors"

# PEFT's word for all linear layers but the head.
ALL_LINEAR = "all-linear"
# The projections of attention, and what models call those that are all three in one.
SEPARATE = {"q_proj", "k_proj", "v_proj"}
FUSED = {"qkv_proj", "query_key_value", "c_attn", "Wqkv"}

# Weights with two dimensions that bitsandbytes leaves as they are.
NOT_LINEAR = re.compile(r"embed|wte|wpe|lm_head|score")

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Quantization:
    """The group `quantization` of params.yaml, where each key is described."""

    bits: Literal[4, "none"]
    quant_type: Literal["nf4", "fp4"]
    double_quant: Switch
    compute_dtype: ComputeDtype

    @classmethod
    def unquantized(cls, compute_dtype: ComputeDtype) -> "Quantization":
        """A base whose weights stay as they are; what is set for 4 bits then has no effect."""
        return cls("none", "nf4", False, compute_dtype)

    @property
    def dtype(self) -> torch.dtype:
        """That of params.yaml; `auto` is what this machine is fast in."""
        return fast_dtype() if self.compute_dtype == "auto" else DTYPES[self.compute_dtype]

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


def fast_dtype() -> torch.dtype:
    """What the GPU's tensor cores multiply; fp32 on a CPU, which is exact, and fast, in it.

    That is bf16 from Ampere on. Volta and Turing have fp16 alone: they say that they support bf16,
    but emulate it, at which they crawl. Adapters, head and loss are fp32 whatever the base is in,
    so fp16 needs no scaled gradients: they are nearer to those of fp32 than bf16's. A base whose
    activations have no room in it is refused before the first step.
    """
    if not torch.cuda.is_available():
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if torch.cuda.get_device_capability() >= (7, 0) else torch.float32


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
    require_room(base, quantization)
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


def require_room(base: Path, quantization: Quantization) -> None:
    """Raises a Fault for a base whose weights alone are more than the memory of the device."""
    needed, room = weight_bytes(base, quantization), memory()
    if needed > room:
        here = "the GPU has" if device().type == "cuda" else "the machine has free"
        width = quantization.dtype.itemsize * 8
        bits = 4 if quantization.bits == 4 else width
        raise Fault(
            f"{base}: its weights take {needed / 1e9:.1f} GB in {bits} bits, with embeddings and "
            f"norms in {width}, more than the {room / 1e9:.1f} GB that {here}; expected a smaller "
            "base.name, or more memory (docs/distributed.md has a table)"
        )


def weight_bytes(base: Path, quantization: Quantization) -> int:
    """The bytes that the weights of a folder will take, as bitsandbytes quantizes them.

    4 bits a number, and a scale for each 64: in fp32, or in 8 bits with a scale of its own for each
    256 (Dettmers et al. 2023, "QLoRA"). What is stored in 4 bits stays as it is.
    """
    scale = (8 + 32 / 256) / 64 if quantization.double_quant else 32 / 64
    stored = "quantization_config" in read_json(base / "config.json")
    found = 0.0
    for path in base.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                shape, dtype = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
                numbers = math.prod(shape)
                if stored and dtype in ("U8", "I8"):
                    found += numbers
                elif quantization.bits == 4 and len(shape) == 2 and not NOT_LINEAR.search(name):
                    found += numbers * (4 + scale) / 8
                else:
                    found += numbers * quantization.dtype.itemsize
    return int(found)


def memory() -> float:
    """The bytes of the GPU, or, where there is none, those that the machine has free."""
    if device().type == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return free_memory()


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
    switch_dropout_off(model)
    attention.swap_last_layer(model.base_model)
    return model.requires_grad_(False)


def switch_dropout_off(model: nn.Module) -> None:
    """Have no module of the base draw random numbers: some hold their share as a plain number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def precisions(model: PeftModel) -> dict[str, int]:
    """How many parameters of the frozen base are in 4 bits, in half and in full precision.

    Numbers are counted that the model has, not the bytes that hold them. bitsandbytes quantizes
    linear layers alone: embeddings, norms and the fused experts of mixtures stay as they are.
    """
    found = {"four_bits": 0, "half": 0, "full": 0}
    for parameter in cast(PreTrainedModel, model.get_base_model()).base_model.parameters():
        if isinstance(parameter, Params4bit):
            found["four_bits"] += cast(Any, parameter).quant_state.shape.numel()
        elif not parameter.requires_grad:
            found["full" if parameter.dtype == torch.float32 else "half"] += parameter.numel()
    return found


def fused_experts(model: PeftModel) -> int:
    """How many parameters are in the experts that transformers holds as one tensor a layer."""
    base = cast(PreTrainedModel, model.get_base_model()).base_model
    return sum(each.numel() for each in base.parameters() if each.dim() == 3)


def keep_weights_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place at the first pass in eval mode.

    It does so on processors with AVX512-BF16; passes without gradient then compute in bf16, and
    training that follows reads the repacked bytes as if they were plain ones, without an error.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def new_head(model: PreTrainedModel, seed: int) -> None:
    """Give the model a fresh scalar head from a seed of its own."""
    features = head_of(model).in_features
    weight = torch.randn(1, features, generator=torch.Generator().manual_seed(seed))
    set_head(model, weight / features**0.5)


def has_head(base: Path) -> bool:
    """Whether a base is a reward model already, which `stock` loads with its head."""
    return is_classifier(read_json(base / "config.json"))


def set_head(model: PreTrainedModel, weight: torch.Tensor) -> None:
    """Give the model a scalar head in fp32, which is not quantized: the weight is [1, features]."""
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=torch.float32)
    head.weight.data = weight.detach().float()
    model.score = head.to(device())


def head_of(model: nn.Module) -> nn.Linear:
    """The scalar head of a classifier; PEFT's wrapper of it behaves as one."""
    return cast(nn.Linear, model.score)


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """LoRA in fp32 on the named projections of a base that load_base has loaded, or on all.

    Raises a Fault for names that the model lacks.
    """
    wanted = config.target_modules or ()
    found = linear(model) if wanted == ALL_LINEAR else targets(model, set(wanted))
    config.target_modules = found  # type: ignore[assignment]  # of a list PEFT makes a set as well
    config.task_type = TaskType.SEQ_CLS
    with silent_peft():
        adapted = get_peft_model(model, config)
    layers.swap_layers(adapted)
    return adapted


def targets(model: PreTrainedModel, wanted: set[str]) -> set[str]:
    """The projections that are meant by names of params.yaml.

    Where a base has the projections of its attention in one, that one is meant by the three names
    together. Raises a Fault for names that the model lacks.
    """
    had = linear(model)
    if wanted >= SEPARATE and not SEPARATE & had and len(fused := FUSED & had) == 1:
        wanted = wanted - SEPARATE | fused
    if missing := sorted(wanted - had):
        raise Fault(
            f"params.yaml: lora.target_modules names {', '.join(missing)}, which "
            f"{type(model).__name__} lacks; it has {', '.join(sorted(had))}"
        )
    return wanted


def linear(model: PreTrainedModel) -> set[str]:
    """The names of all linear layers of the base, without the head."""
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.base_model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


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


def adapt(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """A base that load_base has loaded with adapter and head of a folder, ready to score."""
    new_head(model, seed=0)
    with silent_peft():
        adapted = PeftModel.from_pretrained(model, adapter).eval()
    layers.swap_layers(adapted)
    return adapted


@contextmanager
def silent_peft() -> Iterator[None]:
    """PEFT asks for a property that transformers has renamed, and each wrapping warns of it.

    It also warns where it finds by itself that GPT-2's weights, of Conv1D, are transposed, and of a
    pattern of its own for the fused experts of mixtures, which are left as they are.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        yield


def save(model: PeftModel, folder: Path, base: str, quantization: Quantization) -> None:
    """Write adapter, head and the recipe of the base; the same bytes for the same weights.

    `base` is what base_model_name_or_path will say. PEFT writes its model card and the target
    modules in the order of a set: the one is removed, the other sorted.
    """
    with writing(folder, room=trained_bytes(model)):
        model.save_pretrained(str(folder), safe_serialization=True)
        if model.peft_config["default"].use_dora:  # type: ignore[attr-defined]
            name_magnitudes(folder / ADAPTER_WEIGHTS)
    (folder / "README.md").unlink(missing_ok=True)
    settle_config(folder, base_model_name_or_path=base)
    write_json(folder / "quantization.json", quantization.recipe)


def name_magnitudes(path: Path) -> None:
    """Give DoRA's magnitudes the names of their parameters, in an adapter that PEFT has written.

    PEFT leaves out `.weight` and reads either name. transformers looks for the whole name alone,
    and without an error takes the lengths of the base's rows instead.
    """
    tensors = {
        f"{name}.weight" if name.endswith("lora_magnitude_vector") else name: tensor
        for name, tensor in tensors_of(path.read_bytes()).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def settle_config(folder: Path, **changes: str) -> None:
    """Change the configuration of an adapter; PEFT writes its modules in the order of a set."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    config["target_modules"] = sorted(config["target_modules"])
    write_json(path, config)


def trained_bytes(model: nn.Module) -> int:
    """How much adapter and head take on the disk."""
    return sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)


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
