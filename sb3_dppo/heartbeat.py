"""Tuning by several processes: trials whose process was killed."""

import functools
from typing import Any

import optuna
from optuna.storages import RDBStorage, fail_stale_trials

# Between two signs of life of a trial; without one for twice as long it is lost.
HEARTBEAT_SECONDS = 60


class _HeartbeatStorage(RDBStorage):
    """A database in which running trials leave signs of life. rl_zoo3 takes it for the URL that it stands for."""

    def __init__(self, url: str) -> None:
        super().__init__(url, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=2 * HEARTBEAT_SECONDS)

    def __str__(self) -> str:
        return self.url

    def endswith(self, suffix: str) -> bool:
        return self.url.endswith(suffix)


def with_heartbeat(optimization: Any) -> Any:
    """
    In rl_zoo3 the trial of a process that was killed counts as running for ever, also among ``--max-total-trials``.

    :param optimization: ``ExperimentManager.hyperparameters_optimization``.
    :return: The same. With "dppo" and a database as ``--storage`` such trials are marked as failed. Optuna does it before each
        trial, and here before the first one.
    """

    @functools.wraps(optimization)
    def wrapped(manager: Any) -> None:
        url = manager.storage
        if manager.algo != "dppo" or url is None or url.endswith(".log"):
            return optimization(manager)
        storage = _HeartbeatStorage(url)
        if manager.study_name in optuna.get_all_study_names(storage):
            fail_stale_trials(optuna.load_study(study_name=manager.study_name, storage=storage))
        manager.storage = storage
        try:
            return optimization(manager)
        finally:
            manager.storage = url

    return wrapped
