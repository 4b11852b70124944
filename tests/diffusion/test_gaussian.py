"""Gaussian policies of chunks, ``prediction_type="mean"``: what a diffusion policy is compared with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from torch.distributions import Normal

from sb3_dppo import BC, DPPO, Demonstrations
from sb3_dppo.diffusion.gaussian import GaussianProcess

GAUSSIAN: dict[str, Any] = dict(prediction_type="mean", denoising_steps=1, horizon=2, net_arch=[32], clip_sample_range=None)


def make_model(**kwargs: Any) -> DPPO:
    return DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=32, batch_size=16, policy_kwargs=GAUSSIAN, seed=0, **kwargs)


def mean_of(model: DPPO, obs: th.Tensor) -> th.Tensor:
    denoiser, nothing = model.policy.denoiser, th.zeros(len(obs), 2, 1)
    embedding = denoiser.embed_timesteps(model.policy.process.timesteps).expand(len(obs), -1)
    return denoiser(nothing, embedding, denoiser.encode(model.policy.extract_features(obs)))


def test_chunks_are_normal_about_a_mean_of_the_observation() -> None:
    model = make_model(min_sampling_std=0.3, min_logprob_std=0.3)
    th.nn.init.normal_(model.policy.denoiser.mlp[-1].weight)
    obs, noise = th.randn(64, 3), model.policy.draw_noise(64)
    sampled, mean = model.policy.sample_chain(obs, noise=noise), mean_of(model, obs)
    assert (sampled.chain[:, 0] == 0).all()
    th.testing.assert_close(sampled.actions, mean + 0.3 * noise[1].clamp(-3, 3))
    th.testing.assert_close(sampled.log_prob[:, 0], Normal(mean, 0.3).log_prob(sampled.actions), rtol=1e-4, atol=1e-4)
    th.testing.assert_close(model.policy.chain_log_prob(obs, sampled.chain), sampled.log_prob, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise", ["observation", "zero", "random"])
def test_deterministic_actions_are_the_mean_whatever_the_noise(noise: str) -> None:
    model = make_model(deterministic_noise=noise)
    th.nn.init.normal_(model.policy.denoiser.mlp[-1].weight, std=0.1)
    obs = th.randn(8, 3)
    actions = model.policy.normalizer.unnormalize_actions(mean_of(model, obs).detach())[:, 0]
    for _ in range(2):
        np.testing.assert_allclose(model.predict(obs.numpy(), deterministic=True)[0], actions, rtol=1e-4, atol=1e-4)


def test_behaviour_cloning_is_least_squares() -> None:
    model = make_model()
    obs, actions = th.randn(16, 3), th.rand(16, 2, 1)
    loss = model.policy.bc_loss(obs, actions)
    th.testing.assert_close(loss, ((mean_of(model, obs) - actions) ** 2).mean())
    # Between two modes, then, it learns what lies there.
    observations = np.random.default_rng(0).uniform(-1, 1, (500, 3)).astype(np.float32)
    modes = np.where(np.arange(500)[:, None] % 4 < 2, 1.0, -1.0).astype(np.float32)
    BC(model, Demonstrations(observations, modes, np.full(1, 500)), batch_size=64).train(20, progress_bar=False)
    assert np.abs(model.predict(observations, deterministic=True)[0]).mean() < 0.4


def test_learns_saves_and_goes_on(tmp_path: Path) -> None:
    model = make_model()
    before = model.policy.log_std.item()
    model.learn(64)
    assert model.policy.log_std.item() != before
    model.save(tmp_path / "gaussian")
    model.policy.save(tmp_path / "policy")
    obs = np.ones((1, 3), dtype=np.float32)
    loaded = DPPO.load(tmp_path / "gaussian", env=model.env)
    policies = [loaded.policy, type(model.policy).load(tmp_path / "policy")]
    for policy in policies:
        assert (policy.predict(obs, deterministic=True)[0] == model.predict(obs, deterministic=True)[0]).all()
    loaded.learn(64)


@pytest.mark.parametrize("arguments", [dict(denoising_steps=2), dict(inference_steps=2), dict(scheduler="ddim")])
def test_there_is_nothing_to_denoise(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a Gaussian policy has one step, so use denoising_steps=1"):
        GaussianProcess(**arguments)
