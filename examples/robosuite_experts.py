"""
Scripted experts for robosuite's Lift and Can, as noisy as people are, to record demonstrations of. In this folder:

    python -m sb3_dppo.demonstrations collect --env RobosuiteSparse/Lift --policy robosuite_experts:lift \\
        --successes-only --n-episodes 200 --seed 0 -o lift.npz

Needs `pip install '.[robosuite]'`.
"""

from collections.abc import Callable

import numpy as np
from robosuite.utils.transform_utils import quat2mat

OPEN, CLOSE = -1.0, 1.0
UP = np.array([0.0, 0.0, 1.0])
# Above the bin that the can belongs to, as far as the arm reaches with its hand downwards.
BIN = np.array([0.16, 0.36])


def yaw(quaternion: np.ndarray) -> float:
    """The angle about the vertical of a quaternion whose real part comes last."""
    x_axis = quat2mat(quaternion)[:, 0]
    return float(np.arctan2(x_axis[1], x_axis[0]))


def command(obs: np.ndarray, shift: np.ndarray, gripper: float, turn: float = 0.0) -> np.ndarray:
    """
    :param obs: Observation.
    :param shift: Where the hand should go from here, in metres, shape (3,). It will point downwards.
    :param gripper: ``OPEN`` or ``CLOSE``.
    :param turn: By how much it should turn about the vertical, in radians.
    :return: Action, shape (7,).
    """
    tilt = np.cross(quat2mat(obs[3:7])[:, 2], -UP)
    return np.clip([*(10 * shift), *(2 * tilt[:2]), 2 * (tilt[2] + turn), gripper], -1.0, 1.0)


def grasp_and_lift(obs: np.ndarray) -> np.ndarray:
    """Go above the cube, with fingers along its sides, and down, close the gripper and rise."""
    hand, opening, cube = obs[:3], obs[7] - obs[8], obs[9:12]
    shift = cube - hand
    distance = np.linalg.norm(shift[:2])
    # The nearest quarter of a turn will do.
    turn = (yaw(obs[12:16]) - yaw(obs[3:7]) + np.pi / 4) % (np.pi / 2) - np.pi / 4
    aligned = distance < 0.01 and abs(turn) < 0.1
    if distance > 0.03 or (shift[2] < -0.03 and not aligned):
        return command(obs, shift + 0.06 * UP, OPEN, turn)
    if shift[2] < -0.01:
        return command(obs, shift, OPEN, turn)
    rise = 0.1 if opening < 0.05 else 0.0
    return command(obs, rise * UP, CLOSE, turn)


def carry_to_bin(obs: np.ndarray) -> np.ndarray:
    """Grasp the can, raise it, carry it over its bin, let it fall and rise."""
    hand, opening, can = obs[:3], obs[7] - obs[8], obs[9:12]
    shift, to_bin = can - hand, BIN - can[:2]
    distance, missing = np.linalg.norm(shift[:2]), np.linalg.norm(to_bin)
    held = np.linalg.norm(shift) < 0.03 and opening < 0.06
    if missing < (0.04 if held else 0.08) and can[2] < 1.0:
        return command(obs, 0.1 * UP, OPEN)
    if held and missing < 0.03:
        return command(obs, np.zeros(3), OPEN)
    if held:
        rise = 1.02 - hand[2]
        return command(obs, np.array([*(to_bin if rise < 0.04 else np.zeros(2)), rise]), CLOSE)
    if distance > 0.03 or (shift[2] < -0.06 and distance > 0.015):
        return command(obs, shift + 0.12 * UP, OPEN)
    if shift[2] < -0.02:
        return command(obs, shift, OPEN)
    return command(obs, np.zeros(3), CLOSE)


class Noisy:
    """
    An expert with changing speed, pauses and a hand that is not steady.

    :param expert: From the observation to the action.
    :param scale: Std of the noise that is added to the motion, of which half the variance drifts.
    :param seed: Seed of the noise.
    """

    def __init__(self, expert: Callable[[np.ndarray], np.ndarray], scale: float = 0.2, seed: int = 0) -> None:
        self.expert = expert
        self.scale = scale
        self.rng = np.random.default_rng(seed)
        self.speed = 1.0
        self.drift = np.zeros(6)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        action = self.expert(obs)
        if self.rng.random() < 0.05:
            self.speed = 0.0 if self.rng.random() < 0.1 else self.rng.uniform(0.5, 1.0)
        keep = 0.9
        self.drift = keep * self.drift + np.sqrt(1 - keep**2) * self.rng.standard_normal(6)
        noise = self.scale * np.sqrt(0.5) * (self.drift + self.rng.standard_normal(6))
        noise[3:] /= 4
        action[:6] = self.speed * action[:6] + noise
        return action


lift = Noisy(grasp_and_lift)
can = Noisy(carry_to_bin)
