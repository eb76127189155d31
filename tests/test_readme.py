"""The README says what is true: its commands, files and figures, in both languages."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
LANGUAGES = ("README.md", "README.zh.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in LANGUAGES}
PARAMS: dict[str, Any] = YAML(typ="safe").load(ROOT / "params.yaml")
EVALUATED: dict[str, Any] = json.loads((ROOT / "metrics/evaluate.json").read_text())


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_make_target_exists(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = set(re.findall(r"make ([a-z]+)", TEXTS[name]))
    assert {"repro", "test", "check", "help"} <= called
    assert called <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_param_exists(name: str) -> None:
    keys = set(re.findall(r"-S '?([a-z]+\.[a-z_]+)", TEXTS[name]))
    keys |= set(re.findall(rf"`((?:{'|'.join(PARAMS)})\.[a-z_]+)[`=]", TEXTS[name]))
    assert len(keys) > 10
    for key in keys:
        group, field = key.split(".")
        assert field in PARAMS[group], key


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_module_that_is_run_exists(name: str) -> None:
    for module in re.findall(r"python -m ([a-z0-9_.]+)", TEXTS[name]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_link_leads_to_a_file(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_tree_is_the_folder(name: str) -> None:
    tree = next(block for block in blocks(TEXTS[name], "") if block.startswith("stages/"))
    shown = set(re.findall(r"([a-z]+\.py)", tree))
    files = {path.name for path in (ROOT / "stages").glob("*.py")} - {"__init__.py"}
    assert shown == files


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_figures_are_those_of_the_committed_run(name: str) -> None:
    rows = [
        ("all", EVALUATED | {"low": EVALUATED["accuracy_low"], "high": EVALUATED["accuracy_high"]})
    ]
    rows += list(EVALUATED["by"]["language"].items())
    for label, figures in rows:
        line = (
            f"| {label} | {figures['accuracy']:.3f} | "
            f"{figures['low']:.3f} to {figures['high']:.3f} |"
        )
        assert line in TEXTS[name]
    for kind, figures in EVALUATED["by"]["kind"].items():
        assert f"| {kind} | {figures['accuracy']:.3f} |" in TEXTS[name]


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_key_of_the_evaluation_is_described_and_no_other(name: str) -> None:
    keys = {key for key in EVALUATED if key not in ("calibration", "length")}
    keys |= {f"{group}.{key}" for group in ("calibration", "length") for key in EVALUATED[group]}
    [table] = re.findall(r"^\| (?:key|键) \|.*?\n\n", TEXTS[name], re.DOTALL | re.MULTILINE)
    cells = [line.split("|")[1] for line in table.strip().splitlines()[2:]]
    assert {key for cell in cells for key in re.findall("`(.+?)`", cell)} == keys


def test_both_languages_show_the_same_commands_and_tables() -> None:
    english, chinese = (TEXTS[name] for name in LANGUAGES)
    for language in ("sh", "json", "mermaid"):
        assert blocks(english, language) == blocks(chinese, language)
    figures = re.compile(r"\d+\.\d+")
    assert sorted(figures.findall(english)) == sorted(figures.findall(chinese))
    assert len(re.findall("^## ", english, re.MULTILINE)) == len(
        re.findall("^## ", chinese, re.MULTILINE)
    )


def test_the_default_run_is_good_enough_to_show() -> None:
    assert EVALUATED["accuracy"] >= 0.70
    for figures in EVALUATED["by"]["language"].values():
        assert figures["low"] > 0.5
