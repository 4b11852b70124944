"""Observations and actions mapped to about [-1, 1], and back."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_dppo.normalization import Normalizer

ACTIONS = spaces.Box(np.array([-1.0, 0.0]), np.array([3.0, 0.5]), dtype=np.float64)


def test_without_ranges_observations_stay_and_actions_have_the_bounds() -> None:
    normalizer = Normalizer(spaces.Box(-1, 1, (3,)), ACTIONS)
    obs = th.randn(4, 3, dtype=th.double)
    assert not normalizer.has_ranges
    assert th.equal(normalizer.normalize_observations(obs), obs.float())
    np.testing.assert_allclose(
        normalizer.unnormalize_actions(th.tensor([[[-1.0, -1.0], [1.0, 1.0]]]))[0], [ACTIONS.low, ACTIONS.high]
    )
    # Beyond the bounds, actions are clipped to them.
    assert ACTIONS.contains(normalizer.unnormalize_actions(th.full((1, 1, 2), 5.0))[0, 0])


def test_a_dict_has_its_vectors_normalised_and_nothing_else() -> None:
    parts = dict(
        image=spaces.Box(0, 255, (3, 8, 8), np.uint8),
        a=spaces.Box(-1, 1, (2, 2)),
        n=spaces.Discrete(3),
        b=spaces.Box(-1, 1, (1,)),
    )
    normalizer = Normalizer(spaces.Dict(parts), ACTIONS)
    # In the order of the space's keys: a, b.
    low = np.array([0.0, 0, 0, 0, 10])
    normalizer.set_ranges(low, low + 2, ACTIONS.low, ACTIONS.high)
    assert normalizer.has_ranges
    obs = {"image": th.ones(1, 3, 8, 8, dtype=th.uint8), "a": th.ones(1, 2, 2), "n": th.tensor([2]), "b": th.tensor([[12.0]])}
    normalized = normalizer.normalize_observations(obs)
    th.testing.assert_close(normalized["a"], th.zeros(1, 2, 2), atol=1e-5, rtol=0)
    th.testing.assert_close(normalized["b"], th.ones(1, 1), atol=1e-5, rtol=0)
    assert normalized["image"] is obs["image"] and normalized["n"] is obs["n"]
    assert (obs["a"] == 1).all()  # what is passed is not changed


def test_statistics_are_part_of_the_state() -> None:
    assert set(Normalizer(spaces.Box(-1, 1, (3,)), ACTIONS).state_dict()) == {
        *("obs_center", "obs_scale", "obs_count", "action_center", "action_scale")
    }


def test_running_statistics_are_those_of_all_observations() -> None:
    rng = np.random.default_rng(0)
    sizes = {7: 1.0, 100: 2.0, 1: 10.0}  # which spread more and more
    batches = [
        rng.normal([5.0, -2e3, 0.0], [0.01 * spread, 300.0 * spread, 0.0], (n, 3)).astype(np.float32)
        for n, spread in sizes.items()
    ]
    normalizer = Normalizer(spaces.Box(-np.inf, np.inf, (3,)), ACTIONS)
    for batch in batches:
        # Only the buffers, as in a saved file, know what was seen.
        other = Normalizer(spaces.Box(-np.inf, np.inf, (3,)), ACTIONS)
        other.load_state_dict(normalizer.state_dict())
        other.update(th.as_tensor(batch))
        normalizer = other
    seen = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(normalizer.obs_center, seen.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(1 / normalizer.obs_scale[:2], seen.std(axis=0)[:2], rtol=1e-2)
    assert normalizer.obs_count == pytest.approx(108, abs=0.01)
    assert not normalizer.has_ranges
    normalized = normalizer.normalize_observations(th.as_tensor(seen))
    assert normalized[:, 2].abs().max() <= 10.0  # what never varied
    assert normalizer.normalize_observations(th.full((1, 3), 1e9)).tolist() == [[10.0] * 3]


def test_the_running_std_never_shrinks() -> None:
    normalizer = Normalizer(spaces.Box(-np.inf, np.inf, (2,)), ACTIONS)
    wide = th.randn(1000, 2) * th.tensor([3.0, 1.0])
    normalizer.update(wide)
    std = 1 / normalizer.obs_scale
    for _ in range(10):
        # The first number hardly varies any more, the second one more than before.
        normalizer.update(th.randn(1000, 2) * th.tensor([0.1, 5.0]) + th.tensor([2.0, 0.0]))
    assert 1 / normalizer.obs_scale[0].item() == pytest.approx(std[0].item(), rel=1e-5) and 1 / normalizer.obs_scale[1] > 4
    # The mean is that of all.
    assert normalizer.obs_center[0].item() == pytest.approx(20 / 11, abs=0.2) and normalizer.obs_count == 11_000


def test_ranges_replace_running_statistics() -> None:
    normalizer = Normalizer(spaces.Box(-np.inf, np.inf, (1,)), ACTIONS)
    normalizer.update(th.randn(10, 1))
    normalizer.set_ranges(np.zeros(1), np.ones(1), ACTIONS.low, ACTIONS.high)
    assert normalizer.has_ranges and normalizer.obs_count == 0
    # Beyond the ranges nothing is clamped.
    assert normalizer.normalize_observations(th.full((1, 1), 100.0)).item() == pytest.approx(199.0, rel=1e-3)


def test_running_statistics_of_a_dict() -> None:
    parts = dict(image=spaces.Box(0, 255, (3, 8, 8), np.uint8), a=spaces.Box(-1, 1, (2, 2)), b=spaces.Box(-1, 1, (1,)))
    normalizer = Normalizer(spaces.Dict(parts), ACTIONS)
    a, b = th.randn(50, 2, 2) * 3 + 1, th.randn(50, 1) - 7
    image = th.zeros(50, 3, 8, 8, dtype=th.uint8)
    normalizer.update(dict(b=b, image=image, a=a))
    normalized = normalizer.normalize_observations(dict(a=a, b=b, image=image))
    for key in ("a", "b"):
        th.testing.assert_close(normalized[key].mean(dim=0), th.zeros_like(normalized[key][0]), atol=1e-3, rtol=0)
        th.testing.assert_close(
            normalized[key].std(dim=0, unbiased=False), th.ones_like(normalized[key][0]), atol=1e-3, rtol=0
        )
    assert normalized["image"] is image
