"""η of DDIM: fixed, learned for each action dimension, learned as a function of the observation."""

import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th

from sb3_dppo import DPPO
from sb3_dppo.diffusion.settings import SamplerConfig
from tests.diffusion.finite_differences import check_gradient_of_noise


def make_model(**kwargs: Any) -> DPPO:
    arguments: dict[str, Any] = dict(
        n_steps=32,
        batch_size=32,
        n_epochs=2,
        scheduler="ddim",
        inference_steps=5,
        ft_denoising_steps=3,
        eta=0.5,
        min_sampling_std=0.01,
        min_logprob_std=0.01,
        policy_kwargs=dict(denoising_steps=10, horizon=2, net_arch=dict(pi=[32] * 3, vf=[32] * 3)),
        seed=0,
        device="cpu",
    )
    model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", **(arguments | kwargs))
    model.pretrained_on_demonstrations = True
    return model


def etas(model: DPPO) -> th.Tensor:
    obs = th.stack([th.as_tensor(model.observation_space.sample()) for _ in range(50)])
    return model.policy.sampler.learned_eta(model.policy.extract_features(obs))


@pytest.mark.parametrize("learn_eta", ["action", "state"])
def test_a_learned_eta_begins_at_eta_and_is_replayed(learn_eta: str) -> None:
    fixed, model = make_model(), make_model(learn_eta=learn_eta)
    obs, noise = th.randn(4, 3), model.policy.draw_noise(4)
    for deterministic in (False, True):
        sampled = [m.policy.sample_chain(obs, deterministic, noise) for m in (fixed, model)]
        for left, right in zip(*sampled, strict=True):
            th.testing.assert_close(left, right)
        replayed = model.policy.chain_log_prob(obs, sampled[1].chain)
        th.testing.assert_close(replayed, sampled[1].log_prob, rtol=1e-3, atol=1e-3)
    # Of a network that depends on the observation, too.
    th.nn.init.normal_(model.policy.noise_network.output.weight)
    assert (etas(model).std(dim=0) > 0).all() == (learn_eta == "state")
    sample = model.policy.sample_chain(obs, noise=noise)
    th.testing.assert_close(model.policy.chain_log_prob(obs, sample.chain), sample.log_prob, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("learn_eta", ["action", "state"])
def test_ent_coef_acts_on_a_learned_eta_within_its_bounds(learn_eta: str) -> None:
    means = {}
    for ent_coef in (-10.0, 0.0, 10.0):
        model = make_model(learn_eta=learn_eta, eta_range=(0.3, 0.8), eta_learning_rate=0.1, ent_coef=ent_coef)
        model.learn(128)
        assert ((etas(model) >= 0.3) & (etas(model) <= 0.8)).all()
        seen = model.policy.extract_features(model.rollout_buffer.observations)
        means[ent_coef] = model.policy.sampler.learned_eta(seen).mean().item()
        assert 0.3 - 1e-6 <= model.logger.name_to_value["train/eta"] <= 0.8 + 1e-6
    assert means[-10.0] < 0.4 < 0.6 < means[10.0]
    assert means[0.0] != pytest.approx(0.5, abs=1e-4)  # the policy loss has a gradient for it


def test_the_gradient_of_eta_is_that_of_finite_differences() -> None:
    check_gradient_of_noise(make_model(learn_eta="action"))


def test_an_eta_at_its_upper_bound_has_finite_gradients() -> None:
    model = make_model(learn_eta="action", eta_range=(0.0, 1.0))
    th.nn.init.constant_(model.policy.noise_network.output.bias, 100.0)
    model.learn(32)
    assert (etas(model) == 1).all()
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_eta_has_an_optimiser_and_an_interval_of_its_own() -> None:
    counts = {}
    for interval in (1, 3):
        model = make_model(learn_eta="state", eta_update_interval=interval, critic_warmup=1)
        model.learn(64)
        state = model.policy.noise_optimizer.state[model.policy.noise_network.output.bias]
        counts[interval] = int(state["step"])
    n_updates = model._n_updates // 2  # the first rollout trained the critic only
    assert counts == {1: n_updates, 3: len([n for n in range(n_updates, 2 * n_updates) if n % 3 == 0])}
    fixed = make_model()
    fixed.learn(32)
    assert not fixed.policy.noise_optimizer.state


def test_files_do_not_depend_on_how_eta_is_learned(tmp_path: Path) -> None:
    model = make_model(learn_eta="state", eta_learning_rate="lin_1e-2")
    model.learn(64)
    model.save(tmp_path / "model")
    obs = th.randn(3, 3)
    loaded = DPPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
    expected, actual = (m.policy.sampler.learned_eta(m.policy.extract_features(obs)) for m in (model, loaded))
    assert th.equal(expected, actual)
    loaded.learn(32)
    fixed = DPPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"), learn_eta=None, eta=0.7)
    assert fixed.policy.sampler.config.learn_eta is None and fixed.policy.sampler.config.eta == 0.7
    assert fixed.get_parameters().keys() == model.get_parameters().keys()
    DPPO.load(tmp_path / "model", learn_eta=None, scheduler="ddpm", inference_steps=None).predict(obs[0].numpy())


@pytest.mark.parametrize("learn_eta", ["action", "state"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_loaded_file_begins_where_eta_says(learn_eta: str, eta: float, tmp_path: Path) -> None:
    make_model(scheduler="ddpm", inference_steps=None, eta=1.0).save(tmp_path / "model")
    kwargs: dict[str, Any] = dict(scheduler="ddim", inference_steps=5, eta=eta, learn_eta=learn_eta)
    loaded = DPPO.load(tmp_path / "model", **kwargs)
    assert (etas(loaded) == eta).all()


def test_other_bounds_leave_a_learned_eta_alone(tmp_path: Path) -> None:
    model = make_model(learn_eta="action", eta=1.0)
    th.nn.init.constant_(model.policy.noise_network.output.bias, -0.5)
    model.save(tmp_path / "model")
    for eta_range, expected in (((0.1, 1.0), 0.5), ((0.3, 0.9), 0.5), ((0.6, 0.9), 0.6), ((0.0, 0.4), 0.4)):
        loaded = DPPO.load(tmp_path / "model", eta_range=eta_range)
        th.testing.assert_close(etas(loaded), th.full((50, 1, 1), expected))


def test_an_eta_beyond_a_bound_finds_back() -> None:
    model = make_model(learn_eta="action", eta=1.0)
    bias = model.policy.noise_network.output.bias
    for offset, sign, moves in ((0.5, 1, True), (0.5, -1, False), (-2.0, -1, True), (-2.0, 1, False)):
        th.nn.init.constant_(bias, offset)
        bias.grad = None
        (sign * etas(model).mean()).backward()
        model.policy.sampler.stop_at_bounds()
        assert bias.grad is not None and bool((bias.grad != 0).all()) == moves


def test_other_settings_from_now_on() -> None:
    policy = make_model().policy
    before = policy.sampler.config
    obs, noise = th.randn(3, 3), policy.draw_noise(3)
    chain = policy.sample_chain(obs, noise=noise).chain
    policy.configure_sampler(replace(before, min_sampling_std=0.5))
    assert not th.allclose(policy.sample_chain(obs, noise=noise).chain, chain)
    with pytest.raises(ValueError, match="ft_denoising_steps=7"):
        policy.configure_sampler(replace(before, ft_denoising_steps=7))
    with pytest.raises(ValueError, match="inference_steps=3 must divide"):
        policy.configure_sampler(replace(before, inference_steps=3))
    assert policy.sampler.config.min_sampling_std == 0.5
    policy.configure_sampler(replace(before, inference_steps=10, ft_denoising_steps=10))
    assert policy.sample_chain(obs).chain.shape == (3, 11, 2, 1)
    policy.configure_sampler(before)
    assert th.equal(policy.sample_chain(obs, noise=noise).chain, chain)


def test_the_settings_cannot_be_changed_behind_the_samplers_back() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplerConfig().eta = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(learn_eta="action", scheduler="ddpm", inference_steps=None), "scheduler='ddim' has an η"),
        (dict(learn_eta="both"), "learn_eta='both' is unknown"),
        (dict(learn_eta="state", eta_range=(0.5, 0.1)), r"eta_range=\(0.5, 0.1\) must be two numbers"),
        (dict(learn_eta="state", eta_learning_rate="fast"), "eta_learning_rate='fast' is not a schedule"),
        (dict(eta_update_interval=0), "eta_update_interval=0 must be at least 1"),
    ],
)
def test_refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


@pytest.mark.parametrize("kwargs", [dict(), dict(scheduler="ddpm", inference_steps=None)])
@pytest.mark.parametrize("std", [0.7, 1e-3, 5.0])
def test_a_learned_std_is_that_of_sampling_and_of_log_probabilities(kwargs: dict[str, Any], std: float) -> None:
    model = make_model(min_sampling_std=None, min_logprob_std=None, **kwargs)
    model.pretrained_on_demonstrations = False
    policy, sampler = model.policy, model.policy.sampler
    assert sampler.config.learns_std
    with th.no_grad():
        policy.log_std.fill_(math.log(std))
    assert sampler.learned_std().item() == pytest.approx(min(max(std, 0.1), 2.0))  # within std_range
    obs, noise = th.randn(3, 3), policy.draw_noise(3).clamp(-3, 3)
    quiet = noise.clone()
    quiet[-1] = 0.0
    sample, without = policy.sample_chain(obs, noise=noise), policy.sample_chain(obs, noise=quiet)
    # The last step has little noise of its own.
    th.testing.assert_close(sample.actions - without.actions, noise[-1] * sampler.step_std(obs[:1], th.tensor([2]), 0.5)[0])
    th.testing.assert_close(sampler.step_std(obs[:1], th.tensor([2]), 0.5).flatten(), sampler.learned_std())
    th.testing.assert_close(policy.chain_log_prob(obs, sample.chain), sample.log_prob, rtol=1e-3, atol=1e-3)
    # Where chains would be more probable under less noise, the gradient says so, unless that is at its bound.
    policy.chain_log_prob(obs, without.chain)[:, -1].sum().neg().backward()
    sampler.stop_at_bounds()
    assert policy.log_std.grad is not None
    assert (policy.log_std.grad == 0) if std == 1e-3 else (policy.log_std.grad > 0)


@pytest.mark.parametrize(
    ("sampling", "log_prob", "expected"), [(0.2, None, (0.2, 0.2)), (None, 0.3, (0.3, 0.3)), (0.0, None, (0.0, 0.05))]
)
def test_one_floor_gives_the_other(sampling: float | None, log_prob: float | None, expected: tuple[float, float]) -> None:
    config = SamplerConfig(min_sampling_std=sampling, min_logprob_std=log_prob)
    assert not config.learns_std and config.floors == expected
