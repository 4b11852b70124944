"""The class of demonstrations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_dppo import Demonstrations, load_demonstrations
from tests.demonstrations.files import ACTIONS, LENGTHS, STATES, N, arrays


def test_chunks_stay_inside_episodes(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays())
    first = load_demonstrations(tmp_path / "d.npz").chunk_starts(4)
    assert first.tolist() == [0, 1, 5, 6, 7, 8]


def test_demonstrations_are_checked_when_made_by_hand() -> None:
    with pytest.raises(ValueError, match="adds up to 3"):
        Demonstrations(np.zeros((4, 2)), np.zeros((4, 1)), np.array([3]))


def test_first_episodes() -> None:
    demonstrations = load_demonstrations("hopper-medium")
    first = demonstrations.first(3)
    assert first.n_episodes == 3 and len(first) == demonstrations.traj_lengths[:3].sum()
    np.testing.assert_array_equal(first.returns, demonstrations.returns[:3])  # type: ignore[index]
    assert first.terminals is not None and len(first.terminals) == len(first) and first.env_id == "Hopper-v5"
    assert demonstrations.first(1000).n_episodes == demonstrations.n_episodes
    with pytest.raises(ValueError, match="n_episodes=0 must be at least 1"):
        demonstrations.first(0)


def test_prints_in_one_line() -> None:
    shown = repr(load_demonstrations("hopper-medium"))
    assert shown == (
        "Demonstrations(Hopper-v5, 60 episodes, 25119 transitions, return 1314.18 ± 168.12, "
        "observations (25119, 11) float32, actions (25119, 3))"
    )
    observations = dict(rgb=np.zeros((4, 8, 8, 3), np.uint8), state=np.zeros((4, 2)))
    shown = str(Demonstrations(observations, np.zeros((4, 1)), np.array([1, 3])))
    assert shown == (
        "Demonstrations(unknown env, 2 episodes, 4 transitions, observations['rgb'] (4, 8, 8, 3) uint8, "
        "observations['state'] (4, 2) float64, actions (4, 1))"
    )


@pytest.mark.parametrize("lengths", [[5, 4, 3], np.array([5, 4, 3], np.uint8), np.array([5, 4, 3], np.uint64)])
def test_lengths_of_every_kind(lengths: Any) -> None:
    demonstrations = Demonstrations(STATES, ACTIONS, lengths, rewards=np.ones(N))
    assert demonstrations.traj_lengths.dtype == np.int64
    assert demonstrations.returns.tolist() == [5, 4, 3] and demonstrations.starts.tolist() == [0, 5, 9]  # type: ignore[union-attr]
    assert demonstrations.chunk_starts(4).tolist() == [0, 1, 5]


def test_rewards_are_one_per_transition() -> None:
    with pytest.raises(ValueError, match=r"rewards must be numbers, one per transition, not float64 of shape \(12, 1\)"):
        Demonstrations(STATES, ACTIONS, LENGTHS, rewards=np.ones((N, 1)))
