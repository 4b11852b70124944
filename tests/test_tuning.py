"""Hyperparameter optimisation by several processes on one study, of which one is killed."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

HEARTBEAT_SECONDS = 1
N_TRIALS = 4
# rl_zoo3.train, with signs of life that are worth waiting for.
PROGRAM = f"""
import runpy
import sb3_dppo.heartbeat
sb3_dppo.heartbeat.HEARTBEAT_SECONDS = {HEARTBEAT_SECONDS}
runpy.run_module("rl_zoo3.train", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def database() -> Iterator[str]:
    """URL of a PostgreSQL server of our own."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(programs[-1]) if programs else "")
    if not initdb:
        pytest.skip("PostgreSQL is not installed")
    folder = Path(initdb).resolve().parent
    # It refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        if user is not None:
            shutil.chown(name, user)
        subprocess.run([initdb, "-D", f"{name}/data", "-U", "tests", "-A", "trust"], user=user, cwd=name, check=True)
        options = ["-D", f"{name}/data", "-h", "127.0.0.1", "-p", str(port), "-k", name]
        server = subprocess.Popen([folder / "postgres", *options], user=user, cwd=name)
        try:
            deadline = time.monotonic() + 30
            while subprocess.run([folder / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]).returncode != 0:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            yield f"postgresql+psycopg://tests@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # disconnects those who are still there
            server.wait(timeout=30)


def start_worker(storage: str, folder: Path, n_timesteps: int = 512) -> subprocess.Popen[str]:
    arguments = "--algo dppo --env Pendulum-v1 -optimize --study-name shared --eval-episodes 1 --n-evaluations 2 --device cpu"
    arguments += f" --storage {storage} --max-total-trials {N_TRIALS} -n {n_timesteps} -f logs --num-threads 1"
    command = [sys.executable, "-c", PROGRAM, *arguments.split()]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def kill_one_of_four(url: str, storage: BaseStorage, folder: Path) -> tuple[optuna.Study, str]:
    """The first one is killed in its trial, while the others work. Gives the study, and what all have printed."""
    study = optuna.create_study(study_name="shared", storage=storage, direction="maximize")

    def n_trials(*states: TrialState) -> int:
        return len(study.get_trials(deepcopy=False, states=states or None))

    workers = [start_worker(url, folder, n_timesteps=1_000_000)]
    try:
        wait_for(lambda: n_trials() == 1)
        workers += [start_worker(url, folder) for _ in range(3)]
        wait_for(lambda: n_trials() > 1)
        workers[0].kill()
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
        assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0, 0, 0], outputs
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return study, "".join(outputs)


def check_trials(study: optuna.Study, n_finished: int, lost_state: TrialState, outputs: str) -> None:
    trials = study.trials
    assert trials[0].state == lost_state
    finished = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    # Workers that end their trials at the same time may each begin another one.
    assert len(finished) == len(trials) - 1 and n_finished <= len(finished) < n_finished + 3
    assert all(len(trial.intermediate_values) >= 2 for trial in finished)
    # Once each.
    assert sorted(map(int, re.findall(r"Trial (\d+) (?:finished|pruned)", outputs))) == [trial.number for trial in finished]


@pytest.mark.slow
def test_postgresql(database: str, tmp_path: Path) -> None:
    storage = RDBStorage(database)
    study, outputs = kill_one_of_four(database, storage, tmp_path)
    # Whoever comes later finds that it is lost, and does another one instead.
    time.sleep(3 * HEARTBEAT_SECONDS)
    latecomer = start_worker(database, tmp_path)
    output = latecomer.communicate(timeout=240)[0]
    assert latecomer.returncode == 0, output
    check_trials(study, N_TRIALS, TrialState.FAIL, outputs + output)
    storage.engine.dispose()


@pytest.mark.slow
def test_journal(tmp_path: Path) -> None:
    """Without signs of life: the study goes on, and the lost trial counts as running."""
    url = str(tmp_path / "study.log")
    study, outputs = kill_one_of_four(url, JournalStorage(JournalFileBackend(url)), tmp_path)
    check_trials(study, N_TRIALS - 1, TrialState.RUNNING, outputs)
