"""How fast this project and others train a reward model: python -m benchmarks.speed."""
