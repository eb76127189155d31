"""The stages of dvc.yaml, each a module that runs as a process of its own."""

# First of all: this process then ends with DVC while it still imports the libraries.
import reward  # noqa: F401
