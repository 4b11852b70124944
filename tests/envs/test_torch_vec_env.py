"""Envs whose observations, actions and rewards are tensors: the same run as through arrays, without a loop over envs."""

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from examples.torch_pendulum import TorchPendulum
from sb3_dppo import DPPO
from sb3_dppo.envs import BatchedStep, BraxVecEnv, ManiSkillVecEnv
from sb3_dppo.envs.torch_vec_env import BatchedInfos

SMALL: dict[str, Any] = dict(n_steps=32, batch_size=64, n_epochs=2, seed=0, device="cpu")


class FallingPendulum(TorchPendulum):
    """Short episodes, which also terminate, and succeed then; observations are a dictionary."""

    episode_length = 11

    def __init__(self, n_envs: int = 5) -> None:
        super().__init__(n_envs)
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        self.observation_space = spaces.Dict(angle=spaces.Box(-1, 1, (2,)), speed=spaces.Box(-8, 8, (1,)))

    def reset_all(self, seed: int | None) -> Any:
        return self._parts(super().reset_all(seed))

    def step_all(self, actions: th.Tensor) -> BatchedStep:
        step = super().step_all(actions)
        assert isinstance(step.last_obs, th.Tensor)
        terminated = step.last_obs[:, 2].abs() > 3
        self._reset(terminated)
        return BatchedStep(
            self._parts(self._observe()), step.rewards, terminated, step.truncated, self._parts(step.last_obs), terminated
        )

    @staticmethod
    def _parts(obs: Any) -> Any:
        return dict(angle=obs[:, :2], speed=obs[:, 2:])


class AsArrays(VecEnvWrapper):
    """The same envs, seen as any others are."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


def test_pendulums_are_gymnasiums() -> None:
    env, twin = TorchPendulum(3), gym.make("Pendulum-v1").unwrapped
    env.seed(0)
    env.reset()
    rng = np.random.default_rng(0)
    for _ in range(20):
        actions = rng.uniform(-2, 2, (3, 1)).astype(np.float32)
        states = np.stack([env.angle.numpy(), env.speed.numpy()], axis=1)
        obs, rewards, _, _ = env.step(actions)
        for i in range(3):
            twin.reset()
            twin.state = states[i]  # type: ignore[attr-defined]
            expected_obs, expected_reward, *_ = twin.step(actions[i])
            np.testing.assert_allclose(obs[i], expected_obs, atol=1e-5)
            np.testing.assert_allclose(rewards[i], expected_reward, atol=1e-5)


@pytest.mark.parametrize("act_steps", [1, 4])
def test_the_same_run_through_arrays(act_steps: int) -> None:
    """Over episodes that terminate, are truncated and end within a chunk."""
    models = []
    for wrap in (lambda env: env, AsArrays):
        kwargs: Any = dict(policy_kwargs=dict(horizon=4), act_steps=act_steps)
        model = DPPO("DiffusionMultiInputPolicy", wrap(FallingPendulum()), **SMALL, **kwargs)
        models.append(model.learn(3 * 32 * 5))
    tensors, arrays = models
    for name, parameter in tensors.policy.state_dict().items():
        th.testing.assert_close(parameter, arrays.policy.state_dict()[name], rtol=0, atol=0, msg=name)
    assert tensors.rollout_buffer.bootstrap_values.any()
    assert tensors.num_timesteps == arrays.num_timesteps == 480
    assert tensors.ep_info_buffer is not None and arrays.ep_info_buffer is not None
    for one, other in zip(tensors.ep_info_buffer, arrays.ep_info_buffer, strict=True):
        assert (one["r"], one["l"]) == (other["r"], other["l"])
    assert tensors.ep_success_buffer == arrays.ep_success_buffer and len(set(arrays.ep_success_buffer or ())) == 2
    for key, part in arrays._last_obs.items():  # type: ignore[union-attr]
        np.testing.assert_array_equal(tensors._last_obs[key], part)  # type: ignore[index, call-overload]


def test_no_loop_over_envs(monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 of them: nobody asks for a dictionary of each."""

    def refuse(_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(BatchedInfos, "_infos", property(refuse))
    env = TorchPendulum(4096)
    env.episode_length = 3
    model = DPPO("DiffusionMlpPolicy", env, n_steps=4, batch_size=8192, n_epochs=1, seed=0, device="cpu").learn(4 * 4096)
    assert model.num_timesteps == 4 * 4096 and model.ep_info_buffer is not None and len(model.ep_info_buffer) == 100
    assert isinstance(model._last_obs, np.ndarray)


def test_a_stopped_rollout_goes_on_where_the_envs_are() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 10

    env = TorchPendulum(3)
    model = DPPO("DiffusionMlpPolicy", env, **SMALL).learn(96, callback=Stop())
    obs = env._observe().numpy()
    model.learn(96, reset_num_timesteps=False)
    np.testing.assert_array_equal(model.rollout_buffer.observations[:3], obs)


def test_infos_are_monitors() -> None:
    env = FallingPendulum(50)
    env.seed(0)
    env.reset()
    returns, lengths = np.zeros(50), np.zeros(50, dtype=int)
    n_truncated = n_terminated = 0
    for _ in range(30):
        before = env.angle.clone(), env.speed.clone()
        obs, rewards, dones, infos = env.step(np.zeros((50, 1)))
        assert isinstance(obs, dict)
        returns, lengths = returns + rewards, lengths + 1
        for i in np.flatnonzero(dones):
            np.testing.assert_allclose(infos[i]["episode"]["r"], returns[i], atol=1e-4)
            assert infos[i]["episode"]["l"] == lengths[i]
            truncated = infos[i]["TimeLimit.truncated"]
            assert truncated == (not infos[i]["is_success"])
            n_truncated, n_terminated = n_truncated + truncated, n_terminated + (not truncated)
            last = infos[i]["terminal_observation"]
            assert last["speed"] != obs["speed"][i] and abs(last["speed"] - before[1][i].item()) < 2
        assert all(infos[i] == {} for i in np.flatnonzero(~dones))
        returns[dones], lengths[dones] = 0, 0
    assert n_truncated and n_terminated


def test_others_can_use_it(tmp_path: Path) -> None:
    env = VecNormalize(TorchPendulum(4))
    PPO("MlpPolicy", env, n_steps=16, batch_size=32, device="cpu").learn(128)
    DPPO("DiffusionMlpPolicy", env, **SMALL).learn(128)
    model = DPPO("DiffusionMlpPolicy", TorchPendulum(4), **SMALL).learn(128)
    model.save(tmp_path / "model")
    again = DPPO.load(tmp_path / "model", env=TorchPendulum(4)).learn(128, reset_num_timesteps=False)
    assert again.num_timesteps == 256
    returns, lengths = evaluate_policy(again, TorchPendulum(4), n_eval_episodes=4, return_episode_rewards=True)
    assert lengths == [200] * 4 and all(-2000 < value < 0 for value in returns)  # type: ignore[comparison-overlap, union-attr]


class Broken(TorchPendulum):
    def step_all(self, actions: th.Tensor) -> BatchedStep:
        step = super().step_all(actions)
        broken = step.rewards.clone()
        broken[2] = th.nan
        return step._replace(rewards=broken)


def test_errors() -> None:
    model = DPPO("DiffusionMlpPolicy", Broken(4), **SMALL)
    with pytest.raises(ValueError, match="observation or reward of env 2 is NaN or infinite after env step 1 "):
        model.learn(128)
    # As before it was watched.
    assert "step_tensors" not in vars(model.env)
    with pytest.raises(ValueError, match="on_bad_env='reset', but a TorchPendulum can't reset a single env"):
        DPPO("DiffusionMlpPolicy", TorchPendulum(4), on_bad_env="reset", **SMALL).learn(128)
    with pytest.raises(AttributeError, match="TorchPendulum: its envs are not objects"):
        TorchPendulum(4).set_attr("gravity", 9.81)


class TensorVectorEnv:
    """As ManiSkill's ``ManiSkillVectorEnv``, which needs a GPU: Pendulums that are reset in the step in which they end."""

    num_envs, device, auto_reset = 6, th.device("cpu"), True

    def __init__(self) -> None:
        self.pendulums = FallingPendulum(self.num_envs)
        self.single_observation_space, self.single_action_space = (
            self.pendulums.observation_space,
            self.pendulums.action_space,
        )

    def reset(self, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        return self.pendulums.reset_all(seed), {}

    def step(self, actions: th.Tensor) -> tuple[Any, ...]:
        step = self.pendulums.step_all(actions)
        ended = step.terminated | step.truncated
        infos: dict[str, Any] = dict(success=step.successes)
        if ended.any():
            infos = dict(final_observation=step.last_obs, final_info=infos, _final_info=ended)
        return *step[:4], infos

    def close(self) -> None:
        self.pendulums.close()


def test_maniskill() -> None:
    runs = []
    for env in (ManiSkillVecEnv(TensorVectorEnv()), FallingPendulum(6)):
        model = DPPO("DiffusionMultiInputPolicy", env, **SMALL).learn(2 * 32 * 6)
        runs.append((model.ep_success_buffer, model.policy.state_dict()))
    assert runs[0][0] == runs[1][0]
    th.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)
    envs = TensorVectorEnv()
    envs.auto_reset = False
    with pytest.raises(ValueError, match=r"envs.auto_reset=False: .* leave it at True"):
        ManiSkillVecEnv(envs)


def test_error_without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ImportError, match="BraxVecEnv needs JAX: pip install brax, or playground"):
        BraxVecEnv(None, 2)


def test_brax() -> None:
    envs = pytest.importorskip("brax.envs")
    env = BraxVecEnv(envs.get_environment("inverted_pendulum", backend="positional"), 8, episode_length=9)
    env.seed(3)
    first = env.reset()
    n_truncated = n_terminated = 0
    for _ in range(30):
        obs, _, dones, infos = env.step(np.random.default_rng(0).uniform(-1, 1, (8, 1)))
        for i in np.flatnonzero(dones):
            np.testing.assert_array_equal(obs[i], first[i])
            assert (infos[i]["terminal_observation"] != first[i]).all()
            assert infos[i]["episode"]["l"] == 9 or not infos[i]["TimeLimit.truncated"]
            n_truncated, n_terminated = n_truncated + infos[i]["TimeLimit.truncated"], n_terminated + 1
    assert n_truncated and n_terminated > n_truncated
    env.seed(3)
    np.testing.assert_array_equal(env.reset(), first)
    assert DPPO("DiffusionMlpPolicy", env, **SMALL).learn(256).num_timesteps == 256


def test_mujoco_playground() -> None:
    registry = pytest.importorskip("mujoco_playground").registry
    env = BraxVecEnv(registry.load("CartpoleBalance"), 4, episode_length=10)
    model = DPPO("DiffusionMlpPolicy", env, **SMALL).learn(128)
    assert model.ep_info_buffer is not None and {info["l"] for info in model.ep_info_buffer} == {10}
