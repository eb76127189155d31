"""How fast this pipeline and others train a reward model: python -m benchmarks.speed."""

# First of all: it silences what bitsandbytes warns of at its import.
import reward.process  # noqa: F401
