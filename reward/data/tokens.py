"""Template and tokenizer: from text to ids, the same for training, evaluation and serving."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from reward.data.prefixes import TokenIds
from reward.data.records import TOOLS, BadRecord, Messages, names_of
from reward.data.templates import (
    DOUBLED,
    TextTemplate,
    dated,
    divide,
    fill,
    read_chat_template,
    render_chat,
)
from reward.outputs import digest, read_json, write_json
from reward.process import Fault

TEMPLATES = {
    "zh": "问:{prompt}\n\n答:{answer}",
    "en": "Question: {prompt}\n\nAnswer: {answer}",
    "none": "{prompt}{answer}",
}
TOKENIZER_CONFIG = "tokenizer_config.json"
# Messages with these roles at the head of a conversation are never cut.
KEPT = ("system", TOOLS)
# The most characters of texts that are tokenized at a time, which takes much more memory than ids.
CHARACTERS = 1 << 20
# Takes the place of a message to find where a rendered text has that message.
MARK = "\ue000\ue001\ue000"


@dataclass(frozen=True)
class Template:
    """How text becomes ids. Preprocess writes it to a file, and later stages read only that.

    `template` is a text with the fields {prompt} and {answer}, and optionally {system}, or "chat"
    for the Jinja template `chat_template`, which is None otherwise. `tokenizer` is the SHA-256 of
    the tokenizer.json that belongs to it.
    """

    template: str
    chat_template: str | None
    append_eos: bool
    max_length: int
    tokenizer: str

    @classmethod
    def of(
        cls,
        name: str,
        append_eos: bool,
        max_length: int,
        base: Path,
        chat_template: Path | None = None,
        date: str | None = None,
    ) -> "Template":
        """The template named `name`, or the text `name` itself. Raises a Fault for any other text.

        `chat_template` is the file with the template of "chat", by default the tokenizer's own.
        `date`, in ISO form, replaces today's date in it.
        """
        text = TEMPLATES.get(name, name)
        if text != "chat":
            require_text_template(text)
        path = base / "tokenizer.json"
        if not path.is_file():
            raise Fault(f"{path} does not exist, expected the tokenizer of a fetched base model")
        chat = None
        if text == "chat":
            chat = dated(read_chat_template(chat_template or base / TOKENIZER_CONFIG), date)
        return cls(text, chat, append_eos, max_length, digest(path))

    def save(self, path: Path) -> None:
        """Write the template to a JSON file."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Template":
        """The template in a file. Raises a Fault if the file is of another version of the code."""
        content, names = read_json(path), {field.name for field in fields(cls)}
        if content.keys() != names:
            raise Fault(
                f"{path} has {names_of(content)}, expected {', '.join(sorted(names))}: "
                "another version of this project wrote it"
            )
        return cls(**content)


class Encoder:
    """The tokenizer of a base folder together with a template."""

    def __init__(self, base: Path, template: Template, size: int | None = None) -> None:
        """`size` is the number of ids of the model; by default it is read from its config.json.

        Raises a Fault if the tokenizer is another one, or lacks what the template needs.
        """
        if digest(base / "tokenizer.json") != template.tokenizer:
            raise Fault(
                f"{base}/tokenizer.json is not the one that the template was made for; "
                "expected the base model of the tokenized data"
            )
        self.template, self._base, self._given_size = template, base, size
        self._tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config: dict[str, Any] = read_json(base / TOKENIZER_CONFIG)
        self._chat = template.chat_template is not None
        self._eos: int | None = None
        if template.append_eos:
            self._eos = self._tokenizer.token_to_id(self.eos) if self.eos else None
            if self._eos is None:
                raise Fault(
                    f"params.yaml: preprocess.append_eos is true, but {base} has no eos token; set "
                    "preprocess.append_eos to false"
                )

    def render(self, prompt: Messages, answer: Messages) -> str:
        """One side of a pair as text.

        Raises BadRecord if the template cannot render it, or if it begins with special tokens that
        encoding would add again.
        """
        messages = (*prompt, *answer)
        if self.template.chat_template is None:
            text = fill(self.template.template, messages)
            if (before := self._enclosing[0]) and text.startswith(before):
                raise BadRecord(
                    "special_token",
                    f"begins with {before!r}, which the tokenizer adds by itself, expected the "
                    "text and preprocess.template without it",
                )
            return text
        return render_chat(self.template.chat_template, messages, self._special_tokens)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text as a plain tokenizer call gives them, never cut, with eos if set."""
        return [
            self._finish(encoding.ids)
            for some in slices(texts, CHARACTERS)
            for encoding in self._encodings(some)
        ]

    def encode_arrays(self, texts: Sequence[str]) -> list[TokenIds]:
        """The ids of each text as arrays.

        Each array is made before the next list of ids, because a list takes nine times the memory.
        """
        return [as_array(self._finish(encoding.ids)) for encoding in self._encodings(texts)]

    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """Raises a Fault if the tokenizer fails, such as for a pattern that takes too long."""
        try:
            found: list[Encoding] = self._tokenizer.encode_batch_fast(
                texts, add_special_tokens=not self._chat
            )
        except BaseException as error:
            # The panic of a Rust library. No module has this class, which is not an Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise Fault(
                f"{self._base}/tokenizer.json: the tokenizer cannot split a text ({error}), "
                "expected one that splits any text"
            ) from None
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, including special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def bare(self, text: str) -> str:
        """A text without the special tokens that encoding puts around it."""
        if self._chat:
            return text
        before, after = self._enclosing
        return text.removeprefix(before).removesuffix(after)

    @cached_property
    def _enclosing(self) -> tuple[str, str]:
        before, after = map("".join, enclosing_tokens(self._tokenizer))
        return before, after

    def unknown(self, *texts: Sequence[int] | TokenIds) -> str | None:
        """Says which id of the texts the base lacks, if one does.

        A tokenizer may have tokens that were added without enlarging the base.
        """
        largest = max(int(np.max(ids, initial=0)) for ids in texts) if self._size else 0
        if not self._size or largest < self._size:
            return None
        token = self._tokenizer.id_to_token(largest)
        return f"the token {token!r} with the id {largest}, but the base has {self._size} ids"

    @cached_property
    def _size(self) -> int | None:
        """The number of ids of the base if the tokenizer has more; None if not, or not known."""
        size, path = self._given_size, self._base / "config.json"
        if size is None and path.exists():
            size = read_json(path).get("vocab_size")
        ids = [self._tokenizer.get_vocab_size() - 1, *self._tokenizer.get_added_tokens_decoder()]
        return size if isinstance(size, int) and max(ids) >= size else None

    @cached_property
    def longest(self) -> int:
        """More characters than any text of max_length tokens has, even if it is normalized."""
        longest = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))
        return 4 * longest * self.template.max_length

    @property
    def bos(self) -> str | None:
        """The tokenizer's beginning-of-sequence token, if it has one."""
        return token_of(self._config, "bos_token")

    @property
    def eos(self) -> str | None:
        """The tokenizer's end-of-sequence token, if it has one."""
        return token_of(self._config, "eos_token")

    @cached_property
    def special(self) -> set[str]:
        """The tokenizer's special tokens."""
        tokens = self._tokenizer.get_added_tokens_decoder().values()
        return {token.content for token in tokens if token.special}

    def require_portable(self) -> None:
        """Raises a Fault unless a chat template can give the ids of a text template, for export."""
        if self.template.chat_template is None:
            enclosing_texts(self._tokenizer, divide(self.template.template))

    def encode_cut(self, prompt: Messages, answers: Sequence[Messages]) -> list[list[int]] | None:
        """The ids of one prompt with each answer, with the prompt cut so that all of them fit.

        Whole turns are dropped first, the oldest first. If the last turn is still too long, the
        same number of ids is cut for each answer, at the left of the turn's first message, and only
        whole characters. None if that message has too few. Raises BadRecord if the template cannot
        render the rest.
        """
        choices = [*with_fewer_turns(prompt)]

        @cache
        def sides(place: int) -> list[list[int]]:
            return self.encode([self.render(choices[place], answer) for answer in answers])

        def fits(place: int) -> bool:
            return max(map(len, sides(place))) <= self.template.max_length

        # A binary search, because encoding the rest once per dropped turn takes quadratic time.
        place = bisect_left(range(len(choices)), True, key=fits)
        return sides(place) if place < len(choices) else self._cut_words(choices[-1], answers)

    def _cut_words(self, prompt: Messages, answers: Sequence[Messages]) -> list[list[int]] | None:
        """Cut the first message of a prompt of one turn, and keep the text before it."""
        sides, starts, places = [], [], []
        for answer in answers:
            text = self.render(prompt, answer)
            encoding = self._tokenizer.encode(text, add_special_tokens=not self._chat)
            first, last = self._place(prompt, answer, len(text))
            inside = [
                (index, place)
                for index, place in enumerate(encoding.offsets)
                if first <= place[0] < place[1] <= last
            ]
            sides.append(self._finish(encoding.ids))
            starts.append(inside[0][0] if inside else 0)
            places.append([place for _, place in inside])
        cut = max(map(len, sides)) - self.template.max_length
        longest = min(map(len, places))
        # An id may end within a character. The next one then begins before its end.
        while cut < longest and any(each[cut][0] < each[cut - 1][1] for each in places):
            cut += 1
        if cut > longest:
            return None
        return [ids[:start] + ids[start + cut :] for ids, start in zip(sides, starts, strict=True)]

    def _place(self, prompt: Messages, answer: Messages, length: int) -> tuple[int, int]:
        """Where the first message of the turn begins and ends in a text of `length` characters."""
        index = min(kept_messages(prompt), len(prompt) - 1)
        role, _, *parts = prompt[index]
        marked = (*prompt[:index], (role, MARK, *parts), *prompt[index + 1 :])
        before, _, after = self.render(marked, answer).partition(MARK)
        return len(before), length - len(after)

    def _finish(self, ids: list[int]) -> list[int]:
        return ids if self._eos is None or ids[-1:] == [self._eos] else [*ids, self._eos]

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        found = {name: token_of(self._config, name) for name in self._config}
        return {
            name: token
            for name, token in found.items()
            if name.endswith("_token") and isinstance(token, str)
        }


def require_text_template(text: str) -> None:
    """Raises a Fault for a preprocess.template that is neither a name nor a text template."""
    where = f"params.yaml: preprocess.template is {text!r}"
    try:
        divide(text)
    except ValueError:
        raise Fault(
            f"{where}, must be one of {', '.join([*TEMPLATES, 'chat'])}, or a text with "
            "{prompt}, then {answer}, and optionally {system} on a line before them, each once"
        ) from None
    if "\\n" in text:
        raise Fault(
            f"{where}, with a backslash and an n instead of a line break; write "
            '"{prompt}\\n{answer}" with double quotes in params.yaml, or -S '
            "$'preprocess.template=\"{prompt}\\n{answer}\"' in a shell"
        )
    if DOUBLED.search(text):
        raise Fault(
            f"{where}, with double braces around a field, which would leave single ones in the "
            "text; write {prompt} and {answer}"
        )


def slices(texts: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    """The texts in parts of at most `most` characters, or a single longer text."""
    start = size = 0
    for end, text in enumerate(texts):
        size += len(text)
        if size > most and end > start:
            yield texts[start:end]
            start, size = end, len(text)
    yield texts[start:]


def as_array(ids: Sequence[int]) -> TokenIds:
    return np.array(ids, dtype=np.int32)


def kept_messages(prompt: Messages) -> int:
    """How many messages at the head of a prompt are never cut."""
    return len(list(takewhile(lambda message: message[0] in KEPT, prompt)))


def with_fewer_turns(prompt: Messages) -> Iterator[Messages]:
    """A prompt, then the prompt with one turn fewer each time, down to a single turn.

    A turn begins with a user message, or at the beginning of the conversation.
    """
    head = kept_messages(prompt)
    yield prompt
    for start in range(head + 1, len(prompt)):
        if prompt[start][0] == "user":
            yield prompt[:head] + prompt[start:]


def token_of(config: dict[str, Any], name: str) -> str | None:
    """A special token, by its name in a tokenizer's configuration."""
    token = config.get(name)
    return token["content"] if isinstance(token, dict) else token


def enclosing_tokens(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The special tokens that a tokenizer puts before and after a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).tokens
    whole = tokenizer.encode("a").tokens
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def enclosing_texts(tokenizer: Tokenizer, template: TextTemplate) -> tuple[str, str, str]:
    """The `enclosing_text` of a template: before texts without and with a system message, after.

    Raises a Fault as `enclosing_text` does.
    """
    text = f"{template.opening(None)}a{template.middle}b{template.tail}"
    start, end = enclosing_text(tokenizer, text)
    if not template.has_system:
        return start, "", end
    text = f"{template.opening('a')}b{template.middle}c{template.tail}"
    return start, enclosing_text(tokenizer, text)[0], end


def enclosing_text(tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    """The special tokens as text, to put before and after a text that is tokenized without them.

    The ids are then the same as with special tokens. Some tokenizers put a space before a text, but
    not after a special token, so the space has to be added. Raises a Fault if that does not help.
    """
    before, after = map("".join, enclosing_tokens(tokenizer))
    expected = tokenizer.encode(text).ids
    for start in (before, before + " "):
        if tokenizer.encode(start + text + after, add_special_tokens=False).ids == expected:
            return start, after
    raise Fault(
        f"models/base: its tokenizer gives {text!r} different ids after {before!r} in a text, so "
        "no chat template can render what was trained on; set preprocess.template to chat"
    )
