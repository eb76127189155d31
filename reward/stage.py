"""How a stage runs: its command line, and what would make DVC's record of it untrue.

DVC records dependencies and parameters as they are when the stage is done. If they are no longer
what the stage has read, the record would say that other inputs have made these outputs, and DVC's
cache would return them for those.
"""

import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from reward import params
from reward.outputs import digest
from reward.params import read_yaml
from reward.process import UNDER_DVC, Fault, command_line, project, run

# The folders in which stages write their outputs.
OUTPUTS = ("data", "metrics", "models", "reports")
# The folders of the project's code.
CODE = ("reward", "stages")
# The folder of a project in which DVC copies it for `dvc exp run --temp` and the queue.
COPIES = Path(".dvc/tmp/exps")

# The size and time of each file.
Stamps = dict[Path, tuple[int, int]]
# The files below each path that the stage reads, as they were then.
_read: dict[Path, Stamps] = {}


def run_stage(name: str, description: str | None, main: Callable[[], None]) -> None:
    """Run the `main` of a stage. A stage reads params.yaml, so its only argument is --help."""
    epilog = "A stage takes its parameters from params.yaml. `dvc repro` runs all stages."
    command_line(name, description, epilog).parse_args()

    def recorded() -> None:
        require_inside()
        require_whole_history()
        params.loaded.clear()
        _read.clear()
        before = digests_of_code(name)
        main()
        require_unchanged(before)

    run(recorded if UNDER_DVC else main)


def require_inside() -> None:
    """Raises a Fault if a folder of outputs is a link that leads out of the project.

    DVC refuses such outputs, but only when the stage is done.
    """
    for folder in map(Path, OUTPUTS):
        if not folder.resolve().is_relative_to(Path.cwd()):
            raise Fault(
                f"{folder} is a link to {folder.resolve()}, but DVC records no outputs outside of "
                "the project; make it a folder, and run dvc cache dir PATH if DVC's copies of the "
                "outputs should be on another disk"
            )


def require_whole_history() -> None:
    """Raises a Fault if this stage runs in a copy of a project whose git repository is shallow.

    DVC fetches the finished experiment from the copy's repository. From a commit whose parent is
    missing, that fails, and DVC removes the copy and exits with 0.
    """
    if not (home := copied_from()):
        return
    git = ["git", "-C", str(home), "rev-parse", "--is-shallow-repository"]
    with suppress(OSError):  # there is no git
        if subprocess.run(git, capture_output=True, text=True).stdout.strip() == "true":
            raise Fault(
                f"{home} is a shallow git clone, from which DVC would lose this experiment when "
                "it has finished; run git fetch --unshallow there first"
            )


def copied_from() -> Path | None:
    """The project of which the working directory is DVC's copy for an experiment, or None.

    Such a copy is made by `dvc exp run --temp` and the queue.
    """
    home = project().resolve()
    return home if Path.cwd().is_relative_to(home / COPIES) else None


def reads(path: Path) -> None:
    """Note that the stage reads a file or folder that no stage has made, so people edit it."""
    _read[path] = stamps(path)


def stamps(path: Path) -> Stamps:
    files = [each for each in (path, *path.rglob("*")) if each.is_file()]
    return {each: (stat.st_size, stat.st_mtime_ns) for each in files for stat in [each.stat()]}


def digests_of_code(module: str) -> dict[Path, str]:
    """The digests of the code that dvc.yaml lists for a stage, even if it is imported later."""
    stages = read_yaml(Path("dvc.yaml"))["stages"].values()
    listed = [stage["deps"] for stage in stages if module in str(stage.get("cmd"))]
    paths = [Path(str(dependency)) for dependencies in listed for dependency in dependencies]
    return {path: digest(path) for path in paths if path.parts[0] in CODE}


def require_unchanged(code: dict[Path, str]) -> None:
    """Raises a Fault if parameters, data or code have changed since the stage began."""
    changed = params.changed()
    for path, then in _read.items():
        now = stamps(path)
        changed += [str(each) for each in {**then, **now} if then.get(each) != now.get(each)]
    for path, before in code.items():
        if not path.exists() or digest(path) != before:
            changed.append(str(path))
    if changed:
        raise Fault(
            f"changed since the stage began: {', '.join(changed)}; DVC would record this for what "
            "the stage has made; change it back, or leave it, and run the same command again"
        )
