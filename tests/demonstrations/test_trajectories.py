"""Trajectories of `imitation`."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sb3_dppo import load_demonstrations
from tests.demonstrations.files import ACTIONS, IMAGES, LENGTHS, STATES, N, assert_same


def trajectory(length: int = 3, **changes: Any) -> SimpleNamespace:
    rng = np.random.default_rng(length)
    fields = dict(
        obs=rng.normal(size=(length + 1, 2)),
        acts=rng.normal(size=(length, 1)),
        rews=rng.normal(size=length),
        terminal=True,
        infos=None,
    )
    return SimpleNamespace(**{**fields, **changes})


def test_vectors() -> None:
    trajectories = [trajectory(3), trajectory(5, terminal=False)]
    demonstrations = load_demonstrations(trajectories)
    assert demonstrations.traj_lengths.tolist() == [3, 5]
    np.testing.assert_allclose(demonstrations.observations[3:], trajectories[1].obs[:-1], rtol=1e-6)
    np.testing.assert_allclose(demonstrations.actions[:3], trajectories[0].acts, rtol=1e-6)
    np.testing.assert_allclose(demonstrations.returns, [t.rews.sum() for t in trajectories], rtol=1e-5)
    assert demonstrations.terminals is not None and demonstrations.terminals.tolist() == [False, False, True] + [False] * 5
    without = SimpleNamespace(obs=np.zeros((3, 2)), acts=np.zeros(2))
    demonstrations = load_demonstrations((trajectory(3), without))
    assert demonstrations.rewards is None and demonstrations.terminals is None and demonstrations.actions.shape == (5, 1)


def test_images_and_dictionaries() -> None:
    def trajectories(observations: Any) -> list[SimpleNamespace]:
        starts = np.cumsum([0, *LENGTHS])
        return [SimpleNamespace(obs=observations(np.arange(a, b + 1) % N), acts=ACTIONS[a:b]) for a, b in pairwise(starts)]

    demonstrations = load_demonstrations(trajectories(lambda index: IMAGES[index]))
    assert_same(demonstrations.observations, IMAGES)
    # imitation's DictObs is no dict, but has its items.
    for make in (dict, lambda **parts: SimpleNamespace(items=lambda: parts.items())):
        demonstrations = load_demonstrations(
            trajectories(lambda index, make=make: make(rgb=IMAGES[index], kind=index % 3)), obs_keys=dict(a="rgb", b="kind")
        )
        assert_same(demonstrations.parts["a"], IMAGES)
        assert_same(demonstrations.parts["b"], np.arange(N, dtype=np.float32)[:, None] % 3)
    with pytest.raises(ValueError, match="can't choose from source, whose observations are not a Dict"):
        load_demonstrations(trajectories(lambda index: STATES[index]), obs_keys=["a"])


@pytest.mark.parametrize(
    "trajectories,message",
    [
        ([], "source is an empty list"),
        (["a.npz"], r"source\[0\] is a str without obs or acts: a list must hold trajectories"),
        ([trajectory(obs=dict(camera=1))], r"source\[0\].obs/camera must be numbers, one row per transition, not int64"),
        (
            [trajectory(), trajectory(obs=dict(a=np.zeros((4, 2))))],
            r"source\[1\] has the observations \['a'\], but",
        ),
        ([trajectory(), trajectory(obs=np.zeros((3, 2)))], r"source\[1\] has 3 obs and 3 acts.*one observation more"),
        ([trajectory(acts=np.zeros((0, 1)), obs=np.zeros((1, 2)))], r"source\[0\].acts has 0 rows, not at least one"),
        ([trajectory(), trajectory(obs=np.zeros((4, 5)))], r"source\[1\].obs has rows of shape \(5,\) .*but \(2,\)"),
        ([trajectory(rews=np.zeros(2))], r"source\[0\].rews has 2 rows, not 3, one per action"),
    ],
)
def test_malformed_trajectories(trajectories: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_demonstrations(trajectories)
