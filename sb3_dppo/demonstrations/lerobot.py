"""LeRobot's folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sb3_dppo.demonstrations.lerobot_images import CHANNELS, images_of_parquet, images_of_videos
from sb3_dppo.demonstrations.rows import MAX_COMPRESSION, Rows
from sb3_dppo.demonstrations.selection import Selection, select


def from_lerobot(folder: Path, selection: Selection | None) -> dict[str, Any]:
    info_path = folder / "meta" / "info.json"
    try:
        info = json.loads(info_path.read_text())
        shapes = {name: (str(feature["dtype"]), tuple(feature["shape"])) for name, feature in info["features"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{info_path} must be a JSON object with features, each with dtype and shape ({error!r}).") from error
    selection = selection or {"": ["observation.state"]}
    keys = [name for names in selection.values() for name in names]
    vectors = [name for name, (dtype, shape) in shapes.items() if dtype not in ("image", "video") and len(shape) == 1]
    images = [name for name, (dtype, shape) in shapes.items() if dtype in ("image", "video") and _image_shape(shape)]
    readable = sorted(name for name in (*vectors, *images) if name.startswith("observation"))
    for name in (*keys, "action"):
        if name not in shapes:
            raise ValueError(f"{info_path} has no feature {name!r}; there are {sorted(shapes)}: choose obs_keys.")
        if name not in vectors and not (name in images and name in keys):
            raise ValueError(
                f"{info_path}: {name} is of dtype {shapes[name][0]} and shape {shapes[name][1]}. Only vectors and images are "
                f"read: obs_keys can be {readable}."
            )
    optional = [name for name in ("next.reward", "next.done") if name in vectors]
    seen = [name for name in keys if name in vectors]
    table = _read_folder(folder / "data", list(dict.fromkeys(["action", "episode_index", "frame_index", *seen, *optional])))

    episode, frame = table["episode_index"][:, 0], table["frame_index"][:, 0]
    total = info.get("total_frames")
    if total is not None and total != len(episode):
        raise ValueError(f"{folder}/data has {len(episode)} frames, but {info_path} {total}: files are missing or too many.")
    order = np.lexsort((frame, episode))
    numbers, lengths = np.unique(episode, return_counts=True)
    counted = np.arange(len(frame)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    wrong = np.flatnonzero(frame[order] != counted)
    if len(wrong) > 0:
        number = episode[order][wrong[0]]
        raise ValueError(
            f"{folder}/data: frame_index of episode {number} must count 0 … {lengths[numbers == number][0] - 1}, but frames "
            "are missing or there twice."
        )
    parts: dict[str, Rows] = {key: table[key][order] for key in seen}
    for key in set(keys) - set(seen):
        dtype, shape = shapes[key][0], _image_shape(shapes[key][1])
        if dtype == "image":
            parts[key] = images_of_parquet(_files(folder / "data"), key, shape, order)
        else:
            parts[key] = images_of_videos(_places(folder, key, info, numbers), key, shape, lengths)
    # Nothing in the folder names an env.
    return dict(
        observations=select(parts, selection, folder),
        actions=table["action"][order].astype(np.float32),
        traj_lengths=lengths,
        rewards=table["next.reward"][order, 0] if "next.reward" in table else None,
        terminals=table["next.done"][order, 0].astype(bool) if "next.done" in table else None,
    )


def _image_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(H, W, C) of an image, whose channels may come first; empty if it is none."""
    if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
        return ()
    shape = shape if shape[2] in CHANNELS else (*shape[1:], shape[0])
    return shape if shape[2] in CHANNELS else ()


def _places(folder: Path, key: str, info: dict[str, Any], numbers: np.ndarray) -> list[tuple[Path, float, float]]:
    """For each of these episodes the file of its video, the time at which it begins there, and frames per second."""
    fps = info.get("fps")
    if not isinstance(fps, (int, float)) or not fps > 0:
        raise ValueError(f"{folder / 'meta' / 'info.json'}: fps={fps!r} must be a positive number.")
    if not (folder / "meta" / "episodes").is_dir():  # before version 3
        videos = {path.stem: path for path in sorted(folder.glob(f"videos/*/{key}/episode_*.mp4"))}
        names = [f"episode_{number:06d}" for number in numbers]
        missing = [name for name in names if name not in videos]
        if missing:
            raise ValueError(f"{folder}/videos lacks chunk-000/{key}/{missing[0]}.mp4: it was not downloaded.")
        return [(videos[name], 0.0, fps) for name in names]
    columns = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    table = _read_folder(folder / "meta" / "episodes", ["episode_index", *columns])
    row_of = {int(number): row for row, number in enumerate(table["episode_index"][:, 0])}
    unknown = [number for number in numbers.tolist() if number not in row_of]
    if unknown:
        raise ValueError(f"{folder}/meta/episodes lacks episode {unknown[0]}.")
    rows = [row_of[number] for number in numbers.tolist()]
    chunks, files, starts = (table[name][rows, 0] for name in columns)
    paths = [
        folder / "videos" / key / f"chunk-{int(c):03d}" / f"file-{int(f):03d}.mp4" for c, f in zip(chunks, files, strict=True)
    ]
    return [(path, float(start), fps) for path, start in zip(paths, starts, strict=True)]


def _files(folder: Path) -> list[Path]:
    """LeRobot's files of a folder, in order."""
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise ValueError(f"{folder} holds no chunk-000/file-000.parquet: the data was not downloaded.")
    return paths


def _read_folder(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Columns of all files of a folder by name, shape (rows, size)."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError(f"{folder} is a LeRobot folder, which needs pyarrow: pip install 'sb3-dppo[lerobot]'.") from error
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for path in _files(folder):
        try:
            values = _read_file(path, names)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"{path} can't be read as LeRobot's data ({error}).") from error
        for name, column in values.items():
            if columns[name] and column.shape[1] != columns[name][0].shape[1]:
                raise ValueError(
                    f"{path}: {name} has {column.shape[1]} columns, but {columns[name][0].shape[1]} in other files."
                )
            columns[name].append(column)
    if not columns[names[0]]:
        raise ValueError(f"{folder} holds no rows.")
    return {name: np.concatenate(values) for name, values in columns.items()}


def _read_file(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Columns of a Parquet file by name, shape (frames, size); none if there are no frames."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    limit = MAX_COMPRESSION * path.stat().st_size
    with pq.ParquetFile(path) as file:
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"it lacks {missing}; its columns are {file.schema_arrow.names}")
        # Columns of lists may hold more, which the sum below finds.
        if 8 * file.metadata.num_rows * file.metadata.num_columns > limit:
            raise ValueError(f"its {file.metadata.num_rows} rows of values are more than its size allows")
        batches, n_bytes = [], 0
        # Columns whose names begin with these and a dot come along.
        for batch in file.iter_batches(columns=names):
            batches.append(batch)
            n_bytes += batch.nbytes
            if n_bytes > limit:
                raise ValueError("its values are more than its size allows")
    return {name: _numbers(name, pa.chunked_array([batch.column(name) for batch in batches])) for name in names if batches}


def _numbers(name: str, column: Any) -> np.ndarray:
    """Values of a column of PyArrow, which holds numbers or lists of them, shape (frames, size)."""
    import pyarrow.compute as pc

    is_list = hasattr(column.type, "value_type")
    sizes = pc.min_max(pc.list_value_length(column)).as_py() if is_list else dict(min=1, max=1)
    flat = [chunk.flatten() if is_list else chunk for chunk in column.chunks]
    missing = column.null_count + sum(part.null_count for part in flat) > 0
    values = np.concatenate([part.to_numpy(zero_copy_only=False) for part in flat])
    if missing or values.dtype.kind not in "fiub" or not 0 < sizes["min"] == sizes["max"]:
        raise ValueError(f"{name} must hold numbers, equally many in every frame and none missing, not {column.type}")
    return values.reshape(len(column), -1)
