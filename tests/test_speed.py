"""The speed benchmark: its workload, its contenders and its report."""

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import vl_convert
from transformers import AutoTokenizer

from benchmarks.speed import __main__ as speed
from benchmarks.speed import measuring
from benchmarks.speed.contenders import article, contenders, ours, scoring
from benchmarks.speed.floor import by_onednn, floor, floor_of_scoring
from benchmarks.speed.hardware import CPU, IN_BF16
from benchmarks.speed.measuring import Contender, Measurement, Row, measure
from benchmarks.speed.report import VEGA_LITE, chart, compared, table
from benchmarks.speed.workload import (
    ANSWER,
    PREFIX,
    Workload,
    drawn,
    generated,
    lengths,
    prepare,
    usable_ids,
)
from reward.data.prefixes import prefix_length
from reward.data.tokens import Encoder, Template
from reward.model.packing import Texts, tokens
from reward.process import Fault


def row(label: str, *seconds: float, losses: tuple[float, ...] = (0.7, 0.6)) -> Row:
    """A row with one measurement per time, each of 16 pairs with 200 tokens."""
    found = [Measurement(16, each, 3200, 0.5, 0.75, list(losses)) for each in seconds]
    return Row(label, "floor", found, "")


ROWS = {
    "ours": row("ours", 2.0, 1.0, 4.0),
    "trl-8": row("TRL, batch 8", 8.0, 8.0, 16.0),
    "article": Row("the article's loop", "floor", [], "OutOfMemoryError: 1|2"),
    "floor": row("floor", 0.5, 1.0, 1.0, losses=()),
}


def test_lengths_match_the_percentiles_and_never_decrease() -> None:
    shares = np.linspace(0, 1, 1001)
    for quantiles in (PREFIX, ANSWER):
        assert lengths(quantiles, list(quantiles)) == list(quantiles.values())
        found = lengths(quantiles, shares)
        assert found == sorted(found)


def test_generated_pairs_have_the_percentiles_of_a_preference_set() -> None:
    pairs = generated(256, 2, 0, range(100), longest=2040)
    answers = [len(ids) - texts.prefix for texts in pairs for ids in texts.ids]
    prefix, answer = (
        np.quantile(sizes, [0.5, 0.9, 0.99])
        for sizes in ([texts.prefix for texts in pairs], answers)
    )
    assert prefix == pytest.approx([98, 273, 542], rel=0.05)
    assert answer == pytest.approx([30, 95, 220], rel=0.05)


@pytest.mark.parametrize("answers", [2, 3])
def test_generated_answers_share_exactly_their_prefix(answers: int) -> None:
    for texts in generated(300, answers, 1, [5, 7, 11], longest=64):
        assert len(texts.ids) == answers
        for one, other in combinations(texts.ids, 2):
            assert prefix_length(one, other) == texts.prefix > 0
        assert max(map(len, texts.ids)) <= 64
        assert {id_ for ids in texts.ids for id_ in ids} <= {5, 7, 11}


def test_generated_pairs_depend_only_on_their_seed() -> None:
    first, same, other = (generated(8, 2, seed, range(50), 99) for seed in (3, 3, 4))
    assert first == same != other


def test_special_ids_are_not_drawn(tiny_base: Path) -> None:
    assert 4092 in (ids := usable_ids(tiny_base))
    assert 4093 not in ids  # <|endoftext|>, which is also the pad token


def test_pairs_are_drawn_from_files_as_preprocess_reads_them(
    tiny_base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.jsonl"
    record = {"question": "Why?", "answers": ["No.", "Because.", "So."], "ranks": [3, 1, 2]}
    path.write_text(f"{json.dumps(record)}\n" * 2)
    options = Namespace(data=path, template="zh", seed=0, prompts=2)
    encoder = Encoder(tiny_base, Template.of("zh", False, 99, tiny_base))
    first, second = drawn(options, tiny_base, longest=99)
    assert first == second
    assert [*first.ids] == encoder.encode(["问:Why?\n\n答:Because.", "问:Why?\n\n答:No."])
    bad = record | {"question": ""}, record | {"answers": ["A.", "A."], "ranks": [1, 1]}
    path.write_text("".join(f"{json.dumps(each)}\n" for each in (record, *bad)))
    with pytest.raises(Fault, match=r"has 1 usable pair of .*\(a bad record: 'prompt' is empty\)"):
        drawn(options, tiny_base, longest=99)


def test_chat_template_of_a_base_is_found_beside_its_tokenizer(
    tiny_base: Path, tmp_path: Path
) -> None:
    """As on the Hub; `fetch` writes it to the tokenizer's configuration."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    template = "{% for each in messages %}<{{ each.content }}>{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}\n')
    options = Namespace(data=path, template="chat", seed=0, prompts=1)
    [texts] = drawn(options, base, longest=99)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.decode([*texts.ids[0]]) == "<Why?><Because.>"


def test_table_has_medians_ratios_and_shares() -> None:
    lines = table(ROWS).splitlines()
    assert lines[2].startswith("| ours | 8.00 | 4.00 to 16.00 | 1.00 | 200.0 | 0.75 | 0.50 | 50% |")
    assert lines[3] == (
        "| TRL, batch 8 | 2.00 | 1.00 to 2.00 | 4.00 | 200.0 | 0.75 | 0.50 | 12% | 0.6000000 |"
    )
    assert lines[4].startswith("| the article's loop | OutOfMemoryError: 1/2 | – |")
    assert {line.count("|") for line in lines} == {10}


def test_table_handles_missing_measurements() -> None:
    line = table({"trl-8": ROWS["trl-8"]}).splitlines()[2]
    assert (
        line == "| TRL, batch 8 | 2.00 | 1.00 to 2.00 | – | 200.0 | 0.75 | 0.50 | – | 0.6000000 |"
    )
    assert compared({"trl-8": ROWS["trl-8"]}) == []


def test_best_trl_row_and_onednn_floor_are_compared() -> None:
    more = {"trl-1": row("TRL, batch 1 x 8", 4.0), "floor-onednn": row("by oneDNN", 0.8)}
    best, share = compared(ROWS | more)
    assert '"TRL, batch 1 x 8" with 4.00 pairs/s. This project is 2.00 times as fast' in best
    assert share.endswith("This project reaches 40% of the speed of the bare products by oneDNN.")


def test_rows_in_bf16_are_compared_with_ours_in_bf16() -> None:
    ours, theirs, products = (
        replace(row(label, seconds), floor="floor-bf16")
        for label, seconds in (("ours, bf16", 1.0), ("TRL, bf16", 4.0), ("products", 0.5))
    )
    rows = {**ROWS, "ours-bf16": ours, "trl-1-bf16": theirs, "floor-bf16": products}
    fp32, bf16 = compared(rows)
    assert 'TRL row is "TRL, batch 8" with 2.00 pairs/s. This project is 4.00 times as fast' in fp32
    assert (
        'TRL row in bf16 is "TRL, bf16" with 4.00 pairs/s. This project is 4.00 times as fast'
        in bf16
    )
    lines = table(rows).splitlines()
    assert lines[6].startswith("| ours, bf16 | 16.00 | 16.00 to 16.00 | 1.00 |")
    assert lines[7].startswith(
        "| TRL, bf16 | 4.00 | 4.00 to 4.00 | 4.00 | 200.0 | 0.75 | 0.50 | 12%"
    )
    assert "TRL, bf16" in vl_convert.vegalite_to_svg(chart(rows), vl_version=VEGA_LITE)


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_is_also_measured_if_the_processor_supports_it(supported: bool) -> None:
    names = contenders(replace(CPU, also_bf16=supported), answers=2, prompts_per_step=8)
    in_bf16 = {name for name, row in names.items() if "bf16" in name or row.floor == "floor-bf16"}
    trl = {f"trl-{batch}-bf16{more}" for batch in (8, 1) for more in ("", "-checkpointing")}
    assert in_bf16 == ({"ours-bf16", "floor-bf16", *trl} if supported else set())


@pytest.mark.parametrize(
    ("answers", "prompts_per_step", "labels"),
    [
        (2, 8, ["TRL, batch 8", "TRL, batch 1 x 8"]),
        (4, 4, ["TRL, batch 8 x 3", "TRL, batch 1 x 24"]),
        (7, 4, ["TRL, batch 7 x 12", "TRL, batch 1 x 84"]),
    ],
)
def test_trl_batches_add_up_to_our_steps(
    answers: int, prompts_per_step: int, labels: list[str]
) -> None:
    rows = contenders(CPU, answers, prompts_per_step)
    assert [rows[name].label for name in ("trl-8", "trl-1")] == labels
    assert ("ours-by-pairs" in rows) == (answers > 2)


def test_chart_can_be_drawn() -> None:
    drawn = vl_convert.vegalite_to_svg(chart(ROWS), vl_version=VEGA_LITE)
    assert "TRL, batch 8" in drawn
    assert "article" not in drawn


def test_failing_contender_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def fail(_: Workload) -> Measurement:
        calls.append("broken")
        raise MemoryError("no more\nat all")

    def succeed(_: Workload) -> Measurement:
        calls.append("whole")
        return ROWS["ours"].measurements[0]

    monkeypatch.setattr(measuring, "alone", lambda work: work())
    chosen = {"broken": Contender("broken", fail), "whole": Contender("whole", succeed)}
    rows = measure(workload(Path(), []), chosen, repeats=2)
    assert calls == ["broken", "whole", "whole"]
    assert rows["broken"] == Row("broken", "floor", [], "MemoryError: no more")
    assert len(rows["whole"].measurements) == 2
    assert "1/4 repeat 1 broken: MemoryError: no more\n" in capsys.readouterr().err


def workload(base: Path, pairs: list[Texts]) -> Workload:
    return Workload(
        base, base, base, pairs, [(8, 4), (4, 8)], tokens_per_pack=64, prompts_per_step=8
    )


def test_floor_covers_all_steps_except_the_first() -> None:
    pairs = [Texts(([1, 2, 3], [1, 2, 4, 5]), 2)] * 24
    in_half = partial(floor, multiply=by_onednn, dtype=torch.bfloat16)
    for products in (floor, in_half, floor_of_scoring):
        found = products(workload(Path(), pairs))
        assert (found.pairs, found.tokens) == (16, 16 * 5)
        assert found.seconds > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompts", "20"], "--prompts is 20, expected a multiple of 8"),
        (
            ["--prompts", "36", "--prompts-per-step", "8"],
            "--prompts is 36, expected a multiple of 8",
        ),
        (
            ["--answers", "3", "--data", "pairs.json"],
            "--answers is 3, expected at least 2, and exactly 2",
        ),
        (["--repeats", "0"], "--repeats is 0, expected at least 1"),
        (["--tokens-per-pack", "-1"], "--tokens-per-pack is -1, expected at least 1"),
        (["--only", "ours", "theirs"], "--only names theirs, expected some of ours, "),
        (["--only", "trl", "--prompts", "3"], "--only names trl, expected some of ours, "),
        (["--only", "ours", "--base", "/nowhere"], "/nowhere/config.json does not exist"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["speed", *arguments])
    with pytest.raises(Fault) as fault:
        speed.parse()
    assert str(fault.value).startswith(sentence)


def test_only_measured_batches_need_enough_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step is not counted, so a batch needs prompts for two steps."""
    monkeypatch.setattr(speed, "HARDWARE", replace(CPU, trl_batches=(8, 64)))
    enough = ["speed", "--prompts", "16", "--only", "ours", "trl-8"]
    monkeypatch.setattr("sys.argv", enough)
    assert speed.parse().prompts == 16
    monkeypatch.setattr("sys.argv", [*enough, "trl-64"])
    with pytest.raises(Fault, match="--prompts is 16, expected a multiple of 8 and at least 128,"):
        speed.parse()


def options_for(base: Path, prompts: int, answers: int) -> Namespace:
    return Namespace(
        base=base,
        data=None,
        prompts=prompts,
        prompts_per_step=4 if answers == 4 else 8,
        answers=answers,
        seed=0,
        tokens_per_pack=512,
    )


@pytest.mark.filterwarnings("ignore")
def test_rankings_and_single_pairs_compute_the_same_losses(tiny_base: Path, tmp_path: Path) -> None:
    same = prepare(options_for(tiny_base, prompts=8, answers=4), tmp_path)
    whole, by_pairs = ours(same), ours(same, by_pairs=True)
    assert len(whole.losses) == 2
    assert by_pairs.losses == pytest.approx(whole.losses, abs=1e-5)
    assert whole.pairs == by_pairs.pairs == 4 * 6
    assert whole.tokens == sum(map(tokens, same.prompts[4:]))
    assert by_pairs.tokens == sum(
        texts.prefix + sum(len(ids) - texts.prefix for ids in pair)
        for texts in same.prompts[4:]
        for pair in combinations(texts.ids, 2)
    )
    assert scoring(same).tokens == whole.tokens
    assert scoring(same, by_pairs=True).tokens == by_pairs.tokens


@pytest.mark.filterwarnings("ignore")  # library warnings, which the benchmark also gets
def test_ours_and_the_article_loop_compute_the_same_losses(tiny_base: Path, tmp_path: Path) -> None:
    same = prepare(options_for(tiny_base, prompts=24, answers=2), tmp_path)
    own, checkpointed, other = (
        contender(same) for contender in (ours, partial(ours, checkpointing=True), article)
    )
    assert len(own.losses) == 3
    assert checkpointed.losses == pytest.approx(own.losses, abs=1e-5)
    assert other.losses == pytest.approx(own.losses, abs=1e-5)
    half = ours(same, quantization=IN_BF16)
    assert half.losses == pytest.approx(own.losses, abs=0.02)
    assert half.losses != own.losses
    assert own.pairs == other.pairs == half.pairs == 16
    assert own.tokens == sum(sum(map(len, texts.ids)) - texts.prefix for texts in same.prompts[8:])
    assert other.tokens == sum(len(ids) for texts in same.prompts[8:] for ids in texts.ids)
