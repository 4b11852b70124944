"""Files of every format, and envs and models for them."""

import io
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image

from sb3_dppo import DPPO, Demonstrations
from sb3_dppo.features.extractors import VitExtractor

NETS = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=3, horizon=2)

VIT = dict(features_extractor_class=VitExtractor, features_extractor_kwargs=dict(width=16, spatial_dim=8, random_shift=4))

N = 12

RNG = np.random.default_rng(0)

IMAGES = RNG.integers(0, 256, (N, 16, 16, 3), dtype=np.uint8)

STATES = RNG.normal(size=(N, 2)).astype(np.float32)

ACTIONS = RNG.uniform(-0.9, 0.9, (N, 1)).astype(np.float32)

LENGTHS = np.array([5, 4, 3])

STATE = spaces.Box(-9, 9, (2,))

RGB = spaces.Box(0, 255, (16, 16, 3), np.uint8)


class PictureEnv(gym.Env):
    """
    Nothing to learn, but observations of a chosen space.

    :param space: Observation space.
    """

    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, space: spaces.Space) -> None:
        self.observation_space = space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        return self.observation_space.sample(), 0.0, self.t == 5, False, {}


def image_space(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def make_image_model(env: Any, policy: str = "DiffusionMultiInputPolicy", **policy_kwargs: Any) -> DPPO:
    arguments: dict[str, Any] = dict(n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu")
    return DPPO(policy, env, policy_kwargs=NETS | policy_kwargs, **arguments)


def dict_demonstrations(**changes: Any) -> Demonstrations:
    return Demonstrations(dict(rgb=IMAGES, state=STATES) | changes, ACTIONS, LENGTHS)


def assert_same(rows: Any, expected: np.ndarray) -> None:
    assert rows.shape == expected.shape and rows.dtype == expected.dtype and len(rows) == len(expected)
    index = np.array([7, 0, 7, 11, 3])
    np.testing.assert_array_equal(rows[index], expected[index])
    np.testing.assert_array_equal(np.asarray(rows[2:9])[1:], expected[3:9])


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


def as_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


def write_lerobot(
    folder: Path,
    frames: dict[str, np.ndarray],
    parts: list[np.ndarray],
    info: dict[str, Any] | None = None,
    name: str = "file",
    images: np.ndarray | None = None,
) -> Path:
    """A folder as LeRobot's are, each part of the frames in a file of its own, with images (N, H, W, C) as PNG."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {
        key: dict(dtype=str(values.dtype), shape=list(values.shape[1:]) or [1], names=None) for key, values in frames.items()
    }
    features["observation.images.top"] = dict(dtype="video", shape=[48, 64, 3], names=["height", "width", "channel"])
    features["observation.map"] = dict(dtype="float32", shape=[4, 4], names=None)
    if images is not None:
        features["observation.image"] = dict(dtype="image", shape=list(images.shape[1:]), names=None)
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
        if images is not None:
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            columns["observation.image"] = pa.array([dict(bytes=as_png(image), path=None) for image in images[rows]], kind)
        (folder / "data" / f"chunk-{i:03d}").mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / "data" / f"chunk-{i:03d}" / f"{name}-000.parquet", row_group_size=4)
    return folder
