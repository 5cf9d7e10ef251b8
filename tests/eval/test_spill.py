import resource
import tempfile

import numpy as np
import pytest

from engram.config import ConfigError
from eval.shared.spill import spilled


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_what_is_spilled_is_what_was_given_and_cannot_be_written(dtype: type) -> None:
    random = np.random.default_rng(0)
    parts = [random.integers(0, 200, (n, 3, 2)).astype(dtype) for n in (5, 0, 7)]
    found = spilled(iter(parts))
    assert found.dtype == dtype
    assert np.array_equal(found, np.concatenate(parts))
    assert np.array_equal(found[[11, 0, 6]], np.concatenate(parts)[[11, 0, 6]])
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_a_full_disk_is_told_in_a_line_that_names_the_folder() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ConfigError, match=f"cannot write '{tempfile.gettempdir()}'"):
            spilled(np.zeros((1000, 8)) for _ in range(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
