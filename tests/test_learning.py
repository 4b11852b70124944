"""Learning with the packaged hyperparameters: minutes, so only with `-m slow` (`make test-slow`)."""

from typing import Any

import numpy as np
import pytest
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_dppo import BC, DPPO, load_demonstrations
from sb3_dppo.policies import PAPER_POLICY_KWARGS
from sb3_dppo.zoo import HYPERPARAMS

pytestmark = pytest.mark.slow


def packaged(file: str, env_id: str) -> tuple[VecEnv, dict[str, Any], int]:
    """The env, the arguments of DPPO and the env steps of an entry."""
    entry = yaml.safe_load((HYPERPARAMS / file).read_text())[env_id]
    env = make_vec_env(env_id, entry.pop("n_envs"), seed=0)
    arguments = {name: value for name, value in entry.items() if name not in ("policy", "n_timesteps")}
    for name in ("learning_rate", "critic_learning_rate"):
        arguments[name] = str(arguments[name])
    return env, arguments, int(entry["n_timesteps"])


def evaluate(model: DPPO, env_id: str) -> float:
    returns, _ = evaluate_policy(model, make_vec_env(env_id, 10, seed=10_000), 50, return_episode_rewards=True)
    return float(np.mean(returns))


def test_fine_tuning_improves_hopper() -> None:
    env, arguments, _ = packaged("dppo_finetune.yml", "Hopper-v5")
    policy_kwargs = dict(PAPER_POLICY_KWARGS, net_arch=dict(pi=[256, 256, 256]))
    model = DPPO("DiffusionMlpPolicy", env, policy_kwargs=policy_kwargs, seed=0, **arguments)
    BC(model, load_demonstrations("hopper-medium")).train(30, progress_bar=False)
    before = evaluate(model, "Hopper-v5")
    model.learn(200_000)
    assert evaluate(model, "Hopper-v5") > 1.4 * before


def test_fine_tuning_improves_pick_and_place() -> None:
    pytest.importorskip("metaworld")
    env_id = "MetaWorldSparse/pick-place-v3"
    env, arguments, n_timesteps = packaged("dppo_finetune.yml", env_id)
    model = DPPO("DiffusionMlpPolicy", env, policy_kwargs=PAPER_POLICY_KWARGS, seed=0, **arguments)
    BC(model, load_demonstrations("metaworld-pick-place")).train(60, progress_bar=False)
    before = evaluate(model, env_id)
    model.learn(n_timesteps)
    assert evaluate(model, env_id) > max(0.88, before + 0.1)


def test_from_scratch_learns_pendulum() -> None:
    env, arguments, n_timesteps = packaged("dppo.yml", "Pendulum-v1")
    model = DPPO("DiffusionMlpPolicy", env, seed=0, **arguments).learn(n_timesteps)
    assert evaluate(model, "Pendulum-v1") > -250
