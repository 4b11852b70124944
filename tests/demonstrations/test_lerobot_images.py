"""LeRobot's folders with cameras: images in Parquet files, and videos."""

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from sb3_dppo import BC, DPPO, load_demonstrations
from sb3_dppo.demonstrations.rows import is_image
from tests.demonstrations.files import as_png, lerobot_frames, write_lerobot

LENGTHS = (4, 3, 5)
N = sum(LENGTHS)
TOP, IMAGE = "observation.images.top", "observation.image"
RNG = np.random.default_rng(0)


def write_video(path: Path, images: np.ndarray, fps: int = 10) -> None:
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=dict(crf="0"))
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv444p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_videos(folder: Path, images: np.ndarray, version: int = 3) -> Path:
    """A folder with a video of its camera; from version 3 on, files hold several episodes: here 0 and 1, and 2."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_lerobot(folder, lerobot_frames(LENGTHS), [np.arange(N)])
    if version == 2:
        for number, part in enumerate(np.split(images, np.cumsum(LENGTHS)[:-1])):
            write_video(folder / "videos" / "chunk-000" / TOP / f"episode_{number:06d}.mp4", part)
        return folder
    for number, part in enumerate((images[:7], images[7:])):
        write_video(folder / "videos" / TOP / "chunk-000" / f"file-{number:03d}.mp4", part)
    places = dict(chunk_index=[0, 0, 0], file_index=[0, 0, 1], from_timestamp=[0.0, 0.4, 0.0])
    columns = {"episode_index": [0, 1, 2], **{f"videos/{TOP}/{name}": values for name, values in places.items()}}
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    return folder


def plain_images(n: int = N) -> np.ndarray:
    """One colour each, which survives the compression of videos, apart from rounding."""
    return np.broadcast_to(RNG.integers(0, 256, (n, 1, 1, 3)), (n, 48, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_parquet(tmp_path: Path, channels: int) -> None:
    images = RNG.integers(0, 256, (N, 12, 16, channels), dtype=np.uint8)
    # An episode goes on in the next file, and files are not in order.
    folder = write_lerobot(tmp_path / "pusht", lerobot_frames(LENGTHS), [np.arange(6, N), np.arange(6)], images=images)
    demonstrations = load_demonstrations(folder, obs_keys=dict(rgb=IMAGE, state=["observation.state"]))
    rows = demonstrations.parts["rgb"]
    assert is_image(rows) and rows.shape == images.shape
    np.testing.assert_array_equal(rows[np.arange(N)], images)
    np.testing.assert_array_equal(demonstrations.parts["state"], lerobot_frames(LENGTHS)["observation.state"])
    np.testing.assert_array_equal(load_demonstrations(folder, obs_keys=[IMAGE]).observations[3:5][np.arange(2)], images[3:5])
    # Also where the channels are said to come first.
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"][IMAGE]["shape"] = [channels, 12, 16]
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    assert load_demonstrations(folder, obs_keys=[IMAGE]).parts[""].shape == images.shape


@pytest.mark.parametrize("version", [2, 3])
def test_videos(tmp_path: Path, version: int) -> None:
    images = plain_images()
    folder = write_videos(tmp_path / "pusht", images, version)
    rows = load_demonstrations(folder, obs_keys=[TOP]).observations
    assert is_image(rows) and rows.shape == images.shape
    assert np.abs(np.asarray(rows).astype(int) - images).max() <= 3


class CameraEnv(gym.Env):
    def __init__(self) -> None:
        self.observation_space = spaces.Dict(
            rgb=spaces.Box(0, 255, (48, 64, 3), np.uint8), state=spaces.Box(-np.inf, np.inf, (3,))
        )
        self.action_space = spaces.Box(-1, 1, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, False, {}


def test_behaviour_cloning_from_a_camera(tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "pusht", plain_images())
    demonstrations = load_demonstrations(folder, obs_keys=dict(rgb=TOP, state="observation.state"))
    model = DPPO("DiffusionMultiInputPolicy", CameraEnv(), policy_kwargs=dict(net_arch=[16], horizon=2), seed=0)
    BC(model, demonstrations, batch_size=8).train(2, progress_bar=False)
    obs, _ = CameraEnv().reset(seed=0)
    assert model.predict(obs, deterministic=True)[0].shape == (2,)


def spoil_png(folder: Path, image: Any) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    values = table[IMAGE].to_pylist()
    values[5] = image
    index = table.schema.get_field_index(IMAGE)
    pq.write_table(table.set_column(index, IMAGE, pa.array(values, type=table[IMAGE].type)), path)


@pytest.mark.parametrize(
    "image,message",
    [
        (None, "holds no bytes"),
        (dict(bytes=None, path="frame_5.png"), "holds no bytes"),
        (dict(bytes=b"\x89PNG\r\n", path=None), "cannot identify"),
        (dict(bytes=as_png(np.zeros((24, 16, 3), np.uint8)), path=None), "24 × 16 pixels, not 12 × 16"),
        (dict(bytes=as_png(RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8))[:200], path=None), "truncated|file-000"),
        (
            dict(bytes=as_png(np.full((12, 16), 1000, np.uint16)), path=None),
            "more than 8 bits per channel .*as those of depth",
        ),
    ],
)
def test_damaged_images(tmp_path: Path, image: Any, message: str) -> None:
    images = RNG.integers(0, 256, (N, 12, 16, 3), dtype=np.uint8)
    folder = write_lerobot(tmp_path / "pusht", lerobot_frames(LENGTHS), [np.arange(N)], images=images)
    spoil_png(folder, image)
    with pytest.raises(ValueError, match=rf"file-000.parquet: observation.image can't be read as images.*({message})"):
        load_demonstrations(folder, obs_keys=[IMAGE])


def test_an_image_of_other_things(tmp_path: Path) -> None:
    frames = lerobot_frames(LENGTHS)
    features = {name: dict(dtype="float32", shape=[2]) for name in frames}
    features[IMAGE] = dict(dtype="image", shape=[12, 16, 3])  # type: ignore[dict-item]
    folder = write_lerobot(tmp_path / "pusht", {**frames, IMAGE: np.zeros(N)}, [np.arange(N)], dict(features=features))
    with pytest.raises(ValueError, match="holds no bytes of an image"):
        load_demonstrations(folder, obs_keys=[IMAGE])


def test_damaged_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message):
            load_demonstrations(folder, obs_keys=[TOP])

    folder = write_videos(tmp_path / "pusht", plain_images())
    path = folder / "videos" / TOP / "chunk-000" / "file-000.mp4"
    write_video(path, plain_images(6))
    load("file-000.mp4 lacks frame 6, one of 4 to 6 of an episode")
    write_video(path, np.zeros((7, 32, 64, 3), np.uint8))
    load("file-000.mp4 can't be read as a video.*32 × 64 pixels, not 48 × 64")
    path.write_bytes(path.read_bytes()[:500])
    load("file-000.mp4 can't be read as a video of observation.images.top")
    path.unlink()
    load("file-000.mp4 can't be read as a video")
    info = folder / "meta" / "info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "fps": 0}))
    load("fps=0 must be a positive number")
    monkeypatch.setitem(sys.modules, "av", None)
    info.write_text(json.dumps({**json.loads(info.read_text()), "fps": 10}))
    load(r"pip install 'sb3-dppo\[lerobot\]'", ImportError)


def test_episodes_whose_videos_are_missing(tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "old", plain_images(), version=2)
    (folder / "videos" / "chunk-000" / TOP / "episode_000001.mp4").unlink()
    with pytest.raises(ValueError, match="lacks chunk-000/observation.images.top/episode_000001.mp4: it was not downloaded"):
        load_demonstrations(folder, obs_keys=[TOP])
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = write_videos(tmp_path / "new", plain_images())
    path = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 2), path)
    with pytest.raises(ValueError, match="meta/episodes lacks episode 2"):
        load_demonstrations(folder, obs_keys=[TOP])
    pq.write_table(pa.table({"episode_index": [0, 1, 2]}), path)
    with pytest.raises(ValueError, match="lacks .*from_timestamp"):
        load_demonstrations(folder, obs_keys=[TOP])
