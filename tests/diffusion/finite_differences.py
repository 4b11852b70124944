"""Gradients of what is learned about the noise, beside finite differences of the loss."""

import pytest
import torch as th

from sb3_dppo import DPPO


def check_gradient_of_noise(model: DPPO, step: float = 1e-3) -> None:
    model.learn(32)
    samples = next(model.rollout_buffer.get(None))
    bias, losses = model.policy.noise_network.output.bias, []
    (gradient,) = th.autograd.grad(model.loss(samples)[0], bias)
    with th.no_grad():
        for sign in (1, -1):
            bias += sign * step
            losses.append(model.loss(samples)[0].item())
            bias -= sign * step
    assert gradient.abs() > 1e-5
    assert gradient.item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.05)
