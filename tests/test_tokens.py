"""Text to ids: the article's ids, templates, the end of a text, truncation of prompts."""

import copy
import dataclasses
import datetime
import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from reward.data import tokens
from reward.data.prefixes import prefix_length
from reward.data.records import BadRecord, Messages, check
from reward.data.templates import DIRECTIVES, WINDOW, dated, require_whole
from reward.data.tokens import TOKENIZER_CONFIG, Encoder, Template
from reward.exporting import portable
from reward.outputs import read_json, write_json
from reward.process import Fault

Encoders = Callable[..., Encoder]

PROMPTS = [
    "怎么煮鸡蛋？",
    "Why is the sky blue?\n",
    "  spaces  ",
    "emoji 😀👩‍👩‍👧 é e\u0301",
    "a<|im_end|>b",
]
ANSWERS = [
    "冷水下锅，八分钟。",
    "Because of scattering.",
    "\n\n答:",
    "😀",
    "end<|endoftext|>",
    "x  ",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def whole_encoder(tiny_base: Path) -> Encoder:
    return Encoder(tiny_base, Template.of("chat", False, 2040, tiny_base))


@pytest.fixture
def encoder(tiny_base: Path) -> Encoders:
    def build(name: str, append_eos: bool = False, max_length: int = 2040) -> Encoder:
        return Encoder(tiny_base, Template.of(name, append_eos, max_length, tiny_base))

    return build


def user(text: str) -> Messages:
    return (("user", text),)


def assistant(text: str) -> Messages:
    return (("assistant", text),)


def ids(encoder: Encoder, prompt: str, answer: str) -> list[int]:
    return encoder.encode([encoder.render(user(prompt), assistant(answer))])[0]


# --- templates -------------------------------------------------------------------------------


def test_ids_match_the_code_of_the_article(encoder: Encoders, tokenizer: Any) -> None:
    ours = encoder("zh")
    for prompt in PROMPTS:
        for answer in ANSWERS:
            article = tokenizer("问:" + prompt + "\n\n答:" + answer, truncation=True)["input_ids"]
            assert ids(ours, prompt, answer) == article


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("zh", "问:Hi?\n\n答:Yes {prompt}"),
        ("en", "Question: Hi?\n\nAnswer: Yes {prompt}"),
        ("none", "Hi?Yes {prompt}"),
        ("<{prompt}|{x}|{answer}>", "<Hi?|{x}|Yes {prompt}>"),
    ],
)
def test_template_is_filled_with_prompt_and_answer(
    encoder: Encoders, tokenizer: Any, name: str, text: str
) -> None:
    assert encoder(name).render(user("Hi?"), assistant("Yes {prompt}")) == text
    assert ids(encoder(name), "Hi?", "Yes {prompt}") == tokenizer(text)["input_ids"]


def test_chat_matches_the_chat_template_of_the_tokenizer(encoder: Encoders, tokenizer: Any) -> None:
    prompt = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "你好？"))
    ours = encoder("chat")
    messages = [{"role": role, "content": text} for role, text in (*prompt, *assistant("😀"))]
    text = ours.render(prompt, assistant("😀"))
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert ours.encode([text])[0] == tokenizer.apply_chat_template(messages)["input_ids"]


def test_chat_template_gets_every_special_token_that_is_set(
    tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    base = shutil.copytree(tiny_base, tmp_path / "base")
    text = "{% for m in messages %}{{ m.content }}{{ sep_token }}{{ cls_token }}{% endfor %}"
    text += "{{ 'eos' if eos_token is defined }}{{ 'mask' if mask_token is defined }}"
    text = text.replace("cls_token", "image_token")
    change = {"sep_token": "<|im_end|>", "image_token": "<|im_start|>", "chat_template": text}
    write_json(base / TOKENIZER_CONFIG, read_json(base / TOKENIZER_CONFIG) | change)
    messages = [{"role": role, "content": text} for role, text in (*user("Hi"), *assistant("Yes"))]
    expected = AutoTokenizer.from_pretrained(base).apply_chat_template(messages, tokenize=False)
    found = Encoder(base, Template.of("chat", False, 99, base)).render(user("Hi"), assistant("Yes"))
    assert found == expected
    assert found.endswith("Yes<|im_end|><|im_start|>eos")


def test_text_that_begins_with_bos_is_refused_if_it_would_get_a_second_one(
    tiny_base: Path, tmp_path: Path
) -> None:
    base, bos = shutil.copytree(tiny_base, tmp_path / "base"), "<|endoftext|>"
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    number: Any = tokenizer.token_to_id(bos)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, number)]
    )
    tokenizer.save(str(base / "tokenizer.json"))
    ours = Encoder(base, Template.of("none", False, 99, base))
    assert ids(ours, "Why?", "Yes").count(number) == 1
    with pytest.raises(
        BadRecord, match=r"^begins with '<\|endoftext\|>', which the tokenizer adds"
    ):
        ids(ours, f"{bos}Why?", "Yes")
    assert ids(Encoder(tiny_base, Template.of("none", False, 99, tiny_base)), f"{bos}Why?", "Yes")


@pytest.mark.parametrize(
    "name",
    ["german", "{prompt}", "{answer}", "{answer}{prompt}", "{prompt}{prompt}{answer}",
     "{prompt}{answer}{answer}", "{system}{prompt}{answer}", "{system} {prompt}\n{answer}",
     "{prompt}\n{system}\n{answer}", "{system}\n{system}\n{prompt}{answer}",
     "{system}\n{prompt}{answer}{prompt}"],
)  # fmt: skip
def test_template_without_its_fields_is_a_fault(tiny_base: Path, name: str) -> None:
    with pytest.raises(Fault, match=r"preprocess.template is '.*must be one of zh, en, none, chat"):
        Template.of(name, False, 10, tiny_base)


def test_double_braces_around_a_field_are_a_fault(tiny_base: Path, encoder: Encoders) -> None:
    for name in ("{{prompt}} {{answer}}", "{{system}}\n{prompt}{answer}"):
        with pytest.raises(Fault, match=r"with double braces .*; write \{prompt\} and \{answer\}$"):
            Template.of(name, False, 10, tiny_base)
    ours = encoder('{"ask": {{"text": "{prompt}"}}, "reply": {{answer} }}')
    found = ours.render(user("Hi"), assistant("Yes"))
    assert found == '{"ask": {{"text": "Hi"}}, "reply": {Yes }}'


@pytest.mark.parametrize(
    ("name", "with_system", "without"),
    [
        ("{system}\n{prompt}|{answer}", "Be {prompt}.\nHi|Yes", "Hi|Yes"),
        (
            "S: {system} .\n\n\nQ: {prompt}|{answer}",
            "S: Be {prompt}. .\n\n\nQ: Hi|Yes",
            "Q: Hi|Yes",
        ),
        (
            "# S\n{system}\n\n# Q\n{prompt}|{answer}",
            "# S\nBe {prompt}.\n\n# Q\nHi|Yes",
            "# Q\nHi|Yes",
        ),
    ],
)
def test_line_of_the_system_message_is_dropped_without_one(
    encoder: Encoders, name: str, with_system: str, without: str
) -> None:
    ours = encoder(name)
    system = (("system", "Be {prompt}."),)
    assert ours.render((*system, *user("Hi")), assistant("Yes")) == with_system
    assert ours.render(user("Hi"), assistant("Yes")) == without
    for prompt in ((*system, *system, *user("Hi")), (*user("Hi"), *system), system):
        with pytest.raises(BadRecord, match=r"but only preprocess\.template chat can") as caught:
            ours.render(prompt, assistant("Yes"))
        assert caught.value.reason == "needs_chat"


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ((("system", "Be kind."), *user("Hi")), "a system message, but only preprocess.template"),
        ((*user("Hi"), *assistant("Ho"), *user("Ha")), "several turns, but only preprocess"),
        (assistant("Ho"), "no user message, but only preprocess"),
    ],
)
def test_record_that_needs_the_chat_template_is_refused(
    encoder: Encoders, prompt: Messages, found: str
) -> None:
    with pytest.raises(BadRecord, match=f"^has {found}") as caught:
        encoder("zh").render(prompt, assistant("Hello"))
    assert caught.value.reason == "needs_chat"


LOOK = {"type": "function", "function": {"name": "look", "arguments": {"at": "ü"}}}
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
REPLY: dict[str, Any] = {"role": "assistant", "content": "Yes"}


@pytest.mark.parametrize(
    ("reason", "record"),
    [
        ("tool_calls", {"rejected": [REPLY | {"tool_calls": [LOOK]}]}),
        ("tool_calls", {"rejected": [{"role": "assistant", "tool_calls": [LOOK]}]}),
        ("reasoning_content", {"rejected": [REPLY | {"reasoning_content": "so"}]}),
        ("name", {"rejected": [REPLY | {"name": "Ann"}]}),
        ("tool_call_id", {"rejected": [REPLY | {"tool_call_id": "7"}]}),
        ("tools", {"tools": [SCHEMA], "rejected": "No"}),
    ],
)
def test_part_without_a_field_in_the_template_is_refused_by_name(
    encoder: Encoders, reason: str, record: dict[str, Any]
) -> None:
    chosen = "Yes" if record["rejected"] == "No" else [REPLY]
    pair = check({"prompt": "Hi?", "chosen": chosen} | record)
    with pytest.raises(BadRecord, match=f"has {reason}, but only preprocess.template chat") as e:
        encoder("zh").render(pair.prompt, pair.answers[1])
    assert e.value.reason == reason


CALLS = (
    "{%- if tools %}{{ tools | tojson }}{% endif -%}"
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.name %}{{ m.name + ': ' }}{% endif -%}"
    "{%- if m.thinking %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif -%}"
    "{{ m.content or '' }}"
    "{%- for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
)


def test_chat_template_gets_complete_parts_and_tools(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = changed_base(tiny_base, tmp_path, chat_template=CALLS)
    encoder = Encoder(base, Template.of("chat", False, 10, base))
    turns: list[Any] = [
        {"role": "user", "content": "Hi?", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [LOOK], "reasoning_content": "so"},
        {"role": "tool", "content": "{1}", "name": "look", "tool_call_id": "7"},
    ]
    pair = check({"prompt": turns, "tools": [SCHEMA], "chosen": "Yes", "rejected": "No"})
    text = AutoTokenizer.from_pretrained(base).apply_chat_template(
        [*turns, REPLY], tools=[SCHEMA], tokenize=False
    )
    assert encoder.render(pair.prompt, pair.answers[0]) == text
    assert '{"name": "look", "arguments": {"at": "ü"}}' in text
    assert "Ann: Hi?" in text
    assert "<think>so</think>" in text


TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
LOSSY = {
    "cuts thoughts": (
        "{%- for m in messages -%}"
        "{{ m.role + '\n' + (m.content.split('</think>')[-1] if m.role == 'assistant'"
        " else m.content) }}{%- endfor -%}"
    ),
    "no system": "{%- for m in messages if m.role != 'system' -%}" + TURN + "{%- endfor -%}",
    "no tools": CALLS.partition("{% endif -%}")[2],
    "no parts": "{%- for m in messages -%}" + TURN + "{%- endfor -%}",
    "last two": "{%- for m in messages[-2:] -%}" + TURN + "{%- endfor -%}",
    "another order": "{%- for m in messages | reverse -%}" + TURN + "{%- endfor -%}",
}


@pytest.mark.parametrize(
    ("name", "lost", "record"),
    [
        ("cuts thoughts", "content of message 2 (assistant): 'so 3'",
         {"rejected": "<think>\nso 3\n</think>\n\n3"}),
        ("cuts thoughts", "content of message 2 (assistant): 'so 3'",
         {"prompt": [{"role": "user", "content": "A"}, REPLY | {"content": "<think>so 3</think>"},
                     {"role": "user", "content": "Ho?"}]}),
        ("no system", "content of message 1 (system): 'Be kind.'",
         {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "A"}]}),
        ("no parts", "reasoning_content of message 2 (assistant): 'so 3'",
         {"rejected": [REPLY | {"reasoning_content": "so 3"}]}),
        ("no parts", "tool_calls of message 2 (assistant): 'look'",
         {"rejected": [REPLY | {"tool_calls": [LOOK]}]}),
        ("no parts", "name of message 1 (user): 'Ann'",
         {"prompt": [{"role": "user", "content": "Hi?", "name": "Ann"}]}),
        ("no parts", "name of the tools: 'look'", {"tools": [SCHEMA]}),
        ("no tools", "the tools",
         {"tools": [SCHEMA], "rejected": [REPLY | {"tool_calls": [LOOK]}]}),
        ("last two", f"content of message 1 (user): '{'Hi? ' * 10}'...",
         {"prompt": [{"role": "user", "content": "Hi? " * 11}, REPLY,
                     {"role": "user", "content": "Ho?"}]}),
        ("another order", "content of message 2 (assistant): 'Bad'", {}),
    ],
)  # fmt: skip
def test_text_left_out_by_the_chat_template_is_a_bad_record(
    tiny_base: Path, tmp_path: Path, name: str, lost: str, record: dict[str, Any]
) -> None:
    base = changed_base(tiny_base, tmp_path, chat_template=LOSSY[name])
    encoder = Encoder(base, Template.of("chat", False, 10, base))
    record = {"prompt": "Hi?", "rejected": [REPLY | {"content": "Bad"}]} | record
    if isinstance(record["rejected"], str):
        record["rejected"] = [REPLY | {"content": record["rejected"]}]
    pair = check({"chosen": [REPLY | {"content": "Good"}]} | record)
    with pytest.raises(BadRecord) as caught:
        encoder.render(pair.prompt, pair.answers[1])
    assert str(caught.value) == f"the chat template leaves out {lost}"
    assert caught.value.reason == "not_rendered"


REWRITES = (
    "{%- if tools %}{{ tools | tojson }}{% endif -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'tool' -%}{{ {'output': m.content} | tojson }}{%- else -%}"
    "{{ m.role + ':' + m.content.split('</think>')[-1] | trim }}{%- endif -%}"
    "{%- if '</think>' in m.content -%}{{ m.content.split('</think>')[0] + '\n</think>' }}"
    "{%- endif -%}"
    "{%- for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}"
    "{{ call.function.name }}{% endfor -%}{%- endfor -%}"
)


def test_chat_template_may_trim_escape_and_reformat(tiny_base: Path, tmp_path: Path) -> None:
    base = changed_base(tiny_base, tmp_path, chat_template=REWRITES)
    encoder = Encoder(base, Template.of("chat", False, 10, base))
    arguments = '{"at": "a \\"b\\" \\u00fc", "n": 3, "deep": [{"x": "\\\\"}, null]}'
    call = {"function": {"name": "look", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "  Hi?\n"},
        {"role": "assistant", "content": " I see.", "tool_calls": [call]},
        {"role": "tool", "content": 'a "b"\n', "name": "look", "tool_call_id": "7"},
    ]
    pair = check({"prompt": turns, "tools": [SCHEMA], "chosen": "Yes", "rejected": "No"})
    assert 'a \\"b\\"' in encoder.render(pair.prompt, pair.answers[0])
    call["function"]["arguments"] = json.loads(arguments)
    pair = check({"prompt": turns, "chosen": "Yes", "rejected": "No"})
    assert encoder.render(pair.prompt, pair.answers[0])


@pytest.mark.parametrize(
    "rendered",
    [
        str,
        lambda call: str(dict(reversed(call.items()))),
        lambda call: json.dumps(json.dumps(call["arguments"])) + call["name"],
        lambda call: json.dumps(call, separators=(",", ":")),
    ],
    ids=["name first", "name last", "JSON in JSON", "compact"],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_calls_and_tools_are_searched_for_in_order(
    rendered: Callable[[dict[str, Any]], str], as_text: bool
) -> None:
    """The whole text must not be read once for each of thousands of calls."""

    class Text(str):
        read = 0

        def find(self, words: str, start: Any = 0, end: Any = None, /) -> int:
            place = super().find(words, start, end)
            Text.read += (min(len(self), end or len(self)) if place < 0 else place) - start
            return place

    functions: list[dict[str, Any]] = [
        {"name": f"look{n}", "arguments": {"at": f'place "{n}"', "unit": "m"}} for n in range(1000)
    ]
    tools = {"tools": [{"function": each} for each in functions]}
    text = Text(json.dumps(tools) + "user: hi" + "".join(map(rendered, functions)))
    if as_text:
        functions = [each | {"arguments": json.dumps(each["arguments"])} for each in functions]
    parts = {"tool_calls": [{"function": each} for each in functions]}
    require_whole(text, (("tools", "", json.dumps(tools)), ("user", "hi")))
    require_whole(text, (("user", "user: hi"), ("assistant", "", json.dumps(parts))))
    assert Text.read < 10 * WINDOW * len(functions)


@pytest.mark.parametrize("count", [50, 50_000])
def test_values_of_a_call_may_be_in_any_order_if_they_are_few(count: int) -> None:
    values = [f"value-{index:06}" for index in range(count)]
    call = {"function": {"name": "look", "arguments": {"at": values}}}
    messages = (("user", "hi"), ("assistant", "", json.dumps({"tool_calls": [call]})))
    require_whole("hi " + json.dumps(call), messages)
    text = "hi look " + " ".join(values[::-1])
    with pytest.raises(BadRecord, match="too many values") if count > 50 else nullcontext():
        require_whole(text, messages)


def test_long_lists_of_texts_are_tokenized_in_parts(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(tiny_base, Template.of("en", False, 10, tiny_base))
    texts = ["a" * length for length in (3, 0, 7, 12, 1, 1, 9)]
    expected, taken = encoder.encode(texts), []
    encodings = Encoder._encodings

    def watched(self: Encoder, some: Sequence[str]) -> Any:
        taken.append([len(text) for text in some])
        return encodings(self, some)

    monkeypatch.setattr(tokens, "CHARACTERS", 10)
    monkeypatch.setattr(Encoder, "_encodings", watched)
    assert encoder.encode(texts) == expected
    assert taken == [[3, 0, 7], [12], [1, 1], [9]]


def test_chat_template_may_fail_without_tools(tiny_base: Path, tmp_path: Path) -> None:
    template = CALLS.replace("{% endif -%}", "{% else %}{{ raise_exception('no') }}{% endif -%}", 1)
    base = changed_base(tiny_base, tmp_path, chat_template=template)
    encoder = Encoder(base, Template.of("chat", False, 10, base))
    pair = check({"prompt": "Hi?", "tools": [SCHEMA], "chosen": "Yes", "rejected": "No"})
    assert '"look"' in encoder.render(pair.prompt, pair.answers[0])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 'a' * 10**18 }}", "the chat template fails: not enough memory"),
        ('{{ "\\ud83d\\ude00" }}', "the chat template fails: .* surrogates not allowed"),
    ],
)
def test_error_in_a_chat_template_is_a_bad_record(
    tiny_base: Path, tmp_path: Path, template: str, message: str
) -> None:
    base = changed_base(tiny_base, tmp_path, chat_template=template)
    encoder = Encoder(base, Template.of("chat", False, 10, base))
    with pytest.raises(BadRecord, match=message) as caught:
        encoder.render(user("Hi"), assistant("Hello"))
    assert caught.value.reason == "chat_template"


def changed_base(base: Path, folder: Path, **config: Any) -> Path:
    """A copy of the tokenizer of `base` with changes to its configuration."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_conversation_refused_by_the_chat_template_is_a_bad_record(
    tiny_base: Path, tmp_path: Path
) -> None:
    base = changed_base(tiny_base, tmp_path, chat_template="{{ raise_exception('no system') }}")
    encoder = Encoder(base, Template.of("chat", False, 10, base))
    with pytest.raises(BadRecord, match="no system") as caught:
        encoder.render(user("Hi"), assistant("Hello"))
    assert caught.value.reason == "chat_template"


# Valid templates that are too much for the compiler.
HARD = {
    "blocks": "{% for each in messages %}" * 25 + "{% endfor %}" * 25,
    "indentation": "{% if messages %}" * 120 + "{% endif %}" * 120,
    "parentheses": "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "filters": "{{ messages[0].content" + " | trim" * 1000 + " }}",
    "number": "{{ 10 ** 5000 }}",
}


def chat_from(path: Path, base: Path) -> Template:
    return Template.of("chat", False, 10, base, path)


def test_chat_template_may_be_supplied_for_a_base_without_one(
    tiny_base: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """As a Jinja file or in another tokenizer's configuration; both are stored as text."""
    base = changed_base(tiny_base, tmp_path, chat_template=None)
    supplied = tmp_path / "supplied.jinja"
    supplied.write_text(tokenizer.chat_template, encoding="utf-8")
    own = Template.of("chat", False, 10, tiny_base)
    assert chat_from(supplied, base).chat_template == tokenizer.chat_template
    assert chat_from(tiny_base / "tokenizer_config.json", base).chat_template == own.chat_template
    chat_from(supplied, base).save(tmp_path / "template.json")
    supplied.unlink()
    encoder = Encoder(base, Template.load(tmp_path / "template.json"))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert encoder.render(user("Hi"), assistant("Yes")) == text
    exported = tmp_path / "exported"
    exported.mkdir()
    portable.prepare_tokenizer(base, encoder.template, 4096).save(exported)
    there = type(tokenizer).from_pretrained(exported)
    assert there.apply_chat_template(turns, tokenize=False) == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jinja", None, "none.jinja cannot be read .*, expected a Jinja file"),
        ("odd.jinja", b"\xff", "odd.jinja cannot be read .*, expected a Jinja file"),
        ("odd.json", b"[]", "odd.json cannot be read .*, expected a Jinja file"),
        ("empty.jinja", b" \n", "empty.jinja has no chat template, which preprocess.template chat"),
        ("empty.json", b"{}", "empty.json has no chat template, which preprocess.template chat"),
        ("bad.jinja", b"a\n{% if %}", "bad.jinja: line 2 is broken: Expected an expression"),
        *(
            (f"{name}.jinja", text.encode(), f"{name}.jinja cannot be compiled .* simpler template")
            for name, text in HARD.items()
        ),
    ],
)
def test_unusable_chat_template_is_reported(
    tiny_base: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Fault, match=f"params.yaml: preprocess.chat_template .*{message}"):
        chat_from(tmp_path / name, tiny_base)
    assert Template.of("zh", False, 10, tiny_base, tmp_path / name).chat_template is None


def test_tokenizer_with_a_pattern_that_takes_too_long_is_a_fault(
    tiny_base: Path, tmp_path: Path
) -> None:
    base = changed_base(tiny_base, tmp_path)
    content = read_json(base / "tokenizer.json")
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$b"}, "behavior": "Isolated"}
    content["pre_tokenizer"] = pattern | {"invert": False}
    write_json(base / "tokenizer.json", content)
    encoder = Encoder(base, Template.of("none", False, 10, base))
    message = f"{re.escape(str(base))}/tokenizer.json: the tokenizer cannot split a text .*limit"
    with pytest.raises(Fault, match=message):
        encoder.encode(["a" * 40 + "c"])
    with pytest.raises(TypeError):
        encoder.encode([1])  # type: ignore[list-item]


def test_base_without_what_the_template_needs_is_a_fault(tiny_base: Path, tmp_path: Path) -> None:
    base = changed_base(tiny_base, tmp_path, chat_template=None, eos_token=None)
    with pytest.raises(Fault, match="no chat template"):
        Encoder(base, Template.of("chat", False, 10, base))
    with pytest.raises(Fault, match="no eos"):
        Encoder(base, Template.of("zh", True, 10, base))
    (base / "tokenizer.json").unlink()
    with pytest.raises(Fault, match=r"tokenizer.json does not exist, expected"):
        Template.of("zh", False, 10, base)


def test_template_of_another_tokenizer_is_refused(tiny_base: Path) -> None:
    template = Template.of("zh", False, 10, tiny_base)
    with pytest.raises(Fault, match="not the one that the template was made for"):
        Encoder(tiny_base, dataclasses.replace(template, tokenizer="0" * 64))


def test_template_is_read_as_it_was_written(tiny_base: Path, tmp_path: Path) -> None:
    template = Template.of("问{prompt}\n{answer}", True, 10, tiny_base)
    template.save(tmp_path / "template.json")
    assert Template.load(tmp_path / "template.json") == template


def test_template_of_another_version_is_reported(tmp_path: Path) -> None:
    (tmp_path / "template.json").write_text('{"template": "zh", "append_eos": true}')
    with pytest.raises(Fault, match=r"template.json has the keys append_eos, template, expected"):
        Template.load(tmp_path / "template.json")


# --- no words are lost -----------------------------------------------------------------------

NAME = st.integers(100, 999).map("f{}".format)
ODD = st.sampled_from(["怎么", "\n", '"x"', "\\", "<think>", "</think>"])
TEXTS = st.lists(st.integers(100, 999).map("w{}.".format) | ODD, min_size=1, max_size=5).map(
    " ".join
)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


CALL = st.builds(
    lambda name, at, as_text: {
        "type": "function",
        "function": {"name": name, "arguments": as_json({"at": at}) if as_text else {"at": at}},
    },
    NAME,
    TEXTS,
    st.booleans(),
)
ANY_MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": TEXTS | st.just(""),
    },
    optional={
        "tool_calls": st.lists(CALL, max_size=2),
        "reasoning_content": TEXTS,
        "name": NAME,
        "tool_call_id": NAME,
    },
)
ANY_ANSWER = ANY_MESSAGE.map(lambda message: [message | {"role": "assistant"}])
ANY_RECORD = st.fixed_dictionaries(
    {
        "prompt": TEXTS | st.lists(ANY_MESSAGE, min_size=1, max_size=3),
        "chosen": ANY_ANSWER,
        "rejected": ANY_ANSWER,
    },
    optional={"tools": st.lists(NAME.map(lambda name: {"name": name, "parameters": {}}))},
)
PLAIN_RECORD = st.fixed_dictionaries(dict.fromkeys(["prompt", "chosen", "rejected"], TEXTS))
CHATS = {"calls": CALLS, "rewrites": REWRITES, "cuts thoughts": LOSSY["cuts thoughts"]}


def words_of(value: Any) -> list[str]:
    """The words in all texts of a record, including JSON texts, in any order."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, str):
        return re.findall(r"\w+|[^\w\s]", re.sub("</?think>", " ", value))
    if isinstance(value, dict):
        value = [item for key, item in value.items() if key not in ("role", "tool_call_id", "type")]
    return [word for item in value for word in words_of(item)] if isinstance(value, list) else []


@pytest.fixture(scope="module")
def any_encoder(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Encoder]:
    @cache
    def build(name: str) -> Encoder:
        folder = tmp_path_factory.mktemp("any")
        base = changed_base(tiny_base, folder, chat_template=CHATS.get(name))
        return Encoder(base, Template.of("chat" if name in CHATS else name, False, 2040, base))

    return build


@pytest.mark.parametrize("name", ["zh", "en", "none", "<{prompt}|{answer}>", *CHATS])
def test_text_of_a_kept_record_contains_all_its_words(
    any_encoder: Callable[[str], Encoder], name: str
) -> None:
    encoder = any_encoder(name)
    kept = 0

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(ANY_RECORD | PLAIN_RECORD)
    def holds(record: dict[str, Any]) -> None:
        nonlocal kept
        try:
            pair = check(record)
            texts = [
                encoder.render(pair.prompt, side) for side in (pair.answers[0], pair.answers[1])
            ]
        except BadRecord:
            return
        kept += 1
        for side, text in zip(("chosen", "rejected"), texts, strict=True):
            parts = [record["prompt"], record[side], record.get("tools", [])]
            # A template may write a text as JSON, and JSON as a text.
            plain = text.replace("\\", "")
            missing = [w for w in words_of(parts) if w not in (plain if w != "\\" else text)]
            assert not missing

    holds()
    assert kept > 30


# --- the date --------------------------------------------------------------------------------

# As in Llama 3.2, in two other ways, and as in Llama 3.1, which does not ask for the date.
TODAY = {
    "25 Dec 2031": (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}"
        "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
        "{{- 'Today: ' + date_string + '\n' }}"
    ),
    "Thursday, 25. 12. 31": "Today: {{ strftime_now(format='%A, %d. %m. %y') + '\n' }}",
    "2031-12-25 00:00": (
        "\nToday: {% macro now() %}{{ strftime_now('%Y-%m-%d %H:%M') }}{% endmacro %}"
        "{% for m in messages[:1] %}{{ now() + '\n' }}{% endfor %}"
    ),
    "1 Jan 2026": "Today: {% set date_string = '1 Jan 2026' %}{{ date_string + '\n' }}",
}


@pytest.fixture(params=TODAY)
def moved_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The date that the template must print; the clock shows another day."""
    from transformers.utils import chat_template_utils

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Later":
            return super().now(tz).replace(year=2099)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    return str(request.param)


@pytest.mark.parametrize("append_eos", [False, True])
def test_date_is_that_of_preprocess_even_in_the_export(
    tiny_base: Path, tmp_path: Path, moved_clock: str, append_eos: bool
) -> None:
    from transformers import AutoTokenizer

    text = TODAY[moved_clock] + "{%- for m in messages -%}" + TURN + "{%- endfor -%}"
    base = changed_base(tiny_base, tmp_path, chat_template=text)
    Template.of("chat", append_eos, 99, base, date="2031-12-25").save(tmp_path / "template.json")
    template = Template.load(tmp_path / "template.json")
    rendered = Encoder(base, template).render(user("Hi?"), assistant("Yes"))
    assert f"Today: {moved_clock}\n<|im_start|>user\nHi?" in rendered
    assert rendered.startswith("\n") == text.startswith("\n")
    (tmp_path / "exported").mkdir()
    prepared = portable.prepare_tokenizer(base, template, 4096)
    prepared.save(tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes"}]
    eos = exported.eos_token if append_eos else ""
    assert exported.apply_chat_template(chat, tokenize=False) == rendered + eos
    there = Encoder(tmp_path / "exported", prepared.template)
    assert there.render(user("Hi?"), assistant("Yes")) == rendered


def test_date_that_is_not_fixed_is_a_fault(tiny_base: Path, tmp_path: Path) -> None:
    base = changed_base(tiny_base, tmp_path, chat_template="{{ strftime_now('%Y') }}")
    with pytest.raises(Fault, match="prints today's date"):
        Template.of("chat", False, 10, base)


@pytest.mark.parametrize("day", ["2026-01-01", "2031-12-25", "2028-02-29"])
def test_date_is_formatted_like_strftime(day: str) -> None:
    at = datetime.datetime.fromisoformat(day)
    for code in [
        *(f"%{letter}" for letter in DIRECTIVES),
        "%d/%m/%Y",
        "%A %B%j",
        "%-d.%-m.",
        "100%",
    ]:
        text = dated("{{ strftime_now(" + json.dumps(code) + ") }}", day)
        assert Environment(autoescape=False).from_string(text).render() == at.strftime(code)


# --- the end of a text -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zh", "chat"])
def test_eos_is_appended_once(encoder: Encoders, tokenizer: Any, name: str) -> None:
    for answer in ("Yes", "Yes<|endoftext|>"):
        plain = ids(encoder(name), "Hi?", answer)
        ended = plain[-1] == tokenizer.eos_token_id
        assert ids(encoder(name, append_eos=True), "Hi?", answer) == (
            plain if ended else [*plain, tokenizer.eos_token_id]
        )


# --- truncation ------------------------------------------------------------------------------


def random_words(count: int, seed: int) -> str:
    words = ["sky", "blue", "怎么", "😀", "\n", "Why?", "煮鸡蛋", "x1"]
    # The digit is a separate id, which never merges with the head of a template.
    return "1 " + " ".join(random.Random(seed).choices(words, k=count))


@pytest.mark.parametrize("append_eos", [False, True])
def test_prompt_is_truncated_on_the_left_equally_for_both_answers(
    encoder: Encoders, tokenizer: Any, append_eos: bool
) -> None:
    ours = encoder("en", append_eos, max_length=40)
    head = tokenizer("Question: ")["input_ids"]
    prompt, answers = user(random_words(60, 0)), [assistant("a good answer"), assistant("bad")]
    whole = ours.encode([ours.render(prompt, answer) for answer in answers])
    cut = ours.encode_cut(prompt, answers)
    assert cut is not None
    longest, kept = max(map(len, whole)), max(map(len, cut))
    gone = longest - kept
    # With more ids, the rest of the prompt would begin within a character.
    assert kept <= 40
    for more in range(kept + 1, 41):
        assert tokenizer.decode(whole[0][len(head) + longest - more :]).startswith("�")
    for long, short in zip(whole, cut, strict=True):
        assert short == long[: len(head)] + long[len(head) + gone :]


@pytest.mark.parametrize("name", ["zh", "en", "none", "chat", "{prompt} => {answer}!"])
def test_truncation_keeps_head_and_answer_whole(
    encoder: Encoders, tokenizer: Any, name: str
) -> None:
    for seed in range(20):
        prompt = random_words(80, seed)
        ours = encoder(name, max_length=50)
        cut = ours.encode_cut(user(prompt), [assistant("yes !"), assistant("no, never")])
        assert cut is not None
        text = ours.render(user(prompt), assistant("no, never"))
        start = text.index(prompt)
        rest, left = tokenizer.decode(cut[1]), text[start + len(prompt) :]
        assert rest.startswith(text[:start])
        assert rest.endswith(left)
        assert prompt.endswith(rest[start : len(rest) - len(left)])


def test_truncation_keeps_characters_whole(encoder: Encoders, tokenizer: Any) -> None:
    prompt = "1 " + "鱻🦩" * 20
    for max_length in range(60, 72):
        ours = encoder("en", max_length=max_length)
        cut = ours.encode_cut(user(prompt), [assistant("yes"), assistant("no")])
        assert cut is not None
        assert max_length - 4 < max(map(len, cut)) <= max_length
        assert all("�" not in tokenizer.decode(ids) for ids in cut)


def test_id_that_contains_the_end_of_the_head_is_kept(encoder: Encoders, tokenizer: Any) -> None:
    cut = encoder("en", max_length=20).encode_cut(user("the " * 40), [assistant("a")] * 2)
    head = tokenizer("Question: the")["input_ids"]
    assert tokenizer.decode(head[-1]) == " the"
    assert cut is not None
    assert cut[0][: len(head)] == head


def test_truncated_chat_keeps_its_head_even_if_it_contains_words_of_the_prompt(
    encoder: Encoders, tokenizer: Any
) -> None:
    prompt = (("system", "e"), ("user", "e"), ("assistant", "so " * 40), ("user", "e " * 40))
    cut = encoder("chat", max_length=40).encode_cut(prompt, [assistant("good"), assistant("bad")])
    assert cut is not None
    for side, answer in zip(cut, ("good", "bad"), strict=True):
        text = tokenizer.decode(side)
        assert text.startswith("<|im_start|>system\ne<|im_end|>\n<|im_start|>user\n")
        assert text.endswith(f"e <|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n")


ROLE = st.sampled_from(["user", "assistant"])
WORDS = st.lists(
    st.sampled_from(["sky", "<|im_end|>", "怎么", "\n", "user"]), min_size=1, max_size=9
)
SOME = settings(max_examples=150, deadline=None, derandomize=True)


@SOME
@given(st.lists(st.tuples(ROLE, WORDS), min_size=1, max_size=6), st.booleans(), st.integers(20, 90))
def test_truncated_conversation_has_the_ids_of_its_last_turns(
    whole_encoder: Encoder, turns: list[tuple[str, list[str]]], system: bool, most: int
) -> None:
    """Turns are dropped from the front until the rest fits; a last turn that is too long is cut."""
    encoder = copy.copy(whole_encoder)
    encoder.template = dataclasses.replace(encoder.template, max_length=most)
    head: Messages = (("system", "Be kind."),) if system else ()
    rest: Messages = (*((role, " ".join(words)) for role, words in turns), ("user", "and so on"))
    answers = [assistant("good"), assistant("bad one")]
    found = encoder.encode_cut(head + rest, answers)
    for start in range(len(rest)):
        if start and rest[start][0] != "user":
            continue
        left = head + rest[start:]
        plain = encoder.encode([encoder.render(left, answer) for answer in answers])
        if max(map(len, plain)) <= most:
            assert found == plain
            return
    assert found == encoder.encode_cut(head + rest[-1:], answers)
    for side in found or []:
        assert encoder.decode(side).startswith("<|im_start|>system\nBe kind.<|im_end|>\n" * system)


def test_truncating_the_last_turn_keeps_its_later_messages(
    tiny_base: Path, tmp_path: Path, tokenizer: Any
) -> None:
    base = changed_base(tiny_base, tmp_path, chat_template=CALLS)
    encoder = Encoder(base, Template.of("chat", False, 150, base))
    call: Messages = (
        ("user", "so " * 190),
        ("assistant", "", json.dumps({"tool_calls": [LOOK], "content": None})),
        ("tool", "42"),
    )
    prompt = (("tools", "", json.dumps({"tools": [SCHEMA]})), *user("first"), *call)
    cut = encoder.encode_cut(prompt, [assistant("good"), assistant("bad")])
    assert cut is not None
    text = tokenizer.decode(cut[1])
    assert text.startswith(json.dumps([SCHEMA]) + "<|im_start|>user\n")
    rest = encoder.render((("tools", *prompt[0][1:]), *call), assistant("bad")).rpartition("so ")[2]
    assert text.endswith(f"so {rest}")
    assert "first" not in text
    assert max(map(len, cut)) == 150


def test_answer_too_long_by_itself_cannot_be_truncated(encoder: Encoders) -> None:
    for max_length in range(1, 60):
        ours = encoder("zh", max_length=max_length)
        prompt, answer = "why " * 20, "long " * 20
        cut = ours.encode_cut(user(prompt), [assistant(answer), assistant("short")])
        # Only the prompt may be truncated.
        least = len(ids(ours, prompt, answer)) - len(ids(ours, prompt, "")) + len(ids(ours, "", ""))
        assert (cut is None) == (max_length < least)


def test_text_within_the_maximum_is_not_truncated(encoder: Encoders) -> None:
    ours = encoder("zh")
    assert ours.encode_cut(user("Hi?"), [assistant("Yes")]) == [ids(ours, "Hi?", "Yes")]


# --- the shared prefix -----------------------------------------------------------------------


def slow_prefix(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    return length


def test_prefix_length_is_the_longest_common_prefix_without_the_last_id() -> None:
    generator = random.Random(0)
    for _ in range(500):
        left, right = (generator.choices((1, 2), k=generator.randrange(1, 7)) for _ in "jk")
        assert prefix_length(left, right) == slow_prefix(left, right)
    assert prefix_length([1, 2, 3], [1, 2, 3]) == 2
    assert prefix_length([1, 2], [1, 2, 3]) == 1
    assert prefix_length([1], [1, 2]) == 0


def test_truncation_keeps_the_token_before_every_text(tiny_base: Path, tmp_path: Path) -> None:
    base, bos = Path(shutil.copytree(tiny_base, tmp_path / "base")), "<|endoftext|>"
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    number = tokenizer.token_to_id(bos)
    assert number is not None
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, number)]
    )
    tokenizer.save(str(base / "tokenizer.json"))
    ours = Encoder(base, Template.of("none", False, 20, base))
    found = ours.encode_cut(user("so " * 40), [assistant("yes"), assistant("no")])
    assert found is not None
    assert [side[0] for side in found] == [number, number]
    assert max(map(len, found)) == 20


def test_no_id_of_an_answer_is_cut(encoder: Encoders) -> None:
    """An id may hold the end of the prompt and the beginning of an answer."""
    answers, cuts = ["e sky is the", "x the sky"], 0
    for most in range(1, 40):
        ours = encoder("none", max_length=most)
        found = ours.encode_cut(user("so " * 20 + "th"), [*map(assistant, answers)]) or []
        for side, answer in zip(found, answers, strict=False):
            cuts += 1
            assert ours.decode(side).endswith(answer)
    assert cuts
