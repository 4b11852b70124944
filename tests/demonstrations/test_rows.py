"""Arrays on disk."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from sb3_dppo.demonstrations.rows import EpisodeRows
from tests.demonstrations.files import IMAGES, LENGTHS, N, assert_same


def test_rows_of_episodes_are_indexed_as_an_array(tmp_path: Path) -> None:
    parts = np.split(IMAGES, np.cumsum(LENGTHS)[:-1])
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for episodes in (parts, [file.create_dataset(str(i), data=part, compression="gzip") for i, part in enumerate(parts)]):
            rows = EpisodeRows(episodes)
            assert_same(rows, IMAGES)
            for index in (np.arange(N)[::-1], IMAGES[:, 0, 0, 0] > 99, np.array([], dtype=int), np.int64(4), -1):
                np.testing.assert_array_equal(rows[index], IMAGES[index])
            for part in (slice(None), slice(3, 10), slice(6, None, 2)):
                assert isinstance(rows[part], EpisodeRows)
                np.testing.assert_array_equal(rows[part][np.arange(2)], IMAGES[part][:2])
    with pytest.raises(IndexError):
        rows[np.array([N])]
