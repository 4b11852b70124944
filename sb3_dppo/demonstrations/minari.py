"""Minari datasets, read and written."""

import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from tqdm import tqdm

from sb3_dppo.demonstrations.episodes import Episodes, check_recordable
from sb3_dppo.demonstrations.npz import bundled_demonstrations
from sb3_dppo.demonstrations.rows import Rows, is_image
from sb3_dppo.demonstrations.selection import Selection, check_selection
from sb3_dppo.features.observations import parts_of_space


def from_minari_id(dataset_id: str, selection: Selection | None) -> dict[str, Any]:
    name = dataset_id.removeprefix("minari:")
    others = f"neither a bundled set ({bundled_demonstrations()}), nor an .npz file, nor" if name == dataset_id else "not"
    try:
        import minari
    except ImportError as error:
        kind = ValueError if name == dataset_id else ImportError  # a name that may be no dataset's at all
        raise kind(
            f"source={dataset_id!r} is {others} a Minari dataset, which need `pip install sb3-dppo[minari]`."
        ) from error
    if name not in minari.list_local_datasets():
        raise ValueError(f"source={dataset_id!r} is {others} a local Minari dataset: get it with `minari download {name}`.")
    return from_minari(minari.load_dataset(name), selection)


def from_minari(dataset: Any, selection: Selection | None) -> dict[str, Any]:
    if not hasattr(dataset, "iterate_episodes"):
        raise TypeError(
            f"source must be a name, a path, a list of trajectories or a Minari dataset, not {type(dataset).__name__}."
        )
    check_recordable(dataset.observation_space, "the Minari dataset")
    check_selection(selection, parts_of_space(dataset.observation_space), "the Minari dataset")
    chosen = None if selection is None else {name for names in selection.values() for name in names}
    episodes = Episodes(unpack_images=True)
    # One at a time: episodes are decoded as a whole.
    for episode in tqdm(dataset.iterate_episodes(), desc="read", unit="episode", total=len(dataset), delay=1):
        parts = episode.observations if isinstance(episode.observations, dict) else {"": episode.observations}
        columns = dict(actions=episode.actions)
        # An episode also holds the observation after its last action.
        columns |= {f"obs/{key}": part[:-1] for key, part in parts.items() if chosen is None or key in chosen}
        columns |= {name: getattr(episode, name) for name in ("rewards", "terminations", "truncations")}
        episodes.append(columns, "the Minari dataset's ")
    if not episodes.lengths:
        raise ValueError("The Minari dataset holds no episodes.")
    return dict(
        observations=episodes.observations(selection, "the Minari dataset"),
        actions=episodes.column("actions"),
        traj_lengths=np.array(episodes.lengths),
        rewards=episodes.column("rewards"),
        terminals=episodes.column("terminations"),
        env_id=dataset.env_spec.id if dataset.env_spec is not None else None,
        truncations=episodes.column("truncations"),
    )


def write_minari(
    name: str, parts: Mapping[str, Rows], columns: Mapping[str, np.ndarray], traj_lengths: np.ndarray, env_id: str | None
) -> None:
    """Write a local Minari dataset, one episode at a time, of fields of ``Demonstrations``."""
    import minari
    from minari.data_collector import EpisodeBuffer

    part_spaces: dict[str, spaces.Space] = {
        key: spaces.Box(0, 255, rows.shape[1:], np.uint8) if is_image(rows) else spaces.Box(-np.inf, np.inf, rows.shape[1:])
        for key, rows in parts.items()
    }
    if env_id is not None and env_id not in gym.registry:
        warnings.warn(f"{name} won't say that it is of {env_id}, which is not registered: import its package.", stacklevel=4)
    n = len(columns["actions"])
    known: dict[str, np.ndarray] = dict(rewards=np.zeros(n), terminals=np.zeros(n), truncations=np.zeros(n)) | dict(columns)
    dataset, ends = None, np.cumsum(traj_lengths)
    for start, end in tqdm(list(zip(ends - traj_lengths, ends, strict=True)), desc="write", unit="episode", delay=1):
        # The observation after the last action is not known: the last one is repeated.
        observations = {key: rows[np.minimum(np.arange(start, end + 1), end - 1)] for key, rows in parts.items()}
        terminations, truncations = (known[name][start:end].astype(bool) for name in ("terminals", "truncations"))
        truncations[-1] |= not terminations[-1]  # An episode has an end in Minari.
        episode = EpisodeBuffer(
            observations=observations[""] if "" in parts else observations,
            actions=known["actions"][start:end],
            rewards=known["rewards"][start:end],
            terminations=terminations,
            truncations=truncations,
            infos={},
        )
        if dataset is not None:
            dataset.update_dataset_from_buffer([episode])
            continue
        dataset = minari.create_dataset_from_buffers(
            name,
            [episode],
            env=env_id if env_id in gym.registry else None,
            observation_space=part_spaces[""] if "" in parts else spaces.Dict(part_spaces),
            action_space=spaces.Box(-np.inf, np.inf, columns["actions"].shape[1:]),
            data_format="hdf5",
            jpeg_encoding=False,
        )


def check_new_minari_id(dataset_id: str) -> None:
    """Refuse an id, after "minari:", that Minari does not take or has already, before the work of making the dataset."""
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
