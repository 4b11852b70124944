"""Reading demonstrations."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch as th

from sb3_dppo import BC, DPPO, Demonstrations, load_demonstrations
from sb3_dppo.demonstrations.demonstrations import collect_demonstrations, describe
from sb3_dppo.demonstrations.formats import bundled_demonstrations
from tests.toy_envs import CountingEnv


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
    assert bundled_demonstrations() == ["hopper-medium", "metaworld-pick-place"]
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
        (dict(states=np.zeros((0, 3))), "observations must have the shape"),
        (dict(states=np.zeros(12)), "states must have the shape"),
        (dict(actions=np.zeros(12)), "actions must have the shape"),
        (dict(states=np.array([["a"]] * 12)), "states must be numbers"),
        (dict(states=np.array([object()] * 12)), "can't be read as .npz"),
        (dict(states=np.array(1.0)), "states must have the shape"),
        (dict(rewards=np.array(["a"] * 12)), "rewards must be numbers"),
        (dict(terminals=np.array(True)), "terminals must be numbers"),
        (dict(traj_lengths=np.array([2**63, 2**63 + 12], dtype=np.uint64)), "traj_lengths adds up to"),
        (dict(meta=np.array('{"env_id": ["Some-v0"]}')), "meta must be a JSON object"),
        (dict(meta=np.array("[" * 10**5)), "meta must be a JSON object"),
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
    for path in (tmp_path / "d.csv", tmp_path):
        with pytest.raises(ValueError, match="not an .npz file, a robomimic file.*LeRobot folder"):
            load_demonstrations(path)
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


def test_first_episodes() -> None:
    demonstrations = load_demonstrations("hopper-medium")
    first = demonstrations.first(3)
    assert first.n_episodes == 3 and len(first) == demonstrations.traj_lengths[:3].sum()
    np.testing.assert_array_equal(first.returns, demonstrations.returns[:3])  # type: ignore[index]
    assert first.terminals is not None and len(first.terminals) == len(first) and first.env_id == "Hopper-v5"
    assert demonstrations.first(1000).n_episodes == demonstrations.n_episodes
    with pytest.raises(ValueError, match="n_episodes=0 must be at least 1"):
        demonstrations.first(0)


def test_constant_columns_survive_behaviour_cloning() -> None:
    env = CountingEnv()  # two of its three observations never change
    demonstrations = collect_demonstrations(env, lambda obs, *_: (np.array([np.sin(obs[0]), -0.25]), None), 5)
    assert "constant      observations[1], observations[2], actions[1]" in describe(demonstrations)
    policy_kwargs = dict(net_arch=dict(pi=[32], vf=[16]), denoising_steps=5, horizon=4)
    model = DPPO("DiffusionMlpPolicy", CountingEnv(), n_steps=16, batch_size=20, policy_kwargs=policy_kwargs, seed=0)
    BC(model, demonstrations).train(2, progress_bar=False)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    features = model.policy.extract_features(th.as_tensor(demonstrations.observations))
    assert (features[:, 1:] == 0).all() and features[:, 0].abs().max() == pytest.approx(1, abs=1e-5)
    assert model.policy.normalize_actions(th.as_tensor(demonstrations.actions)).abs().max() <= 1.00001
    actions = model.predict(demonstrations.observations.astype(np.float64))[0]
    np.testing.assert_allclose(actions[:, 1], -0.25, atol=1e-5)
    model.learn(16)


# ---------------------------------------------------------------------- robomimic


def write_robomimic(path: Path, lengths: tuple[int, ...] = (4, 3, 5), images: bool = True) -> dict[str, list[np.ndarray]]:
    """A file as robomimic's are; returns what is in it, per episode."""
    rng = np.random.default_rng(0)
    content: dict[str, list[np.ndarray]] = {}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(dict(env_name="Lift", type=1, env_kwargs={}))
        data.attrs["total"] = sum(lengths)
        for i, length in enumerate(lengths):
            episode = data.create_group(f"demo_{i}")
            episode.attrs["num_samples"] = length
            values = {
                "obs/robot0_eef_pos": rng.normal(size=(length, 3)),
                "obs/object": rng.normal(size=(length, 2)),
                "obs/gripper": rng.normal(size=length),
                "actions": rng.uniform(-1, 1, (length, 2)),
                "rewards": rng.normal(size=length),
                "dones": (np.arange(length) == length - 1).astype(np.int64),
                "states": rng.normal(size=(length, 9)),
            }
            if images:
                values["obs/agentview_image"] = np.zeros((length, 8, 8, 3), dtype=np.uint8)
            for name, array in values.items():
                episode[name] = array
                content.setdefault(name, []).append(array)
            episode.create_group("next_obs")
        file["mask/train"] = np.array([b"demo_2", b"demo_0"])
        file["mask/gone"] = np.array([b"demo_77"])
    return content


def test_robomimic(tmp_path: Path) -> None:
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
        (_set("data/demo_1/actions", np.zeros((3, 4))), {}, r"demo_1/actions has rows of shape \(4,\), but \(2,\) in other"),
        (_set("data/demo_1/actions", [b"a", b"b", b"c"]), {}, "data/demo_1/actions must be numbers"),
        (_set("data/demo_0/actions", 3.0), {}, "data/demo_0/actions must be numbers, one row per transition"),
        (_set("data/demo_0/obs"), {}, "lacks the group data/demo_0/obs; extract observations with.*dataset_states_to_obs"),
        (_set("data/demo_2/obs"), {}, "lacks the dataset data/demo_2/obs/gripper"),
        (_set("data/demo_2/obs/object"), {}, r"lacks the dataset data/demo_2/obs/object; there are.*'gripper'"),
        (_set("data/demo_2/obs/object", np.zeros((5, 7))), {}, r"demo_2/obs/object has rows of shape \(7,\), but \(2,\)"),
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
            r"demo_2/obs/agentview_image has rows of shape \(4, 4, 3\), but \(8, 8, 3\) in other episodes",
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


def test_small_files_that_would_become_large(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for name in ("actions", "obs/object"):
            file.create_dataset(f"data/demo_0/{name}", data=np.zeros((10**6, 1), np.float32), compression=9)
        for i in range(1, 50):
            file[f"data/demo_{i}"] = file["data/demo_0"]
    with pytest.raises(ValueError, match="holds more, up to data/demo_.*, than its size allows"):
        load_demonstrations(tmp_path / "d.hdf5")

    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    frames = lerobot_frames((3,))
    write_lerobot(tmp_path / "lerobot", frames, [np.arange(3)])
    same = pa.table({name: pa.array(np.zeros(2**22, np.int8)) for name in frames})
    pq.write_table(same, next((tmp_path / "lerobot").rglob("*.parquet")))
    with pytest.raises(ValueError, match="values are more than its size allows"):
        load_demonstrations(tmp_path / "lerobot")


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


# ---------------------------------------------------------------------- LeRobot


def lerobot_frames(lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng, n = np.random.default_rng(0), sum(lengths)
    last = np.cumsum(lengths) - 1
    return {
        "observation.state": rng.normal(size=(n, 3)).astype(np.float32),
        "observation.environment_state": rng.normal(size=(n, 2)).astype(np.float32),
        "observation.gripper": rng.normal(size=n).astype(np.float32),  # shape (1,) is stored as a number
        "action": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "frame_index": np.concatenate([np.arange(length) for length in lengths]),
        "index": np.arange(n),
        "timestamp": np.arange(n, dtype=np.float32) / 10,
        "next.reward": rng.normal(size=n).astype(np.float32),
        "next.done": np.isin(np.arange(n), last),
    }


def write_lerobot(
    folder: Path,
    frames: dict[str, np.ndarray],
    parts: list[np.ndarray],
    info: dict[str, Any] | None = None,
    name: str = "file",
) -> Path:
    """A folder as LeRobot's are, each part of the frames in a file of its own."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {
        key: dict(dtype=str(values.dtype), shape=list(values.shape[1:]) or [1], names=None) for key, values in frames.items()
    }
    features["observation.images.top"] = dict(dtype="video", shape=[48, 64, 3], names=["height", "width", "channel"])
    features["observation.map"] = dict(dtype="float32", shape=[4, 4], names=None)
    content = dict(codebase_version="v3.0", fps=10, total_frames=len(frames["index"]), features=features)
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps({**content, **(info or {})}))
    for i, rows in enumerate(parts):
        # Both ways in which lists occur.
        columns = {
            key: pa.array(list(values[rows]), type=pa.list_(pa.float32(), values.shape[1] if i % 2 == 0 else -1))
            if values.ndim == 2
            else pa.array(values[rows])
            for key, values in frames.items()
        }
        (folder / "data" / f"chunk-{i:03d}").mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / "data" / f"chunk-{i:03d}" / f"{name}-000.parquet", row_group_size=4)
    return folder


def test_lerobot(tmp_path: Path) -> None:
    lengths = (4, 3, 5)
    frames = lerobot_frames(lengths)
    # An episode can go on in the next file, and files need not be in order.
    parts = [np.arange(6, 12), np.arange(6)]
    folder = write_lerobot(tmp_path / "pusht", frames, parts)
    demonstrations = load_demonstrations(folder)
    assert demonstrations.traj_lengths.tolist() == list(lengths) and demonstrations.env_id is None
    np.testing.assert_array_equal(demonstrations.observations, frames["observation.state"])
    np.testing.assert_array_equal(demonstrations.actions, frames["action"])
    np.testing.assert_array_equal(demonstrations.rewards, frames["next.reward"])
    np.testing.assert_array_equal(demonstrations.terminals, frames["next.done"])
    keys = ["observation.environment_state", "observation.state", "observation.gripper"]
    demonstrations = load_demonstrations(str(folder), obs_keys=keys)
    np.testing.assert_array_equal(demonstrations.observations, np.column_stack([frames[key] for key in keys]))
    # An episode per file, as before version 3, without rewards.
    without = {name: values for name, values in frames.items() if not name.startswith("next")}
    folder = write_lerobot(tmp_path / "v2", without, [np.arange(7), np.arange(7, 12)], name="episode")
    demonstrations = load_demonstrations(folder)
    assert demonstrations.traj_lengths.tolist() == list(lengths)
    assert demonstrations.rewards is None and demonstrations.terminals is None


@pytest.mark.parametrize(
    "changes,info,kwargs,message",
    [
        ({}, {}, dict(obs_keys=["observation.images.top"]), r"top is of dtype video.*Only vectors.*'observation.state'\]"),
        ({}, {}, dict(obs_keys=["observation.map"]), r"map is of dtype float32 and shape \(4, 4\)"),
        ({}, {}, dict(obs_keys=["observation.none"]), "no feature 'observation.none'; there are.*choose obs_keys"),
        ({}, {}, dict(filter_key="train"), "filter_key='train' is for robomimic files"),
        ({}, dict(total_frames=13), {}, "data has 12 frames, but .*info.json 13"),
        ({}, dict(features=[]), {}, "info.json must be a JSON object with features"),
        ({}, dict(features=None), {}, "info.json must be a JSON object with features"),
        (
            dict(frame_index=np.array([0, 1, 2, 2, 0, 1, 2, 0, 1, 2, 3, 4])),
            {},
            {},
            "frame_index of episode 0 must count 0 … 3",
        ),
        (
            dict(frame_index=np.array([0, 1, 2, 3, 0, 1, 2, 1, 2, 3, 4, 5])),
            {},
            {},
            "frame_index of episode 2 must count 0 … 4",
        ),
        (dict(episode_index=None), {}, {}, r"parquet can't be read.*lacks \['episode_index'\]"),
        (dict(action=np.array(["a"] * 12)), {}, {}, "action must hold numbers"),
        (dict(action=None), {}, {}, "has no feature 'action'"),
        (dict(action=np.full((12, 2), np.nan)), {}, {}, "actions is NaN or infinite in transition 0"),
    ],
)
def test_malformed_lerobot(
    changes: dict[str, Any], info: dict[str, Any], kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    frames = {name: values for name, values in {**lerobot_frames((4, 3, 5)), **changes}.items() if values is not None}
    folder = write_lerobot(tmp_path / "pusht", frames, [np.arange(12)], info)
    with pytest.raises(ValueError, match=message):
        load_demonstrations(folder, **kwargs)


def test_lerobot_with_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = write_lerobot(tmp_path / "pusht", lerobot_frames((4, 3)), [np.arange(7)])
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    for values, message in (
        ([[0.0], [1.0, 2.0]] + [[0.0]] * 5, "action must hold numbers, equally many in every frame"),
        ([None] + [[0.0, 1.0]] * 6, "action must hold numbers, equally many"),
        ([[0.0, None]] + [[0.0, 1.0]] * 6, "action has missing values"),
    ):
        i = table.schema.get_field_index("action")
        pq.write_table(table.set_column(i, "action", pa.array(values, type=pa.list_(pa.float32()))), path)
        with pytest.raises(ValueError, match=f"file-000.parquet: {message}"):
            load_demonstrations(folder)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(ValueError, match="holds no frames"):
        load_demonstrations(folder)
    path.write_text("hello")
    with pytest.raises(ValueError, match="file-000.parquet can't be read"):
        load_demonstrations(folder)
    path.unlink()
    with pytest.raises(ValueError, match="the data was not downloaded"):
        load_demonstrations(folder)
    (folder / "meta" / "info.json").write_text("{")
    with pytest.raises(ValueError, match="info.json must be a JSON object"):
        load_demonstrations(folder)


def test_lerobot_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_lerobot(tmp_path / "pusht", lerobot_frames((4, 3)), [np.arange(7)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3-dppo\[lerobot\]'"):
        load_demonstrations(folder)


# ---------------------------------------------------------------------- trajectories


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


def test_trajectories() -> None:
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


@pytest.mark.parametrize(
    "trajectories,message",
    [
        ([], "source is an empty list"),
        (["a.npz"], r"source\[0\].obs must be an array of numbers, not NoneType: a list must hold trajectories"),
        ([trajectory(obs=dict(camera=1))], r"source\[0\].obs\['camera'\] must be an array of numbers, not int"),
        (
            [trajectory(), trajectory(obs=dict(a=np.zeros((4, 2))))],
            r"source\[1\] has the observations \['a'\], but",
        ),
        ([trajectory(), trajectory(obs=np.zeros((3, 2)))], r"source\[1\] has 3 obs and 3 acts.*one observation more"),
        ([trajectory(acts=np.zeros((0, 1)), obs=np.zeros((1, 2)))], "has 1 obs and 0 acts: there must be at least one"),
        ([trajectory(), trajectory(obs=np.zeros((4, 5)))], r"source\[1\] has other shapes than .*: obs \(5,\)"),
        ([trajectory(rews=np.zeros(2))], r"source\[0\].rews has the shape \(2,\), not \(3,\)"),
    ],
)
def test_malformed_trajectories(trajectories: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_demonstrations(trajectories)
