"""How fast this project and others train a reward model: python -m benchmarks.speed."""

# Imported first, because it silences a warning of bitsandbytes at import.
import reward.process  # noqa: F401
