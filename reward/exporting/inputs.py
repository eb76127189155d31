"""The input of an exported folder's clients: its pairs as ids, as text and as conversations.

A client gets pairs in several forms and returns their rewards as a table with one row per pair.
"""

import json
from collections.abc import Callable, Hashable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import pyarrow as pa
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from reward.data.columns import REWARDS
from reward.exporting.exported import (
    ADAPTER_CONFIG,
    EXPORTED_BASE,
    TEMPLATE,
    exported_quantization,
)
from reward.model.base import device, keep_weights_unpacked
from reward.model.packing import Texts, tokens
from reward.model.rankings import Ranking
from reward.outputs import read_json

BATCH = 16
# The number of pairs for slow forms, such as one text at a time, and for slow clients.
SAMPLE = 32
PAIR = "pair"
# Model types whose rewards depend on how far a text is from the start of its row, so on padding on
# the left: by learned positions, by norms after the rotation, or by a scale that grows along a row.
COUNT_PADDING = {
    *("biogpt", "gpt-sw3", "gpt2", "gpt_bigcode"),
    *("hunyuan_v1_dense", "hunyuan_v1_moe"),
    *("ministral3", "mistral4"),
}

Pair = TypeVar("Pair")
Text = TypeVar("Text", bound=Hashable)
Ids = list[list[int]]


@dataclass(frozen=True)
class Form:
    """How a client gets pairs: padded on one side, `batch` texts at a time.

    With `sample`, it gets only some of the pairs; with `ended`, their texts end in eos.
    """

    name: str
    side: Literal["left", "right"] = "right"
    batch: int = BATCH
    sample: bool = False
    ended: bool = False


RIGHT, LEFT = Form("right"), Form("left", side="left", sample=True)
SINGLE, EOS = Form("single", batch=1, sample=True), Form("eos", sample=True, ended=True)


@dataclass(frozen=True)
class Conversation:
    """A pair as text; rendered and tokenized, it has the pair's ids."""

    prompt: str
    answers: tuple[str, str]


@dataclass(frozen=True)
class Exported:
    """An exported folder and the pairs to score with it.

    `rankings` are the same pairs grouped by prompt, as in the packs of evaluate. `messages` are
    prompt, chosen and rejected of each pair as JSON. `base` is the base as fetch wrote it, and
    `tokens_per_pack` is the pack size of evaluate. `compared` are the indices of the pairs that
    clients other than packs get, some or all, in ascending order.
    """

    folder: Path
    pairs: list[Texts]
    rankings: list[Ranking]
    messages: list[tuple[str, str, str]]
    base: Path
    tokens_per_pack: int
    compared: Sequence[int]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(self.folder))

    @property
    def has_base(self) -> bool:
        """Whether the base is in the folder, not on the Hub."""
        return (self.folder / EXPORTED_BASE).is_dir()

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments that a loader needs: only the device, unless the base is on the Hub."""
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

        The revision is passed because transformers ignores the adapter's and loads the newest one.
        """
        config = read_json(self.folder / ADAPTER_CONFIG)
        commit = {} if self.has_base else {"revision": config["revision"]}
        with chdir(self.folder):
            model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
                ".", **self.arguments, **commit
            )
        keep_weights_unpacked(model)
        return model

    @cached_property
    def ids(self) -> dict[int, Ids]:
        """The ids of chosen and rejected, sorted by length, which saves padding."""
        order = sorted(self.compared, key=lambda index: tokens(self.pairs[index]))
        return {index: [list(map(int, ids)) for ids in self.pairs[index].ids] for index in order}

    @property
    def longest(self) -> int:
        """The number of tokens of the longest text."""
        return max(len(ids) for pair in self.ids.values() for ids in pair)

    @cached_property
    def sample(self) -> list[int]:
        """The indices of at most SAMPLE pairs, evenly spaced."""
        count = min(SAMPLE, len(self.compared))
        places = np.linspace(0, len(self.compared) - 1, count).round().astype(int)
        return [self.compared[place] for place in places]

    @cached_property
    def ended(self) -> dict[int, Ids]:
        """The ids of the sample with the end-of-sequence token, if the tokenizer has one.

        Pairs with a text of the maximum length are left out: the base may not read another token.
        """
        eos = self.tokenizer.eos_token_id
        if eos is None:
            return {}
        most = read_json(self.folder / TEMPLATE)["max_length"]
        return {
            index: [[*ids, eos] for ids in self.ids[index]]
            for index in self.sample
            if max(map(len, self.ids[index])) < most
        }

    @cached_property
    def texts(self) -> dict[int, list[str]]:
        """The pairs as text. Pairs whose text is not tokenized to the same ids are left out."""
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
        """The pairs as a prompt and two answers. Pairs that render to other text are left out."""
        found = {}
        for index, texts in self.texts.items():
            turns = [json.loads(side) for side in self.messages[index]]
            if all(map(is_one_text, turns)):
                prompt, *answers = (side[0]["content"] for side in turns)
                if [self.render(prompt, answer) for answer in answers] == texts:
                    found[index] = Conversation(prompt, (answers[0], answers[1]))
        return found

    def render(self, prompt: str, answer: str) -> str:
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

    def ids_of(self, form: Form) -> dict[int, Ids]:
        """The ids that a client gets in a form, by the index of the pair."""
        return self.ended if form.ended else self.select(self.ids, form)

    def texts_of(self, form: Form) -> dict[int, list[str]]:
        """The texts that a client gets in a form, by the index of the pair."""
        found = self.select(self.texts, form)
        if not form.ended:
            return found
        eos = str(self.tokenizer.eos_token)
        return {
            index: [text + eos for text in found[index]] for index in self.ended if index in found
        }

    @cached_property
    def counts_padding(self) -> bool:
        """Whether plain loaders compute another reward for a text that is padded on the left."""
        return read_json(self.base / "config.json")["model_type"] in COUNT_PADDING

    def select(self, pairs: dict[int, Pair], form: Form) -> dict[int, Pair]:
        """All pairs or those of the sample. None of them if the form does not suit the model."""
        if form.side == "left" and self.counts_padding:
            return {}
        if not form.sample:
            return pairs
        return {index: pairs[index] for index in self.sample if index in pairs}


# Scores the pairs in a form; returns their rewards as a table from `paired`.
Score = Callable[[Form], pa.Table]


@dataclass(frozen=True)
class Client:
    """A way to load an exported folder and to score pairs with it, in some forms.

    `open` loads the model. If `merged`, it is the merged model, which not every folder has.
    """

    name: str
    open: Callable[[Exported], Score]
    forms: tuple[Form, ...]
    merged: bool


def is_one_text(messages: list[dict[str, Any]]) -> bool:
    """Whether a side of a pair is a single message with nothing but text."""
    return len(messages) == 1 and messages[0].keys() == {"role", "content"}


def once(
    texts: Sequence[Text], score: Callable[..., Sequence[float]], *arguments: Any
) -> list[float]:
    """The rewards of texts. Equal texts are scored once, because an answer may be in many pairs."""
    distinct = list(dict.fromkeys(texts))
    found = dict(zip(distinct, score(distinct, *arguments), strict=True))
    return [found[text] for text in texts]


def paired(pairs: Sequence[int], rewards: Sequence[float]) -> pa.Table:
    """The rewards of pairs as a table with one row per pair: `pair` and both rewards.

    `rewards` is [2 * pairs]: chosen, rejected, chosen, rejected, ...
    """
    sides = (pa.array(rewards[start::2], pa.float64()) for start in (0, 1))
    columns = {PAIR: pa.array(pairs, pa.int64()), **dict(zip(REWARDS, sides, strict=True))}
    return pa.table(columns)
