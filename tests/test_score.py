"""Scoring files: every record exactly once and in order, whatever interrupts the run."""

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from reward.data.reading import batches
from reward.data.records import Candidates
from reward.process import run
from reward.serving import score
from reward.serving.scorer import EXPORT, Scorer
from tests.forked import Forked, require_done, run_in_group, score_files
from tests.support import file_size_limit

pytestmark = pytest.mark.usefixtures("project")
OUTPUT, INPUT = Path("out.jsonl"), Path("in.jsonl")
JOURNAL, LOCK = Path("out.jsonl.journal"), Path("out.jsonl.journal.lock")
# As in an old zip file, and as messages show it.
NOT_UTF_8, SHOWN = os.fsdecode(b"caf\xe9.jsonl"), r"caf\xe9.jsonl"


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small batches."""
    monkeypatch.setattr(score, "BATCH_CHARACTERS", 400)


@pytest.fixture(scope="module")
def scorer(complete: Path) -> Scorer:
    """The exported model, loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(complete)
        return Scorer(EXPORT)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, scorer: Scorer) -> Callable[..., None]:
    """Run the command in this process."""
    monkeypatch.setattr(score, "Scorer", lambda _: scorer)

    def call(*arguments: Any) -> None:
        monkeypatch.setattr("sys.argv", ["score", *map(str, arguments)])
        score.main()

    return call


@pytest.fixture
def fault(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that fails, and return its one-line error message."""

    def call(*arguments: Any) -> str:
        with pytest.raises(SystemExit) as caught:
            run(lambda: command(*arguments))
        assert caught.value.code == 1
        message = capsys.readouterr().err.rstrip("\n")
        assert "\n" not in message
        return message

    return call


def write(records: list[Any], path: Path = INPUT) -> list[Any]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return records


def some_records(count: int = 30) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"问题 {index}",
            "answers": [f"Answer {index} {'very ' * (index % 7)}{n}" for n in range(index % 4 + 1)],
            "extra": {"index": index, "share": index / 7, "text": "\u2028 \"'é"},
        }
        for index in range(count)
    ]


def lines(path: Path = OUTPUT) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


# --- output ----------------------------------------------------------------------------------


def test_every_record_is_returned_unchanged_with_rewards_and_ranks(
    command: Callable[..., None], scorer: Scorer
) -> None:
    records = write(some_records())
    command(INPUT, "--output", OUTPUT)
    found = lines()
    assert [list(row) for row in found] == [[*records[0], *score.ADDED]] * len(records)
    for record, row in zip(records, found, strict=True):
        answers = record["answers"]
        [*expected] = (
            scorer.rewards(*scorer.encode_pairs([record["prompt"]], [answer]))[0]
            for answer in answers
        )
        assert row.pop("rewards") == pytest.approx(expected, abs=1e-5)
        assert row.pop("ranks") == [1 + sum(b > a for b in expected) for a in expected]
        shares = np.exp(np.array(expected) / scorer.temperature)
        assert row.pop("probabilities") == pytest.approx(shares / shares.sum(), abs=1e-5)
        assert row == record
    assert not JOURNAL.exists()


def test_equal_answers_share_a_rank(command: Callable[..., None]) -> None:
    write([{"prompt": "hi", "answers": ["yes", "yes", "no"]}])
    command(INPUT, "--output", OUTPUT)
    [row] = lines()
    assert row["rewards"][0] == row["rewards"][1]
    assert sorted(row["ranks"]) in ([1, 1, 3], [1, 2, 2])


def test_end_token_of_a_policy_does_not_change_rewards(command: Callable[..., None]) -> None:
    [record] = write([{"prompt": "hi", "answers": ["yes", "yes<|im_end|>\n<|endoftext|>", "no"]}])
    command(INPUT, "--output", OUTPUT)
    [row] = lines()
    assert row["rewards"][0] == row["rewards"][1] != row["rewards"][2]
    assert row["answers"] == record["answers"]


def test_pairs_get_the_evaluated_rewards_in_the_order_chosen_rejected(
    command: Callable[..., None],
) -> None:
    command("data/raw/pairs.json", "--output", OUTPUT)
    evaluated = pyarrow.parquet.read_table("reports/evaluate/rewards.parquet").to_pylist()
    expected = {(row["reward_chosen"], row["reward_rejected"]) for row in evaluated}
    rows = [row["rewards"] for row in lines()]
    assert len(rows) == 20
    for pair in expected:
        assert sum(pair == pytest.approx(tuple(row), abs=1e-5) for row in rows) == 1


PAIR = {"chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        (PAIR | {"question": "hi"}, "hi"),
        (PAIR | {"prompt": "hi", "input": "there"}, "hi\nthere"),
        ({side: f"\n\nHuman: hi\n\nAssistant: {PAIR[side]}" for side in PAIR}, "hi"),
        (PAIR | {"prompt": "hi", "margin": -1, "weight": 0}, "hi"),
    ],
)
def test_pairs_are_read_as_in_training(
    record: dict[str, Any], prompt: str, command: Callable[..., None]
) -> None:
    folder = Path("two")
    folder.mkdir()
    write([record], folder / "a.jsonl")
    write([{"prompt": prompt, "answers": ["yes", "no"]}], folder / "b.jsonl")
    command(folder, "--output", OUTPUT)
    pair, expected = lines()
    assert pair["rewards"] == expected["rewards"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (PAIR | {"prompt": "hi", "system": "Be kind."}, "in.jsonl: line 1: needs_chat: has a sys"),
        (PAIR | {"prompt": "hi", "history": [["a", "b"]]}, "in.jsonl: line 1: needs_chat: has sev"),
        (PAIR | {"prompt": "hi", "chosen": ["a", "b"]}, "in.jsonl: line 1: several_kinds: has lis"),
        (PAIR | {"topic": "greeting"}, "in.jsonl: none of the columns chosen, rejected, topic is "),
        (
            PAIR | {"prompt": "hi", "response_0": "a", "response_1": "b", "better_response_id": 1},
            "in.jsonl: can be read as chosen and rejected or as response_0 and response_1",
        ),
    ],
)
def test_pair_that_training_would_read_otherwise_is_refused(
    record: dict[str, Any], message: str, fault: Callable[..., str]
) -> None:
    write([record])
    assert fault(INPUT, "--output", OUTPUT).startswith(message)


@pytest.mark.parametrize(
    "other", [{"answer": "a"}, {"answers": ["a", "b"]}, {"answers": ["a", "b"], "scores": [1, 2]}]
)
def test_pairs_after_many_other_records_are_read(
    other: dict[str, Any], command: Callable[..., None]
) -> None:
    write([{"prompt": "hi"} | other] * 101 + [PAIR | {"prompt": "hi"}])
    command(INPUT, "--output", OUTPUT)
    assert len(lines()[-1]["rewards"]) == 2


@pytest.mark.parametrize("more", [{"documents": [{"title": "A"}]}, {"image": "a.png"}])
@pytest.mark.parametrize("answers", [PAIR, {"answer": "yes"}])
def test_column_that_no_text_can_show_is_refused(
    more: dict[str, Any], answers: dict[str, str], fault: Callable[..., str]
) -> None:
    write([{"prompt": "hi"} | answers | more])
    assert f"'{next(iter(more))}' has a value" in fault(INPUT, "--output", OUTPUT)


def test_dataset_yaml_says_what_the_columns_of_pairs_mean(
    command: Callable[..., None], fault: Callable[..., str]
) -> None:
    record = PAIR | {"prompt": "hi", "whole": "maybe", "topic": "q", "best": 0}
    write([record, {"prompt": "hi", "answers": ["maybe", "no"]}])
    Path("dataset.yaml").write_text("in.jsonl: {chosen: whole, rejected: rejected}")
    command(INPUT, "--output", OUTPUT)
    pair, expected = lines()
    assert pair["rewards"] == expected["rewards"]
    write([record])
    write([{"prompt": "hi", "answers": ["yes", "no"]}], Path("plain.jsonl"))
    command("plain.jsonl", "--output", "plain.out.jsonl")
    [plain] = lines(Path("plain.out.jsonl"))
    for entry in (
        "{chosen: rejected, rejected: chosen}",
        "{answers: [rejected, chosen], verdict: best, first: [0], second: [1]}",
    ):
        Path("dataset.yaml").write_text(f"in.jsonl: {entry}")
        OUTPUT.unlink()
        command(INPUT, "--output", OUTPUT)
        [row] = lines()
        assert row["rewards"] == plain["rewards"]
    Path("dataset.yaml").write_text(
        "in.jsonl: {answers: [whole, topic], verdict: best, first: [0], second: [1]}"
    )
    assert fault(INPUT, "--output", "other.jsonl").startswith(
        "in.jsonl is read as prompt, whole and topic with best (0 for the first answer"
    )


def test_parquet_has_typed_columns_with_the_same_content(command: Callable[..., None]) -> None:
    records = write(some_records())
    command(INPUT, "data/raw/pairs.json", "--output", OUTPUT)
    command(INPUT, "data/raw/pairs.json", "--output", "out.parquet")
    table = pyarrow.parquet.read_table("out.parquet")
    assert table.schema == pa.schema(
        [
            ("position", pa.int64()),
            ("file", pa.string()),
            ("record", pa.string()),
            ("rewards", pa.list_(pa.float32())),
            ("ranks", pa.list_(pa.int32())),
            ("probabilities", pa.list_(pa.float32())),
        ]
    )
    rows = table.to_pylist()
    assert [
        json.loads(row["record"]) | {name: row[name] for name in score.ADDED} for row in rows
    ] == lines()
    assert [(row["file"], row["position"]) for row in rows] == [
        *((str(INPUT), place) for place in range(1, len(records) + 1)),
        *(("data/raw/pairs.json", place) for place in range(1, 21)),
    ]


@pytest.mark.parametrize("exists", [True, False])
def test_output_is_the_file_that_a_link_names(
    exists: bool, command: Callable[..., None], fault: Callable[..., str]
) -> None:
    """The journal, too, is on the disk that has room for it."""
    other = Path("other", "rewards.jsonl").absolute()
    if exists:
        other.parent.mkdir()
        other.touch()
    OUTPUT.symlink_to(other)
    records = write(some_records(6))
    write([*records[:-1], {"prompt": "a"}])
    assert "missing_key" in fault(INPUT, "--output", OUTPUT)
    assert other.with_name("rewards.jsonl.journal").stat().st_size > 0
    write(records)
    command(INPUT, "--output", OUTPUT)
    assert OUTPUT.is_symlink()
    assert len(lines(other)) == 6
    assert [*other.parent.iterdir()] == [other]


def test_output_that_is_a_link_to_a_path_that_is_not_utf_8_is_refused(
    fault: Callable[..., str],
) -> None:
    write(some_records(2))
    OUTPUT.symlink_to(NOT_UTF_8)
    assert fault(INPUT, "--output", OUTPUT).startswith(f"the path {Path(SHOWN).absolute()} is not")


def test_output_that_is_a_link_in_the_input_is_refused(fault: Callable[..., str]) -> None:
    write(some_records(2), Path("data/raw/in.jsonl"))
    Path("data/raw/link.jsonl").symlink_to(OUTPUT.absolute())
    assert fault("data/raw", "--output", "data/raw/link.jsonl") == (
        f"--output is data/raw/link.jsonl, a link to {OUTPUT.absolute()}, which is part of the "
        "input; choose another path"
    )


def test_files_of_a_folder_are_read_in_order(command: Callable[..., None]) -> None:
    Path("many").mkdir()
    write(some_records(3), Path("many/b.jsonl"))
    write([{"prompt": "first", "answer": "yes"}], Path("many/a.jsonl"))
    command("many", "--output", OUTPUT)
    assert [row["prompt"] for row in lines()] == ["first", *(f"问题 {n}" for n in range(3))]


def test_summary_counts_prompts_and_texts(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    write(some_records(8))
    command(INPUT, "--output", OUTPUT)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "read       8 prompts with 20 texts"
    assert printed[1].startswith("scored     20 texts with ")
    assert printed[1].endswith("texts/s; already scored: 0")
    assert printed[2] == "written    out.jsonl"


def test_endless_input_is_scored_as_it_arrives(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory therefore holds only one batch, however long the input."""
    taken = 0

    def endless(_: Path) -> Iterator[tuple[int, Any]]:
        nonlocal taken
        while True:
            taken += 1
            yield taken, {"prompt": "a" * 30, "answers": ["b" * 40, "c"]}

    class Enough(Exception):
        pass

    class Listener(score.Journal):
        written = 0

        def holds(self, batch: list[score.Item]) -> bool:
            assert taken - self.written == len(batch) < 10
            return False

        def append(self, rows: list[score.Row]) -> None:
            self.written += len(rows)
            if self.written > 30:
                raise Enough

    monkeypatch.setattr(score, "read", endless)
    with INPUT.open("a+b") as file, pytest.raises(Enough):
        score.score_files(scorer, [INPUT], Listener(JOURNAL, file, "model"))


# --- resuming --------------------------------------------------------------------------------


@pytest.fixture
def journal(command: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The complete journal of a run, whose output exists too."""
    write(some_records())
    kept = []
    publish = score.publish

    def keep(journal: score.Journal, output: Path) -> None:
        kept.append(JOURNAL.read_bytes())
        publish(journal, output)

    with monkeypatch.context() as patch:
        patch.setattr(score, "publish", keep)
        command(INPUT, "--output", OUTPUT)
    return kept[0]


def test_output_has_the_same_bytes_wherever_the_journal_ends(
    command: Callable[..., None], journal: bytes
) -> None:
    expected = OUTPUT.read_bytes()
    ends = [index + 1 for index, byte in enumerate(journal) if byte == ord("\n")]
    cuts = {0, 1, len(journal)} | {end + step for end in ends[::5] for step in (-2, -1, 0, 1)}
    for cut in sorted(cut for cut in cuts if cut <= len(journal)):
        OUTPUT.unlink()
        JOURNAL.write_bytes(journal[:cut])
        command(INPUT, "--output", OUTPUT)
        assert OUTPUT.read_bytes() == expected, cut
        assert not JOURNAL.exists()


def test_scored_records_are_neither_rendered_nor_scored_again(
    command: Callable[..., None],
    journal: bytes,
    scorer: Scorer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rendered: list[Any] = []
    candidates = scorer.candidates

    def watched(record: Any) -> Candidates:
        rendered.append(record)
        return candidates(record)

    monkeypatch.setattr(scorer, "candidates", watched)
    count = sum(len(record["answers"]) for record in some_records())
    for rows in (30, 20, 0):
        JOURNAL.write_bytes(b"".join(journal.splitlines(keepends=True)[: 1 + rows]))
        rendered.clear()
        capsys.readouterr()
        command(INPUT, "--output", OUTPUT)
        read, scored, _ = capsys.readouterr().out.splitlines()
        assert read == f"read       30 prompts with {count} texts"
        missing = some_records()[30 - len(rendered) :]
        assert rendered == missing
        # At most the batch that the journal has only a part of is scored again.
        assert 30 - rows <= len(rendered) <= min(30, 30 - rows + 5)
        texts = sum(len(record["answers"]) for record in missing)
        assert scored.startswith(f"scored     {texts} text")
        assert scored.endswith(f"already scored: {count - texts}")


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: bytes(len(row) - 1) + b"\n",
        lambda row: row[:-20] + b"\n",
        lambda row: row.replace(b'"ranks":[', b'"ranks":[1-'),
        lambda row: b"3\n",
        lambda row: b'{"position":1}\n',
    ],
    ids=["zeros", "cut", "broken number", "number", "few keys"],
)
def test_damaged_row_of_a_journal_is_scored_again(
    damage: Callable[[bytes], bytes], journal: bytes, command: Callable[..., None]
) -> None:
    expected = OUTPUT.read_bytes()
    OUTPUT.unlink()
    rows = journal.splitlines(keepends=True)
    rows[12] = damage(rows[12])
    JOURNAL.write_bytes(b"".join(rows))
    command(INPUT, "--output", OUTPUT)
    assert OUTPUT.read_bytes() == expected


def test_texts_of_a_batch_are_limited_too() -> None:
    """The text of each answer has the prompt and the tools."""
    words = "word " * 400
    records = [
        {"prompt": words, "answers": ["a", "b", "c", "d"]},
        {"prompt": [{"role": "user", "content": words}], "answers": ["a", "b", "c", "d"]},
        {"prompt": words, "chosen": "a " * 500, "rejected": "b " * 500},
        {"prompt": "a", "answer": "b", "tools": [{"name": "add", "description": words}]},
        {"prompt": "a", "answer": words},
    ]
    for record, most in zip(records, (1, 1, 1, 3, 3), strict=True):
        write([record] * 9)
        assert len(next(batches(score.items([INPUT]), score.Item.size, 10_000))) == most


def test_records_after_the_scored_ones_may_change(
    command: Callable[..., None], fault: Callable[..., str]
) -> None:
    records = some_records()
    write([*records[:-1], {"prompt": "a"}])
    assert fault(INPUT, "--output", OUTPUT).startswith("in.jsonl: line 30: missing_key: ")
    assert JOURNAL.stat().st_size > 0
    assert not OUTPUT.exists()
    write([*records[:-1], {"prompt": "a", "answer": "b"}])
    command(INPUT, "--output", OUTPUT)
    assert len(lines()) == 30


def test_changed_record_that_was_already_scored_is_refused(
    journal: bytes, fault: Callable[..., str]
) -> None:
    for changed in (
        [{"prompt": "new", "answer": "b"}, *some_records()],
        some_records()[1:],
        [some_records()[0] | {"extra": 1}, *some_records()[1:]],
    ):
        JOURNAL.write_bytes(journal)
        write(changed)
        assert fault(INPUT, "--output", OUTPUT) == (
            "in.jsonl: line 1 is not the record that was scored at this position; "
            "use the same input, or remove out.jsonl.journal to start again"
        )


ANOTHER_FORM = (
    "in.jsonl: line 1 is read as {}, but was scored in another form: dataset.yaml, the first "
    "pairs or this program have changed; use the same input, or remove out.jsonl.journal to start "
    "again"
)


def test_dataset_yaml_that_gives_scored_pairs_another_meaning_is_refused(
    command: Callable[..., None], fault: Callable[..., str]
) -> None:
    records = [PAIR | {"prompt": f"hi {n}", "whole": "maybe"} for n in range(101)]
    write([*records[:-1], records[-1] | {"query": "what?"}])
    assert fault(INPUT, "--output", OUTPUT) == (
        "in.jsonl: line 101: several_kinds: prompt and query could both be the prompt; "
        "name one in dataset.yaml"
    )
    mapping = Path("dataset.yaml")
    mapping.write_text("in.jsonl: {prompt: prompt, chosen: whole, rejected: rejected}")
    assert fault(INPUT, "--output", OUTPUT) == ANOTHER_FORM.format("prompt, whole and rejected")
    # As the message about line 101 said: no text changes.
    mapping.write_text("in.jsonl: {prompt: prompt}")
    command(INPUT, "--output", OUTPUT)
    resumed = OUTPUT.read_bytes()
    OUTPUT.unlink()
    command(INPUT, "--output", OUTPUT)
    assert OUTPUT.read_bytes() == resumed


def test_correction_that_gives_scored_pairs_another_meaning_is_refused(
    fault: Callable[..., str],
) -> None:
    prompt = "Tell me about number"
    records = [
        {"prompt": f"{prompt} {n}", "chosen": f"{prompt} {n} yes", "rejected": f"{prompt} {n} no"}
        for n in range(20)
    ]
    write([*records[:-1], records[-1] | {"rejected": 3}])
    assert fault(INPUT, "--output", OUTPUT).startswith("in.jsonl: line 20: wrong_type: ")
    write(records)
    assert fault(INPUT, "--output", OUTPUT) == ANOTHER_FORM.format(
        "prompt, chosen and rejected that repeat the prompt"
    )


def test_fewer_records_than_were_scored_are_refused(
    journal: bytes, fault: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "BATCH_CHARACTERS", 1)
    JOURNAL.write_bytes(journal)
    write(some_records()[:-1])
    assert fault(INPUT, "--output", OUTPUT) == (
        "out.jsonl.journal has more rows than the input has records; "
        "use the same input, or remove out.jsonl.journal to start again"
    )


@pytest.mark.parametrize("other", [{"model": "other"}, {"added": ["rewards", "ranks"]}])
def test_another_model_or_version_is_refused(
    other: dict[str, Any], journal: bytes, fault: Callable[..., str]
) -> None:
    first, rows = journal.split(b"\n", 1)
    JOURNAL.write_bytes(json.dumps(json.loads(first) | other).encode() + b"\n" + rows)
    assert fault(INPUT, "--output", OUTPUT) == (
        "out.jsonl.journal has rows that another model or an earlier version scored; "
        "use the same model, or remove out.jsonl.journal to start again"
    )


@pytest.mark.parametrize("rest", [b"", b'{"file": "in.js'])
def test_journal_of_another_model_without_a_row_is_started_again(
    rest: bytes, command: Callable[..., None]
) -> None:
    write(some_records(3))
    JOURNAL.write_bytes(b'{"model": "other"}\n' + rest)
    command(INPUT, "--output", OUTPUT)
    assert len(lines()) == 3


def test_another_spelling_of_the_path_is_named(journal: bytes, fault: Callable[..., str]) -> None:
    JOURNAL.write_bytes(journal)
    path = INPUT.resolve()
    assert fault(path, "--output", OUTPUT) == (
        f"{path}: line 1 was scored as in.jsonl; "
        "use the same path, or remove out.jsonl.journal to start again"
    )


def test_two_processes_cannot_write_one_output(journal: bytes, fault: Callable[..., str]) -> None:
    JOURNAL.write_bytes(journal)
    with LOCK.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message = fault(INPUT, "--output", OUTPUT)
    assert message.startswith(
        "out.jsonl.journal is in use by another process that writes out.jsonl"
    )
    assert JOURNAL.read_bytes() == journal
    assert LOCK.exists()


def test_lock_removed_before_it_is_held_counts_as_in_use(
    journal: bytes, fault: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may exit and remove the lock before this one holds it."""
    JOURNAL.write_bytes(journal)
    monkeypatch.setattr(fcntl, "flock", lambda *_: LOCK.unlink(missing_ok=True))
    message = fault(INPUT, "--output", OUTPUT)
    assert message.startswith(
        "out.jsonl.journal is in use by another process that writes out.jsonl"
    )
    assert JOURNAL.read_bytes() == journal


def test_no_lock_file_is_left(command: Callable[..., None], fault: Callable[..., str]) -> None:
    write(some_records(3))
    command(INPUT, "--output", OUTPUT)
    assert not [path for path in Path().iterdir() if path.name.startswith("out.jsonl.")]
    JOURNAL.write_bytes(b'{"model": "other"}\n{}\n')
    assert "another model" in fault(INPUT, "--output", OUTPUT)
    assert not LOCK.exists()


def test_file_system_without_locks_is_reported(
    journal: bytes, fault: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    JOURNAL.write_bytes(journal)
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert fault(INPUT, "--output", OUTPUT) == (
        "out.jsonl.journal.lock cannot be locked because its file system has no locks (No locks "
        "available); expected . on a local disk, or on one that is mounted with flock"
    )
    assert JOURNAL.read_bytes() == journal


def test_output_below_a_file_is_reported(fault: Callable[..., str]) -> None:
    write([{"prompt": "a", "answer": "b"}])
    Path("other").touch()
    assert fault(INPUT, "--output", "other/out.jsonl").startswith("other cannot be written: ")


def test_full_disk_is_reported_and_loses_no_row(
    command: Callable[..., None], journal: bytes, fault: Callable[..., str]
) -> None:
    expected = OUTPUT.read_bytes()
    OUTPUT.unlink()
    for path, size in (
        (JOURNAL, 10),
        (JOURNAL, len(journal) // 2),
        (JOURNAL, len(journal) - 1),
        (OUTPUT, len(expected) - 1),
    ):
        if path == OUTPUT:
            JOURNAL.write_bytes(journal)
        with file_size_limit(size):
            message = fault(INPUT, "--output", OUTPUT)
        assert message == (
            f"{path} cannot be written: File too large; free some space, "
            "then run the same command again"
        )
        assert not [*Path().glob("*.partial"), *Path().glob("out.jsonl")]
    command(INPUT, "--output", OUTPUT)
    assert OUTPUT.read_bytes() == expected


@pytest.fixture
def start() -> Iterator[Callable[[str], Forked]]:
    """Score in a separate process, a few records at a time."""
    started: list[Forked] = []

    def score_to(output: str) -> Forked:
        started.append(Forked(score_files, 2000, str(INPUT), "--output", output))
        return started[-1]

    yield score_to
    for process in started:
        process.end()


def test_killed_process_loses_and_duplicates_nothing(start: Callable[[str], Forked]) -> None:
    write(some_records(600))
    killed = start(str(OUTPUT))
    while not (JOURNAL.exists() and JOURNAL.stat().st_size > 1000):
        assert killed.returncode is None, killed.communicate()
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = JOURNAL.stat().st_size
    assert not OUTPUT.exists()
    resumed, undisturbed = start(str(OUTPUT)), start("undisturbed.jsonl")
    for process in (resumed, undisturbed):
        printed, errors = process.communicate()
        assert process.returncode == 0, errors
    assert "; already scored: 0" in printed
    assert OUTPUT.read_bytes() == Path("undisturbed.jsonl").read_bytes()
    assert 0 < done < OUTPUT.stat().st_size
    assert [row["extra"]["index"] for row in lines()] == list(range(600))


def test_two_processes_continue_what_one_began(journal: bytes) -> None:
    expected = OUTPUT.read_bytes()
    OUTPUT.unlink()
    JOURNAL.write_bytes(b"".join(journal.splitlines(keepends=True)[:16]))
    found = run_in_group(2, score_files, 400, str(INPUT), "--output", str(OUTPUT))
    require_done(found)
    assert OUTPUT.read_bytes() == expected
    assert not found[0][1].splitlines()[1].endswith("already scored: 0")


# --- faults ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ('{"prompt": "a"}', "missing_key: has the key prompt, expected 'answer', 'answers', or"),
        (
            '{"prompt": "a", "answer": "b", "ranks": []}',
            "taken_key: has the key 'ranks', which the output needs; rename or remove it",
        ),
        (
            '{"prompt": "a", "answer": "b", "x": NaN}',
            "not_json: 'x' cannot be written as JSON (Out of range float values",
        ),
        (
            '{"prompt": "a", "answer": "b", "x": ["\\ud800"]}',
            "not_json: 'x' cannot be written as JSON ('utf-8' codec can't encode character",
        ),
        ("3", "wrong_type: is a number, expected an object"),
        (
            '{"prompt": [{"role": "system", "content": "b"}], "answer": "c"}',
            "needs_chat: has a system message, but only preprocess.template chat, or "
            "one with {system}, can render it",
        ),
    ],
)
def test_bad_record_is_reported(record: str, sentence: str, fault: Callable[..., str]) -> None:
    INPUT.write_text(f'{{"prompt": "a", "answer": "b"}}\n{record}\n')
    assert fault(INPUT, "--output", OUTPUT).startswith(f"in.jsonl: line 2: {sentence}")
    assert not OUTPUT.exists()


def test_text_that_is_too_long_is_reported(fault: Callable[..., str]) -> None:
    write([{"prompt": "a", "answer": "b"}, {"prompt": "a", "answers": ["b", "1" * 3000]}])
    assert fault(INPUT, "--output", OUTPUT) == (
        "in.jsonl: line 2: over_length: the text has 3007 tokens, expected at most 2040"
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"c", "Object of type bytes is not JSON serializable"),
        (datetime(2026, 1, 1), "Object of type datetime is not JSON serializable"),
        ({"y": [float("nan")]}, "Out of range float values are not JSON compliant"),
    ],
)
def test_column_of_parquet_that_is_not_json_is_named(
    value: Any, reason: str, fault: Callable[..., str]
) -> None:
    record = {"prompt": "a", "answer": "b", "x": value}
    pyarrow.parquet.write_table(pa.Table.from_pylist([record]), "in.parquet")
    message = fault("in.parquet", "--output", OUTPUT)
    assert message.startswith(
        f"in.parquet: row 1: not_json: 'x' cannot be written as JSON ({reason}"
    )
    assert message.endswith(
        "), expected texts, finite numbers, or lists and objects of them; convert that column or "
        "remove it"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["in.jsonl", "--output", "in.jsonl"],
            "--output is in.jsonl, which is part of the input; choose another path",
        ),
        (
            ["data/raw", "--output", "data/raw/out.jsonl"],
            "--output is data/raw/out.jsonl, which is part of the input; choose another path",
        ),
        (
            ["in.jsonl", "--output", "out.csv"],
            "--output is out.csv, expected a file that ends in .jsonl or .parquet",
        ),
        (
            ["in.jsonl", "--output", "/dev/null"],
            "--output is /dev/null, expected a file that ends in .jsonl or .parquet",
        ),
        (
            ["in.jsonl", "--output", "full.jsonl"],
            "--output is full.jsonl, a link to /dev/full, expected a file that ends in .jsonl or "
            ".parquet",
        ),
        (
            ["in.jsonl", "--output", "pipe.jsonl"],
            "--output is pipe.jsonl, which is not a regular file; choose another path",
        ),
        (
            ["loop.jsonl", "--output", "out.jsonl"],
            "loop.jsonl does not exist, expected a file or a folder of preference pairs",
        ),
        (
            ["none.jsonl", "--output", "out.jsonl"],
            "none.jsonl does not exist, expected a file or a folder of preference pairs",
        ),
        (
            [NOT_UTF_8, "--output", "out.jsonl"],
            f"the path {SHOWN} is not UTF-8, expected one that is; rename the file or its folder",
        ),
        (
            ["in.jsonl", "--output", NOT_UTF_8],
            f"the path {SHOWN} is not UTF-8, expected one that is; rename the file or its folder",
        ),
    ],
)
def test_bad_path_is_reported_before_the_model_is_loaded(
    arguments: list[str],
    sentence: str,
    fault: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(score, "Scorer")
    write(some_records(2))
    write(some_records(2), Path(NOT_UTF_8))
    os.mkfifo("pipe.jsonl")
    Path("full.jsonl").symlink_to("/dev/full")
    Path("loop.jsonl").symlink_to("loop.jsonl")
    before = sorted(Path().rglob("*"))
    assert fault(*arguments) == sentence
    assert sorted(Path().rglob("*")) == before


def test_output_that_is_a_link_to_itself_is_reported(fault: Callable[..., str]) -> None:
    write(some_records(2))
    OUTPUT.symlink_to(OUTPUT)
    assert fault(INPUT, "--output", OUTPUT) == (
        f"--output is out.jsonl, a link to {OUTPUT.absolute()}, which is not a regular file; "
        "choose another path"
    )


def test_folder_that_is_not_an_export_is_reported(
    fault: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "Scorer", Scorer)
    write(some_records(1))
    message = fault(INPUT, "--output", OUTPUT, "--model", "data")
    assert (
        message == "data is not an exported folder, expected one such as models/export of dvc repro"
    )
    assert not JOURNAL.exists()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_rows_and_output_are_on_the_disk(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync = [], os.fsync

    def noting(file: int) -> None:
        synced.append(Path(f"/proc/self/fd/{file}").readlink().name)
        sync(file)

    monkeypatch.setattr(os, "fsync", noting)
    write(some_records(3))
    command(INPUT, "--output", OUTPUT)
    assert {*synced} == {JOURNAL.name, f"{OUTPUT}.partial"}
    assert synced[-1] == f"{OUTPUT}.partial"


def test_journal_with_other_columns_is_refused(
    command: Callable[..., None], fault: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(some_records())
    with monkeypatch.context() as patch:
        patch.setattr(score, "publish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command(INPUT, "--output", OUTPUT)
    monkeypatch.setattr(score, "ADDED", (*score.ADDED[:2], "chances"))
    found = fault(INPUT, "--output", OUTPUT)
    assert "has rows that another model or an earlier version scored" in found
