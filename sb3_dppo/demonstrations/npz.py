"""Demonstrations in .npz files: this package's, and the reference implementation's with their ranges."""

import json
import math
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sb3_dppo.demonstrations.rows import MAX_COMPRESSION, PIECE, Rows, TemporaryImages, is_image, rows_at_once
from sb3_dppo.demonstrations.selection import Selection, as_part, select
from sb3_dppo.runs.files import atomic_write

BUNDLED = Path(__file__).parent / "bundled"


def bundled_demonstrations() -> list[str]:
    """Names of the sets that come with the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.npz"))


def from_npz(path: Path, normalization: str | Path | None, selection: Selection | None) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Bundled demonstrations: {bundled_demonstrations()}.")
    arrays = read_npz(path, ("actions", "traj_lengths"))
    names = [name for name in arrays if name.startswith("obs/")] or [name for name in ("images", "states") if name in arrays]
    if not names:
        raise ValueError(f"{path} lacks observations, as states, images or obs/KEY; it holds {sorted(arrays)}.")
    for name in (*names, "actions"):
        values = arrays[name]
        wanted = "bytes (uint8), three dimensions each" if name == "images" else "numbers, one row per transition"
        if not (is_image(values) if name == "images" else values.dtype.kind in "fiub" and values.ndim > 0):
            raise ValueError(f"{path}: {name} must be {wanted}, not {values.dtype} of shape {values.shape}.")
        if not is_image(values):
            arrays[name] = as_part(values)
    try:
        meta = json.loads(str(arrays.get("meta", "{}")))
        env_id, units = meta.get("env_id"), meta.get("units")
        if not isinstance(env_id, (str, type(None))):
            raise ValueError(f"env_id={env_id!r}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path}: meta must be a JSON object, such as {{"env_id": "Hopper-v5"}}.') from error
    if units != "env":
        _unnormalize(path, arrays, normalization)
    elif normalization is not None:
        raise ValueError(
            f"normalization={str(normalization)!r} is for normalised .npz files, but {path} is in the env's units."
        )
    # A Dict, unless there is only one thing, which has a name of the format's own.
    single = selection is None and names in (["images"], ["states"])
    parts = {"" if single else name.removeprefix("obs/"): arrays[name] for name in names}
    known = {name: arrays.get(name) for name in ("actions", "traj_lengths", "rewards", "terminals", "truncations")}
    return dict(observations=select(parts, selection, path), env_id=env_id, **known)


def _unnormalize(path: Path, arrays: dict[str, np.ndarray], normalization: str | Path | None) -> None:
    """Bring the reference implementation's states and actions into the env's units, with the ranges given or beside it."""
    others = sorted(name for name in arrays if name.startswith("obs/"))
    if others:
        if normalization is not None:
            raise ValueError(f"normalization={str(normalization)!r} has ranges of states, but {path} holds {others}.")
        return
    keys = {name: key for name, key in (("obs", "states"), ("action", "actions")) if key in arrays}
    beside = path.parent / "normalization.npz"
    if normalization is None:
        inside = max(np.abs(arrays[key]).max(initial=0) for key in keys.values()) <= 1 + 1e-4
        if not inside or not beside.is_file() or path.name == beside.name:
            return
        normalization = beside
    ranges = read_ranges(Path(normalization))
    for name, key in keys.items():
        low, high, value = ranges[f"{name}_min"], ranges[f"{name}_max"], arrays[key]
        if value.ndim != 2 or value.shape[1] != len(low):
            raise ValueError(f"{normalization} has {len(low)} {name} ranges, but {path} the shape {value.shape}.")
        arrays[key] = ((value + 1) / 2 * (high - low + 1e-6) + low).astype(np.float32)


def read_ranges(path: Path) -> dict[str, np.ndarray]:
    """ "obs_min" and "obs_max", shape (Do,), "action_min" and "action_max", shape (Da,)."""
    arrays = read_npz(path, ("obs_min", "obs_max", "action_min", "action_max"))
    for low, high in (("obs_min", "obs_max"), ("action_min", "action_max")):
        if arrays[low].size != arrays[high].size or any(arrays[name].dtype.kind not in "fiu" for name in (low, high)):
            raise ValueError(f"{path}: {low} and {high} must be equally many numbers.")
    return {name: array.flatten() for name, array in arrays.items()}


def read_npz(path: Path, required: tuple[str, ...]) -> dict[str, np.ndarray]:
    """
    Arrays of an .npz file by name: images memory-mapped, where they are compressed from a temporary copy, and all others read.
    A ``ValueError`` says what is wrong with the file, or which of the required names it lacks.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename[: -len(".npy")]: info for info in archive.infolist() if info.filename.endswith(".npy")}
            if sum(info.file_size for info in archive.infolist()) > MAX_COMPRESSION * path.stat().st_size:
                raise ValueError("it holds more than its size allows")
            arrays = {name: _read_member(path, archive, info) for name, info in members.items()}
    except Exception as error:  # zipfile and numpy raise almost anything for what they did not write.
        raise ValueError(f"{path} can't be read as .npz ({error}).") from error
    missing = [key for key in required if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {missing}; it holds {sorted(arrays)}.")
    return arrays


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(member)
        if dtype == np.uint8 and len(shape) == 4 and min(shape) > 0 and not fortran_order:
            if member.tell() + math.prod(shape) != info.file_size:
                raise ValueError(f"{info.filename} has {info.file_size} bytes, which is not what its shape {shape} needs")
            if info.compress_type == zipfile.ZIP_STORED:
                return np.memmap(path, np.uint8, "r", _data_offset(path, info) + member.tell(), shape)
            images = TemporaryImages(shape[1:])
            size = dict(total=math.prod(shape), unit="B", unit_scale=True)
            with tqdm.wrapattr(member, "read", desc=f"unpacking {path.name}: {info.filename}", **size) as rest:
                shutil.copyfileobj(rest, images, PIECE)  # type: ignore[misc]
            return images.array(shape[0])
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the content of a zip file's member begins in the file."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    # The sizes of the name and of the extra field, which may differ from those in the directory (APPNOTE.TXT, 4.3.7).
    name_size, extra_size = np.frombuffer(header, dtype="<u2", count=2, offset=26)
    return info.header_offset + 30 + int(name_size) + int(extra_size)


def write_npz(
    path: Path, parts: Mapping[str, Rows], columns: Mapping[str, np.ndarray], traj_lengths: np.ndarray, env_id: str | None
) -> None:
    """
    Write a file that :func:`from_npz` reads, of fields of ``Demonstrations``. Images are not compressed, so that they can be
    memory-mapped. An older file of that name is replaced at the end, so that it may be what is read.
    """
    # "units" tells them from normalised files, whose values look alike.
    meta = dict(units="env") if env_id is None else dict(units="env", env_id=env_id)
    single = {"": "images" if "" in parts and is_image(parts[""]) else "states"}
    arrays: dict[str, Rows] = {single.get(key, f"obs/{key}"): rows for key, rows in parts.items()}
    arrays |= dict(columns, traj_lengths=traj_lengths, meta=np.array(json.dumps(meta)))
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, rows in arrays.items():
            info = zipfile.ZipInfo(name + ".npy")
            info.compress_type = zipfile.ZIP_STORED if is_image(rows) else zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=True) as member:
                if not is_image(rows):
                    np.lib.format.write_array(member, np.asarray(rows), allow_pickle=False)
                    continue
                header = dict(descr=np.lib.format.dtype_to_descr(rows.dtype), fortran_order=False, shape=rows.shape)
                np.lib.format.write_array_header_2_0(member, header)
                for start in range(0, len(rows), step := rows_at_once(rows)):
                    images = rows[np.arange(start, min(start + step, len(rows)))]
                    member.write(np.ascontiguousarray(images).data)
