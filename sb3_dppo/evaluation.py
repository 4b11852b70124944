"""Which noise makes the best deterministic actions, found by trying."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_dppo.dppo import DPPO


def choose_deterministic_noise(
    model: DPPO, env: gym.Env | VecEnv | str, n_eval_episodes: int = 20, seed: int = 0
) -> dict[str, list[float]]:
    """
    Evaluate ``predict(deterministic=True)`` with the noise "observation" and "zero", on the same starts of episodes, and set
    ``model.deterministic_noise`` to the one with the larger mean return. It is saved with the model. "random" is not tried:
    its returns are distributed as those of "observation", without one action for one observation.

    :param model: Model.
    :param env: Env to evaluate in, or its id; not the one that the model learns in, which would lose its episodes.
    :param n_eval_episodes: Episodes for each of them.
    :param seed: Seed of the env.
    :return: The returns of the episodes by noise.
    :raises ValueError: for fewer than one episode, other spaces than the model's, or the env that it learns in.
    """
    if n_eval_episodes < 1:
        raise ValueError(f"n_eval_episodes={n_eval_episodes} must be at least 1.")
    made = maybe_make_env(env, verbose=0)
    vec_env = made if isinstance(made, VecEnv) else DummyVecEnv([lambda: Monitor(made)])
    check_for_correct_spaces(vec_env, model.observation_space, model.action_space)
    if model.env is not None and vec_env.unwrapped is model.env.unwrapped:
        raise ValueError("env is the one that the model learns in, whose episodes would be lost: pass another one.")
    returns: dict[str, list[float]] = {}
    for noise in ("observation", "zero"):
        _set(model, noise)
        vec_env.seed(seed)
        returns[noise], _ = evaluate_policy(model, vec_env, n_eval_episodes, return_episode_rewards=True)  # type: ignore[assignment]
    _set(model, max(returns, key=lambda noise: float(np.mean(returns[noise]))))
    return returns


def _set(model: DPPO, noise: str) -> None:
    model.deterministic_noise = noise
    model.policy.configure_sampler(replace(model.policy.sampler.config, deterministic_noise=noise))
