"""Episodes that are read or recorded one after the other, and put together at the end."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_dppo.demonstrations.rows import EpisodeRows, Rows, TemporaryImages, is_image
from sb3_dppo.demonstrations.selection import Selection, as_part, select
from sb3_dppo.features.observations import part_name, parts_of_space


class Episodes:
    """
    Columns of episodes: vectors are kept in memory, images stay where they are.

    :param unpack_images: Whether images go into a temporary file instead.
    """

    def __init__(self, unpack_images: bool = False) -> None:
        self.lengths: list[int] = []
        self.n_bytes = 0  # in memory
        self._unpack_images = unpack_images
        self._images: dict[str, TemporaryImages] = {}
        self._columns: dict[str, list[Any]] = {}

    def append(self, columns: Mapping[str, Any], where: str = "") -> None:
        """
        :param columns: An episode's arrays or HDF5 datasets by name, shape (T, ...): first its actions, then observations,
            whose names begin with "obs/" and go on with their key, and others with one value per transition, ``None`` where
            they are not known.
        :param where: What errors put before a name.
        :raises ValueError: if they don't fit together, or don't fit to the episodes before.
        """
        n = 0
        for name, values in columns.items():
            before = self._columns.setdefault(name, [])
            if values is not None:
                values = _as_rows(name, values, n, before, where)
                n = n or len(values)
                if not is_image(values):
                    self.n_bytes += values.nbytes
                elif self._unpack_images:
                    self._images.setdefault(name, TemporaryImages(values.shape[1:])).write(np.ascontiguousarray(values).data)
                    values = values[:0]
            before.append(values)
        self.lengths.append(n)

    def column(self, name: str, dtype: Any = None) -> Any:
        """A column of all episodes, shape (N, ...), or ``None`` if it is not known of all of them."""
        values = self._columns.get(name, [])[: len(self.lengths)]  # An interruption may have left a part of another one.
        if not values or any(part is None for part in values):
            return None
        if name in self._images:
            return self._images[name].array(sum(self.lengths))
        if name.startswith("obs/") and is_image(values[0]):
            return EpisodeRows(values)
        return np.concatenate(values, dtype=dtype)

    def observations(self, selection: Selection | None = None, where: Any = None) -> Rows | dict[str, Rows]:
        """Observations of all episodes, as ``Demonstrations`` takes them."""
        parts = {name[len("obs/") :]: self.column(name) for name in self._columns if name.startswith("obs/")}
        return select(parts, selection, where)


def _as_rows(name: str, values: Any, n: int, before: list[Any], where: str) -> Any:
    """What an episode of n transitions has in a column: images as they are, else numbers, as float32 what was seen or done."""
    shown, dtype = f"{where}{name.rstrip('/')}", getattr(values, "dtype", type(values).__name__)
    if not isinstance(dtype, np.dtype) or dtype.kind not in "fiub" or values.ndim == 0:
        raise ValueError(f"{shown} must be numbers, one row per transition, not {dtype}.")
    if len(values) == 0 or len(values) != (n or len(values)):
        raise ValueError(f"{shown} has {len(values)} rows, not {n or 'at least one'}, one per action.")
    if not name.startswith("obs/"):
        values = values[()].reshape(len(values), -1)
        if n > 0 and values.shape[1] != 1:
            raise ValueError(f"{shown} has {values.shape[1]} columns, not one.")
        values = values[:, 0] if n > 0 else values.astype(np.float32)
    elif not is_image(values):
        values = as_part(values[()])
    first = next((earlier for earlier in before if earlier is not None), values)
    if values.shape[1:] != first.shape[1:] or is_image(values) != is_image(first):
        raise ValueError(
            f"{shown} has rows of shape {values.shape[1:]} and dtype {values.dtype}, but {first.shape[1:]} and {first.dtype} "
            "in other episodes."
        )
    return values


def check_recordable(observation_space: spaces.Space, of: str) -> None:
    """Refuse a space of observations that are neither arrays of numbers nor a ``Dict`` of these."""
    for key, part in parts_of_space(observation_space).items():
        if not isinstance(part, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise ValueError(
                f"Observations must be arrays of numbers, or a Dict of these, but {of}'s {part_name(key)} are {part}: wrap it "
                "in gymnasium.wrappers.FlattenObservation, or make it a Dict."
            )
