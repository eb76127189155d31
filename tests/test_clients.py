"""Input for clients: pairs as ids, as texts and as conversations, and nothing else."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reward.data.records import Messages
from reward.data.rows import as_json
from reward.data.tokens import Encoder, Template
from reward.exporting import inputs
from reward.exporting.clients_trl import Rollouts, sample_of_conversations
from reward.exporting.exported import TEMPLATE
from reward.exporting.inputs import EOS, LEFT, RIGHT, Conversation, Exported, once, paired
from reward.exporting.portable import prepare_tokenizer
from reward.model.packing import Texts, tokens
from reward.outputs import write_json

PAIRS = [
    ("怎么煮鸡蛋？", "冷水下锅，水开后煮八分钟。", "不知道。"),
    ("How do I boil an egg?\n\n答: is no answer", "Eight minutes.", "Eight years, 答: or so"),
    ("one", "a", "b"),
]
Given = Callable[..., Exported]


@pytest.fixture
def given(tiny_base: Path, tmp_path: Path) -> Given:
    """A folder with an exported tokenizer, and pairs encoded with a template."""

    def make(name: str = "zh", pairs: list[Any] = PAIRS, append_eos: bool = False) -> Exported:
        template = Template.of(name, append_eos, 2040, tiny_base)
        template.save(tmp_path / TEMPLATE)
        encoder = Encoder(tiny_base, template)
        prepare_tokenizer(tiny_base, template, 4096).save(tmp_path)
        texts, messages = [], []
        for prompt, *answers in pairs:
            sides = [(("user", prompt),), *((("assistant", each),) for each in answers)]
            asked, chosen, rejected = map(as_json, sides)
            messages.append((asked, chosen, rejected))
            turns = [
                encoder.render((("user", prompt),), (("assistant", each),)) for each in answers
            ]
            texts.append(Texts(encoder.encode(turns), 0))
        return Exported(tmp_path, texts, [], messages, tiny_base, 4096, range(len(texts)))

    return make


def test_ids_are_sorted_by_length_and_keep_their_index(given: Given) -> None:
    found = given()
    lengths = [tokens(found.pairs[index]) for index in found.ids]
    assert lengths == sorted(lengths)
    assert all(ids == found.pairs[index].ids for index, ids in found.ids.items())
    assert found.longest == max(len(ids) for texts in found.pairs for ids in texts.ids)


@pytest.mark.parametrize("name", ["zh", "chat", "none", "Q: {prompt}\nA: {answer}\nEnd"])
@pytest.mark.parametrize("append_eos", [False, True])
def test_conversations_render_to_the_ids(given: Given, name: str, append_eos: bool) -> None:
    found = given(name, append_eos=append_eos)
    assert sorted(found.conversations) == [0, 1, 2]
    for index, pair in found.conversations.items():
        for answer, ids in zip(pair.answers, found.ids[index], strict=True):
            chat = [
                {"role": "user", "content": pair.prompt},
                {"role": "assistant", "content": answer},
            ]
            assert found.tokenizer.apply_chat_template(chat, return_dict=False) == ids


def test_conversations_have_prompt_and_answers_of_the_pair(given: Given) -> None:
    assert given().conversations[0] == Conversation(PAIRS[0][0], PAIRS[0][1:])


@pytest.mark.parametrize(("kind", "padded"), [("qwen2", 3), ("gpt2", 0)])
def test_no_pair_is_left_padded_for_a_model_that_counts_padding_as_positions(
    given: Given, kind: str, padded: int, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write_json(base / "config.json", {"model_type": kind})
    found = replace(given(), base=base)
    for pairs in (found.ids_of, found.texts_of):
        assert len(pairs(LEFT)) == padded
        assert len(pairs(RIGHT)) == 3


def test_pairs_whose_text_encodes_differently_are_left_out(given: Given) -> None:
    found = given()
    letters = [found.tokenizer.get_vocab()[letter] for letter in "egg"]
    found.pairs.append(Texts([letters, [*letters, 5]], 2))
    found.messages.append(found.messages[0])
    found = replace(found, compared=range(4))
    assert sorted(found.ids) == [0, 1, 2, 3]
    assert sorted(found.texts) == sorted(found.conversations) == [0, 1, 2]


@pytest.mark.parametrize(
    "prompt",
    [
        (("system", "s"), ("user", "a")),
        (("user", "a"), ("assistant", "b"), ("user", "c")),
    ],
)
def test_pairs_of_several_messages_are_texts_but_not_conversations(
    given: Given, tiny_base: Path, prompt: Messages
) -> None:
    found = given("chat")
    encoder = Encoder(tiny_base, Template.of("chat", False, 2040, tiny_base))
    answers = [(("assistant", each),) for each in "de"]
    found.pairs.append(Texts(encoder.encode([encoder.render(prompt, each) for each in answers]), 0))
    found.messages.append((as_json(prompt), as_json(answers[0]), as_json(answers[1])))
    found = replace(found, compared=range(4))
    assert 3 in found.texts
    assert 3 not in found.conversations


def test_sample_is_small_and_evenly_spread(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SAMPLE", 2)
    found = given()
    assert found.sample == [0, 2]
    eos = found.tokenizer.eos_token_id
    assert found.ended == {index: [[*ids, eos] for ids in found.ids[index]] for index in (0, 2)}
    assert [*found.ids_of(LEFT)] == [*found.texts_of(LEFT)] == [0, 2]
    assert found.ids_of(RIGHT) == found.ids
    ended = found.tokenizer(found.texts_of(EOS)[2], add_special_tokens=False)["input_ids"]
    assert ended == found.ids_of(EOS)[2] == found.ended[2]


def test_clients_get_only_the_compared_pairs(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replace(given(), compared=[0, 2])
    assert sorted(found.ids) == sorted(found.texts) == sorted(found.conversations) == [0, 2]
    assert found.sample == [0, 2]
    monkeypatch.setattr(inputs, "SAMPLE", 1)
    assert replace(found, compared=[1, 2]).sample == [1]


def test_tokenizer_without_eos_gives_no_texts_with_eos(given: Given) -> None:
    found = given()
    found.tokenizer.eos_token = None
    assert found.ended == found.ids_of(EOS) == {}
    assert found.texts_of(EOS) == {}


def test_texts_of_the_maximum_length_get_no_eos(given: Given, tmp_path: Path) -> None:
    """Such a text may have as many tokens as the base has positions."""
    found = given()
    longest = max(map(len, found.ids[0]))
    template = replace(Template.load(tmp_path / TEMPLATE), max_length=longest)
    template.save(tmp_path / TEMPLATE)
    shorter = [index for index, ids in found.ids.items() if max(map(len, ids)) < longest]
    assert 0 < len(shorter) < len(found.ids)
    for pairs in (found.ids_of, found.texts_of):
        assert sorted(pairs(EOS)) == sorted(shorter)


def test_rewards_are_paired_by_index() -> None:
    found = paired([7, 2], [0.0, 1.0, 2.0, 3.0])
    assert found.to_pydict() == {
        "pair": [7, 2],
        "reward_chosen": [0.0, 2.0],
        "reward_rejected": [1.0, 3.0],
    }


def test_rollouts_return_the_chosen_answer_then_the_rejected(given: Given) -> None:
    found = given()
    rollouts = Rollouts(found.tokenizer, sample_of_conversations(found))
    prompts = [each["prompt"] for each in rollouts.prompts]
    order = [prompts[1], prompts[1], prompts[0], prompts[0]]
    output = rollouts(order, None)
    pairs = list(sample_of_conversations(found).items())
    expected = [*pairs[1][1].answers, *pairs[0][1].answers]
    assert found.tokenizer.batch_decode(output["completion_ids"]) == expected
    rollouts.rewards += [1.0, 2.0, 3.0, 4.0]
    assert rollouts.found == paired([pairs[1][0], pairs[0][0]], [1.0, 2.0, 3.0, 4.0])


def test_step_uses_each_prompt_once(given: Given) -> None:
    found = given(pairs=[*PAIRS, (PAIRS[0][0], "Well.", "Ill."), ("q", "", "empty")])
    taken = sample_of_conversations(found)
    assert len(taken) == 3
    assert {pair.prompt for pair in taken.values()} >= {PAIRS[0][0], "one"}


def test_only_the_exported_folder_is_read(given: Given, tmp_path: Path) -> None:
    found = given()
    copy = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy"))
    elsewhere = replace(found, folder=copy)
    assert elsewhere.conversations == found.conversations


def test_text_of_several_pairs_is_scored_once() -> None:
    asked: list[list[str]] = []

    def length(texts: list[str], factor: float) -> list[float]:
        asked.append(texts)
        return [factor * len(text) for text in texts]

    assert once(["a", "bb", "a", "ccc", "bb"], length, 2.0) == [2, 4, 2, 6, 4]
    assert asked == [["a", "bb", "ccc"]]
