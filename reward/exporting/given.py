"""What the clients of an exported folder are given: its pairs as ids, as text, as conversations.

A client is given pairs in several forms and finds their rewards, a table of one row a pair.
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
from reward.exporting.exported import ADAPTER_CONFIG, EXPORTED_BASE, exported_quantization
from reward.model.base import device, keep_weights_unpacked
from reward.model.packing import Texts, tokens
from reward.model.rankings import Ranking
from reward.outputs import read_json

BATCH = 16
# Pairs of the forms that are slow: one text by one, and a step of training.
SAMPLE = 32
PAIR = "pair"
# Types of models that count positions from the start of a row, whatever it is padded with.
COUNT_PADDING = {"gpt2", "gpt_bigcode"}

Pair = TypeVar("Pair")
Text = TypeVar("Text", bound=Hashable)
Ids = list[list[int]]


@dataclass(frozen=True)
class Form:
    """How pairs are given to a client: padded on a side, `batch` texts at a time.

    `sample`: some of the pairs, not all; `ended`: their texts end in eos.
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
    """A pair as text; what is rendered of it has the pair's ids."""

    prompt: str
    answers: tuple[str, str]


@dataclass(frozen=True)
class Exported:
    """An exported folder and the pairs to score with it.

    `rankings` are the same pairs by their prompts, as evaluate has them in packs. `messages` are
    prompt, chosen and rejected of each pair, as JSON. `base` is the base as fetch
    left it, `tokens_per_pack` the size of the packs of evaluate. Clients that know of no packs are
    given `compared`, the indices of some pairs or of all, in ascending order.
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
        """Ids of chosen and rejected, in the order of their length, which saves padding."""
        order = sorted(self.compared, key=lambda index: tokens(self.pairs[index]))
        return {index: [list(map(int, ids)) for ids in self.pairs[index].ids] for index in order}

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(ids) for pair in self.ids.values() for ids in pair)

    @cached_property
    def sample(self) -> list[int]:
        """The indices of at most SAMPLE of the pairs, evenly spread."""
        count = min(SAMPLE, len(self.compared))
        places = np.linspace(0, len(self.compared) - 1, count).round().astype(int)
        return [self.compared[place] for place in places]

    @cached_property
    def ended(self) -> dict[int, Ids]:
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
        """The ids that a client is given in a form, by the index of the pair."""
        return self.ended if form.ended else self.taken(self.ids, form)

    def texts_of(self, form: Form) -> dict[int, list[str]]:
        """The same as text."""
        found, eos = self.taken(self.texts, form), self.tokenizer.eos_token
        if not form.ended:
            return found
        return {index: [text + eos for text in texts] for index, texts in found.items() if eos}

    @cached_property
    def counts_padding(self) -> bool:
        """Whether plain loaders compute another reward of a text that is padded on its left."""
        return read_json(self.base / "config.json")["model_type"] in COUNT_PADDING

    def taken(self, pairs: dict[int, Pair], form: Form) -> dict[int, Pair]:
        """All of the pairs, or those of the sample; none in a form that is wrong for the model."""
        if form.side == "left" and self.counts_padding:
            return {}
        if not form.sample:
            return pairs
        return {index: pairs[index] for index in self.sample if index in pairs}


# Gives pairs to a model in a form, and returns what `paired` makes of their rewards.
Score = Callable[[Form], pa.Table]


@dataclass(frozen=True)
class Client:
    """A way to load an exported folder and to score with it, pairs in some forms.

    `open` loads the model. `merged`: that is the merged model, which not every folder has.
    """

    name: str
    open: Callable[[Exported], Score]
    forms: tuple[Form, ...]
    merged: bool


def is_one_text(messages: list[dict[str, Any]]) -> bool:
    """Whether a side of a pair is a single message that has nothing but its text."""
    return len(messages) == 1 and messages[0].keys() == {"role", "content"}


def once(
    texts: Sequence[Text], score: Callable[..., Sequence[float]], *arguments: Any
) -> list[float]:
    """The rewards of texts, of which equal ones are scored once: an answer is in many pairs."""
    distinct = list(dict.fromkeys(texts))
    found = dict(zip(distinct, score(distinct, *arguments), strict=True))
    return [found[text] for text in texts]


def paired(pairs: Sequence[int], rewards: Sequence[float]) -> pa.Table:
    """The rewards of pairs, chosen and rejected by turns, as a table: `pair` and both rewards.

    Rewards of [2 * pairs]; a row for each pair.
    """
    sides = (pa.array(rewards[start::2], pa.float64()) for start in (0, 1))
    columns = {PAIR: pa.array(pairs, pa.int64()), **dict(zip(REWARDS, sides, strict=True))}
    return pa.table(columns)
