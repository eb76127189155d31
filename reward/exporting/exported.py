"""An exported folder and the pairs that its clients score: as ids, as text, as conversations."""

from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from reward.data.tokens import common_start
from reward.model.base import (
    ADAPTER_WEIGHTS,
    DIGESTS,
    Quantization,
    adapt,
    device,
    keep_weights_unpacked,
    load_base,
)
from reward.model.packing import Texts, tokens
from reward.outputs import read_json, recorded, require_files
from reward.process import Fault

# What an exported folder has besides the adapter: two folders, and what is known of its rewards.
EXPORTED_BASE, MERGED, REWARD = "base", "merged", "reward.json"
# Keys of configurations by which transformers and PEFT import what they name.
NAMING_CODE = {"auto_map", "auto_mapping", "custom_pipelines", "megatron_config"}

BATCH = 16
# Pairs of the forms that are slow: one text by one, and a step of training.
SAMPLE = 32
MARKS = "\ue000\ue001", "\ue001\ue000"

# Rewards of some pairs, by the index of the pair: [chosen, rejected].
Found = dict[int, list[float]]
Forms = dict[str, Found]


@dataclass(frozen=True)
class Conversation:
    """A pair as text; what is rendered of it has the pair's ids."""

    prompt: str
    answers: tuple[str, str]


@dataclass(frozen=True)
class Exported:
    """An exported folder and the pairs to score with it."""

    folder: Path
    pairs: list[Texts]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(self.folder))

    @property
    def has_base(self) -> bool:
        """Whether the base is in the folder, and not the Hub's."""
        return (self.folder / EXPORTED_BASE).is_dir()

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What a loader must be told: nothing but the device, unless the base is the Hub's."""
        place: dict[str, Any] = {"device_map": {"": device()}}
        if self.has_base:
            return place
        quantization = exported_quantization(self.folder)
        recipe = quantization.recipe
        return place | {
            "num_labels": 1,
            "pad_token_id": self.tokenizer.pad_token_id,
            "dtype": quantization.dtype,
            "quantization_config": BitsAndBytesConfig(**recipe) if recipe else None,
        }

    def load_adapter(self) -> PreTrainedModel:
        """The adapter on its base, as transformers loads it.

        It would take the newest commit of a base of the Hub, whatever the adapter names.
        """
        config = read_json(self.folder / "adapter_config.json")
        commit = {} if self.has_base else {"revision": config["revision"]}
        with chdir(self.folder):
            model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
                ".", **self.arguments, **commit
            )
        keep_weights_unpacked(model)
        return model

    @cached_property
    def ids(self) -> dict[int, list[list[int]]]:
        """Ids of chosen and rejected, in the order of their length, which saves padding."""
        order = sorted(range(len(self.pairs)), key=lambda index: tokens(self.pairs[index]))
        return {index: [list(map(int, ids)) for ids in self.pairs[index].ids] for index in order}

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(ids) for pair in self.ids.values() for ids in pair)

    @cached_property
    def sample(self) -> list[int]:
        """The indices of at most SAMPLE pairs, evenly spread."""
        count = min(SAMPLE, len(self.pairs))
        return np.linspace(0, len(self.pairs) - 1, count).round().astype(int).tolist()

    @cached_property
    def ended(self) -> dict[int, list[list[int]]]:
        """The ids of the sample with the end-of-sequence token, if the tokenizer has one."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            return {}
        return {index: [[*ids, eos] for ids in self.ids[index]] for index in self.sample}

    @cached_property
    def texts(self) -> dict[int, list[str]]:
        """The pairs as text, of those whose text has their ids."""
        found = {
            index: self.tokenizer.batch_decode(pair, clean_up_tokenization_spaces=False)
            for index, pair in self.ids.items()
        }
        return {
            index: texts
            for index, texts in found.items()
            if self.tokenizer(texts, add_special_tokens=False)["input_ids"] == self.ids[index]
        }

    @cached_property
    def conversations(self) -> dict[int, Conversation]:
        """The pairs as a prompt and two answers, of those that are rendered to their ids."""
        rendered = self.render(*MARKS)
        head, _, rest = rendered.partition(MARKS[0])
        middle, _, tail = rest.partition(MARKS[1])
        found = {}
        for index, texts in self.texts.items():
            shared = common_start(*texts)
            end = shared.find(middle, len(head)) if middle else len(shared)
            answers = [text[end + len(middle) : len(text) - len(tail)] for text in texts]
            prompt = shared[len(head) : end]
            if end >= 0 and [self.render(prompt, answer) for answer in answers] == texts:
                found[index] = Conversation(prompt, (answers[0], answers[1]))
        return found

    def render(self, prompt: str, answer: str) -> str:
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))


def paired(indices: Sequence[int], rewards: Sequence[float]) -> Found:
    """Rewards of both sides, pair by pair, by the index of the pair."""
    both = zip(rewards[::2], rewards[1::2], strict=True)
    return {index: list(pair) for index, pair in zip(indices, both, strict=True)}


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
