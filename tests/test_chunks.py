"""The queue of actions that are still to be executed."""

import numpy as np
import pytest
from gymnasium import spaces

from sb3_dppo.chunks import ChunkQueue

SPACE = spaces.Box(-1, 1, (2,), dtype=np.float64)


def chunks(n: int, first: float) -> np.ndarray:
    """
    :return: Chunks of four actions that count up.
    """
    return first + np.arange(4)[None, :, None] + np.zeros((n, 4, 2))


def test_actions_come_one_by_one_and_new_chunks_replace_old_ones() -> None:
    queue = ChunkQueue(3, 2, SPACE)
    assert len(queue) == 3 and queue.empty.all()
    queue.put(np.array([True, True, True]), chunks(3, 0))
    assert not queue.empty.any()
    np.testing.assert_array_equal(queue.pop(), np.zeros((3, 2)))
    queue.put(np.array([False, True, False]), chunks(1, 10))
    np.testing.assert_array_equal(queue.pop()[:, 0], [1, 10, 1])
    assert queue.empty.tolist() == [True, False, True]
    assert queue.chunks.dtype == np.float64


def test_a_restored_queue_is_independent() -> None:
    queue = ChunkQueue(1, 2, SPACE)
    queue.put(np.array([True]), chunks(1, 5))
    restored = ChunkQueue(1, 2, SPACE)
    restored.restore(queue.state)
    assert restored.pop()[0, 0] == 5
    restored.put(np.array([True]), chunks(1, 7))
    assert queue.pop()[0, 0] == 5
    with pytest.raises(ValueError, match="state is of 1 envs, but observation of 2: pass state=None"):
        ChunkQueue(2, 2, SPACE).restore(queue.state)
    with pytest.raises(ValueError, match=r"state is of chunks of shape \(2, 2\), but this policy's of \(3, 2\)"):
        ChunkQueue(1, 3, SPACE).restore(queue.state)
