"""ManiSkill's envs, as tensors on the simulator's device."""

from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_dppo.envs.torch_vec_env import BatchedStep, TorchVecEnv


class ManiSkillVecEnv(TorchVecEnv):
    """
    What ManiSkill's ``ManiSkillVectorEnv`` steps, or another vector env of Gymnasium that takes and gives tensors and resets
    envs in the step in which their episodes end.

    :param envs: ``ManiSkillVectorEnv(gymnasium.make(name, num_envs=…, obs_mode="state"))``. Observations are a tensor or, with
        Gymnasium's ``Dict``, a dictionary of these. Where it knows it (``infos["success"]``), the share of episodes that end
        in success is logged as ``rollout/success_rate``.
    :raises ValueError: if its envs are not reset when their episodes end.
    """

    def __init__(self, envs: Any) -> None:
        if not getattr(envs, "auto_reset", True):
            raise ValueError("envs.auto_reset=False: episodes that have ended must begin anew; leave it at True.")
        self._envs = envs
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space, envs.device)

    def reset_all(self, seed: int | None) -> PyTorchObs:
        obs, _ = self._envs.reset(seed=seed)
        return obs

    def step_all(self, actions: th.Tensor) -> BatchedStep:
        obs, rewards, terminated, truncated, infos = self._envs.step(actions)
        # Of all envs, as they were before any was reset; left out where none was.
        last_obs, last_infos = infos.get("final_observation", obs), infos.get("final_info", infos)
        return BatchedStep(obs, rewards, terminated, truncated, last_obs, last_infos.get("success"))

    def close(self) -> None:
        self._envs.close()
