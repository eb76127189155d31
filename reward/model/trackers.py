"""Experiment trackers, which also get the curves: whether they can start, where they write."""

import os
import time
from importlib import import_module
from importlib.util import find_spec

from reward.outputs import writing
from reward.process import Fault, project


def prepare(name: str) -> None:
    """Check that a tracker can start, before the model is loaded, and let it write to `runs`.

    Raises a Fault if the tracker is not installed, and if W&B has no valid key and is not offline.
    """
    spec = find_spec(name)
    # A folder such as ./wandb, which W&B writes, can be imported too, but has no file of its own.
    if not spec or not spec.origin:
        raise Fault(
            f"params.yaml: train.report_to is {name}, which is not installed; run "
            f"pip install {name}, or set it to none"
        )
    keep_files()
    if name == "wandb":
        wandb = import_module(name)
        try:
            wandb.login()
        except wandb.Error as error:
            raise Fault(
                f"params.yaml: train.report_to is wandb, which does not start ({error}); run "
                "wandb login, set WANDB_MODE=offline in the environment, or set it to none"
            ) from None


def keep_files() -> None:
    """Let trackers write to the project's folder `runs`, unless the environment says otherwise.

    By default they write to the working directory, which DVC removes after `dvc exp run --temp`, or
    to the checkpoints, of which only those of the last runs are kept.
    """
    folder = project().absolute() / "runs"
    with writing(folder):
        folder.mkdir(exist_ok=True)  # W&B ignores a folder that does not exist
    # TensorBoard merges the runs of a folder, so each has its own.
    run = f"{time.strftime('%Y-%m-%d-%H-%M-%S')}-{os.getpid()}"
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard" / run))
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
