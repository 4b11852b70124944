"""Settings for all tests."""

import multiprocessing

import pytest
import torch as th

# Processes that tests start are forked from one that has loaded all this: an import takes seconds.
multiprocessing.set_forkserver_preload(["tests.scenarios"])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small batches are slower with more, and tests run in parallel processes."""
    th.set_num_threads(1)
