"""The common prefix of two token sequences."""

import numpy as np
import numpy.typing as npt

# The ids of a text: [tokens].
TokenIds = npt.NDArray[np.int32]


def prefix_length(chosen: npt.ArrayLike, rejected: npt.ArrayLike) -> int:
    """The length of the common prefix of two [ids], at most one less than the shorter length."""
    left, right = np.asarray(chosen), np.asarray(rejected)
    limit = max(min(len(left), len(right)) - 1, 0)
    differs = left[:limit] != right[:limit]
    first = int(differs.argmax()) if limit else 0
    return first if limit and differs[first] else limit
