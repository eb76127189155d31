"""The stages of dvc.yaml, each a module that runs as a process of its own."""

# First of all: it notes who started this process before the libraries are imported, which takes
# seconds in which DVC may be killed.
import reward.process  # noqa: F401
