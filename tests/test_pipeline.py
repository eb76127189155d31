"""The whole pipeline under DVC, as users run it, with a tiny base and a few pairs."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward.outputs import digests, read_json
from reward.process import processors
from tests.support import EXPORTED, ROOT, write_pairs

OUTPUTS = {
    "data/tokenized": {
        "licenses.json",
        "template.json",
        *(
            f"{split}/{name}"
            for split in (
                *("train", "validation", "test", "test/answers"),
                *("sets/by_hand", "sets/by_hand/answers"),
            )
            for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")
        ),
        "sets/index.json",
    },
    "metrics": {"preprocess.json", "train.json", "evaluate.json", "export.json"},
    "models/base": {
        "base.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    },
    "models/adapter": {
        "adapter_config.json",
        "adapter_model.safetensors",
        "digests.json",
        "quantization.json",
        "template.json",
        "training.json",
    },
    "models/export": EXPORTED,
    "reports/preprocess": {"figures.json"},
    "reports/export": {"figures.json"},
    "reports/train": {"figures.json", "training.json", "validation.json"},
    "reports/evaluate": {
        *(
            "figures.json",
            "index.html",
            "length.json",
            "length_curve.json",
            "margins.json",
            "reliability.json",
            "rewards.parquet",
            "roc.json",
        ),
        "sets/by_hand.parquet",
        "slices.json",
    },
}
CODE = (
    "reward",
    "stages",
    "models/.gitignore",
    ".dvc/config",
    ".dvcignore",
    ".gitignore",
    "dvc.yaml",
)
INPUTS = ("params.yaml", "data/raw", "data/sets")
STAGES = ["fetch", "preprocess", "train", "evaluate", "export"]


class Project:
    """A copy of this project like a clone, committed to git, with small params."""

    first_output: str

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        bin_folder = Path(sys.executable).parent
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "GIT_"))
        } | environment
        self.environment["PATH"] = f"{bin_folder}:{self.environment['PATH']}"

    def call(self, *command: str, status: int = 0) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        output = done.stdout + done.stderr
        assert done.returncode == status, output
        return output

    def ran(self, *command: str) -> list[str]:
        """The stages that a command runs."""
        return stages_in(self.call(*command))


def stages_in(output: str) -> list[str]:
    """The stages that DVC ran, according to its output."""
    return [stage for stage in STAGES if f"python -m stages.{stage}\n" in output]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, complete: Path) -> Project:
    """A clone in which all stages have run, in an environment full of unusual values.

    Only the number of threads is that of `complete`, because bytes depend on it.
    """
    home = tmp_path_factory.mktemp("canary-home")
    project = Project(
        tmp_path_factory.mktemp("another") / "folder",
        HF_ENDPOINT="http://canary:canary@127.0.0.1:9",
        HF_TOKEN="hf_canaryTokenOfNobody",
        HOME=str(home),
        WANDB_API_KEY="canary-of-a-tracker",
        PYTHONHASHSEED="12345",
        OMP_NUM_THREADS=str(processors()),
        MKL_NUM_THREADS="2",
    )
    fill(project, complete)
    project.first_output = project.call("dvc", "repro")
    assert stages_in(project.first_output) == STAGES
    project.call("git", "add", "--all")
    project.call("git", "commit", "--quiet", "--message", "first run")
    return project


@pytest.fixture
def project(finished: Project) -> Iterator[Project]:
    """The finished clone, restored after each test."""
    yield finished
    if finished.call("git", "status", "--short"):
        finished.call("git", "checkout", "--quiet", "--", ".")
        finished.call("git", "clean", "--quiet", "--force", "-d")
        finished.call("dvc", "checkout", "--quiet")


def fill(project: Project, complete: Path) -> None:
    """Fill the folder like a clone of a small project, with the inputs of `complete`."""
    folder = project.folder
    ignore = shutil.ignore_patterns("__pycache__")
    for source, names in ((ROOT, CODE), (complete, INPUTS)):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name, ignore=ignore)
            else:
                shutil.copy(source / name, folder / name)
    (folder / "data" / "corpus").mkdir(parents=True)
    (folder / "data" / "corpus" / "en.txt").write_text("A corpus.\n", encoding="utf-8")
    project.call("git", "init", "--quiet")
    project.call("git", "config", "user.name", "tests")
    project.call("git", "config", "user.email", "tests@example.org")
    project.call("git", "add", "--all")
    project.call("git", "commit", "--quiet", "--message", "start")


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_outputs_are_exactly_the_listed_files(project: Project) -> None:
    assert {name: tree(project.folder / name) for name in OUTPUTS} == OUTPUTS


def test_editing_an_output_does_not_change_the_cache(project: Project) -> None:
    """No output is a hard link to the cache, because a superuser can write to read-only files."""
    files = [path for name in OUTPUTS for path in (project.folder / name).rglob("*")]
    assert {path.stat().st_nlink for path in files if path.is_file()} == {1}


def test_nothing_but_outputs_is_left(project: Project) -> None:
    assert names(project.folder / "data") == {"corpus", "raw", "sets", "tokenized"}
    models = {"adapter", "base", "checkpoints", "export"}
    assert names(project.folder / "models") == models | {".gitignore"}
    assert project.call("git", "status", "--short") == ""


def test_second_run_runs_nothing(project: Project) -> None:
    assert project.ran("dvc", "repro") == []


def test_bytes_are_the_same_elsewhere_and_do_not_reveal_the_place(
    project: Project, complete: Path, tmp_path: Path
) -> None:
    """With another folder, home, token and hash seed, and in other processes."""
    here = Project(tmp_path / "here")
    here.folder.mkdir()
    fill(here, complete)
    for name in OUTPUTS:
        shutil.copytree(complete / name, here.folder / name, dirs_exist_ok=True)
    here.call("dvc", "commit", "--force")
    lock = project.call("git", "show", "HEAD:dvc.lock").encode()
    assert lock == (here.folder / "dvc.lock").read_bytes()
    written = [lock, project.first_output.encode()]
    for name in (*OUTPUTS, "models/checkpoints"):
        written += [path.read_bytes() for path in (project.folder / name).rglob("*.*")]
    assert len(written) > 40
    for content in written:
        assert b"canary" not in content.lower()
        assert str(project.folder).encode() not in content


def test_another_lora_rank_reruns_only_train_evaluate_and_export(project: Project) -> None:
    command = ("dvc", "exp", "run", "--set-param", "lora.r=2")
    assert project.ran(*command) == ["train", "evaluate", "export"]
    shown = json.loads(project.call("dvc", "exp", "show", "--json"))
    assert len(shown) == 2


def test_plots_need_no_network(project: Project) -> None:
    """Unless their page was not made, as in an environment that `make` did not create."""
    without_page = shutil.ignore_patterns("page.html")
    shutil.copytree(ROOT / ".dvc" / "plots", project.folder / ".dvc" / "plots", ignore=without_page)
    shown = project.folder / "plots_here" / "index.html"
    project.call("dvc", "plots", "show", "--out", "plots_here")
    assert 'src="http' in shown.read_text(encoding="utf-8")
    project.call(sys.executable, ".dvc/plots/make_page.py")
    project.call("dvc", "plots", "show", "--out", "plots_here")
    page = shown.read_text(encoding="utf-8")
    assert 'src="http' not in page
    for title in ("Bradley-Terry loss", "Pairwise accuracy", "Learning rate", "Accuracy by slice"):
        assert title in page


def test_fault_is_one_sentence_under_dvc(project: Project) -> None:
    params = project.folder / "params.yaml"
    before = params.read_text(encoding="utf-8")
    params.write_text(before.replace("max_length: 2040", "max_length: -1"), encoding="utf-8")
    output = project.call("dvc", "repro", status=255)
    assert "params.yaml: preprocess.max_length is -1, must be a positive integer" in output
    assert "Traceback" not in output


def test_registered_model_can_be_downloaded_by_version(project: Project, tmp_path: Path) -> None:
    project.call("gto", "register", "reward-model", "--version", "v1.0.0")
    project.call("gto", "assign", "reward-model", "--version", "v1.0.0", "--stage", "prod")
    versions = [("v", "--rev", "v1.0.0"), ("p", "--stage", "prod")]
    for name, *which in versions:
        command = ("dvc", "artifacts", "get", str(project.folder), "reward-model")
        project.call(*command, *which, "--out", str(tmp_path / name))
        assert digests(tmp_path / name) == digests(project.folder / "models" / "export")


def test_commands_for_sweeps_do_what_the_docs_say(project: Project) -> None:
    """Runs every line of the section in order. No model is trained, and `gc` does not ask first."""
    page = (ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8")
    section = page[page.index("\n## Sweeps\n") : page.index("\n## Results\n")]
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", section, re.S)
        for line in block.splitlines()
    ]
    queue, start, listed, remove, collect, other_data, chinese, line_break = lines
    for name in ("data/mine.jsonl", "数据/我的 偏好.jsonl"):
        (project.folder / name).parent.mkdir(exist_ok=True)
        write_pairs(project.folder / name, 20)

    def shell(line: str) -> str:
        return project.call("bash", "-c", line)

    assert shell(queue).count("Queued experiment") == 3
    project.call("dvc", "queue", "remove", "--all")
    shell(start)
    for name in ("rank-eight", "rank-thirty-two"):
        project.call("dvc", "exp", "save", "--name", name)
    assert {"rank-eight", "rank-thirty-two"} <= set(shell(listed).split())
    shell(remove)
    assert "rank-" not in shell(listed)
    shell(f"{collect} --force")

    only = "dvc exp run preprocess"
    elsewhere = other_data.replace("dvc exp run --queue", f"{only} --temp")
    assert stages_in(shell(elsewhere)) == ["preprocess"]
    both = f"{chinese} {line_break}".replace("dvc exp run", only, 1).replace("dvc exp run -S", "-S")
    assert stages_in(shell(both)) == ["preprocess"]
    recorded = read_json(project.folder / "data" / "tokenized" / "template.json")
    assert "问：{prompt}\n答：{answer}" in recorded.values()
