"""An exported reward model that scores: prompts with answers in, rewards out.

    from reward.serving.scorer import reward_function

    trainer = GRPOTrainer(reward_funcs=reward_function("models/export"), ...)

Template, ids, packs and passes are those of training and evaluation.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reward.data.records import BadRecord, Candidates, Messages, candidates
from reward.data.tokens import Encoder, Template
from reward.exporting.exported import REWARD, load_exported
from reward.model.packing import texts_of
from reward.model.scoring import score
from reward.outputs import recorded
from reward.process import Fault

# The most tokens of one pack: memory depends on it, rewards to rounding only.
TOKENS_PER_PACK = 4096

Ids = list[int]


class Misfit(BadRecord):
    """A text that cannot be scored, by its index among those that came with it."""

    def __init__(self, index: int, reason: str, sentence: str) -> None:
        super().__init__(reason, sentence)
        self.index = index


class Scorer:
    """An exported reward model with its template and tokenizer."""

    def __init__(self, folder: Path) -> None:
        """Raises a Fault for a folder that is no whole export."""
        self._folder = folder
        self._model = load_exported(folder)
        self._template = Template.load(folder / "template.json")
        self._encoder = Encoder(folder, self._template)
        self.temperature: float = recorded(folder / REWARD)["temperature"]

    def render(self, asked: Candidates) -> list[str]:
        """The text of a prompt with each answer. Raises BadRecord where the template cannot."""
        return [self._encoder.render(asked.prompt, answer) for answer in asked.answers]

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, as in training.

        Raises Misfit for the first text that has none, or more than a text of training may have.
        """
        found, most = self._encoder.encode(texts), self._template.max_length
        for index, ids in enumerate(found):
            if not ids:
                raise Misfit(index, "empty", "the text has no token")
            if len(ids) > most:
                sentence = f"the text has {len(ids)} tokens, at most {most} fit the model"
                raise Misfit(index, "over_length", sentence)
        return found

    def encode_rendered(self, texts: Sequence[str]) -> list[Ids]:
        """The same for whole texts, which may have the tokenizer's special tokens around them."""
        return self.encode([self._encoder.bare(text) for text in texts])

    def encode_pairs(
        self, prompts: Sequence[Any], answers: Sequence[Any]
    ) -> tuple[list[Ids], list[Messages]]:
        """The ids of each prompt with its answer, and the prompt as messages.

        Prompts and answers are texts or lists of messages. Raises Misfit for the first bad one.
        """
        texts, asked = [], []
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            try:
                found = candidates({"prompt": prompt, "answer": answer})
                texts += self.render(found)
            except BadRecord as error:
                raise Misfit(index, error.reason, str(error)) from None
            asked.append(found.prompt)
        return self.encode(texts), asked

    def rewards(self, texts: Sequence[Ids], prompts: Sequence[Hashable]) -> list[float]:
        """The reward of each text; what texts of equal prompts begin with is computed once.

        Shapes [texts]. Equal texts of a prompt have equal rewards, which rounding could tell apart.
        Raises a Fault for rewards that are not finite.
        """
        groups: dict[Hashable, dict[tuple[int, ...], list[int]]] = {}
        for place, (prompt, ids) in enumerate(zip(prompts, texts, strict=True)):
            groups.setdefault(prompt, {}).setdefault(tuple(ids), []).append(place)
        parts = [texts_of(list(group)) for group in groups.values()]
        scored = score(self._model, parts, TOKENS_PER_PACK).tolist()
        if broken := sum(not math.isfinite(reward) for reward in scored):
            raise Fault(
                f"{self._folder}: the rewards of {broken} of {len(scored)} texts are not finite; "
                "quantization.compute_dtype float32 has the widest range"
            )
        found = [0.0] * len(texts)
        distinct = (places for group in groups.values() for places in group.values())
        for places, reward in zip(distinct, scored, strict=True):
            for place in places:
                found[place] = reward
        return found


def ranks(rewards: Sequence[float]) -> list[int]:
    """The rank of each reward, 1 for the highest; equal ones share the better rank.

    [0.5, 2.0, 0.5] gives [2, 1, 2].
    """
    from scipy.stats import rankdata

    found: list[int] = rankdata(-np.asarray(rewards), method="min").astype(int).tolist()
    return found


def probabilities(rewards: Sequence[float], temperature: float) -> list[float]:
    """The probability of each answer to be the best of its prompt.

    The softmax of rewards / temperature, the first choice of Plackett-Luce; of two answers that is
    the probability of Bradley and Terry. [log 3, 0] gives [0.75, 0.25] at temperature 1.
    """
    from scipy.special import softmax

    found: list[float] = softmax(np.asarray(rewards, np.float32) / temperature).tolist()
    return found


def reward_function(folder: str | Path) -> Callable[..., list[float]]:
    """An exported reward model as a function for TRL's `reward_funcs`.

    Prompts and completions are texts or lists of messages, which the model's own template renders.
    The function raises a Fault for what that cannot render, and for texts that are too long.
    """
    scorer = Scorer(Path(folder))

    def reward_model(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        try:
            return scorer.rewards(*scorer.encode_pairs(prompts, completions))
        except Misfit as error:
            raise Fault(f"prompts[{error.index}] with its completion: {error}") from None

    return reward_model
