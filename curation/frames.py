"""Even spacing of a clip's frames."""

from __future__ import annotations


def even_indices(num_frames: int, num_wanted: int) -> list[int]:
    """`num_wanted` indices spread evenly over `num_frames`, ends included; all if there are fewer.

    A single index is the middle one. Uniform where the paper samples at random (spec A28).
    """
    if num_frames <= num_wanted:
        return list(range(num_frames))
    if num_wanted == 1:
        return [num_frames // 2]
    return [round(i * (num_frames - 1) / (num_wanted - 1)) for i in range(num_wanted)]
