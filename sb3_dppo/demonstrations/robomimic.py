"""robomimic's HDF5 files."""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from sb3_dppo.demonstrations.episodes import Episodes
from sb3_dppo.demonstrations.rows import MAX_COMPRESSION, is_image
from sb3_dppo.demonstrations.selection import Selection


def from_robomimic(path: Path, selection: Selection | None, filter_key: str | None) -> dict[str, Any]:
    import h5py

    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    try:
        with ExitStack() as stack:
            file = stack.enter_context(h5py.File(path, "r"))
            groups = [file["data"][name] for name in _episode_names(path, file, filter_key)]
            selection = selection or {"": _vectors(path, groups[0])}
            names = ["actions", *(f"obs/{name}" for chosen in selection.values() for name in chosen)]
            names += [name for name in ("rewards", "dones") if name in groups[0]]
            episodes = Episodes()
            for group in groups:
                episodes.append({name: _dataset(path, group, name) for name in names}, f"{path}: {group.name[1:]}/")
                # float32 can be four times what was stored. One dataset may be linked to from many places.
                if episodes.n_bytes > 4 * MAX_COMPRESSION * path.stat().st_size:
                    raise ValueError(f"{path} holds more, up to {group.name[1:]}, than its size allows.")
            if any(is_image(groups[0][name]) for name in names):
                stack.pop_all()  # The file stays open as long as its images are used.
    except ValueError:
        raise
    except Exception as error:  # h5py raises almost anything for a damaged file.
        raise ValueError(f"{path} can't be read as HDF5 ({error}).") from error
    dones = episodes.column("dones")
    # The file's env_args name robosuite's task, or D4RL's, not an id of the env that a model is in: no env_id.
    return dict(
        observations=episodes.observations(selection, path),
        actions=episodes.column("actions"),
        traj_lengths=np.array(episodes.lengths),
        rewards=episodes.column("rewards", np.float32),
        terminals=None if dones is None else dones > 0,
    )


def _episode_names(path: Path, file: Any, filter_key: str | None) -> list[str]:
    """The episodes, or those of a subset, in the order of their numbers: demo_10 comes after demo_9."""
    if not hasattr(file.get("data"), "keys"):
        raise ValueError(f"{path} lacks the group data, as robomimic's files have it; it holds {sorted(file)}.")
    names = list(file["data"])
    if filter_key is not None:
        masks = sorted(file["mask"]) if "mask" in file else []
        if filter_key not in masks:
            raise ValueError(f"filter_key={filter_key!r} is not in {path}, whose mask holds {masks}.")
        chosen = [name.decode() if isinstance(name, bytes) else str(name) for name in file["mask"][filter_key][()]]
        missing = sorted(set(chosen) - set(names))
        if missing:
            raise ValueError(f"{path}: mask/{filter_key} names {missing}, which data does not hold.")
        names = chosen
    other = [name for name in names if re.fullmatch(r"demo_\d+", name) is None]
    if other:
        raise ValueError(f"{path}: data holds {other}, but episodes must be called demo_0, demo_1, ….")
    if not names:
        raise ValueError(f"{path}: {'data' if filter_key is None else f'mask/{filter_key}'} holds no episodes.")
    return sorted(names, key=lambda name: int(name[len("demo_") :]))


def _vectors(path: Path, group: Any) -> list[str]:
    """Names of an episode's observations that are not images, sorted."""
    observations = group.get("obs")
    if not hasattr(observations, "keys"):
        raise ValueError(
            f"{path} lacks the group {group.name[1:]}/obs; extract observations with robomimic's dataset_states_to_obs.py."
        )
    # Groups in it, if any, have no number of dimensions.
    keys = sorted(key for key in observations if getattr(observations[key], "ndim", 3) <= 2)
    if not keys:
        raise ValueError(
            f"{path}: {group.name[1:]}/obs holds no vectors, only {sorted(observations)}: name images with obs_keys."
        )
    return keys


def _dataset(path: Path, group: Any, name: str) -> Any:
    """An episode's vectors or images, if their values are this file's own, and no more than could be stored in it."""
    dataset, full_name = group.get(name), f"{group.name[1:]}/{name}"
    if not hasattr(dataset, "dtype"):
        there = group.get("obs") if name.startswith("obs/") else group
        raise ValueError(f"{path} lacks the dataset {full_name}; there are {sorted(there) if there is not None else []}.")
    if dataset.file.filename != str(path) or dataset.external or dataset.is_virtual:
        raise ValueError(f"{path}: {full_name} refers to another file: copy it into this one.")
    if dataset.nbytes > MAX_COMPRESSION * path.stat().st_size:
        raise ValueError(f"{path}: {full_name} has the shape {dataset.shape}, more than the file can hold.")
    if dataset.ndim > 2 and not (name.startswith("obs/") and is_image(dataset)):
        raise ValueError(
            f"{path}: {full_name} has the shape {dataset.shape} and the dtype {dataset.dtype}: only vectors and images "
            "(uint8, three dimensions each) can be read."
        )
    return dataset
