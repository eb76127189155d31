"""An exported reward model, and the check that other loaders compute the same rewards."""
