"""How a stage runs: its command line, and what would make DVC's record of it untrue.

DVC records dependencies and parameters as they are when the stage is done. If they are no longer
what the stage has read, the record would say that other inputs have made these outputs, and DVC's
cache would return them for those.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from reward import params
from reward.outputs import digest
from reward.process import STAGED, Fault, loaded_modules, run

# The folders in which stages write their outputs.
OUTPUTS = ("data", "metrics", "models", "reports")


def run_stage(name: str, description: str | None, main: Callable[[], None]) -> None:
    """Run the `main` of a stage. A stage reads params.yaml, so its only argument is --help."""
    argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A stage takes its parameters from params.yaml. `dvc repro` runs all stages.",
    ).parse_args()

    def recorded() -> None:
        require_inside()
        before = digests_of_code()
        main()
        require_unchanged(before)

    run(recorded if STAGED else main)


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


def digests_of_code() -> dict[Path, str]:
    return {path: digest(path) for path in loaded_modules().values()}


def require_unchanged(code: dict[Path, str]) -> None:
    """Raises a Fault if parameters or code have changed since the stage began."""
    changed = params.changed()
    for path, before in code.items():
        if not path.exists() or digest(path) != before:
            changed.append(os.path.relpath(path))
    if changed:
        raise Fault(
            f"changed since the stage began: {', '.join(changed)}; DVC would record this for what "
            "the stage has made; change it back, or leave it, and run the same command again"
        )
