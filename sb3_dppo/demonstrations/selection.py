"""Which of a file's observations make up the env's: what the user calls ``obs_keys``."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sb3_dppo.demonstrations.rows import is_image

# ``obs_keys`` in full: the names in the file whose values make up each key of an observation, which is a single array under
# the empty key.
Selection = dict[str, list[str]]


def selection_of(obs_keys: Sequence[str] | Mapping[str, str | Sequence[str]]) -> Selection:
    """The same in full."""
    chosen = dict(obs_keys) if isinstance(obs_keys, Mapping) else {"": obs_keys}
    full = {key: [names] if key and isinstance(names, str) else names for key, names in chosen.items()}
    if not full or any(isinstance(names, str) or len(names) == 0 for names in full.values()):
        raise ValueError(
            f"obs_keys={obs_keys!r} must be a list with at least one name, or a dictionary of them, such as "
            "dict(rgb='agentview_image', state=['object', 'robot0_eef_pos'])."
        )
    return {key: list(names) for key, names in full.items()}


def check_selection(selection: Selection | None, names: Iterable[str], where: Any) -> None:
    """Refuse a selection of names that are not there; the empty name is that of a single array."""
    if selection is None:
        return
    if "" in names:
        raise ValueError(f"obs_keys={selection} can't choose from {where}, whose observations are not a Dict: leave it out.")
    missing = [name for chosen in selection.values() for name in chosen if name not in names]
    if missing:
        raise ValueError(f"obs_keys names {missing}, but {where} has the observations {sorted(names)}.")


def select(parts: Mapping[str, Any], selection: Selection | None, where: Any) -> Any:
    """Observations as ``Demonstrations`` takes them: a single array, or a dictionary of arrays."""
    check_selection(selection, parts, where)
    parts = {name: as_part(values) for name, values in parts.items()}
    chosen = dict(parts) if selection is None else {}
    for key, names in (selection or {}).items():
        other = [name for name in names if parts[name].ndim != 2]
        if other and len(names) > 1:
            raise ValueError(
                f"obs_keys lays {names} side by side, but {other[0]!r} has the shape {parts[other[0]].shape[1:]}, and only "
                f"vectors can be: give it a key of its own, as in obs_keys=dict(image={other[0]!r}, …)."
            )
        chosen[key] = parts[names[0]] if len(names) == 1 else np.concatenate([parts[name] for name in names], axis=1)
    return chosen[""] if "" in chosen else chosen


def as_part(values: Any) -> Any:
    """Observations under one name: images as they are, anything else as float32 with at least one column."""
    if is_image(values):
        return values
    return values.astype(np.float32, copy=False).reshape(len(values), *(values.shape[1:] or (1,)))
