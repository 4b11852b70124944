"""Learning: minutes, so only with `-m slow` (`make test-slow`)."""

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_dppo import BC, DPPO, load_demonstrations

pytestmark = pytest.mark.slow


def test_fine_tuning_improves_hopper() -> None:
    policy_kwargs = dict(net_arch=dict(pi=[256, 256, 256]))
    kwargs = dict(
        act_steps=4, ft_denoising_steps=10, n_steps=256, batch_size=1280, n_epochs=5, clip_range=0.05, clip_range_base=0.01
    )
    model = DPPO("DiffusionMlpPolicy", make_vec_env("Hopper-v5", 8, seed=0), policy_kwargs=policy_kwargs, seed=0, **kwargs)
    BC(model, load_demonstrations("hopper-medium")).train(20, progress_bar=False)
    env = make_vec_env("Hopper-v5", 10, seed=10_000)
    before = np.mean(evaluate_policy(model, env, 50, return_episode_rewards=True)[0])
    model.learn(200_000)
    after = np.mean(evaluate_policy(model, env, 50, return_episode_rewards=True)[0])
    assert after > 1.5 * before


def test_from_scratch_learns_pendulum() -> None:
    model = DPPO("DiffusionMlpPolicy", make_vec_env("Pendulum-v1", 4, seed=0), seed=0, gamma=0.9).learn(100_000)
    mean, _ = evaluate_policy(model, make_vec_env("Pendulum-v1", 10, seed=10_000), 50)
    assert mean > -400
