"""
Demonstrations: episodes of observations and actions, from bundled sets, .npz files, robomimic's HDF5 files, LeRobot's folders,
Minari datasets or trajectories of `imitation`. As a program: inspect, convert and collect them.
"""

import argparse
import importlib
import json
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from tqdm import tqdm

if TYPE_CHECKING:
    from minari import MinariDataset

BUNDLED = Path(__file__).parent / "demos"

# observation, state, whether an episode starts -> action, state; as ``predict`` of a model
Predict = Callable[[np.ndarray, Any, np.ndarray], tuple[np.ndarray, Any]]


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """
    Episodes, one after the other, in the units of the env.

    :param observations: Shape (N, *observation_shape); before each action.
    :param actions: Shape (N, Da).
    :param traj_lengths: Transitions of each episode, shape (E,), adding up to N.
    :param rewards: Shape (N,), or ``None`` where they are not known.
    :param terminals: Whether a transition ended in a terminal state, shape (N,), or ``None``.
    :param env_id: Id of the env that they come from, or ``None``.
    :param truncations: Whether an episode was cut off after a transition, shape (N,), or ``None``.
    :raises ValueError: if shapes or lengths don't fit together or a value is not finite.
    """

    observations: np.ndarray
    actions: np.ndarray
    traj_lengths: np.ndarray
    rewards: np.ndarray | None = None
    terminals: np.ndarray | None = None
    env_id: str | None = None
    truncations: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.observations)
        if n == 0 or self.observations.ndim < 2:
            raise ValueError(f"states must have the shape (transitions, size), not {self.observations.shape}.")
        if self.actions.ndim != 2:
            raise ValueError(f"actions must have the shape (transitions, size), not {self.actions.shape}.")
        for name in ("actions", "rewards", "terminals", "truncations"):
            values = getattr(self, name)
            if values is not None and len(values) != n:
                raise ValueError(f"{name} has {len(values)} rows, but states has {n}: there must be one per transition.")
        lengths = self.traj_lengths
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 1).any():
            raise ValueError(f"traj_lengths must be positive integers, one per episode, not {lengths!r}.")
        if lengths.sum() != n:
            raise ValueError(f"traj_lengths adds up to {lengths.sum()} transitions, but states has {n}.")
        for name, values in (("states", self.observations), ("actions", self.actions), ("rewards", self.rewards)):
            if values is not None and not np.isfinite(values).all():
                row = int(np.flatnonzero(~np.isfinite(values).reshape(n, -1).all(axis=1))[0])
                raise ValueError(f"{name} is NaN or infinite in transition {row}: remove its episode.")

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def n_episodes(self) -> int:
        """
        :return: E, the number of episodes.
        """
        return len(self.traj_lengths)

    @property
    def starts(self) -> np.ndarray:
        """
        :return: Index of the first transition of each episode, shape (E,).
        """
        return np.cumsum(self.traj_lengths) - self.traj_lengths

    @property
    def returns(self) -> np.ndarray | None:
        """
        :return: Sum of rewards of each episode, shape (E,), or ``None`` where rewards are not known.
        """
        return None if self.rewards is None else np.add.reduceat(self.rewards.astype(np.float64), self.starts)

    def first(self, n_episodes: int) -> "Demonstrations":
        """
        :param n_episodes: How many episodes to keep; all if there are fewer.
        :return: The first episodes.
        :raises ValueError: if that is none.
        """
        if n_episodes < 1:
            raise ValueError(f"n_episodes={n_episodes} must be at least 1.")
        n = self.traj_lengths[:n_episodes].sum()
        return Demonstrations(
            observations=self.observations[:n],
            actions=self.actions[:n],
            traj_lengths=self.traj_lengths[:n_episodes],
            rewards=None if self.rewards is None else self.rewards[:n],
            terminals=None if self.terminals is None else self.terminals[:n],
            env_id=self.env_id,
            truncations=None if self.truncations is None else self.truncations[:n],
        )

    def save(self, path: str | Path) -> None:
        """
        Write an .npz file that :func:`load_demonstrations` reads.

        :param path: Where; folders that don't exist are made.
        :raises ValueError: for a name that doesn't end in .npz.
        """
        path = _npz_path(path)
        optional = dict(rewards=self.rewards, terminals=self.terminals, truncations=self.truncations)
        # "units" tells them from normalised files, whose values look alike.
        meta = dict(units="env") if self.env_id is None else dict(units="env", env_id=self.env_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            states=self.observations,
            actions=self.actions,
            traj_lengths=self.traj_lengths,
            meta=np.array(json.dumps(meta)),
            **{name: values for name, values in optional.items() if values is not None},  # type: ignore[arg-type]
        )

    def chunks(self, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """
        All chunks of actions that lie inside an episode.

        :param horizon: Tp, actions in a chunk.
        :return: Index of the first transition of each chunk, shape (C,), and the chunks, shape (C, Tp, Da).
        :raises ValueError: if every episode is shorter than a chunk.
        """
        first = np.concatenate(
            [
                np.arange(start, start + length - horizon + 1)
                for start, length in zip(self.starts, self.traj_lengths, strict=True)
            ]
        )
        if len(first) == 0:
            raise ValueError(
                f"horizon={horizon} is longer than every episode (the longest has {self.traj_lengths.max()} transitions)."
            )
        return first, self.actions[first[:, None] + np.arange(horizon)]

    def stacked_observations(self, index: np.ndarray, n_stack: int) -> np.ndarray:
        """
        Observations as ``VecFrameStack`` gives them: the last ones side by side, newest last, zeros before an episode's start.

        :param index: Which transitions, shape (C,).
        :param n_stack: Number of frames.
        :return: Shape (C, ..., n_stack * size).
        """
        episode = np.searchsorted(self.starts, index, side="right") - 1
        frames = []
        for age in reversed(range(n_stack)):
            inside = index - age >= self.starts[episode]
            frame = self.observations[np.maximum(index - age, 0)]
            frames.append(np.where(inside.reshape(-1, *[1] * (frame.ndim - 1)), frame, 0))
        return np.concatenate(frames, axis=-1)


def load_demonstrations(
    source: "str | Path | Sequence[Any] | MinariDataset",
    normalization: str | Path | None = None,
    *,
    obs_keys: Sequence[str] | None = None,
    filter_key: str | None = None,
) -> Demonstrations:
    """
    Read demonstrations.

    An .npz file holds ``states`` (N, Do), ``actions`` (N, Da) and ``traj_lengths`` (E,), optionally ``rewards`` (N,),
    ``terminals`` (N,), ``truncations`` (N,) and ``meta``, a JSON string with an ``env_id``. The reference implementation's
    files hold normalised states and actions, with their ranges in a file ``normalization.npz``: it is used if it is passed, or
    if it lies beside a file whose values are all in [-1, 1] and whose ``meta`` does not have ``"units": "env"``, as that of
    :meth:`Demonstrations.save` has.

    :param source: A bundled set ("hopper-medium", "metaworld-pick-place"), the path of an .npz file, of a robomimic file
        (.hdf5) or of a LeRobot folder (the one with ``meta`` and ``data`` in it), the id of a local Minari dataset, such a
        dataset, or a list of trajectories with the fields of `imitation`: ``obs`` (T + 1, ...), ``acts`` (T, ...), optionally
        ``rews`` (T,) and ``terminal``.
    :param normalization: Path of an .npz with ``obs_min``, ``obs_max``, ``action_min`` and ``action_max``, for
        normalised files.
    :param obs_keys: For robomimic and LeRobot: what makes up an observation, side by side in this order, which must be the
        env's. Otherwise all vectors of a robomimic file, sorted by name, or LeRobot's ``observation.state``.
    :param filter_key: For robomimic: name of the subset to read, one of those under ``mask`` in the file ("train").
    :return: The demonstrations, in the units of the env.
    :raises ValueError: for a source that can't be found or whose content does not fit together.
    :raises ImportError: if the package that reads it is not installed.
    """
    kind = _kind(source)
    for name, value, kinds, what in (
        ("normalization", normalization, ("npz",), "normalised .npz files"),
        ("obs_keys", obs_keys, ("robomimic", "lerobot"), "robomimic files and LeRobot folders"),
        ("filter_key", filter_key, ("robomimic",), "robomimic files"),
    ):
        if value is not None and kind not in kinds:
            shown = str(source) if isinstance(source, (str, Path)) else type(source).__name__
            raise ValueError(f"{name}={str(value)!r} is for {what}, not for source={shown!r}.")
    if isinstance(obs_keys, str) or (obs_keys is not None and len(obs_keys) == 0):
        raise ValueError(f"obs_keys={obs_keys!r} must be a list with at least one name.")
    if kind == "trajectories":
        return _from_trajectories(source)  # type: ignore[arg-type]
    if kind == "minari":
        return _from_minari(source)
    if kind == "bundled":
        return _from_npz(BUNDLED / f"{source}.npz", None)
    if kind == "npz":
        return _from_npz(Path(source), normalization)  # type: ignore[arg-type]
    if kind == "robomimic":
        return _from_robomimic(Path(source), obs_keys, filter_key)  # type: ignore[arg-type]
    if kind == "lerobot":
        return _from_lerobot(Path(source), obs_keys)  # type: ignore[arg-type]
    return _from_minari_id(str(source))


def _kind(source: Any) -> str:
    """
    :param source: Source of demonstrations.
    :return: How to read it.
    """
    if not isinstance(source, (str, Path)):
        return "trajectories" if isinstance(source, Sequence) else "minari"
    path = Path(source)
    if (BUNDLED / f"{source}.npz").is_file():
        return "bundled"
    if path.suffix == ".npz":
        return "npz"
    if path.suffix in (".hdf5", ".h5"):
        return "robomimic"
    if (path / "meta" / "info.json").is_file():
        return "lerobot"
    if path.exists():
        raise ValueError(
            f"source={str(source)!r} is not an .npz file, a robomimic file (.hdf5) or a LeRobot folder (with meta/info.json), "
            "the formats that are read from a path."
        )
    return "minari id"


def _from_npz(path: Path, normalization: str | Path | None) -> Demonstrations:
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
    return Demonstrations(
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


def _from_minari_id(dataset_id: str) -> Demonstrations:
    not_found = f"source={dataset_id!r} is neither a bundled set ({bundled_demonstrations()}), nor an .npz file, nor"
    try:
        import minari
    except ImportError as error:
        raise ValueError(f"{not_found} a Minari dataset, which need `pip install sb3-dppo[minari]`.") from error
    if dataset_id not in minari.list_local_datasets():
        raise ValueError(f"{not_found} a local Minari dataset: get it with `minari download {dataset_id}`.")
    return _from_minari(minari.load_dataset(dataset_id))


def _from_minari(dataset: Any) -> Demonstrations:
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
    return Demonstrations(
        # An episode also holds the observation after its last action.
        observations=np.concatenate([episode.observations[: len(episode.actions)] for episode in episodes]).astype(np.float32),
        actions=np.concatenate([episode.actions.reshape(len(episode.actions), -1) for episode in episodes]).astype(np.float32),
        traj_lengths=lengths,
        rewards=np.concatenate([episode.rewards for episode in episodes]),
        terminals=np.concatenate([episode.terminations for episode in episodes]),
        env_id=dataset.env_spec.id if dataset.env_spec is not None else None,
        truncations=np.concatenate([episode.truncations for episode in episodes]),
    )


def _from_trajectories(trajectories: Sequence[Any]) -> Demonstrations:
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
    return Demonstrations(
        observations=np.concatenate(observations).astype(np.float32),
        actions=np.concatenate(actions).astype(np.float32),
        traj_lengths=np.array([len(acts) for acts in actions]),
        rewards=rewards,
        terminals=terminals,
    )


# ---------------------------------------------------------------------- robomimic


def _from_robomimic(path: Path, obs_keys: Sequence[str] | None, filter_key: str | None) -> Demonstrations:
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
    return Demonstrations(
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


def _from_lerobot(folder: Path, obs_keys: Sequence[str] | None) -> Demonstrations:
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
    return Demonstrations(
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


# ---------------------------------------------------------------------- collecting


def collect_demonstrations(
    env: gym.Env, predict: Predict, n_episodes: int, seed: int | None = None, progress_bar: bool = True
) -> Demonstrations:
    """
    Record episodes of a policy. An interruption (Ctrl+C) keeps the episodes that are complete.

    :param env: The env, with Box spaces, whose own observations are recorded.
    :param predict: The policy, called as ``predict(observation, state, episode_start)``: it gives the action and the next
        state, as ``predict`` of a model does. Actions are clipped to the env's bounds.
    :param n_episodes: Number of episodes.
    :param seed: Episode i is reset with ``seed + i``; ``None`` for a random one.
    :param progress_bar: Display a progress bar.
    :return: The demonstrations.
    :raises ValueError: for an env with other spaces, or actions of another shape.
    """
    if n_episodes < 1:
        raise ValueError(f"n_episodes={n_episodes} must be at least 1.")
    for name, space in (("observation", env.observation_space), ("action", env.action_space)):
        if not isinstance(space, spaces.Box):
            raise ValueError(f"Demonstrations are arrays of numbers, but the env's {name} space is {space}, not a Box.")
    episodes: list[dict[str, list[Any]]] = []
    bar = tqdm(total=n_episodes, desc="collect", unit="episode", disable=not progress_bar)
    try:
        while len(episodes) < n_episodes:
            episodes.append(_collect_episode(env, predict, None if seed is None else seed + len(episodes)))
            bar.update()
            bar.set_postfix({"return": f"{np.mean([np.sum(episode['rewards']) for episode in episodes]):.2f}"})
    except KeyboardInterrupt:
        if not episodes:
            raise
        print(f"Interrupted: keeping {len(episodes)} complete episodes", file=sys.stderr)
    finally:
        bar.close()
    arrays = {name: np.concatenate([np.asarray(episode[name]) for episode in episodes]) for name in episodes[0]}
    return Demonstrations(
        observations=arrays["observations"],
        actions=arrays["actions"].reshape(len(arrays["actions"]), -1),
        traj_lengths=np.array([len(episode["actions"]) for episode in episodes]),
        rewards=arrays["rewards"].astype(np.float32),
        terminals=arrays["terminals"],
        env_id=None if env.spec is None else env.spec.id,
        truncations=arrays["truncations"],
    )


def _collect_episode(env: gym.Env, predict: Predict, seed: int | None) -> dict[str, list[Any]]:
    """
    :param env: The env.
    :param predict: The policy.
    :param seed: Seed of the reset.
    :return: Its columns, one entry per transition.
    """
    assert isinstance(env.action_space, spaces.Box)
    low, high = env.action_space.low, env.action_space.high
    episode: dict[str, list[Any]] = {name: [] for name in ("observations", "actions", "rewards", "terminals", "truncations")}
    obs, state, done = env.reset(seed=seed)[0], None, False
    while not done:
        action, state = predict(obs, state, np.array([not episode["actions"]]))
        action = np.asarray(action)
        if action.shape != low.shape:
            raise ValueError(f"The policy's action has the shape {action.shape}, but the env's are of shape {low.shape}.")
        action = np.clip(action, low, high).astype(env.action_space.dtype)
        # Copies: an env may give the same array again.
        episode["observations"].append(np.array(obs, dtype=np.float32))
        episode["actions"].append(np.array(action, dtype=np.float32))
        obs, reward, terminated, truncated, _ = env.step(action)
        episode["rewards"].append(float(reward))
        episode["terminals"].append(bool(terminated))
        episode["truncations"].append(bool(truncated))
        done = terminated or truncated
    return episode


def _predict_of_model(
    env: gym.Env, algo: str, path: str, vec_normalize: str | None, seed: int | None, deterministic: bool, device: str
) -> Predict:
    """
    :param env: The env.
    :param algo: RL Zoo's name of the algorithm.
    :param path: Path of the saved model.
    :param vec_normalize: Path of the ``VecNormalize`` that the model was trained with, or ``None``.
    :param seed: Seed of the model's noise.
    :param deterministic: Whether it acts deterministically.
    :param device: Device of the model.
    :return: The model as a policy.
    """
    from rl_zoo3.utils import ALGOS
    from stable_baselines3.common.utils import check_for_correct_spaces
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    from sb3_dppo.dppo import DPPO

    algos: dict[str, Any] = {**ALGOS, "dppo": DPPO}
    if algo not in algos:
        raise ValueError(f"algo={algo!r} must be one of {sorted(algos)}.")
    if not Path(path).is_file():
        raise ValueError(f"model={path!r} does not exist.")
    model = algos[algo].load(path, device=device)
    check_for_correct_spaces(env, model.observation_space, model.action_space)
    if seed is not None:
        model.set_random_seed(seed)
    if vec_normalize is not None and not Path(vec_normalize).is_file():
        raise ValueError(f"vec-normalize={vec_normalize!r} does not exist.")
    # What is recorded are the env's own observations; the model alone sees normalised ones.
    normalizer = None if vec_normalize is None else VecNormalize.load(vec_normalize, DummyVecEnv([lambda: env]))

    def predict(obs: np.ndarray, state: Any, episode_start: np.ndarray) -> tuple[np.ndarray, Any]:
        seen = obs if normalizer is None else normalizer.normalize_obs(obs)
        return model.predict(seen, state, episode_start, deterministic=deterministic)

    return predict


def _predict_of_function(name: str) -> Predict:
    """
    :param name: "module:function", of a function of the observation.
    :return: The function as a policy.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"policy={name!r} must be module:function.")
    act = getattr(importlib.import_module(module), function, None)
    if not callable(act):
        raise ValueError(f"policy={name!r}: module {module} has no function {function!r}.")
    return lambda obs, state, episode_start: (act(obs), None)


# ---------------------------------------------------------------------- the program


def describe(demonstrations: Demonstrations) -> str:
    """
    :param demonstrations: Demonstrations.
    :return: Their numbers, lengths, returns and ranges, in a few lines.
    """
    n, lengths, returns = len(demonstrations), demonstrations.traj_lengths, demonstrations.returns
    lines = [f"env           {demonstrations.env_id or 'unknown'}"]
    lines.append(f"episodes      {demonstrations.n_episodes}")
    lines.append(f"transitions   {n}")
    lines.append(f"lengths       min {lengths.min()}, mean {lengths.mean():.1f}, max {lengths.max()}")
    if returns is None:
        lines.append("returns       unknown, there are no rewards")
    else:
        lines.append(
            f"returns       {returns.mean():.2f} ± {returns.std():.2f}, min {returns.min():.2f}, max {returns.max():.2f}"
        )
    last = demonstrations.starts + lengths - 1
    ends = [
        f"{np.count_nonzero(flags[last])} {word}"
        for word, flags in (("terminated", demonstrations.terminals), ("truncated", demonstrations.truncations))
        if flags is not None
    ]
    lines.append(f"last steps    {', '.join(ends) or 'unknown, there are no flags'}")
    constant = []
    for name in ("observations", "actions"):
        values = getattr(demonstrations, name).reshape(n, -1)
        low, high = values.min(axis=0), values.max(axis=0)
        lines.append(f"{name}, {values.shape[1]} columns (min, max)")
        lines += [f"  {i:4d}  {low[i]:12.5g}  {high[i]:12.5g}" for i in range(values.shape[1])]
        constant += [f"{name}[{i}]" for i in np.flatnonzero(low == high)]
    lines.append(f"constant      {', '.join(constant) or 'none'}")
    return "\n".join(lines)


def _npz_path(path: str | Path) -> Path:
    if Path(path).suffix != ".npz":
        raise ValueError(f"path={str(path)!r} must end in .npz, the format that is written.")
    return Path(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sb3_dppo.demonstrations", description="Inspect, convert and collect demonstrations."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "path", help="bundled set (hopper-medium), .npz file, robomimic file (.hdf5), LeRobot folder or Minari dataset id"
    )
    source.add_argument("--normalization", help="ranges of a normalised .npz file")
    source.add_argument("--obs-keys", nargs="+", metavar="KEY", help="observations of a robomimic file or LeRobot folder")
    source.add_argument("--filter-key", help="subset of a robomimic file")
    commands.add_parser("inspect", parents=[source], help="print numbers, lengths, returns and ranges")
    convert = commands.add_parser("convert", parents=[source], help="write an .npz file")
    convert.add_argument("output", help=".npz file to write")
    convert.add_argument("--max-episodes", type=int, help="keep the first ones only")
    collect = commands.add_parser("collect", help="record episodes of a policy")
    collect.add_argument("--env", required=True, help="Gymnasium id of the environment")
    policy = collect.add_mutually_exclusive_group(required=True)
    policy.add_argument("--model", help="zip file of a saved model")
    policy.add_argument("--policy", metavar="MODULE:FUNCTION", help="a function of the observation that gives the action")
    collect.add_argument("--algo", help="RL Zoo's name of the model's algorithm (default: dppo)")
    collect.add_argument("--vec-normalize", help="vecnormalize.pkl that the model was trained with")
    collect.add_argument("--deterministic", action="store_true", help="the model acts deterministically")
    collect.add_argument("--device", default="auto", help="device of the model")
    collect.add_argument("--n-episodes", type=int, required=True)
    collect.add_argument("--seed", type=int, help="of the first episode; those after count up")
    collect.add_argument("-o", "--output", required=True, help=".npz file to write")
    return parser


def _env_and_policy(args: argparse.Namespace) -> tuple[gym.Env, Predict]:
    """
    :param args: Arguments of ``collect``.
    :return: The env and the policy that they name.
    :raises ValueError: if they can't be made.
    """
    if args.n_episodes < 1:
        raise ValueError(f"n-episodes={args.n_episodes} must be at least 1.")
    if args.policy is not None and (args.algo is not None or args.vec_normalize is not None or args.deterministic):
        raise ValueError("algo, vec-normalize and deterministic are for a model, not for a policy.")
    try:
        env = gym.make(args.env)
    except gym.error.Error as error:
        raise ValueError(f"env={args.env!r} can't be made ({error}).") from error
    if args.policy is not None:
        return env, _predict_of_function(args.policy)
    algo = args.algo or "dppo"
    return env, _predict_of_model(env, algo, args.model, args.vec_normalize, args.seed, args.deterministic, args.device)


def main() -> None:
    """
    The command line: inspect, convert and collect demonstrations.
    """
    parser = _parser()
    args = parser.parse_args()
    try:
        if args.command != "inspect":
            _npz_path(args.output)  # before the work, not after
        if args.command == "collect":
            env, predict = _env_and_policy(args)
        else:
            demonstrations = load_demonstrations(
                args.path, args.normalization, obs_keys=args.obs_keys, filter_key=args.filter_key
            )
        if args.command == "convert" and args.max_episodes is not None:
            demonstrations = demonstrations.first(args.max_episodes)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    if args.command == "inspect":
        print(describe(demonstrations))
        return
    if args.command == "collect":
        # Not in the try: an error of the policy's own comes with its traceback.
        demonstrations = collect_demonstrations(env, predict, args.n_episodes, args.seed)
        env.close()
    demonstrations.save(args.output)
    returns = demonstrations.returns
    print(
        f"Saved {args.output}: {demonstrations.n_episodes} episodes, {len(demonstrations)} transitions"
        + ("" if returns is None else f", return {returns.mean():.2f} ± {returns.std():.2f}")
    )


if __name__ == "__main__":
    main()
