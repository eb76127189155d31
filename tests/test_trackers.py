"""Experiment trackers: checked before the model is loaded, with files that outlive the run."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward.model import trackers
from reward.process import Fault

WANDB = """
import os

class Error(Exception):
    pass

def login():
    if os.environ.get("WANDB_MODE") != "offline":
        raise Error("No API key configured.")
    assert os.path.isdir(os.environ["WANDB_DIR"])
"""


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of a stage that DVC runs in a temporary folder."""
    found = {"DVC_ROOT": str(tmp_path)}
    monkeypatch.setattr(os, "environ", found)
    monkeypatch.syspath_prepend(tmp_path)
    yield found
    sys.modules.pop("wandb", None)


def test_folder_with_the_name_of_a_tracker_is_not_an_installed_one(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    with pytest.raises(Fault, match=r"train\.report_to is wandb, which is not installed"):
        trackers.prepare("wandb")


def test_wandb_without_a_key_is_refused_unless_it_is_offline(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(WANDB)
    with pytest.raises(Fault, match=r"wandb, which does not start \(No API key configured\.\); "):
        trackers.prepare("wandb")
    environment["WANDB_MODE"] = "offline"
    trackers.prepare("wandb")


def test_files_of_trackers_are_in_the_project_unless_the_environment_says_otherwise(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    environment["MLFLOW_TRACKING_URI"] = "http://mlflow:5000"
    trackers.keep_files()
    assert Path(environment["TENSORBOARD_LOGGING_DIR"]).parent == tmp_path / "runs" / "tensorboard"
    assert environment["WANDB_DIR"] == f"{tmp_path}/runs"
    assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert (tmp_path / "runs").is_dir()
    del environment["MLFLOW_TRACKING_URI"]
    trackers.keep_files()
    assert environment["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/runs/mlflow.db"
