"""Settings for all tests."""

import multiprocessing
from collections.abc import Iterator

import pytest
import torch as th
from hypothesis import settings

# The same examples in every run, however slow the machine. The slow suite's are drawn anew and printed when they fail.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("repeatable")

# Processes that tests start are forked from one that has loaded all this: an import takes seconds.
multiprocessing.set_forkserver_preload(["tests.scenarios", "rl_zoo3.exp_manager"])


@pytest.fixture(autouse=True, scope="session")
def folder_of_loggers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Loggers of Stable-Baselines3 write where pytest cleans up."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SB3_LOGDIR", str(tmp_path_factory.mktemp("sb3")))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small batches are slower with more, and tests run in parallel processes."""
    th.set_num_threads(1)
