"""The reward model: base, adapters and head, packs of texts, training."""
