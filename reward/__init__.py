"""The library of the reward model: it imports no stage, and may be installed alone."""

# First of all: a process that another one has started follows it before libraries are imported.
import reward.process  # noqa: F401
