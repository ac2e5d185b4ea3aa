"""What two selections keep differently."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Comparison:
    """How many rows two selections keep."""

    a_kept: int
    b_kept: int
    both: int
    only_a: int
    only_b: int


def compare_kept(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> Comparison:
    """a, b: (n,) which of the same rows each keeps."""
    one, two, both = (int(np.count_nonzero(mask)) for mask in (a, b, a & b))
    return Comparison(one, two, both, one - both, two - both)
