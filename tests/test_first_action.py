"""Chunks whose first executed action is a later one, as where they begin at the first of several observations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from sb3_dppo import BC, DPPO, Demonstrations, DiffusionMlpPolicy
from sb3_dppo.envs import NoiseSpaceVecEnv
from tests.toy_envs import CountingEnv

KWARGS: dict[str, Any] = dict(horizon=5, first_action=2, denoising_steps=3, net_arch=[16])


def make_model(env: Any, **kwargs: Any) -> DPPO:
    arguments: dict[str, Any] = dict(n_steps=12, batch_size=24, n_epochs=1, seed=0, device="cpu", policy_kwargs=KWARGS)
    return DPPO("DiffusionMlpPolicy", env, **arguments | kwargs)


@pytest.mark.parametrize("act_steps,n_executed", [(None, 3), (2, 2), (1, 1)])
def test_acting_begins_with_it(act_steps: int | None, n_executed: int) -> None:
    model = make_model(CountingEnv(), act_steps=act_steps)
    assert model.policy.sampler.act_steps == n_executed
    obs, noise = np.ones((1, 3)), th.randn(4, 1, 5, 2)
    model.policy.draw_noise = lambda *_: noise  # type: ignore[method-assign]
    model.policy.sampler.draw_noise = lambda *_: noise  # type: ignore[method-assign]
    chunk = model.policy.sample_chain(th.as_tensor(obs), noise=noise).actions
    expected = model.policy.normalizer.unnormalize_actions(chunk)[0, 2:]
    state, actions = None, []
    for _ in range(n_executed):
        action, state = model.predict(obs, state, deterministic=False)
        actions.append(action[0])
    np.testing.assert_allclose(actions, expected[:n_executed], rtol=1e-6)


def test_rollouts_execute_and_learn_from_the_same_actions() -> None:
    env = DummyVecEnv([lambda: CountingEnv(length=8)])
    model = make_model(env, learning_rate=0.0, critic_learning_rate=0.0, normalize_observations=False)
    model.learn(12)
    buffer, executed = model.rollout_buffer, np.stack(env.envs[0].actions)  # type: ignore[attr-defined]
    chunks = model.policy.normalizer.unnormalize_actions(buffer.chains[: buffer.size(), -1])
    # An episode of eight steps is cut into three, three and two; the ninth step begins another.
    lengths = [3, 3, 2, 1, 3]
    assert buffer.executed.tolist() == lengths
    expected = np.concatenate([chunk[2 : 2 + length] for chunk, length in zip(chunks, lengths, strict=True)])
    np.testing.assert_allclose(executed, expected, rtol=1e-5)
    samples = next(buffer.get(None))
    _, metrics = model.loss(samples)
    assert metrics["ratio"].item() == pytest.approx(1.0, abs=1e-4)
    n_executed = th.ones_like(samples.n_executed)
    losses = []
    for spoiled in ([], [0, 1, 3, 4], [2]):
        chain_next = samples.chain_next.clone()
        chain_next[:, spoiled] += 3.0
        losses.append(model.loss(samples._replace(n_executed=n_executed, chain_next=chain_next))[0].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("n_stack", [1, 3])
def test_behaviour_cloning_of_windows_around_the_observation(n_stack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Chi et al.: the action at the newest observation is number ``first_action`` of the chunk."""
    env: Any = make_vec_env(CountingEnv, 1)
    model = make_model(VecFrameStack(env, n_stack) if n_stack > 1 else env)
    lengths = np.array([6, 9])
    t = np.concatenate([np.arange(n) for n in lengths]).astype(np.float32)
    actions = np.stack([-1 + t / 10, -t / 10], axis=1)
    seen: list[tuple[th.Tensor, th.Tensor]] = []

    def bc_loss(obs: th.Tensor, chunks: th.Tensor) -> th.Tensor:
        seen.append((obs, chunks))
        return next(model.policy.denoiser.parameters()).sum()

    monkeypatch.setattr(model.policy, "bc_loss", bc_loss)
    BC(model, Demonstrations(np.stack([t, t, t], axis=1), actions, lengths), batch_size=100).train(1, progress_bar=False)
    ((obs, chunks),) = seen
    # Three actions from the observation on lie inside an episode.
    assert len(obs) == (6 - 2) + (9 - 2)
    normalizer = model.policy.normalizer
    in_env = normalizer.action_center + normalizer.action_scale * chunks
    newest = obs[:, -1].float()
    expected = (newest[:, None] + th.arange(-2, 3)).clamp(min=0)
    th.testing.assert_close(-10 * in_env[..., 1], expected, rtol=1e-4, atol=1e-4)


def test_is_saved_and_steered(tmp_path: Path) -> None:
    model = make_model(CountingEnv())
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    model.save_pretrained(tmp_path / "shared")
    policies = [DPPO.load(tmp_path / "model").policy, DiffusionMlpPolicy.load(tmp_path / "policy")]
    policies.append(DPPO.from_pretrained(tmp_path / "shared").policy)
    for policy in policies:
        assert policy.sampler.first_action == 2 and policy.sampler.act_steps == 3  # type: ignore[union-attr]
    env = NoiseSpaceVecEnv(make_vec_env(CountingEnv, 1), model)
    env.reset()
    assert env.step(np.zeros((1, 10), dtype=np.float32))[3][0]["n_executed"] == 3
    model.learn(24)


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(policy_kwargs=KWARGS | dict(first_action=5)), "first_action=5 must be below horizon=5"),
        (dict(policy_kwargs=KWARGS | dict(first_action=-1)), "first_action=-1"),
        (dict(act_steps=4), "act_steps=4 must be between 1 and horizon=5 less first_action=2"),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(CountingEnv(), **settings)
