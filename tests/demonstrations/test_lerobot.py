"""LeRobot's folders."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_dppo import load_demonstrations
from tests.demonstrations.files import lerobot_frames, write_lerobot


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
        ({}, {}, dict(obs_keys=["observation.images.top"]), "lacks chunk-000/observation.images.top/episode_000000.mp4"),
        (
            {},
            {},
            dict(obs_keys=["observation.map"]),
            r"map is of dtype float32 and shape \(4, 4\). Only vectors and images are read.*'observation.images.top'",
        ),
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
        ([[0.0, None]] + [[0.0, 1.0]] * 6, "action must hold numbers, .* none missing"),
    ):
        i = table.schema.get_field_index("action")
        pq.write_table(table.set_column(i, "action", pa.array(values, type=pa.list_(pa.float32()))), path)
        with pytest.raises(ValueError, match=f"file-000.parquet can't be read .*{message}"):
            load_demonstrations(folder)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(ValueError, match="holds no rows"):
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


def test_small_file_that_would_become_large(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    frames = lerobot_frames((3,))
    write_lerobot(tmp_path / "lerobot", frames, [np.arange(3)])
    same = pa.table({name: pa.array(np.zeros(2**22, np.int8)) for name in frames})
    pq.write_table(same, next((tmp_path / "lerobot").rglob("*.parquet")))
    with pytest.raises(ValueError, match="values are more than its size allows"):
        load_demonstrations(tmp_path / "lerobot")
