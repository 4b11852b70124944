"""Spaces as JSON."""

import json

import numpy as np
from gymnasium import spaces

from sb3_dppo.runs.schema import read
from sb3_dppo.runs.spaces import Space, describe_space
from tests.runs.shared_folders import DICT


def test_bounds_of_spaces() -> None:
    for space in (
        spaces.Box(np.array([-np.inf, -1.1, 0]), np.array([np.inf, 2.2, 1e30]), dtype=np.float32),
        spaces.Box(-0.1, 0.1, (), np.float64),
        spaces.Box(-128, 127, (2, 3), np.int8),
        spaces.Box(np.finfo(np.float64).min, np.finfo(np.float64).max, (2,), np.float64),
        spaces.Discrete(4, start=-2),
        spaces.MultiDiscrete([3, 4], dtype=np.int32),  # type: ignore[arg-type]
        spaces.MultiBinary([2, 3]),
        DICT,
    ):
        encoded = json.loads(json.dumps(describe_space("space", space), allow_nan=False))
        decoded = read(Space, encoded)
        assert decoded == space
        if isinstance(space, spaces.Box) and isinstance(decoded, spaces.Box):
            assert decoded.dtype == space.dtype
            for bound in ("low", "high", "bounded_below", "bounded_above"):
                np.testing.assert_array_equal(getattr(decoded, bound), getattr(space, bound))
    assert len(json.dumps(describe_space("image", spaces.Box(0, 255, (1024, 1024, 3), np.uint8)))) < 100
