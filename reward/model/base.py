"""The reward model: a quantized base, LoRA on its projections, and a scalar head."""

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
from reward.model.head import HEAD, is_classifier
from reward.model.memory import TooLarge, within_memory
from reward.outputs import digests, read_json, recorded, require_files, write_json, writing
from reward.params import Switch
from reward.process import Fault, free_memory

DIGESTS, ADAPTER_WEIGHTS = "digests.json", "adapter_model.safetensors"

# PEFT's name for all linear layers except the head.
ALL_LINEAR = "all-linear"
# The names of attention's projections, and those of a projection that combines all three.
SEPARATE = {"q_proj", "k_proj", "v_proj"}
FUSED = {"qkv_proj", "query_key_value", "c_attn", "Wqkv"}

# In mixtures of experts: the names of an expert's projections, and those of routers.
EXPERT_PARTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
ROUTERS = {"gate", "router", "shared_expert_gate", "wg"}
# Exactly these, because a subclass may return more than one tensor.
LINEAR = (*layers.LINEAR, Conv1D)

# Two-dimensional weights that bitsandbytes does not quantize.
NOT_LINEAR = re.compile(r"embed|wte|wpe|lm_head|score")

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

# A part of the keys that choose the attention. For some of its own names, too, transformers
# downloads a kernel, so only those here are safe.
ATTENTION, SAFE = "attn_implementation", (None, "eager", "sdpa")
# Where a config.json may name other configurations, for later versions of transformers.
VERSIONS = "configuration_files"

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Quantization:
    """The group `quantization` of params.yaml, which describes each key."""

    bits: Literal[4, "none"]
    quant_type: Literal["nf4", "fp4"]
    double_quant: Switch
    compute_dtype: ComputeDtype

    @classmethod
    def unquantized(cls, compute_dtype: ComputeDtype) -> "Quantization":
        """The setting for a base that is not quantized. The 4-bit settings have no effect."""
        return cls("none", "nf4", False, compute_dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype of params.yaml; `auto` is the one that is fast on this machine."""
        return fast_dtype() if self.compute_dtype == "auto" else DTYPES[self.compute_dtype]

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The arguments of BitsAndBytesConfig as JSON values; None for an unquantized base."""
        if self.bits == "none":
            return None
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": dtype_name(self.dtype),
        }

    @property
    def record(self) -> dict[str, Any]:
        """What an adapter fits: the recipe, or the dtype of an unquantized base."""
        return self.recipe or {"dtype": dtype_name(self.dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fast_dtype() -> torch.dtype:
    """The dtype that the GPU's tensor cores multiply, or fp32 on a CPU.

    From Ampere on, this is bf16. Volta and Turing have only fp16. They report support for bf16, but
    emulate it, which is very slow. Adapters, head and loss are fp32 whatever the base uses, so fp16
    needs no gradient scaling. Its gradients are closer to those of fp32 than bf16's are. A base
    whose activations overflow in fp16 is rejected before the first step.
    """
    if not torch.cuda.is_available():
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if torch.cuda.get_device_capability() >= (7, 0) else torch.float32


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_stock(base: Path, quantization: Quantization) -> PreTrainedModel:
    """The base on the device as transformers loads it: a sequence classifier with one label.

    A base that is stored in 4 bits stays as it is. Code that comes with a base never runs. Raises a
    Fault if transformers has no classifier for the model, if it has no linear layer `score`, or if
    its configuration names a kernel, and TooLarge if the model does not fit in memory.
    """
    if (base / "adapter_config.json").exists():
        raise Fault(
            f"{base} contains adapter_config.json, from which transformers would load another "
            "model; expected none"
        )
    config = read_json(base / "config.json")
    require_no_kernel(base, config)
    if (kind := config.get("model_type")) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise Fault(
            f"{base}: transformers has no sequence classifier for {kind}, expected a decoder model "
            "with one"
        )
    require_bitsandbytes(base, config)
    require_room(base, quantization)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    recipe = None if is_quantized(config) else quantization.recipe
    loaded = within_memory(
        AutoModelForSequenceClassification.from_pretrained,
        base,
        num_labels=1,
        dtype=quantization.dtype,
        # Omitted instead of None, because None would hide a stored quantization.
        **({"quantization_config": BitsAndBytesConfig(**recipe)} if recipe else {}),
        device_map={"": device()},
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    if loaded is None:
        raise too_large(base, quantization, "and memory ran out while they were loaded")
    model: PreTrainedModel = loaded[0]
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise Fault(
            f"{base}: {type(model).__name__} has no linear layer `score`, expected a decoder"
        )
    # transformers would draw it at random.
    if missing := sorted({*loaded[1]["missing_keys"]} - {HEAD}):
        raise Fault(f"{base} lacks the weight {missing[0]}, expected all that config.json needs")
    keep_weights_unpacked(model)
    return model


def require_bitsandbytes(base: Path, config: dict[str, Any]) -> None:
    """Raises a Fault for a stored quantization that is not in 4 bits by bitsandbytes.

    For some others, transformers downloads and runs kernels.
    """
    stored = config.get("quantization_config")
    if stored and not (
        isinstance(stored, dict)
        and stored.get("quant_method") == "bitsandbytes"
        and stored.get("load_in_4bit") is True
    ):
        raise Fault(
            f"{base}: config.json has a quantization_config other than bitsandbytes in 4 bits; "
            "expected weights that are not quantized, or those"
        )


def require_no_kernel(folder: Path, config: dict[str, Any]) -> None:
    """Raises a Fault if transformers may download a kernel for the attention of a config.json.

    Also if it names other files, because transformers reads the one for its own version instead.
    """
    if config.get(VERSIONS):
        raise Fault(
            f"{folder}: config.json has {VERSIONS}, so transformers would read another file; "
            "expected a single configuration"
        )
    if any(map(names_kernel, objects_in(config))):
        raise Fault(
            f"{folder}: config.json names an attention for which transformers may download and run "
            "a kernel; expected eager, sdpa or no such key"
        )


def names_kernel(part: dict[str, Any]) -> bool:
    """Whether an object of a configuration names an attention that is not SAFE.

    Earlier versions of transformers wrote a boolean under a similar key.
    """
    return any(
        ATTENTION in key and not isinstance(value, bool) and value not in SAFE
        for key, value in part.items()
    )


def objects_in(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and all objects in it, at any level."""
    parts = [config]
    while parts:
        part = parts.pop()
        yield part
        for value in part.values():
            listed = value if isinstance(value, list) else [value]
            parts += [each for each in listed if isinstance(each, dict)]


def is_quantized(config: dict[str, Any]) -> bool:
    """Whether a base with this config.json is stored in 4 bits; null in it says no."""
    return bool(config.get("quantization_config"))


def require_room(base: Path, quantization: Quantization) -> None:
    """Raises TooLarge if the base's weights alone need more memory than the device has."""
    if weight_bytes(base, quantization) > (room := memory()):
        here = "on the GPU" if device().type == "cuda" else "free on the machine"
        raise too_large(base, quantization, f"more than the {room / 1e9:.1f} GB {here}")


def too_large(base: Path, quantization: Quantization, problem: str) -> TooLarge:
    """The Fault that names the memory that a base needs, and the problem with it."""
    width = quantization.dtype.itemsize * 8
    bits = 4 if quantization.bits == 4 else width
    return TooLarge(
        f"{base}: its weights take {weight_bytes(base, quantization) / 1e9:.1f} GB in {bits} bits, "
        f"with embeddings and norms in {width}, {problem}; choose a smaller base.name or a machine "
        "with more memory (docs/distributed.md has a table)"
    )


def weight_bytes(base: Path, quantization: Quantization) -> int:
    """How many bytes the weights in a folder take after bitsandbytes has quantized them.

    Each number takes 4 bits, and every 64 numbers share a scale. The scale is fp32. With double
    quantization it takes 8 bits, and every 256 scales share an fp32 scale of their own (Dettmers et
    al. 2023, "QLoRA"). Weights that are stored in 4 bits stay as they are.
    """
    scale = (8 + 32 / 256) / 64 if quantization.double_quant else 32 / 64
    stored = is_quantized(read_json(base / "config.json"))
    found = 0.0
    for path in base.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
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
    """The memory of the GPU or, without a GPU, the free memory of the machine, in bytes."""
    return layers.memory_of(device()) or free_memory()


def load_base(base: Path, quantization: Quantization) -> PreTrainedModel:
    """The base as a frozen classifier whose head has yet to be set.

    It uses the attention over packs, and its own dropout is off. Raises a Fault if the model has no
    score head or does not support transformers' attention interface.
    """
    model = load_stock(base, quantization)
    model.set_attn_implementation(attention.NAME)
    if model.config._attn_implementation != attention.NAME:
        raise Fault(
            f"{base}: {type(model).__name__} does not allow its attention to be replaced, expected "
            "a decoder that supports transformers' attention interface"
        )
    model.config.use_cache = False
    switch_dropout_off(model)
    attention.swap_last_layer(model.base_model)
    return model.requires_grad_(False)


def switch_dropout_off(model: nn.Module) -> None:
    """Switch off the base's own dropout, which some modules hold as a plain float attribute."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def precisions(model: PeftModel) -> dict[str, int]:
    """How many parameters of the frozen base are in 4 bits, in half and in full precision.

    This counts the model's parameters, not the bytes that store them. bitsandbytes quantizes only
    linear layers; embeddings, norms and the fused experts of mixtures stay as they are.
    """
    found = {"four_bits": 0, "half": 0, "full": 0}
    for parameter in cast(PreTrainedModel, model.get_base_model()).base_model.parameters():
        if isinstance(parameter, Params4bit):
            found["four_bits"] += cast(Any, parameter).quant_state.shape.numel()
        elif not parameter.requires_grad:
            found["full" if parameter.dtype == torch.float32 else "half"] += parameter.numel()
    return found


def fused_experts(model: nn.Module) -> int:
    """How many parameters are in experts, which transformers stores as one tensor per layer."""
    return sum(each.numel() for each in model.parameters() if each.dim() == 3)


def keep_weights_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place at the first pass in eval mode.

    On processors with AVX512-BF16, Linear4bit rearranges its weights in its first forward without
    gradients, and such passes then compute in bf16. A later training step reads the repacked bytes
    as if they had the usual layout, and no error is raised.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def new_head(model: PreTrainedModel, seed: int) -> None:
    """Give the model a new scalar head, drawn at random with this seed."""
    features = head_of(model).in_features
    weight = torch.randn(1, features, generator=torch.Generator().manual_seed(seed))
    set_head(model, weight / features**0.5)


def has_head(base: Path) -> bool:
    """Whether a base is already a reward model. `load_stock` then loads its head, too."""
    return is_classifier(read_json(base / "config.json"))


def set_head(model: PreTrainedModel, weight: torch.Tensor) -> None:
    """Give the model an unquantized scalar head in fp32 with this weight: [1, features]."""
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=torch.float32)
    head.weight.data = weight.detach().float()
    model.score = head.to(device())


def head_of(model: nn.Module) -> nn.Linear:
    """The scalar head of a classifier; PEFT's wrapper behaves like the layer itself."""
    return cast(nn.Linear, model.score)


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Add LoRA in fp32 to a base from load_base: to the configured projections or to all.

    Raises a Fault for other names than those of `adaptable`, and TooLarge if the adapters do not
    fit in memory.
    """
    names = config.target_modules or ()
    found = adaptable(model) if names == ALL_LINEAR else target_modules(model, set(names))
    config.target_modules = found  # type: ignore[assignment]  # PEFT turns a list into a set too
    config.task_type = TaskType.SEQ_CLS
    with silent_peft():
        adapted = within_memory(get_peft_model, model, config)
    if adapted is None:
        raise TooLarge(f"adapters of rank {config.r} do not fit in memory; lower lora.r")
    layers.swap_layers(cast(PeftModel, adapted))
    return cast(PeftModel, adapted)


def target_modules(model: PreTrainedModel, names: set[str]) -> set[str]:
    """The projections that the names in params.yaml refer to.

    If the base combines query, key and value in one projection, the three names together refer to
    that one. Raises a Fault for other names than those of `adaptable`.
    """
    present = adaptable(model)
    if names >= SEPARATE and not SEPARATE & present and len(fused := FUSED & present) == 1:
        names = names - SEPARATE | fused
    if missing := sorted(names - present):
        raise Fault(
            f"params.yaml: lora.target_modules names {', '.join(missing)}, but the layers of "
            f"{type(model).__name__} that can have an adapter are {', '.join(sorted(present))}"
        )
    return names


def adaptable(model: PreTrainedModel) -> set[str]:
    """The names of the base's linear layers that can have an adapter.

    In a mixture of fused experts, the routers are left out, and so are all layers whose names
    belong to parts of experts. PEFT would adapt the fused experts in their place.
    """
    paths = [
        name.split(".")
        for name, module in model.base_model.named_modules()
        if type(module) in LINEAR
    ]
    left_out = EXPERT_PARTS | ROUTERS if fused_experts(model) else set()
    return {path[-1] for path in paths if left_out.isdisjoint(path)}


def load(base: Path, adapter: Path, quantization: Quantization) -> PeftModel:
    """A trained reward model, ready to score.

    Raises a Fault if files are damaged, if the base is not the one that the adapter was trained on,
    or if the base would be quantized or computed differently. An adapter only fits its own base.
    """
    require_sealed(adapter, base)
    trained, here = read_json(adapter / "quantization.json"), quantization.record
    if trained != here:
        raise Fault(
            f"{adapter} was trained on a base loaded with {trained}, but here it would be {here}; "
            "set quantization.compute_dtype to what it was, or train again on this machine"
        )
    return adapt(load_base(base, quantization), adapter)


def adapt(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """A base from load_base with the adapter and head of a folder, ready to score."""
    new_head(model, seed=0)
    with silent_peft(), warnings.catch_warnings():
        # PEFT would leave what is missing at its initial values.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, adapter).eval()
        except UserWarning:
            raise Fault(
                f"{adapter} lacks weights for layers that its adapter_config.json names, expected "
                "an adapter as it was trained"
            ) from None
    layers.swap_layers(adapted)
    return adapted


@contextmanager
def silent_peft() -> Iterator[None]:
    """Suppress two warnings of PEFT that tell the user nothing.

    PEFT reads a property that transformers has renamed. It also reports that it has noticed the
    transposed weights of GPT-2's Conv1D.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield


def save(model: PeftModel, folder: Path, base: str, quantization: Quantization) -> None:
    """Write adapter, head and how the base was loaded; equal weights give equal bytes.

    `base` becomes base_model_name_or_path. PEFT writes a model card, which is removed, and the
    target modules in the order of a set, so they are sorted.
    """
    with writing(folder, room=trained_bytes(model)):
        model.save_pretrained(str(folder), safe_serialization=True)
        if model.peft_config["default"].use_dora:  # type: ignore[attr-defined]
            name_magnitudes(folder / ADAPTER_WEIGHTS)
    (folder / "README.md").unlink(missing_ok=True)
    settle_config(folder, base_model_name_or_path=base)
    write_json(folder / "quantization.json", quantization.record)


def name_magnitudes(path: Path) -> None:
    """Give DoRA's magnitudes in a saved adapter the full names of their parameters.

    PEFT omits `.weight` and reads either name. transformers only reads the full name. If that is
    missing, it uses the norms of the base's rows and raises no error.
    """
    tensors = {
        f"{name}.weight" if name.endswith("lora_magnitude_vector") else name: tensor
        for name, tensor in tensors_of(path.read_bytes()).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def settle_config(folder: Path, **changes: str) -> None:
    """Apply changes to an adapter's configuration and sort its modules, because PEFT does not."""
    path = folder / "adapter_config.json"
    config = read_json(path) | changes
    config["target_modules"] = sorted(config["target_modules"])
    write_json(path, config)


def trained_bytes(model: nn.Module) -> int:
    """The bytes that adapter and head take on disk."""
    return sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)


def base_record(base: Path) -> dict[str, Any]:
    """What fetch recorded about the base model: name, kind, revision, files with their SHA-256."""
    return recorded(base / "base.json")


def seal(adapter: Path, base: Path) -> None:
    """Record the SHA-256 of all files in an adapter's folder and of the base that it belongs to."""
    files = digests(adapter)
    files.pop(DIGESTS, None)
    write_json(adapter / DIGESTS, {"base": base_record(base)["files"], "files": files})


def require_sealed(adapter: Path, base: Path) -> None:
    """Raises a Fault unless adapter and base are the files that were sealed together.

    A base that contains code is rejected, because fetch never writes code.
    """
    if code := sorted(path.name for path in base.glob("*.py")):
        raise Fault(
            f"{base} contains code ({', '.join(code)}), expected only what fetch writes; run "
            "dvc repro"
        )
    found, files = recorded(adapter / DIGESTS), base_record(base)["files"]
    if found["base"] != files:
        differing = sorted({name for name, _ in found["base"].items() ^ files.items()})
        raise Fault(
            f"{adapter} was trained on a different base than {base}, which differs in "
            f"{', '.join(differing)}; run dvc repro"
        )
    require_files(adapter, found["files"])
    require_files(base, files)
