"""A tokenizer and a model configuration with which plain loaders compute the right rewards.

Plain loaders know nothing about this project. They read the reward at the last token that is not
the pad token, render conversations with the tokenizer's chat template, truncate on the side that
the tokenizer names, and apply a sigmoid unless the configuration says that the model is a
regression.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from torch import nn
from transformers import PreTrainedModel

from reward.data.records import PARTS, UNREAD
from reward.data.templates import TextTemplate, divide
from reward.data.tokens import Template, enclosing_texts, enclosing_tokens, token_of
from reward.model.base import ADAPTER_WEIGHTS, head_of, set_head
from reward.outputs import read_json, write_json, write_text, writing

PAD = "<|reward_pad|>"
NO_PAD = ("eos_token", "bos_token", "unk_token")
# Translates the roles of sentence-transformers, query and document, to those of chat templates.
ROLES = """\
{%- set ns = namespace(turns=[]) -%}
{%- for message in messages -%}
{%- set role = {'query': 'user', 'document': 'assistant'}.get(message['role']) -%}
{%- set turn = {'role': role, 'content': message['content']} if role else message -%}
{%- set ns.turns = ns.turns + [turn] -%}
{%- endfor -%}
{%- set messages = ns.turns -%}
"""
# A text template as a chat template. Like training, it rejects everything for which the text
# template has no field.
FIELDS = """\
{%- set ns = namespace(roles=[]) -%}
{%- for message in messages -%}
{%- for part in __PARTS__ -%}
{%- if message[part] -%}
{{ raise_exception('the reward model was trained on texts without ' + part) }}
{%- endif -%}
{%- endfor -%}
{%- if message['content'] is not string -%}
{{ raise_exception('the content of a message must be a text') }}
{%- endif -%}
{%- set ns.roles = ns.roles + [message['role']] -%}
{%- endfor -%}
{%- set first = 1 if __SYSTEM__ and ns.roles[:1] == ['system'] else 0 -%}
{%- set turns = messages[first:] -%}
{%- set whole = ns.roles[first:] == ['user', 'assistant'] -%}
{%- if tools or not whole and not (ns.roles[first:] == ['user'] and add_generation_prompt) -%}
{{ raise_exception('the reward model was trained on texts with the roles __ROLES__, found '
                   + (ns.roles + (['tools'] if tools else [])) | join(', ')) }}
{%- endif -%}
{%- if first -%}
{{ __BEFORE__ + messages[0]['content'] + __AFTER__ }}
{%- else -%}
{{ __HEAD__ }}
{%- endif -%}
{%- set rest = turns[0]['content'] + __MIDDLE__ -%}
{%- set rest = rest + turns[1]['content'] + __TAIL__ if whole else rest -%}
{{ rest }}
{%- if whole and not rest.endswith(__EOS__) -%}
{{ __EOS__ }}
{%- endif -%}
"""
# A chat template whose text gets an eos unless it already ends in one. Empty expressions such as
# {{ '' }} protect the white space at the ends of the body, which the blocks around it would strip.
ENDED = """\
{%- set text %}{{ '' }}__BODY__{{ '' }}{% endset -%}
{{ text }}
{%- if not add_generation_prompt and not text.endswith(__EOS__) -%}
{{ __EOS__ }}
{%- endif -%}
"""


@dataclass(frozen=True)
class Pad:
    """A pad token, and the number of rows that the embeddings need for it."""

    token: str
    id: int
    rows: int


@dataclass(frozen=True)
class PortableTokenizer:
    """The content of tokenizer.json and tokenizer_config.json, and the template for them."""

    content: str
    config: dict[str, Any]
    pad: Pad
    template: Template

    def save(self, folder: Path) -> None:
        write_text(folder / "tokenizer.json", self.content)
        write_json(folder / "tokenizer_config.json", self.config)


def prepare_tokenizer(source: Path, template: Template, rows: int) -> PortableTokenizer:
    """The tokenizer of a base in the form that plain loaders need.

    It gives the same ids as before. It has a pad token that occurs in no text, a chat template that
    renders what the reward model reads, and truncates texts on the left at the maximum length.
    `rows` is the number of embeddings of the base.
    """
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    config = read_json(source / "tokenizer_config.json")
    pad = find_pad(tokenizer, config, template, rows)
    chat = chat_template(tokenizer, config, template)
    config |= {
        "chat_template": chat,
        "model_max_length": template.max_length,
        "pad_token": pad.token,
        "padding_side": "right",
        "truncation_side": "left",
    }
    content = tokenizer.to_str(pretty=True)
    own = replace(template, tokenizer=hashlib.sha256(content.encode()).hexdigest())
    return PortableTokenizer(content, config, pad, own)


def find_pad(tokenizer: Tokenizer, config: dict[str, Any], template: Template, rows: int) -> Pad:
    """A pad token that occurs in no text of the model: it is not eos and appears in no template.

    The first choice is the tokenizer's own, then a new token if the embeddings have a spare row,
    then an unused special token, then a new token for which the embeddings must grow. A new token
    is added to `tokenizer`.
    """
    numbers = tokenizer.get_vocab(with_added_tokens=True)
    before, after = enclosing_tokens(tokenizer)
    used = {token_of(config, name) for name in NO_PAD} | {*before, *after}
    texts = [template.template, template.chat_template or "", config.get("chat_template") or ""]
    special = [
        added.content
        for number, added in sorted(tokenizer.get_added_tokens_decoder().items())
        if added.special and number < rows
    ]
    free = [
        token for token in special if token not in used and not any(token in text for text in texts)
    ]
    own = token_of(config, "pad_token")
    if own in free:
        return Pad(own, numbers[own], rows)
    if free and max(numbers.values()) + 1 >= rows:
        return Pad(free[0], numbers[free[0]], rows)
    tokenizer.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
    number = tokenizer.get_vocab(with_added_tokens=True)[PAD]
    return Pad(PAD, number, max(rows, number + 1))


# --- the chat template -----------------------------------------------------------------------


def chat_template(tokenizer: Tokenizer, config: dict[str, Any], template: Template) -> str:
    """A chat template that renders a prompt and an answer to the text that the model reads.

    Tokenized without special tokens, as chats are, the text has the same ids as in training. The
    roles are user and assistant or, as in sentence-transformers, query and document. The template
    raises an exception for what a text template cannot render.
    """
    eos = token_of(config, "eos_token") or "" if template.append_eos else ""
    if template.chat_template is None:
        return ROLES + in_jinja(tokenizer, divide(template.template), eos)
    body = ROLES + "{{ '' }}" + template.chat_template
    return ENDED.replace("__EOS__", literal(eos)).replace("__BODY__", body) if eos else body


def in_jinja(tokenizer: Tokenizer, template: TextTemplate, eos: str) -> str:
    """A text template as a chat template that renders and rejects the same as `fill`."""
    start, begin, end = enclosing_texts(tokenizer, template)
    before, after, roles = "", "", "user, assistant"
    if template.has_system:
        before = begin + template.before
        after, roles = template.after + template.head, f"{roles} and optionally system before them"
    values = {
        "PARTS": json.dumps([*PARTS, *UNREAD]),
        "SYSTEM": json.dumps(template.has_system),
        "ROLES": roles,
        "BEFORE": literal(before),
        "AFTER": literal(after),
        "HEAD": literal(start + template.head),
        "MIDDLE": literal(template.middle),
        "TAIL": literal(template.tail + end),
        "EOS": literal(eos),
    }
    return re.sub("__([A-Z]+)__", lambda name: values[name[1]], FIELDS)


def literal(text: str) -> str:
    """Text as a Jinja string literal, in which JSON's escapes are valid."""
    return json.dumps(text, ensure_ascii=False)


# --- the model -------------------------------------------------------------------------------


def prepare_model(model: PreTrainedModel, pad: Pad, reward: dict[str, Any]) -> None:
    """Set what plain loaders read from a classifier's configuration; add a row for the pad token.

    `reward` is recorded in the configuration as `reward_model`.
    """
    rows = embeddings(model)
    if rows < pad.rows:
        grown = model.resize_token_embeddings(pad.rows, mean_resizing=False)
        grown.weight.data[rows:] = 0
    config = model.config
    for part in (config, config.get_text_config()):
        part.pad_token_id = pad.id
    # Even models that transformers implements may name their own code.
    config.__dict__.pop("auto_map", None)
    config.problem_type = "regression"
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    config.reward_model = reward


def embeddings(model: PreTrainedModel) -> int:
    """The number of tokens for which a model has embeddings."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def take_head(model: PreTrainedModel, adapter: Path) -> None:
    """Give the model the trained head of an adapter, in the dtype of the model.

    Plain loaders multiply hidden states by the head without a cast, so an fp32 head in a model in
    half precision is an error. The adapter keeps the head in fp32.
    """
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    [head] = [tensor for name, tensor in tensors.items() if name.endswith("score.weight")]
    set_head(model, head)
    head_of(model).to(model.dtype)


def save_model(model: PreTrainedModel, folder: Path, tokenizer: PortableTokenizer) -> None:
    """Write a classifier with its tokenizer."""
    with writing(folder, room=sum(weight.nbytes for weight in model.parameters())):
        model.save_pretrained(folder)
    finish(folder, tokenizer)


def finish(folder: Path, tokenizer: PortableTokenizer) -> None:
    """Add the tokenizer to a written classifier and remove the version of transformers."""
    path = folder / "config.json"
    config = read_json(path)
    del config["transformers_version"]
    write_json(path, config)
    tokenizer.save(folder)
