"""Gradient steps: slices of a minibatch, and what is left out."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_dppo.gradients import compute_gradients, gradient_step, losses_of_slices
from tests.test_losses import SMALL, rolled_out


@pytest.mark.parametrize("n_slices", [1, 3, 1000])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(kl_coef=0.2, clip_range_vf=0.1),
        dict(shuffle="decisions"),
        dict(bc_coef=0.1, advantage_quantiles=(0.1, 0.9)),
        dict(batch_size=7),
    ],
)
def test_slices_of_a_minibatch_add_up_to_its_loss(n_slices: int, kwargs: dict[str, Any]) -> None:
    model = rolled_out(**kwargs)
    with th.no_grad():
        for parameter in model.policy.denoiser.parameters():
            parameter += 0.1 * th.randn_like(parameter)  # away from where all ratios are 1
    samples = next(model._minibatches())
    model.policy.zero_grad()
    loss, metrics = model.loss(samples)
    loss.backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.policy.parameters()]
    found = compute_gradients(model.policy, samples, model._advantages(samples), model._loss_settings(), n_slices=n_slices)
    for value, parameter in zip(expected, model.policy.parameters(), strict=True):
        assert (value is None) == (parameter.grad is None)
        if value is not None:
            th.testing.assert_close(parameter.grad, value, rtol=1e-4, atol=1e-7)
    for name in ("policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction", "ratio", "base_kl", "bc_loss"):
        th.testing.assert_close(found.get(name, th.tensor(0.0)), metrics[name], rtol=1e-4, atol=1e-6)
    th.testing.assert_close(found["by_denoising_step"], metrics["by_denoising_step"], rtol=1e-4, atol=1e-6)
    th.testing.assert_close(found["loss"], loss.detach(), rtol=1e-4, atol=1e-6)


def test_critic_warmup_costs_no_pass_of_the_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rolled_out(critic_warmup=5)
    monkeypatch.setattr(model.policy.denoiser, "forward", lambda *_: pytest.fail("the actor has run"))
    model.train()


def test_more_minibatches_than_decisions_leave_the_critic_finite() -> None:
    model = rolled_out(batch_size=2, bc_coef=0.1)
    none = th.zeros(0, dtype=th.long)
    samples = next(model._minibatches())
    assert samples.bc_noise is not None
    samples = samples._replace(value_index=none, bc_index=none, bc_noise=samples.bc_noise[:, :0])
    assert model.loss(samples)[0].isfinite()
    metrics = compute_gradients(model.policy, samples, model._advantages(samples), model._loss_settings())
    assert metrics["value_loss"] == 0 and metrics["loss"].isfinite()


AT_A_BOUND: list[dict[str, Any]] = [
    dict(policy_kwargs=SMALL | dict(log_std_init=math.log(0.1))),
    dict(learn_std="action", min_sampling_std=0.1),
    dict(learn_eta="action", scheduler="ddim", min_sampling_std=0.05, policy_kwargs=SMALL | dict(prediction_type="epsilon")),
]


@pytest.mark.parametrize("kwargs", AT_A_BOUND)
def test_what_rows_share_stops_at_its_bounds_by_the_sum_of_their_gradients(kwargs: dict[str, Any]) -> None:
    """However many slices there are, and in either direction."""
    model = rolled_out(**kwargs, gamma_denoising=1.0, eta_learning_rate=0.0)
    policy = model.policy
    parameter = policy.log_std if model.policy.sampler.config.has_log_std else policy.noise_network.output.bias
    samples = next(model.rollout_buffer.get(None))
    signs = set()
    for seed in range(8):
        th.manual_seed(seed)
        advantages = th.randn(len(samples.decision_index))
        policy.zero_grad()
        for loss, _ in losses_of_slices(policy, samples, advantages, model._loss_settings()):
            loss.backward()
        assert parameter.grad is not None
        gradient = parameter.grad.clone()
        # η begins at its upper bound, a std at its lower one.
        outward = gradient < 0 if model.learn_eta else gradient > 0
        signs |= set(outward.tolist())
        for n_slices in (1, 4):
            compute_gradients(policy, samples, advantages, model._loss_settings(), n_slices=n_slices)
            th.testing.assert_close(parameter.grad, th.where(outward, 0.0, gradient), rtol=1e-3, atol=1e-7)
    assert signs == {True, False}


@pytest.mark.parametrize("optimizer_class", [th.optim.AdamW, th.optim.SGD])
@pytest.mark.parametrize("loss", [1.0, np.nan, np.inf])
def test_a_step_of_a_loss_that_is_not_finite_is_left_out(loss: float, optimizer_class: type[th.optim.Optimizer]) -> None:
    layer = nn.Linear(2, 2)
    kwargs = dict(fused=True) if optimizer_class is th.optim.AdamW else {}
    optimizer = optimizer_class(layer.parameters(), lr=0.1, **kwargs)  # type: ignore[call-arg]
    layer(th.ones(1, 2)).sum().backward()
    before = layer.weight.clone()
    gradient_step([optimizer], th.tensor(loss), max_grad_norm=1.0)
    assert th.equal(before, layer.weight) == (not np.isfinite(loss))
