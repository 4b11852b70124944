"""
Manipulation with sparse success: the tasks of Meta-World v3 as Gymnasium envs ``MetaWorldSparse/<task>``.

The ids are registered when ``sb3_dppo`` is imported. Meta-World itself is imported when such an env is made.
"""

from typing import Any

import gymnasium as gym
import numpy as np

TASKS = """
assembly-v3 basketball-v3 bin-picking-v3 box-close-v3 button-press-topdown-v3 button-press-topdown-wall-v3 button-press-v3
button-press-wall-v3 coffee-button-v3 coffee-pull-v3 coffee-push-v3 dial-turn-v3 disassemble-v3 door-close-v3 door-lock-v3
door-open-v3 door-unlock-v3 drawer-close-v3 drawer-open-v3 faucet-close-v3 faucet-open-v3 hammer-v3 hand-insert-v3
handle-press-side-v3 handle-press-v3 handle-pull-side-v3 handle-pull-v3 lever-pull-v3 peg-insert-side-v3
peg-unplug-side-v3 pick-out-of-hole-v3 pick-place-v3 pick-place-wall-v3 plate-slide-back-side-v3 plate-slide-back-v3
plate-slide-side-v3 plate-slide-v3 push-back-v3 push-v3 push-wall-v3 reach-v3 reach-wall-v3 shelf-place-v3 soccer-v3
stick-pull-v3 stick-push-v3 sweep-into-v3 sweep-v3 window-close-v3 window-open-v3
""".split()

MAX_EPISODE_STEPS = 200


class MetaWorldEnv(gym.Env):
    """
    A task of Meta-World with reward 1 and the end of the episode on success, and reward 0 until then. ``info["is_success"]``
    says so, too, and the other entries of ``info`` are Meta-World's.

    Observations (39,): positions of hand, gripper and objects, the same at the step before, and the position of the goal.
    Actions (4,) in [-1, 1]: a shift of the hand, and the force that closes the gripper. At each reset objects and goal are
    placed anew, anywhere in the task's ranges, by the generator that the seed of ``reset`` seeds.

    :param task: One of ``TASKS``, such as "pick-place-v3".
    :param kwargs: Arguments of Meta-World's env: ``render_mode``, ``camera_name``, ``camera_id``, ``width``, ``height``.
    :raises ImportError: without Meta-World, saying how to install it.
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 80}  # noqa: RUF012

    def __init__(self, task: str, **kwargs: Any) -> None:
        try:
            from metaworld.env_dict import ENV_CLS_MAP
        except ImportError as error:
            raise ImportError(
                f"MetaWorldSparse/{task} needs Meta-World, which could not be imported ({error}): "
                "pip install 'sb3-dppo[manipulation]'"
            ) from error

        self.task_env = ENV_CLS_MAP[task](**kwargs)
        # Meta-World sets these through pickled tasks: show the goal, and place it and the objects by `np_random`.
        self.task_env._partially_observable = False
        self.task_env._freeze_rand_vec = False
        self.task_env.seeded_rand_vec = True
        self.task_env._set_task_called = True
        del self.task_env.sawyer_observation_space  # cached, that of a hidden goal
        self.observation_space = self.task_env.sawyer_observation_space
        self.action_space = self.task_env.action_space
        self.render_mode = self.task_env.render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.task_env.np_random = self.np_random  # Meta-World's own reset ignores seeds
        return self.task_env.reset()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, _, _, truncated, info = self.task_env.step(action)
        success = bool(info["success"])
        return obs, float(success), success, truncated, info | {"is_success": success}

    def render(self) -> Any:
        return self.task_env.render()

    def close(self) -> None:
        self.task_env.close()


def register_metaworld_envs() -> None:
    """Make Gymnasium know ``MetaWorldSparse/<task>`` for all tasks. An episode is truncated after 200 steps."""
    for task in TASKS:
        gym.register(
            f"MetaWorldSparse/{task}",
            entry_point="sb3_dppo.envs.metaworld:MetaWorldEnv",
            max_episode_steps=MAX_EPISODE_STEPS,
            kwargs=dict(task=task),
        )
