"""Envs that are functions in JAX, those of Brax and MuJoCo Playground, as tensors of PyTorch."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_dppo.envs.torch_vec_env import BatchedStep, TorchVecEnv


class BraxVecEnv(TorchVecEnv):
    """
    Many copies of an env of Brax or MuJoCo Playground, compiled into one step. Observations and actions pass between JAX and
    PyTorch by DLPack, without a copy.

    An episode that has ended begins again in the first state that its env had after the last ``reset``, as Brax's do.

    :param env: The env, ``brax.envs.get_environment(name)`` or ``mujoco_playground.registry.load(name)``, without wrappers.
    :param n_envs: Number of copies.
    :param episode_length: Steps after which an episode is truncated.
    :raises ImportError: if JAX is not installed.
    """

    def __init__(self, env: Any, n_envs: int, episode_length: int = 1000) -> None:
        try:
            import jax
        except ImportError as error:
            raise ImportError("BraxVecEnv needs JAX: pip install brax, or playground.") from error
        self._jax = jax
        size = env.action_size
        obs = jax.eval_shape(env.reset, jax.random.PRNGKey(0)).obs
        device = "cpu" if jax.default_backend() == "cpu" else f"cuda:{jax.devices()[0].id}"
        super().__init__(n_envs, _space_of(obs), spaces.Box(-1.0, 1.0, (size,)), device)
        self._key = jax.random.PRNGKey(int(np.random.randint(2**31)))
        self._reset = jax.jit(jax.vmap(env.reset))
        self._step = jax.jit(_step_of(jax, env, episode_length))

    def reset_all(self, seed: int | None) -> PyTorchObs:
        random = self._jax.random
        if seed is not None:
            self._key = random.PRNGKey(seed)
        self._key, key = random.split(self._key)
        self._first = self._state = self._reset(random.split(key, self.num_envs))
        self._n_steps = self._jax.numpy.zeros(self.num_envs, dtype=int)
        return self._to_torch(self._state.obs)

    def step_all(self, actions: th.Tensor) -> BatchedStep:
        actions = self._jax.dlpack.from_dlpack(actions.contiguous())
        self._state, self._n_steps, results = self._step(self._first, self._state, self._n_steps, actions)
        return BatchedStep(*(self._to_torch(result) for result in results))

    def _to_torch(self, values: Any) -> Any:
        if isinstance(values, dict):
            return {key: th.from_dlpack(part) for key, part in values.items()}
        return th.from_dlpack(values)


def _space_of(obs: Any) -> spaces.Space:
    """Of an observation's shape, or of a dictionary of these."""
    if isinstance(obs, dict):
        return spaces.Dict({str(key): _space_of(part) for key, part in obs.items()})
    return spaces.Box(-np.inf, np.inf, obs.shape)


def _step_of(jax: Any, env: Any, episode_length: int) -> Any:
    """A step of all envs as a function of JAX, with resets: next states, steps of their episodes, and what envs return."""

    def step(first: Any, state: Any, n_steps: Any, actions: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        state, n_steps = jax.vmap(env.step)(state, actions), n_steps + 1
        terminated = state.done > 0
        truncated = (n_steps >= episode_length) & ~terminated
        ended = terminated | truncated

        def following(first: Any, last: Any) -> Any:
            if last.shape[:1] != ended.shape:  # Of MJX's data, what is the same in all envs.
                return last
            return jax.numpy.where(ended.reshape(-1, *[1] * (last.ndim - 1)), first, last)

        next_state = jax.tree.map(following, first, state)
        results = (next_state.obs, state.reward, terminated, truncated, state.obs)
        return next_state, jax.numpy.where(ended, 0, n_steps), results

    return step
