"""robomimic's files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from sb3_dppo import load_demonstrations
from sb3_dppo.demonstrations.rows import EpisodeRows
from tests.demonstrations.files import IMAGES, assert_same, write_robomimic


def test_vectors(tmp_path: Path) -> None:
    lengths = (4, 3, 5, 1, 2, 2, 2, 2, 2, 2, 6)
    content = write_robomimic(tmp_path / "lift.hdf5", lengths)
    demonstrations = load_demonstrations(tmp_path / "lift.hdf5")
    # demo_10 is the last one, and not after demo_1.
    assert demonstrations.traj_lengths.tolist() == list(lengths)
    np.testing.assert_allclose(demonstrations.actions, np.concatenate(content["actions"]), rtol=1e-6)
    # gripper, object, robot0_eef_pos
    assert demonstrations.observations.shape == (sum(lengths), 6) and demonstrations.observations.dtype == np.float32
    np.testing.assert_allclose(demonstrations.observations[:, 0], np.concatenate(content["obs/gripper"]), rtol=1e-6)
    np.testing.assert_allclose(demonstrations.observations[:, 1:3], np.concatenate(content["obs/object"]), rtol=1e-6)
    np.testing.assert_allclose(demonstrations.returns, [rewards.sum() for rewards in content["rewards"]], rtol=1e-5)
    assert demonstrations.terminals is not None
    assert np.flatnonzero(demonstrations.terminals).tolist() == (np.cumsum(lengths) - 1).tolist()
    assert demonstrations.env_id is None


def test_robomimic_keys_and_subsets(tmp_path: Path) -> None:
    content = write_robomimic(tmp_path / "lift.h5")
    keys = ["robot0_eef_pos", "gripper"]
    demonstrations = load_demonstrations(str(tmp_path / "lift.h5"), obs_keys=keys, filter_key="train")
    assert demonstrations.traj_lengths.tolist() == [4, 5]
    expected = [np.column_stack([content[f"obs/{key}"][i] for key in keys]) for i in (0, 2)]
    np.testing.assert_allclose(demonstrations.observations, np.concatenate(expected), rtol=1e-6)


def test_robomimic_without_rewards(tmp_path: Path) -> None:
    path = tmp_path / "d.hdf5"
    write_robomimic(path)
    with h5py.File(path, "a") as file:
        for i in range(3):
            del file[f"data/demo_{i}/rewards"], file[f"data/demo_{i}/dones"]
    demonstrations = load_demonstrations(path)
    assert demonstrations.rewards is None and demonstrations.terminals is None


def test_images(tmp_path: Path) -> None:
    content = write_robomimic(tmp_path / "d.hdf5")
    with h5py.File(tmp_path / "d.hdf5", "a") as file:
        for i, part in enumerate(np.split(IMAGES, [4, 7])):
            del file[f"data/demo_{i}/obs/agentview_image"]
            file[f"data/demo_{i}/obs/agentview_image"] = part
    demonstrations = load_demonstrations(
        tmp_path / "d.hdf5", obs_keys=dict(rgb="agentview_image", state=["object", "gripper"], object="object")
    )
    assert isinstance(demonstrations.parts["rgb"], EpisodeRows)
    assert_same(demonstrations.parts["rgb"], IMAGES)
    expected = np.column_stack([np.concatenate(content[f"obs/{key}"]) for key in ("object", "gripper")])
    np.testing.assert_allclose(demonstrations.parts["state"], expected, rtol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_allclose(demonstrations.parts["object"], expected[:, :2], rtol=1e-6)  # type: ignore[arg-type]
    train = load_demonstrations(tmp_path / "d.hdf5", obs_keys=["agentview_image"], filter_key="train").observations
    np.testing.assert_array_equal(train[np.arange(9)], IMAGES[[0, 1, 2, 3, 7, 8, 9, 10, 11]])  # type: ignore[index]
    # Without images nothing of the file stays open.
    load_demonstrations(tmp_path / "d.hdf5")
    demonstrations.save(tmp_path / "d.npz")
    assert_same(load_demonstrations(tmp_path / "d.npz").parts["rgb"], IMAGES)


def _set(name: str, value: Any = None) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        if name in file:
            del file[name]
        if value is not None:
            file[name] = value

    return change


@pytest.mark.parametrize(
    "change,kwargs,message",
    [
        (_set("data"), {}, r"d.hdf5 lacks the group data.*\['mask'\]"),
        (_set("data", np.zeros(3)), {}, "lacks the group data"),
        (_set("data/extra", np.zeros(3)), {}, r"data holds \['extra'\], but episodes must be called demo_0"),
        (_set("data/demo_1/actions"), {}, "d.hdf5 lacks the dataset data/demo_1/actions; there are.*'obs'"),
        (_set("data/demo_1/actions", np.zeros((0, 2))), {}, "data/demo_1/actions has 0 rows, not at least one"),
        (_set("data/demo_1/actions", np.zeros((2, 2))), {}, "data/demo_1/obs/gripper has 3 rows, not 2, one per action"),
        (
            _set("data/demo_1/actions", np.zeros((3, 4))),
            {},
            r"demo_1/actions has rows of shape \(4,\) and .*, but \(2,\) and .* in other",
        ),
        (_set("data/demo_1/actions", [b"a", b"b", b"c"]), {}, "data/demo_1/actions must be numbers"),
        (_set("data/demo_0/actions", 3.0), {}, "data/demo_0/actions must be numbers, one row per transition"),
        (_set("data/demo_0/obs"), {}, "lacks the group data/demo_0/obs; extract observations with.*dataset_states_to_obs"),
        (_set("data/demo_2/obs"), {}, "lacks the dataset data/demo_2/obs/gripper"),
        (_set("data/demo_2/obs/object"), {}, r"lacks the dataset data/demo_2/obs/object; there are.*'gripper'"),
        (_set("data/demo_2/obs/object", np.zeros((5, 7))), {}, r"demo_2/obs/object has rows of shape \(7,\) .*but \(2,\)"),
        (_set("data/demo_2/rewards"), {}, "lacks the dataset data/demo_2/rewards"),
        (_set("data/demo_2/rewards", np.zeros((5, 2))), {}, "data/demo_2/rewards has 2 columns, not one"),
        (_set("data/demo_0/obs/object", np.full((4, 2), np.nan)), {}, "observations is NaN or infinite in transition 0"),
        (_set("mask"), dict(filter_key="train"), r"filter_key='train' is not in .*d.hdf5, whose mask holds \[\]"),
        (_set("none"), dict(filter_key="valid"), r"filter_key='valid'.*\['gone', 'train'\]"),
        (_set("none"), dict(filter_key="gone"), r"mask/gone names \['demo_77'\], which data does not hold"),
        (
            _set("data/demo_1/obs/object", np.zeros((3, 4, 4))),
            {},
            r"object has the shape \(3, 4, 4\) .*only vectors",
        ),
        (_set("data/demo_0/actions", np.zeros((4, 2, 2, 3), np.uint8)), {}, "demo_0/actions has the shape .*only vectors and"),
        (
            _set("data/demo_2/obs/agentview_image", np.zeros((5, 4, 4, 3), np.uint8)),
            dict(obs_keys=["agentview_image"]),
            r"demo_2/obs/agentview_image has rows of shape \(4, 4, 3\) and dtype uint8, but \(8, 8, 3\) and uint8 in other",
        ),
        (_set("none"), dict(obs_keys=["object", "agentview_image"]), "side by side, but 'agentview_image' has the shape"),
        (_set("none"), dict(obs_keys=dict(state=[])), "obs_keys=.*must be a list with at least one name, or a dictionary"),
        (_set("none"), dict(obs_keys={}), "must be a list with at least one name, or a dictionary"),
        (_set("none"), dict(obs_keys=["object", "camera"]), "lacks the dataset data/demo_0/obs/camera; there are.*'object'"),
        (_set("none"), dict(obs_keys=[]), r"obs_keys=\[\] must be a list with at least one name"),
        (_set("none"), dict(obs_keys="object"), "obs_keys='object' must be a list"),
        (_set("none"), dict(normalization="n.npz"), "normalization='n.npz' is for normalised .npz files"),
    ],
)
def test_malformed_robomimic(
    change: Callable[[h5py.File], None], kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_robomimic(tmp_path / "d.hdf5")
    with h5py.File(tmp_path / "d.hdf5", "a") as file:
        change(file)
    with pytest.raises(ValueError, match=message):
        load_demonstrations(tmp_path / "d.hdf5", **kwargs)


def test_robomimic_that_refers_elsewhere_or_is_a_trap(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "other.hdf5")
    layout = h5py.VirtualLayout((4, 2), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "data/demo_0/actions", (4, 2))
    changes: dict[str, Callable[[h5py.File, str], Any]] = {
        "link": lambda file, name: file.__setitem__(name, h5py.ExternalLink(str(tmp_path / "other.hdf5"), name)),
        "external": lambda file, name: file.create_dataset(name, (4, 2), "u1", external=[("/etc/passwd", 0, 8)]),
        "virtual": lambda file, name: file.create_virtual_dataset(name, layout),
        "huge": lambda file, name: file.create_dataset(name, (4, 2**40), "f4", chunks=(4, 2**10)),
    }
    for kind, change in changes.items():
        write_robomimic(tmp_path / "d.hdf5")
        with h5py.File(tmp_path / "d.hdf5", "a") as file:
            del file["data/demo_0/actions"]
            change(file, "data/demo_0/actions")
        with pytest.raises(ValueError, match="more than the file can hold" if kind == "huge" else "refers to another file"):
            load_demonstrations(tmp_path / "d.hdf5")


def test_small_file_that_would_become_large(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for name in ("actions", "obs/object"):
            file.create_dataset(f"data/demo_0/{name}", data=np.zeros((10**6, 1), np.float32), compression=9)
        for i in range(1, 50):
            file[f"data/demo_{i}"] = file["data/demo_0"]
    with pytest.raises(ValueError, match="holds more, up to data/demo_.*, than its size allows"):
        load_demonstrations(tmp_path / "d.hdf5")


def test_files_that_are_not_robomimic(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.hdf5 does not exist"):
        load_demonstrations(tmp_path / "none.hdf5")
    (tmp_path / "text.hdf5").write_text("hello")
    with pytest.raises(ValueError, match="text.hdf5 can't be read as HDF5"):
        load_demonstrations(tmp_path / "text.hdf5")
    with h5py.File(tmp_path / "images.hdf5", "w") as file:
        file["data/demo_0/actions"] = np.zeros((2, 1))
        file["data/demo_0/obs/camera"] = np.zeros((2, 4, 4, 3))
    with pytest.raises(ValueError, match=r"data/demo_0/obs holds no vectors, only \['camera'\]"):
        load_demonstrations(tmp_path / "images.hdf5")
    with h5py.File(tmp_path / "empty.hdf5", "w") as file:
        file.create_group("data")
    with pytest.raises(ValueError, match="data holds no episodes"):
        load_demonstrations(tmp_path / "empty.hdf5")
    whole = tmp_path / "whole.hdf5"
    write_robomimic(whole, (300, 300))
    (tmp_path / "cut.hdf5").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match="cut.hdf5 can't be read as HDF5"):
        load_demonstrations(tmp_path / "cut.hdf5")
