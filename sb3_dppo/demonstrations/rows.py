"""Arrays on disk: images of demonstrations, of which only the rows that are asked for are read."""

import math
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

# What is read or written at once, in bytes.
PIECE = 2**22
# Bytes that a byte of a file can become, more than which is a trap: 1032 is the limit of deflate.
MAX_COMPRESSION = 1100


class EpisodeRows:
    """
    The rows of several arrays, one after the other. As with an array of NumPy, a slice is a view and numbers of rows give a
    copy: only then is anything read.

    :param episodes: Arrays, memory-mapped ones or HDF5 datasets, shape (T, *shape), of one dtype.
    :param index: Which of the rows, ``None`` for all.
    :raises ValueError: when rows are asked for that can't be read.
    """

    def __init__(self, episodes: Sequence[Any], index: np.ndarray | None = None) -> None:
        self._episodes = episodes
        self._ends = np.cumsum([len(episode) for episode in episodes])
        self._index = np.arange(self._ends[-1]) if index is None else index
        self.shape: tuple[int, ...] = (len(self._index), *episodes[0].shape[1:])
        self.dtype: np.dtype = episodes[0].dtype
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return EpisodeRows(self._episodes, self._index[index])
        rows = np.atleast_1d(self._index[index])
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        episode_of = np.searchsorted(self._ends, rows, side="right")
        for i in np.unique(episode_of):
            where, episode = np.flatnonzero(episode_of == i), self._episodes[i]
            # HDF5 wants rows in ascending order, each once, and is much faster with a slice.
            inside, inverse = np.unique(rows[where] - (self._ends[i] - len(episode)), return_inverse=True)
            is_range = inside[-1] - inside[0] + 1 == len(inside)
            try:
                values[where] = episode[slice(inside[0], inside[-1] + 1) if is_range else inside][inverse]
            except (OSError, RuntimeError) as error:
                raise ValueError(f"images can't be read from their file, which is damaged ({error}).") from error
        return values if np.ndim(index) > 0 else values[0]


# One entry of an observation, of all transitions.
Rows = np.ndarray | EpisodeRows


def is_image(rows: Any) -> bool:
    """Whether values of shape (N, ...) are images: bytes, with three dimensions each."""
    return rows.dtype == np.uint8 and rows.ndim == 4


def rows_at_once(rows: Rows) -> int:
    """How many rows of an array make up a few megabytes."""
    return max(1, PIECE // max(1, math.prod(rows.shape[1:]) * rows.dtype.itemsize))


class TemporaryImages:
    """
    Images written one after the other to a temporary file, for what can't be read row by row where it is. The file has no name
    and vanishes with the last array of it, also after a crash. The environment variable ``TMPDIR`` chooses its folder.

    :param shape: Shape of an image.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._file = tempfile.TemporaryFile(prefix="sb3_dppo_")
        self._shape = shape

    def write(self, images: bytes | memoryview) -> None:
        """Append images, given as their bytes; an ``OSError`` says where if the disk is full."""
        try:
            self._file.write(images)
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"images can't be written to a temporary file in {tempfile.gettempdir()} ({error}): name another folder in "
                "the environment variable TMPDIR."
            ) from error

    def array(self, n: int) -> np.ndarray:
        """The first n images, memory-mapped, shape (n, *shape)."""
        return np.memmap(self._file, np.uint8, "r", shape=(n, *self._shape))
