"""Whether demonstrations are of an env: their observations and actions beside its spaces."""

import math
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

from sb3_dppo.demonstrations.demonstrations import Demonstrations, stacking_axis
from sb3_dppo.demonstrations.rows import Rows, is_image
from sb3_dppo.features.observations import part_name, parts_of_space


def match_observations(
    demonstrations: Demonstrations, observation_space: spaces.Space, n_stack: int | None
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """
    :param demonstrations: Demonstrations.
    :param observation_space: The model's space of observations.
    :param n_stack: Frames that the model's env stacks, ``None`` for as many of the demonstrations' as make up the model's.
    :return: How many frames are stacked, and by key the axes of the demonstrations' observations in the order of the space.
    :raises ValueError: if the demonstrations can't be of that space.
    """
    parts, env_parts = demonstrations.parts, parts_of_space(observation_space)
    missing = [key for key in env_parts if key not in parts]
    if missing:
        have = "a single array" if "" in parts else f"a Dict of {sorted(parts)}"
        wanted = "a single array" if missing == [""] else f"a Dict of {sorted(env_parts)}"
        example = "['NAME']" if missing == [""] else f"{{{', '.join(f'{key!r}: NAME' for key in env_parts)}}}"
        raise ValueError(
            f"demonstrations have as observations {have}, but the model's env {wanted}"
            f"{'' if missing == [''] else f', so that {missing} are missing'}: choose with load_demonstrations' obs_keys, "
            f"such as {example}."
        )
    if n_stack is None:
        key, space = next(iter(env_parts.items()))
        n_stack = max(1, math.prod(space.shape or ()) // math.prod(parts[key].shape[1:]))
    return n_stack, {key: _matching_axes(part_name(key), parts[key], space, n_stack) for key, space in env_parts.items()}


def check_actions(demonstrations: Demonstrations, action_space: spaces.Box) -> None:
    """
    :param demonstrations: Demonstrations.
    :param action_space: The model's space of actions.
    :raises ValueError: if the demonstrations' actions are of another size, or outside the bounds.
    """
    actions, low, high = demonstrations.actions, action_space.low.flatten(), action_space.high.flatten()
    if actions.shape[1] != len(low):
        raise ValueError(
            f"demonstrations have actions of size {actions.shape[1]}, but the model's env has {len(low)}: they are of another "
            "env."
        )
    slack = 1e-3 * (high - low)
    outside = ((actions < low - slack) | (actions > high + slack)).any(axis=1)
    if outside.any():
        raise ValueError(
            f"demonstrations have {outside.sum()} actions outside the bounds of the model's env, the first in transition "
            f"{outside.argmax()}: they are of another env, or normalised (see load_demonstrations' normalization)."
        )


def _matching_axes(name: str, rows: Rows, space: spaces.Space, n_stack: int) -> tuple[int, ...]:
    """The axes of a row in the order of the space: images may have their channels first or last."""
    if not isinstance(space, spaces.Box):
        _check_categories(name, np.asarray(rows), space)
        return tuple(range(rows.ndim - 1))
    if is_image_space(space) != is_image(rows):
        of_demonstrations = "images (uint8)" if is_image(rows) else f"numbers ({rows.dtype}) of shape {rows.shape[1:]}"
        of_env = "images (uint8, 0 to 255)" if is_image_space(space) else f"numbers ({space.dtype})"
        raise ValueError(
            f"demonstrations have {name} that are {of_demonstrations}, but the model's env has {of_env} of shape "
            f"{space.shape}."
        )
    stacked = list(rows.shape)
    stacked[stacking_axis(rows)] *= n_stack
    orders = [(0, 1, 2), (2, 0, 1), (1, 2, 0)] if is_image(rows) else [tuple(range(rows.ndim - 1))]
    for axes in orders:
        if tuple(stacked[1 + axis] for axis in axes) == space.shape:
            return axes
    hint = ""
    if is_image(rows):
        hint = ". Channels may be first or last, but the size must be the same: see gymnasium.wrappers.ResizeObservation"
    raise ValueError(
        f"demonstrations have {name} of shape {rows.shape[1:]}, but the model's env has {space.shape}, {n_stack} frame(s): "
        f"they are of another env{hint}."
    )


def _check_categories(name: str, values: np.ndarray, space: spaces.Space) -> None:
    """Refuse what is not of the shape of a ``Discrete``, ``MultiDiscrete`` or ``MultiBinary``, or no numbers of categories."""
    n_categories: Any = space.n if isinstance(space, spaces.Discrete) else getattr(space, "nvec", 2)
    if values.shape[1:] != (space.shape or (1,)):
        raise ValueError(f"demonstrations have {name} of shape {values.shape[1:]}, but the model's env has {space}.")
    if ((values % 1 != 0) | (values < 0) | (values >= n_categories)).any():
        raise ValueError(f"demonstrations have {name} from {values.min()} to {values.max()}, but the model's env has {space}.")
