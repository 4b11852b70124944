"""
Demonstrations: episodes of observations and actions, from bundled sets, .npz files, robomimic's HDF5 files, LeRobot's folders,
Minari datasets or trajectories of `imitation`. Images stay on disk until they are used. As a program: inspect, convert and
collect them.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from tqdm import tqdm

from sb3_dppo.demonstrations.formats import (
    BUNDLED,
    Recorder,
    check_new_minari_id,
    from_lerobot,
    from_minari,
    from_minari_id,
    from_npz,
    from_robomimic,
    from_trajectories,
    selection_of,
    write_minari,
)
from sb3_dppo.demonstrations.rows import Rows, is_image, rows_at_once, write_npz
from sb3_dppo.features.observations import batch_size_of, part_name, parts_of_space, take

if TYPE_CHECKING:
    from minari import MinariDataset

# observation, state, whether an episode starts -> action, state; as ``predict`` of a model
Predict = Callable[[Any, Any, np.ndarray], tuple[np.ndarray, Any]]


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """
    Episodes, one after the other, in the units of the env.

    :param observations: Before each action: an array of shape (N, *observation_shape), or for a ``Dict`` one per key. Images
        are bytes (``uint8``), channels first or last, and may be memory-mapped or
        :class:`~sb3_dppo.demonstrations.rows.EpisodeRows`, so that only the rows in use are read.
    :param actions: Shape (N, Da).
    :param traj_lengths: Transitions of each episode, shape (E,), adding up to N.
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
        for key, rows in self.parts.items():
            if rows.ndim < 2 or len(rows) == 0:
                raise ValueError(f"{part_name(key)} must have the shape (transitions, size), not {rows.shape}.")
        n = len(self)
        for key, rows in self.parts.items():
            if len(rows) != n:
                raise ValueError(f"{part_name(key)} has {len(rows)} rows, but {part_name(next(iter(self.parts)))} has {n}.")
            _check_finite(part_name(key), rows)
        if self.actions.ndim != 2:
            raise ValueError(f"actions must have the shape (transitions, size), not {self.actions.shape}.")
        for name in ("actions", "rewards", "terminals", "truncations"):
            values = getattr(self, name)
            if values is not None and (values.ndim == 0 or values.dtype.kind not in "fiub"):
                raise ValueError(f"{name} must be numbers, one per transition, not {values.dtype} of shape {values.shape}.")
            if values is not None and len(values) != n:
                raise ValueError(f"{name} has {len(values)} rows, but observations has {n}: there must be one per transition.")
        lengths = self.traj_lengths
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 1).any():
            raise ValueError(f"traj_lengths must be positive integers, one per episode, not {lengths!r}.")
        # One beyond n could make their sum overflow.
        if lengths.max(initial=0) > n or lengths.sum() != n:
            raise ValueError(f"traj_lengths adds up to {lengths.sum()} transitions, but observations has {n}.")
        _check_finite("actions", self.actions)
        if self.rewards is not None:
            _check_finite("rewards", self.rewards)

    def __len__(self) -> int:
        return batch_size_of(self.observations)

    @property
    def parts(self) -> dict[str, Rows]:
        """
        :return: Observations by key, under the empty key if they are a single array.
        """
        return self.observations if isinstance(self.observations, dict) else {"": self.observations}

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
            observations=take(self.observations, slice(n)),
            actions=self.actions[:n],
            traj_lengths=self.traj_lengths[:n_episodes],
            rewards=None if self.rewards is None else self.rewards[:n],
            terminals=None if self.terminals is None else self.terminals[:n],
            env_id=self.env_id,
            truncations=None if self.truncations is None else self.truncations[:n],
        )

    def save(self, path: str | Path) -> None:
        """
        Write an .npz file that :func:`load_demonstrations` reads, or a local Minari dataset. In .npz, images are not
        compressed, so that they can be read row by row. Minari also wants the observation after an episode's last action,
        which is not known here: the last one is repeated. Unknown rewards are 0 there, and unknown ends truncations.

        :param path: Where; folders that don't exist are made. Or "minari:" and the id of a new dataset.
        :raises ValueError: for another name, or a dataset that exists.
        :raises ImportError: if Minari is needed and not installed.
        """
        _check_output(path)
        if str(path).startswith("minari:"):
            parts: dict[str, spaces.Space] = {key: _space_of(rows) for key, rows in self.parts.items()}
            space = parts[""] if "" in parts else spaces.Dict(parts)
            write_minari(str(path), self._minari_episodes(), self.env_id, space, self.actions.shape[1])
            return
        path = Path(path)
        # "units" tells them from normalised files, whose values look alike.
        meta = dict(units="env") if self.env_id is None else dict(units="env", env_id=self.env_id)
        if isinstance(self.observations, dict):
            arrays = {f"obs/{key}": rows for key, rows in self.observations.items()}
        else:
            arrays = {"images" if is_image(self.observations) else "states": self.observations}
        arrays |= dict(actions=self.actions, traj_lengths=self.traj_lengths, meta=np.array(json.dumps(meta)))
        for name in ("rewards", "terminals", "truncations"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        write_npz(path, arrays)

    def _minari_episodes(self) -> Iterator[dict[str, Any]]:
        """
        :return: Fields of Minari's ``EpisodeBuffer``, of one episode after the other.
        """
        for start, length in zip(self.starts, self.traj_lengths, strict=True):
            rows = slice(start, start + length)
            truncations = np.zeros(length, dtype=bool) if self.truncations is None else self.truncations[rows].astype(bool)
            terminations = np.zeros(length, dtype=bool) if self.terminals is None else self.terminals[rows].astype(bool)
            # An episode has an end in Minari.
            truncations[-1] |= not terminations[-1]
            yield dict(
                observations=take(self.observations, np.minimum(np.arange(start, start + length + 1), start + length - 1)),
                actions=self.actions[rows],
                rewards=np.zeros(length) if self.rewards is None else self.rewards[rows],
                terminations=terminations,
                truncations=truncations,
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
    :param rows: Observations, shape (N, ...).
    :return: The axis along which ``VecFrameStack`` stacks them: that of the channels of images, of which there are fewer than
        rows and columns of pixels, and else the last.
    """
    return 1 if is_image(rows) and np.argmin(rows.shape[1:]) == 0 else -1


def _check_finite(name: str, values: Rows) -> None:
    """
    :param name: What an error calls them.
    :param values: One row per transition.
    :raises ValueError: if a value is NaN or infinite.
    """
    if values.dtype.kind != "f":
        return
    finite = np.isfinite(np.asarray(values)).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name} is NaN or infinite in transition {int(finite.argmin())}: remove its episode.")


def load_demonstrations(
    source: "str | Path | Sequence[Any] | MinariDataset",
    normalization: str | Path | None = None,
    *,
    obs_keys: Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
    filter_key: str | None = None,
) -> Demonstrations:
    """
    Read demonstrations.

    An .npz file holds ``states`` (N, Do), ``images`` (N, C, H, W) or (N, H, W, C) of bytes, or both, or for the keys of a
    ``Dict`` ``obs/KEY`` (N, ...); ``actions`` (N, Da) and ``traj_lengths`` (E,); optionally ``rewards`` (N,), ``terminals``
    (N,), ``truncations`` (N,) and ``meta``, a JSON string with an ``env_id``. The reference implementation's files hold
    normalised states and actions, with their ranges in a file ``normalization.npz``: it is used if it is passed, or if it lies
    beside a file whose values are all in [-1, 1] and whose ``meta`` does not have ``"units": "env"``, as that of
    :meth:`Demonstrations.save` has.

    Images are read from the file when they are used. Where that is not possible, in compressed .npz files and in Minari
    datasets, they are unpacked once into a temporary file, in the folder that the environment variable ``TMPDIR`` names.

    :param source: A bundled set ("hopper-medium", "metaworld-pick-place"), the path of an .npz file, of a robomimic file
        (.hdf5) or of a LeRobot folder (the one with ``meta`` and ``data`` in it), "minari:" and the id of a local Minari
        dataset, such a dataset, or a list of trajectories with the fields of `imitation`: ``obs`` (T + 1, ...), an array or a
        dictionary of them, ``acts`` (T, ...), optionally ``rews`` (T,) and ``terminal``.
    :param normalization: Path of an .npz with ``obs_min``, ``obs_max``, ``action_min`` and ``action_max``, for
        normalised files.
    :param obs_keys: Which of the file's observations make up the env's: a list of vectors, side by side in this order, which
        must be the env's, or a single image; for a ``Dict``, such names for each of its keys. Otherwise all vectors of a
        robomimic file, sorted by name, LeRobot's ``observation.state``, or all that there is under its own name.
    :param filter_key: For robomimic: name of the subset to read, one of those under ``mask`` in the file ("train").
    :return: The demonstrations, in the units of the env.
    :raises ValueError: for a source that can't be found or whose content does not fit together.
    :raises ImportError: if the package that reads it is not installed.
    """
    kind = _kind(source)
    for name, value, kinds, what in (
        ("normalization", normalization, ("npz",), "normalised .npz files"),
        ("filter_key", filter_key, ("robomimic",), "robomimic files"),
    ):
        if value is not None and kind not in kinds:
            shown = str(source) if isinstance(source, (str, Path)) else type(source).__name__
            raise ValueError(f"{name}={str(value)!r} is for {what}, not for source={shown!r}.")
    selection = None if obs_keys is None else selection_of(obs_keys)
    if kind == "trajectories":
        arguments = from_trajectories(source, selection)  # type: ignore[arg-type]
    elif kind == "minari":
        arguments = from_minari(source, selection)
    elif kind == "minari id":
        arguments = from_minari_id(str(source), selection)
    elif kind == "robomimic":
        arguments = from_robomimic(Path(source), selection, filter_key)  # type: ignore[arg-type]
    elif kind == "lerobot":
        arguments = from_lerobot(Path(source), selection)  # type: ignore[arg-type]
    else:
        path = BUNDLED / f"{source}.npz" if kind == "bundled" else Path(source)  # type: ignore[arg-type]
        arguments = from_npz(path, normalization, selection)
    return Demonstrations(**arguments)


def _kind(source: Any) -> str:
    """
    :param source: Source of demonstrations.
    :return: How to read it.
    """
    if not isinstance(source, (str, Path)):
        return "trajectories" if isinstance(source, Sequence) else "minari"
    path = Path(source)
    if str(source).startswith("minari:"):
        return "minari id"
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


# ---------------------------------------------------------------------- collecting


def collect_demonstrations(
    env: gym.Env, predict: Predict, n_episodes: int, seed: int | None = None, progress_bar: bool = True
) -> Demonstrations:
    """
    Record episodes of a policy. An interruption (Ctrl+C) keeps the episodes that are complete.

    :param env: The env, whose own observations are recorded, images as they are: with a ``Box`` of actions and observations
        of numbers, or a ``Dict`` of such ones.
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
    if not isinstance(env.action_space, spaces.Box):
        raise ValueError(f"Actions must be arrays of numbers, but the env's action space is {env.action_space}, not a Box.")
    for key, part in parts_of_space(env.observation_space).items():
        if not isinstance(part, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise ValueError(
                f"Observations must be arrays of numbers, or a Dict of these, but the env's {part_name(key)} are {part}: wrap "
                "it in gymnasium.wrappers.FlattenObservation, or make it a Dict."
            )
    observations = Recorder()
    columns: list[dict[str, list[Any]]] = []
    bar = tqdm(total=n_episodes, desc="collect", unit="episode", disable=not progress_bar)
    try:
        while len(columns) < n_episodes:
            episode_seed = None if seed is None else seed + len(columns)
            columns.append(_collect_episode(env, predict, episode_seed, observations))
            bar.update()
            bar.set_postfix({"return": f"{np.mean([np.sum(episode['rewards']) for episode in columns]):.2f}"})
    except KeyboardInterrupt:
        if not columns:
            raise
        print(f"Interrupted: keeping {len(columns)} complete episodes", file=sys.stderr)
    finally:
        bar.close()
    arrays = {name: np.concatenate([np.asarray(episode[name]) for episode in columns]) for name in columns[0]}
    return Demonstrations(
        observations=observations.observations(),
        actions=arrays["actions"].reshape(len(arrays["actions"]), -1),
        traj_lengths=np.array([len(episode["actions"]) for episode in columns]),
        rewards=arrays["rewards"].astype(np.float32),
        terminals=arrays["terminals"],
        env_id=None if env.spec is None else env.spec.id,
        truncations=arrays["truncations"],
    )


def _collect_episode(env: gym.Env, predict: Predict, seed: int | None, observations: Recorder) -> dict[str, list[Any]]:
    """
    :param env: The env.
    :param predict: The policy.
    :param seed: Seed of the reset.
    :param observations: Where to record the observations, at the end.
    :return: Its other columns, one entry per transition.
    """
    assert isinstance(env.action_space, spaces.Box)
    low, high = env.action_space.low, env.action_space.high
    episode: dict[str, list[Any]] = {name: [] for name in ("actions", "rewards", "terminals", "truncations")}
    seen: list[dict[str, np.ndarray]] = []
    obs, state, done = env.reset(seed=seed)[0], None, False
    while not done:
        action, state = predict(obs, state, np.array([not seen]))
        action = np.asarray(action)
        if action.shape != low.shape:
            raise ValueError(f"The policy's action has the shape {action.shape}, but the env's are of shape {low.shape}.")
        action = np.clip(action, low, high).astype(env.action_space.dtype)
        # Copies: an env may give the same array again.
        seen.append({key: np.array(value) for key, value in (obs if isinstance(obs, dict) else {"": obs}).items()})
        episode["actions"].append(np.array(action, dtype=np.float32))
        obs, reward, terminated, truncated, _ = env.step(action)
        episode["rewards"].append(float(reward))
        episode["terminals"].append(bool(terminated))
        episode["truncations"].append(bool(truncated))
        done = terminated or truncated
    observations.append({key: np.stack([part[key] for part in seen]) for key in seen[0]})
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
    # As the model's own env was wrapped: with the channels of images first.
    check_for_correct_spaces(model._wrap_env(env, monitor_wrapper=False), model.observation_space, model.action_space)
    if seed is not None:
        model.set_random_seed(seed)
    if vec_normalize is not None and not Path(vec_normalize).is_file():
        raise ValueError(f"vec-normalize={vec_normalize!r} does not exist.")
    # What is recorded are the env's own observations; the model alone sees normalised ones.
    normalizer = None if vec_normalize is None else VecNormalize.load(vec_normalize, DummyVecEnv([lambda: env]))

    def predict(obs: Any, state: Any, episode_start: np.ndarray) -> tuple[np.ndarray, Any]:
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

SOURCES = "bundled set (hopper-medium), .npz file, robomimic file (.hdf5), LeRobot folder, or minari:ID of a Minari dataset"


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
    columns = {part_name(key): rows for key, rows in demonstrations.parts.items()}
    for name, rows in (columns | dict(actions=demonstrations.actions)).items():
        if is_image(rows):
            sample = rows[np.unique(np.linspace(0, n - 1, rows_at_once(rows.shape, rows.dtype)).astype(int))]
            lines.append(f"{name}, images of shape {rows.shape[1:]}, {rows.dtype}")
            lines.append(f"  {sample.min()} to {sample.max()}, mean {sample.mean():.1f}, in a sample of {len(sample)}")
            continue
        values = np.asarray(rows).reshape(n, -1)
        low, high = values.min(axis=0), values.max(axis=0)
        lines.append(f"{name}, {values.shape[1]} columns (min, max)")
        lines += [f"  {i:4d}  {low[i]:12.5g}  {high[i]:12.5g}" for i in range(values.shape[1])]
        constant += [f"{name}[{i}]" for i in np.flatnonzero(low == high)]
    lines.append(f"constant      {', '.join(constant) or 'none'}")
    return "\n".join(lines)


def _check_output(path: str | Path) -> None:
    """
    :param path: Where to write demonstrations.
    :raises ValueError: if that can't be.
    :raises ImportError: if Minari is needed and not installed.
    """
    if str(path).startswith("minari:"):
        check_new_minari_id(str(path))
    elif Path(path).suffix != ".npz":
        raise ValueError(f"path={str(path)!r} must end in .npz, or be 'minari:' and the id of a dataset.")


def _space_of(rows: Rows) -> spaces.Box:
    """
    :param rows: Observations, shape (N, ...).
    :return: A space that holds them.
    """
    if is_image(rows):
        return spaces.Box(0, 255, rows.shape[1:], np.uint8)
    return spaces.Box(-np.inf, np.inf, rows.shape[1:], np.float32)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """
    :param parser: A parser, to which to add the options of :func:`load_demonstrations`; see :func:`load_from_options`.
    """
    parser.add_argument("--normalization", help="ranges of a normalised .npz file")
    parser.add_argument(
        "--obs-keys",
        nargs="+",
        metavar="NAME",
        help="what makes up an observation: names in the file, laid side by side, or for a Dict KEY:NAME or KEY:NAME,NAME,…",
    )
    parser.add_argument("--filter-key", help="subset of a robomimic file")


def load_from_options(source: str, args: argparse.Namespace) -> Demonstrations:
    """
    :param source: See :func:`load_demonstrations`.
    :param args: Parsed arguments, of :func:`add_source_options` among others.
    :return: The demonstrations.
    :raises ValueError: as :func:`load_demonstrations`.
    :raises ImportError: as :func:`load_demonstrations`.
    """
    obs_keys = args.obs_keys
    if obs_keys is not None and any(":" in item for item in obs_keys):
        if not all(":" in item for item in obs_keys):
            raise ValueError(f"obs-keys={obs_keys} must be names only, or KEY:NAME for every key of a Dict.")
        obs_keys = {key: names.split(",") for key, _, names in (item.partition(":") for item in obs_keys)}
    return load_demonstrations(source, args.normalization, obs_keys=obs_keys, filter_key=args.filter_key)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sb3_dppo.demonstrations", description="Inspect, convert and collect demonstrations."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("path", help=SOURCES)
    add_source_options(source)
    commands.add_parser("inspect", parents=[source], help="print numbers, lengths, returns and ranges")
    convert = commands.add_parser("convert", parents=[source], help="write an .npz file")
    convert.add_argument("output", help=".npz file to write, or minari:ID")
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
    collect.add_argument("-o", "--output", required=True, help=".npz file to write, or minari:ID")
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
            _check_output(args.output)  # before the work, not after
        if args.command == "collect":
            env, predict = _env_and_policy(args)
        else:
            demonstrations = load_from_options(args.path, args)
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
