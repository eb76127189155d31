"""The library of the reward model: it imports no stage, and may be installed alone."""
