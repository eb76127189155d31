"""An exported reward model that scores answers to prompts.

    from reward.serving.scorer import reward_function

    trainer = GRPOTrainer(reward_funcs=reward_function("models/export"), ...)

Templates, ids, packs and forward passes are the same as in training and evaluation.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reward.data.recognition import is_encoded
from reward.data.records import TOOLS, BadRecord, Candidates, Messages, candidates
from reward.data.tokens import Encoder, Template
from reward.exporting.exported import REWARD, TEMPLATE, load_exported
from reward.model.packing import texts_of
from reward.model.scoring import score
from reward.outputs import recorded
from reward.process import Fault, as_written
from reward.serving.endings import Endings
from reward.serving.openings import Openings

EXPORT = Path("models/export")
# The most tokens of a pack. It affects memory, and rewards only by rounding.
TOKENS_PER_PACK = 4096
# An answer that every template can render after a prompt that it can render.
PLAIN = "a"

Ids = list[int]


class Misfit(BadRecord):
    """A text that cannot be scored, with its index in the request."""

    def __init__(self, index: int, reason: str, sentence: str) -> None:
        super().__init__(reason, sentence)
        self.index = index


class Scorer:
    """An exported reward model with its template and tokenizer."""

    def __init__(self, folder: str | Path) -> None:
        """Raises a Fault unless the folder is a complete export."""
        self._folder = folder = Path(folder)
        self._model = load_exported(folder)
        size = self._model.get_input_embeddings().num_embeddings
        self._encoder = Encoder(folder, Template.load(folder / TEMPLATE), size)
        self.temperature: float = recorded(folder / REWARD)["temperature"]
        self._openings, self._endings = Openings(self._encoder), Endings(self._encoder)

    def candidates(self, record: Any) -> Candidates:
        """The prompt and answers of a record.

        Special tokens at the end of `answer` and `answers` are removed, because a policy's answers
        may end in them; those of a pair stay as in training. Raises BadRecord.
        """
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if isinstance(prompt, str) and is_encoded(prompt):
            raise BadRecord(
                "wrong_type", "'prompt' is the JSON text of messages, expected a text or messages"
            )
        match record:
            case {"answer": answer}:
                record = record | {"answer": self.without_ending(answer)}
            case {"answers": [*answers]}:
                record = record | {"answers": [*map(self.without_ending, answers)]}
        return candidates(record)

    def render(self, asked: Candidates) -> list[str]:
        """A prompt's text with each answer. Raises BadRecord if the template cannot render it."""
        return [self._encoder.render(asked.prompt, answer) for answer in asked.answers]

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, as in training.

        Raises Misfit for the first text that has no ids, more than max_length, or one that the
        model lacks.
        """
        most = self._encoder.template.max_length
        for index, text in enumerate(texts):  # because tokenizing takes hundreds of bytes per token
            if len(text) > self._encoder.longest:
                sentence = f"the text has {len(text)} characters, too many for {most} tokens"
                raise Misfit(index, "over_length", sentence)
        found = self._encoder.encode(texts)
        for index, ids in enumerate(found):
            if not ids:
                raise Misfit(index, "empty", "the text has no tokens")
            if len(ids) > most:
                sentence = f"the text has {len(ids)} tokens, expected at most {most}"
                raise Misfit(index, "over_length", sentence)
            if unknown := self._encoder.unknown(ids):
                raise Misfit(index, "unknown_id", f"the text has {unknown}")
        return found

    def encode_rendered(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of whole texts, with or without the tokenizer's special tokens around them.

        Each text gets the template's ending, however it ends. Raises Misfit for the first text that
        the template cannot have rendered or that `encode` rejects.
        """
        whole = []
        for index, text in enumerate(texts):
            try:
                begun = self._openings.complete(self._encoder.bare(text))
                whole.append(self._endings.complete(begun))
            except BadRecord as error:
                raise Misfit(index, error.reason, str(error)) from None
        return self.encode(whole)

    def encode_pairs(
        self, prompts: Sequence[Any], answers: Sequence[Any], tools: Sequence[Any] | None = None
    ) -> tuple[list[Ids], list[Messages]]:
        """The ids of each prompt with its answer, and the prompts as messages.

        Prompts, answers and the tools of each pair are as in `candidates`. But a prompt that a text
        repeats stays, because a policy should get the reward of what it wrote. Raises Misfit for
        the first pair that cannot be scored.
        """
        texts, asked = [], []
        pairs = zip(prompts, answers, tools or [None] * len(prompts), strict=True)
        for index, (prompt, answer, given) in enumerate(pairs):
            try:
                spoken = isinstance(answer, str)
                whole = [{"role": "assistant", "content": answer}] if spoken else answer
                found = self.candidates({"prompt": prompt, "answer": whole, TOOLS: given})
                texts += self.render(found)
            except BadRecord as error:
                raise Misfit(index, error.reason, str(error)) from None
            asked.append(found.prompt)
        return self.encode(texts), asked

    def problem_with_prompt(self, prompt: Any, tools: Any) -> BadRecord | None:
        """Why a prompt, a text or messages, cannot be rendered even with PLAIN, if so."""
        try:
            self.render(self.candidates({"prompt": prompt, "answer": PLAIN, TOOLS: tools}))
        except BadRecord as error:
            return error
        return None

    def without_ending(self, answer: Any) -> Any:
        """An answer, a text or a list of messages, without the special tokens at its end."""
        match answer:
            case str():
                return self._endings.without(answer)
            case [*others, {"content": str(content)} as last]:
                return [*others, last | {"content": self._endings.without(content)}]
        return answer

    def rewards(self, texts: Sequence[Ids], prompts: Sequence[Hashable]) -> list[float]:
        """The reward of each text; the common prefix of texts with equal prompts is computed once.

        Shapes [texts]. Equal texts of a prompt are scored once, so that rounding cannot make their
        rewards differ. Raises a Fault if rewards are not finite.
        """
        groups: dict[Hashable, dict[tuple[int, ...], list[int]]] = {}
        for place, (prompt, ids) in enumerate(zip(prompts, texts, strict=True)):
            groups.setdefault(prompt, {}).setdefault(tuple(ids), []).append(place)
        parts = [texts_of(list(group)) for group in groups.values()]
        scored = score(self._model, parts, TOKENS_PER_PACK).tolist()
        if broken := sum(not math.isfinite(reward) for reward in scored):
            raise Fault(
                f"{self._folder}: the rewards of {broken} of {len(scored)} texts are not finite; "
                "train and export with quantization.compute_dtype float32"
            )
        found = [0.0] * len(texts)
        distinct = (places for group in groups.values() for places in group.values())
        for places, reward in zip(distinct, scored, strict=True):
            for place in places:
                found[place] = reward
        return found


def ranks(rewards: Sequence[float]) -> list[int]:
    """The rank of each reward, 1 for the highest; equal rewards share the better rank.

    [0.5, 2.0, 0.5] gives [2, 1, 2].
    """
    from scipy.stats import rankdata

    found: list[int] = rankdata(-np.asarray(rewards), method="min").astype(int).tolist()
    return found


def probabilities(rewards: Sequence[float], temperature: float) -> list[float]:
    """For each answer, the probability that it is the best for its prompt.

    This is the softmax of rewards / temperature: the first choice in the Plackett-Luce model, and
    with two answers the Bradley-Terry model. [log 3, 0] gives [0.75, 0.25] at temperature 1.
    """
    from scipy.special import softmax

    found: list[float] = softmax(np.asarray(rewards, np.float32) / temperature).tolist()
    return found


def reward_function(
    folder: str | Path, *, strict: bool = False
) -> Callable[..., list[float | None]]:
    """An exported reward model as a function for TRL's `reward_funcs`.

    Prompts and completions are texts or lists of messages, which the model's own template renders,
    as well as the dataset's column `tools`. A completion that cannot be scored gets the reward
    None, which TRL ignores, because a policy may write anything: an empty one, one that is too
    long, has a token that the model lacks, does not end in a message of the assistant or cannot be
    rendered. The first one causes a warning. With `strict`, it causes a Fault instead. The function
    always raises a Fault for a prompt that cannot be rendered with any answer. Its name, by which
    TRL names its curves, is the path of the folder.
    """
    scorer, warned = Scorer(folder), False

    def reward_model(
        prompts: list[Any], completions: list[Any], tools: list[Any] | None = None, **_: Any
    ) -> list[float | None]:
        nonlocal warned
        rewards: list[float | None] = [None] * len(prompts)
        kept: dict[int, tuple[Ids, Messages]] = {}
        pairs = zip(prompts, completions, tools or [None] * len(prompts), strict=True)
        for index, (prompt, completion, given) in enumerate(pairs):
            try:
                require_answer(scorer.without_ending(completion))
                [ids], [asked] = scorer.encode_pairs([prompt], [completion], [given])
                kept[index] = ids, asked
            except BadRecord as error:
                message = f"prompts[{index}] with its completion: {error}"
                if problem := scorer.problem_with_prompt(prompt, given):
                    raise Fault(f"prompts[{index}]: {problem}") from None
                if strict:
                    raise Fault(message) from None
                if not warned:
                    others = "its reward is None; there is no warning for later ones"
                    warnings.warn(f"{message}; {others}", stacklevel=2)
                    warned = True
        found = scorer.rewards(*zip(*kept.values(), strict=True)) if kept else []
        for index, reward in zip(kept, found, strict=True):
            rewards[index] = reward
        return rewards

    # Trackers refuse names with an absolute or a relative path.
    reward_model.__name__ = Path(folder).as_posix().lstrip("./") or "."
    return reward_model


def require_answer(completion: Any) -> None:
    """Raises BadRecord `no_answer` for a completion without text or tool calls of the assistant."""
    last = completion[-1] if isinstance(completion, list) and completion else completion
    if isinstance(last, dict) and last.get("role") != "assistant":
        role = as_written(last.get("role"))
        raise BadRecord("no_answer", f"the completion ends in a message with the role {role}")
    content = (last.get("content") or last.get("tool_calls")) if isinstance(last, dict) else last
    if not content or (isinstance(content, str) and not content.strip()):
        raise BadRecord("no_answer", "the completion is empty")
