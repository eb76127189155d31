"""Template and tokenizer: text to ids, the same for training, evaluation and serving."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from stages.outputs import digest, read_json, write_json
from stages.pairs import BadRecord, Message
from stages.process import Fault

TEMPLATES = {
    "zh": "问:{prompt}\n\n答:{answer}",
    "en": "Question: {prompt}\n\nAnswer: {answer}",
    "none": "{prompt}{answer}",
}
FIELDS = re.compile(r"([^{}]*)\{prompt\}([^{}]*)\{answer\}([^{}]*)")


@dataclass(frozen=True)
class Template:
    """How text becomes ids. Written by preprocess; every later stage reads it from here alone.

    `template` is a text with the fields {prompt} and {answer}, or the word "chat" for the
    tokenizer's own; `tokenizer` is the SHA-256 of the tokenizer.json that goes with it.
    """

    template: str
    append_eos: bool
    max_length: int
    tokenizer: str

    @classmethod
    def of(cls, name: str, append_eos: bool, max_length: int, base: Path) -> "Template":
        """The template called `name`, or the text `name` itself; Faults at any other."""
        text = name if name == "chat" else TEMPLATES.get(name, name)
        if text != "chat" and not FIELDS.fullmatch(text):
            raise Fault(
                f"params.yaml: preprocess.template is {name!r}, must be one of "
                f"{', '.join([*TEMPLATES, 'chat'])}, or a text with {{prompt}} and then {{answer}}"
            )
        return cls(text, append_eos, max_length, digest(base / "tokenizer.json"))

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Template":
        return cls(**read_json(path))


@dataclass(frozen=True)
class Text:
    """A rendered text; the prompt, the part that may be cut, is text[start:end]."""

    text: str
    start: int
    end: int


class Encoder:
    """The tokenizer of a base folder under a template."""

    def __init__(self, base: Path, template: Template) -> None:
        """Raises a Fault where the tokenizer is another one, or lacks what the template needs."""
        if digest(base / "tokenizer.json") != template.tokenizer:
            raise Fault(
                f"{base}/tokenizer.json is not the one that the template was made for; "
                "wanted the base model of the tokenized data"
            )
        self.template = template
        self._tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config: dict[str, Any] = read_json(base / "tokenizer_config.json")
        self._chat = template.template == "chat"
        if self._chat and not self._config.get("chat_template"):
            raise Fault(
                f"params.yaml: preprocess.template is chat, but {base} has no chat template"
            )
        self._eos: int | None = None
        if template.append_eos:
            eos = self._token("eos_token")
            self._eos = self._tokenizer.token_to_id(eos) if eos else None
            if self._eos is None:
                raise Fault(f"params.yaml: preprocess.append_eos is true, but {base} has no eos")

    def render(self, prompt: Sequence[Message], answer: Sequence[Message]) -> Text:
        """One side of a pair as text. Raises BadRecord where only `chat` can render it."""
        if self._chat:
            return self._render_chat(prompt, answer)
        if [role for role, _ in (*prompt, *answer)] != ["user", "assistant"]:
            raise BadRecord(
                "needs_chat", "has several turns, which only preprocess.template chat can render"
            )
        fields = FIELDS.fullmatch(self.template.template)
        assert fields
        head, middle, tail = fields.group(1, 2, 3)
        start, question = len(head), prompt[0][1]
        text = head + question + middle + answer[0][1] + tail
        return Text(text, start, start + len(question))

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """The ids of each text, never cut: those of a plain call of the tokenizer, and eos."""
        encodings = self._tokenizer.encode_batch_fast(
            [text.text for text in texts], add_special_tokens=not self._chat
        )
        return [self._finish(encoding.ids) for encoding in encodings]

    def encode_cut(self, texts: Sequence[Text]) -> list[list[int]] | None:
        """The ids of the texts of one record, cut to the maximum length, or None if they cannot be.

        The same number of ids is cut from the left of the prompt of each; what stands before the
        prompt is kept.
        """
        encodings = self._tokenizer.encode_batch(
            [text.text for text in texts], add_special_tokens=not self._chat
        )
        sides = [self._finish(encoding.ids) for encoding in encodings]
        cut = max(len(ids) for ids in sides) - self.template.max_length
        spans = [_span(encoding, text) for encoding, text in zip(encodings, texts, strict=True)]
        if cut > min(end - start for start, end in spans):
            return None
        return [
            ids[:start] + ids[start + max(cut, 0) :]
            for ids, (start, _) in zip(sides, spans, strict=True)
        ]

    def _finish(self, ids: list[int]) -> list[int]:
        return ids if self._eos is None or ids[-1:] == [self._eos] else [*ids, self._eos]

    def _token(self, name: str) -> str | None:
        """A special token by its name in the tokenizer's configuration."""
        token = self._config.get(name)
        return token["content"] if isinstance(token, dict) else token

    def _special_tokens(self) -> dict[str, Any]:
        return {name: self._token(name) or "" for name in ("bos_token", "eos_token", "pad_token")}

    def _render_chat(self, prompt: Sequence[Message], answer: Sequence[Message]) -> Text:
        from transformers.utils.chat_template_utils import render_jinja_template

        text = render_jinja_template(
            conversations=[[{"role": role, "content": text} for role, text in (*prompt, *answer)]],
            chat_template=self._config["chat_template"],
            **self._special_tokens(),
        )[0][0]
        first, last = prompt[0][1].strip(), prompt[-1][1].strip()
        if prompt[0][0] == "system" and len(prompt) > 1:
            first = prompt[1][1].strip()
        start = max(text.find(first), 0)
        end = text.rfind(last, start, text.rfind(answer[-1][1].strip())) + len(last)
        return Text(text, start, end)


def prefix_length(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """How many first ids two sequences share, at most one less than the shorter has."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(limit) if chosen[i] != rejected[i]), max(limit, 0))


def _span(encoding: Encoding, text: Text) -> tuple[int, int]:
    """First and past-the-last index of the ids that lie within the prompt."""
    inside = [
        index
        for index, (start, end) in enumerate(encoding.offsets)
        if text.start <= start < end <= text.end
    ]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
