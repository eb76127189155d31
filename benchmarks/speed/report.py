"""The results: a table, the raw figures and a chart, with the conditions of the measurement."""

import argparse
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import vl_convert

from benchmarks import markdown
from benchmarks.speed.hardware import HARDWARE
from benchmarks.speed.measuring import Row
from benchmarks.speed.workload import PROMPTS_PER_STEP, SHAPE, Workload
from reward.outputs import read_json, write_json

RESULTS = Path("benchmarks/results")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl")
VEGA_LITE = "5.21"
COLORS = {"ours": "#1f5a8f", "trl": "#c2763c", "article": "#8a8a8a", "floor": "#cfd6dc"}
INK = "#222222"


def describe(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """The conditions of the measurement."""
    config = read_json(workload.base / "config.json")
    answers = [len(ids) - texts.prefix for texts in workload.prompts for ids in texts.ids]
    return {
        "hardware": HARDWARE.describe(),
        "threads": options.threads,
        "base": options.base.name if options.base else "random",
        "shape": {name: config[name] for name in ("model_type", *SHAPE) if name in config},
        "data": options.data.name if options.data else f"generated with seed {options.seed}",
        "prompts": len(workload.prompts),
        "answers": workload.answers,
        "pairs_per_prompt": workload.pairs_per_prompt,
        "prompts_per_step": workload.prompts_per_step,
        "pairs_per_step": workload.pairs_per_step,
        "prefix": percentiles([texts.prefix for texts in workload.prompts]),
        "answer": percentiles(answers),
        "tokens_per_pack": workload.tokens_per_pack,
        "repeats": options.repeats,
        "versions": {name: version(name) for name in LIBRARIES if find_spec(name)},
    }


def name_of(settings: dict[str, Any]) -> str:
    """The file name: hardware, and what is not the default of base, answers and step."""
    base = "" if settings["base"] == "random" else f"-{settings['base']}"
    answers, step = settings["answers"], settings["prompts_per_step"]
    many = f"-{answers}-answers" if answers > 2 else ""
    larger = f"-steps-of-{step}" if step != PROMPTS_PER_STEP else ""
    return f"{HARDWARE.name}{base}{many}{larger}"


def many_answers(settings: dict[str, Any]) -> list[str]:
    """How pairs/s and prompts/s are related, if a prompt has several pairs."""
    pairs = settings["pairs_per_prompt"]
    return [f"- all pairs of answers are compared: prompts/s is pairs/s divided by {pairs}"] * (
        pairs > 1
    )


def percentiles(sizes: list[int]) -> list[int]:
    """The sizes at the 50th, 90th and 99th percentile."""
    found: list[int] = np.quantile(sizes, [0.5, 0.9, 0.99], method="nearest").tolist()
    return found


def as_markdown(settings: dict[str, Any], rows: dict[str, Row]) -> str:
    """The table, the conditions of the measurement, and how to read the table."""
    prefix, answer = ("/".join(map(str, settings[name])) for name in ("prefix", "answer"))
    shape = ", ".join(f"{name} {value}" for name, value in settings["shape"].items())
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    lines = [
        f"# Training speed on {HARDWARE.name.upper()}",
        "Written by `python -m benchmarks.speed`, which says what is measured and how.",
        f"![Pairs per second, and tokens computed per pair]({name_of(settings)}.svg)",
        "\n".join(
            [
                f"- {settings['hardware']}, threads: {settings['threads']}",
                f"- base: {settings['base']} ({shape})",
                f"- {settings['prompts']} prompts with {settings['answers']} answers, "
                f"{settings['data']}; tokens at the 50th/90th/99th percentile: prefix {prefix}, "
                f"answer {answer}",
                *many_answers(settings),
                f"- {settings['pairs_per_step']} pairs per step, excluding the first step; at most "
                f"{settings['tokens_per_pack']} tokens in a pack of this project",
                f"- medians and ranges; measurements per row: {settings['repeats']}, each in a "
                "fresh process, alternating between the rows",
                f"- {versions}",
            ]
        ),
        table(rows),
        *compared(rows),
        "The bare products are the matrix products of the base's linear layers for the tokens of "
        "this project's packs: forward, and for the gradients of the layers' inputs; for scoring "
        "only forward. A row's share is its speed divided by theirs.",
        HARDWARE.note,
    ]
    return "\n\n".join(lines) + "\n"


def table(rows: dict[str, Row]) -> str:
    """One row per contender, with its error if it has no figures."""
    heads = [
        *("", "pairs/s", "range", "this project is ... times as fast", "tokens computed per pair"),
        *("peak memory, GB", "before the first step, GB", "share of the bare products"),
        "loss of the last step",
    ]
    return markdown.table(heads, [cells(row, rows) for row in rows.values()])


def cells(row: Row, rows: dict[str, Row]) -> list[str]:
    none = "–"
    if not row.measurements:
        return [row.label, row.error.replace("|", "/"), *[none] * 7]
    speeds = [each.speed for each in row.measurements]
    peak, before = (
        median(getattr(each, name) for each in row.measurements)
        for name in ("memory_peak", "memory_before")
    )
    curve = row.measurements[-1].losses
    ours, floor = rows.get(ours_of(row)), rows.get(row.floor)
    return [
        row.label,
        f"{row.speed:.2f}",
        f"{min(speeds):.2f} to {max(speeds):.2f}",
        f"{ours.speed / row.speed:.2f}" if ours and ours.measurements and curve else none,
        f"{row.tokens_per_pair:.1f}",
        f"{peak:.2f}",
        f"{before:.2f}",
        f"{row.speed / floor.speed:.0%}" if floor and floor.measurements else none,
        f"{curve[-1]:.7f}" if curve else none,
    ]


def ours_of(row: Row) -> str:
    """The name of this project's row in the same precision."""
    return "ours-bf16" if row.floor == "floor-bf16" else "ours"


def compared(rows: dict[str, Row]) -> list[str]:
    """Sentences about the fastest TRL row in each precision, and about oneDNN."""
    measured = {name: row for name, row in rows.items() if row.measurements}
    sentences = []
    for name, place in (("ours", ""), ("ours-bf16", " in bf16")):
        others = [
            row for key, row in measured.items() if key.startswith("trl") and ours_of(row) == name
        ]
        if name in measured and others:
            best, speed = max(others, key=lambda row: row.speed), measured[name].speed
            sentences += [
                f'The fastest TRL row{place} is "{best.label}" with {best.speed:.2f} pairs/s. This '
                f"project is {speed / best.speed:.2f} times as fast."
            ]
    ours, fast = measured.get("ours"), measured.get("floor-onednn")
    if ours and fast:
        sentences += [
            "PyTorch multiplies with MKL, this project with oneDNN, which is tuned for more "
            "processors, so a share can exceed 100%. This project reaches "
            f"{ours.speed / fast.speed:.0%} of the speed of the bare products by oneDNN."
        ]
    return sentences


def chart(rows: dict[str, Row]) -> dict[str, Any]:
    """The Vega-Lite chart of training: pairs per second, and tokens computed per pair."""
    values = [
        {
            "row": row.label,
            "speed": row.speed,
            "low": min(each.speed for each in row.measurements),
            "high": max(each.speed for each in row.measurements),
            "tokens": row.tokens_per_pair,
            "kind": name.partition("-")[0],
        }
        for name, row in rows.items()
        if row.measurements and row.floor in ("floor", "floor-bf16")
    ]
    across = {
        "mark": {"type": "rule", "color": INK},
        "encoding": {"x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}},
    }
    labels = {"labelLimit": 400, "ticks": False, "domain": False}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "padding": 16,
        "data": {"values": values},
        "hconcat": [
            panel("speed", "high", "pairs per second", ".3~r", labels, [across]),
            panel("tokens", "tokens", "tokens computed per pair", ".0f", None, []),
        ],
        "spacing": 40,
        "config": {"view": {"stroke": None}, "axis": {"grid": False, "tickCount": 5}},
    }


def panel(
    field: str,
    end: str,
    title: str,
    digits: str,
    labels: dict[str, Any] | None,
    across: list[dict[str, Any]],
) -> dict[str, Any]:
    """A bar for each row, the layers drawn `across` it, and its figure to the right of `end`."""
    colors = {"domain": list(COLORS), "range": list(COLORS.values())}
    return {
        "width": 300,
        "height": {"step": 24},
        "encoding": {
            "y": {"field": "row", "type": "nominal", "sort": None, "title": None, "axis": labels}
        },
        "layer": [
            {
                "mark": {"type": "bar", "height": 15},
                "encoding": {
                    "x": {"field": field, "type": "quantitative", "title": title},
                    "color": {"field": "kind", "type": "nominal", "scale": colors, "legend": None},
                },
            },
            *across,
            {
                "mark": {"type": "text", "align": "left", "dx": 5, "color": INK},
                "encoding": {
                    "x": {"field": end, "type": "quantitative"},
                    "text": {"field": field, "format": digits},
                },
            },
        ],
    }


def write(settings: dict[str, Any], rows: dict[str, Row], report: str) -> None:
    """Write the table, the raw figures and the chart."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name_of(settings)}.md"
    raw = {name: asdict(row) for name, row in rows.items()}
    write_json(path.with_suffix(".json"), {"settings": settings, "rows": raw})
    path.with_suffix(".svg").write_text(
        vl_convert.vegalite_to_svg(chart(rows), vl_version=VEGA_LITE), encoding="utf-8"
    )
    path.with_suffix(".md").write_text(report, encoding="utf-8")
