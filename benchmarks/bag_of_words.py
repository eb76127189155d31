"""What a bag of words achieves on the sample: the baseline for a reward model.

    python -m benchmarks.bag_of_words data/tokenized

A logistic regression on the words of the two answers learns from the train split which answer is
better. The table has its accuracy on the test split.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import load_from_disk
from scipy.sparse import vstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from reward.process import command_line

PAIRS = Path(__file__).resolve().parents[1] / "data" / "raw" / "pairs.json"
# A word, or a single Han character, because Chinese has no spaces between words.
TOKEN = r"[a-z0-9']+|[\u4e00-\u9fff]"
STRENGTHS = (0.001, 0.01, 0.1, 1.0)


class Pair(NamedTuple):
    """One record of pairs.json."""

    prompt: str
    chosen: str
    rejected: str
    kind: str
    language: str

    @property
    def id(self) -> str:
        """The id of the pair in the tokenized datasets."""
        texts = [self.prompt, self.chosen, self.rejected]
        written = json.dumps(texts, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(written.encode()).hexdigest()[:16]


class BagOfWords:
    """Chooses between two answers by a weighted count of the words in which they differ."""

    def __init__(self, strength: float) -> None:
        self._counts = CountVectorizer(token_pattern=TOKEN, ngram_range=(1, 2))
        # Without an intercept, swapping the answers swaps the verdict.
        self._weights = LogisticRegression(C=strength, fit_intercept=False, solver="liblinear")

    def fit(self, pairs: list[Pair]) -> "BagOfWords":
        """Learn from each pair in both orders."""
        self._counts.fit([text for pair in pairs for text in (pair.chosen, pair.rejected)])
        differences = self._differences(pairs)
        labels = np.repeat([1, -1], len(pairs))
        self._weights.fit(vstack([differences, -differences]), labels)
        return self

    def is_right(self, pairs: list[Pair]) -> list[bool]:
        """Whether the chosen answer of each pair is preferred."""
        margins = self._weights.decision_function(self._differences(pairs))
        return [bool(margin > 0) for margin in margins]

    def _differences(self, pairs: list[Pair]) -> Any:
        chosen = self._counts.transform([pair.chosen for pair in pairs])
        return chosen - self._counts.transform([pair.rejected for pair in pairs])


def validated_accuracy(strength: float, pairs: list[Pair]) -> float:
    """Accuracy in five-fold cross-validation that keeps the pairs of a prompt together."""
    right: list[bool] = []
    for seen, held_out in GroupKFold(5).split(pairs, groups=[pair.prompt for pair in pairs]):
        model = BagOfWords(strength).fit([pairs[index] for index in seen])
        right += model.is_right([pairs[index] for index in held_out])
    return sum(right) / len(right)


def table(pairs: list[Pair], right: list[bool]) -> str:
    """The table of accuracy overall, by language and by kind."""
    views: list[Callable[[Pair], str]] = [
        lambda pair: "all",
        lambda pair: pair.language,
        lambda pair: pair.kind,
    ]
    lines = [f"{'':<16}{'pairs':>6}{'accuracy':>10}"]
    for view in views:
        for name in sorted({view(pair) for pair in pairs}):
            hits = [hit for pair, hit in zip(pairs, right, strict=True) if view(pair) == name]
            lines.append(f"{name:<16}{len(hits):>6}{sum(hits) / len(hits):>10.1%}")
    return "\n".join(lines)


def report(train: list[Pair], test: list[Pair]) -> str:
    """Choose C on the train split alone; returns the table of accuracy on the test split."""
    strength = max(STRENGTHS, key=lambda strength: validated_accuracy(strength, train))
    right = BagOfWords(strength).fit(train).is_right(test)
    return f"bag of words, C = {strength:g}\n{table(test, right)}"


def main() -> None:
    """Read the splits of the tokenized folder and print the table."""
    parser = command_line("benchmarks.bag_of_words", __doc__)
    parser.add_argument("tokenized", type=Path, help="folder with the datasets train and test")
    folder = parser.parse_args().tokenized
    records = json.loads(PAIRS.read_text(encoding="utf-8"))
    by_id = {pair.id: pair for pair in (Pair(**record) for record in records)}
    train, test = (
        [by_id[key] for key in load_from_disk(str(folder / split))["id"]]
        for split in ("train", "test")
    )
    print(report(train, test))


if __name__ == "__main__":
    main()
