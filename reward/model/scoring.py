"""Rewards of packs within the available memory, and the check that packs are exact."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from reward.model import attention, group
from reward.model.base import device, head_of
from reward.model.layers import forget_waiting
from reward.model.memory import TooLarge, within_memory
from reward.model.packing import Pack, Texts, into_packs, pack, split_to_fit, to_device, tokens
from reward.model.swapping import swapped_out
from reward.process import Fault

# How far hidden states in a pack may differ from those of single texts, relative to their norm.
EXACT, EXACT_IN_HALF = 1e-3, 0.05


def rewards(model: PeftModel, batch: Pack) -> Tensor:
    """The reward of every text, prompt by prompt: fp32, [texts]."""
    return head_of(model.get_base_model())(last_hidden(model, batch).float())[:, 0]


def last_hidden(model: PeftModel, batch: Pack) -> Tensor:
    """The base's output at the last token of every text, prompt by prompt: [texts, hidden size]."""
    plan = attention.Plan(batch.layout, device())
    ids, positions, order = (
        to_device(each, device()) for each in (batch.input_ids, batch.position_ids, batch.order)
    )
    base: Any = cast(PreTrainedModel, model.get_base_model()).base_model
    try:
        hidden = base(
            input_ids=ids, position_ids=positions, plan=plan, use_cache=False, return_dict=True
        ).last_hidden_state[0]
    except BaseException:  # such as running out of memory
        forget_waiting(model)
        raise
    # LastLayer returns only the last token of each text, but some models keep their own layer.
    if len(hidden) != len(order):
        hidden = hidden[plan.ends]
    return cast(Tensor, hidden[order])


@torch.no_grad()
def score(model: PeftModel, prompts: Sequence[Texts], tokens_per_pack: int) -> Tensor:
    """The reward of every text, prompt by prompt, on the CPU: fp32, [texts].

    Prompts of similar length share a pack. A prompt's texts are split if they do not fit into one
    pack, and packs are halved if memory runs out. Several processes share the packs, and all of
    them get all rewards. Raises TooLarge if memory runs out for a single text.
    """
    found = torch.zeros(sum(len(texts.ids) for texts in prompts))
    # The texts that have no reward yet, by prompt, with the index of the first text in `found`.
    waiting: list[tuple[int, Texts]] = []
    start = 0
    for texts in prompts:
        waiting.append((start, texts))
        start += len(texts.ids)
    with (
        evaluating(model),
        tqdm(
            total=len(found), desc="scoring", unit=" texts", delay=2, leave=None, disable=None
        ) as bar,
    ):
        while waiting:
            waiting = in_parts(waiting, tokens_per_pack)
            lengths = [tokens(texts) for _, texts in waiting]
            packs = into_packs(lengths, tokens_per_pack)
            held = [[waiting[place] for place in places] for places in packs]
            done = score_packs(model, held, found, bar)
            if done < len(held):
                tokens_per_pack = halved([texts for _, texts in held[done]], 1, "scoring")
            waiting = [*chain.from_iterable(held[done:])]
    return group.summed(found)


def score_packs(
    model: PeftModel, packs: Sequence[Sequence[tuple[int, Texts]]], found: Tensor, bar: "tqdm[Any]"
) -> int:
    """Write the rewards of packs to their indices in `found`; each process computes some packs.

    Returns the number of packs before the first one for which memory ran out in any process.
    """
    for first in range(0, len(packs), group.size()):
        number, scored = first + group.rank(), None
        if number < len(packs):
            scored = within_memory(rewards, model, pack([texts for _, texts in packs[number]]))
        failed = group.minimum(number if number < len(packs) and scored is None else len(packs))
        if scored is not None and number < failed:
            parts = scored.cpu().split([len(texts.ids) for _, texts in packs[number]])
            for (start, _), part in zip(packs[number], parts, strict=True):
                found[start : start + len(part)] = part
        if failed < len(packs):
            return failed
        finished = chain.from_iterable(packs[first : first + group.size()])
        bar.update(sum(len(texts.ids) for _, texts in finished))
    return len(packs)


def in_parts(waiting: Sequence[tuple[int, Texts]], limit: int) -> list[tuple[int, Texts]]:
    """The texts of each prompt in parts of at most `limit` tokens, the longest part first."""
    parts = []
    for start, texts in waiting:
        for part in split_to_fit(texts, limit):
            parts.append((start, part))
            start += len(part.ids)
    return sorted(parts, key=lambda each: tokens(each[1]), reverse=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode while the context lasts."""
    training = model.training
    if training:  # otherwise there is nothing to do, and it takes longer than to score a short text
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def halved(held: Sequence[Texts], least: int, place: str) -> int:
    """Half the size, in tokens, of a pack of these texts that did not fit in memory.

    Raises TooLarge, which begins with `place`, if the pack has only the `least` texts that must
    stay together.
    """
    size, count = sum(map(tokens, held)), sum(len(texts.ids) for texts in held)
    if count <= least:
        raise TooLarge(
            f"{place}: out of memory for {'a text' if count == 1 else 'a pair'} of {size} tokens; "
            "lower preprocess.max_length or, in training, set train.gradient_checkpointing"
        )
    return size // 2


@contextmanager
def as_in_transformers(model: PeftModel) -> Iterator[PreTrainedModel]:
    """The classifier with the original attention and layers of transformers and PEFT."""
    classifier = cast(PreTrainedModel, model.get_base_model())
    classifier.set_attn_implementation("sdpa" if classifier._supports_sdpa else "eager")
    try:
        with swapped_out(classifier):
            yield classifier
    finally:
        classifier.set_attn_implementation(attention.NAME)


@torch.no_grad()
def require_exact(model: PeftModel, prompts: Sequence[Texts]) -> None:
    """Raises a Fault unless texts in a pack get the same hidden states as from transformers.

    `prompts` is a full pack with the longest prompt first and the shortest last. The longest shows
    whether attention is anything other than plain and causal, with or without a window. The
    shortest shows whether a long text influences the others in its row.

    Adapters are off, as before the first step. In half precision, trained adapters amplify rounding
    differences. With a real model the differences exceeded what is allowed, but evaluation must not
    reject what training accepted.

    If memory runs out, half as many of the prompts are checked.
    """
    with evaluating(model), model.disable_adapter():
        while (hidden := within_memory(last_hidden, model, pack(prompts))) is None:
            halved(prompts if len(prompts) > 2 else prompts[:1], 2, "the check of packs")
            prompts = [*prompts[: len(prompts) // 2], prompts[-1]]
        found = hidden.float()
        judged = {0: found[: len(prompts[0].ids)], -1: found[-len(prompts[-1].ids) :]}
        for place, hidden in judged.items():
            require_alone(model, prompts[place], hidden, found_in=sum(map(tokens, prompts)))


def require_alone(model: PeftModel, texts: Texts, found: Tensor, found_in: int) -> None:
    """Raises a Fault unless `found` are the hidden states of the texts in rows of their own."""
    with as_in_transformers(model) as classifier:
        expected = torch.cat(
            [
                classifier.base_model(
                    input_ids=torch.tensor(np.asarray(ids)[None], device=device()),
                    use_cache=False,
                    return_dict=True,
                ).last_hidden_state[:, -1]
                for ids in texts.ids
            ]
        ).float()
    difference = ((found - expected).norm() / expected.norm()).item()
    allowed = EXACT if classifier.dtype == torch.float32 else EXACT_IN_HALF
    if difference > allowed:
        raise Fault(
            f"{type(classifier).__name__}: the hidden states of a pair of {tokens(texts)} tokens "
            f"in a pack of {found_in} differ by {difference:.2g} from those of its texts alone, "
            f"expected at most {allowed}; choose a decoder with plain causal attention"
        )
