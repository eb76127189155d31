"""The exported tokenizer: its own pad token, and a chat template that renders training texts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from reward.data.records import BadRecord, candidates
from reward.data.tokens import TEMPLATES, Encoder, Template
from reward.exporting import portable
from reward.exporting.portable import PAD, Pad, find_pad, prepare_tokenizer
from reward.model import embedded
from reward.outputs import read_json, write_json
from reward.process import Fault

PLAIN = TEMPLATES["zh"]
TEXTS = [
    ("怎么煮鸡蛋？", "冷水下锅。"),
    ("What's 12 + 30?\n", '  42, "of course".\t{x} {{ y }} {% z %} \\n 👩‍👩‍👧'),
    ("", "answer alone"),
    ("prompt alone", ""),
]
SYSTEM = "<{system}>\n\n问:{prompt}\n\n答:{answer}"
Made = Callable[..., Path]


@pytest.fixture
def tokenizer_of(tiny_base: Path, tmp_path: Path) -> Made:
    """A folder with the embedded tokenizer, with extra special tokens and other settings."""

    def make(tokens: tuple[str, ...] = (), bos: bool = False, **config: Any) -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        tokenizer = Tokenizer.from_file(str(tiny_base / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
        if bos:
            number = tokenizer.token_to_id("<|im_start|>")
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<|im_start|> $A", special_tokens=[("<|im_start|>", number)]
            )
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = read_json(tiny_base / "tokenizer_config.json") | config
        write_json(folder / "tokenizer_config.json", settings)
        return folder

    return make


def rows_of(folder: Path) -> int:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def template_of(folder: Path, text: str = PLAIN, append_eos: bool = False) -> Template:
    return Template.of(text, append_eos, 64, folder)


def prepared(source: Path, template: Template, rows: int) -> tuple[Path, Pad]:
    folder = source.with_name("exported")
    folder.mkdir()
    tokenizer = prepare_tokenizer(source, template, rows)
    tokenizer.save(folder)
    tokenizer.template.save(folder / "template.json")
    return folder, tokenizer.pad


# --- the pad token ---------------------------------------------------------------------------


def test_own_pad_token_is_kept(tokenizer_of: Made) -> None:
    source = tokenizer_of(("<pad>",), pad_token="<pad>")
    _, pad = prepared(source, template_of(source), rows_of(source) + 5)
    assert pad == Pad("<pad>", 4096, 4102)


@pytest.mark.parametrize("own", ["<|endoftext|>", None, {"content": "<|endoftext|>"}, "<|im_end|>"])
def test_new_pad_token_uses_a_spare_row(tokenizer_of: Made, own: Any) -> None:
    """The tokenizer's own pad token is EOS, missing, or used in the chat template."""
    source = tokenizer_of(pad_token=own)
    _, pad = prepared(source, template_of(source), 4100)
    assert pad == Pad(PAD, 4096, 4100)


def test_unused_special_token_is_the_pad_without_a_spare_row(
    tokenizer_of: Made,
) -> None:
    source = tokenizer_of(("<bos>", "<unk>", "<in_template>", "<free>", "<free_too>"))
    config = {"bos_token": "<bos>", "unk_token": "<unk>"}
    write_json(
        source / "tokenizer_config.json", read_json(source / "tokenizer_config.json") | config
    )
    template = template_of(source, "<in_template>{prompt}{answer}")
    _, pad = prepared(source, template, rows_of(source))
    assert pad == Pad("<free>", 4099, 4101)


def test_embeddings_get_an_extra_row_as_a_last_resort(tokenizer_of: Made) -> None:
    source = tokenizer_of()
    _, pad = prepared(source, template_of(source), 4096)
    assert pad == Pad(PAD, 4096, 4097)


def test_token_added_by_the_tokenizer_is_not_the_pad(tokenizer_of: Made) -> None:
    source = tokenizer_of(bos=True, chat_template=None)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    config = read_json(source / "tokenizer_config.json")
    assert find_pad(tokenizer, config, template_of(source), 4096).token == "<|im_end|>"


def test_token_without_an_embedding_row_is_not_the_pad(tokenizer_of: Made) -> None:
    source = tokenizer_of(("<pad>",), pad_token="<pad>")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    config = read_json(source / "tokenizer_config.json")
    assert find_pad(tokenizer, config, template_of(source), 4096) == Pad(PAD, 4097, 4098)


# --- loading ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["zh", "none", "chat", SYSTEM, 'a "{prompt}" \\ {{ b }}\n{answer} end\n']
)
@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("roles", [("user", "assistant"), ("query", "document")])
def test_chat_template_gives_the_ids_of_training(
    tokenizer_of: Made, name: str, append_eos: bool, bos: bool, roles: tuple[str, str]
) -> None:
    source = tokenizer_of(bos=bos)
    template = template_of(source, name, append_eos)
    encoder = Encoder(source, template)
    folder, _ = prepared(source, template, 4096)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for texts in TEXTS:
        rendered = encoder.render((("user", texts[0]),), (("assistant", texts[1]),))
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        found = tokenizer.apply_chat_template(chat, return_dict=False)
        assert [found] == encoder.encode([rendered])
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        assert encoder.encode([encoder.bare(str(whole))]) == [found]


S, U, A = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
CONVERSATIONS: list[tuple[list[Any], dict[str, Any]]] = [
    ([U, A], {}),
    ([S, U, A], {}),
    ([U, A | {"content": ""}], {}),
    ([S, S, U, A], {}),
    ([U, S, A], {}),
    ([S, A], {}),
    ([U, A, U, A], {}),
    ([S, U, A, U, A], {}),
    ([U, U, A], {}),
    ([U, A, A], {}),
    ([U, A, {"role": "tool", "content": "4"}, A], {}),
    ([U, A | {"tool_calls": [CALL]}], {}),
    ([U, {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}),
    ([U, A | {"reasoning_content": "so"}], {}),
    ([U, A | {"reasoning_content": "", "tool_calls": [], "name": None}], {}),
    ([U | {"name": "Ann"}, A], {}),
    ([U | {"images": ["a"]}, A], {}),
    ([U | {"content": [{"type": "text", "text": "u"}]}, A], {}),
    ([U, A], {"tools": [CALL]}),
]


@pytest.mark.parametrize("name", ["zh", SYSTEM, "{system}\n{prompt}{answer}", "chat"])
@pytest.mark.parametrize("append_eos", [False, True])
def test_chat_template_renders_and_refuses_the_same_as_training(
    tokenizer_of: Made, name: str, append_eos: bool
) -> None:
    source = tokenizer_of(bos=name == SYSTEM)
    template = template_of(source, name, append_eos)
    encoder = Encoder(source, template)
    folder, _ = prepared(source, template, 4096)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def trained(messages: list[Any], more: dict[str, Any]) -> Any:
        try:
            found = candidates({"prompt": messages[:-1], "answer": messages[-1:]} | more)
            return encoder.encode([encoder.render(found.prompt, found.answers[0])])[0]
        except BadRecord:
            return None

    def exported(messages: list[Any], more: dict[str, Any]) -> Any:
        try:
            return tokenizer.apply_chat_template(messages, return_dict=False, **more)
        except TemplateError:
            return None

    rendered = 0
    for messages, more in CONVERSATIONS:
        # With `chat`, some of these are refused by record checks, not by the chat template.
        if (expected := trained(messages, more)) is not None or name != "chat":
            assert exported(messages, more) == expected, messages
            rendered += expected is not None
    assert rendered == {"zh": 3, "chat": 11}.get(name, 4)


def test_prompt_without_an_answer_is_rendered_only_for_a_policy(tokenizer_of: Made) -> None:
    source = tokenizer_of()
    folder, _ = prepared(source, template_of(source, SYSTEM), 4096)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, text in (([U], "问:u\n\n答:"), ([S, U], "<s>\n\n问:u\n\n答:")):
        asked: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        assert tokenizer.apply_chat_template(prompt, **asked) == text
        with pytest.raises(
            TemplateError, match="user, assistant and optionally system before them"
        ):
            tokenizer.apply_chat_template(prompt, tokenize=False)


def with_spaces(folder: Path) -> Tokenizer:
    """A tokenizer that adds a space before a text, but not after a special token inside it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = BpeTrainer(special_tokens=["<s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(
        [f"{prompt} 问:\n\n答:{answer}" for prompt, answer in TEXTS], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "unk_token": "<unk>"})
    return tokenizer


def test_space_before_texts_is_kept_after_the_first_token(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with_spaces(source).save(str(source / "tokenizer.json"))
    template = template_of(source)
    folder, _ = prepared(source, template, 4096)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, answer in TEXTS:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        found = tokenizer.apply_chat_template(chat, return_dict=False)
        assert [found] == Encoder(source, template).encode([f"问:{prompt}\n\n答:{answer}"])


def test_tokenizer_that_no_chat_template_can_match_is_reported(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tokenizer = with_spaces(source)
    tokenizer.normalizer = normalizers.Strip(left=True, right=False)
    tokenizer.save(str(source / "tokenizer.json"))
    sentence = r"gives '问:a.*different ids after '<s>'.*set preprocess.template"
    with pytest.raises(Fault, match=sentence):
        Encoder(source, template_of(source)).require_portable()
    with pytest.raises(Fault, match=sentence):
        prepared(source, template_of(source), 4096)


def test_text_that_ends_in_eos_gets_no_second_one(tokenizer_of: Made) -> None:
    source = tokenizer_of()
    folder, _ = prepared(source, template_of(source, append_eos=True), 4096)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|endoftext|>"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "问:a\n\n答:b<|endoftext|>"
    generated = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert generated == "问:a\n\n答:"


def test_chat_template_is_exported_word_for_word(tokenizer_of: Made) -> None:
    source = tokenizer_of()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    config = read_json(source / "tokenizer_config.json")
    chat = "{{ '__EOS__ __BODY__' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = replace(template_of(source, append_eos=True), chat_template=chat)
    assert chat in portable.chat_template(tokenizer, config, template)


def test_our_encoder_gives_the_same_ids_with_the_exported_tokenizer(tokenizer_of: Made) -> None:
    source = tokenizer_of()
    template = template_of(source)
    folder, _ = prepared(source, template, 4096)
    texts = [" ".join(text) for text in TEXTS]
    exported = Template.load(folder / "template.json")
    assert Encoder(folder, exported).encode(texts) == Encoder(source, template).encode(texts)


def test_loaders_pad_on_the_right_and_truncate_on_the_left(tokenizer_of: Made) -> None:
    source = tokenizer_of()
    folder, pad = prepared(source, template_of(source), 4096)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    long = " ".join(map(str, range(100)))
    whole = tokenizer(long)["input_ids"]
    short, cut = tokenizer(["a", long], padding=True, truncation=True)["input_ids"]
    assert cut == whole[-64:]
    assert short == [*tokenizer("a")["input_ids"], *[pad.id] * 63]
    assert tokenizer.pad_token_id == pad.id != tokenizer.eos_token_id


def test_jinja_literal_renders_to_the_text() -> None:
    from jinja2 import Environment

    for text in ("a\"b'c\\d\n\t\r\x07 {{ }} {% %}", "问 é \U0001f468 \u2028", ""):
        template = "{{ " + portable.literal(text) + " }}"
        assert Environment(autoescape=False).from_string(template).render() == text
        assert json.loads(portable.literal(text)) == text


def test_embedded_tokenizer_has_no_pad_of_its_own(tiny_base: Path) -> None:
    """Its pad is EOS, and its chat template uses all other special tokens."""
    config = read_json(tiny_base / "tokenizer_config.json")
    assert config["pad_token"] == config["eos_token"] == embedded.SPECIAL[0]
    assert all(token in config["chat_template"] for token in embedded.SPECIAL[1:])
