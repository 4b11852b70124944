"""What tests of shared models share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from safetensors.torch import load_file, save_file

from sb3_dppo import DPPO
from sb3_dppo.runs.sharing import _sha256

SMALL = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=4, horizon=4)
FILES = {"config.json", "model.safetensors", "README.md"}


class SpaceEnv(gym.Env):
    """
    Random observations of any space.

    :param observation_space: The space.
    """

    def __init__(self, observation_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, spaces.Box(-1, 2, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 1.0, self.np_random.random() < 0.1, False, {}


IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
DICT = spaces.Dict(
    {
        "z": spaces.Box(-np.inf, np.inf, (3,), np.float64),
        "camera": IMAGE,
        "kind": spaces.Discrete(3),
        "b": spaces.Box(0, 1, (2,)),
    }
)


def make_model(env: Any = "Pendulum-v1", policy: str = "DiffusionMlpPolicy", **kwargs: Any) -> DPPO:
    arguments: dict[str, Any] = dict(n_steps=16, batch_size=32, n_epochs=2, policy_kwargs=SMALL, seed=0, device="cpu")
    return DPPO(policy, env, **{**arguments, **kwargs})


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change: Callable[[dict[str, th.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    accept_weights(folder)


def accept_weights(folder: Path) -> None:
    change_config(folder, lambda config: config.update(weights_sha256=_sha256(folder / "model.safetensors")))
