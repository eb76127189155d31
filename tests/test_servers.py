"""The merged model has what the loaders of vLLM and SGLang read, as docs/clients.md describes."""

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from reward.outputs import read_json
from tests.support import ROOT

# A pooling configuration of sentence-transformers, which vLLM would follow.
OTHER_POOLING = ("modules.json", "1_Pooling", "config_sentence_transformers.json")
# With these, vLLM builds a head from a language model's tokens, or uses another dtype for it.
OTHER_HEAD = ("method", "classifier_from_token", "use_pad_token", "head_dtype")


@pytest.fixture
def merged(complete: Path) -> Path:
    return complete / "models" / "export" / "merged"


@pytest.fixture
def config(merged: Path) -> dict[str, Any]:
    return dict(read_json(merged / "config.json"))


def test_merged_model_is_a_classifier_with_one_output(merged: Path, config: dict[str, Any]) -> None:
    [architecture] = config["architectures"]
    assert architecture == "Qwen2ForSequenceClassification"
    assert (config["id2label"], config["label2id"]) == ({"0": "reward"}, {"reward": 0})
    assert not {"num_labels", "quantization_config", "auto_map", *OTHER_HEAD} & config.keys()
    with safe_open(merged / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    heads = {name: shape for name, shape in shapes.items() if not name.startswith("model.")}
    assert heads == {"score.weight": [1, config["hidden_size"]]}


def test_output_has_no_activation_and_no_other_pooling(
    merged: Path, config: dict[str, Any]
) -> None:
    """These keys set the activation of vLLM's /classify and /score; /score takes only torch's."""
    assert config["problem_type"] == "regression"
    activation = config["sentence_transformers"]["activation_fn"]
    assert activation == "torch.nn.modules.linear.Identity"
    assert not [name for name in OTHER_POOLING if (merged / name).exists()]


@pytest.mark.parametrize("language", [".md", ".zh.md"])
def test_commands_in_the_docs_have_the_dtype_and_the_maximum_length(
    merged: Path, config: dict[str, Any], language: str
) -> None:
    text = (ROOT / f"docs/clients{language}").read_text(encoding="utf-8")
    reward = read_json(merged.parent / "reward.json")
    commands = re.findall(r"^(?:vllm|sglang) serve .*$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert f"--dtype {config['dtype']} " in command
        assert re.search(r"--(?:max-model-len|context-length) (\d+)$", command)
        assert command.endswith(f" {reward['max_length']}")
        assert f" {merged.relative_to(merged.parents[2])} " in command


def test_messages_and_text_have_the_ids_of_training(merged: Path) -> None:
    """The tokenizer adds no special tokens, so texts may be sent as well."""
    tokenizer: Any = AutoTokenizer.from_pretrained(merged)
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    text = "问:Why?\n\n答:Because."
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert (
        ids
        == tokenizer(text)["input_ids"]
        == tokenizer(text, add_special_tokens=False)["input_ids"]
    )
