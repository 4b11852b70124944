"""Reading demonstrations."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from sb3_dppo import Demonstrations, load_demonstrations
from sb3_dppo.demonstrations import bundled_demonstrations


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    data = dict(
        states=rng.normal(size=(12, 3)),
        actions=rng.uniform(-0.9, 0.9, (12, 2)),
        traj_lengths=np.array([5, 7]),
        rewards=np.arange(12.0),
        terminals=np.zeros(12, dtype=bool),
        meta=np.array(json.dumps(dict(env_id="Some-v0"))),
    )
    return {key: value for key, value in {**data, **changes}.items() if value is not None}


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays())
    demonstrations = load_demonstrations(tmp_path / "d.npz")
    assert len(demonstrations) == 12 and demonstrations.n_episodes == 2
    assert demonstrations.env_id == "Some-v0"
    np.testing.assert_allclose(demonstrations.returns, [10, 56])
    np.testing.assert_allclose(demonstrations.observations, arrays()["states"], rtol=1e-6)
    np.savez(tmp_path / "d.npz", **arrays(rewards=None, terminals=None, meta=None))
    demonstrations = load_demonstrations(str(tmp_path / "d.npz"))
    assert demonstrations.returns is None and demonstrations.terminals is None and demonstrations.env_id is None


def test_chunks_stay_inside_episodes(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays())
    first, chunks = load_demonstrations(tmp_path / "d.npz").chunks(4)
    assert first.tolist() == [0, 1, 5, 6, 7, 8]
    np.testing.assert_allclose(chunks[2], arrays()["actions"][5:9], rtol=1e-6)


def test_normalised_files_of_the_reference(tmp_path: Path) -> None:
    raw = arrays()
    ranges = {
        f"{short}_{kind}": getattr(raw[name], kind)(axis=0)
        for short, name in (("obs", "states"), ("action", "actions"))
        for kind in ("min", "max")
    }
    normalised = {
        name: 2 * (raw[name] - ranges[f"{short}_min"]) / (ranges[f"{short}_max"] - ranges[f"{short}_min"] + 1e-6) - 1
        for short, name in (("obs", "states"), ("action", "actions"))
    }
    folder = tmp_path / "gym"
    folder.mkdir()
    np.savez(folder / "train.npz", **arrays(**normalised))
    np.savez(tmp_path / "ranges.npz", **ranges)
    explicit = load_demonstrations(folder / "train.npz", normalization=tmp_path / "ranges.npz")
    np.testing.assert_allclose(explicit.observations, raw["states"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(explicit.actions, raw["actions"], rtol=1e-4, atol=1e-5)
    np.savez(folder / "normalization.npz", **ranges)
    np.testing.assert_allclose(load_demonstrations(folder / "train.npz").actions, raw["actions"], rtol=1e-4, atol=1e-5)
    # A raw file beside such a file is left as it is.
    np.savez(folder / "raw.npz", **raw)
    np.testing.assert_allclose(load_demonstrations(folder / "raw.npz").actions, raw["actions"], rtol=1e-6)


def test_bundled_set() -> None:
    assert bundled_demonstrations() == ["hopper-medium"]
    demonstrations = load_demonstrations("hopper-medium")
    assert demonstrations.env_id == "Hopper-v5"
    assert demonstrations.observations.shape == (len(demonstrations), 11)
    assert demonstrations.actions.shape == (len(demonstrations), 3)
    assert demonstrations.n_episodes > 30 and demonstrations.returns is not None
    env = gym.make("Hopper-v5")
    assert env.action_space.contains(demonstrations.actions[0])


def test_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    # Written by hand: minari's own collector needs JAX.
    buffers = [
        minari.data_collector.EpisodeBuffer(
            id=i,
            observations=list(rng.normal(size=(7, 3)).astype(np.float32)),
            actions=list(rng.uniform(-1, 1, (6, 1)).astype(np.float32)),
            rewards=list(rng.normal(size=6)),
            terminations=[False] * 6,
            truncations=[False] * 5 + [True],
            infos={},
        )
        for i in range(3)
    ]
    dataset = minari.create_dataset_from_buffers("test/sb3-dppo-v0", buffers, env="Pendulum-v1", data_format="hdf5")
    for source in (dataset, "test/sb3-dppo-v0"):
        demonstrations = load_demonstrations(source)
        assert len(demonstrations) == 18 and demonstrations.n_episodes == 3
        assert demonstrations.env_id == "Pendulum-v1"
        np.testing.assert_allclose(demonstrations.observations[6:12], buffers[1].observations[:6])
        np.testing.assert_allclose(demonstrations.actions[6:12], buffers[1].actions)
        assert demonstrations.returns is not None
        assert demonstrations.returns[1] == pytest.approx(np.sum(buffers[1].rewards))


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(actions=np.zeros((11, 2))), "actions has 11 rows, but states has 12"),
        (dict(rewards=np.zeros(3)), "rewards has 3 rows"),
        (dict(traj_lengths=np.array([5, 6])), "adds up to 11 transitions, but states has 12"),
        (dict(traj_lengths=np.array([12, 0])), "traj_lengths must be positive integers"),
        (dict(traj_lengths=np.array([5.0, 7.0])), "traj_lengths must be positive integers"),
        (dict(traj_lengths=None), r"lacks \['traj_lengths'\]"),
        (dict(states=np.full((12, 3), np.nan)), "states is NaN or infinite in transition 0"),
        (dict(actions=np.where(np.arange(24).reshape(12, 2) == 7, np.inf, 0)), "actions is NaN or infinite in transition 3"),
        (dict(states=np.zeros((0, 3))), "states must have the shape"),
        (dict(states=np.zeros(12)), "states must have the shape"),
        (dict(actions=np.zeros(12)), "actions must have the shape"),
        (dict(states=np.array([["a"]] * 12)), "states must be numbers"),
        (dict(states=np.array([object()] * 12)), "can't be read as .npz"),
    ],
)
def test_errors(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        load_demonstrations(tmp_path / "d.npz")


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist.*hopper-medium"):
        load_demonstrations(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="can't be read as .npz"):
        load_demonstrations(tmp_path / "text.npz")
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(ValueError, match="not an .npz file"):
        load_demonstrations(tmp_path / "d.csv")
    with pytest.raises(ValueError, match="neither a bundled set.*hopper-medium.*Minari"):
        load_demonstrations("hopper-expert")
    with pytest.raises(TypeError, match="Minari dataset, not int"):
        load_demonstrations(3)  # type: ignore[arg-type]


def test_normalization_where_it_does_not_belong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is for normalised .npz files"):
        load_demonstrations("hopper-medium", normalization="n.npz")
    np.savez(tmp_path / "d.npz", **arrays())
    np.savez(tmp_path / "n.npz", obs_min=np.zeros(4), obs_max=np.ones(4), action_min=np.zeros(2), action_max=np.ones(2))
    with pytest.raises(ValueError, match="4 obs ranges"):
        load_demonstrations(tmp_path / "d.npz", normalization=tmp_path / "n.npz")
    np.savez(tmp_path / "d.npz", **arrays(meta=np.array("[]")))
    with pytest.raises(ValueError, match="meta must be a JSON object"):
        load_demonstrations(tmp_path / "d.npz")


def test_demonstrations_are_checked_when_made_by_hand() -> None:
    with pytest.raises(ValueError, match="adds up to 3"):
        Demonstrations(np.zeros((4, 2)), np.zeros((4, 1)), np.array([3]))
