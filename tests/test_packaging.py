"""The installed package: the complete library, usable from a script in any folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support import PARAMS, ROOT

EDITABLE = "import setuptools.build_meta as build; build.build_editable('editable')"
SCORES = """
import sys
from reward.serving import score, scorer, serve

[reward] = scorer.reward_function(sys.argv[1])(["Why?"], ["Because."])
print(scorer.__file__, isinstance(reward, float))
print({"datasets", "dvc", "scipy.stats", "stages", "vl_convert"} & sys.modules.keys())
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The sources of the package in a separate folder, because building leaves files there."""
    folder = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("reward", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for path in (*map(ROOT.joinpath, ("LICENSE", "README.md", "pyproject.toml")), PARAMS):
        shutil.copy(path, folder)
    return folder


def call(
    *command: str, cwd: Path, status: int = 0, **environment: str
) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done


def files_of(folder: Path) -> set[str]:
    """The paths of all files except Python's bytecode caches."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix() for path in found}


def test_script_in_any_folder_scores_with_the_installed_library(
    source: Path, complete: Path, tmp_path: Path
) -> None:
    """The base dependencies suffice: nothing that only the pipeline needs is imported."""
    site, anywhere = tmp_path / "site", tmp_path / "anywhere"
    anywhere.mkdir()
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-build-isolation", "--target", str(site))
    call(*pip, *offline, ".", cwd=source)
    packages = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert packages == {"reward"}
    assert files_of(site / "reward") == files_of(ROOT / "reward")
    export = str(complete / "models" / "export")
    printed = call("-c", SCORES, export, cwd=anywhere, PYTHONPATH=str(site)).stdout
    scorer = site / "reward" / "serving" / "scorer.py"
    assert printed.splitlines() == [f"{scorer} True", "set()"]


def test_experiment_runs_its_own_code_despite_an_editable_install(
    source: Path, tmp_path: Path
) -> None:
    """DVC runs `python -m stages.X` in a copy of the project, whose code may differ."""
    call("-c", EDITABLE, cwd=source)
    [wheel] = (source / "editable").glob("*.whl")
    site, anywhere, experiment = (tmp_path / name for name in ("site", "anywhere", "experiment"))
    ZipFile(wheel).extractall(site)
    # Like site-packages, where an editable install works through a .pth file.
    (site / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(site)!r})")
    anywhere.mkdir()
    where = ("-c", "import reward; print(reward.__file__)")
    installed = call(*where, cwd=anywhere, PYTHONPATH=str(site)).stdout
    assert installed == f"{source / 'reward' / '__init__.py'}\n"
    shutil.copytree(source, experiment)
    for name, old, new in (
        ("reward/params.py", '"a non-empty string"', '"a text of the experiment"'),
        ("params.yaml", "name: embedded/tiny-qwen2", "name: 3"),
    ):
        content = (experiment / name).read_text(encoding="utf-8")
        assert old in content
        (experiment / name).write_text(content.replace(old, new), encoding="utf-8")
    stage = ("-m", "stages.fetch")
    message = call(*stage, cwd=experiment, status=1, PYTHONPATH=str(site)).stderr
    assert message == "params.yaml: base.name is 3, must be a text of the experiment\n"


def test_python_without_the_packages_is_named() -> None:
    """As if the environment is not activated: without the folder of installed packages."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "stages.train"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"{sys.executable} lacks the packages of the pipeline; run make repro, or activate the "
        "environment: . .venv/bin/activate\n"
    )
