"""GAE and reward scaling beside arrays that the reference implementation computed (see tests/data/README.md)."""

import json
from pathlib import Path

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_dppo.buffers import DenoisingRolloutBuffer, RewardScaler

DATA = Path(__file__).parent / "data"


def fill_buffer(rewards: np.ndarray, values: np.ndarray, gamma: float, gae_lambda: float) -> DenoisingRolloutBuffer:
    """Decisions of one env step each: ``rewards`` and ``values`` have shape (T, n)."""
    n_steps, n_envs = rewards.shape
    buffer = DenoisingRolloutBuffer(
        n_steps, spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,)), 1, 1, 1, "cpu", gae_lambda, gamma, n_envs
    )
    for t in range(n_steps):
        envs = np.arange(n_envs)
        chain = th.zeros(n_envs, 2, 1, 1)
        buffer.add(envs, th.zeros(n_envs, 1), chain, chain[:, 1:], th.as_tensor(values[t])[:, None])
        buffer.add_rewards(rewards[t])
    return buffer


def test_gae_agrees_where_no_episode_is_truncated_and_bootstraps_where_one_is() -> None:
    with np.load(DATA / "gae_plain.npz") as archive:
        data = dict(archive)
    config = json.loads(str(data["config"])) if "config" in data else dict(gamma=0.97, gae_lambda=0.9)
    rewards, values, last = data["rewards_used"], data["values"], data["last_values"]
    terminated, truncated = data["terminated"], data["truncated"]
    n_steps, n_envs = rewards.shape
    terminal_value = 0.37

    buffer = DenoisingRolloutBuffer(
        n_steps,
        spaces.Box(-1, 1, (1,)),
        spaces.Box(-1, 1, (1,)),
        1,
        1,
        1,
        "cpu",
        config["gae_lambda"],
        config["gamma"],
        n_envs,
    )
    for t in range(n_steps):
        chain = th.zeros(n_envs, 2, 1, 1)
        buffer.add(np.arange(n_envs), th.zeros(n_envs, 1), chain, chain[:, 1:], th.as_tensor(values[t])[:, None])
        buffer.add_rewards(rewards[t])
        ended = np.flatnonzero(terminated[t] | truncated[t])
        buffer.end_episodes(ended, np.where(terminated[t, ended], 0.0, terminal_value))
    buffer.compute_returns_and_advantage(th.as_tensor(last)[:, None])
    ours = buffer.advantages.numpy().reshape(n_steps, n_envs)

    # The definition: never across an end, and the value of the last observation where an episode was cut.
    expected, following = np.zeros((n_steps, n_envs)), np.zeros(n_envs)
    for t in reversed(range(n_steps)):
        end = terminated[t] | truncated[t]
        next_value = last if t == n_steps - 1 else values[t + 1]
        next_value = np.where(terminated[t], 0.0, np.where(truncated[t], terminal_value, next_value))
        delta = rewards[t] + config["gamma"] * next_value - values[t]
        following = expected[t] = delta + config["gamma"] * config["gae_lambda"] * np.where(end, 0.0, following)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    # The same as the reference after each env's last truncated step, and different at and before one.
    cut = truncated & ~terminated
    assert cut.any()
    for env in range(n_envs):
        cuts = np.flatnonzero(cut[:, env])
        after = cuts[-1] + 1 if len(cuts) else 0
        np.testing.assert_allclose(ours[after:, env], data["agent_advantages"][after:, env], rtol=1e-5, atol=1e-6)
        for t in cuts:
            assert abs(ours[t, env] - data["agent_advantages"][t, env]) > 1e-3


def test_short_decisions_are_discounted_by_their_length() -> None:
    """Two of four actions executed: γ^(2/4), where the reference discounts each decision by γ."""
    gamma, gae_lambda = 0.9, 0.8
    box = spaces.Box(-1, 1, (1,))
    buffer = DenoisingRolloutBuffer(8, box, box, 4, 4, 1, "cpu", gae_lambda, gamma, n_envs=1)
    chain, env = th.zeros(1, 2, 4, 1), np.array([0])
    values, rewards = [0.5, -0.2, 0.3], [[1.0, 1.0], [2.0, 0.5], [0.1, 0.2, 0.3, 0.4]]
    for decision in range(3):
        buffer.add(env, th.zeros(1, 1), chain, chain[:, 1:], th.tensor([[values[decision]]]))
        for reward in rewards[decision]:
            buffer.add_rewards(np.array([reward]))
        if decision == 0:  # the episode is truncated in the middle of the window: the next decision is cut
            buffer.end_episodes(env, np.array([0.7]))
    buffer.compute_returns_and_advantage(th.tensor([[0.9]]))
    last = 1.0 + gamma * 0.9 - 0.3
    middle = 2.5 + gamma**0.5 * 0.3 + 0.2 + gamma**0.5 * gae_lambda * last
    first = 2.0 + gamma**0.5 * 0.7 - 0.5
    np.testing.assert_allclose(buffer.advantages.numpy(), [first, middle, last], rtol=1e-5)
    np.testing.assert_allclose(buffer.returns.numpy(), np.add([first, middle, last], values), rtol=1e-5)


def test_reward_scaling_differs_in_discount_and_counts() -> None:
    with np.load(DATA / "reward_scaler.npz") as archive:
        data = dict(archive)
    scaler, running, seen = RewardScaler(3), np.zeros(3), []
    for call in range(2):
        reward, first = data[f"shared/call{call}/reward"].T, data[f"shared/call{call}/first"].T
        buffer = fill_buffer(reward, np.zeros_like(reward), gamma=0.99, gae_lambda=0.95)
        for t in range(len(reward)):
            if t + 1 < len(reward):
                buffer.episode_end[3 * t : 3 * t + 3] = first[t + 1] > 0
        scaler.returns = np.where(first[0] > 0, 0.0, scaler.returns)
        buffer.scale_rewards(scaler)
        for t in range(len(reward)):
            running = 0.99 * np.where(first[t] > 0, 0.0, running) + reward[t]
            seen.append(running)
        # Our variance divides by the true count: the reference's by count - 1, from a count of 1e-4.
        np.testing.assert_allclose(scaler.statistics.var, np.var(seen), rtol=1e-4)
        np.testing.assert_allclose(data[f"shared/call{call}/running_return"], running, rtol=1e-6)
        scaled = buffer.rewards[: reward.size].reshape(reward.shape)
        np.testing.assert_allclose(scaled, np.clip(reward / np.sqrt(np.var(seen) + 1e-8), -10, 10), rtol=1e-4)
        ratio = data[f"shared/call{call}/scaled"].T / scaled
        unclipped = np.abs(scaled) < 10
        assert np.ptp(ratio[unclipped]) < 1e-4 * abs(ratio[unclipped]).max()  # the same up to one factor ...
        assert abs(ratio[unclipped].mean() - 1) > 1e-3  # ... which the wrong count makes differ from 1

    # γ is the algorithm's, where the reference's is always 0.99.
    reward = np.random.default_rng(0).normal(1, 1, (50, 3))
    buffer, scaler = fill_buffer(reward, np.zeros_like(reward), gamma=0.5, gae_lambda=0.95), RewardScaler(3)
    buffer.scale_rewards(scaler)
    running, seen = np.zeros(3), []
    for t in range(50):
        running = 0.5 * running + reward[t]
        seen.append(running)
    np.testing.assert_allclose(scaler.statistics.var, np.var(seen), rtol=1e-4)
