"""
The manipulation tasks behind robomimic with sparse success, as Gymnasium envs ``RobosuiteSparse/<task>``.

The ids are registered when ``sb3_dppo`` is imported. robosuite itself is imported when such an env is made.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

# Steps per second of the controller.
CONTROL_FREQUENCY = 20


@dataclass(frozen=True)
class Task:
    """
    A task of robosuite.

    :param env_name: Its name there.
    :param body: What its object's observations are called there.
    :param max_episode_steps: Steps after which an episode is truncated, as in Ren et al. 2024.
    """

    env_name: str
    body: str
    max_episode_steps: int


TASKS = {
    "Lift": Task("Lift", "cube", 300),
    "Can": Task("PickPlaceCan", "Can", 300),
    "Square": Task("NutAssemblySquare", "SquareNut", 400),
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """
    Inside, NumPy's global generator begins with a seed; after it, it goes on where it was. robosuite places robots and objects
    by that generator, whatever seed it is given.

    :param seed: Seed.
    """
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


class RobosuiteEnv(gym.Env):
    """
    A task for a Panda arm with reward 1 and the end of the episode on success, and reward 0 until then. ``info["is_success"]``
    says so, too.

    Observations, without cameras, in the order of robomimic's low-dimensional ones, so that its files fit: position (3) and
    quaternion (4) of the end effector, positions of the gripper's fingers (2), position (3) and quaternion (4) of the object
    and, for Lift, the end effector's position less the object's (3), else position and quaternion of the object relative to
    the end effector (7). Quaternions end with the real part. With cameras: a ``Dict`` of one image per camera,
    (height, width, 3), and "state", the first nine of these numbers.

    Actions (7,) in [-1, 1]: a shift and a rotation of the end effector by operational-space control at 20 Hz, and the gripper,
    which closes at 1. At each reset, robot and objects are placed anew by the generator that the seed of ``reset`` seeds.

    :param task: One of ``TASKS``.
    :param cameras: Names of cameras to observe, such as "agentview" and "robot0_eye_in_hand".
    :param height: Of their images and of those rendered.
    :param width: Likewise.
    :param render_mode: "rgb_array", what "agentview" sees, or ``None``.
    :raises ImportError: without robosuite, saying how to install it.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": CONTROL_FREQUENCY}  # noqa: RUF012

    def __init__(
        self,
        task: str,
        cameras: Sequence[str] = (),
        height: int = 84,
        width: int = 84,
        render_mode: str | None = None,
    ) -> None:
        try:
            import robosuite
        except ImportError as error:
            raise ImportError(
                f"RobosuiteSparse/{task} needs robosuite, which could not be imported ({error}): "
                "pip install 'sb3-dppo[robosuite]', in an environment of its own"
            ) from error

        # It names the controller's file at each construction.
        logging.getLogger("robosuite_logs").setLevel(logging.WARNING)
        self.task = TASKS[task]
        self.cameras = list(cameras)
        self.image_size = (height, width)
        self.render_mode = render_mode
        # The size of Lift's cube is drawn when the model is compiled: once, and the same one in every env.
        with seeded(0):
            self.simulator = robosuite.make(
                self.task.env_name,
                robots="Panda",
                control_freq=CONTROL_FREQUENCY,
                ignore_done=True,
                hard_reset=False,
                use_camera_obs=False,
                has_renderer=False,
                has_offscreen_renderer=bool(self.cameras) or render_mode is not None,
            )
            self._check_cameras()
            self.observation_space = _space(self._observation(self.simulator.reset()))
        low, high = self.simulator.action_spec
        self.action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32))

    def _check_cameras(self) -> None:
        known = list(self.simulator.sim.model.camera_names)
        for camera in self.cameras:
            if camera not in known:
                raise ValueError(f"cameras={self.cameras}: {camera!r} is not in the scene; it has {', '.join(known)}.")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        with seeded(int(self.np_random.integers(2**32))):
            sensed = self.simulator.reset()
        return self._observation(sensed), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        sensed = self.simulator.step(action)[0]
        success = bool(self.simulator._check_success())
        return self._observation(sensed), float(success), success, False, {"is_success": success}

    def _observation(self, sensed: dict[str, np.ndarray]) -> Any:
        names = ("eef_pos", "eef_quat", "gripper_qpos")
        state = np.concatenate([sensed[f"robot0_{name}"] for name in names]).astype(np.float32)
        if self.cameras:
            return {camera: self._image(camera) for camera in self.cameras} | {"state": state}
        return np.concatenate([state, self._object(sensed)]).astype(np.float32)

    def _object(self, sensed: dict[str, np.ndarray]) -> np.ndarray:
        """
        As in robosuite up to 1.4, of which robomimic's files are. Later versions have another order, the opposite sign for
        Lift, and a relative pose that is zero at first and one step late then.
        """
        from robosuite.utils import transform_utils

        pose, gripper = ((sensed[f"{name}_pos"], sensed[f"{name}_quat"]) for name in (self.task.body, "robot0_eef"))
        if self.task.env_name == "Lift":
            return np.concatenate([*pose, gripper[0] - pose[0]])
        to_gripper = transform_utils.pose_inv(transform_utils.pose2mat(gripper))
        relative = transform_utils.pose_in_A_to_pose_in_B(transform_utils.pose2mat(pose), to_gripper)
        return np.concatenate([*pose, *transform_utils.mat2pose(relative)])

    def _image(self, camera: str) -> np.ndarray:
        height, width = self.image_size
        # OpenGL's first row is the lowest.
        return self.simulator.sim.render(camera_name=camera, height=height, width=width)[::-1].copy()

    def render(self) -> Any:
        return self._image("agentview") if self.render_mode is not None else None

    def close(self) -> None:
        self.simulator.close()


def _space(observed: Any) -> spaces.Space:
    """The space that such an observation is of."""
    if isinstance(observed, dict):
        return spaces.Dict({key: _space(value) for key, value in observed.items()})
    if observed.dtype == np.uint8:
        return spaces.Box(0, 255, observed.shape, np.uint8)
    return spaces.Box(-np.inf, np.inf, observed.shape, np.float32)


def register_robosuite_envs() -> None:
    """Make Gymnasium know ``RobosuiteSparse/<task>`` for all tasks."""
    for name, task in TASKS.items():
        gym.register(
            f"RobosuiteSparse/{name}",
            entry_point="sb3_dppo.envs.robosuite:RobosuiteEnv",
            max_episode_steps=task.max_episode_steps,
            kwargs=dict(task=name),
        )
