"""robosuite's tasks with sparse success. What needs robosuite itself is skipped without `sb3-dppo[robosuite]`."""

import importlib.util
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env

from sb3_dppo import DPPO
from sb3_dppo.envs.robosuite import TASKS

SIZES = {"Lift": 19, "Can": 23, "Square": 23}

needs_robosuite = pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="robosuite is not installed")


def make(task: str, **kwargs: Any) -> gym.Env:
    return gym.make(f"RobosuiteSparse/{task}", **kwargs)


def test_all_tasks_are_registered() -> None:
    for task, steps in dict(Lift=300, Can=300, Square=400).items():
        spec = gym.spec(f"RobosuiteSparse/{task}")
        assert spec.max_episode_steps == steps and spec.kwargs == dict(task=task)


def test_without_robosuite_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robosuite", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"Lift needs robosuite.*pip install 'sb3-dppo\[robosuite\]'"):
        make("Lift")


@needs_robosuite
@pytest.mark.parametrize("task", list(TASKS))
def test_seeds(task: str) -> None:
    env, other = make(task), make(task)
    np.random.seed(1)  # what robosuite places objects by
    first = [env.reset(seed=5)[0], env.reset()[0], env.reset(seed=6)[0]]
    np.random.seed(2)
    again = [other.reset(seed=5)[0], other.reset()[0], other.reset(seed=6)[0]]
    np.testing.assert_array_equal(first, again)
    expected = np.random.RandomState(2).random_sample()
    assert np.random.random_sample() == expected, "the global generator was touched"
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(first[i], first[j])
    assert all(obs.shape == (SIZES[task],) and env.observation_space.contains(obs) for obs in first)


@needs_robosuite
@pytest.mark.parametrize("task", list(TASKS))
def test_observations_are_robomimics(task: str) -> None:
    env = make(task)
    obs = env.reset(seed=0)[0]
    simulator = env.unwrapped.simulator  # type: ignore[attr-defined]
    for _ in range(3):
        body = {"Lift": "cube_main", "Can": "Can_main", "Square": "SquareNut_main"}[task]
        data = simulator.sim.data
        position, rotation = data.get_body_xpos(body), data.get_body_xmat(body).reshape(3, 3)
        hand, hand_rotation = obs[:3], simulator.sim.data.get_body_xmat("robot0_right_hand").reshape(3, 3)
        np.testing.assert_allclose(obs[9:12], position, atol=1e-6)
        if task == "Lift":
            np.testing.assert_allclose(obs[16:], hand - position, atol=1e-6)
        else:
            np.testing.assert_allclose(obs[16:19], hand_rotation.T @ (position - hand), atol=1e-5)
            x, y, z, w = obs[19:]
            first_column = [1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)]
            np.testing.assert_allclose(first_column, (hand_rotation.T @ rotation)[:, 0], atol=1e-5)
        obs = env.step(env.action_space.sample())[0]


@needs_robosuite
def test_success_ends_the_episode_with_the_only_reward() -> None:
    env = make("Lift")
    obs = env.reset(seed=0)[0]
    simulator = env.unwrapped.simulator  # type: ignore[attr-defined]
    *_, info = env.step(np.zeros(7))
    assert info == {"is_success": False}
    joint = simulator.cube.joints[0]
    pose = simulator.sim.data.get_joint_qpos(joint).copy()
    pose[2] += 0.2
    simulator.sim.data.set_joint_qpos(joint, pose)
    obs, reward, terminated, truncated, info = env.step(np.zeros(7))
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"is_success": True})
    assert env.observation_space.contains(obs)


@needs_robosuite
def test_checkers_accept_the_envs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unbounded observations
        check_env(make("Lift").unwrapped)
    spec = make("Can").spec
    assert spec is not None and gym.make(spec).spec == spec


@needs_robosuite
def test_cameras() -> None:
    env = make("Lift", cameras=["agentview", "robot0_eye_in_hand"], height=96, width=128, render_mode="rgb_array")
    assert isinstance(env.observation_space, spaces.Dict)
    obs = env.reset(seed=0)[0]
    assert obs["agentview"].shape == (96, 128, 3) and obs["state"].shape == (9,) and env.observation_space.contains(obs)
    image = obs["agentview"].astype(int)
    assert (image[..., 0] - image[..., 1] > 50).sum() > 30, "no red cube"
    # The right way up: arm and wall above, the white table below.
    assert image[:24].mean() < image[-24:].mean() - 20
    np.testing.assert_array_equal(env.render(), obs["agentview"])
    with pytest.raises(ValueError, match=r"cameras=\['front'\]: 'front' is not in the scene; it has .*agentview"):
        make("Lift", cameras=["front"])


@needs_robosuite
def test_learning() -> None:
    model = DPPO("DiffusionMlpPolicy", make("Lift"), n_steps=32, batch_size=32, n_epochs=1).learn(64)
    assert model.num_timesteps == 64
