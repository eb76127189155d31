"""dvc.yaml says what the code does: the same imports, params, files and nothing else."""

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.test_params import GROUPS

ROOT = Path(__file__).parent.parent
PIPELINE: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")
STAGES: dict[str, Any] = PIPELINE["stages"]


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / "stages" / f"{name}.py").read_text(encoding="utf-8"))


def imported(name: str) -> set[str]:
    """The modules of stages/ that a module imports itself, anywhere in it."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom) and node.module == "stages":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stages."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("stages.")
            }
    return found


def transitive(name: str) -> set[str]:
    done: set[str] = set()
    waiting = [name, "__init__"]
    while waiting:
        module = waiting.pop()
        if module not in done:
            done.add(module)
            waiting += imported(module)
    return done


def out_paths(stage: str) -> set[str]:
    outs = STAGES[stage]["outs"] + STAGES[stage].get("metrics", [])
    return {out if isinstance(out, str) else next(iter(out)) for out in outs}


def fields_read(module: str, group: str) -> set[str]:
    """Attributes read anywhere in a module, as a bound on the params it reads."""
    kind = GROUPS[group]
    return {
        node.attr
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and node.attr in kind.__dataclass_fields__
    }


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_transitive_imports(stage: str) -> None:
    code = {dep for dep in STAGES[stage]["deps"] if dep.startswith("stages/")}
    files = [
        ROOT / "stages" / f"{name}{end}" for name in transitive(stage) for end in (".py", ".html")
    ]
    assert code == {f"stages/{path.name}" for path in files if path.exists()}


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_another(stage: str) -> None:
    assert transitive(stage) & set(STAGES) == {stage}


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_those_the_stage_loads(stage: str) -> None:
    loaded = {
        node.args[0].value
        for node in ast.walk(tree(stage))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "params.load"
        and isinstance(node.args[0], ast.Constant)
    }
    assert sorted(STAGES[stage]["params"]) == sorted(map(str, loaded))


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_listed_group_is_read(stage: str) -> None:
    for group in STAGES[stage]["params"]:
        read = {name for module in transitive(stage) for name in fields_read(module, group)}
        assert read == set(GROUPS[group].__dataclass_fields__), group


def test_every_group_is_listed_by_some_stage() -> None:
    assert {group for stage in STAGES.values() for group in stage["params"]} == set(GROUPS)


@pytest.mark.parametrize("stage", STAGES)
def test_deps_and_outs_are_sorted_and_described(stage: str) -> None:
    node = STAGES[stage]
    deps = [dep for dep in node["deps"] if not dep.startswith("$")]
    assert deps == sorted(deps)
    assert node["cmd"] == f"python -m stages.{stage}"
    assert node["desc"]


@pytest.mark.parametrize("stage", STAGES)
def test_paths_in_the_code_are_those_of_the_stage(stage: str) -> None:
    """Every path constant of a stage is a dep, an out, or lies beside or within one."""
    declared = out_paths(stage) | set(STAGES[stage]["deps"])
    for node in tree(stage).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Path("):
            path = ast.literal_eval(node.value.args[0])  # type: ignore[attr-defined]
            related = [
                other for other in declared if f"{other}/".startswith(f"{path}/") or path in other
            ]
            assert related or any(path.startswith(f"{other}/") for other in declared), path


def test_metrics_and_plots_are_outs() -> None:
    outs = {path for stage in STAGES for path in out_paths(stage)}
    assert set(PIPELINE["metrics"]) <= outs
    for plot in PIPELINE["plots"]:
        for body in plot.values():
            for path in body["y"]:
                assert any(path.startswith(f"{out}/") for out in outs)
    assert PIPELINE["artifacts"]["reward-model"]["path"] in outs


def test_metrics_stay_in_git() -> None:
    for stage in STAGES.values():
        assert all(not out.startswith("metrics/") for out in stage["outs"])
        for out in stage.get("metrics", []):
            assert list(out.values()) == [{"cache": False}]
