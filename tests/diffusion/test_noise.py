"""A std that is learned, ``learn_std``: for each action dimension, or as a function of observation and denoising step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_dppo import DPPO
from tests.diffusion.finite_differences import check_gradient_of_noise

SAMPLERS: dict[str, dict[str, Any]] = dict(
    flow=dict(policy_kwargs=dict(prediction_type="flow")),
    ddpm=dict(),
    ddim=dict(scheduler="ddim", inference_steps=2, ft_denoising_steps=2, eta=0.3),
)


def make_model(sampler: str = "flow", learn_std: str | None = "state", **kwargs: Any) -> DPPO:
    arguments: dict[str, Any] = dict(n_steps=32, batch_size=32, n_epochs=2, ft_denoising_steps=3, learn_std=learn_std, seed=0)
    arguments |= SAMPLERS[sampler] | dict(min_logprob_std=0.2)
    policy_kwargs = dict(prediction_type="epsilon", denoising_steps=4, horizon=2, net_arch=[32])
    policy_kwargs |= arguments.pop("policy_kwargs", {})
    arguments |= kwargs
    model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", device="cpu", policy_kwargs=policy_kwargs, **arguments)
    model.pretrained_on_demonstrations = True
    return model


def stds(model: DPPO, obs: th.Tensor) -> th.Tensor:
    """The floor at each observation and position, shape (B, S)."""
    sampler = model.policy.sampler
    return th.stack(
        [
            sampler.learned_std(obs, th.full((len(obs),), i)).expand(len(obs), 1, 1).flatten()
            for i in range(sampler.inference_steps)
        ],
        dim=1,
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("learn_std", ["action", "state"])
def test_begins_at_the_floor_and_is_replayed(sampler: str, learn_std: str) -> None:
    fixed, model = make_model(sampler, None), make_model(sampler, learn_std)
    obs, noise = th.randn(5, 3), model.policy.draw_noise(5)
    for deterministic in (False, True):
        for left, right in zip(*(m.policy.sample_chain(obs, deterministic, noise) for m in (fixed, model)), strict=True):
            th.testing.assert_close(left, right)
    network = model.policy.noise_network
    th.nn.init.normal_(network.output.weight, std=0.1)
    th.nn.init.constant_(network.output.bias, 0.5)
    values = stds(model, obs)
    assert (values.std(dim=0) > 0).all() == (values.std(dim=1) > 0).all() == (learn_std == "state")
    assert (values >= 0.1).all() and (values <= 2).all() and (values != 0.2).all()
    sampled = model.policy.sample_chain(obs, noise=noise)
    th.testing.assert_close(model.policy.chain_log_prob(obs, sampled.chain), sampled.log_prob, rtol=1e-3, atol=1e-3)
    quiet = noise.clone()
    quiet[-1] = 0.0
    last = sampled.actions - model.policy.sample_chain(obs, noise=quiet).actions
    th.testing.assert_close(last, values[:, -1, None, None] * noise[-1].clamp(-3, 3), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("learn_std", ["action", "state"])
def test_is_discarded_when_acting_deterministically(learn_std: str) -> None:
    fixed, model = make_model(learn_std=None), make_model(learn_std=learn_std)
    th.nn.init.constant_(model.policy.noise_network.output.bias, 1.0)
    obs = np.ones((4, 3), dtype=np.float32)
    assert (fixed.predict(obs, deterministic=True)[0] == model.predict(obs, deterministic=True)[0]).all()


@pytest.mark.parametrize("learn_std", ["action", "state"])
def test_its_gradient_is_that_of_finite_differences(learn_std: str) -> None:
    check_gradient_of_noise(make_model(learn_std=learn_std))


@pytest.mark.parametrize("learn_std", [None, "action", "state"])
def test_ent_coef_raises_it_within_its_bounds(learn_std: str | None) -> None:
    """Also that of a policy from scratch, which has no floor of its own."""
    means = []
    for ent_coef in (-1.0, 1.0):
        model = make_model(learn_std=learn_std, std_range=(0.1, 0.9), eta_learning_rate=0.05, ent_coef=ent_coef)
        if learn_std is None:
            model = make_model(learn_std=None, min_logprob_std=None, learning_rate=0.01, ent_coef=ent_coef)
            model.pretrained_on_demonstrations = False
        model.learn(256)
        means.append(model.logger.name_to_value["train/std"])
        assert learn_std is None or 0.0999 <= means[-1] <= 0.9001
    assert means[0] < 0.9 * means[1]


def test_has_the_optimiser_and_the_interval_of_a_learned_eta() -> None:
    counts = []
    for interval in (1, 4):
        model = make_model(eta_update_interval=interval)
        model.learn(32)
        counts.append(int(model.policy.noise_optimizer.state[model.policy.noise_network.output.bias]["step"]))
    assert counts[0] == model._n_updates and counts[1] == -(-model._n_updates // 4)


def test_begins_at_the_std_of_a_policy_from_scratch() -> None:
    model = make_model(min_logprob_std=None, learn_std="action")
    model.pretrained_on_demonstrations = False
    model.learn(32)
    before = model.policy.log_std.clone()
    model.learn(64, reset_num_timesteps=False)
    assert (model.policy.log_std == before).all()  # what is learned is the offset from it
    assert (model.policy.noise_network.output.bias != 0).all()


def test_is_saved_shared_and_can_be_switched_off(tmp_path: Path) -> None:
    model = make_model()
    model.learn(64)
    obs = th.randn(4, 3)
    model.save(tmp_path / "model")
    model.save_pretrained(tmp_path / "shared")
    loaded = [DPPO.load(tmp_path / "model", env=model.env), DPPO.from_pretrained(tmp_path / "shared", env="Pendulum-v1")]
    for other in loaded:
        assert other.learn_std == "state"
        assert (stds(other, obs) == stds(model, obs)).all()
        other.learn(32)
    off = DPPO.load(tmp_path / "model", learn_std=None)
    assert off.policy.sampler.floors() == (0.2, 0.2)


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(learn_std="time"), "learn_std='time' is unknown"),
        (dict(std_range=(0.0, 1.0)), r"std_range=\(0.0, 1.0\) must be two numbers with 0 < low < high"),
        (dict(std_range=(0.5, 0.1)), r"std_range=\(0.5, 0.1\)"),
        (dict(sampler="ddim", learn_eta="state"), "learn_eta='state' and learn_std='state'.*choose one"),
    ],
)
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**settings)
