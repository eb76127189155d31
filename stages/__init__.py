"""The stages of dvc.yaml, each a module that runs as a process of its own."""

# This import comes first, so that the process ends with DVC even while it imports libraries.
import reward  # noqa: F401
