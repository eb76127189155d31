"""Make the endings of whole texts exactly those of training.

A reward is read at the last token, but the texts that trainers send do not end like those of
training. They end as the policy samples them: with an end-of-sequence token or cut off before it,
and without the line break that a chat template puts after that token.
"""

import re
from functools import cached_property

from reward.data.records import BadRecord
from reward.data.tokens import MARK, Encoder

# A special token as most tokenizers write it: marked by bars, or with one of the usual names. Tags
# of HTML are ordinary text, except <s>.
CONTROL = re.compile(
    r"(?:"
    r"<[|｜][^\s<>|｜]{1,80}[|｜]?>|<[a-z_]{1,80}[|｜]>|\[\|[A-Za-z_]{3,40}\|\]"
    r"|</?s>|<(?:start|end)_of_\w{1,40}>"
    r"|(?i:<(?:seed:)?(?:bos|eos|pad|sep|cls|sop|eop)(?:_token)?>)"
    r"|\[(?:BOS|EOS|PAD|SEP|CLS|bos|eos|pad|sep|cls)\]"
    r"|\[/?INST\]"
    r")\Z"
)


class Endings:
    """The endings of whole texts under a template.

    A text may end in any special token of the tokenizer, except those that the template puts only
    before an answer.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def complete(self, text: str) -> str:
        """A whole text with what the template puts after an answer, however the text ends.

        Raises BadRecord for a text of nothing but endings and white space, and for one that ends in
        a special token that ends no text of training.
        """
        body = self.without(text)
        after = self.without(self._after)
        known = [ending for ending in (after, after.rstrip()) if ending and body.endswith(ending)]
        if known:
            body = body.removesuffix(known[0])
        if not body.strip():
            raise BadRecord("empty", "the text is empty")
        self._require_ending(body.rstrip())
        if self._trims:
            body = body.rstrip()
        return body + self._after

    def without(self, text: str) -> str:
        """A text without the special tokens at its end and the white space after them."""
        start = end = len(text)
        while True:
            while end and text[end - 1].isspace():
                end -= 1
            ends = (token for token in self._ends if text.endswith(token, 0, end))
            token = max(ends, key=len, default=None)
            if token is None:
                return text[:start]
            start = end = end - len(token)

    def _require_ending(self, text: str) -> None:
        """Raises BadRecord for a text that ends in another special token.

        The token may be the template's own if the answer is empty.
        """
        others = self._encoder.special - self._ends
        found = max(filter(text.endswith, others), key=len, default=None)
        if found is None and (foreign := CONTROL.search(text, max(0, len(text) - 100))):
            found = foreign[0]
        if found and not self._before.rstrip().endswith(found):
            raise BadRecord(
                "ending",
                f"the text ends in {found!r}, expected no special token at the end, or one of the "
                "reward model's tokenizer that ends answers",
            )

    @cached_property
    def _ends(self) -> set[str]:
        special, eos = self._encoder.special, self._encoder.eos
        return {
            token
            for token in special
            if token == eos or token in self._after or token not in self._before
        }

    @property
    def _before(self) -> str:
        return self._around[0]

    @property
    def _after(self) -> str:
        return self._around[1]

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What the template puts before an answer and after it."""
        before, _, after = self._rendered(MARK).rpartition(MARK)
        return before, after

    @cached_property
    def _trims(self) -> bool:
        """Whether the template strips white space at the end of an answer."""
        return self._rendered(f"{MARK} ") == self._rendered(MARK)

    def _rendered(self, answer: str) -> str:
        return self._encoder.render((("user", "a"),), (("assistant", answer),))
