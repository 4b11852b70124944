"""A pre-trained policy that stays as it is, as a part of the env, for Stable-Baselines3's algorithms to steer."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_dppo.chunks import ChunkState

if TYPE_CHECKING:
    from sb3_dppo.actor_critic import DiffusionActorCriticPolicy
    from sb3_dppo.dppo import DPPO

# Where a Dict observation has the frozen policy's action.
BASE_ACTION = "base_action"


class NoiseSpaceVecEnv(VecEnvWrapper):
    """
    Envs whose actions are the initial noise of a frozen policy's denoising chain, which is deterministic otherwise (DSRL,
    Wagenmaker et al. 2025). A step executes the chunk that the noise leads to: its reward is the sum of the envs' rewards, and
    its discount is the algorithm's γ. Where an episode ends inside a chunk, all envs plan anew, so that every env step belongs
    to one decision; ``info["n_executed"]`` has its length. γ is that of a shorter one, too: with many envs, whose episodes end
    at different times, decisions get short and far-off rewards count less. Use few.

    The noise has more of a say in DDIM and in flows than in DDPM, whose later steps forget it.

    :param venv: Envs.
    :param model: The frozen policy's model, or the path of its file.
    :param noise_bound: Actions are within ± this value; the policy was trained with standard normal noise.
    :param settings: Arguments of ``DPPO.load``, where ``model`` is a path, such as ``scheduler="ddim"`` and
        ``inference_steps=5``.
    :raises ValueError: for a bound that is not positive, or a model of other spaces than the envs'.
    """

    action_space: spaces.Box

    def __init__(self, venv: VecEnv, model: "DPPO | str | Path", noise_bound: float = 1.5, **settings: Any) -> None:
        if not noise_bound > 0:
            raise ValueError(f"noise_bound={noise_bound} must be positive.")
        self.policy = frozen_policy(venv, model, settings)
        size = math.prod(self.policy.sampler.chunk_shape)
        super().__init__(venv, action_space=spaces.Box(-noise_bound, noise_bound, (size,), np.float32))

    def reset(self) -> VecEnvObs:
        self._obs = self.venv.reset()
        return self._obs

    def step_async(self, actions: np.ndarray) -> None:
        self._chunks = self.plan(self._obs, actions)

    def step_wait(self) -> VecEnvStepReturn:
        rewards, n_executed, dones = np.zeros(self.num_envs, dtype=np.float32), 0, np.zeros(self.num_envs, dtype=bool)
        while n_executed < self.policy.sampler.act_steps and not dones.any():
            self._obs, step_rewards, dones, infos = self.venv.step(self._chunks[:, n_executed])
            rewards += step_rewards
            n_executed += 1
        for info in infos:
            info["n_executed"] = n_executed
        return self._obs, rewards, dones, infos

    def plan(self, obs: VecEnvObs, noise: np.ndarray) -> np.ndarray:
        """
        :param obs: Observations of B envs.
        :param noise: Initial iterates, shape (B, Tp · Da).
        :return: What can be executed of the chunks that they lead to, shape (B, at most Tp, *action_space.shape).
        """
        policy = self.policy
        steps = th.zeros(policy.sampler.noise_shape(len(noise)), device=policy.device)
        steps[0] = th.as_tensor(noise, dtype=th.float32, device=policy.device).view_as(steps[0])
        obs_tensor = policy.obs_to_tensor(obs)[0]  # type: ignore[arg-type]
        return policy.executable(policy.sample_chain(obs_tensor, deterministic=True, noise=steps).actions)


class ResidualVecEnv(VecEnvWrapper):
    """
    Envs whose actions are added to those of a frozen policy, which acts deterministically and executes its chunks (Ankile et
    al. 2024). The frozen policy's next action, in [-1, 1], is a part of the observation: at the end of a vector, or under
    ``"base_action"`` in a ``Dict``.

    :param venv: Envs.
    :param model: The frozen policy's model, or the path of its file.
    :param scale: What an action of 1 adds, in halves of the action space's range.
    :param settings: Arguments of ``DPPO.load``, where ``model`` is a path.
    :raises ValueError: for a scale that is not positive, a model of other spaces than the envs', or observations that are
        neither vectors nor a ``Dict``.
    """

    action_space: spaces.Box

    def __init__(self, venv: VecEnv, model: "DPPO | str | Path", scale: float = 0.1, **settings: Any) -> None:
        if not scale > 0:
            raise ValueError(f"scale={scale} must be positive.")
        self.policy = frozen_policy(venv, model, settings)
        env_space: Any = venv.action_space
        self._low, self._high = env_space.low, env_space.high
        self._center, self._half = (self._low + self._high) / 2, (self._high - self._low) / 2
        self._scale = scale
        self._state: ChunkState | None = None
        super().__init__(venv, _with_base_action(venv.observation_space, env_space), spaces.Box(-1, 1, env_space.shape))

    def reset(self) -> VecEnvObs:
        self._state = None
        return self._observe(self.venv.reset(), None)

    def step_async(self, actions: np.ndarray) -> None:
        added = self._base_actions + self._scale * self._half * actions
        self.venv.step_async(np.clip(added, self._low, self._high).astype(self.venv.action_space.dtype))

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        for i in np.flatnonzero(dones):
            last: Any = infos[i]["terminal_observation"]
            base_actions = self.policy.predict(last, deterministic=True)[0]
            infos[i]["terminal_observation"] = self._join(last, base_actions)
        return self._observe(obs, dones), rewards, dones, infos

    def _observe(self, obs: VecEnvObs, episode_starts: np.ndarray | None) -> VecEnvObs:
        """Let the frozen policy choose its next actions, and add them to the observations."""
        given: Any = obs
        self._base_actions, self._state = self.policy.predict(given, self._state, episode_starts, deterministic=True)
        return self._join(given, self._base_actions)

    def _join(self, obs: Any, base_actions: np.ndarray) -> Any:
        normalized = ((base_actions - self._center) / np.where(self._half > 0, self._half, 1)).astype(np.float32)
        if isinstance(obs, dict):
            return {**obs, BASE_ACTION: normalized}
        flat = normalized.reshape(*obs.shape[:-1], -1)
        return np.concatenate([obs, flat], axis=-1, dtype=self.observation_space.dtype)  # type: ignore[arg-type]


def frozen_policy(venv: VecEnv, model: "DPPO | str | Path", settings: dict[str, Any]) -> "DiffusionActorCriticPolicy":
    """
    :param venv: Envs that it is to act in.
    :param model: A model, or the path of its file.
    :param settings: Arguments of ``DPPO.load``, for a path.
    :return: Its policy.
    :raises ValueError: for a model of other spaces than the envs', or of normalised observations where the envs' are not, or
        settings of a model that is loaded already.
    """
    from sb3_dppo.dppo import DPPO
    from sb3_dppo.runs.checkpoints import is_of_vec_normalize

    if isinstance(model, (str, Path)):
        model = DPPO.load(model, **settings)
    elif settings:
        raise ValueError(f"{', '.join(settings)}: for a model's file only; this model has been loaded: set them there.")
    if not isinstance(model, DPPO):
        raise ValueError(f"model is a {type(model).__name__}, not a DPPO, which has a diffusion policy.")
    check_for_correct_spaces(venv, model.observation_space, model.action_space)
    vec_normalize = unwrap_vec_normalize(venv)
    if is_of_vec_normalize(model) and (vec_normalize is None or not vec_normalize.norm_obs):
        raise ValueError(
            "model was trained under VecNormalize, whose observations it needs: wrap the envs in VecNormalize.load(path, "
            "venv), with training=False and norm_reward=False."
        )
    model.policy.set_training_mode(False)
    return model.policy


def _with_base_action(observation_space: spaces.Space, action_space: spaces.Box) -> spaces.Space:
    """The space of observations with an action."""
    if isinstance(observation_space, spaces.Dict):
        return spaces.Dict({**observation_space.spaces, BASE_ACTION: spaces.Box(-1, 1, action_space.shape)})
    if isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 1:
        ones = np.ones(math.prod(action_space.shape))
        low, high = np.append(observation_space.low, -ones), np.append(observation_space.high, ones)
        dtype = np.result_type(np.float32, observation_space.dtype)  # type: ignore[arg-type]
        return spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype.type)
    raise ValueError(
        f"ResidualVecEnv adds the frozen policy's action to the observation, for which {observation_space} has no place: "
        "use a vector or a Dict."
    )
