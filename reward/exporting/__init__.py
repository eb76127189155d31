"""An exported reward model, and whether other loaders score as we do."""
