"""Trajectories with the fields of `imitation`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sb3_dppo.demonstrations.episodes import Episodes
from sb3_dppo.demonstrations.selection import Selection


def from_trajectories(trajectories: Sequence[Any], selection: Selection | None) -> dict[str, Any]:
    if len(trajectories) == 0:
        raise ValueError("source is an empty list: pass at least one trajectory.")
    episodes = Episodes()
    keys: set[str] = set()
    for i, trajectory in enumerate(trajectories):
        if not hasattr(trajectory, "obs") or not hasattr(trajectory, "acts"):
            raise ValueError(
                f"source[{i}] is a {type(trajectory).__name__} without obs or acts: a list must hold trajectories as "
                "`imitation` has them (obs, acts, rews, terminal)."
            )
        acts, obs = np.asarray(trajectory.acts), trajectory.obs
        rews, terminal = (getattr(trajectory, name, None) for name in ("rews", "terminal"))
        # A dict, or imitation's DictObs.
        parts = {key: np.asarray(values) for key, values in (obs.items() if hasattr(obs, "items") else [("", obs)])}
        keys = keys or set(parts)
        if keys != set(parts):
            raise ValueError(f"source[{i}] has the observations {sorted(parts)}, but source[0] {sorted(keys)}.")
        columns: dict[str, Any] = {"acts": acts}
        n = len(acts) if acts.ndim > 0 else 0
        for key, values in parts.items():
            if values.ndim > 0 and len(values) != n + 1:
                raise ValueError(
                    f"source[{i}] has {len(values)} obs and {n} acts: there must be one observation more than "
                    "actions, the one after the last."
                )
            columns[f"obs/{key}"] = values[:-1] if values.ndim > 0 else values
        columns["rews"] = None if rews is None else np.asarray(rews)
        columns["terminal"] = None if terminal is None else (np.arange(n) == n - 1) & bool(terminal)
        episodes.append(columns, f"source[{i}].")
    return dict(
        observations=episodes.observations(selection, "source"),
        actions=episodes.column("acts"),
        traj_lengths=np.array(episodes.lengths),
        rewards=episodes.column("rews", np.float32),
        terminals=episodes.column("terminal"),
    )
