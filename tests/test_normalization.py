"""Observations and actions mapped to about [-1, 1], and back."""

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_dppo.normalization import Normalizer

ACTIONS = spaces.Box(np.array([-1.0, 0.0]), np.array([3.0, 0.5]), dtype=np.float64)


def test_without_ranges_observations_stay_and_actions_have_the_bounds() -> None:
    normalizer = Normalizer(spaces.Box(-1, 1, (3,)), ACTIONS)
    obs = th.randn(4, 3, dtype=th.double)
    assert not normalizer.changes_observations
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
    assert normalizer.changes_observations
    obs = {"image": th.ones(1, 3, 8, 8, dtype=th.uint8), "a": th.ones(1, 2, 2), "n": th.tensor([2]), "b": th.tensor([[12.0]])}
    normalized = normalizer.normalize_observations(obs)
    th.testing.assert_close(normalized["a"], th.zeros(1, 2, 2), atol=1e-5, rtol=0)
    th.testing.assert_close(normalized["b"], th.ones(1, 1), atol=1e-5, rtol=0)
    assert normalized["image"] is obs["image"] and normalized["n"] is obs["n"]
    assert (obs["a"] == 1).all()  # what is passed is not changed


def test_statistics_are_part_of_the_state() -> None:
    assert set(Normalizer(spaces.Box(-1, 1, (3,)), ACTIONS).state_dict()) == {
        *("obs_center", "obs_scale", "action_center", "action_scale")
    }
