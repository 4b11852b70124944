"""The rollout buffer: one row per decision with its denoising chain, GAE over decisions, minibatches of denoising steps."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, RolloutBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import PyTorchObs, TensorDict

from sb3_dppo import ranks
from sb3_dppo.diffusion.sampler import LOG_PROB_RANGE, mean_log_prob
from sb3_dppo.features.observations import parts_of, parts_of_space, take


class WholeMinibatch(NamedTuple):
    """
    Of a minibatch that several ranks have a share of each, all.

    :param advantages: Of its pairs, shape (M,).
    :param own_pairs: Which of them are this rank's, shape (N,).
    :param n_values: The critic's decisions in it.
    :param own_values: Which of them are this rank's, shape (V,).
    """

    advantages: th.Tensor
    own_pairs: th.Tensor
    n_values: int
    own_values: th.Tensor


class DenoisingRolloutBufferSamples(NamedTuple):
    """
    What one gradient step sees. The first five fields hold all D decisions of the rollout, without a copy; a minibatch is N
    (decision, denoising index) pairs for the actor and V decisions for the critic.

    :param observations: Shape (D, ...), or a dictionary of these.
    :param returns: Targets of the critic, shape (D,).
    :param old_values: Values when the decisions were made, shape (D,).
    :param advantages: Shape (D,).
    :param n_executed: How many actions of each chunk were executed, shape (D,).
    :param decision_index: Which decision a pair belongs to, shape (N,).
    :param denoising_index: Which denoising step of it, 0 being the noisiest that is fine-tuned, shape (N,).
    :param chain_prev: Iterates before the steps, shape (N, Tp, Da).
    :param chain_next: Iterates after the steps, shape (N, Tp, Da).
    :param old_log_prob: Log-probabilities when sampled, clamped and averaged over executed actions, shape (N,).
    :param value_index: The critic's decisions, shape (V,).
    :param bc_noise: Noise for chains of the base policy, shape (S+1, M, Tp, Da), or ``None``.
    :param bc_index: Their decisions, shape (M,). ``None`` means ``decision_index``.
    :param whole: The minibatch that this is one rank's share of, or ``None`` if this is all of it.
    """

    observations: TensorDict | th.Tensor
    returns: th.Tensor
    old_values: th.Tensor
    advantages: th.Tensor
    n_executed: th.Tensor
    decision_index: th.Tensor
    denoising_index: th.Tensor
    chain_prev: th.Tensor
    chain_next: th.Tensor
    old_log_prob: th.Tensor
    value_index: th.Tensor
    bc_noise: th.Tensor | None = None
    bc_index: th.Tensor | None = None
    whole: WholeMinibatch | None = None

    @property
    def n_pairs(self) -> int:
        """Pairs of the minibatch, those of all ranks."""
        return len(self.decision_index if self.whole is None else self.whole.advantages)

    @property
    def n_values(self) -> int:
        """The critic's decisions in the minibatch, those of all ranks."""
        return len(self.value_index) if self.whole is None else self.whole.n_values

    def pairs(self, rows: slice) -> "DenoisingRolloutBufferSamples":
        """The minibatch with these pairs only, without a copy."""
        names = ("decision_index", "denoising_index", "chain_prev", "chain_next", "old_log_prob")
        return self._replace(**{name: getattr(self, name)[rows] for name in names})


class RewardScaler:
    """Divides decisions' rewards by the running std of their discounted return, and clips them to ± 10."""

    epsilon = 1e-8
    clip = 10.0

    def __init__(self, n_envs: int = 0) -> None:
        self.statistics = RunningMeanStd(shape=())
        self.forget_episodes(n_envs)

    def forget_episodes(self, n_envs: int) -> None:
        """Begin new episodes in this number of envs and keep the statistics."""
        self.returns = np.zeros(n_envs)

    def scale(self, rewards: np.ndarray) -> np.ndarray:
        """The rewards, scaled."""
        return np.clip(rewards / np.sqrt(self.statistics.var + self.epsilon), -self.clip, self.clip)


class DenoisingRolloutBuffer(RolloutBuffer):
    """
    Decisions of one rollout, in the order in which they were made, with the denoising chains that led to them.

    A decision lasts 1 … ``act_steps`` env steps. The envs decide together every ``act_steps`` steps; one whose episode ends in
    between decides again alone, and that chunk is cut at the next common boundary. So there are at least
    ``buffer_size / act_steps`` decisions per env, for which memory is allocated, and it grows if many episodes end.

    :param buffer_size: Env steps per env and rollout, a multiple of ``act_steps``.
    :param observation_space: Observation space.
    :param action_space: Action space.
    :param horizon: Tp, actions in a chunk.
    :param act_steps: Ta, actions that are executed of it.
    :param first_action: Number of the first of them in the chunk.
    :param ft_denoising_steps: K', the denoising steps that are kept.
    :param args: Those of SB3's ``RolloutBuffer``: ``device``, where tensors are kept, ``gae_lambda``, per decision, ``gamma``,
        of a decision of ``act_steps`` env steps, and ``n_envs``.
    """

    observation_space: spaces.Space
    obs_shape: Any

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        horizon: int,
        act_steps: int,
        ft_denoising_steps: int,
        *args: Any,
        first_action: int = 0,
        **kwargs: Any,
    ) -> None:
        self.horizon = horizon
        self.first_action = first_action
        self.act_steps = act_steps
        self.ft_denoising_steps = ft_denoising_steps
        super().__init__(buffer_size, observation_space, action_space, *args, **kwargs)
        self._allocate(self.n_envs * max(1, buffer_size // act_steps))

    def _allocate(self, capacity: int) -> None:
        """Make room for as many decisions, and keep those that are there."""

        def grown(old: Any, new: Any) -> Any:
            if old is not None:
                new[: self.pos] = old[: self.pos]
            return new

        K, chunk = self.ft_denoising_steps, (self.horizon, self.action_dim)
        for name, shape in dict(chains=(K + 1, *chunk), log_probs=(K, self.horizon), old_values=()).items():
            new = th.zeros((capacity, *shape), device=self.device)
            setattr(self, name, grown(getattr(self, name, None), new))
        kinds = dict(env_index=int, rewards=float, n_executed=int, episode_end=bool, bootstrap_values=float)
        for name, kind in kinds.items():
            setattr(self, name, grown(getattr(self, name, None), np.zeros(capacity, dtype=kind)))
        old, shapes = getattr(self, "observations", None), self.obs_shape
        parts: Any = {}
        for key, space in parts_of_space(self.observation_space).items():
            # Observations keep their type, except that nothing needs float64.
            dtype = th.as_tensor(np.zeros((), dtype=space.dtype)).dtype
            shape = shapes[key] if isinstance(shapes, dict) else shapes
            new = th.zeros((capacity, *shape), dtype=th.float if dtype == th.double else dtype, device=self.device)
            parts[key] = grown(old[key] if isinstance(old, dict) else old, new)
        self.observations = parts if isinstance(self.observation_space, spaces.Dict) else parts[""]
        self.capacity = capacity

    observations: TensorDict | th.Tensor  # type: ignore[assignment]
    chains: th.Tensor
    log_probs: th.Tensor  # type: ignore[assignment]
    old_values: th.Tensor
    advantages: th.Tensor  # type: ignore[assignment]
    returns: th.Tensor  # type: ignore[assignment]
    executed: th.Tensor
    all_advantages: th.Tensor
    local_index: th.Tensor | None
    env_index: np.ndarray
    rewards: np.ndarray
    n_executed: np.ndarray
    episode_end: np.ndarray
    bootstrap_values: np.ndarray

    def reset(self) -> None:
        """Forget all decisions."""
        BaseBuffer.reset(self)
        # Decisions that were made at the same env step: each env occurs at most once in such a slice.
        self.rounds: list[slice] = []
        self.last_decision = np.zeros(self.n_envs, dtype=np.int64)

    def size(self) -> int:
        """D, the number of decisions."""
        return self.pos

    def add(  # type: ignore[override]
        self, env_index: np.ndarray, obs: PyTorchObs, chain: th.Tensor, log_prob: th.Tensor, values: th.Tensor
    ) -> None:
        """
        Add a decision for each of some envs: ``env_index`` (B,), each at most once, what they observed (B, ...), denoising
        chains (B, K'+1, Tp, Da), elementwise log-densities (B, K', Tp, Da) and values of the observations (B, 1).
        """
        rows = slice(self.pos, self.pos + len(env_index))
        if rows.stop > self.capacity:
            self._allocate(max(2 * self.capacity, rows.stop))
        for target, part in zip(parts_of(self.observations), parts_of(obs), strict=True):
            target[rows] = part.reshape(len(env_index), *target.shape[1:])
        self.chains[rows] = chain
        self.set_log_probs(rows, log_prob)
        self.old_values[rows] = values.flatten()
        self.env_index[rows] = env_index
        for array in (self.rewards, self.n_executed, self.episode_end, self.bootstrap_values):
            array[rows] = 0
        self.last_decision[env_index] = np.arange(rows.start, rows.stop)
        self.rounds.append(rows)
        self.pos = rows.stop

    def set_log_probs(self, rows: slice, log_prob: th.Tensor) -> None:
        """Keep what is needed of the elementwise log-densities of some decisions, shape (B, K', Tp, Da)."""
        self.log_probs[rows] = log_prob.clamp(*LOG_PROB_RANGE).mean(dim=-1)

    def add_rewards(self, rewards: np.ndarray) -> None:
        """Add the rewards of one env step in every env, shape (n_envs,), to the decisions that they belong to."""
        # A SubprocVecEnv's are float64, a DummyVecEnv's float32: the same, so that both give the same run.
        self.rewards[self.last_decision] += rewards.astype(np.float32)
        self.n_executed[self.last_decision] += 1

    def end_episodes(self, env_index: np.ndarray, bootstrap_values: np.ndarray) -> None:
        """
        Mark that the episodes of some envs, shape (B,), have ended. ``bootstrap_values``, shape (B,), are those of the last
        observations where an episode was truncated, and 0 where it terminated.
        """
        rows = self.last_decision[env_index]
        self.episode_end[rows] = True
        self.bootstrap_values[rows] = bootstrap_values

    def discounts(self) -> np.ndarray:
        """γ to the number of executed actions over ``act_steps``, for each decision, shape (D,)."""
        return self.gamma ** (self.n_executed[: self.pos] / self.act_steps)

    def scale_rewards(self, scaler: RewardScaler) -> None:
        """Update the scaler, which knows the returns so far of the envs' episodes, with this rollout; scale its rewards."""
        discounts, discounted = self.discounts(), np.zeros(self.pos)
        for rows in self.rounds:
            envs = self.env_index[rows]
            # What the running return is worth after this decision is discounted by how long the decision lasts.
            discounted[rows] = scaler.returns[envs] + self.rewards[rows]
            scaler.returns[envs] = np.where(self.episode_end[rows], 0.0, discounts[rows] * discounted[rows])
        scaler.statistics.update_from_moments(*ranks.moments(discounted))
        self.rewards[: self.pos] = scaler.scale(self.rewards[: self.pos])

    def compute_returns_and_advantage(self, last_values: th.Tensor) -> None:  # type: ignore[override]
        """
        Generalised advantage estimation over decisions (Schulman et al. 2016), never across the end of an episode.
        ``last_values`` are those of the observations after the last env step, shape (n_envs, 1).
        """
        values, discounts = self.old_values[: self.pos].cpu().numpy().astype(np.float64), self.discounts()
        next_values = last_values.cpu().numpy().astype(np.float64).flatten()
        next_advantages = np.zeros(self.n_envs)
        advantages = np.zeros(self.pos)
        for rows in reversed(self.rounds):
            envs, ends = self.env_index[rows], self.episode_end[rows]
            following = np.where(ends, self.bootstrap_values[rows], next_values[envs])
            delta = self.rewards[rows] + discounts[rows] * following - values[rows]
            advantages[rows] = delta + np.where(ends, 0.0, discounts[rows] * self.gae_lambda * next_advantages[envs])
            next_values[envs] = values[rows]
            next_advantages[envs] = advantages[rows]
        self.advantages = self.to_torch(advantages.astype(np.float32))
        self.executed = self.to_torch(self.n_executed[: self.pos])
        self.returns = self.advantages + self.old_values[: self.pos]
        self.all_advantages, self.local_index = self.advantages, None
        if ranks.size() > 1:
            self._exchange()

    def _exchange(self) -> None:
        """
        Learn the advantages of all ranks' decisions, in the order in which one process with all envs would have made them:
        ``all_advantages``, shape (A,), and which of this rank's each is, or -1, ``local_index``, shape (A,).
        """
        # The env step at which each decision was made.
        start, clock = np.zeros(self.pos, dtype=int), np.zeros(self.n_envs, dtype=int)
        for rows in self.rounds:
            envs = self.env_index[rows]
            start[rows] = clock[envs]
            clock[envs] += self.n_executed[rows]
        parts = ranks.gather((start, self.env_index[: self.pos], self.advantages.cpu().numpy()))
        starts, envs, every = (np.concatenate([part[i] for part in parts]) for i in range(3))
        owner = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
        number = np.concatenate([np.arange(len(part[0])) for part in parts])
        order = np.lexsort((envs, owner, starts))
        self.all_advantages = self.to_torch(every[order])
        self.local_index = self.to_torch(np.where(owner == ranks.rank(), number, -1)[order])

    def get(  # type: ignore[override]
        self, batch_size: int | None = None, shuffle: str = "pairs"
    ) -> Iterator[DenoisingRolloutBufferSamples]:
        """
        One epoch: each (decision, denoising index) pair and each decision of the critic once, in random order. With several
        ranks, minibatches are drawn from the decisions of all, and each gets its share.

        :param batch_size: Pairs in a minibatch, about: an epoch is split into nearly equal ones. ``None`` means all pairs.
        :param shuffle: "pairs" draws them from all decisions and steps, "decisions" keeps those of a decision together.
        """
        D, K = len(self.all_advantages), self.ft_denoising_steps
        group = 1 if shuffle == "pairs" else K
        n_batches = 1
        if batch_size is not None:
            # At least two rows in each, if that many are asked for: one can't be normalised.
            at_least = min(2, max(1, batch_size // group))
            n_batches = max(1, min(round(D * K / batch_size), D * K // group // at_least))
        if shuffle == "pairs":
            pairs = th.randperm(D * K, device=self.device)
        else:
            decisions = th.randperm(D, device=self.device)
            pairs = (decisions[:, None] * K + th.arange(K, device=self.device)).flatten()
        # The critic goes once over the decisions, in as many slices as there are minibatches.
        decisions = th.randperm(D, device=self.device)
        for batch, values in zip(equal_slices(D * K, n_batches, group), equal_slices(D, n_batches), strict=True):
            yield self._get_samples(pairs[batch], decisions[values])

    def _get_samples(self, batch_inds: th.Tensor, value_index: th.Tensor) -> DenoisingRolloutBufferSamples:  # type: ignore[override]
        """A minibatch of pairs, numbered decision by decision, shape (N,), and the critic's decisions, shape (V,)."""
        decision_index, whole = batch_inds // self.ft_denoising_steps, None
        denoising_index = batch_inds % self.ft_denoising_steps
        if self.local_index is not None:
            own_pairs = (self.local_index[decision_index] >= 0).nonzero().flatten()
            own_values = (self.local_index[value_index] >= 0).nonzero().flatten()
            whole = WholeMinibatch(self.all_advantages[decision_index], own_pairs, len(value_index), own_values)
            decision_index, denoising_index = self.local_index[decision_index[own_pairs]], denoising_index[own_pairs]
            value_index = self.local_index[value_index[own_values]]
        # Clamped and averaged over action dimensions already, over executed actions only here.
        old_log_prob = self.log_probs[decision_index, denoising_index, :, None]
        return DenoisingRolloutBufferSamples(
            observations=take(self.observations, slice(self.pos)),
            returns=self.returns,
            old_values=self.old_values[: self.pos],
            advantages=self.advantages,
            n_executed=self.executed,
            decision_index=decision_index,
            denoising_index=denoising_index,
            chain_prev=self.chains[decision_index, denoising_index],
            chain_next=self.chains[decision_index, denoising_index + 1],
            old_log_prob=mean_log_prob(old_log_prob, self.executed[decision_index], self.first_action),
            value_index=value_index,
            whole=whole,
        )


def equal_slices(n: int, n_slices: int, group: int = 1) -> list[slice]:
    """``n`` rows in ``n_slices`` nearly equal slices that keep ``group`` of them together; of no rows, there may be none."""
    bounds = [group * (i * (n // group) // max(1, n_slices)) for i in range(n_slices + 1)]
    return [slice(*bound) for bound in pairwise(bounds)]
