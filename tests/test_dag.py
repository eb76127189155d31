"""dvc.yaml and pyproject.toml match the code: its imports, params and files, and nothing else."""

import ast
import re
import sys
import tomllib
from collections.abc import Collection
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.support import GROUPS, ROOT

PACKAGES = ("reward", "stages")
OUTSIDE = ("benchmarks", "tests", "tools")
# Files that modules read from their own folder.
READ = {"reward.judging.page": "page.html", "reward.exporting.card": "card.md"}
# Layers from the top: no package imports from a layer above its own, or from another in its layer.
LAYERS = [
    {"serving"},
    {"exporting"},
    {"judging", "model"},
    {"data"},
    {"process", "params", "outputs", "locks", "stage", "after_training"},
]
PIPELINE: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")
STAGES: dict[str, Any] = PIPELINE["stages"]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# Not part of serving: it reads the test sets that preprocess wrote, so it needs the pipeline.
NEEDS_SPLITS = {"reward.serving.judge"}
# Imported by a library: transformers needs it to load quantized weights and to train.
INDIRECT = {"accelerate"}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


def file_of(module: str) -> Path:
    """The file of a dotted name in this project, which is `__init__.py` for a package."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(module: str, packages: Collection[str] = PACKAGES) -> set[str]:
    """The modules of the given packages that a module imports directly, anywhere in its code."""
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative name"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] in packages and file_of(name).exists()}


def with_packages(module: str) -> set[str]:
    """A module and its parent packages, which Python imports first."""
    parts = module.split(".")
    return {".".join(parts[: count + 1]) for count in range(len(parts))}


@cache
def transitive(module: str) -> frozenset[str]:
    """A module and all modules of this project that it imports, directly or indirectly."""
    done: set[str] = set()
    waiting = [*with_packages(module)]
    while waiting:
        name = waiting.pop()
        if name not in done:
            done.add(name)
            waiting += [part for other in imported(name) for part in with_packages(other)]
    return frozenset(done)


def libraries(files: Collection[Path]) -> set[str]:
    """The distributions that files import at run time, anywhere in their code."""
    distributions, names = packages_distributions(), set[str]()
    for path in files:
        nodes = [ast.parse(path.read_text(encoding="utf-8"))]
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            nodes += ast.iter_child_nodes(node)  # type: ignore[arg-type]
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).split(".")[0])
    foreign = names - sys.stdlib_module_names - {*PACKAGES, *OUTSIDE}
    return {normal(name) for package in foreign for name in distributions[package]}


def normal(requirement: str) -> str:
    """The normalized name in a requirement, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def declared(*extras: str) -> set[str]:
    """The distributions that pyproject.toml requires, in general and for the given extras."""
    found = [
        *PROJECT["dependencies"],
        *(name for extra in extras for name in PROJECT["optional-dependencies"][extra]),
    ]
    return {normal(name) for name in found if not name.startswith(PROJECT["name"])}


def stage_of(name: str) -> str:
    return f"stages.{name}"


def out_paths(stage: str) -> set[str]:
    outs = STAGES[stage]["outs"] + STAGES[stage].get("metrics", [])
    return {out if isinstance(out, str) else next(iter(out)) for out in outs}


def fields_read(module: str, group: str) -> set[str]:
    """Attributes read anywhere in a module, as an upper bound on the params it reads."""
    kind = GROUPS[group]
    return {
        node.attr
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and node.attr in kind.__dataclass_fields__
    }


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_transitive_imports(stage: str) -> None:
    code = {dep for dep in STAGES[stage]["deps"] if dep.split("/")[0] in PACKAGES}
    modules = transitive(stage_of(stage))
    files = [file_of(module) for module in modules]
    files += [file_of(name).with_name(file) for name, file in READ.items() if name in modules]
    assert code == {path.relative_to(ROOT).as_posix() for path in files}


def test_every_stage_module_is_in_the_pipeline() -> None:
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} == {*STAGES, "__init__"}


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_another(stage: str) -> None:
    found = {module for module in transitive(stage_of(stage)) if module.startswith("stages.")}
    assert found == {stage_of(stage)}


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "reward").rglob("*.py")
    if path.name != "__init__.py"
)


def depth_of(module: str) -> int:
    """The depth of a module's layer, counted from the top."""
    [depth] = [depth for depth, names in enumerate(LAYERS) if module.split(".")[1] in names]
    return depth


@pytest.mark.parametrize("module", MODULES)
def test_library_imports_no_stage_and_only_lower_layers(module: str) -> None:
    others = imported(module) - with_packages(module)
    assert not [other for other in others if other.startswith("stages")]
    for other in others - {"reward"}:
        same_package = other.split(".")[1] == module.split(".")[1]
        lowest = module.split(".")[1] in LAYERS[-1]
        assert same_package or lowest or depth_of(other) > depth_of(module), other
        assert not lowest or depth_of(other) == depth_of(module), other


def test_no_import_cycles() -> None:
    for module in MODULES:
        assert not any(module in transitive(other) for other in imported(module) - {module})


def test_packages_have_a_docstring_and_no_code() -> None:
    """DVC warns about empty dependencies, and one import has to run before all others."""
    for path in (ROOT / "reward").rglob("__init__.py"):
        docstring, *code = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr)
        first = ["import reward.process"] if path.parent == ROOT / "reward" else []
        assert [ast.unparse(line) for line in code] == first


def test_nothing_imports_a_test_module() -> None:
    """Shared code is in tests.support, and shared fixtures in conftest, which pytest imports."""
    files = [path for name in OUTSIDE for path in (ROOT / name).rglob("*.py")]
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in files]
    found = {(name, other) for name in names for other in imported(name, OUTSIDE)}
    assert ("tests.test_dag", "tests.support") in found
    tests = re.compile(r"tests\.(test_\w+|conftest)")
    assert [pair for pair in sorted(found) if tests.fullmatch(pair[1])] == []


def test_dependencies_are_what_scoring_and_serving_import() -> None:
    serving = {module for module in MODULES if ".serving." in module} - NEEDS_SPLITS
    served = [transitive(module) for module in serving]
    files = {file_of(name) for names in served for name in names}
    assert declared() == libraries(files) | INDIRECT


def test_extras_are_what_the_pipeline_imports() -> None:
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    files += [ROOT / ".dvc" / "plots" / "make_page.py"]
    assert declared("train", "clients") == libraries(files) | INDIRECT


def test_tests_benchmarks_and_tools_import_only_declared_packages() -> None:
    files = [path for name in OUTSIDE for path in (ROOT / name).rglob("*.py")]
    assert libraries(files) <= declared("train", "clients", "dev")


# The stages that a change to a file must rerun, and no others: DVC hashes whole files.
RERUN = {
    "reward.data.reading": {"preprocess"},
    "reward.data.splitting": {"preprocess"},
    "reward.data.sets": {"preprocess"},
    "reward.data.templates": {"preprocess", "export"},
    "reward.model.embedded": {"fetch"},
    "reward.model.trainer": {"train"},
    "reward.model.progress": {"train"},
    "reward.model.checkpoints": {"train"},
    "reward.locks": {"train"},
    "reward.judging.benchmarks": {"evaluate"},
    "reward.judging.evaluation": {"evaluate"},
    "reward.judging.length": {"evaluate"},
    "reward.judging.metrics": {"evaluate"},
    "reward.judging.page": {"evaluate"},
    "reward.judging.rankings": {"evaluate"},
    "reward.judging.compare": set(),
    **{module: {"export"} for module in MODULES if ".exporting." in module},
    **{module: set() for module in MODULES if ".serving." in module},
}


@pytest.mark.parametrize("module", RERUN)
def test_change_reruns_only_the_affected_stages(module: str) -> None:
    path = file_of(module).relative_to(ROOT).as_posix()
    assert {name for name, stage in STAGES.items() if path in stage["deps"]} == RERUN[module]


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_groups_that_the_stage_loads(stage: str) -> None:
    loaded = {
        node.args[0].value
        for node in ast.walk(tree(stage_of(stage)))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "params.load"
        and isinstance(node.args[0], ast.Constant)
    }
    assert sorted(STAGES[stage]["params"]) == sorted(map(str, loaded))


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_listed_group_is_read(stage: str) -> None:
    for group in STAGES[stage]["params"]:
        read = {
            name for module in transitive(stage_of(stage)) for name in fields_read(module, group)
        }
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
def test_paths_in_the_code_belong_to_the_stage(stage: str) -> None:
    """Every path constant of a stage is a dep or an out, or is next to or inside one."""
    declared = out_paths(stage) | set(STAGES[stage]["deps"])
    for node in tree(stage_of(stage)).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Path("):
            path = ast.literal_eval(node.value.args[0])  # type: ignore[attr-defined]
            related = [
                other for other in declared if f"{other}/".startswith(f"{path}/") or path in other
            ]
            assert related or any(path.startswith(f"{other}/") for other in declared), path


def test_plots_are_of_outs() -> None:
    outs = {path for stage in STAGES for path in out_paths(stage)}
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
