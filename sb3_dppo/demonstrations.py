"""Demonstrations: episodes of observations and actions, from bundled sets, .npz files or Minari datasets."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from minari import MinariDataset

BUNDLED = Path(__file__).parent / "demos"


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
    :raises ValueError: if shapes or lengths don't fit together or a value is not finite.
    """

    observations: np.ndarray
    actions: np.ndarray
    traj_lengths: np.ndarray
    rewards: np.ndarray | None = None
    terminals: np.ndarray | None = None
    env_id: str | None = None

    def __post_init__(self) -> None:
        n = len(self.observations)
        if n == 0 or self.observations.ndim < 2:
            raise ValueError(f"states must have the shape (transitions, size), not {self.observations.shape}.")
        if self.actions.ndim != 2:
            raise ValueError(f"actions must have the shape (transitions, size), not {self.actions.shape}.")
        for name, values in (("actions", self.actions), ("rewards", self.rewards), ("terminals", self.terminals)):
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


def load_demonstrations(source: "str | Path | MinariDataset", normalization: str | Path | None = None) -> Demonstrations:
    """
    Read demonstrations.

    An .npz file holds ``states`` (N, Do), ``actions`` (N, Da) and ``traj_lengths`` (E,), optionally ``rewards`` (N,),
    ``terminals`` (N,) and ``meta``, a JSON string with an ``env_id``. The reference implementation's files hold normalised
    states and actions, with their ranges in a file ``normalization.npz``: it is used if it is passed, or if it lies beside a
    file whose values are all in [-1, 1].

    :param source: A bundled set ("hopper-medium"), the path of an .npz file, the id of a local Minari dataset, or a dataset.
    :param normalization: Path of an .npz with ``obs_min``, ``obs_max``, ``action_min`` and ``action_max``, for
        normalised files.
    :return: The demonstrations, in the units of the env.
    :raises ValueError: for a source that can't be found or whose content does not fit together.
    """
    bundled = BUNDLED / f"{source}.npz"
    if normalization is not None and (not isinstance(source, (str, Path)) or Path(source).suffix != ".npz"):
        raise ValueError(f"normalization={str(normalization)!r} is for normalised .npz files, not for source={source!r}.")
    if not isinstance(source, (str, Path)):
        return _from_minari(source)
    if bundled.is_file():
        return _from_npz(bundled, None)
    if Path(source).suffix == ".npz":
        return _from_npz(Path(source), normalization)
    if Path(source).exists():
        raise ValueError(f"source={str(source)!r} is not an .npz file, the format that is read from a path.")
    return _from_minari_id(str(source))


def _from_npz(path: Path, normalization: str | Path | None) -> Demonstrations:
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Bundled demonstrations: {bundled_demonstrations()}.")
    arrays = read_npz(path, ("states", "actions", "traj_lengths"))
    for name in ("states", "actions"):
        if arrays[name].dtype.kind not in "fiu":
            raise ValueError(f"{path}: {name} must be numbers, not {arrays[name].dtype}.")
    states, actions = (arrays[name].astype(np.float32) for name in ("states", "actions"))
    if normalization is None and (path.parent / "normalization.npz").is_file() and path.name != "normalization.npz":
        if np.abs(states).max() <= 1 + 1e-4 and np.abs(actions).max() <= 1 + 1e-4:
            normalization = path.parent / "normalization.npz"
    if normalization is not None:
        ranges = read_npz(Path(normalization), ("obs_min", "obs_max", "action_min", "action_max"))
        for name, values in (("obs", states), ("action", actions)):
            if ranges[f"{name}_min"].size != values[0].size or ranges[f"{name}_max"].size != values[0].size:
                raise ValueError(
                    f"{normalization} has {ranges[f'{name}_min'].size} {name} ranges, but {path} has {values[0].size}."
                )
        states = (states + 1) / 2 * (ranges["obs_max"] - ranges["obs_min"] + 1e-6) + ranges["obs_min"]
        actions = (actions + 1) / 2 * (ranges["action_max"] - ranges["action_min"] + 1e-6) + ranges["action_min"]
    try:
        env_id = json.loads(str(arrays["meta"])).get("env_id") if "meta" in arrays else None
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{path}: meta must be a JSON object, such as {{"env_id": "Hopper-v5"}}.') from error
    return Demonstrations(
        observations=states.astype(np.float32),
        actions=actions.astype(np.float32),
        traj_lengths=np.asarray(arrays["traj_lengths"]),
        rewards=arrays.get("rewards"),
        terminals=arrays.get("terminals"),
        env_id=env_id,
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
        raise TypeError(f"source must be a name, a path or a Minari dataset, not {type(dataset).__name__}.")
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
    )
