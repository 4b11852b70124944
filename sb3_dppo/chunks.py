"""Chunks of actions on their way into the envs: those still to be executed, and how a policy acts with them."""

import zlib
from abc import abstractmethod
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_dppo import ranks
from sb3_dppo.diffusion.process import DenoisingChain
from sb3_dppo.diffusion.sampler import DiffusionSampler
from sb3_dppo.features.observations import batch_size_of, parts_of, take
from sb3_dppo.normalization import Normalizer

# The chunks, shape (n_envs, Ta, *action_space.shape), and how many actions of them were executed, shape (n_envs,).
ChunkState = tuple[np.ndarray, ...]


class ChunkQueue:
    """
    The actions that are still to be executed in each env, to begin with none.

    :param n_envs: Number of envs.
    :param act_steps: Ta, the actions of a chunk that are executed.
    :param action_space: Action space.
    :param device: Where actions stay as tensors; ``None`` means that they are arrays.
    """

    def __init__(self, n_envs: int, act_steps: int, action_space: spaces.Space, device: th.device | None = None) -> None:
        # A type that holds the action space's bounds exactly.
        dtype = np.result_type(np.float32, action_space.dtype)  # type: ignore[arg-type]
        self.chunks: Any = np.zeros((n_envs, act_steps, *(action_space.shape or ())), dtype=dtype)
        if device is not None:
            self.chunks = th.as_tensor(self.chunks, dtype=th.float, device=device)
        self.n_executed = np.full(n_envs, act_steps)

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def state(self) -> ChunkState:
        """What :meth:`restore` takes."""
        return self.chunks, self.n_executed

    def restore(self, state: ChunkState) -> None:
        """Go on from the state of another queue, which is not changed by this one; ValueError for one of other sizes."""
        chunks, n_executed = state
        if len(chunks) != len(self):
            raise ValueError(f"state is of {len(chunks)} envs, but observation of {len(self)}: pass state=None to start anew.")
        if chunks.shape != self.chunks.shape:
            sizes = f"{chunks.shape[1:]}, but this policy's of {self.chunks.shape[1:]}"
            raise ValueError(f"state is of chunks of shape {sizes} (act_steps, …): pass state=None to start anew.")
        self.chunks, self.n_executed = chunks.copy(), n_executed.copy()

    @property
    def empty(self) -> np.ndarray:
        """Which envs have no action left, shape (n_envs,)."""
        return self.n_executed >= self.chunks.shape[1]

    def put(self, envs: np.ndarray, chunks: Any) -> None:
        """
        Replace what is left for some envs, a mask of shape (n_envs,), by the first Ta actions of new chunks, shape (B, Tp,
        *action_space.shape).
        """
        self.chunks[envs] = chunks[:, : self.chunks.shape[1]]
        self.n_executed[envs] = 0

    def pop(self) -> Any:
        """The next action of each env, shape (n_envs, *action_space.shape)."""
        actions = self.chunks[np.arange(len(self)), self.n_executed]
        self.n_executed += 1
        return actions


class ChunkPolicy(ActorCriticPolicy):
    """A policy that plans chunks of actions and executes them one by one. What plans is left to its subclasses."""

    sampler: DiffusionSampler
    normalizer: Normalizer

    @abstractmethod
    def sample_chain(
        self, obs: PyTorchObs, deterministic: bool = False, noise: th.Tensor | None = None, use_base: bool = False
    ) -> DenoisingChain:
        """See :meth:`~sb3_dppo.actor_critic.DiffusionActorCriticPolicy.sample_chain`."""

    def seed(self, seed: int) -> None:
        """Seed the generator that :meth:`predict` draws from."""
        self._seed = seed
        self._generator: th.Generator | None = None

    @property
    def generator(self) -> th.Generator:
        """The generator that :meth:`predict` draws from: its own, so that evaluation does not change training."""
        if self._generator is None or self._generator.device.type != self.device.type:
            self._generator = th.Generator(device=self.device).manual_seed(self._seed)
        return self._generator

    def plan(self, obs: PyTorchObs, deterministic: bool = False) -> np.ndarray:
        """Chunks for acting, from the policy's own generator; see :meth:`executable`."""
        kind = self.sampler.config.deterministic_noise
        if not deterministic or kind == "random":
            noise = self.sampler.draw_noise(batch_size_of(obs), self.generator)
        else:
            shape = self.sampler.noise_shape(batch_size_of(obs))
            noise = th.zeros(shape, device=self.device)
            if kind == "observation":
                noise = th.as_tensor(noise_of_observations(obs, shape), device=self.device)
        return self.executable(self.sample_chain(obs, deterministic, noise).actions)

    def executable(self, actions: th.Tensor, on_device: bool = False) -> Any:
        """
        :param actions: Normalised chunks, shape (B, Tp, Da).
        :param on_device: Whether they stay there, as a tensor.
        :return: Their actions from ``first_action`` on, in the env's units, shape (B, Tp - first_action, *action_space.shape).
        """
        unnormalize = self.normalizer.unnormalize_on_device if on_device else self.normalizer.unnormalize_actions
        return unnormalize(actions[:, self.sampler.first_action :])

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return th.as_tensor(self.plan(observation, deterministic)[:, 0], device=self.device)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: ChunkState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, ChunkState | None]:
        """
        Get the next action, planning a new chunk for an env only when its last one is used up or its episode starts.
        Called without ``state``, it plans every time.

        :param observation: The observation or, for several envs, observations.
        :param state: What the last call returned: the envs' chunks, shape (n_envs, act_steps, ...), and how
            many actions of them were executed, shape (n_envs,).
        :param episode_start: Which envs have just been reset, shape (n_envs,).
        :param deterministic: Whether to act deterministically; see ``deterministic_noise``.
        :return: The actions and the next state.
        :raises ValueError: for a state of another number of envs.
        """
        ranks.progress()  # in an evaluation
        self.set_training_mode(False)
        if isinstance(observation, tuple):
            raise ValueError("observation is a tuple, probably that of a Gymnasium env's reset(): pass its first element.")
        obs_tensor, vectorized_env = self.obs_to_tensor(observation)
        queue = ChunkQueue(batch_size_of(obs_tensor), self.sampler.act_steps, self.action_space)
        if state is not None:
            queue.restore(state)
        must_plan = queue.empty
        if episode_start is not None:
            must_plan = must_plan | np.asarray(episode_start, dtype=bool)
        if must_plan.any():
            queue.put(must_plan, self.plan(take(obs_tensor, th.as_tensor(must_plan)), deterministic))
        actions = queue.pop()
        return actions if vectorized_env else actions[0], queue.state

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Not defined for a diffusion policy: always a NotImplementedError."""
        raise NotImplementedError(
            "A diffusion policy has no closed-form probability of an action, only of its denoising steps: use sample_chain "
            "and chain_log_prob(obs, chain). What needs the former, as imitation's BC, can't train it: use sb3_dppo.BC."
        )

    def get_distribution(self, obs: PyTorchObs) -> Any:
        """Not defined for a diffusion policy: always a NotImplementedError."""
        raise NotImplementedError("A diffusion policy's distribution has no closed form: draw from it with sample_chain(obs).")


def noise_of_observations(obs: PyTorchObs, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise of the shape (S+1, B, Tp, Da) that depends on nothing but each of B observations."""
    arrays = [part.cpu().numpy() for part in parts_of(obs)]
    noise = np.empty(shape, dtype=np.float32)
    for row in range(shape[1]):
        seed = 0
        for array in arrays:
            # Adding 0 turns -0.0 into 0.0, which is the same observation.
            seed = zlib.crc32((array[row].astype(np.float32) + 0.0).tobytes(), seed)
        noise[:, row] = np.random.default_rng(seed).standard_normal(noise[:, row].shape, dtype=np.float32)
    return noise
