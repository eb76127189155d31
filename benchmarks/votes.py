"""What the votes of several annotators are worth: soft labels, the majority, or no ties.

    python -m benchmarks.votes votes.json data/votes
    python -m benchmarks.arms votes soft:preprocess.data=data/votes/soft \\
        majority:preprocess.data=data/votes/majority untied:preprocess.data=data/votes/untied

Records have `instruction`, `input`, `response1`, `response2` and `votes`, a list of 1, 2, or 0 for
equally good. Writes a folder of preference files for each arm. All arms share the test pairs, which
come from a third of the prompts; their preference is the share of the votes. The arms differ in
their training pairs, which come from the other prompts:

- soft: the preference is the share of the votes;
- majority: the answer with more votes is preferred with certainty; equal votes are a tie;
- untied: as majority, without ties.
"""

import json
from pathlib import Path
from typing import Any

from reward.data.reading import read
from reward.data.records import hash64
from reward.process import command_line

Record = dict[str, Any]


def main() -> None:
    parser = command_line("benchmarks.votes", __doc__)
    parser.add_argument("votes", type=Path, help="a file of records with votes")
    parser.add_argument("folder", type=Path, help="folder for the folders of the arms")
    options = parser.parse_args()
    records = [record for _, record in read(options.votes)]
    test = [graded(record, share(record)) for record in records if is_test(record)]
    rest = [record for record in records if not is_test(record)]
    arms = {
        "soft": [graded(record, share(record)) for record in rest],
        "majority": [graded(record, majority(record)) for record in rest],
        "untied": [graded(record, majority(record)) for record in rest if majority(record) != 0.5],
    }
    for name, train in arms.items():
        folder = options.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for part, found in (("train", train), ("test", test)):
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in found]
            (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder}: {len(train)} pairs to train on, {len(test)} to test")


def is_test(record: Record) -> bool:
    """Whether the prompt belongs to the third that is held out."""
    return hash64([record["instruction"], record["input"]]) % 3 == 0


def share(record: Record) -> float:
    """The share of the votes for the first answer; a vote for neither counts half."""
    votes = record["votes"]
    return sum({1: 1.0, 2: 0.0, 0: 0.5}[vote] for vote in votes) / len(votes)


def majority(record: Record) -> float:
    """1 if the first answer has more votes, 0 if the second has, and 0.5 for a tie."""
    first, second = (record["votes"].count(vote) for vote in (1, 2))
    return 0.5 if first == second else float(first > second)


def graded(record: Record, preference: float) -> Record:
    """The record with the first answer as chosen, and the preference for it."""
    asked = {"instruction": record["instruction"]}
    if record["input"]:
        asked["input"] = record["input"]
    answers = {"chosen": record["response1"], "rejected": record["response2"]}
    return asked | answers | {"preference": preference}


if __name__ == "__main__":
    main()
