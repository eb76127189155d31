"""Measurements of speed and of parameters; their reports are in benchmarks/results."""

# This import comes first, because it silences a warning that bitsandbytes gives on import.
import reward  # noqa: F401
