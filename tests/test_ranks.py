"""Training in two processes, each with half of the envs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from pandas import read_csv

from sb3_dppo import DPPO, ranks
from tests.rank_program import CASES

ROOT = Path(__file__).parents[1]


def run(
    *program: str | Path, n_ranks: int = 2, cwd: Path = ROOT, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if n_ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, "-m", *map(str, program)], cwd=cwd, env=environment, capture_output=True, text=True)


def play(scenario: str, folder: Path, n_ranks: int = 2, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return run("tests.rank_program", scenario, folder, n_ranks=n_ranks, options=options)


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    for n_ranks in (1, 2):
        done = play("update_three_times", tmp_path / str(n_ranks), n_ranks)
        assert done.returncode == 0, done.stderr
    for case in CASES:
        one, two = (np.load(tmp_path / str(n_ranks) / f"{case}.npz") for n_ranks in (1, 2))
        assert set(one) == set(two)
        for name in one:
            if not name.startswith("logged/time"):
                tolerance = 1e-3 if name.startswith("logged") else 1e-6
                np.testing.assert_allclose(two[name], one[name], rtol=tolerance, atol=tolerance, err_msg=f"{case}: {name}")
        one, two = (read_csv(tmp_path / str(n_ranks) / case / "progress.csv") for n_ranks in (1, 2))
        episodes = ["rollout/ep_rew_mean", "rollout/ep_len_mean"]
        np.testing.assert_allclose(two[episodes], one[episodes], rtol=1e-6, err_msg=case)


def test_checkpoints_hold_the_states_of_all(tmp_path: Path) -> None:
    assert play("train_and_save", tmp_path).returncode == 0
    assert play("resume", tmp_path).returncode == 0
    whole = np.load(tmp_path / "whole.npz")
    for name in ("middle", "end"):
        resumed = np.load(tmp_path / f"{name}.npz")
        for key in (key for key in whole if not key.startswith("logged/time")):
            np.testing.assert_array_equal(resumed[key], whole[key], err_msg=f"{name}: {key}")
    alone = play("resume", tmp_path, n_ranks=1)
    assert alone.returncode == 0 and "saved by 2 process(es) and goes on in 1: with what was learned" in alone.stderr
    assert np.load(tmp_path / "end.npz")["num_timesteps"] == whole["num_timesteps"]


def test_all_stop_when_one_does(tmp_path: Path) -> None:
    """And leave no thread of Gloo behind, which could abort the process at its end."""
    assert play("stop", tmp_path).returncode == 0
    stopped = [json.loads((tmp_path / f"stopped_{rank}.json").read_text()) for rank in (0, 1)]
    assert [state["n_rollouts"] for state in stopped] == [1, 1]
    assert not [name for state in stopped for name in state["threads"] if "gloo" in name]


@pytest.mark.parametrize(
    "scenario,message",
    [
        ("fail", "the simulator broke"),
        pytest.param("different_envs", r"n_envs must be the same in all processes, not [1, 2]", marks=pytest.mark.slow),
        pytest.param("vec_normalize", "VecNormalize in several processes", marks=pytest.mark.slow),
    ],
)
def test_what_goes_wrong_in_one_ends_all(scenario: str, message: str, tmp_path: Path) -> None:
    start = time.monotonic()
    done = play(scenario, tmp_path)
    assert done.returncode != 0 and message in done.stderr
    assert time.monotonic() - start < 60


def test_one_that_hangs_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says where. To wait for the first one's evaluation, which takes twice as long, is not to hang."""
    monkeypatch.setenv("SB3_DPPO_HANG_SECONDS", "3")
    start = time.monotonic()
    done = play("hang", tmp_path)
    assert done.returncode != 0 and (tmp_path / "evaluated").exists()
    assert "Timeout" in done.stderr and "in step" in done.stderr and "rank_program.py" in done.stderr
    assert time.monotonic() - start < 60


def test_a_killed_one_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``--max-restarts`` the program goes on from its last checkpoint, and ends as a run that was left alone does."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    done = play("restart", tmp_path, options=["--max-restarts", "1"])
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "restarted_0.npz").exists()
    restarted, whole = (np.load(tmp_path / f"{name}.npz") for name in ("restarted_1", "whole"))
    for key in (key for key in whole if not key.startswith("logged/time")):
        np.testing.assert_array_equal(restarted[key], whole[key], err_msg=key)


def test_rl_zoo(tmp_path: Path) -> None:
    arguments = "-f logs -n 512 --eval-freq 128 --eval-episodes 1 --seed 0 --device cpu"
    parameters = "-params n_envs:1 n_steps:64 batch_size:64 n_epochs:1".split()
    done = run("rl_zoo3.train", "--algo", "dppo", "--env", "Pendulum-v1", *arguments.split(), *parameters, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = [path.name for path in (tmp_path / "logs" / "dppo").iterdir()]
    assert folders == ["Pendulum-v1_1"]
    assert DPPO.load(tmp_path / "logs" / "dppo" / "Pendulum-v1_1" / "Pendulum-v1.zip").num_timesteps == 512
    # Every 128 steps of an env, the one of each process.
    evaluations = np.load(tmp_path / "logs" / "dppo" / "Pendulum-v1_1" / "evaluations.npz")
    assert evaluations["timesteps"].tolist() == [256, 512]
    # Four rollouts and two evaluations, told by the first one.
    assert done.stdout.count("total_timesteps") == 6


def test_progress_is_expected_while_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not afterwards, when predict may be called now and then."""
    armed: list[float] = []
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "_last_progress", -1e9)
    monkeypatch.setattr(ranks.faulthandler, "dump_traceback_later", lambda seconds, exit: armed.append(seconds))
    ranks.progress()
    assert armed == []
    with ranks.watched():
        ranks.progress()
    assert armed == [ranks.HANG_SECONDS]
    monkeypatch.setattr(ranks, "_last_progress", -1e9)
    ranks.progress()
    assert len(armed) == 1
