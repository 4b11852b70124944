"""Rollouts of decisions: envs that plan together, chunks that are cut at the ends of episodes."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecEnv

from sb3_dppo import ranks
from sb3_dppo.actor_critic import DiffusionActorCriticPolicy
from sb3_dppo.arguments import SAMPLER_ARGUMENTS, check_training_arguments
from sb3_dppo.buffers import DenoisingRolloutBuffer, RewardScaler, equal_slices
from sb3_dppo.chunks import ChunkQueue
from sb3_dppo.diffusion.settings import SamplerConfig
from sb3_dppo.envs.torch_vec_env import BatchedInfos, TorchVecEnv
from sb3_dppo.features.observations import stack, take, to_arrays, to_tensors
from sb3_dppo.runs.resumable import ResumableAlgorithm
from sb3_dppo.schedules import cooldown, make_schedule

# The std's floors of a policy that has learned from demonstrations, unless others are given (Ren et al. 2024, table A7).
PRETRAINED_STD = 0.1
# Decisions whose log-probabilities are computed at once.
ROWS_AT_ONCE = 1024
# Of a run's decisions, and at least how many, whose observations make the statistics that normalise observations.
STATISTICS_SHARE, MIN_STATISTICS = 0.1, 30_000


class DecisionRollouts(ResumableAlgorithm):
    """
    An on-policy algorithm whose transitions are decisions.

    All envs plan together every ``act_steps`` env steps. One whose episode ends in between plans again at once, alone, and
    that chunk is cut at the next common boundary. So a decision lasts 1 … ``act_steps`` env steps.
    """

    policy: DiffusionActorCriticPolicy
    rollout_buffer: DenoisingRolloutBuffer  # type: ignore[assignment]
    reward_scaler: RewardScaler
    scale_rewards: bool
    lr_decay: str
    normalize_observations: bool | None
    pretrained_on_demonstrations: bool
    min_sampling_std: Any
    min_logprob_std: float | None
    on_bad_env: str
    n_bad_env_resets: int

    def _sampler_config(self) -> SamplerConfig:
        """The sampler's settings now."""
        settings, floor = {name: getattr(self, name) for name in SAMPLER_ARGUMENTS}, self.min_sampling_std
        if floor is not None:
            floor = max(0.0, make_schedule("min_sampling_std", floor)(self._current_progress_remaining))
        elif self.min_logprob_std is None and self.pretrained_on_demonstrations:
            floor = PRETRAINED_STD
        return SamplerConfig(**settings | dict(min_sampling_std=floor))

    def _make_rollout_buffer(self) -> None:
        buffer_class: Any = self.rollout_buffer_class or DenoisingRolloutBuffer
        self.rollout_buffer = buffer_class(
            self.n_steps,
            self.observation_space,
            self.action_space,
            horizon=self.policy.horizon,
            act_steps=self.policy.sampler.act_steps,
            ft_denoising_steps=self.policy.sampler.ft_denoising_steps,
            first_action=self.policy.sampler.first_action,
            device=self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
            **self.rollout_buffer_kwargs,
        )

    def _configure_sampler(self) -> None:
        # Ranges of demonstrations come along with weights that were taken over from a policy that has seen them.
        self.pretrained_on_demonstrations |= self.policy.normalizer.has_ranges
        config = self._sampler_config()
        if config != self.policy.sampler.config:
            self.policy.configure_sampler(config)

    def _apply_settings(self) -> None:
        """Let what was assigned to the model since the last rollout act from now on."""
        self._configure_sampler()
        check_training_arguments(self)
        sampler, buffer = self.policy.sampler, self.rollout_buffer
        if (sampler.act_steps, sampler.ft_denoising_steps) != (buffer.act_steps, buffer.ft_denoising_steps):
            self._make_rollout_buffer()
        self.rollout_buffer.gamma, self.rollout_buffer.gae_lambda = self.gamma, self.gae_lambda

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: DenoisingRolloutBuffer,  # type: ignore[override]
        n_rollout_steps: int,
    ) -> bool:
        """
        Collect decisions with the current policy and fill the rollout buffer. ``False`` if a callback, which is called at each
        of ``n_rollout_steps`` env steps, at the beginning and at the end, stops it.
        """
        assert self._last_obs is not None, "No previous observation was provided"
        ranks.share_random_numbers(self.device)
        self._begin_rollout()
        self._apply_settings()
        goes_on = False
        try:
            with self.policy.sampler.keep_constants():
                goes_on = self._collect(env, callback, n_rollout_steps)
        finally:
            if not goes_on:  # These decisions are dropped.
                self.reward_scaler.forget_episodes(env.num_envs)
        return goes_on

    def _collect(self, env: VecEnv, callback: BaseCallback, n_rollout_steps: int) -> bool:
        """What is left of :meth:`collect_rollouts`."""
        rollout_buffer = self.rollout_buffer  # another one if the settings have changed
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        act_steps = self.policy.sampler.act_steps
        is_batched = isinstance(env, TorchVecEnv)
        step: Any = env.step_tensors if isinstance(env, TorchVecEnv) else env.step
        queue = ChunkQueue(env.num_envs, act_steps, self.action_space, self.device if is_batched else None)
        dones = np.zeros(env.num_envs, dtype=bool)
        # Of the envs' current decisions, for callbacks.
        values = th.zeros((env.num_envs, 1), device=self.device)
        log_probs = th.zeros(env.num_envs, device=self.device)

        callback.on_rollout_start()

        obs: Any = self._last_obs
        for n_steps in range(n_rollout_steps):
            obs_tensor = to_tensors(obs, self.device)
            planning = dones | (n_steps % act_steps == 0)
            if planning.all():
                chunks, values, log_probs = self._plan(obs_tensor, np.arange(env.num_envs), is_batched)
                queue.put(planning, chunks)
            elif planning.any():
                env_index = np.flatnonzero(planning)
                values, log_probs = values.clone(), log_probs.clone()
                chunks, values[planning], log_probs[planning] = self._plan(take(obs_tensor, env_index), env_index, is_batched)
                queue.put(planning, chunks)
            actions = clipped_actions = queue.pop()

            new_obs, rewards, dones, infos = step(clipped_actions)
            ranks.progress()
            dones = np.asarray(dones, dtype=bool)
            self._check_step(new_obs, rewards)
            self.num_timesteps += env.num_envs * ranks.size()

            # Give access to local variables
            callback.update_locals(locals())
            with self.policy.sampler.keep_constants():  # Of whatever weights it acts with.
                goes_on = callback.on_step()
            if not goes_on:
                self._last_obs, self._last_episode_starts = to_arrays(new_obs) if is_batched else new_obs, dones
                ranks.all_agree(False)
                return False

            self._update_info_buffer(infos, dones)
            rollout_buffer.add_rewards(rewards)
            self._end_episodes(dones, infos)
            obs = new_obs
            if not is_batched:
                self._last_obs = new_obs
            self._last_episode_starts = dones

        if is_batched:  # Arrays, for files.
            self._last_obs = to_arrays(obs)
        if not ranks.all_agree(True):
            return False
        with th.no_grad():
            last_values = self.policy.predict_values(to_tensors(obs, self.device))
        if self.scale_rewards:
            rollout_buffer.scale_rewards(self.reward_scaler)
        rollout_buffer.compute_returns_and_advantage(last_values)
        if self.on_bad_env == "reset":
            self.logger.record("rollout/bad_env_resets", sum(ranks.gather(self.n_bad_env_resets)))
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    @property
    def cooldown_factor(self) -> float:
        """Of the learning rates in this rollout: below 1 at the end of a run with ``lr_decay="cooldown"``."""
        return cooldown(self._remaining_of_run()) if self.lr_decay == "cooldown" else 1.0

    @property
    def gathers_statistics(self) -> bool:
        """
        Whether the statistics that normalise observations still change. With each change the policy has to learn anew what
        it knew, and later ones are of what it has become good at. When the learning rates go to zero it no longer could.
        """
        n_decisions = (self._total_timesteps - self._start_of_run) / self.policy.sampler.act_steps
        enough = max(MIN_STATISTICS, STATISTICS_SHARE * n_decisions)
        return bool(self.policy.normalizer.obs_count < enough) and self.cooldown_factor == 1

    @property
    def updates_normalizer(self) -> bool:
        """What ``normalize_observations`` comes to."""
        normalizer = self.policy.normalizer
        if self.pretrained_on_demonstrations or normalizer.has_ranges or not normalizer.has_vectors:
            return False
        if self.normalize_observations is not None:
            return self.normalize_observations
        vec_normalize = self.get_vec_normalize_env()
        return vec_normalize is None or not vec_normalize.norm_obs

    def _update_normalizer(self) -> None:
        """Count the rollout's observations in the statistics that normalise."""
        buffer = self.rollout_buffer
        self.policy.normalizer.update(take(buffer.observations, slice(buffer.size())))

    def _begin_normalization(self) -> None:
        """
        Normalise observations by the statistics of the first rollout, before its update. The log-probabilities of its chains
        are computed anew, so that ratios begin at 1.
        """
        self._update_normalizer()
        buffer = self.rollout_buffer
        with th.no_grad():
            for rows in equal_slices(buffer.size(), 1 + buffer.size() // ROWS_AT_ONCE):
                log_prob = self.policy.chain_log_prob(take(buffer.observations, rows), buffer.chains[rows])
                buffer.set_log_probs(rows, log_prob)

    def _plan(self, obs: PyTorchObs, env_index: np.ndarray, on_device: bool) -> tuple[Any, th.Tensor, th.Tensor]:
        """
        Decide in B of the envs, which observe ``obs``, and keep it. Gives what can be executed of the chunks, (B, at most Tp,
        *action_space.shape), as tensors ``on_device`` or as arrays, values of the observations, (B, 1), and log-probabilities
        averaged over the chains, (B,).
        """
        with th.no_grad():
            features = self.policy.shared_features(obs)
        sampled = self.policy.sample_chain(obs, noise=self._draw_noise(len(env_index)), features=features)
        chunks = self.policy.executable(sampled.actions, on_device)
        # After the actions have left a GPU, so that it works while the envs step.
        with th.no_grad():
            values = self.policy.predict_values(obs, features)
        self.rollout_buffer.add(env_index, obs, sampled.chain, sampled.log_prob, values)
        return chunks, values, sampled.log_prob.mean(dim=(1, 2, 3))

    def _draw_noise(self, n: int) -> th.Tensor:
        """For n of the envs. Where all plan, in all ranks, it is this rank's part of what one process would draw for all."""
        if n < self.n_envs or ranks.size() == 1:
            return self.policy.draw_noise(n)
        return self.policy.draw_noise(n * ranks.size()).chunk(ranks.size(), dim=1)[ranks.rank()].contiguous()

    def _update_info_buffer(self, infos: Any, dones: np.ndarray | None = None) -> None:
        if isinstance(infos, BatchedInfos):  # Those of the episodes that have ended, and no loop over all.
            infos = [infos.summary(env_index) for env_index in map(int, np.flatnonzero(infos.dones))]
            dones = np.ones(len(infos), dtype=bool)
        elif self.on_bad_env == "reset":  # An episode that was broken off has a record of VecMonitor's all the same.
            infos = [{} if info.get("bad_env", False) else info for info in infos]
        super()._update_info_buffer(infos, dones)

    def _end_episodes(self, dones: np.ndarray, infos: Any) -> None:
        """Tell the buffer which episodes have ended, with the value of the last observation of those that were truncated."""
        if isinstance(infos, BatchedInfos):
            truncated: Any = np.flatnonzero(infos.truncated)
            last_obs: Any = take(infos.last_obs, truncated) if len(truncated) > 0 else None
        else:
            known = [info.get("terminal_observation") if info.get("TimeLimit.truncated", False) else None for info in infos]
            truncated = [env_index for env_index in np.flatnonzero(dones) if known[env_index] is not None]
            last_obs = stack([known[env_index] for env_index in truncated]) if truncated else None
        bootstrap_values = np.zeros(len(dones))
        if len(truncated) > 0:
            with th.no_grad():
                values = self.policy.predict_values(to_tensors(last_obs, self.device))
            bootstrap_values[truncated] = values.cpu().numpy().flatten()
        self.rollout_buffer.end_episodes(np.flatnonzero(dones), bootstrap_values[dones])
