"""
Rollouts, chunks and minibatches against a slow, obvious model of them, on any mix of episodes that hypothesis comes up with.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dppo import DPPO
from sb3_dppo.buffers import DenoisingRolloutBuffer, RewardScaler
from sb3_dppo.features.observations import take
from tests.cases import CASES, GROWING, Case, Step


@dataclass
class Decision:
    """What a decision of one env came to."""

    env: int
    first: int  # env step of the rollout at which it was made
    steps: list[Step] = field(default_factory=list)
    value: float = 0.0
    bootstrap: float = 0.0  # value after its last step, if its episode was truncated there

    @property
    def reward(self) -> float:
        return sum(step.reward for step in self.steps)

    def discount(self, case: Case) -> float:
        return case.gamma ** (len(self.steps) / case.act_steps)


def decisions_of(case: Case, lives: list[list[Step]], rollout: int) -> list[list[Decision]]:
    """
    :return: The decisions of each env in a rollout, in order: one at every common boundary and one after every episode.
    """
    result = []
    for env, life in enumerate(lives):
        decisions: list[Decision] = []
        for t, step in enumerate(life[rollout * case.n_steps : (rollout + 1) * case.n_steps]):
            if t % case.act_steps == 0 or decisions[-1].steps[-1].ends:
                decisions.append(Decision(env, t))
            decisions[-1].steps.append(step)
        result.append(decisions)
    return result


def in_order(decisions: list[list[Decision]]) -> list[Decision]:
    """
    :return: The decisions of all envs in the order in which they are made.
    """
    return sorted(chain.from_iterable(decisions), key=lambda decision: (decision.first, decision.env))


def textbook_advantages(
    case: Case, decisions: list[Decision], rewards: dict[int, float], last_value: float
) -> dict[int, float]:
    """
    Generalised advantage estimation as it is defined, a sum for each decision of one env.

    :param rewards: Scaled rewards by the id of the decision.
    :return: Advantages by the id of the decision.
    """
    advantages = {}
    for i, decision in enumerate(decisions):
        advantage, weight = 0.0, 1.0
        for later, following in zip(decisions[i:], [*decisions[i + 1 :], None], strict=True):
            ends = later.steps[-1].ends
            next_value = later.bootstrap if ends else last_value if following is None else following.value
            advantage += weight * (rewards[id(later)] + later.discount(case) * next_value - later.value)
            weight *= later.discount(case) * case.gae_lambda
            if ends:
                break
        advantages[id(decision)] = advantage
    return advantages


def discounted_rewards(case: Case, decisions: list[Decision], rewards: dict[int, float], last_value: float) -> list[float]:
    """
    :return: For each decision of one env what λ = 1 estimates: the discounted rewards until its episode or the rollout ends,
        and the value there.
    """
    sums = []
    for i in range(len(decisions)):
        total, weight = 0.0, 1.0
        for later in decisions[i:]:
            total += weight * rewards[id(later)]
            weight *= later.discount(case)
            if later.steps[-1].ends:
                total += weight * later.bootstrap
                break
        else:
            total += weight * last_value
        sums.append(total)
    return sums


class ScalingModel:
    """All discounted returns that there have been, and the running return of each env's episode."""

    def __init__(self, n_envs: int) -> None:
        self.seen: list[float] = []
        self.running = [0.0] * n_envs

    def scale(self, case: Case, decisions: list[list[Decision]]) -> dict[int, float]:
        """
        :return: Scaled rewards by the id of the decision.
        """
        for env, of_env in enumerate(decisions):
            for decision in of_env:
                self.running[env] += decision.reward
                self.seen.append(self.running[env])
                self.running[env] = 0.0 if decision.steps[-1].ends else decision.discount(case) * self.running[env]
        # SB3's running statistics begin with a variance of 1 and a weight of 1e-4.
        weight = 1e-4 + len(self.seen)
        mean = sum(self.seen) / weight
        variance = (1e-4 + sum(value**2 for value in self.seen)) / weight - mean**2
        return {id(d): float(np.clip(d.reward / np.sqrt(variance + 1e-8), -10, 10)) for d in in_order(decisions)}


# ---------------------------------------------------------------------- what must hold


def check_accounting(case: Case, buffer: DenoisingRolloutBuffer, decisions: list[list[Decision]]) -> None:
    """Each row is one decision of the model; no env step is lost or counted twice, and no decision crosses an episode."""
    expected, rows = in_order(decisions), slice(buffer.size())
    assert buffer.size() == len(expected)
    assert buffer.env_index[rows].tolist() == [decision.env for decision in expected]
    assert buffer.n_executed[rows].tolist() == [len(decision.steps) for decision in expected]
    assert buffer.episode_end[rows].tolist() == [decision.steps[-1].ends for decision in expected]
    assert not any(step.ends for decision in expected for step in decision.steps[:-1])
    assert np.bincount(buffer.env_index[rows], buffer.n_executed[rows]).tolist() == [case.n_steps] * case.n_envs
    assert (buffer.n_executed[rows] <= case.act_steps).all()
    np.testing.assert_allclose(buffer.bootstrap_values[rows], [decision.bootstrap for decision in expected], rtol=1e-5)


def check_estimates(
    case: Case,
    buffer: DenoisingRolloutBuffer,
    decisions: list[list[Decision]],
    rewards: dict[int, float],
    last_values: list[float],
) -> None:
    """Scaled rewards, advantages and returns are what their definitions say."""
    expected, rows = in_order(decisions), slice(buffer.size())
    np.testing.assert_allclose(buffer.rewards[rows], [rewards[id(d)] for d in expected], rtol=1e-6, atol=1e-9)
    advantages: dict[int, float] = {}
    for of_env, last_value in zip(decisions, last_values, strict=True):
        advantages |= textbook_advantages(case, of_env, rewards, last_value)
    values = np.array([d.value for d in expected])
    scale = 1 + np.abs(values).max() + max(map(abs, advantages.values()))
    np.testing.assert_allclose(buffer.advantages, [advantages[id(d)] for d in expected], rtol=1e-5, atol=1e-6 * scale)
    np.testing.assert_allclose(buffer.returns, buffer.advantages.numpy() + values, rtol=1e-5, atol=1e-6 * scale)
    if case.gae_lambda == 1:
        for env, (of_env, last_value) in enumerate(zip(decisions, last_values, strict=True)):
            sums = discounted_rewards(case, of_env, rewards, last_value)
            returns = buffer.returns[th.as_tensor(buffer.env_index[rows] == env)]
            np.testing.assert_allclose(returns, sums, rtol=1e-5, atol=1e-6 * scale)


def check_minibatches(buffer: DenoisingRolloutBuffer, batch_size: int | None, shuffle: str) -> None:
    """An epoch has each pair and each decision of the critic once, in nearly equal minibatches of what was stored."""
    D, K = buffer.size(), buffer.ft_denoising_steps
    batches = list(buffer.get(batch_size, shuffle))
    pairs = [(d, i) for b in batches for d, i in zip(b.decision_index.tolist(), b.denoising_index.tolist(), strict=True)]
    assert sorted(pairs) == [(d, i) for d in range(D) for i in range(K)]
    assert sorted(d for b in batches for d in b.value_index.tolist()) == list(range(D))
    wanted = 1 if batch_size is None else max(1, round(D * K / batch_size))
    assert len(batches) == (wanted if shuffle == "pairs" else min(wanted, D))
    group = 1 if shuffle == "pairs" else K
    sizes, value_sizes = [len(b.decision_index) for b in batches], [len(b.value_index) for b in batches]
    assert 0 < min(sizes) and max(sizes) - min(sizes) <= group and max(value_sizes) - min(value_sizes) <= 1
    for b in batches:
        if shuffle == "decisions":
            assert b.denoising_index.tolist() == list(range(K)) * (len(b.denoising_index) // K)
            assert (b.decision_index.view(-1, K) == b.decision_index.view(-1, K)[:, :1]).all()
        for name, values in dict(advantages=buffer.advantages, returns=buffer.returns).items():
            assert th.equal(getattr(b, name), values)
        assert b.n_executed.tolist() == buffer.n_executed[:D].tolist()
        for row, (d, i) in enumerate(zip(b.decision_index.tolist(), b.denoising_index.tolist(), strict=True)):
            assert th.equal(b.chain_prev[row], buffer.chains[d, i])
            assert th.equal(b.chain_next[row], buffer.chains[d, i + 1])


# ---------------------------------------------------------------------- the buffer alone

SPACES: dict[str, spaces.Space] = {
    "vector": spaces.Box(-np.inf, np.inf, (2,), np.float64),
    "image": spaces.Box(0, 255, (3, 2, 2), np.uint8),
    "discrete": spaces.Discrete(5),
    "dict": spaces.Dict(rgb=spaces.Box(0, 255, (3, 2, 2), np.uint8), speed=spaces.Box(-1, 1, (1,), np.float32)),
}


def random_obs(rng: np.random.Generator, space: spaces.Space, n: int) -> Any:
    """
    :return: Observations of ``n`` envs, as the policy gets them.
    """
    space.seed(int(rng.integers(2**31)))
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: th.as_tensor(np.stack([sample[key] for sample in samples])) for key in space.spaces}
    return th.as_tensor(np.stack(samples))


def fill(
    case: Case, buffer: DenoisingRolloutBuffer, decisions: list[list[Decision]], rng: np.random.Generator
) -> list[tuple[Any, th.Tensor, th.Tensor]]:
    """
    Put one rollout into the buffer, with random values, observations, chains and log-probabilities.

    :return: Observation, chain and log-probabilities of each row.
    """
    added = []
    by_step: dict[int, list[Decision]] = {}
    for decision in in_order(decisions):
        by_step.setdefault(decision.first, []).append(decision)
    under_way: dict[int, Decision] = {}
    for t in range(case.n_steps):
        if t in by_step:
            made, n = by_step[t], len(by_step[t])
            chunk = (case.act_steps + case.spare_actions, 2)
            obs = random_obs(rng, buffer.observation_space, n)
            chains = th.as_tensor(rng.normal(size=(n, case.ft_denoising_steps + 1, *chunk)), dtype=th.float)
            log_prob = th.as_tensor(rng.normal(scale=4, size=(n, case.ft_denoising_steps, *chunk)), dtype=th.float)
            values = th.as_tensor(rng.normal(size=(n, 1)), dtype=th.float)
            buffer.add(np.array([decision.env for decision in made]), obs, chains, log_prob, values)
            for i, decision in enumerate(made):
                decision.value = values[i].item()
                under_way[decision.env] = decision
                added.append((take(obs, i), chains[i], log_prob[i]))
        steps = [under_way[env].steps[t - under_way[env].first] for env in range(case.n_envs)]
        buffer.add_rewards(np.array([step.reward for step in steps]))
        ended = [env for env in range(case.n_envs) if steps[env].ends]
        for env in ended:
            if not steps[env].terminated:
                under_way[env].bootstrap = float(rng.normal())
        if ended:
            buffer.end_episodes(np.array(ended), np.array([under_way[env].bootstrap for env in ended]))
    return added


def check_stored(buffer: DenoisingRolloutBuffer, added: list[tuple[Any, th.Tensor, th.Tensor]]) -> None:
    """What was added is there, also when the memory has grown since."""
    samples = next(buffer.get(None))
    old_log_prob = dict(
        zip(
            zip(samples.decision_index.tolist(), samples.denoising_index.tolist(), strict=True),
            samples.old_log_prob.tolist(),
            strict=True,
        )
    )
    for row, (obs, chains, log_prob) in enumerate(added):
        stored = take(samples.observations, row)
        for key in obs if isinstance(obs, dict) else [...]:
            assert stored[key].dtype == (th.float if obs[key].dtype == th.double else obs[key].dtype)
            # Discrete observations have a dimension of their own.
            assert th.equal(stored[key].flatten(), obs[key].to(stored[key].dtype).flatten())
        assert th.equal(buffer.chains[row], chains)
        n = int(buffer.n_executed[row])
        for i in range(len(log_prob)):
            assert old_log_prob[row, i] == pytest.approx(log_prob[i, :n].clamp(-5, 2).mean().item(), rel=1e-4, abs=1e-5)


def check_buffer(case: Case, space: str, scale: bool, batch_size: int | None, shuffle: str) -> None:
    rng = np.random.default_rng(case.seed)
    buffer = DenoisingRolloutBuffer(
        case.n_steps,
        SPACES[space],
        spaces.Box(-1, 1, (2,)),
        horizon=case.act_steps + case.spare_actions,
        act_steps=case.act_steps,
        ft_denoising_steps=case.ft_denoising_steps,
        device="cpu",
        gae_lambda=case.gae_lambda,
        gamma=case.gamma,
        n_envs=case.n_envs,
    )
    scaler, scaling_model = RewardScaler(case.n_envs), ScalingModel(case.n_envs)
    lives = case.lives()
    for rollout in range(case.n_rollouts):
        buffer.reset()
        decisions = decisions_of(case, lives, rollout)
        added = fill(case, buffer, decisions, rng)
        check_accounting(case, buffer, decisions)
        rewards = {id(d): d.reward for d in in_order(decisions)}
        np.testing.assert_allclose(buffer.rewards[: buffer.size()], [rewards[id(d)] for d in in_order(decisions)], rtol=1e-9)
        if scale:
            buffer.scale_rewards(scaler)
            rewards = scaling_model.scale(case, decisions)
        last_values = rng.normal(size=case.n_envs)
        buffer.compute_returns_and_advantage(th.as_tensor(last_values, dtype=th.float)[:, None])
        check_estimates(case, buffer, decisions, rewards, last_values.tolist())
        check_stored(buffer, added)
        check_minibatches(buffer, batch_size, shuffle)


# ---------------------------------------------------------------------- rollouts of the algorithm


class ScriptedEnv(gym.Env):
    """
    Lives one of the model's lives. Observes how many steps and episodes it has had; keeps every action that it executes.

    :param env: Its number, which it observes, too.
    :param life: What its steps come to.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Box(np.array([-1.0, -3.0]), np.array([2.0, 0.5]), dtype=np.float64)

    def __init__(self, env: int, life: list[Step]) -> None:
        self.env, self.life = env, life
        self.t, self.episode = 0, -1
        self.actions: list[np.ndarray] = []

    def _obs(self) -> np.ndarray:
        return np.array([self.env, self.t, self.episode]) / 10

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(np.asarray(action, dtype=np.float64)), action
        self.actions.append(np.array(action))
        reward, terminated, truncated = self.life[self.t]
        self.t += 1
        return self._obs(), reward, terminated, truncated, {}


def make_model(case: Case, **kwargs: Any) -> tuple[DPPO, list[ScriptedEnv]]:
    # One step to spare, so that an env is never asked for more than its life.
    envs = [ScriptedEnv(i, [*life, Step(0.0, True, False)]) for i, life in enumerate(case.lives())]
    model = DPPO(
        "DiffusionMlpPolicy",
        DummyVecEnv([lambda env=env: env for env in envs]),  # type: ignore[misc]
        n_steps=case.n_steps,
        normalize_advantage=False,  # some rollouts have one decision
        act_steps=case.act_steps,
        gamma=case.gamma,
        gae_lambda=case.gae_lambda,
        ft_denoising_steps=case.ft_denoising_steps,
        policy_kwargs=dict(
            horizon=case.act_steps + case.spare_actions, denoising_steps=3, net_arch=dict(pi=[8], vf=[8]), time_dim=4
        ),
        seed=case.seed % 2**31,
        device="cpu",
        **kwargs,
    )
    return model, envs


def value_of(model: DPPO, obs: Any) -> float:
    with th.no_grad():
        return model.policy.predict_values(th.tensor(np.array(obs)[None])).item()


def check_rollouts(case: Case, scale: bool) -> None:
    model, envs = make_model(case, scale_rewards=scale)
    _, callback = model._setup_learn(10**6)
    buffer, scaling_model, lives = model.rollout_buffer, ScalingModel(case.n_envs), case.lives()
    n_episodes = [0] * case.n_envs
    for rollout in range(case.n_rollouts):
        start = rollout * case.n_steps
        assert model.collect_rollouts(model.env, callback, buffer, case.n_steps)  # type: ignore[arg-type]
        assert model.num_timesteps == case.n_envs * (start + case.n_steps)
        decisions = decisions_of(case, lives, rollout)
        for decision in in_order(decisions):
            obs = np.array([decision.env, start + decision.first, n_episodes[decision.env]]) / 10
            decision.value = value_of(model, obs)
            if decision.steps[-1].ends:
                if not decision.steps[-1].terminated:
                    obs = np.array([decision.env, start + decision.first + len(decision.steps), obs[2] * 10]) / 10
                    decision.bootstrap = value_of(model, obs)
                n_episodes[decision.env] += 1
        check_accounting(case, buffer, decisions)
        # In order, the executed parts of the chunks are what the envs executed: each action once.
        chunks = model.policy.normalizer.unnormalize_actions(buffer.chains[: buffer.size(), -1])
        played: list[list[np.ndarray]] = [[] for _ in envs]
        for row, decision in enumerate(in_order(decisions)):
            played[decision.env].extend(chunks[row, : len(decision.steps)])
        for env, actions in zip(envs, played, strict=True):
            np.testing.assert_array_equal(env.actions[start:], actions)
        rewards = {id(d): d.reward for d in in_order(decisions)}
        if scale:
            rewards = scaling_model.scale(case, decisions)
        last_values = [value_of(model, env._obs()) for env in envs]
        check_estimates(case, buffer, decisions, rewards, last_values)


def check_predict(case: Case, with_episode_start: bool) -> None:
    """``predict`` with its state executes the first actions of a chunk, then or at an episode's start plans again."""
    model, envs = make_model(case)
    vec_env: Any = model.env
    obs, state, starts = vec_env.reset(), None, np.ones(case.n_envs, dtype=bool)
    queues: list[list[np.ndarray]] = [[] for _ in envs]
    for _ in range(case.n_steps):
        given_state = None if state is None else tuple(array.copy() for array in state)
        episode_start = starts if with_episode_start else None
        actions, next_state = model.predict(obs, state, episode_start, deterministic=True)  # type: ignore[arg-type]
        for env, queue in enumerate(queues):
            if not queue or (with_episode_start and starts[env]):
                queue[:] = model.policy.plan(th.as_tensor(obs[env : env + 1]), deterministic=True)[0][: case.act_steps]
            np.testing.assert_allclose(actions[env], queue.pop(0), rtol=1e-5, atol=1e-5)
        # What it was given is as it was, so that the caller may come back to it.
        if state is not None and given_state is not None:
            for array, before in zip(state, given_state, strict=True):
                np.testing.assert_array_equal(array, before)
        state = next_state  # type: ignore[assignment]
        obs, _, starts, _ = vec_env.step(actions)


# ---------------------------------------------------------------------- tests

BUFFER = dict(
    case=CASES,
    space=st.sampled_from(sorted(SPACES)),
    scale=st.booleans(),
    batch_size=st.one_of(st.none(), st.integers(1, 200)),
    shuffle=st.sampled_from(["pairs", "decisions"]),
)
ROLLOUTS = dict(case=CASES, scale=st.booleans())
PREDICT = dict(case=CASES, with_episode_start=st.booleans())


@settings(max_examples=400)
@given(**BUFFER)
@example(case=GROWING, space="dict", scale=True, batch_size=5, shuffle="pairs")
def test_buffer(**drawn: Any) -> None:
    check_buffer(**drawn)


@settings(max_examples=200)
@given(**ROLLOUTS)
@example(case=GROWING, scale=True)
def test_rollouts(**drawn: Any) -> None:
    check_rollouts(**drawn)


@settings(max_examples=200)
@given(**PREDICT)
def test_predict(**drawn: Any) -> None:
    check_predict(**drawn)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "strategies", "max_examples"),
    [(check_buffer, BUFFER, 4000), (check_rollouts, ROLLOUTS, 1500), (check_predict, PREDICT, 1000)],
)
def test_many(check: Callable[..., None], strategies: dict[str, Any], max_examples: int) -> None:
    # Other examples each time.
    settings(max_examples=max_examples, derandomize=False)(given(**strategies)(check))()
