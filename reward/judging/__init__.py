"""What rewards say about a reward model."""
