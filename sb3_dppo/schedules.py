"""Numbers that change with the progress of training."""

import math
from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule

DECAYS = ("constant", "linear", "cosine", "cooldown")
# The last part of a run, in which learning rates cool down.
COOLDOWN = 1 / 3


@dataclass(frozen=True)
class DecaySchedule:
    """
    A number that first rises linearly from zero and then goes to zero, or stays.

    :param value: The number, or a function of the progress remaining, from 1 to 0
    :param decay: "constant", or along which curve a factor of it goes to zero: "linear" or "cosine". "cooldown" is none here:
        see :func:`cooldown`.
    :param warmup: Fraction of training in which it rises
    :raises ValueError: for another decay or fraction, under the names that they have in DPPO
    """

    value: float | Schedule
    decay: str = "constant"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ValueError(f"lr_decay={self.decay!r} is unknown: choose one of {list(DECAYS)}.")
        if not isinstance(self.warmup, (int, float)) or not 0 <= self.warmup < 1:
            raise ValueError(f"lr_warmup={self.warmup!r} must be at least 0 and below 1: it is a fraction of training.")

    def __call__(self, progress_remaining: float) -> float:
        value = self.value(progress_remaining) if callable(self.value) else self.value
        done = 1.0 - progress_remaining
        if done < self.warmup:
            return done / self.warmup * value
        remaining = (1.0 - done) / (1.0 - self.warmup)
        factors = dict(linear=remaining, cosine=0.5 * (1.0 - math.cos(math.pi * remaining)))
        return factors.get(self.decay, 1.0) * value


def cooldown(remaining: float) -> float:
    """
    :param remaining: What remains of a run, from 1 to 0.
    :return: A factor that stays 1 and goes to zero linearly over the last third.
    """
    return min(1.0, remaining / COOLDOWN)


def make_schedule(name: str, value: Any, decay: str = "constant", warmup: float = 0.0) -> FloatSchedule:
    """
    :param name: Name of the argument, for the error.
    :param value: A number, also as a string as YAML reads "1e-4", a function of the progress remaining, or "lin_" followed by
        the number that goes to zero linearly.
    :param decay: See :class:`DecaySchedule`; it acts on what ``value`` gives.
    :param warmup: Likewise.
    :return: A function of the progress remaining, from 1 to 0.
    :raises ValueError: for a value that is none of these.
    """
    try:
        if isinstance(value, str):
            number = float(value.removeprefix("lin_"))
            value = DecaySchedule(number, "linear") if value.startswith("lin_") else number
        elif isinstance(value, bool) or not (isinstance(value, (int, float)) or callable(value)):
            raise ValueError
    except ValueError:
        kinds = "a number, 'lin_NUMBER' or a function of the progress remaining"
        raise ValueError(f"{name}={value!r} is not a schedule: use {kinds}.") from None
    return FloatSchedule(value if (decay, warmup) == ("constant", 0.0) else DecaySchedule(value, decay, warmup))
