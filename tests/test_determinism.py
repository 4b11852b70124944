"""Same seed, same machine, same number of threads: the same run, bit for bit."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_dppo import BC, DPPO, Demonstrations
from sb3_dppo.features.extractors import VitExtractor
from tests.features.test_observations import PixelPendulum

# Batches and widths at which PyTorch shares work between threads.
NETS = dict(net_arch=dict(pi=[256], vf=[256]), denoising_steps=3, horizon=2)
VIT = dict(features_extractor_class=VitExtractor, features_extractor_kwargs=dict(width=16, spatial_dim=8, random_shift=4))
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vector": ("DiffusionMlpPolicy", dict(policy_kwargs=NETS)),
    "pre-trained": ("DiffusionMlpPolicy", dict(policy_kwargs=NETS, ft_denoising_steps=2, bc_coef=0.1)),
    "pixels": ("DiffusionCnnPolicy", dict(policy_kwargs=NETS, n_steps=32, n_epochs=1)),
    "dict": ("DiffusionMultiInputPolicy", dict(policy_kwargs=NETS | VIT, scheduler="ddim", n_steps=32, n_epochs=1)),
}


class PendulumFactory:
    """
    Makes the env of a model, also in another process.

    :param name: Which model.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> gym.Env:
        os.environ["SDL_VIDEODRIVER"] = "dummy"
        pixels = self.name in ("pixels", "dict")
        env: gym.Env = PixelPendulum(as_dict=self.name == "dict") if pixels else gym.make("Pendulum-v1")
        return Monitor(gym.wrappers.TimeLimit(env, 21))


class Record(KVWriter):
    """Keeps everything that is logged, except how long it took."""

    def __init__(self) -> None:
        self.values: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        timings = ("time/fps", "time/time_elapsed")
        self.values.append({name: float(value) for name, value in key_values.items() if name not in timings})

    def close(self) -> None:
        pass


def digests(values: Any, name: str = "") -> dict[str, str]:
    """
    :return: Hashes of all tensors and arrays in nested dictionaries and lists, by their path; other values as they are.
    """
    if isinstance(values, (dict, list)):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return {key: digest for part, value in items for key, digest in digests(value, f"{name}/{part}").items()}
    if isinstance(values, (th.Tensor, np.ndarray)):
        return {name: hashlib.sha256(np.asarray(values).tobytes()).hexdigest()}
    return {name: repr(values)}


def run(name: str, vec_env_cls: type[VecEnv] = DummyVecEnv, n_threads: int = 1, seed: int = 3) -> dict[str, str]:
    """
    :return: What a short run comes to: parameters, optimisers, statistics of observations, and all that was logged.
    """
    th.set_num_threads(n_threads)
    policy, kwargs = MODELS[name]
    env: Any = vec_env_cls([PendulumFactory(name)] * 2)  # type: ignore[call-arg]
    if name == "vector":
        env = VecNormalize(env, norm_reward=False)
    settings = dict(n_steps=64, batch_size=120, n_epochs=2) | kwargs
    model = DPPO(policy, env, seed=seed, device="cpu", **settings)
    if name == "pre-trained":
        rng = np.random.default_rng(0)
        demonstrations = Demonstrations(rng.normal(size=(300, 3)), rng.uniform(-2, 2, (300, 1)), np.array([200, 100]))
        BC(model, demonstrations).train(2, progress_bar=False)
    record = Record()
    model.set_logger(Logger(None, [record]))
    model.learn(2 * model.n_steps * env.num_envs)
    actions = model.predict(model.env.reset(), deterministic=False)[0]  # type: ignore[union-attr]
    statistics = [env.obs_rms.mean, env.obs_rms.var] if name == "vector" else []
    env.close()
    assert len(record.values) == 2 and {"train/loss", "rollout/ep_rew_mean"} <= set(record.values[-1])
    parameters = dict(model.get_parameters())
    return digests(dict(parameters=parameters, logged=record.values, actions=actions, statistics=statistics))


@pytest.mark.parametrize("name,n_threads", [*((name, 1) for name in MODELS), ("vector", 2), ("pre-trained", 2)])
def test_same_seed_same_run(name: str, n_threads: int) -> None:
    first = run(name, n_threads=n_threads)
    for draw in (random.random, np.random.random, lambda: th.rand(1)):
        draw()  # Where the generators stand must not matter.
    assert run(name, n_threads=n_threads) == first
    if n_threads == 1:
        other = run(name, seed=4)
        assert other["/parameters/policy/denoiser.mlp.0.weight"] != first["/parameters/policy/denoiser.mlp.0.weight"]


def test_same_run_in_processes_of_their_own() -> None:
    """Another process with another hash seed and its envs in processes gives what this process with its own envs gives."""
    names = ["vector", "pixels"]
    code = (
        "import json, sys\n"
        "from stable_baselines3.common.vec_env import SubprocVecEnv\n"
        "from tests.test_determinism import run\n"
        "if __name__ == '__main__':\n"
        "    print(json.dumps({name: run(name, SubprocVecEnv) for name in sys.argv[1:]}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *names],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {name: run(name) for name in names}


@pytest.mark.parametrize("name", ["vector", "pixels"])
def test_same_gradients_from_two_threads(name: str) -> None:
    """Rows that are gathered for many pairs: two threads would add up their gradients in any order."""
    th.set_num_threads(2)
    policy, kwargs = MODELS[name]
    model = DPPO(policy, DummyVecEnv([PendulumFactory(name)]), seed=3, device="cpu", **dict(n_steps=64) | kwargs)
    model.learn(model.n_steps)
    samples = next(model._minibatches())
    pairs = th.arange(3072) % len(samples.decision_index)
    samples = samples.pairs(pairs)
    gradients = []
    for _ in range(10):
        model.policy.zero_grad()
        model.loss(samples)[0].backward()
        gradients.append([p.grad.clone() for p in model.policy.optimizer.param_groups[0]["params"]])
    assert all(th.equal(a, b) for other in gradients for a, b in zip(other, gradients[0], strict=True))
