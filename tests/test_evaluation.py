from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dppo import DPPO, choose_deterministic_noise


class SizeEnv(gym.Env):
    """
    Rewards large or small actions, in episodes of five steps from random starts.

    :param sign: What the mean absolute action is multiplied with.
    """

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (3,), np.float32)
        self.starts: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.obs = 0, self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.starts.append(self.obs)
        return self.obs, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.obs, self.sign * float(np.abs(action).mean()), False, self.t == 5, {}


@pytest.mark.parametrize("sign,best", [(1.0, "observation"), (-1.0, "zero")])
def test_the_better_noise_is_kept(sign: float, best: str, tmp_path: Path) -> None:
    model = DPPO("DiffusionMlpPolicy", SizeEnv(), seed=0, device="cpu")
    env = SizeEnv(sign)
    returns = choose_deterministic_noise(model, env, n_eval_episodes=6)
    assert {noise: len(values) for noise, values in returns.items()} == {"observation": 6, "zero": 6}
    other = "zero" if best == "observation" else "observation"
    assert np.mean(returns[best]) > np.mean(returns[other])
    # One more start follows the last episode.
    np.testing.assert_array_equal(env.starts[:6], env.starts[7:13])
    model.save(tmp_path / "model.zip")
    for chosen in (model, DPPO.load(tmp_path / "model.zip")):
        assert chosen.deterministic_noise == chosen.policy.sampler.config.deterministic_noise == best


def test_errors() -> None:
    env = DummyVecEnv([SizeEnv])
    model = DPPO("DiffusionMlpPolicy", env, device="cpu")
    with pytest.raises(ValueError, match="n_eval_episodes=0"):
        choose_deterministic_noise(model, SizeEnv(), 0)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        choose_deterministic_noise(model, "Pendulum-v1")
    with pytest.raises(ValueError, match="the one that the model learns in"):
        choose_deterministic_noise(model, env)
