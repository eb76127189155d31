"""The heavy clients of an exported reward model: TRL's trainers and sentence-transformers.

They get the same input as the light ones (`inputs.py`). Their libraries are imported when used.
"""

from collections.abc import Callable, Sequence
from contextlib import chdir
from typing import Any

import pyarrow as pa
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from reward.exporting.exported import MERGED
from reward.exporting.inputs import (
    BATCH,
    EOS,
    LEFT,
    RIGHT,
    SAMPLE,
    SINGLE,
    Client,
    Conversation,
    Exported,
    Form,
    Ids,
    Score,
    once,
    paired,
)
from reward.model.base import device, keep_weights_unpacked


def cross_encoder_merged(exported: Exported) -> Score:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(exported.folder / MERGED), device=str(device()))

    def rewards(form: Form) -> pa.Table:
        pairs = exported.select(exported.conversations, form)
        if not pairs:
            return paired([], [])
        model.tokenizer.padding_side = form.side
        texts = [(each.prompt, answer) for each in pairs.values() for answer in each.answers]

        def predicted(texts: Sequence[tuple[str, str]]) -> list[float]:
            found = model.predict(texts, batch_size=form.batch, show_progress_bar=False)
            return [*map(float, found)]

        return paired(list(pairs), once(texts, predicted))

    return rewards


def trl_reward_merged(exported: Exported) -> Score:
    """The rewards from which RewardTrainer.evaluate computes its figures."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    def dataset(pairs: dict[int, Ids]) -> Any:
        chosen, rejected = zip(*pairs.values(), strict=True)
        return Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected})

    def rewards(form: Form) -> pa.Table:
        pairs = exported.ids_of(form)
        if not pairs:
            return paired([], [])
        batches.clear()
        trainer.evaluate(dataset(pairs))
        # The first half of each of TRL's batches is the chosen texts, the second the rejected ones.
        halves = [(batch[: len(batch) // 2], batch[len(batch) // 2 :]) for batch in batches]
        both = [side for batch in halves for pair in zip(*batch, strict=True) for side in pair]
        return paired(list(pairs), both)

    config = RewardConfig(
        "trl",
        per_device_eval_batch_size=BATCH,
        max_length=None,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    model = str(exported.folder / MERGED)
    trainer = RewardTrainer(model, config, train_dataset=dataset(exported.ids))
    trainer.remove_callback(PrinterCallback)
    batches: list[list[float]] = []
    watch(trainer.model, batches.append)
    return rewards


def trl_grpo_adapter(exported: Exported) -> Score:
    """GRPO loads the folder by its path if it contains the base, or else gets a loaded model."""
    if not exported.has_base:
        return by_grpo(exported, exported.load_adapter())
    with chdir(exported.folder):
        return by_grpo(exported, ".")


def trl_grpo_merged(exported: Exported) -> Score:
    return by_grpo(exported, str(exported.folder / MERGED))


def by_grpo(exported: Exported, reward_model: str | PreTrainedModel) -> Score:
    """The rewards of one step of GRPOTrainer, with the answers of pairs in place of samples."""
    from datasets import Dataset
    from trl import GRPOTrainer

    pairs = sample_of_conversations(exported)
    if not pairs:
        return lambda form: paired([], [])
    rollouts = Rollouts(exported.tokenizer, pairs)
    trainer = GRPOTrainer(
        tiny_policy(exported.tokenizer),
        reward_model,
        args=one_step(len(pairs), exported.longest),
        train_dataset=Dataset.from_list(rollouts.prompts),
        processing_class=exported.tokenizer,
        reward_processing_classes=None if isinstance(reward_model, str) else exported.tokenizer,
        rollout_func=rollouts,
    )
    trainer.remove_callback(PrinterCallback)
    [judge] = trainer.reward_funcs
    keep_weights_unpacked(judge)
    watch(judge, rollouts.rewards.extend)

    def rewards(_: Form) -> pa.Table:
        trainer.train()
        return rollouts.found

    return rewards


class Rollouts:
    """Replaces sampling: the completions of a prompt are the pair's chosen and rejected answer.

    `found` holds the observed rewards, in the order in which the answers were given.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pairs: dict[int, Conversation]) -> None:
        self.tokenizer = tokenizer
        self.pairs = {each.prompt: (index, each) for index, each in pairs.items()}
        self.given: list[int] = []
        self.rewards: list[float] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        answers: list[str] = []
        for [message] in prompts[::2]:  # because GRPO repeats each prompt num_generations times
            index, pair = self.pairs[message["content"]]
            self.given.append(index)
            answers += pair.answers
        completions = self.tokenizer(answers, add_special_tokens=False)["input_ids"]
        return {
            "prompt_ids": self.tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, return_dict=False
            ),
            "completion_ids": completions,
            "logprobs": [[0.0] * len(ids) for ids in completions],
        }

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return [{"prompt": [{"role": "user", "content": prompt}]} for prompt in self.pairs]

    @property
    def found(self) -> pa.Table:
        return paired(self.given, self.rewards)


def sample_of_conversations(exported: Exported) -> dict[int, Conversation]:
    """At most SAMPLE pairs with different prompts, whose answers survive tokenizing and decoding.

    GRPO gives the reward model the decoded completion, not the ids.
    """
    tokenizer, prompts = exported.tokenizer, set()
    found: dict[int, Conversation] = {}
    for index, pair in exported.conversations.items():
        ids = tokenizer(list(pair.answers), add_special_tokens=False)["input_ids"]
        whole = tokenizer.batch_decode(ids, skip_special_tokens=True) == list(pair.answers)
        if whole and all(ids) and pair.prompt not in prompts:
            prompts.add(pair.prompt)
            found[index] = pair
        if len(found) == SAMPLE:
            break
    return found


def tiny_policy(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A random language model, as small as its vocabulary allows."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return Qwen2ForCausalLM(config)


def one_step(pairs: int, longest: int) -> Any:
    """The arguments of a single GRPO step over some pairs."""
    from trl import GRPOConfig

    return GRPOConfig(
        "trl",
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=pairs,
        num_generations=2,
        max_completion_length=longest,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def watch(model: Any, collect: Callable[[list[float]], Any]) -> None:
    """Pass the rewards of every batch that a classifier computes to `collect`."""
    model.register_forward_hook(
        lambda module, inputs, output: collect(output.logits[:, 0].tolist())
    )


HEAVY = (
    Client("cross_encoder_merged", cross_encoder_merged, (RIGHT, LEFT, SINGLE), merged=True),
    Client("trl_reward_merged", trl_reward_merged, (RIGHT, EOS), merged=True),
    Client("trl_grpo_adapter", trl_grpo_adapter, (RIGHT,), merged=False),
    Client("trl_grpo_merged", trl_grpo_merged, (RIGHT,), merged=True),
)
