"""What two texts begin with in common."""

import numpy as np
import numpy.typing as npt


def prefix_length(chosen: npt.ArrayLike, rejected: npt.ArrayLike) -> int:
    """How many first ids two sequences share, at most one less than the shorter has."""
    left, right = np.asarray(chosen), np.asarray(rejected)
    limit = max(min(len(left), len(right)) - 1, 0)
    differs = left[:limit] != right[:limit]
    first = int(differs.argmax()) if limit else 0
    return first if limit and differs[first] else limit
