"""Simulators that step all envs at once on one device: their tensors go to the policy and the buffer as they are."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_dppo.envs.batched import BatchedVecEnv
from sb3_dppo.features.observations import parts_of, take, to_arrays


class BatchedStep(NamedTuple):
    """
    What all envs return at once, tensors on the simulator's device. Envs whose episodes end are reset in the same step.

    :param obs: Shape (n_envs, ...), or a dictionary of these; of an env that was reset, the first of its new episode.
    :param rewards: Shape (n_envs,).
    :param terminated: Which episodes have ended by themselves, bool, shape (n_envs,).
    :param truncated: Which have ended for another reason, such as a limit of time, bool, shape (n_envs,).
    :param last_obs: As ``obs``, of episodes that have ended the last one; of others it does not matter.
    :param successes: Which episodes are successful, bool, shape (n_envs,), or ``None`` if nobody knows.
    """

    obs: PyTorchObs
    rewards: th.Tensor
    terminated: th.Tensor
    truncated: th.Tensor
    last_obs: PyTorchObs
    successes: th.Tensor | None = None


class BatchedInfos(Sequence[dict[str, Any]]):
    """
    What happened in one step of all envs. As a sequence, SB3's dictionaries of each env, made when somebody asks for them.

    :param last_obs: See :class:`BatchedStep`.
    :param numbers: Of each env what :attr:`fields` names, shape (number of fields, n_envs).
    :param time: Seconds since the envs were made.
    """

    fields = ("reward", "terminated", "truncated", "success", "finite", "return", "length")

    def __init__(self, last_obs: PyTorchObs, numbers: np.ndarray, time: float) -> None:
        self.last_obs = last_obs
        self.time = time
        values = dict(zip(self.fields, numbers, strict=True))
        self.rewards, self.returns, self.lengths = (values[name] for name in ("reward", "return", "length"))
        self.terminated, self.truncated, self.finite = (values[name] > 0 for name in ("terminated", "truncated", "finite"))
        self.truncated &= ~self.terminated
        self.dones = self.terminated | self.truncated
        # NaN: nobody knows.
        self.successes = values["success"]

    def summary(self, env_index: int) -> dict[str, Any]:
        """What ``Monitor`` says of an episode that has ended."""
        info: dict[str, Any] = dict(
            episode=dict(r=round(float(self.returns[env_index]), 6), l=int(self.lengths[env_index]), t=round(self.time, 6))
        )
        if not np.isnan(self.successes[env_index]):
            info["is_success"] = bool(self.successes[env_index])
        return info

    @cached_property
    def _infos(self) -> list[dict[str, Any]]:
        infos: list[dict[str, Any]] = [{} for _ in self.dones]
        ended = np.flatnonzero(self.dones)
        last_obs = to_arrays(take(self.last_obs, ended)) if len(ended) > 0 else {}
        for row, env_index in enumerate(map(int, ended)):
            infos[env_index] = self.summary(env_index) | {
                "terminal_observation": take(last_obs, row),
                "TimeLimit.truncated": bool(self.truncated[env_index]),
            }
        return infos

    def __len__(self) -> int:
        return len(self.dones)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._infos[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._infos)


class TorchVecEnv(BatchedVecEnv):
    """
    Envs of a simulator that steps them all at once, as tensors on one device. DPPO uses these tensors: what crosses to the
    CPU at each step are a few numbers of each env (:class:`BatchedInfos`), all at once. To others it is a ``VecEnv`` like any,
    with NumPy's arrays. Episodes' returns and lengths are logged without a ``VecMonitor``; any wrapper makes it an ordinary
    ``VecEnv``.

    A subclass defines :meth:`reset_all` and :meth:`step_all`.

    :param n_envs: Number of envs.
    :param observation_space: Observation space of one.
    :param action_space: Action space of one.
    :param device: The simulator's device.
    """

    def __init__(
        self, n_envs: int, observation_space: spaces.Space, action_space: spaces.Box, device: th.device | str = "cpu"
    ) -> None:
        self.device = th.device(device)
        super().__init__(n_envs, observation_space, action_space)
        self._start = time.monotonic()
        self._returns, self._lengths = (th.zeros(n_envs, device=self.device) for _ in range(2))
        self._actions: Any = None

    @abstractmethod
    def reset_all(self, seed: int | None) -> PyTorchObs:
        """Begin a new episode in each env, with this seed if there is one, and give the observations, shape (n_envs, ...)."""

    @abstractmethod
    def step_all(self, actions: th.Tensor) -> BatchedStep:
        """Step all envs with actions within the bounds of their space, float32, shape (n_envs, ...): a ``BatchedStep``."""

    def step_tensors(self, actions: th.Tensor) -> tuple[PyTorchObs, np.ndarray, np.ndarray, BatchedInfos]:
        """
        :param actions: As of :meth:`step_all`.
        :return: Observations on the device; rewards, shape (n_envs,), which episodes have ended, shape (n_envs,), and more of
            that, on the CPU.
        """
        step = self.step_all(actions.to(self.device))
        rewards = step.rewards.float()
        self._returns += rewards
        self._lengths += 1
        running = ~(step.terminated | step.truncated)
        finite = th.isfinite(rewards)
        for obs, last_obs in zip(parts_of(step.obs), parts_of(step.last_obs), strict=True):
            finite &= th.isfinite(obs).flatten(1).all(dim=1)
            finite &= th.isfinite(last_obs).flatten(1).all(dim=1) | running
        successes = th.full_like(rewards, th.nan) if step.successes is None else step.successes
        numbers = (rewards, step.terminated, step.truncated, successes, finite, self._returns, self._lengths)
        on_cpu = th.stack([number.float() for number in numbers]).cpu().numpy()
        self._returns, self._lengths = (th.where(running, sums, 0.0) for sums in (self._returns, self._lengths))
        infos = BatchedInfos(step.last_obs, on_cpu, time.monotonic() - self._start)
        return step.obs, infos.rewards, infos.dones, infos

    def reset(self) -> VecEnvObs:
        obs = self.reset_all(self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        self._returns.zero_()
        self._lengths.zero_()
        return to_arrays(obs)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        actions = th.as_tensor(np.asarray(self._actions, dtype=np.float32), device=self.device)
        obs, rewards, dones, infos = self.step_tensors(actions)
        return to_arrays(obs), rewards, dones, list(infos)

    def close(self) -> None:
        """Nothing to end, unless the simulator has something."""

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        # Infos are as a Monitor's.
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]
