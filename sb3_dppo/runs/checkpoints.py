"""What training needs beyond parameters to go on exactly where a file was saved."""

import random
import warnings
from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th

import sb3_dppo.ranks as ranks
from sb3_dppo.buffers import RewardScaler
from sb3_dppo.runs.faults import has_attr


@dataclass
class RunState:
    """
    Where a run stands between two rollouts, besides what Stable-Baselines3 saves. The policy does not change in a rollout, so
    with this a model that is saved in the middle of one goes on at its start.
    """

    num_timesteps: int
    progress_remaining: float  # from 1 to 0
    reward_scaler: RewardScaler
    episode_infos: deque | None  # last episodes' returns and lengths, for the logs
    episode_successes: deque | None
    generators: dict[str, Any] | None  # see :func:`generator_states`; ``None`` leaves them alone
    normalization: dict[str, Any] | None  # statistics of ``VecNormalize``
    env_states: list[Any] | None  # what each env's ``get_resume_state()`` returned
    last_obs: Any  # what the policy sees next, if the envs are in that state
    last_episode_starts: np.ndarray | None  # whether it is the first of an episode, shape (n_envs,)
    of_ranks: Sequence["RunState"] = ()  # those of all, where there are several

    @classmethod
    def of(cls, model: Any) -> "RunState":
        """A copy of the state of a model between two rollouts."""
        vec_normalize = model.get_vec_normalize_env()
        own = {} if vec_normalize is None else vars(vec_normalize)
        return cls(
            num_timesteps=model.num_timesteps,
            progress_remaining=model._current_progress_remaining,
            reward_scaler=deepcopy(model.reward_scaler),
            episode_infos=deepcopy(model.ep_info_buffer),
            episode_successes=deepcopy(model.ep_success_buffer),
            generators=generator_states(model),
            normalization={name: deepcopy(own[name]) for name in ("obs_rms", "ret_rms", "returns") if name in own} or None,
            env_states=_env_states(model),
            last_obs=model._last_obs,
            last_episode_starts=model._last_episode_starts,
        )

    @classmethod
    def of_all(cls, model: Any) -> "RunState":
        """The same, which also knows the states of the other ranks. All of them call it at once."""
        state = cls.of(model)
        if ranks.size() > 1:
            state.of_ranks = ranks.gather(state)
        return state

    def restore(self, model: Any) -> None:
        """
        Bring a loaded model and its env into this state. An env that can't be brought there is reset, with a seed that
        follows from it, so that what comes depends on nothing else. If the model's ``_last_obs`` is there (it was loaded with
        ``force_reset=False``), its env is where it was when the file was saved: here, or further on in this rollout.
        """
        states = self.of_ranks or [self]
        if len(states) == ranks.size():
            states[ranks.rank()]._restore_own(model)
            return
        warnings.warn(
            f"The file was saved by {len(states)} process(es) and goes on in {ranks.size()}: with what was learned, but not "
            "exactly.",
            stacklevel=5,
        )
        self._restore_own(model)

    def _restore_own(self, model: Any) -> None:
        """The same for this rank's own state."""
        self._restore_around_env(model)
        if model._last_obs is not None:
            if model.num_timesteps == self.num_timesteps:
                model._last_obs, model._last_episode_starts = self.last_obs, self.last_episode_starts
                return
            warnings.warn(
                f"force_reset=False has no effect: the file was saved {model.num_timesteps - self.num_timesteps} env steps "
                "after the start of a rollout, from which training goes on, and the env is not there any more.",
                stacklevel=6,
            )
        model.env.seed(int(th.randint(2**31, ())) + ranks.rank() * model.n_envs)
        # For an env whose state is set, too: wrappers such as Monitor must have seen a reset.
        model._last_obs = model.env.reset()
        model._last_episode_starts = np.ones(model.n_envs, dtype=bool)
        if self.env_states is not None and len(self.env_states) == model.n_envs and has_attr(model.env, "set_resume_state"):
            for env_index, state in enumerate(self.env_states):
                model.env.env_method("set_resume_state", state, indices=[env_index])
            model._last_obs, model._last_episode_starts = self.last_obs, self.last_episode_starts
            # The reset has changed these.
            self._restore_around_env(model)

    def _restore_around_env(self, model: Any) -> None:
        """Restore all of the model's state but what its env and the counter of its steps know."""
        model._current_progress_remaining = self.progress_remaining
        model.reward_scaler = self.reward_scaler
        model.ep_info_buffer, model.ep_success_buffer = self.episode_infos, self.episode_successes
        vec_normalize = model.get_vec_normalize_env()
        if vec_normalize is not None and self.normalization is not None:
            for name, value in deepcopy(self.normalization).items():
                # Returns so far are of the envs' episodes: of another number of envs there are none.
                if name != "returns" or len(value) == model.n_envs:
                    setattr(vec_normalize, name, value)
        if self.generators is not None:
            set_generator_states(model, self.generators)


def is_of_vec_normalize(model: Any) -> bool:
    """Whether a model, or what its file says of its env, is under ``VecNormalize(norm_obs=True)``."""
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        return bool(vec_normalize.norm_obs)
    return model._run_state is not None and "obs_rms" in (model._run_state.normalization or {})


def _env_states(model: Any) -> list[Any] | None:
    """What each env's ``get_resume_state()`` returns; ``None`` if they have no such method."""
    if model.env is None or model._last_obs is None:
        return None
    return deepcopy(model.env.env_method("get_resume_state")) if has_attr(model.env, "get_resume_state") else None


def generator_states(model: Any) -> dict[str, Any]:
    """States of the global generators of Python, NumPy and PyTorch and of the policy's own."""
    return dict(
        device=model.device.type,
        python=random.getstate(),
        numpy=np.random.get_state(),
        torch=th.get_rng_state(),
        policy=model.policy.generator.get_state(),
        cuda=th.cuda.get_rng_state(model.device) if model.device.type == "cuda" else None,
    )


def set_generator_states(model: Any, states: dict[str, Any]) -> None:
    """Restore what :func:`generator_states` returned. On another device, that device's generators are left alone."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    if states["device"] == model.device.type:
        model.policy.generator.set_state(states["policy"])
        if model.device.type == "cuda":
            th.cuda.set_rng_state(states["cuda"], model.device)
