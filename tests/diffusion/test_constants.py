"""What chains have in common is computed once, and anew when what it follows from has changed."""

from typing import Any

import pytest
import torch as th

from sb3_dppo.diffusion.constants import Constants
from tests.test_losses import SMALL, rolled_out


def test_kept_until_weights_change() -> None:
    constants, weight = Constants(), th.nn.Parameter(th.ones(1))
    calls = []

    def value() -> float:
        return constants.get("key", lambda: [weight], lambda: calls.append(1) or weight.item())

    assert value() == value() == 1 and len(calls) == 2
    with constants.keep():
        assert value() == value() == 1 and len(calls) == 3
        with th.no_grad():
            weight.add_(1)
        assert value() == value() == 2 and len(calls) == 4
        constants.clear()
        assert value() == 2 and len(calls) == 5
    assert value() == 2 and len(calls) == 6


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(ft_denoising_steps=2, learn_std="action", min_sampling_std=0.1),
        dict(scheduler="ddim", inference_steps=2, ft_denoising_steps=1, min_sampling_std=0.1),
        dict(policy_kwargs=SMALL | dict(film=True, net_arch=[16, 16, 16])),
    ],
)
def test_chains_are_the_same(kwargs: dict[str, Any]) -> None:
    """Also after weights or settings have changed in between, as a callback may do."""
    model = rolled_out(**kwargs)
    policy, obs, noise = model.policy, th.randn(1, 3), model.policy.draw_noise(1)

    def changes() -> Any:
        yield
        with th.no_grad():
            for parameter in policy.parameters():
                parameter += 0.01
        yield
        policy.load_state_dict({name: value - 0.02 for name, value in policy.state_dict().items()})
        yield
        policy.load_from_vector(policy.parameters_to_vector() + 0.03)
        yield
        for optimizer in policy.optimizers:  # a fused one, whose step autograd does not see
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = th.ones_like(parameter)
            optimizer.param_groups[0]["lr"] = 0.05
            optimizer.step()
        yield
        model.noise_clip = 0.5
        model._apply_settings()
        yield
        model._update_normalizer()
        yield

    with policy.sampler.keep_constants():
        policy.sample_chain(obs, noise=noise)
        for _ in changes():
            kept = policy.sample_chain(obs, noise=noise)
            kept_values, policy.sampler.constants._kept = policy.sampler.constants._kept, None
            fresh = policy.sample_chain(obs, noise=noise)
            policy.sampler.constants._kept = kept_values
            assert kept_values
            for one, other in zip(kept, fresh, strict=True):
                assert th.equal(one, other)


def test_a_rollout_keeps_them_and_an_update_does_not() -> None:
    model = rolled_out()
    constants, seen = model.policy.sampler.constants, []
    model.learn(32, callback=lambda local, _: seen.append(constants._kept is not None) or True)
    assert seen and all(seen) and constants._kept is None
