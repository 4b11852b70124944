"""Envs that are no objects of their own."""

from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices


class BatchedVecEnv(VecEnv):
    """Envs of which a simulator keeps all at once, so that one alone has neither attributes of its own nor methods."""

    # Of all of them.
    spec: Any = None

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        values = {"render_mode": None, "spec": self.spec}
        if attr_name not in values:
            raise AttributeError(f"{self._no_objects()} attribute {attr_name!r}.")
        return [values[attr_name] for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise AttributeError(f"{self._no_objects()} attribute {attr_name!r}.")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        raise AttributeError(f"{self._no_objects()} method {method_name!r}.")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def _no_objects(self) -> str:
        return f"{type(self).__name__}: its envs are not objects and have no"
