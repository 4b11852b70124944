"""Minari datasets."""

from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from sb3_dppo import BC, Demonstrations, load_demonstrations
from tests.demonstrations.files import (
    ACTIONS,
    IMAGES,
    LENGTHS,
    RGB,
    STATE,
    STATES,
    VIT,
    N,
    PictureEnv,
    assert_same,
    make_image_model,
)


def test_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("kind", ["vectors", "images", "dict"])
def test_written_to_minari(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    vectors, images = rng.normal(size=(7, 3)).astype(np.float32), rng.integers(0, 256, (7, 3, 8, 8), dtype=np.uint8)
    observations = dict(vectors=vectors, images=images, dict=dict(rgb=images, state=vectors))[kind]
    demonstrations = Demonstrations(
        observations,  # type: ignore[arg-type]
        rng.uniform(-1, 1, (7, 2)).astype(np.float32),
        np.array([3, 4]),
        rewards=np.arange(7.0),
        terminals=np.arange(7) == 2,
        env_id="Pendulum-v1",
    )
    demonstrations.save("minari:mine/some-v0")
    read = load_demonstrations("minari:mine/some-v0")
    assert read.parts.keys() == demonstrations.parts.keys()
    for key, rows in demonstrations.parts.items():
        np.testing.assert_array_equal(read.stacked_observations(np.arange(7), 1, key), rows)
    for name in ("actions", "traj_lengths", "rewards", "terminals"):
        np.testing.assert_array_equal(getattr(read, name), getattr(demonstrations, name))
    np.testing.assert_array_equal(read.truncations, np.arange(7) == 6)  # type: ignore[arg-type]
    assert read.env_id == "Pendulum-v1"
    with pytest.raises(ValueError, match="'minari:mine/some-v0' exists"):
        demonstrations.save("minari:mine/some-v0")
    with pytest.raises(ValueError, match="'minari:some' names no Minari dataset"):
        demonstrations.save("minari:some")


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    space = spaces.Dict(rgb=RGB, state=STATE, kind=spaces.Discrete(3))
    buffers, ends = [], np.cumsum([0, *LENGTHS])
    for i, length in enumerate(LENGTHS):
        index = np.arange(ends[i], ends[i] + length + 1) % N
        buffers.append(
            minari.data_collector.EpisodeBuffer(
                id=i,
                observations=dict(rgb=list(IMAGES[index]), state=list(STATES[index]), kind=list(index % 3)),
                actions=list(ACTIONS[index[:-1]]),
                rewards=[0.5] * length,
                terminations=[False] * length,
                truncations=[False] * (length - 1) + [True],
                infos={},
            )
        )
    action_space = spaces.Box(-1, 1, (1,))
    minari.create_dataset_from_buffers(
        "test/pictures-v0", buffers, observation_space=space, action_space=action_space, data_format="hdf5"
    )
    demonstrations = load_demonstrations("minari:test/pictures-v0")
    assert demonstrations.parts.keys() == {"rgb", "state", "kind"}
    assert isinstance(demonstrations.parts["rgb"], np.memmap)
    assert_same(demonstrations.parts["rgb"], IMAGES)
    assert_same(demonstrations.parts["state"], STATES)
    assert_same(demonstrations.parts["kind"], np.arange(N, dtype=np.float32)[:, None] % 3)
    chosen = load_demonstrations("test/pictures-v0", obs_keys=["state", "kind"])
    assert chosen.observations.shape == (N, 3)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"obs_keys names \['none'\], but the Minari dataset has.*'rgb'"):
        load_demonstrations("minari:test/pictures-v0", obs_keys=["none"])
    with pytest.raises(ValueError, match="not a local Minari dataset: get it with `minari download test/none-v0`"):
        load_demonstrations("minari:test/none-v0")
    BC(make_image_model(PictureEnv(space), **VIT), demonstrations).train(1, progress_bar=False)


def test_observations_that_are_no_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episode = minari.data_collector.EpisodeBuffer(
        observations=(list(STATES[:4]), [0, 1, 0, 1]),
        actions=list(ACTIONS[:3]),
        rewards=[0.0] * 3,
        terminations=[False] * 3,
        truncations=[False, False, True],
        infos={},
    )
    space, action_space = spaces.Tuple([STATE, spaces.Discrete(2)]), spaces.Box(-1, 1, (1,))
    kwargs = dict(observation_space=space, action_space=action_space, data_format="hdf5")
    minari.create_dataset_from_buffers("test/tuple-v0", [episode], **kwargs)
    with pytest.raises(ValueError, match="the Minari dataset's observations are Tuple.*or make it a Dict"):
        load_demonstrations("test/tuple-v0")


def test_an_env_that_is_not_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="tests/own-v0 won't say that it is of NoSuchEnv-v0, which is not registered"):
        Demonstrations(STATES, ACTIONS, LENGTHS, env_id="NoSuchEnv-v0").save("minari:tests/own-v0")
    assert load_demonstrations("minari:tests/own-v0").env_id is None
