"""Trained checkpoints, one of each kind."""

from pathlib import Path

import pytest
from trained import MIXTURE, train


@pytest.fixture(scope="session")
def trained_cache(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("trained"))  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def memory_run(trained_cache: Path) -> Path:
    """A hybrid: experts, and a memory before block 1."""
    return train("memory", trained_cache)


@pytest.fixture(scope="session")
def experts_run(trained_cache: Path) -> Path:
    """All inactive parameters in experts."""
    return train("experts", trained_cache)


@pytest.fixture(scope="session")
def branches_run(trained_cache: Path) -> Path:
    """Two residual branches, and memories before blocks 0 and 2."""
    return train("branches", trained_cache)


@pytest.fixture(scope="session")
def told_run(trained_cache: Path) -> Path:
    """The hybrid, with a mixture of synthetic tasks in its text."""
    return train("memory", trained_cache, mixture=MIXTURE)
