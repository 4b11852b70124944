"""Meta-World's tasks with sparse success. What needs Meta-World itself is skipped without `sb3-dppo[manipulation]`."""

import importlib.util
import os
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_dppo import DPPO, load_demonstrations
from sb3_dppo.envs.metaworld import TASKS

ENV_ID = "MetaWorldSparse/pick-place-v3"

needs_metaworld = pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="Meta-World is not installed")


def test_all_tasks_are_registered() -> None:
    assert len(TASKS) == 50
    for task in TASKS:
        spec = gym.spec(f"MetaWorldSparse/{task}")
        assert spec.max_episode_steps == 200 and spec.kwargs == dict(task=task)


def test_without_metaworld_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "metaworld.env_dict", raising=False)
    with pytest.raises(ImportError, match=r"reach-v3 needs Meta-World.*pip install 'sb3-dppo\[manipulation\]'"):
        gym.make("MetaWorldSparse/reach-v3")


def test_bundled_demonstrations() -> None:
    demonstrations = load_demonstrations("metaworld-pick-place")
    assert demonstrations.env_id == ENV_ID and demonstrations.n_episodes == 200
    assert demonstrations.observations.shape == (len(demonstrations), 39)
    assert demonstrations.actions.shape == (len(demonstrations), 4)
    assert demonstrations.returns is not None and (demonstrations.returns == 1).all()
    assert demonstrations.traj_lengths.max() <= 200


def python(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_metaworld
def test_metaworld_is_imported_when_an_env_is_made(tmp_path: Path) -> None:
    code = (
        "import sys, sb3_dppo, gymnasium\n"
        "assert 'metaworld' not in sys.modules\n"
        f"gymnasium.make('{ENV_ID}')\n"
        "assert 'metaworld' in sys.modules\n"
    )
    python("-c", code, cwd=tmp_path)


@needs_metaworld
def test_tasks_are_those_of_metaworld() -> None:
    from metaworld.env_dict import ENV_CLS_MAP

    assert sorted(TASKS) == sorted(ENV_CLS_MAP)


@needs_metaworld
@pytest.mark.parametrize("task", ["pick-place-v3", "reach-v3", "drawer-open-v3"])
def test_seeds(task: str) -> None:
    env, other = gym.make(f"MetaWorldSparse/{task}"), gym.make(f"MetaWorldSparse/{task}")
    np.random.seed(1)  # not what places objects
    first = [env.reset(seed=5)[0], env.reset()[0], env.reset(seed=6)[0]]
    np.random.seed(2)
    again = [other.reset(seed=5)[0], other.reset()[0], other.reset(seed=6)[0]]
    np.testing.assert_array_equal(first, again)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(first[i], first[j])
    assert all(env.observation_space.contains(obs) for obs in first)


@needs_metaworld
def test_goals_fill_their_range() -> None:
    env = gym.make(ENV_ID)
    goals = np.array([env.reset(seed=seed)[0][36:] for seed in range(100)])
    low, high = env.observation_space.low[36:], env.observation_space.high[36:]  # type: ignore[attr-defined]
    assert (high > low).all() and (goals >= low).all() and (goals <= high).all()
    assert len(np.unique(goals[:, 0])) == 100
    np.testing.assert_allclose(goals.min(axis=0), low, atol=0.1 * (high - low).max())
    np.testing.assert_allclose(goals.max(axis=0), high, atol=0.1 * (high - low).max())


@needs_metaworld
def test_checkers_accept_the_env() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unbounded observations
        check_env(gym.make(ENV_ID).unwrapped)
    spec = gym.make(ENV_ID).spec
    assert spec is not None and gym.make(spec).spec == spec


def replay(env: gym.Env, observations: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
    """Start as a demonstration does and repeat its actions: observations and what the steps returned else."""
    task_env = env.unwrapped.task_env  # type: ignore[attr-defined]
    task_env._freeze_rand_vec = True
    task_env._last_rand_vec = np.concatenate([observations[0, 4:7], observations[0, 36:]]).astype(np.float64)
    seen, outcomes = [env.reset()[0]], []
    for action in actions:
        obs, *outcome = env.step(action)
        seen.append(obs)
        outcomes.append(tuple(outcome))
    return np.array(seen), outcomes


@needs_metaworld
def test_demonstrations_are_of_this_env() -> None:
    demonstrations = load_demonstrations("metaworld-pick-place")
    starts = np.concatenate([[0], np.cumsum(demonstrations.traj_lengths)])[:11]
    n_same = 0
    for start, end in pairwise(starts):
        observations = demonstrations.observations[start:end]
        seen, outcomes = replay(gym.make(ENV_ID), observations, demonstrations.actions[start:end])
        # Before contacts amplify the rounding of the file, which makes objects quiver from the beginning.
        np.testing.assert_allclose(seen[:15], observations[:15], atol=2e-3)
        rewards = [outcome[0] for outcome in outcomes]
        assert set(rewards) <= {0.0, 1.0}
        for reward, terminated, truncated, info in outcomes:
            assert terminated == info["is_success"] == (reward == 1) and not truncated
        n_same += rewards == [0.0] * (len(rewards) - 1) + [1.0]
    assert n_same >= 6


@needs_metaworld
def test_truncation_after_200_steps() -> None:
    env = make_vec_env(ENV_ID, 1, seed=0)
    env.reset()
    for step in range(1, 201):
        _, rewards, dones, infos = env.step(np.zeros((1, 4), dtype=np.float32))
        assert rewards[0] == 0 and dones[0] == (step == 200)
    assert infos[0]["TimeLimit.truncated"] and not infos[0]["is_success"]
    assert infos[0]["episode"]["l"] == 200


@needs_metaworld
def test_envs_in_processes_of_their_own() -> None:
    # Gymnasium's "module:id": the processes have not imported what registers the id.
    env = make_vec_env(f"sb3_dppo:{ENV_ID}", 2, seed=0, vec_env_cls=SubprocVecEnv)
    obs = env.reset()
    env.close()
    assert isinstance(obs, np.ndarray) and obs.shape == (2, 39) and not np.array_equal(obs[0], obs[1])


@needs_metaworld
def test_behaviour_cloning_and_rl_zoo3(tmp_path: Path) -> None:
    bc = ("--demos", "metaworld-pick-place", "-o", "bc.zip", "--epochs", "1", "--eval-episodes", "1", "--num-threads", "1")
    small = ("--policy-kwargs", "net_arch:{'pi': [16], 'vf': [16]}")
    assert "Mean reward" in python("-m", "sb3_dppo.bc", "--env", ENV_ID, *bc, *small, cwd=tmp_path)
    settings = ("-params", "n_envs:2", "n_steps:20", "batch_size:20")
    command = ("--algo", "dppo", "--env", ENV_ID, "-i", "bc.zip", "-n", "80", "--eval-freq", "40", "--eval-episodes", "1")
    out = python("-m", "rl_zoo3.train", *command, "--num-threads", "1", "--vec-env", "subproc", *settings, cwd=tmp_path)
    assert "dppo_finetune.yml" in out
    run = tmp_path / "logs/dppo/MetaWorldSparse-pick-place-v3_1"
    assert DPPO.load(run / "MetaWorldSparse-pick-place-v3.zip").num_timesteps == 80
    enjoy = ("--algo", "dppo", "--env", ENV_ID, "-f", "logs", "-n", "210", "--no-render")
    assert "Success rate" in python("-m", "rl_zoo3.enjoy", *enjoy, cwd=tmp_path)
