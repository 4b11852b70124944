"""Settings for all tests."""

import pytest
import torch as th


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small batches are slower with more, and tests run in parallel processes."""
    th.set_num_threads(1)
