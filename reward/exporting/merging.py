"""The merged model, written one weight after another: memory never holds more of it than one.

LoRA is merged in fp32 into the numbers that the 4 bits of the base stand for. PEFT's merge into
4 bits would quantize again, and the original weights are not what was trained: both change rewards.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Params4bit
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from reward.model.base import head_of, silent_peft
from reward.outputs import write_json, writing

# The names of weights and index, and the most bytes of a file, as save_pretrained has them.
WEIGHTS, INDEX, SHARD = "model{suffix}.safetensors", "model.safetensors.index.json", "50GB"
FORMAT = {torch.float32: "F32", torch.bfloat16: "BF16"}
# Numbers that are converted to another type at a time.
CHUNK = 1 << 22


def write_merged(
    model: PreTrainedModel,
    adapter: Path,
    dtype: torch.dtype,
    folder: Path,
    shard: int | str = SHARD,
) -> None:
    """Write configuration and weights of a classifier with LoRA and the head of an adapter in it.

    The files are those of save_pretrained, which begins another one where one would have more than
    `shard` bytes. The weights are merged on the CPU; `model` is used up.
    """
    plain, model = skeleton(model, dtype), model.cpu()
    # PEFT reads the trained head in the type of the one that is there.
    head_of(model).float()
    with silent_peft():
        PeftModel.from_pretrained(model, adapter)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in plain.state_dict():
            # A checkpoint may have other names than the model, and an expert a tensor of its own.
            yield from revert_weight_conversion(plain, {name: merged_weight(model, name)}).items()

    with writing(folder):
        plain.config.save_pretrained(folder)
        layout = revert_weight_conversion(plain, plain.state_dict())
        split = split_torch_state_dict_into_shards(
            layout, filename_pattern=WEIGHTS, max_shard_size=shard
        )
        if split.is_sharded:
            sizes = {"total_parameters": plain.num_parameters(), **split.metadata}
            index = {"metadata": sizes, "weight_map": split.tensor_to_filename}
            write_json(folder / INDEX, index)
        shapes = {
            folder / name: {each: layout[each].shape for each in names}
            for name, names in split.filename_to_tensors.items()
        }
        write_weights(shapes, dtype, weights())


def skeleton(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A classifier without quantization and without numbers, on the device meta."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    config.architectures, config.dtype = [type(model).__name__], str(dtype).removeprefix("torch.")
    with torch.device("meta"):
        plain = type(model)(config)
    cast(nn.Module, plain).to(dtype)
    # By which the names of the checkpoint are found again.
    cast(Any, plain)._weight_conversions = getattr(model, "_weight_conversions", None)
    return plain


def merged_weight(model: nn.Module, name: str) -> Tensor:
    """A weight, by its name in the model without LoRA, with LoRA's share in it, in fp32 then."""
    place, _, kind = name.rpartition(".")
    module = model.get_submodule(place)
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save["default"]
    base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    stored = getattr(base, kind)
    weight: Tensor = stored.detach()
    if isinstance(stored, Params4bit):
        weight = dequantize_4bit(stored.data, cast(Any, stored).quant_state)
    if isinstance(module, LoraLayer) and kind == "weight":
        weight = with_adapter(module, weight.float())
    if isinstance(stored, Params4bit) and getattr(base, "source_cls", None) is Conv1D:
        return weight.T  # GPT-2's own kind of linear layer, which 4 bits turn round
    return weight


def with_adapter(layer: Any, weight: Tensor) -> Tensor:
    """The weights of a layer, in fp32, with its adapter in them.

    LoRA is added; DoRA, which PEFT calls a variant of it, also scales the rows (Liu et al. 2024,
    equation 5).
    """
    variant = layer.lora_variant.get("default")
    if variant:
        return cast(Tensor, variant.merge_safe(layer, "default", weight))
    return weight + cast(Tensor, layer.get_delta_weight("default"))


def write_weights(
    shapes: dict[Path, dict[str, torch.Size]],
    dtype: torch.dtype,
    weights: Iterable[tuple[str, Tensor]],
) -> None:
    """Write weights as they come, in any order, to the files of safetensors that have their shapes.

    The bytes are those of safetensors.torch.save_file
    (https://github.com/huggingface/safetensors#format), which needs all weights at once.
    """
    places = {}
    for path, those in shapes.items():
        for name, place in write_header(path, dtype, those).items():
            places[name] = path, place
    for name, weight in weights:
        path, place = places[name]
        with path.open("r+b") as file:
            file.seek(place)
            for part in weight.flatten().split(CHUNK):
                file.write(part.to(dtype).view(torch.uint8).numpy().data)


def write_header(path: Path, dtype: torch.dtype, shapes: dict[str, torch.Size]) -> dict[str, int]:
    """Begin a file of safetensors; at which of its bytes each weight is to be written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name, shape in sorted(shapes.items()):
        places[name], end = end, end + shape.numel() * dtype.itemsize
        offsets = {"data_offsets": [places[name], end]}
        header[name] = {"dtype": FORMAT[dtype], "shape": list(shape)} | offsets
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + place for name, place in places.items()}
