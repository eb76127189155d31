"""Make a base model of realistic size with random weights, to measure what that size costs.

    python -m benchmarks.random_base models/qwen2-0.5b-shape

The default is the exact configuration of Qwen2-0.5B. The tokenizer is the embedded one.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from reward.model import embedded
from reward.process import command_line


def main() -> None:
    parser = command_line("benchmarks.random_base", __doc__)
    parser.add_argument("folder", type=Path, help="where to write the model")
    for name, default in (
        ("hidden-size", 896),
        ("num-hidden-layers", 24),
        ("num-attention-heads", 14),
        ("num-key-value-heads", 2),
        ("intermediate-size", 4864),
        ("vocab-size", 151936),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"by default {default}")
    shape = vars(parser.parse_args())
    folder = shape.pop("folder")
    print(f"{make(folder, shape):,} random parameters in {folder}")


def make(folder: Path, shape: dict[str, Any]) -> int:
    """Write a Qwen2 of the given shape, with a tokenizer; returns its number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = embedded.train_tokenizer(embedded.paragraphs(embedded.CORPUS))
    embedded.save_tokenizer(tokenizer, folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        **shape,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return int(model.num_parameters())


if __name__ == "__main__":
    main()
