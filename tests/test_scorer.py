"""Scoring with an exported model: rewards match a slow loop, whatever else is in the batch."""

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward.data.reading import read
from reward.data.records import BadRecord, candidates, check
from reward.data.tokens import Encoder, Template
from reward.exporting.exported import load_exported
from reward.model.base import head_of
from reward.model.packing import texts_of, tokens
from reward.model.scoring import as_in_transformers
from reward.outputs import read_json, write_json
from reward.process import Fault
from reward.serving import scorer as module
from reward.serving.endings import Endings
from reward.serving.scorer import Misfit, Scorer, probabilities, ranks, reward_function

EXPORT = Path("models/export")
USER, ASSISTANT = "user", "assistant"


@pytest.fixture
def here(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new working directory with links to the folders of `complete`, which are only read."""
    for name in ("data", "models", "reports"):
        (tmp_path / name).symlink_to(complete / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def scorer(complete: Path) -> Scorer:
    """The exported model, loaded once; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(complete)
        return Scorer(EXPORT)


@pytest.fixture
def export_with(scorer: Scorer, here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a copy of the export with another template and the same model."""

    def call(**changed: Any) -> Path:
        folder = here / "changed"
        shutil.copytree(EXPORT, folder, dirs_exist_ok=True)
        path = folder / "template.json"
        replace(Template.load(path), **changed).save(path)
        monkeypatch.setattr(module, "load_exported", lambda _: scorer._model)
        return folder

    return call


@pytest.fixture
def scorer_of(export_with: Callable[..., Path]) -> Callable[..., Scorer]:
    """Make a scorer whose model was trained with another template."""

    def call(name: str, append_eos: bool = False) -> Scorer:
        made = Template.of(name, append_eos, 2040, Path("models/base"))
        changed = {"template": made.template, "chat_template": made.chat_template}
        return Scorer(export_with(append_eos=append_eos, **changed))

    return call


@torch.no_grad()
def one_by_one(texts: list[str]) -> list[float]:
    """The reward of each text alone, from the tokenizer and layers of transformers."""
    model, tokenizer = load_exported(EXPORT), AutoTokenizer.from_pretrained(EXPORT)
    with as_in_transformers(model) as classifier:
        found = []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            hidden = classifier.base_model(input_ids=ids, use_cache=False).last_hidden_state
            found.append(head_of(classifier)(hidden[0, -1]).item())
    return found


def some_prompts(count: int) -> list[tuple[str, list[str]]]:
    """Prompts with one to six answers of various lengths, some equal, some empty."""
    draw = random.Random(3)
    words = ["the", "a", "good", "bad", "answer", "水", "开", "后", "kind,", "word.", "12", "no"]
    return [
        (
            " ".join(draw.choices(words, k=draw.randint(1, 40))),
            [
                " ".join(draw.choices(words, k=draw.choice((0, 1, 7, 50))))
                for _ in range(draw.randint(1, 6))
            ],
        )
        for _ in range(count)
    ]


# --- rewards ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_folder_may_be_a_text(scorer: Scorer) -> None:
    assert Scorer(str(EXPORT)).temperature == scorer.temperature


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("tokens_per_pack", [1, 60, 4096])
def test_rewards_match_each_text_alone(
    scorer: Scorer, tokens_per_pack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_PACK", tokens_per_pack)
    prompts = some_prompts(12)
    flat = [(prompt, answer) for prompt, answers in prompts for answer in answers]
    random.Random(0).shuffle(flat)
    found = scorer.rewards(*scorer.encode_pairs(*zip(*flat, strict=True)))
    expected = one_by_one([f"问:{prompt}\n\n答:{answer}" for prompt, answer in flat])
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) > 20


@pytest.mark.usefixtures("here")
def test_rewards_match_the_evaluation(scorer: Scorer) -> None:
    evaluated = {
        row["id"]: (row["reward_chosen"], row["reward_rejected"])
        for row in pyarrow.parquet.read_table("reports/evaluate/rewards.parquet").to_pylist()
    }
    seen = 0
    for _, record in read(Path("data/raw/pairs.json")):
        expected = evaluated.get(check(record).ids[0])
        if expected:
            texts = scorer.encode(scorer.render(candidates(record)))
            assert scorer.rewards(texts, [0, 0]) == pytest.approx(expected, abs=1e-5)
            seen += 1
    assert seen == len(evaluated) > 0


@pytest.mark.usefixtures("here")
def test_texts_of_a_prompt_need_not_share_a_prefix(scorer: Scorer) -> None:
    texts = ["one two", "three", "一", "three"]
    found = scorer.rewards(scorer.encode(texts), [0] * 4)
    assert found == pytest.approx(one_by_one(texts), abs=1e-5)


def test_equal_texts_of_a_prompt_have_equal_rewards(scorer: Scorer) -> None:
    answers = ["yes", "no", "yes", "yes, of course", "yes"]
    found = scorer.rewards(*scorer.encode_pairs(["hi"] * 5, answers))
    assert found[0] == found[2] == found[4]
    assert len(set(found)) == 3


def test_shared_prefix_is_computed_once() -> None:
    texts = texts_of([[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 7]])
    assert (texts.prefix, tokens(texts)) == (2, 2 + 2 + 3 + 1)


@pytest.mark.usefixtures("here")
def test_non_finite_reward_is_a_fault() -> None:
    scorer = Scorer(EXPORT)
    for name, weight in scorer._model.named_parameters():
        if "score" in name:
            weight.data.fill_(torch.inf)
    with pytest.raises(Fault, match=r"^models/export: the rewards of 2 of 2 texts are not finite"):
        scorer.rewards(scorer.encode(["a", "b"]), [0, 1])


def test_equal_rewards_share_the_better_rank() -> None:
    assert ranks([0.5, 2.0, 0.5, -1.0]) == [2, 1, 2, 4]
    assert ranks([]) == []


def test_probability_of_being_the_best_follows_bradley_terry() -> None:
    temperature, rewards = 2.0, [1.0, -0.5]
    first = 1 / (1 + math.exp(-(rewards[0] - rewards[1]) / temperature))
    assert probabilities(rewards, temperature) == pytest.approx([first, 1 - first])
    assert probabilities([math.log(3), 0.0, math.log(3)], 1.0) == pytest.approx(
        [3 / 7, 1 / 7, 3 / 7]
    )
    assert probabilities([-200.0, 200.0], 1.0) == [0, 1]
    assert probabilities([7.0], 1.0) == [1]


# --- texts -----------------------------------------------------------------------------------


def test_eos_is_appended_as_in_training(export_with: Callable[..., Path]) -> None:
    scorer = Scorer(export_with(append_eos=True))
    [plain] = Scorer(EXPORT).encode(["a b"])
    tokenizer = AutoTokenizer.from_pretrained(EXPORT)
    expected = [*plain, tokenizer.eos_token_id]
    assert scorer.encode(["a b", f"a b{tokenizer.eos_token}"]) == [expected, expected]


def test_conversations_go_through_the_chat_template(scorer_of: Callable[..., Scorer]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained("models/base")
    scorer = scorer_of("chat")
    prompt = [{"role": "system", "content": "be kind"}, {"role": USER, "content": "hi"}]
    answer = [{"role": ASSISTANT, "content": "hello"}]
    [ids], _ = scorer.encode_pairs([prompt], [answer])
    assert ids == tokenizer.apply_chat_template([*prompt, *answer])["input_ids"]


RECURSIVE = (
    "{% macro show(value) %}{% for item in value %}[{{ show(item) }}]{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ m.content }}"
    "{% if m.tool_calls %}{{ show(m.tool_calls[0].function.arguments.a) }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(("depth", "reason"), [(600, "chat_template"), (20_000, "not_text")])
def test_value_that_is_nested_too_deeply_is_a_bad_record(
    depth: int, reason: str, export_with: Callable[..., Path]
) -> None:
    """Too deeply for the template, or for JSON, which newer versions of Python allow much more."""
    scorer = Scorer(export_with(template="chat", chat_template=RECURSIVE))
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": value}}}
    answer = [{"role": ASSISTANT, "content": "", "tool_calls": [call]}]
    with pytest.raises(Misfit, match=r"has a value that is nested too deeply$") as found:
        scorer.encode_pairs(["hi"], [answer])
    assert found.value.reason == reason


def test_text_that_is_far_too_long_is_not_tokenized(
    export_with: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would take gigabytes for the longest text of a request."""
    scorer = Scorer(export_with(max_length=5))
    monkeypatch.setattr(Encoder, "encode", None)
    with pytest.raises(Misfit, match=r"has 1000000 characters, too many for 5 tokens$") as found:
        scorer.encode(["1", "1" * 10**6])
    assert (found.value.index, found.value.reason) == (1, "over_length")


def test_first_text_that_does_not_fit_is_named(export_with: Callable[..., Path]) -> None:
    scorer = Scorer(export_with(max_length=5))
    with pytest.raises(Misfit, match=r"^the text has 6 tokens, expected at most 5$") as found:
        scorer.encode(["1", "12345", "123456", "1234567"])
    assert (found.value.index, found.value.reason) == (2, "over_length")


@pytest.mark.usefixtures("here")
def test_text_with_an_id_that_the_model_lacks_is_named(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer of Gemma 3, for example, has one id more than the model."""
    embeddings = torch.nn.Embedding(300, 1)
    monkeypatch.setattr(scorer._model, "get_input_embeddings", lambda: embeddings)
    monkeypatch.setattr(module, "load_exported", lambda _: scorer._model)
    small = Scorer(EXPORT)
    [ids] = small.encode(["1"])
    assert max(ids) < 300
    with pytest.raises(Misfit, match=r"^the text has the token .* but the base has 300 ids$") as of:
        small.encode(["1", "Immunity"])
    assert (of.value.index, of.value.reason) == (1, "unknown_id")


def test_text_without_tokens_is_named(scorer: Scorer) -> None:
    with pytest.raises(Misfit, match=r"^the text has no tokens$") as found:
        scorer.encode(["1", ""])
    assert found.value.index == 1


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("zh", ""),
        ("chat", "<|im_end|>\n"),
        ("Q: {prompt}\nA: {answer}\nEnd\n", "\nEnd\n"),
        ("{prompt}[{answer} ]<|im_end|>", " ]<|im_end|>"),
    ],
)
def test_whole_text_has_the_ids_of_training_whatever_its_ending(
    name: str, tail: str, append_eos: bool, scorer_of: Callable[..., Scorer]
) -> None:
    scorer = scorer_of(name, append_eos)
    for answer in ("yes, of course", "好", "two\nlines", "- \n"):
        text = scorer.render(candidates({"prompt": "hi", "answer": answer}))[0]
        expected = scorer.encode([text])
        body = text.removesuffix(tail)
        endings = [tail, "", tail.rstrip(), "<|im_end|>", "<|im_end|>\n", "<|endoftext|>"]
        endings += [
            f"{tail}<|endoftext|>",
            f"{tail}<|endoftext|>\n<|endoftext|>",
            f"{tail}<|im_end|>",
        ]
        for ending in endings:
            assert scorer.encode_rendered([body + ending]) == expected, ending
        assert scorer.encode_pairs(["hi"], [f"{answer}<|im_end|>\n<|endoftext|>"])[0] == expected


def test_longest_special_token_at_the_end_counts() -> None:
    """Whatever the order of a set, which differs between processes."""
    tokens = {f"{'<' * count}s>" for count in range(1, 9)}
    encoder: Any = SimpleNamespace(
        special=tokens, eos="", render=lambda prompt, answer: f"{prompt[0][1]}: {answer[0][1]}"
    )
    assert Endings(encoder).without(f"yes{max(tokens, key=len)}") == "yes"


def test_chat_template_that_trims_answers_trims_them_in_whole_texts(
    export_with: Callable[..., Path],
) -> None:
    jinja = "{% for m in messages %}<|im_start|>{{ m.content | trim }} <|im_end|>\n{% endfor %}"
    chat = {"template": "chat", "chat_template": jinja}
    scorer = Scorer(export_with(**chat))
    expected = scorer.encode(["<|im_start|>hi <|im_end|>\n<|im_start|>yes <|im_end|>\n"])
    for text in ("yes", "yes \n", "yes\n<|im_end|>", "yes <|im_end|>\n"):
        assert (
            scorer.encode_rendered([f"<|im_start|>hi <|im_end|>\n<|im_start|>{text}"]) == expected
        )


@pytest.mark.parametrize(
    ("ending", "token"),
    [
        ("<|eot_id|>", "<|eot_id|>"),
        ("<｜end▁of▁sentence｜>\n", "<｜end▁of▁sentence｜>"),
        ("<turn|>\n", "<turn|>"),
        ("[|endofturn|]", "[|endofturn|]"),
        ("</s><|endoftext|>\n", "</s>"),
        ("</s><pad><pad>", "<pad>"),
        ("<s>", "<s>"),
        ("<eos>", "<eos>"),
        ("<seed:eos>", "<seed:eos>"),
        ("<EOS_TOKEN>", "<EOS_TOKEN>"),
        ("<end_of_turn>\n", "<end_of_turn>"),
        ("<start_of_turn>", "<start_of_turn>"),
        ("[EOS]", "[EOS]"),
        ("[/INST]", "[/INST]"),
    ],
)
def test_end_token_of_another_model_is_refused(scorer: Scorer, ending: str, token: str) -> None:
    with pytest.raises(Misfit) as found:
        scorer.encode_rendered(["问:hi\n\n答:yes", f"问:hi\n\n答:yes{ending}"])
    assert (found.value.index, found.value.reason) == (1, "ending")
    assert str(found.value) == (
        f"the text ends in {token!r}, expected no special token at the end, or one of the reward "
        "model's tokenizer that ends answers"
    )


@pytest.mark.parametrize(
    "ending",
    [
        *("</b>", "<br>", "</section>", "</strong>\n", "<|", "|>", "a | b>", "[1]", "[x|y]"),
        *("[|1;2;3|]", "<$|>", "[Pad]"),
    ],
)
def test_ordinary_text_that_looks_like_a_token_is_scored(scorer: Scorer, ending: str) -> None:
    text = f"问:hi\n\n答:yes{ending}"
    assert scorer.encode_rendered([text]) == scorer.encode([text])


def test_template_may_end_in_a_token_that_its_tokenizer_does_not_know(
    scorer_of: Callable[..., Scorer],
) -> None:
    scorer = scorer_of("{prompt}\n{answer}</s>")
    expected = scorer.encode(["hi\nyes</s>"])
    assert scorer.encode_rendered(["hi\nyes</s>"]) == expected
    assert scorer.encode_rendered(["hi\nyes"]) == expected


def test_token_that_starts_a_message_does_not_end_one(scorer_of: Callable[..., Scorer]) -> None:
    scorer = scorer_of("chat")
    [text] = scorer.render(candidates({"prompt": "hi", "answer": "yes"}))
    with pytest.raises(Misfit, match=r"^the text ends in '<\|im_start\|>', expected no special"):
        scorer.encode_rendered([f"{text}<|im_start|>\n"])
    empty = scorer_of("{prompt}<|im_start|>\n{answer}<|im_end|>")
    expected = empty.encode(["hi<|im_start|>\n<|im_end|>"])
    assert empty.encode_rendered(["hi<|im_start|>\n"]) == expected


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("none", ["", "  ", "<|im_end|>\n", " \n<|im_end|>"]),
        ("zh", ["", "  "]),
        ("chat", ["", "\n"]),
    ],
)
def test_whole_text_of_white_space_and_endings_is_empty(
    name: str, texts: list[str], append_eos: bool, scorer_of: Callable[..., Scorer]
) -> None:
    scorer = scorer_of(name, append_eos)
    for text in texts:
        with pytest.raises(Misfit, match=r"^the text is empty$") as found:
            scorer.encode_rendered([text])
        assert found.value.reason == "empty"


CHATML = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes"
SYSTEM = "<{system}>\n\n问:{prompt}\n\n答:{answer}"
SPACED = " {prompt}\n{answer}"


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("zh", CHATML, "'问:...\\n\\n答:...'"),
        ("zh", "hi yes", "'问:...\\n\\n答:...'"),
        ("zh", "问:hi yes", "'问:...\\n\\n答:...'"),
        ("问:{prompt}问:{answer}", "问:hi yes", "'问:...问:...'"),
        ("{prompt}\n{answer}", "hi yes", "'...\\n...'"),
        (SPACED, "hi\nyes", "' ...\\n...'"),
        (SYSTEM, "<s>\n\nhi\n\n答:yes", "'问:...\\n\\n答:...' or '<...>\\n\\n问:...\\n\\n答:...'"),
        ("chat", "问:hi\n\n答:yes", "'<|im_start|>...<|im_start|>assistant...'"),
        (
            "chat",
            "<|im_start|>user\nhi<|im_end|>\nyes",
            "'<|im_start|>...<|im_start|>assistant...'",
        ),
    ],
)
def test_whole_text_of_another_template_is_refused(
    name: str, text: str, shown: str, scorer_of: Callable[..., Scorer]
) -> None:
    scorer = scorer_of(name)
    [known] = scorer.render(candidates({"prompt": "hi", "answer": "yes"}))
    with pytest.raises(Misfit) as found:
        scorer.encode_rendered([known, text])
    assert (found.value.index, found.value.reason) == (1, "template")
    assert str(found.value) == (
        f"the text begins with {text[:40]!r}, expected one rendered with the reward model's own "
        f"template, such as {shown}"
    )


CALLING = {"type": "function", "function": {"name": "add", "arguments": {"a": "1"}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": USER, "content": "<|im_start|>hi"}],
    [{"role": "system", "content": "kind"}, {"role": USER, "content": "\n\n答:"}],
    [
        {"role": USER, "content": "1"},
        {"role": ASSISTANT, "content": "", "tool_calls": [CALLING]},
        {"role": "tool", "content": "2"},
    ],
    [
        {"role": USER, "content": "1"},
        {"role": ASSISTANT, "content": "2"},
        {"role": USER, "content": "3"},
    ],
]


@pytest.mark.parametrize("name", ["none", "{prompt}\n{answer}", SPACED, SYSTEM, "en", "chat"])
def test_rendered_text_is_never_refused(name: str, scorer_of: Callable[..., Scorer]) -> None:
    scorer, rendered = scorer_of(name), 0
    for prompt in CONVERSATIONS:
        for answer in ("yes", "", "a\nb"):
            with suppress(BadRecord):  # text templates have no field for some parts
                texts = scorer.render(candidates({"prompt": prompt, "answer": answer}))
                rendered += 1
                assert scorer.encode_rendered(texts) == scorer.encode(texts)
    assert rendered >= 3


def test_whole_text_gets_the_beginning_of_training_texts(
    scorer_of: Callable[..., Scorer], export_with: Callable[..., Path]
) -> None:
    """A decoder may leave a space in place of BOS, and clients leave BOS out."""
    plain = scorer_of("zh")
    assert plain.encode_rendered([" 问:hi\n\n答:yes"]) == plain.encode(["问:hi\n\n答:yes"])
    kept = scorer_of(SPACED)
    assert kept.encode_rendered([" \n\nyes"]) == kept.encode([" \n\nyes"])
    folder = export_with(
        template="chat",
        chat_template="{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}",
    )
    path = folder / "tokenizer_config.json"
    write_json(path, read_json(path) | {"bos_token": "<|endoftext|>"})
    chat = Scorer(folder)
    expected = chat.encode(["<|endoftext|>[hi][yes]"])
    for text in ("<|endoftext|>[hi][yes]", "[hi][yes]"):
        assert chat.encode_rendered([text]) == expected


# --- records ---------------------------------------------------------------------------------

U = {"role": USER, "content": "hi"}
A = {"role": ASSISTANT, "content": "yes"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "answer": "yes"},
        {"prompt": "hi", "answers": ["yes"]},
        {"prompt": [U], "answer": [A]},
        {"prompt": [U], "answers": [[A]]},
        {"prompt": "hi", "answers": [[U, A]]},
    ],
)
def test_prompt_and_answers_may_have_several_forms(record: Any) -> None:
    found = candidates(record)
    assert (found.prompt, found.answers) == (((USER, "hi"),), [((ASSISTANT, "yes"),)])


LONG = "Why is the sky blue, then?"


@pytest.mark.parametrize(
    ("record", "answers"),
    [
        ({"prompt": LONG, "answer": f"{LONG} Air."}, [" Air."]),
        ({"prompt": LONG, "answers": [f"{LONG} Air.", f"{LONG} No."]}, [" Air.", " No."]),
        ({"prompt": LONG, "answers": [f"{LONG} Air.", "No."]}, [f"{LONG} Air.", "No."]),
        (
            {"prompt": "Hello!", "answers": ["Hello! Hi.", "Hello! No."]},
            ["Hello! Hi.", "Hello! No."],
        ),
    ],
)
def test_prompt_that_all_answers_repeat_is_removed_as_from_pairs(
    record: Any, answers: list[str]
) -> None:
    assert candidates(record).answers == [((ASSISTANT, answer),) for answer in answers]


def test_answer_of_a_policy_keeps_the_prompt_that_it_repeats(scorer: Scorer) -> None:
    [found], _ = scorer.encode_pairs([LONG], [f"{LONG} Air.<|im_end|>"])
    assert [found] == scorer.encode([f"问:{LONG}\n\n答:{LONG} Air."])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "answer": "yes<|im_end|>\n<|endoftext|>"},
        {"prompt": "hi", "answers": ["yes<|endoftext|>"]},
        {"prompt": "hi", "answers": [[U, A | {"content": "yes<|im_end|>"}]]},
    ],
)
def test_end_tokens_of_a_policy_are_removed_from_answers(scorer: Scorer, record: Any) -> None:
    assert scorer.candidates(record).answers == [((ASSISTANT, "yes"),)]


def test_pairs_are_scored_as_they_were_trained(scorer: Scorer) -> None:
    pair = {"prompt": "hi", "chosen": "yes<|im_end|>", "rejected": "no"}
    assert scorer.candidates(pair) == candidates(pair)
    for wrong in (3, {"prompt": "hi", "answers": "yes<|im_end|>"}):
        with pytest.raises(BadRecord):
            scorer.candidates(wrong)


def test_prompt_that_is_the_json_of_messages_is_refused(scorer: Scorer) -> None:
    prompt = json.dumps([{"role": "user", "content": "hi"}])
    for record in ({"answer": "yes"}, {"answers": ["yes"]}, {"chosen": "yes", "rejected": "no"}):
        with pytest.raises(BadRecord, match="'prompt' is the JSON text of messages, expected"):
            scorer.candidates({"prompt": prompt} | record)
    for harmless in ('["hi"]', "[1, 2]", '{"role": "admin"}'):
        assert scorer.candidates({"prompt": harmless, "answer": prompt})


@pytest.mark.parametrize("empty", [None, "", " ", [], False, math.nan])
def test_columns_without_a_value_count_as_missing(empty: Any) -> None:
    context = dict.fromkeys(("system", "history", "input"), empty)
    nulls = dict.fromkeys(("answer", "answers", "chosen", "rejected"))
    for record in ({"answer": "yes"}, {"answers": ["yes"]}):
        found = candidates({"prompt": "hi"} | nulls | context | record)
        assert found == candidates({"prompt": "hi", "answer": "yes"})
    pair = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    assert candidates(nulls | pair) == candidates(pair)


def test_pair_gives_chosen_then_rejected() -> None:
    found = candidates({"prompt": "hi", "chosen": "yes", "rejected": "no"})
    assert [answer[0][1] for answer in found.answers] == ["yes", "no"]


@pytest.mark.parametrize(
    ("record", "reason", "sentence"),
    [
        (3, "wrong_type", "is a number, expected an object"),
        (
            {"prompt": "a"},
            "missing_key",
            "has the key prompt, expected 'answer', 'answers', or a pair",
        ),
        *(
            (
                {"prompt": "a", "answers": ["b"], name: value},
                "unread",
                f"{name!r} has a value, which is read only with 'chosen' and 'rejected'; expected "
                "it in the prompt",
            )
            for name, value in (
                ("system", "Be kind."),
                ("system_prompt", "Be kind."),
                ("chat_history", [["a", "b"]]),
                ("input", "more"),
            )
        ),
        ({"answer": "a"}, "missing_key", "'prompt' is missing, found the key answer"),
        (
            {"prompt": "a", "answer": "b", "answers": ["c"]},
            "several_kinds",
            "has the keys answer, answers, prompt, expected 'answer', 'answers', or a pair",
        ),
        (
            {"prompt": "a", "answer": "b", "chosen": "c", "rejected": "d"},
            "several_kinds",
            "has the keys answer, chosen, prompt, rejected, "
            "expected 'answer', 'answers', or a pair",
        ),
        ({"prompt": " ", "answer": "b"}, "empty", "'prompt' is empty"),
        ({"prompt": "a", "answers": []}, "empty", "'answers' is an empty list"),
        (
            {"prompt": "a", "answers": "b"},
            "wrong_type",
            "'answers' is a string, expected a list of answers",
        ),
        (
            {"prompt": "a", "answers": ["b", 4]},
            "wrong_type",
            "'answers[1]' is a number, expected a string or a list of messages",
        ),
        (
            {"prompt": "a", "answer": [U]},
            "empty",
            "'answer' has no assistant message after the prompt",
        ),
    ],
)
def test_bad_record_is_reported(record: Any, reason: str, sentence: str) -> None:
    with pytest.raises(BadRecord) as found:
        candidates(record)
    assert (found.value.reason, str(found.value)) == (reason, sentence)


def test_lone_surrogate_is_not_text() -> None:
    with pytest.raises(BadRecord, match="has a value that is not valid text"):
        candidates({"prompt": "a", "answer": "\ud800"})


TOOLS = [{"type": "function", "function": {"name": "add", "description": "of two numbers"}}]
CALLABLE = (
    "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}"
    "{% for m in messages %}[{{ m.content }}]{% endfor %}"
)


def test_tools_are_rendered_like_those_of_a_record(export_with: Callable[..., Path]) -> None:
    folder = export_with(template="chat", chat_template=CALLABLE)
    scorer = Scorer(folder)
    records = [{"prompt": "hi", "answer": "yes", "tools": tools} for tools in (TOOLS, None, TOOLS)]
    texts = [text for record in records for text in scorer.render(scorer.candidates(record))]
    assert texts == ["<add>[hi][yes]", "[hi][yes]", "<add>[hi][yes]"]
    found, asked = scorer.encode_pairs(["hi"] * 3, ["yes"] * 3, [TOOLS, None, TOOLS])
    assert found == scorer.encode(texts)
    assert asked[0] == asked[2] != asked[1]
    given = {"tools": [TOOLS, None, TOOLS], "completion_ids": [[1]] * 3}
    rewards = reward_function(folder)(["hi"] * 3, ["yes"] * 3, **given)
    assert rewards == scorer.rewards(found, asked)


# --- TRL -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_tools_that_the_template_cannot_render_are_a_fault() -> None:
    message = r"^prompts\[0\]: has tools, but only preprocess.template chat can render such a"
    with pytest.raises(Fault, match=message):
        reward_function(EXPORT)(["hi"], ["yes"], tools=[TOOLS])


@pytest.mark.usefixtures("here")
def test_reward_function_takes_texts_and_messages() -> None:
    reward = reward_function(EXPORT)
    texts = reward(["hi", "hi", "you"], ["yes", "1", "no<|im_end|>"], completion_ids=[[1], [2]])
    messages = reward(
        [[{"role": USER, "content": prompt}] for prompt in ("hi", "hi", "you")],
        [[{"role": ASSISTANT, "content": answer}] for answer in ("yes", "1", "no<|im_end|>\n")],
    )
    expected = one_by_one(["问:hi\n\n答:yes", "问:hi\n\n答:1", "问:you\n\n答:no"])
    assert texts == messages == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("completion", ["c", "", "1" * 3000, [{"role": ASSISTANT}]])
def test_prompt_that_cannot_be_rendered_is_a_fault_whatever_the_completion(completion: Any) -> None:
    with pytest.raises(Fault, match=r"^prompts\[1\]: 'prompt' is empty$"):
        reward_function(EXPORT)(["a", ""], ["b", completion])


TOOL = {"role": "tool", "content": "4"}


@pytest.mark.usefixtures("here")
def test_completions_that_cannot_be_scored_have_no_reward_and_one_warning() -> None:
    reward, lenient = reward_function(EXPORT, strict=True), reward_function(EXPORT)
    cases: list[tuple[Any, str]] = [
        ("1" * 3000, "the text has 3008 tokens, expected at most 2040"),
        (" ", "the completion is empty"),
        ("<|im_end|>", "the completion is empty"),
        ([], "the completion is empty"),
        ([{"role": ASSISTANT, "content": None}], "the completion is empty"),
        ([A, TOOL], "the completion ends in a message with the role 'tool'"),
    ]
    bad = [completion for completion, _ in cases]
    once = (
        r"^prompts\[1\] with its completion: the text has 3008 tokens, expected at most 2040; "
        "its reward is None; there is no warning for later ones$"
    )
    with pytest.warns(UserWarning, match=once) as warned:
        found = lenient(["hi"] * (len(bad) + 2), ["yes", *bad, "no"])
    assert len(warned) == 1
    assert lenient(["hi"], [""]) == [None]
    assert found[1:-1] == [None] * len(bad)
    assert [found[0], found[-1]] == reward(["hi", "hi"], ["yes", "no"])
    for completion, sentence in cases:
        message = re.escape(f"prompts[0] with its completion: {sentence}")
        with pytest.raises(Fault, match=f"^{message}$"):
            reward(["hi"], [completion])


# Like Qwen3's, it takes the reasoning out of an answer, and everything before it.
SPLITTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}"
    "<think>{{ m.content.split('</think>')[0].split('<think>')[-1] }}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
)


def test_completion_that_cannot_be_rendered_does_not_end_the_training(
    export_with: Callable[..., Path],
) -> None:
    folder = export_with(template="chat", chat_template=SPLITTING)
    lenient, strict = reward_function(folder), reward_function(folder, strict=True)
    left_out = "the chat template leaves out content of message 2 (assistant)"
    cases: list[tuple[Any, str]] = [
        ("Sure. <think>let me see</think> yes", f"{left_out}: 'Sure.'"),
        ("a</think>b</think>c", f"{left_out}: 'b'"),
        ([A | {"audio": "x"}], "a message of 'answer' has 'audio', which is not supported"),
    ]
    bad = [completion for completion, _ in cases]
    with pytest.warns(UserWarning, match=r"^prompts\[0\] .*'Sure\.'; its reward is None"):
        found = lenient(["hi"] * 4, [*bad, "<think>so</think>yes"])
    assert found[:3] == [None] * 3
    assert [found[3]] == strict(["hi"], ["<think>so</think>yes"])
    for completion, sentence in cases:
        message = re.escape(f"prompts[0] with its completion: {sentence}")
        with pytest.raises(Fault, match=f"^{message}$"):
            strict(["hi"], [completion])
    with pytest.raises(Fault, match=r"^prompts\[0\]: .* content of message 1 \(user\): 'b'$"):
        lenient(["a</think>b</think>c"], ["yes"])


@pytest.mark.usefixtures("here")
@pytest.mark.filterwarnings("ignore")  # TRL's own warnings
@pytest.mark.parametrize("conversational", [False, True])
def test_grpo_step_uses_the_rewards_of_the_export(conversational: bool) -> None:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    seen: list[tuple[str, str, float | None]] = []
    reward = reward_function(EXPORT)

    def watched(prompts: list[Any], completions: list[Any], **others: Any) -> list[float | None]:
        found = reward(prompts, completions, **others)
        contents = [
            [side if isinstance(side, str) else side[-1]["content"] for side in sides]
            for sides in (prompts, completions)
        ]
        seen.extend(zip(*contents, found, strict=True))
        return found

    functions: list[Any] = [watched, reward]
    questions = ["hi", "Why?"]
    prompts = [[{"role": USER, "content": text}] for text in questions]
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained("models/base"),
        reward_funcs=functions,
        args=GRPOConfig(
            output_dir="grpo",
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts if conversational else questions}),
        processing_class=AutoTokenizer.from_pretrained("models/base"),
    )
    trainer.train()
    expected = one_by_one([f"问:{prompt}\n\n答:{answer}" for prompt, answer, _ in seen])
    assert len(seen) == 4
    assert [found for *_, found in seen] == pytest.approx(expected, abs=1e-5)
    logged = trainer.state.log_history[0]
    assert logged["rewards/models/export/mean"] == pytest.approx(sum(expected) / 4, abs=1e-5)


@pytest.mark.usefixtures("project")
def test_temperature_is_that_of_the_export(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("models/export/reward.json")
    write_json(path, read_json(path) | {"temperature": 2.5})
    monkeypatch.setattr(module, "load_exported", lambda _: scorer._model)
    assert Scorer("models/export").temperature == 2.5


def test_added_token_that_is_not_special_stays(tiny_base: Path, tmp_path: Path) -> None:
    """For example </tool_call> of Qwen2.5, with which an answer may end."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_tokens(["</tool_call>"])
    tokenizer.save(str(base / "tokenizer.json"))
    endings = Endings(Encoder(base, Template.of("chat", False, 99, base)))
    assert endings.without("f()</tool_call><|im_end|>\n") == "f()</tool_call>"
