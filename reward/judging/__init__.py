"""What rewards say of a reward model."""
