"""Arrays on disk: images of demonstrations, of which only the rows that are asked for are read."""

import math
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from sb3_dppo.runs.files import atomic_write

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


def is_image(rows: Rows) -> bool:
    """
    :param rows: Values, shape (N, ...).
    :return: Whether they are images: bytes, with three dimensions each.
    """
    return rows.dtype == np.uint8 and rows.ndim == 4


def pieces(rows: Rows) -> Iterator[np.ndarray]:
    """
    :param rows: Values, shape (N, ...).
    :return: Copies of them in order, a few megabytes at once.
    """
    size = rows_at_once(rows.shape, rows.dtype)
    for start in range(0, len(rows), size):
        yield rows[np.arange(start, min(start + size, len(rows)))]


def rows_at_once(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """
    :param shape: Shape of an array, (N, ...).
    :param dtype: Its type.
    :return: How many of its rows make up a few megabytes.
    """
    return max(1, PIECE // max(1, math.prod(shape[1:]) * dtype.itemsize))


class TemporaryRows:
    """
    Rows written one after the other to a temporary file, for what can't be read row by row where it is. The file has no name
    and vanishes with the last array of it, also after a crash. The environment variable ``TMPDIR`` chooses its folder.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="sb3_dppo_")
        self._n = 0
        self._first: np.ndarray | None = None

    def append(self, rows: np.ndarray) -> None:
        """
        :param rows: Shape (n, *shape), of the shape and dtype of those before.
        :raises ValueError: for others.
        :raises OSError: if the disk is full.
        """
        if self._first is None:
            self._first = rows[:0]
        if rows.shape[1:] != self._first.shape[1:] or rows.dtype != self._first.dtype:
            raise ValueError(
                f"observations of shape {rows.shape[1:]} and dtype {rows.dtype} come after others of shape "
                f"{self._first.shape[1:]} and dtype {self._first.dtype}."
            )
        try:
            self._file.write(np.ascontiguousarray(rows).data)
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"images can't be written to a temporary file in {tempfile.gettempdir()} ({error}): name another folder in "
                "the environment variable TMPDIR."
            ) from error
        self._n += len(rows)

    def array(self) -> np.ndarray:
        """
        :return: All rows, memory-mapped, shape (N, *shape).
        """
        assert self._first is not None
        return np.memmap(self._file, dtype=self._first.dtype, mode="r", shape=(self._n, *self._first.shape[1:]))


# ---------------------------------------------------------------------- .npz


def read_npz(path: Path, required: tuple[str, ...]) -> dict[str, np.ndarray]:
    """
    :param path: Path of an .npz file.
    :param required: Keys that it must have.
    :return: Its arrays: images memory-mapped, where they are compressed from a temporary copy, and all others read.
    :raises ValueError: for a file that can't be read, or that lacks a key.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > MAX_COMPRESSION * path.stat().st_size:
                raise ValueError("it holds more than its size allows")
            arrays = {
                info.filename[: -len(".npy")]: _read_member(path, archive, info)
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
    except Exception as error:  # zipfile and numpy raise almost anything for what they did not write.
        raise ValueError(f"{path} can't be read as .npz ({error}).") from error
    missing = [key for key in required if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {missing}; it holds {sorted(arrays)}.")
    return arrays


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(member)
        image = dtype == np.uint8 and len(shape) == 4 and min(shape) > 0 and not fortran_order
        if image and info.compress_type == zipfile.ZIP_STORED:
            if member.tell() + math.prod(shape) != info.file_size:
                raise ValueError(f"{info.filename} has {info.file_size} bytes, which is not what its shape {shape} needs")
            return np.memmap(path, dtype=dtype, mode="r", offset=_data_offset(path, info) + member.tell(), shape=shape)
        if image:
            return _unpack(f"{path.name}: {info.filename}", member, shape)
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """
    :param path: Path of a zip file.
    :param info: A member of it, which is not compressed.
    :return: Where its content begins in the file.
    """
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    # The sizes of the name and of the extra field, which may differ from those in the directory (APPNOTE.TXT, 4.3.7).
    name_size, extra_size = np.frombuffer(header, dtype="<u2", count=2, offset=26)
    return info.header_offset + 30 + int(name_size) + int(extra_size)


def _unpack(what: str, member: IO[bytes], shape: tuple[int, ...]) -> np.ndarray:
    """
    :param what: What to show beside the progress bar.
    :param member: Compressed images, at the first one.
    :param shape: Their shape.
    :return: The same from a temporary file.
    """
    rows, size, dtype = TemporaryRows(), math.prod(shape[1:]), np.dtype(np.uint8)
    step = rows_at_once(shape, dtype)
    with tqdm(total=shape[0], desc=f"unpacking {what}", unit="image") as bar:
        for start in range(0, shape[0], step):
            n = min(step, shape[0] - start)
            data = member.read(n * size)
            if len(data) != n * size:
                raise ValueError(f"{what} ends before its shape {shape} is full")
            rows.append(np.frombuffer(data, dtype=dtype).reshape(n, *shape[1:]))
            bar.update(n)
    return rows.array()


def write_npz(path: Path, arrays: dict[str, Rows]) -> None:
    """
    Write a file that :func:`read_npz` reads. Images are not compressed, so that they can be memory-mapped. An older file of
    that name is replaced at the end, so that it may be what is read.

    :param path: Where; folders that don't exist are made.
    :param arrays: The arrays.
    """
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, rows in arrays.items():
            info = zipfile.ZipInfo(name + ".npy")
            info.compress_type = zipfile.ZIP_STORED if is_image(rows) else zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=True) as member:
                _write_array(member, rows)


def _write_array(member: IO[bytes], rows: Rows) -> None:
    if not is_image(rows):
        np.lib.format.write_array(member, np.asarray(rows), allow_pickle=False)
        return
    header = dict(descr=np.lib.format.dtype_to_descr(rows.dtype), fortran_order=False, shape=rows.shape)
    np.lib.format.write_array_header_2_0(member, header)
    for piece in pieces(rows):
        member.write(piece.data)
