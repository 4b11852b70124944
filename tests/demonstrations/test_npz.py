"""Demonstrations in .npz files."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_dppo import Demonstrations, load_demonstrations
from sb3_dppo.demonstrations.npz import read_npz
from tests.demonstrations.files import ACTIONS, IMAGES, LENGTHS, STATES, N, arrays, assert_same


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


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(actions=np.zeros((11, 2))), "actions has 11 rows, but observations has 12"),
        (dict(rewards=np.zeros(3)), "rewards has 3 rows"),
        (dict(traj_lengths=np.array([5, 6])), "adds up to 11 transitions, but observations has 12"),
        (dict(traj_lengths=np.array([12, 0])), "traj_lengths must be positive integers"),
        (dict(traj_lengths=np.array([5.0, 7.0])), "traj_lengths must be positive integers"),
        (dict(traj_lengths=None), r"lacks \['traj_lengths'\]"),
        (dict(states=np.full((12, 3), np.nan)), "observations is NaN or infinite in transition 0"),
        (dict(actions=np.where(np.arange(24).reshape(12, 2) == 7, np.inf, 0)), "actions is NaN or infinite in transition 3"),
        (
            dict(states=np.zeros((0, 3))),
            r"observations must be numbers, shape \(transitions, size\), not float32 of shape \(0, 3\)",
        ),
        (dict(states=np.array([["a"]] * 12)), "states must be numbers"),
        (dict(states=np.array([object()] * 12)), "can't be read as .npz"),
        (dict(states=np.array(1.0)), "states must be numbers, one row per transition"),
        (dict(rewards=np.array(["a"] * 12)), "rewards must be numbers"),
        (dict(terminals=np.array(True)), "terminals must be numbers"),
        (dict(traj_lengths=np.array([2**63, 2**63 + 12], dtype=np.uint64)), "traj_lengths adds up to"),
        (dict(meta=np.array('{"env_id": ["Some-v0"]}')), "meta must be a JSON object"),
        (dict(meta=np.array("[" * 10**5)), "meta must be a JSON object"),
    ],
)
def test_malformed(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        load_demonstrations(tmp_path / "d.npz")


def test_save_and_load(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    demonstrations = Demonstrations(
        rng.uniform(-0.5, 0.5, (9, 3)).astype(np.float32),
        rng.uniform(-0.5, 0.5, (9, 2)).astype(np.float32),
        np.array([2, 3, 4]),
        rewards=np.arange(9.0),
        terminals=np.arange(9) == 4,
        env_id="Some-v0",
        truncations=np.arange(9) == 1,
    )
    # Small values beside such a file would otherwise be taken for normalised ones.
    ranges = dict(obs_min=np.zeros(3), obs_max=np.ones(3), action_min=np.zeros(2), action_max=np.ones(2))
    (tmp_path / "new").mkdir()
    np.savez(tmp_path / "new" / "normalization.npz", **ranges)
    path = tmp_path / "new" / "folder" / ".." / "d.npz"
    demonstrations.save(path)
    loaded = load_demonstrations(path)
    assert loaded.env_id == "Some-v0"
    for name in ("observations", "actions", "traj_lengths", "rewards", "terminals", "truncations"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(demonstrations, name))
    with pytest.raises(ValueError, match="d.npz is in the env's units"):
        load_demonstrations(path, normalization=tmp_path / "new" / "normalization.npz")
    Demonstrations(np.zeros((2, 3)), np.zeros((2, 1)), np.array([2])).save(path)
    loaded = load_demonstrations(path)
    assert loaded.env_id is None and loaded.rewards is None and loaded.terminals is None and loaded.truncations is None
    with pytest.raises(ValueError, match=r"path='.*d.hdf5' must end in .npz"):
        demonstrations.save(tmp_path / "d.hdf5")


@pytest.mark.parametrize("compressed", [False, True])
def test_images_of_the_reference(compressed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    channels_first = IMAGES.transpose(0, 3, 1, 2)
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "train.npz", images=channels_first, states=STATES, actions=ACTIONS, traj_lengths=LENGTHS)
    demonstrations = load_demonstrations(tmp_path / "train.npz")
    assert list(demonstrations.parts) == ["images", "states"] and len(demonstrations) == N
    assert isinstance(demonstrations.parts["images"], np.memmap)
    assert_same(demonstrations.parts["images"], channels_first)
    assert_same(demonstrations.parts["states"], STATES)
    renamed = load_demonstrations(tmp_path / "train.npz", obs_keys=dict(rgb="images", state=["states"]))
    assert list(renamed.parts) == ["rgb", "state"]
    assert load_demonstrations(tmp_path / "train.npz", obs_keys=["states"]).observations.shape == (N, 2)  # type: ignore[union-attr]
    # Images alone are no Dict; normalised states beside images are the env's again.
    save(tmp_path / "images.npz", images=channels_first, actions=ACTIONS, traj_lengths=LENGTHS)
    assert_same(load_demonstrations(tmp_path / "images.npz").observations, channels_first)
    ranges = dict(obs_min=np.zeros(2), obs_max=np.full(2, 4.0), action_min=-np.ones(1), action_max=np.ones(1))
    np.savez(tmp_path / "normalization.npz", **ranges)
    save(tmp_path / "small.npz", images=IMAGES, states=STATES / 9, actions=ACTIONS, traj_lengths=LENGTHS)
    np.testing.assert_allclose(load_demonstrations(tmp_path / "small.npz").parts["states"], STATES / 9 * 2 + 2, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("observations", [IMAGES, dict(rgb=IMAGES, state=STATES), {"a/b": STATES}])
def test_save_and_load_images(observations: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    Demonstrations(observations, ACTIONS, LENGTHS, env_id="Some-v0").save(path)
    loaded = load_demonstrations(path)
    assert loaded.env_id == "Some-v0" and isinstance(loaded.observations, dict) == isinstance(observations, dict)
    expected = observations if isinstance(observations, dict) else {"": observations}
    assert loaded.parts.keys() == expected.keys()
    for key, values in expected.items():
        assert_same(loaded.parts[key], values)
    # NumPy reads it, too, and a file may be replaced by a part of itself while it is read.
    with np.load(path, allow_pickle=False) as archive:
        assert "actions" in archive.files
    loaded.first(2).save(path)
    again = load_demonstrations(path)
    assert len(again) == 9 and [entry.name for entry in tmp_path.iterdir()] == ["d.npz"]
    for key, values in expected.items():
        np.testing.assert_array_equal(again.parts[key][np.arange(9)], values[:9])
        assert_same(loaded.parts[key], values)


def test_malformed_images(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    fine = dict(images=IMAGES, actions=ACTIONS, traj_lengths=LENGTHS)
    for changes, message in (
        (dict(images=IMAGES.astype(np.float32)), r"images must be bytes \(uint8\).*not float32 of shape \(12, 16, 16, 3\)"),
        (dict(images=IMAGES[:, 0]), "images must be bytes"),
        (dict(images=IMAGES[:5]), "actions has 12 rows, but observations has 5"),
        (dict(states=STATES[:5]), r"observations\['states'\] has 5 rows, but observations\['images'\] has 12"),
        (dict(states=STATES * np.nan), r"observations\['states'\] is NaN or infinite in transition 0"),
    ):
        np.savez(path, **(fine | changes))
        with pytest.raises(ValueError, match=message):
            load_demonstrations(path)
    np.savez(path, actions=ACTIONS, traj_lengths=LENGTHS)
    with pytest.raises(ValueError, match="lacks observations, as states, images or obs/KEY"):
        load_demonstrations(path)
    with pytest.raises(ValueError, match="lacks observations"):
        load_demonstrations(path, obs_keys=["images"])
    # The header of the images promises more than there is.
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        np.savez(path, **fine)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members["images.npy"] = members["images.npy"].replace(b"(12, 16,", b"(99, 16,")
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        with pytest.raises(ValueError, match="d.npz can't be read as .npz"):
            load_demonstrations(path)
    with pytest.raises(ValueError, match="can't be read"):
        path.write_bytes(path.read_bytes()[:-40])
        read_npz(path, ())
    with pytest.raises(ValueError, match="observations is an empty dictionary"):
        Demonstrations({}, ACTIONS, LENGTHS)


def test_ranges_are_of_states_alone(tmp_path: Path) -> None:
    ranges = {
        f"{short}_{kind}": np.full(2, sign * 9.0) for short in ("obs", "action") for kind, sign in (("min", -1), ("max", 1))
    }
    np.savez(tmp_path / "normalization.npz", **ranges)
    np.savez(tmp_path / "d.npz", **{"obs/state": STATES * 100}, actions=ACTIONS, traj_lengths=LENGTHS)
    loaded = load_demonstrations(tmp_path / "d.npz")
    np.testing.assert_array_equal(loaded.actions, ACTIONS)
    with pytest.raises(ValueError, match=r"has ranges of states, but .*d.npz holds \['obs/state'\]"):
        load_demonstrations(tmp_path / "d.npz", normalization=tmp_path / "normalization.npz")


def test_one_number_per_transition_and_truth_values(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **{"obs/grip": STATES[:, 0]}, actions=ACTIONS[:, 0], traj_lengths=LENGTHS)
    loaded = load_demonstrations(tmp_path / "d.npz")
    np.testing.assert_array_equal(loaded.parts["grip"], STATES[:, :1])
    np.testing.assert_array_equal(loaded.actions, ACTIONS[:, :1])
    Demonstrations(STATES > 0, ACTIONS, LENGTHS).save(tmp_path / "flags.npz")
    np.testing.assert_array_equal(load_demonstrations(tmp_path / "flags.npz").observations, STATES > 0)


def test_images_in_any_order_of_memory(tmp_path: Path) -> None:
    first = IMAGES.transpose(0, 3, 1, 2)
    Demonstrations(first, ACTIONS, LENGTHS).save(tmp_path / "d.npz")
    np.testing.assert_array_equal(load_demonstrations(tmp_path / "d.npz").observations[np.arange(N)], first)  # type: ignore[index]


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Demonstrations(STATES, ACTIONS, LENGTHS).save("~/new/d.npz")
    assert (tmp_path / "new" / "d.npz").is_file() and len(load_demonstrations("~/new/d.npz")) == N
