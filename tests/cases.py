"""Rollouts that hypothesis draws: episodes of any length and ending in any number of envs."""

from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st


class Episode(NamedTuple):
    """How long an episode lasts and how it ends; one may end both ways at once, which is a termination."""

    length: int
    terminated: bool
    truncated: bool


class Step(NamedTuple):
    """One env step: what it earns and whether it is the last of its episode."""

    reward: float
    terminated: bool
    truncated: bool

    @property
    def ends(self) -> bool:
        return self.terminated or self.truncated


@dataclass
class Case:
    """Some rollouts of some envs, each of which goes through its episodes again and again."""

    episodes: list[list[Episode]]
    act_steps: int = 1
    windows: int = 1
    n_rollouts: int = 1
    spare_actions: int = 0
    ft_denoising_steps: int = 2
    gamma: float = 0.9
    gae_lambda: float = 0.8
    seed: int = 0

    @property
    def n_envs(self) -> int:
        return len(self.episodes)

    @property
    def n_steps(self) -> int:
        return self.act_steps * self.windows

    def lives(self) -> list[list[Step]]:
        """
        :return: The steps of each env, through all rollouts.
        """
        rng = np.random.default_rng(self.seed)
        lives = []
        for episodes in self.episodes:
            life: list[Step] = []
            for length, terminated, truncated in cycle(episodes):
                # Heavy tails: some rewards are so large that their scaled ones are clipped. A VecEnv's are float32.
                rewards = rng.standard_t(2, length).astype(np.float32).tolist()
                life += [Step(reward, False, False) for reward in rewards]
                life[-1] = Step(life[-1].reward, terminated, truncated)
                if len(life) >= self.n_rollouts * self.n_steps:
                    break
            lives.append(life)
        return lives


ENDINGS = st.sampled_from([(True, False), (False, True), (True, True)])
EPISODES = st.builds(lambda length, ending: Episode(length, *ending), st.integers(1, 9), ENDINGS)
CASES = st.builds(
    Case,
    episodes=st.lists(st.lists(EPISODES, min_size=1, max_size=6), min_size=1, max_size=4),
    act_steps=st.integers(1, 5),
    windows=st.integers(1, 5),
    n_rollouts=st.integers(1, 3),
    spare_actions=st.integers(0, 2),
    ft_denoising_steps=st.integers(1, 3),
    gamma=st.sampled_from([0.0, 0.5, 0.9, 0.999, 1.0]),
    gae_lambda=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
# Memory is allocated for one decision per window and env, and here each window has four.
GROWING = Case([[Episode(1, True, False)], [Episode(1, False, True)]], act_steps=4, windows=3, n_rollouts=2)

# ---------------------------------------------------------------------- the slow, obvious model
