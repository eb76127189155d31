"""The stages of dvc.yaml, each a module that runs as a process of its own."""

import sys
from importlib.util import find_spec

# This import comes before libraries, so that the process ends with DVC even while it imports them.
import reward  # noqa: F401

if not all(map(find_spec, ("torch", "pyarrow"))):
    sys.exit(
        f"{sys.executable} lacks the packages of the pipeline; run make repro, or activate the "
        "environment: . .venv/bin/activate"
    )
