"""Numbers that change with the progress of training."""

import pickle
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.utils import FloatSchedule

from sb3_dppo.schedules import make_schedule

DONE = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    "value,decay,warmup,expected",
    [
        (2.0, "constant", 0.0, [2, 2, 2, 2, 2, 2]),
        ("2e0", "constant", 0.0, [2, 2, 2, 2, 2, 2]),
        (FloatSchedule(2), "constant", 0.0, [2, 2, 2, 2, 2, 2]),
        ("lin_2", "constant", 0.0, [2, 1.75, 1.5, 1, 0.5, 0]),
        (lambda progress: progress**2, "constant", 0.0, [1, 0.875**2, 0.75**2, 0.25, 0.0625, 0]),
        (1.0, "constant", 0.25, [0, 0.5, 1, 1, 1, 1]),
        (1.0, "linear", 0.25, [0, 0.5, 1, 2 / 3, 1 / 3, 0]),
        (1.0, "cosine", 0.25, [0, 0.5, 1, 0.75, 0.25, 0]),
        ("lin_1", "linear", 0.0, [1, 0.875**2, 0.75**2, 0.25, 0.0625, 0]),
    ],
)
def test_values(value: Any, decay: str, warmup: float, expected: list[float]) -> None:
    schedule = make_schedule("learning_rate", value, decay, warmup)
    assert isinstance(schedule, FloatSchedule)
    np.testing.assert_allclose([schedule(1 - done) for done in DONE], expected, atol=1e-12)


def test_can_be_pickled() -> None:
    schedule = pickle.loads(pickle.dumps(make_schedule("learning_rate", "lin_2", "cosine", 0.1)))
    assert schedule(0.5) == make_schedule("learning_rate", "lin_2", "cosine", 0.1)(0.5)


@pytest.mark.parametrize("value", ["linear", "lin_", "exp_1", "", None, [1.0], True])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="learning_rate=.* is not a schedule: use a number, 'lin_NUMBER'"):
        make_schedule("learning_rate", value)


@pytest.mark.parametrize(
    "decay,warmup,message",
    [("cos", 0.0, "lr_decay='cos' is unknown"), ("linear", 1.0, "lr_warmup=1.0"), ("linear", -0.1, "lr_wa")],
)
def test_other_shapes_are_refused(decay: str, warmup: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule("learning_rate", 1.0, decay, warmup)
