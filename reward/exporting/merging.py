"""The merged model, written one weight at a time, so that memory never holds two merged weights.

LoRA is merged in fp32 into the dequantized weights of the base, which are those of training.
Merging into the original weights would change the rewards, and so would PEFT's merge, which
quantizes the result again.
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

from reward.model.base import dtype_name, head_of, silent_peft
from reward.outputs import write_json, writing

# The file names of weights and index, and the size of the largest file, as in save_pretrained.
WEIGHTS, INDEX, SHARD = "model{suffix}.safetensors", "model.safetensors.index.json", "50GB"
FORMAT = {torch.float32: "F32", torch.bfloat16: "BF16"}
# How many numbers are converted to another dtype at a time.
CHUNK = 1 << 22


def write_merged(
    model: PreTrainedModel,
    adapter: Path,
    dtype: torch.dtype,
    folder: Path,
    shard: int | str = SHARD,
) -> None:
    """Write configuration and weights of a classifier with an adapter's LoRA and head merged in.

    The files are those of save_pretrained, which starts another file where one would have more than
    `shard` bytes. The weights are merged on the CPU; `model` cannot be used afterwards.
    """
    plain, model = skeleton(model, dtype), model.cpu()
    # PEFT loads the trained head in the dtype of the existing one.
    head_of(model).float()
    with silent_peft():
        PeftModel.from_pretrained(model, adapter)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in plain.state_dict():
            # A checkpoint may use other names than the model, and one tensor for each expert.
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
    """The classifier without quantization and without data, on the meta device."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    config.architectures, config.dtype = [type(model).__name__], dtype_name(dtype)
    with torch.device("meta"):
        plain = type(model)(config)
    cast(nn.Module, plain).to(dtype)
    # revert_weight_conversion needs this to find the names of the checkpoint.
    cast(Any, plain)._weight_conversions = getattr(model, "_weight_conversions", None)
    return plain


def merged_weight(model: nn.Module, name: str) -> Tensor:
    """The weight with this name in the model without LoRA; in fp32 if LoRA is merged into it."""
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
        return weight.T  # because bitsandbytes stores GPT-2's Conv1D transposed
    return weight


def with_adapter(layer: Any, weight: Tensor) -> Tensor:
    """The weights of a layer, in fp32, with its adapter merged in.

    LoRA is added. DoRA, which PEFT implements as a variant of LoRA, also scales the rows (Liu et
    al. 2024, equation 5).
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
    """Write weights, in any order, to safetensors files with the given names and shapes.

    The bytes are those of safetensors.torch.save_file
    (https://github.com/huggingface/safetensors#format), which needs all weights at once.
    """
    places = {}
    for path, by_name in shapes.items():
        for name, place in write_header(path, dtype, by_name).items():
            places[name] = path, place
    for name, weight in weights:
        path, place = places[name]
        with path.open("r+b") as file:
            file.seek(place)
            for part in weight.flatten().split(CHUNK):
                file.write(part.to(dtype).view(torch.uint8).numpy().data)


def write_header(path: Path, dtype: torch.dtype, shapes: dict[str, torch.Size]) -> dict[str, int]:
    """Write the header of a safetensors file; returns the byte offset of each weight.

    The header is its length in 8 bytes, then JSON, padded with spaces to a multiple of 8.
    """
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
