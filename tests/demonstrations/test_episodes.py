"""Episodes that are put together one after the other."""

import numpy as np
import pytest

from sb3_dppo.demonstrations.episodes import Episodes
from sb3_dppo.demonstrations.rows import EpisodeRows
from tests.demonstrations.files import ACTIONS, IMAGES, STATES, assert_same


@pytest.mark.parametrize("unpack_images", [False, True])
def test_a_part_of_an_episode_does_not_count(unpack_images: bool) -> None:
    episodes = Episodes(unpack_images)
    for rows in (slice(5), slice(5, 12)):
        episodes.append(
            {"actions": ACTIONS[rows], "obs/rgb": IMAGES[rows], "obs/state": STATES[rows], "rewards": ACTIONS[rows]}
        )
    with pytest.raises(ValueError, match="rewards has 2 rows, not 5, one per action"):
        episodes.append({"actions": ACTIONS[:5], "obs/rgb": IMAGES[:5], "obs/state": STATES[:5], "rewards": ACTIONS[:2]})
    assert episodes.lengths == [5, 7]
    observations = episodes.observations()
    assert isinstance(observations, dict)
    assert isinstance(observations["rgb"], np.memmap if unpack_images else EpisodeRows)
    assert_same(observations["rgb"], IMAGES)
    assert_same(observations["state"], STATES)
    assert_same(episodes.column("actions"), ACTIONS)
    np.testing.assert_array_equal(episodes.column("rewards"), ACTIONS[:, 0])
    assert episodes.column("terminals") is None


def test_what_is_not_known_of_all_episodes_is_not_known() -> None:
    episodes = Episodes()
    episodes.append({"actions": ACTIONS, "obs/": STATES, "rewards": None})
    episodes.append({"actions": ACTIONS, "obs/": STATES, "rewards": ACTIONS})
    assert episodes.column("rewards") is None and len(episodes.observations()) == 24


def test_what_does_not_fit() -> None:
    episodes = Episodes()
    episodes.append({"actions": ACTIONS, "obs/a": IMAGES})
    for columns, message in (
        ({"actions": "text"}, "here: actions must be numbers, one row per transition, not str"),
        ({"actions": np.array(["a"])}, "here: actions must be numbers, one row per transition, not <U1"),
        ({"actions": ACTIONS[:0]}, "here: actions has 0 rows, not at least one"),
        (
            {"actions": ACTIONS, "obs/a": IMAGES[:, :8]},
            r"here: obs/a has rows of shape \(8, 16, 3\) and dtype uint8, but \(16,",
        ),
        ({"actions": ACTIONS, "obs/a": IMAGES / 255}, r"dtype float32, but \(16, 16, 3\) and uint8 in other episodes"),
        ({"actions": ACTIONS, "obs/a": IMAGES, "rewards": STATES}, "here: rewards has 2 columns, not one"),
    ):
        with pytest.raises(ValueError, match=message):
            episodes.append(columns, "here: ")
