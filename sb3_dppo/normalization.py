"""What is between the env's units and the policy's networks: observations and actions mapped to about [-1, 1]."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_dppo.features.observations import vector_keys
from sb3_dppo.ranks import moments

EPS = 1e-6
# Of running statistics: added to variances, and the clamp of what they normalise (as in SB3's VecNormalize).
VARIANCE_EPS, OBS_CLIP = 1e-8, 10.0


class Normalizer(nn.Module):
    """
    An affine map for each number of the observation's vectors and of the action. To begin with, observations stay as they are
    and actions are mapped to [-1, 1] by the bounds of their space. Then either the ranges of demonstrations are set, or the
    observations' mean and std are updated between rollouts.

    :param observation_space: Observation space. Of a ``Dict``, what is neither an image nor a category is normalised.
    :param action_space: Action space, with finite bounds.
    :param normalize_images: See :func:`~sb3_dppo.features.observations.vector_keys`.
    """

    obs_center: th.Tensor
    obs_scale: th.Tensor
    obs_count: th.Tensor
    action_center: th.Tensor
    action_scale: th.Tensor

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Box, normalize_images: bool = True) -> None:
        super().__init__()
        self.action_space = action_space
        vectors = vector_keys(observation_space, normalize_images)
        self._vector_sizes = {key: get_flattened_obs_dim(space) for key, space in vectors.items()}
        # One after the other for a Dict.
        obs_shape = vectors[""].shape if "" in vectors else (sum(self._vector_sizes.values()),)
        self.register_buffer("obs_center", th.zeros(obs_shape))
        self.register_buffer("obs_scale", th.ones(obs_shape))
        # How many observations center and scale are the mean and 1 / std of; 0 if they are of something else.
        self.register_buffer("obs_count", th.zeros(()))
        # Whether it is above 0: asked at each decision, where a GPU is not to be waited for.
        self.is_running = False
        low, high = (th.as_tensor(bound, dtype=th.float).flatten() for bound in (action_space.low, action_space.high))
        self.register_buffer("action_center", (low + high) / 2)
        self.register_buffer("action_scale", (high - low) / 2)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.is_running = bool(self.obs_count > 0)

    def set_ranges(self, obs_min: np.ndarray, obs_max: np.ndarray, action_min: np.ndarray, action_max: np.ndarray) -> None:
        """
        Map these ranges to [-1, 1]: ``2 * ((x - min) / (max - min + 1e-6) - 0.5)``, and 0 for a dimension without range.
        Those of observations are of their space's shape; for a ``Dict``, the flat vectors of its keys that hold no images, one
        after the other in the order of its keys. Those of actions have the shape (Da,).
        """
        obs_low, obs_range, action_low, action_range = (
            th.as_tensor(np.asarray(value, dtype=np.float64))
            for value in (obs_min, np.subtract(obs_max, obs_min), action_min, np.subtract(action_max, action_min))
        )
        obs_half, action_half = (obs_range + EPS) / 2, (action_range + EPS) / 2
        self.set_affine(
            obs_low + obs_half,
            th.where(obs_range > 0, 1 / obs_half, 0.0),
            th.where(action_range > 0, action_low + action_half, action_low),
            action_half,
        )

    def set_affine(self, obs_center: Any, obs_scale: Any, action_center: Any, action_scale: Any) -> None:
        """Map observations to (x - center) · scale, and actions to (a - center) / scale; shapes as of :meth:`set_ranges`."""
        self.obs_center.copy_(th.as_tensor(obs_center))
        self.obs_scale.copy_(th.as_tensor(obs_scale))
        self.obs_count.zero_()
        self.is_running = False
        self.action_center.copy_(th.as_tensor(action_center))
        self.action_scale.copy_(th.as_tensor(action_scale))

    def update(self, obs: PyTorchObs) -> None:
        """
        Normalise by the mean and std of all observations that were ever passed, with these, shape (B, ...). The buffers are
        all there is to know, so that a saved policy goes on from them.

        The std never shrinks. Where a policy has learned to keep to a small region, as one that balances does, it would, and
        what is rare, as the start of an episode, would drift out of the range in which the policy knows what to do.
        """
        parts: Any = [obs[key] for key in self._vector_sizes] if isinstance(obs, dict) else [obs]
        vectors = th.cat([part.flatten(1) for part in parts], dim=1).view(-1, *self.obs_center.shape)
        # Nothing is known before: SB3 begins with a little of mean 0 and variance 1, much for a number that hardly varies.
        statistics, variance = RunningMeanStd(epsilon=0.0, shape=tuple(self.obs_center.shape)), np.zeros(self.obs_center.shape)
        if self.is_running:
            variance = (self.obs_scale.double().cpu().numpy() ** -2 - VARIANCE_EPS).clip(min=0.0)
            statistics.mean, statistics.var = self.obs_center.double().cpu().numpy(), variance
            statistics.count = self.obs_count.item()
        statistics.update_from_moments(*moments(vectors.double().cpu().numpy()))
        variance = np.maximum(variance, statistics.var)
        self.obs_center.copy_(th.as_tensor(statistics.mean))
        self.obs_scale.copy_(th.as_tensor(1 / np.sqrt(variance + VARIANCE_EPS)))
        self.obs_count.fill_(statistics.count)
        self.is_running = True

    @property
    def has_vectors(self) -> bool:
        """Whether there is something in observations to normalise."""
        return bool(self._vector_sizes)

    @property
    def has_ranges(self) -> bool:
        """Whether observations are normalised by ranges that were set, those of demonstrations."""
        changed = (self.obs_center != 0).any() | (self.obs_scale != 1).any()
        return bool(changed) and not self.is_running

    def normalize_observations(self, obs: PyTorchObs) -> PyTorchObs:
        """Observations, shape (B, ...), or a dictionary of these, with normalised vectors."""
        if not isinstance(obs, dict):
            return self._normalize(obs, self.obs_center, self.obs_scale) if self._vector_sizes else obs
        normalized, start = dict(obs), 0
        for key, size in self._vector_sizes.items():
            shape, rows = obs[key].shape[1:], slice(start, start + size)
            center, scale = self.obs_center[rows].view(shape), self.obs_scale[rows].view(shape)
            normalized[key] = self._normalize(obs[key], center, scale)
            start += size
        return normalized

    def _normalize(self, obs: th.Tensor, center: th.Tensor, scale: th.Tensor) -> th.Tensor:
        normalized = (obs.float() - center) * scale
        return normalized.clamp(-OBS_CLIP, OBS_CLIP) if self.is_running else normalized

    def normalize_actions(self, actions: th.Tensor) -> th.Tensor:
        """Actions of the env, shape (..., Da), in normalised action space."""
        return (actions - self.action_center) / self.action_scale

    def unnormalize_on_device(self, actions: th.Tensor) -> th.Tensor:
        """As :meth:`unnormalize_actions`, as tensors where they are."""
        low, high = (th.as_tensor(bound, device=actions.device) for bound in (self.action_space.low, self.action_space.high))
        env_actions = self.action_center + self.action_scale * actions
        return env_actions.reshape(*env_actions.shape[:-1], *self.action_space.shape).clamp(low, high)

    def unnormalize_actions(self, actions: th.Tensor) -> np.ndarray:
        """Normalised chunks, shape (B, Tp, Da), as actions clipped to the env's bounds, (B, Tp, *action_space.shape)."""
        env_actions = (self.action_center + self.action_scale * actions).cpu().numpy()
        env_actions = env_actions.reshape((*env_actions.shape[:-1], *self.action_space.shape))
        return np.clip(env_actions, self.action_space.low, self.action_space.high)
