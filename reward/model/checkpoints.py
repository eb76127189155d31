"""Checkpoints that survive the run: where they are, whether they are intact, and who may use them.

They are in $DVC_ROOT/models/checkpoints/<fingerprint>/step-<n>, ignored by git and DVC, so they
are not lost with a failed stage or an experiment's temporary folder. The fingerprint covers
everything that determines the bytes of the result.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from filelock import Timeout

from reward.locks import hold
from reward.model import group
from reward.outputs import digest, digests, read_json, whole_folder, write_json, writing
from reward.params import read_yaml
from reward.process import loaded_modules, project

DIGESTS = "digests.json"
KEPT_STEPS = 2
KEPT_RUNS = 5
# What reading a file raises that is missing, empty, cut or not what was written there.
DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError)
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")


def fingerprint(params: dict[str, Any], inputs: list[Path]) -> str:
    """16 hex digits that identify params, input files, the loaded code and its libraries.

    Raises a Fault if they differ between processes.
    """
    content = {
        "params": params,
        "inputs": [digests(path) if path.is_dir() else digest(path) for path in inputs],
        "code": {name: digest(path) for name, path in loaded_modules().items()},
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    group.require_same(content)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Run:
    """The checkpoints of one fingerprint, held by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> Path | None:
        """The last checkpoint of this run whose files match the digests recorded with them."""
        for path in reversed(self._steps()):
            found = digests(path)
            found.pop(DIGESTS, None)
            with suppress(FileNotFoundError, ValueError):  # the list is missing or incomplete
                if read_json(path / DIGESTS) == {"run": self.folder.name, "files": found}:
                    return path
            print(f"checkpoint {path.name} is damaged or belongs to another run; it is ignored")
        return None

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to fill; it becomes checkpoint `step` completely or not at all."""
        with whole_folder(self.folder / f"step-{step}") as partial:
            yield partial
            content = {"run": self.folder.name, "files": digests(partial)}
            write_json(partial / DIGESTS, content)
        for old in self._steps()[:-KEPT_STEPS]:
            shutil.rmtree(old)

    def finish(self, metrics: Path) -> None:
        """Mark the run as finished: its outs, including `metrics`, are written.

        The last checkpoint stays until dvc.lock records the outs, so a kill during DVC's commit
        loses no training.
        """
        md5 = hashlib.md5(metrics.read_bytes(), usedforsecurity=False).hexdigest()
        write_json(self.folder / "finished.json", {"metrics_md5": md5})
        for old in self._steps()[:-1]:
            shutil.rmtree(old)

    def forget_if_recorded(self, lock: Path, stage: str) -> None:
        """Remove the checkpoints of a finished run that `lock` records.

        DVC starts such a run again only if the user forces it, so it must not resume. A power cut
        can damage `lock` or the marker. Then the run resumes, which gives the same bytes.
        """
        marker = self.folder / "finished.json"
        if not marker.exists():
            return
        recorded = False
        with suppress(*DAMAGE):
            outs = read_yaml(lock)["stages"][stage]["outs"]
            recorded = read_json(marker)["metrics_md5"] in [out.get("md5") for out in outs]
        if recorded:
            for path in self._steps():
                shutil.rmtree(path)
        marker.unlink()

    def _steps(self) -> list[Path]:
        # A killed run leaves a step-<n>.partial, and users leave copies.
        found = [path for path in self.folder.glob("step-*") if path.name[5:].isdecimal()]
        return sorted(filter(Path.is_dir, found), key=lambda path: int(path.name[5:]))


@contextmanager
def shared(name: str) -> Iterator[Run]:
    """The run of a fingerprint, `locked`, in the first process; an empty folder in the others."""
    with ExitStack() as held:
        if group.leads():
            # While it waits, it sends True to the others, which give up if they hear nothing.
            run = held.enter_context(locked(name, meanwhile=lambda: group.from_first(True)))
        else:
            run = Run(Path(held.enter_context(TemporaryDirectory())))
        while group.from_first(False):
            pass
        yield run


@contextmanager
def locked(name: str, meanwhile: Callable[[], object] = lambda: None) -> Iterator[Run]:
    """The run of a fingerprint, locked against other trainers. All but a few old runs are removed.

    If another trainer holds the run, prints that, and waits until it ends. It may be that of an
    experiment that differs only after training, or one that has not ended since its parent was
    killed. `meanwhile` is called repeatedly while it waits.
    """
    folder = project() / "models" / "checkpoints" / name
    with ExitStack() as held:
        if not _acquire(folder, held):
            print(
                f"waiting    another trainer of the same run uses {folder}; this one continues "
                "when it ends",
                flush=True,
            )
            while not _acquire(folder, held):
                meanwhile()
                time.sleep(0.1)
        yield Run(folder)


def _acquire(folder: Path, held: ExitStack) -> bool:
    """Lock the run in a folder until `held` closes, and remove old runs. False if it is in use.

    Only one process at a time does this, so that none removes a folder that another is about to
    lock.
    """
    with hold(folder.with_name("lock"), seconds=-1), suppress(Timeout):
        with writing(folder):
            folder.mkdir(exist_ok=True)
        held.enter_context(hold(folder / "lock"))
        _prune(folder.parent, folder)
        return True
    return False


def _priority(run: Path) -> tuple[bool, float]:
    """What decides which runs are kept: unfinished before finished, then recent before old."""
    return not (run / "finished.json").exists(), run.stat().st_mtime


def _prune(root: Path, current: Path) -> None:
    """Remove all but a few of the other runs: finished ones first, then the oldest.

    A run that another trainer holds is left alone.
    """
    others = [path for path in root.iterdir() if path.is_dir() and path != current]
    for path in sorted(others, key=_priority)[:-KEPT_RUNS]:
        with suppress(Timeout), hold(path / "lock"):
            shutil.rmtree(path)
