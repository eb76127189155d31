"""The documentation is accurate: its commands, files and figures, in both languages."""

import ast
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ruamel.yaml import YAML

from reward.judging import evaluation
from reward.judging import page as judgements
from reward.serving import queue, serve
from stages import evaluate

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"))
)
ENGLISH = [name for name in PAGES if not name.endswith(".zh.md")]
LANGUAGES = (".md", ".zh.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
PARAMS: dict[str, Any] = YAML(typ="safe").load(ROOT / "params.yaml")
PIPELINE: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")
PRINTED = re.compile(r"  (.+?): (.+?) +(\S+) \((\S+) to (\S+)\) of (\d+) pairs")


def git(*arguments: str) -> str:
    """What a git command prints in the project's folder."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


TRACKED = set(git("ls-files").splitlines())
# From the index, because `make repro` writes other figures on another kind of processor.
EVALUATED: dict[str, Any] = json.loads(git("show", ":metrics/evaluate.json"))
# Numbers in prose and tables; digits in names, such as Qwen2-0.5B, do not count.
NUMBER = re.compile(r"(?<![A-Za-z0-9_.-])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?: (?:million|万))?")
MOST_LINES = 200


def test_files_have_the_same_line_ends_in_every_clone() -> None:
    """git may be set to write CRLF (core.autocrlf), and DVC hashes what is on disk."""
    found = git("check-attr", "text", "eol", "--", *TRACKED).splitlines()
    assert len(found) == 2 * len(TRACKED)
    for path, name, value in (line.split(": ") for line in found):
        if path.startswith(("data/", "tests/bad/data/", "tests/forms/")):
            assert name != "text" or value == "unset"
        else:
            assert (name, value) in (("text", "auto"), ("eol", "lf"))


def blocks(text: str, language: str | None = None) -> list[str]:
    """The code blocks in a language ("" for untagged ones), or all of them."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [code for name, code in found if language in (None, name)]


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, row by row."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", prose(text), flags=re.MULTILINE)
    return [[row.strip("|").split("|") for row in table.splitlines()] for table in found]


def cells(text: str) -> list[list[str]]:
    """The rows of all tables, with stripped cells."""
    return [[cell.strip() for cell in row] for table in tables(text) for row in table]


def numbers(text: str) -> list[float]:
    scale = {"million": 1e6, "万": 1e4}
    found = []
    for match in NUMBER.findall(text):
        digits, _, unit = match.replace(",", "").partition(" ")
        found.append(round(float(digits) * scale.get(unit, 1), 9))
    return found


def with_english_punctuation(chinese: str) -> str:
    """Chinese text with English punctuation around numbers."""
    return chinese.replace("（", " (").replace("）", ")").replace(" 到 ", " to ")


def page(name: str, language: str) -> str:
    """The text of a page, by the English name without its suffix."""
    return TEXTS[name + language]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(name: str) -> Iterator[tuple[str, str]]:
    """The page and the anchor, each possibly empty, of every link within the project."""
    for target in re.findall(r"\]\(([^)]+)\)", prose(TEXTS[name])):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            yield path, anchor


def params_named(text: str) -> set[str]:
    files = r"(?:py|json|md|html|yaml)\b"
    found = re.findall(rf"(?<![\w./])((?:{'|'.join(PARAMS)})\.(?!{files})[a-z_]+)", text)
    return {*found, *re.findall(r"-S '?([a-z]+\.[a-z_]+)", text)}


def tree_of(block: str) -> set[str]:
    """The paths of a tree in which each level is indented by two spaces."""
    paths, above = set(), [""]
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth + 1 :] = [above[depth] + name]
        paths.add(above[depth] + name)
    return paths


def tree(name: str) -> set[str]:
    [block] = [block for block in blocks(TEXTS[name], "") if block.startswith("stages/")]
    return tree_of(block)


# --- names on a page -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_every_make_target_exists(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = set(re.findall(r"make ([a-z]+)", "\n".join(code(name))))
    if name.startswith("README"):
        assert {"repro", "test", "check", "help"} <= called
    assert called <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))


def code(name: str) -> list[str]:
    """All code on a page, in blocks and inline."""
    return blocks(TEXTS[name], "sh") + re.findall("`([^`]+)`", prose(TEXTS[name]))


@pytest.mark.parametrize("name", PAGES)
def test_every_param_exists(name: str) -> None:
    for key in params_named(TEXTS[name]):
        group, field = key.split(".")
        assert field in PARAMS[group], key


@pytest.mark.parametrize("language", LANGUAGES)
def test_many_params_are_named(language: str) -> None:
    pages = [name for name in PAGES if name.endswith(".zh.md") == (language == ".zh.md")]
    assert len(set.union(*(params_named(TEXTS[name]) for name in pages))) > 10


@pytest.mark.parametrize("name", PAGES)
def test_every_module_in_a_command_exists(name: str) -> None:
    for module in re.findall(r"python -m ([a-z0-9_.]+)", TEXTS[name]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("name", PAGES)
def test_every_name_imported_from_the_library_exists(name: str) -> None:
    for block in blocks(TEXTS[name], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("reward"):
                source = (ROOT / f"{str(node.module).replace('.', '/')}.py").read_text()
                for alias in node.names:
                    assert re.search(rf"^(def|class) {alias.name}\b", source, re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_every_path_exists_or_is_written_by_a_stage(name: str) -> None:
    stages = PIPELINE["stages"].values()
    outs = [out for stage in stages for out in (*stage["outs"], *stage.get("metrics", []))]
    paths = [out if isinstance(out, str) else next(iter(out)) for out in outs]
    written = ("models/checkpoints", *paths)
    top = {path.partition("/")[0] for path in TRACKED if "/" in path}
    named = re.findall(r"`([a-z]+/[\w./-]+)`", prose(TEXTS[name]))
    for path in [path for path in named if path.partition("/")[0] in top | {"reports"}]:
        assert (ROOT / path).exists() or path.startswith(written), path


@pytest.mark.parametrize("name", PAGES)
def test_every_link_points_to_a_file_and_a_heading(name: str) -> None:
    for target, anchor in links(name):
        path = ((ROOT / name).parent / target).resolve()
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.parametrize("name", PAGES)
def test_links_stay_in_their_language_except_one_to_the_other(name: str) -> None:
    here = (ROOT / name).parent
    found = [(here / target).resolve().relative_to(ROOT).as_posix() for target, _ in links(name)]
    chinese = name.endswith(".zh.md")
    other = name.replace(".zh.md", ".md") if chinese else name.replace(".md", ".zh.md")
    across = [page for page in found if page in PAGES and page.endswith(".zh.md") != chinese]
    assert across == [other]


@pytest.mark.parametrize("failing", [False, True])
def test_job_of_slurm_trains_on_all_cores_and_ends_if_training_fails(
    tmp_path: Path, failing: bool
) -> None:
    """With stand-ins for the programs. `srun` does not pass on the cores that sbatch was given."""
    [job] = [code for code in blocks(page("docs/distributed", ".md"), "sh") if "#SBATCH" in code]
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    programs = {
        "scontrol": "echo head; echo other",
        "dvc": 'echo "dvc $* on $PET_NNODES at $PET_RDZV_ENDPOINT"',
        "python": 'echo "python $* on $PET_NNODES at $PET_RDZV_ENDPOINT"',
        "srun": 'echo "$1"; shift; SLURM_PROCID=0 "$@"; SLURM_PROCID=1 "$@"; exit $STATUS',
    }
    for name, program in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
        "STATUS": f"{failing:d}",
    }
    done = subprocess.run(
        ["bash", "-c", job], cwd=tmp_path, env=os.environ | slurm, capture_output=True, text=True
    )
    assert done.returncode == failing
    assert done.stdout.splitlines() == [
        "--cpus-per-task=64",
        "dvc repro train on 2 at head:29400",
        "python -m stages.train on 2 at head:29400",
        *([] if failing else ["dvc repro on 1 at head:29400"]),
    ]


@pytest.mark.parametrize("language", LANGUAGES)
def test_readme_links_to_every_page(language: str) -> None:
    found = {target for target, _ in links(f"README{language}")}
    assert {name for name in PAGES if name.startswith("docs/")} & found == {
        name.replace(".md", language) for name in ENGLISH if name.startswith("docs/")
    }


# --- the trees -------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_tree_in_the_readme_matches_the_folder(language: str) -> None:
    shown = tree(f"README{language}")
    hidden = {".ci", ".dvc", ".github"}
    folders = {f"{path.partition('/')[0]}/" for path in TRACKED if "/" in path}
    packages = {f"{path.parent.relative_to(ROOT)}/" for path in (ROOT / "reward").glob("*/*.py")}
    assert shown == folders - {f"{name}/" for name in hidden} | packages


@pytest.mark.parametrize("language", LANGUAGES)
def test_tree_of_modules_matches_the_code(language: str) -> None:
    shown = {path for path in tree(f"docs/architecture{language}") if not path.endswith("/")}
    files = [path for folder in ("stages", "reward") for path in (ROOT / folder).rglob("*.py")]
    assert shown == {path.relative_to(ROOT).as_posix() for path in files} - {
        path for path in TRACKED if path.endswith("__init__.py")
    }


# --- figures ---------------------------------------------------------------------------------


def printed(language: str) -> str:
    """The output of evaluate for the committed run, as shown in the README."""
    [block] = [each for each in blocks(page("README", language), "") if each.startswith("read ")]
    return block


def slices(language: str) -> dict[str, dict[str, list[float]]]:
    """Accuracy and its interval by column and value, as printed."""
    found: dict[str, dict[str, list[float]]] = {}
    for column, value, *figures, _ in PRINTED.findall(printed(language)):
        found.setdefault(column, {})[value] = [float(each) for each in figures]
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_figures_match_the_committed_run(language: str) -> None:
    lines = {line.split()[0]: line for line in printed(language).splitlines()}
    accuracy, low, high = (EVALUATED[name] for name in ("accuracy", "low", "high"))
    assert lines["accuracy"] == (
        f"accuracy   {accuracy:.4f} (95% interval {low:.4f} to {high:.4f}), "
        f"{EVALUATED['test/equal_rewards']} with equal rewards"
    )
    loss, margin = (EVALUATED[name] for name in ("loss", "test/margin"))
    assert lines["loss"].startswith(f"loss       {loss:.4f}, margin {margin:+.4f} ")
    error = EVALUATED["test/calibration_error"]
    assert lines["confidence"].startswith(f"confidence off by {error:.4f} on average")
    assert {f"sets/{name}" for name in slices(language)["test set"]} == {
        name for name in EVALUATED if name.startswith("sets/")
    }
    for name, figures in slices(language)["test set"].items():
        assert figures[0] == round(EVALUATED[f"sets/{name}"], 4)
    row = f"| all | {accuracy:.3f} | {low:.3f} to {high:.3f} |"
    assert row in with_english_punctuation(page("docs/evaluation", language))
    assert f"{accuracy:.3f} ({low:.3f} to {high:.3f})" in with_english_punctuation(
        page("README", language)
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_tables_of_slices_match_the_printed_output(language: str) -> None:
    for name, column, values in (("docs/evaluation", "language", 3), ("docs/data", "kind", 1)):
        rows = {row[0]: row[1:] for row in cells(with_english_punctuation(page(name, language)))}
        for value, figures in slices(language)[column].items():
            shown = numbers(" ".join(rows[value]))[:values]
            # Both are rounded: the output to four digits, the table to three.
            assert shown == pytest.approx(figures[:values], abs=0.00055)


def test_default_run_is_good_enough_to_show() -> None:
    assert EVALUATED["accuracy"] >= 0.70
    for _, low, _ in slices(".md")["language"].values():
        assert low > 0.5


@pytest.mark.parametrize("language", LANGUAGES)
def test_docs_describe_exactly_the_keys_of_the_evaluation(language: str) -> None:
    figures = evaluation.measure(*measured())
    groups = ("calibration", "length", "ties", "rankings")
    keys = {"sets", *figures} - {*groups}
    keys |= {f"{group}.{key}" for group in groups for key in figures[group]}
    assert keys == described(language)
    compared = evaluate.headline(figures | {"sets": {}})
    assert all(f"`{name}`" in page("docs/evaluation", language) for name in compared)


def measured() -> tuple[pa.Table, Any, int]:
    """Three comparisons of three answers to each of two prompts, as in `evaluate`."""
    table = pa.table(
        {
            "id": ["a", "b", "c", "d", "e", "f"],
            "reward_chosen": [1.0, 1.0, 0.0, 2.0, 2.0, 0.5],
            "reward_rejected": [0.0, -1.0, -1.0, 0.5, 1.5, 1.5],
            "tokens_chosen": [3, 3, 4, 5, 5, 6],
            "tokens_rejected": [4, 6, 6, 6, 2, 2],
            "prefix_length": [1] * 6,
            "preference": [1.0, 0.5, 0.75, 1.0, 1.0, 1.0],
            "weight": [1.0] * 6,
            "answer_j": [0, 0, 1, 0, 0, 1],
            "answer_k": [1, 2, 2, 1, 2, 2],
            "prompt_id": ["p", "p", "p", "q", "q", "q"],
        }
    )
    return table, evaluation.as_judged(table), 0


def described(language: str) -> set[str]:
    text = page("docs/evaluation", language)
    [table] = re.findall(r"^\| (?:key|键) \|.*?\n\n", text, re.DOTALL | re.MULTILINE)
    first_cells = [line.split("|")[1] for line in table.strip().splitlines()[2:]]
    return {key for cell in first_cells for key in re.findall("`(.+?)`", cell)}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("name", "result", "rows"), [("reproducibility", "torture", 20), ("performance", "serve", 4)]
)
def test_rows_of_figures_match_the_recorded_run(
    name: str, result: str, rows: int, language: str
) -> None:
    recorded = cells((ROOT / f"benchmarks/results/{result}.md").read_text(encoding="utf-8"))
    found = [row for row in cells(page(f"docs/{name}", language)) if row[-1].isdecimal()]
    assert len(found) == rows
    for row in found:
        assert row in recorded


@pytest.mark.parametrize("language", LANGUAGES)
def test_speeds_match_the_recorded_run(language: str) -> None:
    recorded = cells((ROOT / "benchmarks/results/cpu.md").read_text(encoding="utf-8"))
    by_speed = {row[1]: row for row in recorded[2:]}
    rows = [row for row in cells(page("docs/performance", language)) if row[1] in by_speed]
    assert len(rows) == 8
    for _, speed, times, tokens, memory in rows:
        expected = by_speed[speed]
        assert times == expected[3]
        assert tokens == f"{float(expected[4]):.0f}"
        assert memory in (expected[5], "–")


def test_limits_match_the_code() -> None:
    """In English; the other language has the same numbers."""
    limits = {
        "clients": [
            f"Bodies above {serve.LARGEST / 2**20:g} MiB get 413.",
            f"at most {serve.TEXTS:,} texts",
            f"Waiting texts are limited to {queue.MOST / 1e6:.0f} million tokens",
            f"bodies that are being read are limited to {serve.READING / 2**20:g} MiB together",
        ],
        "data": [f"A column with at most {evaluation.SLICE_VALUES} different values"],
        "evaluation": [
            f"the {judgements.MOST_PAIRS:,} with the lowest margins",
            f"{judgements.MOST_CHARACTERS / 1e6:g} million characters",
        ],
    }
    for name, sentences in limits.items():
        text = " ".join(page(f"docs/{name}", ".md").split())
        assert [each for each in sentences if each not in text] == []


# --- both languages --------------------------------------------------------------------------


def test_every_page_has_both_languages() -> None:
    assert {name.replace(".md", ".zh.md") for name in ENGLISH} == set(PAGES) - set(ENGLISH)
    assert len(ENGLISH) > 1


@pytest.mark.parametrize("name", [name.removesuffix(".md") for name in ENGLISH])
def test_both_languages_have_the_same_headings_code_tables_and_numbers(name: str) -> None:
    english, chinese = (page(name, language) for language in LANGUAGES)
    headings = [re.findall("^#+ ", prose(text), re.MULTILINE) for text in (english, chinese)]
    assert headings[0] == headings[1]
    for one, other in zip(blocks(english), blocks(chinese), strict=True):
        if one.startswith("stages/"):  # a tree, which has a description after each path
            assert tree_of(one) == tree_of(other)
        else:
            assert one == other
    shapes = [[list(map(len, table)) for table in tables(text)] for text in (english, chinese)]
    assert shapes[0] == shapes[1]
    assert numbers(prose(english)) == numbers(prose(chinese))


# --- the README ------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_readme_is_short(language: str) -> None:
    assert len(page("README", language).splitlines()) <= MOST_LINES


@pytest.mark.parametrize("language", LANGUAGES)
def test_code_in_the_readme_is_also_on_the_clients_page(language: str) -> None:
    """The export tests compare that code with the model card, and run it."""
    found = blocks(page("README", language), "python")
    assert found
    assert set(found) <= set(blocks(page("docs/clients", language), "python"))
