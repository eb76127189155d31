"""Checkpoints that survive the run: where they are, whether they are whole, who may use them.

They lie in $DVC_ROOT/models/checkpoints/<fingerprint>/step-<n>, ignored by git and DVC, so that
neither a failed stage nor a temporary folder of an experiment takes them along. The fingerprint
stands for everything that decides the bytes of the result.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import Timeout

from reward.locks import hold
from reward.model import group
from reward.outputs import digest, digests, read_json, whole_folder, write_json, writing
from reward.params import read_yaml
from reward.process import Fault

DIGESTS = "digests.json"
KEPT_STEPS = 2
KEPT_RUNS = 5
PATIENCE = 50
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def fingerprint(params: dict[str, Any], inputs: list[Path]) -> str:
    """16 hex digits that stand for params, input files, the code in use and its libraries.

    Raises a Fault where another process has others.
    """
    code = {
        name: digest(Path(module.__file__))
        for name, module in sorted(sys.modules.items())
        if name.startswith(("stages.", "reward.")) and module.__file__
    }
    main = getattr(sys.modules["__main__"], "__file__", None)
    content = {
        "params": params,
        "inputs": [digests(path) if path.is_dir() else digest(path) for path in inputs],
        "code": code | ({"main": digest(Path(main))} if main else {}),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    group.require_same(content)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Run:
    """The checkpoints of one fingerprint, held by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> Path | None:
        """The last checkpoint of this run whose files have the digests they were written with."""
        for path in reversed(self._steps()):
            found = digests(path)
            found.pop(DIGESTS, None)
            with suppress(FileNotFoundError, ValueError):  # no list of digests, or half of one
                if read_json(path / DIGESTS) == {"run": self.folder.name, "files": found}:
                    return path
            print(f"checkpoint {path.name} is damaged, or of another run; passed over")
        return None

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to fill, which becomes checkpoint `step` whole or not at all."""
        with whole_folder(self.folder / f"step-{step}") as partial:
            yield partial
            content = {"run": self.folder.name, "files": digests(partial)}
            write_json(partial / DIGESTS, content)
        for old in self._steps()[:-KEPT_STEPS]:
            shutil.rmtree(old)

    def finish(self, metrics: Path) -> None:
        """Mark the run finished: its outs, `metrics` among them, are written.

        The last checkpoint stays until dvc.lock records the outs, so that a kill during DVC's
        commit costs no training.
        """
        md5 = hashlib.md5(metrics.read_bytes(), usedforsecurity=False).hexdigest()
        write_json(self.folder / "finished.json", {"metrics_md5": md5})
        for old in self._steps()[:-1]:
            shutil.rmtree(old)

    def forget_if_recorded(self, lock: Path, stage: str) -> None:
        """Start afresh if the run had finished and `lock` records its outs: a forced rerun."""
        marker = self.folder / "finished.json"
        if not marker.exists():
            return
        stages = (read_yaml(lock) or {}).get("stages", {}) if lock.exists() else {}
        recorded = {out.get("md5") for out in stages.get(stage, {}).get("outs", [])}
        if read_json(marker)["metrics_md5"] in recorded:
            for path in self._steps():
                shutil.rmtree(path)
        marker.unlink()

    def _steps(self) -> list[Path]:
        found = self.folder.glob("step-*[0-9]")  # a killed run leaves a step-<n>.partial
        return sorted(found, key=lambda path: int(path.name[5:]))


@contextmanager
def shared(name: str) -> Iterator[Run]:
    """The run of a fingerprint in the first process, `locked`; in the others an empty folder."""
    if group.leads():
        with locked(name) as run:
            yield run
    else:
        with TemporaryDirectory() as folder:
            yield Run(Path(folder))


@contextmanager
def locked(name: str) -> Iterator[Run]:
    """The run of a fingerprint, locked against other trainers; old runs beyond a few are removed.

    Waits a moment for a trainer whose parent was killed, then raises a Fault.
    """
    root = Path(os.environ.get("DVC_ROOT", ".")) / "models" / "checkpoints"
    folder = root / name
    with ExitStack() as held:
        for patience in reversed(range(PATIENCE)):
            # One process at a time, so that none removes a folder that another is about to lock.
            with hold(root / "lock", seconds=-1), suppress(Timeout):
                with writing(folder):
                    folder.mkdir(exist_ok=True)
                held.enter_context(hold(folder / "lock"))
                _prune(root, folder)
                break
            if not patience:
                raise Fault(
                    f"{folder} is in use: another trainer works on the same run; wait for it"
                )
            time.sleep(0.1)
        yield Run(folder)


def _worth(run: Path) -> tuple[bool, float]:
    """What decides which runs are kept: unfinished work before finished, late before early."""
    return not (run / "finished.json").exists(), run.stat().st_mtime


def _prune(root: Path, current: Path) -> None:
    """Remove all but a few of the other runs: first those that finished, then the oldest.

    A run that another trainer holds is left alone.
    """
    others = [path for path in root.iterdir() if path.is_dir() and path != current]
    for path in sorted(others, key=_worth)[:-KEPT_RUNS]:
        with suppress(Timeout), hold(path / "lock"):
            shutil.rmtree(path)
