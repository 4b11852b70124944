"""
Readers of demonstrations' files: each returns the arguments of :class:`~sb3_dppo.demonstrations.Demonstrations` that it found.
"""

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BUNDLED = Path(__file__).parent / "demos"


def from_npz(path: Path, normalization: str | Path | None) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Bundled demonstrations: {bundled_demonstrations()}.")
    arrays = read_npz(path, ("states", "actions", "traj_lengths"))
    for name in ("states", "actions"):
        if arrays[name].dtype.kind not in "fiu":
            raise ValueError(f"{path}: {name} must be numbers, not {arrays[name].dtype}.")
    states, actions = (arrays[name].astype(np.float32) for name in ("states", "actions"))
    try:
        meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
        env_id, units = meta.get("env_id"), meta.get("units")
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{path}: meta must be a JSON object, such as {{"env_id": "Hopper-v5"}}.') from error
    if units == "env" and normalization is not None:
        raise ValueError(
            f"normalization={str(normalization)!r} is for normalised .npz files, but {path} is in the env's units."
        )
    beside = path.parent / "normalization.npz"
    if normalization is None and units != "env" and beside.is_file() and path.name != beside.name:
        if max(np.abs(values).max(initial=0) for values in (states, actions)) <= 1 + 1e-4:
            normalization = beside
    if normalization is not None:
        ranges = read_npz(Path(normalization), ("obs_min", "obs_max", "action_min", "action_max"))
        for name, values in (("obs", states), ("action", actions)):
            if ranges[f"{name}_min"].size != values[0].size or ranges[f"{name}_max"].size != values[0].size:
                raise ValueError(
                    f"{normalization} has {ranges[f'{name}_min'].size} {name} ranges, but {path} has {values[0].size}."
                )
        states = (states + 1) / 2 * (ranges["obs_max"] - ranges["obs_min"] + 1e-6) + ranges["obs_min"]
        actions = (actions + 1) / 2 * (ranges["action_max"] - ranges["action_min"] + 1e-6) + ranges["action_min"]
    return dict(
        observations=states.astype(np.float32),
        actions=actions.astype(np.float32),
        traj_lengths=np.asarray(arrays["traj_lengths"]),
        rewards=arrays.get("rewards"),
        terminals=arrays.get("terminals"),
        env_id=env_id,
        truncations=arrays.get("truncations"),
    )


def read_npz(path: Path, required: tuple[str, ...]) -> dict[str, np.ndarray]:
    """
    :param path: Path of an .npz file.
    :param required: Keys that it must have.
    :return: Its arrays, read once.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, TypeError) as error:
        raise ValueError(f"{path} can't be read as .npz ({error}).") from error
    missing = [key for key in required if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {missing}; it holds {sorted(arrays)}.")
    return arrays


def bundled_demonstrations() -> list[str]:
    """
    :return: Names of the sets that come with the package.
    """
    return sorted(path.stem for path in BUNDLED.glob("*.npz"))


def from_minari_id(dataset_id: str) -> dict[str, Any]:
    not_found = f"source={dataset_id!r} is neither a bundled set ({bundled_demonstrations()}), nor an .npz file, nor"
    try:
        import minari
    except ImportError as error:
        raise ValueError(f"{not_found} a Minari dataset, which need `pip install sb3-dppo[minari]`.") from error
    if dataset_id not in minari.list_local_datasets():
        raise ValueError(f"{not_found} a local Minari dataset: get it with `minari download {dataset_id}`.")
    return from_minari(minari.load_dataset(dataset_id))


def from_minari(dataset: Any) -> dict[str, Any]:
    if not hasattr(dataset, "iterate_episodes"):
        raise TypeError(
            f"source must be a name, a path, a list of trajectories or a Minari dataset, not {type(dataset).__name__}."
        )
    episodes = list(dataset.iterate_episodes())
    for name in ("observations", "actions"):
        if episodes and not isinstance(getattr(episodes[0], name), np.ndarray):
            raise ValueError(f"The Minari dataset's {name} are not arrays: use one of an env with Box spaces.")
    if not episodes:
        raise ValueError("The Minari dataset holds no episodes.")
    lengths = np.array([len(episode.actions) for episode in episodes])
    return dict(
        # An episode also holds the observation after its last action.
        observations=np.concatenate([episode.observations[: len(episode.actions)] for episode in episodes]).astype(np.float32),
        actions=np.concatenate([episode.actions.reshape(len(episode.actions), -1) for episode in episodes]).astype(np.float32),
        traj_lengths=lengths,
        rewards=np.concatenate([episode.rewards for episode in episodes]),
        terminals=np.concatenate([episode.terminations for episode in episodes]),
        env_id=dataset.env_spec.id if dataset.env_spec is not None else None,
        truncations=np.concatenate([episode.truncations for episode in episodes]),
    )


def from_trajectories(trajectories: Sequence[Any]) -> dict[str, Any]:
    if len(trajectories) == 0:
        raise ValueError("source is an empty list: pass at least one trajectory.")
    observations: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    for i, trajectory in enumerate(trajectories):
        for name in ("obs", "acts"):
            values = np.asarray(getattr(trajectory, name, None))
            if values.dtype.kind not in "fiub" or values.ndim == 0:
                raise ValueError(
                    f"source[{i}].{name} must be an array of numbers, not {type(getattr(trajectory, name, None)).__name__}: "
                    "a list must hold trajectories as `imitation` has them (obs, acts, rews, terminal), without Dict spaces."
                )
        obs, acts = np.asarray(trajectory.obs), np.asarray(trajectory.acts)
        if len(acts) == 0 or len(obs) != len(acts) + 1:
            raise ValueError(
                f"source[{i}] has {len(obs)} obs and {len(acts)} acts: there must be at least one action, and one observation "
                "more than actions, the one after the last."
            )
        rews = getattr(trajectory, "rews", None)
        if rews is not None and np.shape(rews) != (len(acts),):
            raise ValueError(f"source[{i}].rews has the shape {np.shape(rews)}, not ({len(acts)},), one per action.")
        if i > 0 and (obs.shape[1:] != observations[0].shape[1:] or acts[0].size != actions[0].shape[1]):
            raise ValueError(f"source[{i}] has other shapes, obs {obs.shape} and acts {acts.shape}, than source[0].")
        observations.append(obs[:-1])
        actions.append(acts.reshape(len(acts), -1))
    rewards, terminals = None, None
    # Known only if they are known of all of them.
    if all(getattr(trajectory, "rews", None) is not None for trajectory in trajectories):
        rewards = np.concatenate([np.asarray(trajectory.rews, dtype=np.float32) for trajectory in trajectories])
    if all(getattr(trajectory, "terminal", None) is not None for trajectory in trajectories):
        terminals = np.zeros(sum(len(acts) for acts in actions), dtype=bool)
        terminals[np.cumsum([len(acts) for acts in actions]) - 1] = [bool(trajectory.terminal) for trajectory in trajectories]
    return dict(
        observations=np.concatenate(observations).astype(np.float32),
        actions=np.concatenate(actions).astype(np.float32),
        traj_lengths=np.array([len(acts) for acts in actions]),
        rewards=rewards,
        terminals=terminals,
    )


# ---------------------------------------------------------------------- robomimic


def from_robomimic(path: Path, obs_keys: Sequence[str] | None, filter_key: str | None) -> dict[str, Any]:
    import h5py

    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    try:
        with h5py.File(path, "r") as file:
            names = _robomimic_episodes(path, file, filter_key)
            first = file["data"][names[0]]
            keys = list(obs_keys) if obs_keys is not None else _robomimic_vectors(path, first)
            columns: dict[str, list[np.ndarray]] = {}
            for name in names:
                _read_robomimic_episode(path, file["data"][name], keys, "rewards" in first, "dones" in first, columns)
    except OSError as error:
        raise ValueError(f"{path} can't be read as HDF5 ({error}).") from error
    # The file's env_args name robosuite's task, or D4RL's, not an id of the env that a model is in: no env_id.
    return dict(
        observations=np.concatenate(columns["obs"]),
        actions=np.concatenate(columns["actions"]),
        traj_lengths=np.array([len(actions) for actions in columns["actions"]]),
        rewards=np.concatenate(columns["rewards"])[:, 0] if "rewards" in columns else None,
        terminals=np.concatenate(columns["dones"])[:, 0] > 0 if "dones" in columns else None,
    )


def _robomimic_episodes(path: Path, file: Any, filter_key: str | None) -> list[str]:
    """
    :param path: Path of the file, for errors.
    :param file: The open file.
    :param filter_key: Name of a subset, or ``None`` for all episodes.
    :return: Names of the episodes, in the order of their numbers: demo_10 comes after demo_9.
    """
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


def _robomimic_vectors(path: Path, episode: Any) -> list[str]:
    """
    :param path: Path of the file, for errors.
    :param episode: Group of an episode.
    :return: Names of its observations that are not images, sorted.
    """
    observations = episode.get("obs")
    if not hasattr(observations, "keys"):
        raise ValueError(
            f"{path} lacks the group {episode.name[1:]}/obs; extract observations with robomimic's dataset_states_to_obs.py."
        )
    # Groups in it, if any, have no number of dimensions.
    keys = sorted(key for key in observations if getattr(observations[key], "ndim", 3) <= 2)
    if not keys:
        raise ValueError(
            f"{path}: {episode.name[1:]}/obs holds no vectors, only {sorted(observations)}: images are not read yet."
        )
    return keys


def _read_robomimic_episode(
    path: Path, episode: Any, keys: list[str], rewards: bool, dones: bool, columns: dict[str, list[np.ndarray]]
) -> None:
    """
    Append an episode.

    :param path: Path of the file, for errors.
    :param episode: The episode's group.
    :param keys: Names of the observations.
    :param rewards: Whether to read rewards, which must then be there.
    :param dones: The same for dones.
    :param columns: What was read so far, to append to.
    """

    def read(name: str, rows: int | None = None) -> np.ndarray:
        dataset, full_name = episode.get(name), f"{episode.name[1:]}/{name}"
        if not hasattr(dataset, "dtype"):
            group = episode.get("obs") if name.startswith("obs/") else episode
            raise ValueError(f"{path} lacks the dataset {full_name}; there are {sorted(group) if group is not None else []}.")
        if dataset.ndim > 2:
            raise ValueError(
                f"{path}: {full_name} has the shape {dataset.shape}, as images have, which are not read yet: name vectors "
                "only, or leave obs_keys out."
            )
        if dataset.dtype.kind not in "fiub" or dataset.ndim == 0:
            raise ValueError(f"{path}: {full_name} must be numbers, one row per transition, not {dataset.dtype}.")
        if len(dataset) == 0 or (rows is not None and len(dataset) != rows):
            raise ValueError(f"{path}: {full_name} has {len(dataset)} rows, not {rows or 'at least one'}, one per action.")
        return dataset[()].astype(np.float32).reshape(len(dataset), -1)

    actions = read("actions")
    new = {"actions": actions}
    new["obs"] = np.concatenate([read(f"obs/{key}", len(actions)) for key in keys], axis=1)
    for name in [name for name, wanted in (("rewards", rewards), ("dones", dones)) if wanted]:
        new[name] = read(name, len(actions))
        if new[name].shape[1] != 1:
            raise ValueError(f"{path}: {episode.name[1:]}/{name} has {new[name].shape[1]} columns, not one.")
    for name, values in new.items():
        before = columns.setdefault(name, [])
        if before and values.shape[1] != before[0].shape[1]:
            raise ValueError(
                f"{path}: {episode.name[1:]}/{name} has {values.shape[1]} columns, but {before[0].shape[1]} in other episodes."
            )
        before.append(values)


# ---------------------------------------------------------------------- LeRobot


def from_lerobot(folder: Path, obs_keys: Sequence[str] | None) -> dict[str, Any]:
    info_path = folder / "meta" / "info.json"
    try:
        info = json.loads(info_path.read_text())
        shapes = {name: (str(feature["dtype"]), tuple(feature["shape"])) for name, feature in info["features"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{info_path} must be a JSON object with features, each with dtype and shape ({error!r}).") from error
    keys = list(obs_keys) if obs_keys is not None else ["observation.state"]
    vectors = sorted(name for name, (dtype, shape) in shapes.items() if dtype not in ("image", "video") and len(shape) == 1)
    for name in (*keys, "action"):
        if name not in shapes:
            raise ValueError(f"{info_path} has no feature {name!r}; there are {sorted(shapes)}: choose obs_keys.")
        if name not in vectors:
            raise ValueError(
                f"{info_path}: {name} is of dtype {shapes[name][0]} and shape {shapes[name][1]}. Only vectors are read yet: "
                f"obs_keys can be {[vector for vector in vectors if vector.startswith('observation')]}."
            )
    optional = [name for name in ("next.reward", "next.done") if name in vectors]
    table = _read_parquet(folder, list(dict.fromkeys(["episode_index", "frame_index", "action", *keys, *optional])))

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
    # Nothing in the folder names an env.
    return dict(
        observations=np.concatenate([table[key] for key in keys], axis=1)[order].astype(np.float32),
        actions=table["action"][order].astype(np.float32),
        traj_lengths=lengths,
        rewards=table["next.reward"][order, 0] if "next.reward" in table else None,
        terminals=table["next.done"][order, 0].astype(bool) if "next.done" in table else None,
    )


def _read_parquet(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """
    :param folder: A LeRobot folder.
    :param names: Columns of its data.
    :return: Each column, of all files, shape (frames, size).
    """
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{folder} is a LeRobot folder, which needs pyarrow: pip install 'sb3-dppo[lerobot]'.") from error
    paths = sorted((folder / "data").glob("*/*.parquet"))
    if not paths:
        raise ValueError(f"{folder}/data holds no chunk-000/file-000.parquet: the data was not downloaded.")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                missing = [name for name in names if name not in file.schema_arrow.names]
                if missing:
                    raise ValueError(f"it lacks {missing}; its columns are {file.schema_arrow.names}")
                # Columns whose names begin with these and a dot come along.
                table = file.read(columns=names)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"{path} can't be read as LeRobot's data ({error}).") from error
        for name in names:
            column = table.column(name)
            is_list = hasattr(column.type, "value_type")
            value_type = column.type.value_type if is_list else column.type
            sizes = pc.min_max(pc.list_value_length(column)).as_py() if is_list else dict(min=1, max=1)
            numeric = pa.types.is_floating(value_type) or pa.types.is_integer(value_type) or pa.types.is_boolean(value_type)
            if not numeric or sizes["min"] != sizes["max"] or column.null_count > 0:
                raise ValueError(f"{path}: {name} must hold numbers, equally many in every frame, not {column.type}.")
            parts = [chunk.flatten() if is_list else chunk for chunk in column.chunks]
            if any(part.null_count > 0 for part in parts):
                raise ValueError(f"{path}: {name} has missing values: remove their episodes.")
            if len(column) == 0:
                continue
            values = np.concatenate([part.to_numpy(zero_copy_only=False) for part in parts]).reshape(len(column), -1)
            if columns[name] and values.shape[1] != columns[name][0].shape[1]:
                raise ValueError(
                    f"{path}: {name} has {values.shape[1]} columns, but {columns[name][0].shape[1]} in other files."
                )
            columns[name].append(values)
    if not columns["action"]:
        raise ValueError(f"{folder}/data holds no frames.")
    return {name: np.concatenate(values) for name, values in columns.items()}
