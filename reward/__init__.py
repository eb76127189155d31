"""The library of the reward model. It imports no stage, and can be installed alone."""

# This import comes first, so that a process watches its parent before libraries are imported.
import reward.process  # noqa: F401
