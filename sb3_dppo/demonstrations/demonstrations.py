"""Demonstrations: episodes of observations and actions, in the units of the env."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sb3_dppo.demonstrations.minari import check_new_minari_id, write_minari
from sb3_dppo.demonstrations.npz import write_npz
from sb3_dppo.demonstrations.rows import Rows, is_image
from sb3_dppo.features.observations import batch_size_of, part_name, take
from sb3_dppo.runs.faults import are_finite


@dataclass(frozen=True, eq=False, repr=False)
class Demonstrations:
    """
    Episodes, one after the other, in the units of the env.

    :param observations: Before each action: an array of shape (N, ...), or for a ``Dict`` one per key. Images
        are bytes (``uint8``), channels first or last, and may be memory-mapped or
        :class:`~sb3_dppo.demonstrations.rows.EpisodeRows`, so that only the rows in use are read.
    :param actions: Shape (N, Da).
    :param traj_lengths: Transitions of each episode, whole numbers, shape (E,), adding up to N.
    :param rewards: Shape (N,), or ``None`` where they are not known.
    :param terminals: Whether a transition ended in a terminal state, shape (N,), or ``None``.
    :param env_id: Id of the env that they come from, or ``None``.
    :param truncations: Whether an episode was cut off after a transition, shape (N,), or ``None``.
    :raises ValueError: if shapes or lengths don't fit together or a value is not finite.
    """

    observations: Rows | dict[str, Rows]
    actions: np.ndarray
    traj_lengths: np.ndarray
    rewards: np.ndarray | None = None
    terminals: np.ndarray | None = None
    env_id: str | None = None
    truncations: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("observations is an empty dictionary: there must be at least one key.")
        lengths = np.asarray(self.traj_lengths)
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 1).any():
            raise ValueError(f"traj_lengths must be positive integers, one per episode, not {self.traj_lengths!r}.")
        n = 0
        rows_of: dict[str, Rows] = {**{part_name(key): rows for key, rows in self.parts.items()}, **self.columns}
        for name, rows in rows_of.items():
            is_matrix = name == "actions" or name not in self.columns
            fits = rows.ndim >= 2 if name not in self.columns else rows.ndim == 1 + is_matrix
            if rows.dtype.kind not in "fiub" or not fits or len(rows) == 0:
                wanted = "shape (transitions, size)" if is_matrix else "one per transition"
                raise ValueError(f"{name} must be numbers, {wanted}, not {rows.dtype} of shape {rows.shape}.")
            n = n or len(rows)
            if len(rows) != n:
                first = next(iter(rows_of))
                raise ValueError(f"{name} has {len(rows)} rows, but {first} has {n}: there must be one per transition.")
            if rows.dtype.kind == "f" and not (finite := are_finite(rows)).all():
                raise ValueError(f"{name} is NaN or infinite in transition {int(finite.argmin())}: remove its episode.")
        # One beyond n could make their sum overflow.
        if lengths.max(initial=0) > n or lengths.sum() != n:
            raise ValueError(f"traj_lengths adds up to {lengths.sum()} transitions, but observations has {n}.")
        # Signed, so that differences may be negative.
        object.__setattr__(self, "traj_lengths", lengths.astype(np.int64))

    def __len__(self) -> int:
        return batch_size_of(self.observations)

    def __repr__(self) -> str:
        shapes = "".join(f", {part_name(key)} {rows.shape} {rows.dtype}" for key, rows in self.parts.items())
        return f"Demonstrations({self.env_id or 'unknown env'}, {self.summary}{shapes}, actions {self.actions.shape})"

    @property
    def summary(self) -> str:
        """How much there is, and the mean and standard deviation of the returns where they are known."""
        returns = self.returns
        known = "" if returns is None else f", return {returns.mean():.2f} ± {returns.std():.2f}"
        return f"{self.n_episodes} episodes, {len(self)} transitions{known}"

    @property
    def parts(self) -> dict[str, Rows]:
        """Observations by key, under the empty key if they are a single array."""
        return self.observations if isinstance(self.observations, dict) else {"": self.observations}

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What else is known of each transition, by the names of the fields: "actions" always."""
        columns = {name: getattr(self, name) for name in ("actions", "rewards", "terminals", "truncations")}
        return {name: values for name, values in columns.items() if values is not None}

    @property
    def n_episodes(self) -> int:
        """E, the number of episodes."""
        return len(self.traj_lengths)

    @property
    def starts(self) -> np.ndarray:
        """Index of the first transition of each episode, shape (E,)."""
        return np.cumsum(self.traj_lengths) - self.traj_lengths

    @property
    def returns(self) -> np.ndarray | None:
        """Sum of rewards of each episode, shape (E,), or ``None`` where rewards are not known."""
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
        columns = {name: values[:n] for name, values in self.columns.items()}
        observations = take(self.observations, slice(n))
        return replace(self, observations=observations, traj_lengths=self.traj_lengths[:n_episodes], **columns)  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """
        Write an .npz file that :func:`load_demonstrations` reads, or a local Minari dataset. In .npz, images are not
        compressed, so that they can be read row by row. Minari also wants the observation after an episode's last action,
        which is not known here: the last one is repeated. Unknown rewards are 0 there, and unknown ends truncations.

        :param path: Where; folders that don't exist are made. Or "minari:" and the id of a new dataset.
        :raises ValueError: for another name, or a dataset that exists.
        :raises ImportError: if Minari is needed and not installed.
        """
        check_output(path)
        known = self.parts, self.columns, self.traj_lengths, self.env_id
        if str(path).startswith("minari:"):
            write_minari(str(path).removeprefix("minari:"), *known)
        else:
            write_npz(Path(path).expanduser(), *known)

    def chunk_starts(self, horizon: int) -> np.ndarray:
        """
        :param horizon: Tp, actions in a chunk.
        :return: Index of the first transition of each chunk that lies inside an episode, shape (C,).
        :raises ValueError: if every episode is shorter than a chunk.
        """
        left = np.repeat(self.starts + self.traj_lengths, self.traj_lengths) - np.arange(len(self))
        first = np.flatnonzero(left >= horizon)
        if len(first) == 0:
            raise ValueError(
                f"horizon={horizon} is longer than every episode (the longest has {self.traj_lengths.max()} transitions)."
            )
        return first

    def stacked_observations(self, index: np.ndarray, n_stack: int, key: str = "") -> np.ndarray:
        """
        Observations as ``VecFrameStack`` gives them: the last ones side by side, images along their channels, newest last,
        zeros before an episode's start. Only these are read.

        :param index: Which transitions, shape (C,).
        :param n_stack: Number of frames.
        :param key: Which of the observations, for a ``Dict``.
        :return: Shape (C, ..., n_stack * size).
        """
        rows, frames = self.parts[key], []
        episode_start = self.starts[np.searchsorted(self.starts, index, side="right") - 1]
        for age in reversed(range(n_stack)):
            frame = np.asarray(rows[np.maximum(index - age, 0)])  # a copy
            frame[index - age < episode_start] = 0
            frames.append(frame)
        return frames[0] if n_stack == 1 else np.concatenate(frames, axis=stacking_axis(rows))


def stacking_axis(rows: Rows) -> int:
    """
    The axis along which ``VecFrameStack`` stacks observations of shape (N, ...): that of the channels of images, of which
    there are fewer than rows and columns of pixels, and else the last.
    """
    return 1 if is_image(rows) and np.argmin(rows.shape[1:]) == 0 else -1


def are_constant(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """
    :param low: Least values of some columns.
    :param high: Largest values.
    :return: Which columns hold the same number throughout, but for rounding and the noise of a solver, shape as of these.
    """
    return high - low <= 1e-6 + 1e-5 * np.maximum(np.abs(low), np.abs(high))


def check_output(path: str | Path) -> None:
    """Refuse a path that demonstrations can't be written to, before the work of making them."""
    if str(path).startswith("minari:"):
        check_new_minari_id(str(path))
        return
    file = Path(path).expanduser().absolute()
    if file.suffix != ".npz":
        raise ValueError(f"path={str(path)!r} must end in .npz, or be 'minari:' and the id of a dataset.")
    if file.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder.")
    folder = next(parent for parent in file.parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"path={str(path)!r}: nothing can be written in {folder}.")
