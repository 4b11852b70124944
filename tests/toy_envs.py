"""Small environments for tests."""

import random
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class CountingEnv(gym.Env):
    """
    Observes how many steps its episode has had; asymmetric float64 bounds; ends after a given number of steps.

    :param length: Steps of an episode.
    :param truncate: Whether it ends by truncation or by termination.
    :param n_actions: Size of the action space.
    """

    def __init__(self, length: int = 7, truncate: bool = False, n_actions: int = 2) -> None:
        self.length, self.truncate = length, truncate
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), dtype=np.float64)
        self.action_space = spaces.Box(np.linspace(-1, -3, n_actions), np.linspace(2, 0.5, n_actions), dtype=np.float64)
        self.t = 0
        self.actions: list[np.ndarray] = []

    def _obs(self) -> np.ndarray:
        return np.array([self.t, self.length, 0.1])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(np.asarray(action, dtype=np.float64)), action
        self.actions.append(np.array(action))
        self.t += 1
        end = self.t >= self.length
        return self._obs(), float(self.t), end and not self.truncate, end and self.truncate, {}


class NanEnv(CountingEnv):
    """
    Observes NaN at one step.

    :param nan_step: The step.
    """

    def __init__(self, nan_step: int = 5) -> None:
        super().__init__(length=100)
        self.nan_step = nan_step

    def _obs(self) -> np.ndarray:
        return super()._obs() * (np.nan if self.t == self.nan_step else 1)


class WalkEnv(gym.Env):
    """
    A random walk that actions push, with episodes of random length that are terminated or truncated.

    :param shared_generators: Whether it also draws from the two generators that a program shares, of NumPy and of Python.
    """

    def __init__(self, shared_generators: bool = False) -> None:
        self.shared_generators = shared_generators
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), dtype=np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), dtype=np.float32)
        self.position = np.zeros(2)

    def _obs(self) -> np.ndarray:
        return self.position.astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=2)
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        noise = self.np_random.normal(size=2)
        if self.shared_generators:
            noise += np.random.normal(size=2) + random.gauss(0, 1)
        self.position = self.position + 0.3 * action + 0.1 * noise
        u = self.np_random.random()
        return self._obs(), -float(np.square(self.position).sum()), u < 0.08, 0.08 <= u < 0.16, {}


class ResumableWalkEnv(WalkEnv):
    """
    The same, with a state that can be saved.
    """

    def get_resume_state(self) -> dict[str, Any]:
        return dict(position=self.position, generator=self.np_random.bit_generator.state)

    def set_resume_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self.np_random.bit_generator.state = state["generator"]
