"""
Readers of demonstrations' files: each returns the arguments of :class:`~sb3_dppo.demonstrations.Demonstrations` that it found.
Vectors are read, images stay on disk.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from tqdm import tqdm

from sb3_dppo.demonstrations.rows import MAX_COMPRESSION, EpisodeRows, Rows, TemporaryRows, is_image, read_npz
from sb3_dppo.features.observations import part_name

BUNDLED = Path(__file__).parent / "bundled"

# What the user calls obs_keys, in full: the names in the file whose values make up each key of an observation, which is a
# single array under the empty key.
Selection = dict[str, list[str]]


def selection_of(obs_keys: Sequence[str] | Mapping[str, str | Sequence[str]]) -> Selection:
    """
    :param obs_keys: See :func:`~sb3_dppo.demonstrations.load_demonstrations`.
    :return: The same in full.
    :raises ValueError: if it is neither a list nor a dictionary of names.
    """
    chosen = dict(obs_keys) if isinstance(obs_keys, Mapping) else {"": obs_keys}
    full = {key: [names] if key and isinstance(names, str) else names for key, names in chosen.items()}
    if not full or any(isinstance(names, str) or len(names) == 0 for names in full.values()):
        raise ValueError(
            f"obs_keys={obs_keys!r} must be a list with at least one name, or a dictionary of them, such as "
            "dict(rgb='agentview_image', state=['object', 'robot0_eef_pos'])."
        )
    return {key: list(names) for key, names in full.items()}


def _select(parts: Mapping[str, Any], selection: Selection | None, where: Any) -> dict[str, Any]:
    """
    :param parts: Observations by name, shape (T, ...), under the empty name if they are a single array.
    :param selection: What to take of them, ``None`` for all as they are.
    :param where: What they were read from, for errors.
    :return: Observations by key, under the empty key if they are a single array.
    """
    parts = {name: _as_part(values) for name, values in parts.items()}
    if selection is None:
        return parts
    if "" in parts:
        raise ValueError(f"obs_keys={selection} can't choose from {where}, whose observations are not a Dict: leave it out.")
    chosen = {}
    for key, names in selection.items():
        missing = [name for name in names if name not in parts]
        if missing:
            raise ValueError(f"obs_keys names {missing}, but {where} has the observations {sorted(parts)}.")
        other = [name for name in names if parts[name].ndim != 2]
        if other and len(names) > 1:
            raise ValueError(
                f"obs_keys lays {names} side by side, but {other[0]!r} has the shape {parts[other[0]].shape[1:]}, and only "
                f"vectors can be: give it a key of its own, as in obs_keys=dict(image={other[0]!r}, …)."
            )
        chosen[key] = parts[names[0]] if len(names) == 1 else np.concatenate([parts[name] for name in names], axis=1)
    return chosen


def _as_part(values: Any) -> Any:
    """
    :param values: Observations under one name, shape (T,) or (T, ...).
    :return: Images as they are, anything else as float32 with at least one column.
    """
    if is_image(values) or (values.dtype == np.float32 and values.ndim > 1):
        return values
    return values.astype(np.float32).reshape(len(values), *(values.shape[1:] or (1,)))


def _whole(parts: dict[str, Any]) -> Any:
    """
    :param parts: Observations by key, under the empty key if they are a single array.
    :return: The same as ``Demonstrations`` takes them: the array, or a dictionary.
    """
    return parts[""] if "" in parts else parts


class Recorder:
    """
    Observations of one episode after the other: vectors are kept in memory, images in a temporary file.
    """

    def __init__(self) -> None:
        self._vectors: dict[str, list[np.ndarray]] = {}
        self._images: dict[str, TemporaryRows] = {}

    def append(self, parts: Mapping[str, np.ndarray]) -> None:
        """
        :param parts: Observations of an episode by key, shape (T, ...), under the empty key if they are a single array.
        """
        for key, values in parts.items():
            if is_image(values):
                self._images.setdefault(key, TemporaryRows()).append(values)
            else:
                self._vectors.setdefault(key, []).append(_as_part(values))

    def observations(self) -> Any:
        """
        :return: Those of all episodes, as ``Demonstrations`` takes them: an array of shape (N, ...), or a dictionary of these.
        """
        vectors = {key: np.concatenate(values) for key, values in self._vectors.items()}
        return _whole(vectors | {key: rows.array() for key, rows in self._images.items()})


def from_npz(path: Path, normalization: str | Path | None, selection: Selection | None) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Bundled demonstrations: {bundled_demonstrations()}.")
    arrays = read_npz(path, ("actions", "traj_lengths"))
    names = [name for name in arrays if name.startswith("obs/")] or [name for name in ("images", "states") if name in arrays]
    if not names:
        raise ValueError(f"{path} lacks observations, as states, images or obs/KEY; it holds {sorted(arrays)}.")
    for name in (*names, "actions"):
        if arrays[name].dtype.kind not in "fiu":
            raise ValueError(f"{path}: {name} must be numbers, not {arrays[name].dtype}.")
        if name == "images" and not is_image(arrays[name]):
            raise ValueError(
                f"{path}: images must be bytes (uint8), three dimensions each, not {arrays[name].dtype} of shape "
                f"{arrays[name].shape}."
            )
        if arrays[name].ndim < 2:
            raise ValueError(f"{path}: {name} must have the shape (transitions, size), not {arrays[name].shape}.")
        if not is_image(arrays[name]):
            arrays[name] = arrays[name].astype(np.float32)
    try:
        meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
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
    return dict(
        observations=_whole(_select(parts, selection, path)),
        actions=arrays["actions"],
        traj_lengths=arrays["traj_lengths"],
        rewards=arrays.get("rewards"),
        terminals=arrays.get("terminals"),
        env_id=env_id,
        truncations=arrays.get("truncations"),
    )


def _unnormalize(path: Path, arrays: dict[str, np.ndarray], normalization: str | Path | None) -> None:
    """
    Bring the reference implementation's states and actions into the env's units.

    :param path: Path of the file, for errors and to look beside it.
    :param arrays: The file's arrays, of which states and actions are replaced.
    :param normalization: Path of the ranges, ``None`` for those beside the file, if there are any and if all values are in
        [-1, 1].
    """
    values = {name: arrays[key] for name, key in (("obs", "states"), ("action", "actions")) if key in arrays}
    beside = path.parent / "normalization.npz"
    if normalization is None:
        inside = max(np.abs(value).max(initial=0) for value in values.values()) <= 1 + 1e-4
        if not inside or not beside.is_file() or path.name == beside.name:
            return
        normalization = beside
    ranges = read_ranges(Path(normalization))
    for name, value in values.items():
        low, high = ranges[f"{name}_min"], ranges[f"{name}_max"]
        if value.ndim != 2 or value.shape[1] != len(low):
            raise ValueError(f"{normalization} has {len(low)} {name} ranges, but {path} the shape {value.shape}.")
        raw = (value + 1) / 2 * (high - low + 1e-6) + low
        arrays["states" if name == "obs" else "actions"] = raw.astype(np.float32)


def read_ranges(path: Path) -> dict[str, np.ndarray]:
    """
    :param path: Path of the reference implementation's file of ranges.
    :return: "obs_min" and "obs_max", shape (Do,), "action_min" and "action_max", shape (Da,).
    :raises ValueError: if it is no such file.
    """
    arrays = read_npz(path, ("obs_min", "obs_max", "action_min", "action_max"))
    for low, high in (("obs_min", "obs_max"), ("action_min", "action_max")):
        if arrays[low].size != arrays[high].size or any(arrays[name].dtype.kind not in "fiu" for name in (low, high)):
            raise ValueError(f"{path}: {low} and {high} must be equally many numbers.")
    return {name: array.flatten() for name, array in arrays.items()}


def bundled_demonstrations() -> list[str]:
    """
    :return: Names of the sets that come with the package.
    """
    return sorted(path.stem for path in BUNDLED.glob("*.npz"))


def from_minari_id(dataset_id: str, selection: Selection | None) -> dict[str, Any]:
    name = dataset_id.removeprefix("minari:")
    not_found = f"source={dataset_id!r} is not "
    if name == dataset_id:
        not_found = f"source={dataset_id!r} is neither a bundled set ({bundled_demonstrations()}), nor an .npz file, nor "
    try:
        import minari
    except ImportError as error:
        raise ValueError(f"{not_found}a Minari dataset, which need `pip install sb3-dppo[minari]`.") from error
    if name not in minari.list_local_datasets():
        raise ValueError(f"{not_found}a local Minari dataset: get it with `minari download {name}`.")
    return from_minari(minari.load_dataset(name), selection)


def from_minari(dataset: Any, selection: Selection | None) -> dict[str, Any]:
    if not hasattr(dataset, "iterate_episodes"):
        raise TypeError(
            f"source must be a name, a path, a list of trajectories or a Minari dataset, not {type(dataset).__name__}."
        )
    observations = Recorder()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("actions", "rewards", "terminations", "truncations")}
    # One at a time: episodes are decoded as a whole.
    for episode in tqdm(dataset.iterate_episodes(), desc="read", unit="episode", total=len(dataset), delay=1):
        # An episode also holds the observation after its last action.
        parts = {name: values[: len(episode.actions)] for name, values in _minari_parts(episode).items()}
        observations.append(_select(parts, selection, "the Minari dataset"))
        for name, values in columns.items():
            values.append(getattr(episode, name))
    if not columns["actions"]:
        raise ValueError("The Minari dataset holds no episodes.")
    return dict(
        observations=observations.observations(),
        actions=np.concatenate([actions.reshape(len(actions), -1) for actions in columns["actions"]]).astype(np.float32),
        traj_lengths=np.array([len(actions) for actions in columns["actions"]]),
        rewards=np.concatenate(columns["rewards"]),
        terminals=np.concatenate(columns["terminations"]),
        env_id=dataset.env_spec.id if dataset.env_spec is not None else None,
        truncations=np.concatenate(columns["truncations"]),
    )


def _minari_parts(episode: Any) -> dict[str, np.ndarray]:
    """
    :param episode: Minari's ``EpisodeData``.
    :return: Its observations by key, under the empty key if they are a single array.
    """
    observations = episode.observations
    parts = observations if isinstance(observations, dict) else {"": observations}
    for what, values in (*((part_name(key), values) for key, values in parts.items()), ("actions", episode.actions)):
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
            raise ValueError(
                f"The Minari dataset's {what} are not arrays of numbers: use one of an env whose actions are a Box, and whose "
                "observations are one, or a Dict of them."
            )
    return parts


def write_minari(
    dataset_id: str, episodes: Iterable[dict[str, Any]], env_id: str | None, observation_space: spaces.Space, n_actions: int
) -> None:
    """
    Write a local Minari dataset, one episode at a time.

    :param dataset_id: "minari:" and the id of a dataset that does not exist yet.
    :param episodes: Fields of Minari's ``EpisodeBuffer``.
    :param env_id: Id of the env that they come from, or ``None``.
    :param observation_space: Space of the observations.
    :param n_actions: Da, size of an action.
    :raises ValueError: if the id is none or taken.
    :raises ImportError: if Minari is not installed.
    """
    name = check_new_minari_id(dataset_id)
    import minari
    from minari.data_collector import EpisodeBuffer

    dataset: Any = None
    for episode in tqdm(episodes, desc="write", unit="episode", delay=1):
        buffer = [EpisodeBuffer(infos={}, **episode)]
        if dataset is not None:
            dataset.update_dataset_from_buffer(buffer)
            continue
        dataset = minari.create_dataset_from_buffers(
            name,
            buffer,
            env=env_id if env_id in gym.registry else None,
            observation_space=observation_space,
            action_space=spaces.Box(-np.inf, np.inf, (n_actions,)),
            data_format="hdf5",
            jpeg_encoding=False,
        )


def check_new_minari_id(dataset_id: str) -> str:
    """
    :param dataset_id: "minari:" and the id of a dataset.
    :return: The id.
    :raises ValueError: if Minari does not take it, or if such a dataset exists.
    :raises ImportError: if Minari is not installed.
    """
    try:
        import minari
        from minari.dataset.minari_dataset import parse_dataset_id
    except ImportError as error:
        raise ImportError(f"{dataset_id!r} is a Minari dataset, which need `pip install sb3-dppo[minari]`.") from error
    name = dataset_id.removeprefix("minari:")
    try:
        parse_dataset_id(name)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{dataset_id!r} names no Minari dataset, as 'minari:hopper/mine-v0' does ({error}).") from error
    if name in minari.list_local_datasets():
        raise ValueError(f"{dataset_id!r} exists: choose another id, or delete it with `minari delete {name}`.")
    return name


def from_trajectories(trajectories: Sequence[Any], selection: Selection | None) -> dict[str, Any]:
    if len(trajectories) == 0:
        raise ValueError("source is an empty list: pass at least one trajectory.")
    observations: dict[str, list[np.ndarray]] = {}
    actions: list[np.ndarray] = []
    for i, trajectory in enumerate(trajectories):
        obs, acts = _trajectory_arrays(i, trajectory)
        rews = getattr(trajectory, "rews", None)
        if rews is not None and np.shape(rews) != (len(acts),):
            raise ValueError(f"source[{i}].rews has the shape {np.shape(rews)}, not ({len(acts)},), one per action.")
        observations = observations or {name: [] for name in obs}
        if obs.keys() != observations.keys():
            raise ValueError(f"source[{i}] has the observations {list(obs)}, but source[0] {list(observations)}.")
        for name, values in (*obs.items(), ("acts", acts)):
            before = actions if name == "acts" else observations[name]
            if before and (values.shape[1:] != before[0].shape[1:] or is_image(values) != is_image(before[0])):
                raise ValueError(
                    f"source[{i}] has other shapes than source[0]: {name or 'obs'} {values.shape[1:]} of {values.dtype}, not "
                    f"{before[0].shape[1:]} of {before[0].dtype}."
                )
            before.append(values if name == "acts" else values[:-1])
    rewards, terminals = None, None
    # Known only if they are known of all of them.
    if all(getattr(trajectory, "rews", None) is not None for trajectory in trajectories):
        rewards = np.concatenate([np.asarray(trajectory.rews, dtype=np.float32) for trajectory in trajectories])
    if all(getattr(trajectory, "terminal", None) is not None for trajectory in trajectories):
        terminals = np.zeros(sum(len(acts) for acts in actions), dtype=bool)
        terminals[np.cumsum([len(acts) for acts in actions]) - 1] = [bool(trajectory.terminal) for trajectory in trajectories]
    return dict(
        observations=_whole(_select({name: _join(values) for name, values in observations.items()}, selection, "source")),
        actions=np.concatenate(actions).astype(np.float32),
        traj_lengths=np.array([len(acts) for acts in actions]),
        rewards=rewards,
        terminals=terminals,
    )


def _trajectory_arrays(i: int, trajectory: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """
    :param i: Its number, for errors.
    :param trajectory: A trajectory as `imitation` has them.
    :return: Its observations by key, under the empty key if they are a single array, and its actions.
    """
    obs: Any = getattr(trajectory, "obs", None)
    acts: Any = getattr(trajectory, "acts", None)
    # A dict, or imitation's DictObs.
    parts = dict(obs.items()) if hasattr(obs, "items") else {"": obs}
    for name, values in (*((f"obs[{key!r}]" if key else "obs", values) for key, values in parts.items()), ("acts", acts)):
        if np.asarray(values).dtype.kind not in "fiub" or np.ndim(values) == 0:
            raise ValueError(
                f"source[{i}].{name} must be an array of numbers, not {type(values).__name__}: a list must hold trajectories "
                "as `imitation` has them (obs, acts, rews, terminal)."
            )
    arrays, actions = {key: np.asarray(values) for key, values in parts.items()}, np.asarray(acts)
    for values in arrays.values():
        if len(actions) == 0 or len(values) != len(actions) + 1:
            raise ValueError(
                f"source[{i}] has {len(values)} obs and {len(actions)} acts: there must be at least one action, and one "
                "observation more than actions, the one after the last."
            )
    return arrays, actions.reshape(len(actions), -1)


def _join(episodes: list[Any]) -> Rows:
    """
    :param episodes: Observations under one key, per episode, shape (T, ...).
    :return: Those of all episodes: images where they are, vectors as one array.
    """
    return EpisodeRows(episodes) if is_image(episodes[0]) else np.concatenate(episodes)


# ---------------------------------------------------------------------- robomimic


def from_robomimic(path: Path, selection: Selection | None, filter_key: str | None) -> dict[str, Any]:
    import h5py

    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    try:
        with ExitStack() as stack:
            file = stack.enter_context(h5py.File(path, "r"))
            episodes = [file["data"][name] for name in _robomimic_episodes(path, file, filter_key)]
            selection = selection or {"": _robomimic_vectors(path, episodes[0])}
            names = ["actions", *(f"obs/{name}" for names_of_key in selection.values() for name in names_of_key)]
            names += [name for name in ("rewards", "dones") if name in episodes[0]]
            columns: dict[str, list[Any]] = {name: [] for name in names}
            n_bytes = 0
            for episode in episodes:
                _read_robomimic_episode(path, episode, columns)
                # float32 can be four times what was stored. One dataset may be linked to from many places.
                n_bytes += sum(values[-1].nbytes for values in columns.values() if not is_image(values[-1]))
                if n_bytes > 4 * MAX_COMPRESSION * path.stat().st_size:
                    raise ValueError(f"{path} holds more, up to {episode.name[1:]}, than its size allows.")
            joined = {name: _join(values) for name, values in columns.items()}
            if any(is_image(rows) for rows in joined.values()):
                stack.pop_all()  # The file stays open as long as its images are used.
    except ValueError:
        raise
    except Exception as error:  # h5py raises almost anything for a damaged file.
        raise ValueError(f"{path} can't be read as HDF5 ({error}).") from error
    parts = {name.removeprefix("obs/"): rows for name, rows in joined.items() if name.startswith("obs/")}
    # The file's env_args name robosuite's task, or D4RL's, not an id of the env that a model is in: no env_id.
    return dict(
        observations=_whole(_select(parts, selection, path)),
        actions=joined["actions"],
        traj_lengths=np.array([len(actions) for actions in columns["actions"]]),
        rewards=joined["rewards"][:, 0] if "rewards" in joined else None,
        terminals=joined["dones"][:, 0] > 0 if "dones" in joined else None,
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
            f"{path}: {episode.name[1:]}/obs holds no vectors, only {sorted(observations)}: name images with obs_keys."
        )
    return keys


def _read_robomimic_episode(path: Path, episode: Any, columns: dict[str, list[Any]]) -> None:
    """
    Append an episode.

    :param path: Path of the file, for errors.
    :param episode: The episode's group.
    :param columns: What was read so far, to append to: vectors, and the datasets of images.
    """
    rows = None
    for name, before in columns.items():
        dataset, full_name = episode.get(name), f"{episode.name[1:]}/{name}"
        if not hasattr(dataset, "dtype"):
            group = episode.get("obs") if name.startswith("obs/") else episode
            raise ValueError(f"{path} lacks the dataset {full_name}; there are {sorted(group) if group is not None else []}.")
        _check_storage(path, dataset)
        if dataset.ndim > 2 and not (name.startswith("obs/") and is_image(dataset)):
            raise ValueError(
                f"{path}: {full_name} has the shape {dataset.shape} and the dtype {dataset.dtype}: only vectors and images "
                "(uint8, three dimensions each) can be read."
            )
        if dataset.dtype.kind not in "fiub" or dataset.ndim == 0:
            raise ValueError(f"{path}: {full_name} must be numbers, one row per transition, not {dataset.dtype}.")
        if len(dataset) == 0 or (rows is not None and len(dataset) != rows):
            raise ValueError(f"{path}: {full_name} has {len(dataset)} rows, not {rows or 'at least one'}, one per action.")
        rows = rows or len(dataset)  # that of the actions, which come first
        values = dataset if is_image(dataset) else dataset[()].astype(np.float32).reshape(rows, -1)
        if name in ("rewards", "dones") and values.shape[1] != 1:
            raise ValueError(f"{path}: {full_name} has {values.shape[1]} columns, not one.")
        if before and (values.shape[1:] != before[0].shape[1:] or is_image(values) != is_image(before[0])):
            raise ValueError(
                f"{path}: {full_name} has rows of shape {values.shape[1:]}, but {before[0].shape[1:]} in other episodes."
            )
        before.append(values)


def _check_storage(path: Path, dataset: Any) -> None:
    """
    :param path: Path of the file that is read.
    :param dataset: A dataset of it.
    :raises ValueError: if its values are those of other files, or more than could be stored in this one.
    """
    if dataset.file.filename != str(path) or dataset.external or dataset.is_virtual:
        raise ValueError(f"{path}: {dataset.name[1:]} refers to another file: copy it into this one.")
    if dataset.nbytes > MAX_COMPRESSION * path.stat().st_size:
        raise ValueError(f"{path}: {dataset.name[1:]} has the shape {dataset.shape}, more than the file can hold.")


# ---------------------------------------------------------------------- LeRobot


def from_lerobot(folder: Path, selection: Selection | None) -> dict[str, Any]:
    info_path = folder / "meta" / "info.json"
    try:
        info = json.loads(info_path.read_text())
        shapes = {name: (str(feature["dtype"]), tuple(feature["shape"])) for name, feature in info["features"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{info_path} must be a JSON object with features, each with dtype and shape ({error!r}).") from error
    selection = selection or {"": ["observation.state"]}
    keys = [name for names in selection.values() for name in names]
    vectors = sorted(name for name, (dtype, shape) in shapes.items() if dtype not in ("image", "video") and len(shape) == 1)
    for name in (*keys, "action"):
        if name not in shapes:
            raise ValueError(f"{info_path} has no feature {name!r}; there are {sorted(shapes)}: choose obs_keys.")
        if name not in vectors:
            raise ValueError(
                f"{info_path}: {name} is of dtype {shapes[name][0]} and shape {shapes[name][1]}. Only vectors are read: "
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
        observations=_whole(_select({key: table[key][order] for key in keys}, selection, folder)),
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
    except ImportError as error:
        raise ImportError(f"{folder} is a LeRobot folder, which needs pyarrow: pip install 'sb3-dppo[lerobot]'.") from error
    paths = sorted((folder / "data").glob("*/*.parquet"))
    if not paths:
        raise ValueError(f"{folder}/data holds no chunk-000/file-000.parquet: the data was not downloaded.")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for path in paths:
        table = _read_table(path, names)
        for name in names if len(table) > 0 else ():
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
            values = np.concatenate([part.to_numpy(zero_copy_only=False) for part in parts]).reshape(len(column), -1)
            if columns[name] and values.shape[1] != columns[name][0].shape[1]:
                raise ValueError(
                    f"{path}: {name} has {values.shape[1]} columns, but {columns[name][0].shape[1]} in other files."
                )
            columns[name].append(values)
    if not columns["action"]:
        raise ValueError(f"{folder}/data holds no frames.")
    return {name: np.concatenate(values) for name, values in columns.items()}


def _read_table(path: Path, names: list[str]) -> Any:
    """
    :param path: Path of a Parquet file.
    :param names: Columns to read.
    :return: A table of PyArrow.
    :raises ValueError: if it can't be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    limit = MAX_COMPRESSION * path.stat().st_size
    try:
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
            return pa.Table.from_batches(batches, None if batches else file.schema_arrow)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path} can't be read as LeRobot's data ({error}).") from error
