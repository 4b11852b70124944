"""Environments of EnvPool, which threads step in C++, as vectorised environments of Stable-Baselines3."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_dppo.envs.batched import BatchedVecEnv

NO_LIMIT = 2**31 - 1


class EnvPoolVecEnv(VecMonitor):
    """
    Copies of an environment that both Gymnasium and EnvPool implement, stepped faster than in ``DummyVecEnv``::

        DPPO("DiffusionMlpPolicy", EnvPoolVecEnv("Hopper-v5", n_envs=40, seed=0))

    Spaces, types, resets at the ends of episodes and what ``infos`` say of those ends are as with
    ``make_vec_env(env_id, n_envs, seed)``. Random numbers are EnvPool's own, other ``infos`` are left out, and the copies are
    no Python objects: they have no wrappers and no methods, and can't be rendered.

    :param env_id: The environment's name, the same in Gymnasium and EnvPool. Observations and actions must be ``Box``.
    :param n_envs: Number of copies.
    :param seed: Seed of the first copy, the others' are the numbers after it; ``None`` for a random one.
    :param env_kwargs: Arguments of the environment that Gymnasium and EnvPool share, and ``max_episode_steps``.
    :param filename: Where to log returns and lengths of episodes, as in ``VecMonitor``; ``None`` for no file.
    :raises ImportError: if EnvPool is not installed.
    :raises ValueError: for an environment or arguments that EnvPool does not have.
    """

    def __init__(
        self,
        env_id: str,
        n_envs: int = 1,
        seed: int | None = None,
        env_kwargs: dict[str, Any] | None = None,
        filename: str | None = None,
    ) -> None:
        super().__init__(_EnvPoolEnvs(env_id, n_envs, seed, env_kwargs or {}), filename)


def use_envpool(venv: VecEnv) -> VecEnv:
    """
    RL Zoo's door to :class:`EnvPoolVecEnv`: the hyperparameter ``vec_env_wrapper: sb3_dppo.envs.use_envpool``.

    :param venv: The zoo's envs.
    :return: EnvPool's in their place, with the same seeds, arguments and folder of logs; those that are rendered stay.
    :raises ImportError: if EnvPool is not installed.
    :raises ValueError: for an environment, arguments or wrappers that EnvPool does not have.
    """
    if venv.render_mode is not None:
        return venv
    spec: gym.envs.registration.EnvSpec = venv.get_attr("spec")[0]
    wrappers = [wrapper.name for wrapper in spec.additional_wrappers if wrapper.name != "Monitor"]
    if wrappers:
        raise ValueError(f"env_wrapper={wrappers} can't wrap EnvPool's envs: drop it, or drop use_envpool.")
    filename = None
    if isinstance(venv, DummyVecEnv):
        writer = venv.get_attr("results_writer")[0]
        if writer is not None:
            filename = str(Path(writer.file_handler.name).with_name("envpool"))
    env_kwargs = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
    env_kwargs["max_episode_steps"] = spec.max_episode_steps
    envs = EnvPoolVecEnv(spec.id, venv.num_envs, venv._seeds[0], env_kwargs, filename)
    venv.close()
    return envs


class _EnvPoolEnvs(BatchedVecEnv):
    """
    EnvPool's envs, without the record of their episodes. See :class:`EnvPoolVecEnv`.

    :param env_id: The environment's name.
    :param n_envs: Number of copies.
    :param seed: Seed of the first copy.
    :param env_kwargs: Arguments of the environment.
    """

    def __init__(self, env_id: str, n_envs: int, seed: int | None, env_kwargs: dict[str, Any]) -> None:
        try:
            import envpool
        except ImportError as error:
            raise ImportError("EnvPoolVecEnv needs EnvPool, for Python 3.11+: pip install 'sb3-dppo[envpool]'.") from error
        if n_envs < 1:
            raise ValueError(f"n_envs={n_envs} must be at least 1.")
        if env_id not in envpool.list_all_envs():
            raise ValueError(
                f"env_id={env_id!r} is none of EnvPool's environments (envpool.list_all_envs()): use make_vec_env."
            )
        self._make = envpool.make_gymnasium
        # Gymnasium's spaces: EnvPool's differ in the type of actions, and models are checked against them when loaded.
        env = gym.make(env_id, **env_kwargs)
        env.close()
        assert env.spec is not None
        self.spec = env.spec
        if not isinstance(env.observation_space, spaces.Box) or not isinstance(env.action_space, spaces.Box):
            raise ValueError(
                f"env_id={env_id!r}: observations ({env.observation_space}) and actions ({env.action_space}) must be Box."
            )
        # EnvPool's own limit would hide that an episode terminates at its very last step.
        self._max_episode_steps = env.spec.max_episode_steps or NO_LIMIT
        self._env_kwargs = {**env_kwargs, "max_episode_steps": NO_LIMIT}
        super().__init__(n_envs, env.observation_space, env.action_space)
        self.seed(seed)
        self._make_pool()

    def _make_pool(self) -> None:
        # EnvPool takes seeds only here, as int32.
        seeds = [int(seed or 0) % 2**31 for seed in self._seeds]
        try:
            self._pool: Any = self._make(self.spec.id, num_envs=self.num_envs, seed=seeds, **self._env_kwargs)
        except TypeError as error:
            raise ValueError(f"env_kwargs={self._env_kwargs} are not all known to EnvPool: {error}") from error
        self._reset_seeds()

    def reset(self) -> np.ndarray:
        if self._seeds[0] is not None:
            self._make_pool()
        obs, _ = self._pool.reset()
        return obs

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        raise ValueError(f"options={options}: resets of EnvPool's envs take none; pass env_kwargs when making them.")

    def step_async(self, actions: np.ndarray) -> None:
        self._pool.send(actions)

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, terminated, truncated, pool_infos = self._pool.recv()
        truncated |= ~terminated & (pool_infos["elapsed_step"] >= self._max_episode_steps)
        dones = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        ended = np.flatnonzero(dones).astype(np.int32)
        if len(ended) > 0:
            for i in ended:
                infos[i]["terminal_observation"] = obs[i].copy()
                infos[i]["TimeLimit.truncated"] = bool(truncated[i])
            # Left alone, EnvPool would reset an env at the next step and ignore that step's action.
            obs[ended], _ = self._pool.reset(ended)
        return obs, rewards, dones, infos

    def close(self) -> None:
        self._pool = None  # ends its threads
