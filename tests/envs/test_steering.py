"""Frozen policies as a part of the env: steered by their initial noise, or with a residual."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_dppo import DPPO
from sb3_dppo.envs import NoiseSpaceVecEnv, ResidualVecEnv
from tests.commands import run_forked
from tests.test_zoo import train
from tests.toy_envs import CountingEnv

SMALL: dict[str, Any] = dict(net_arch=[16], denoising_steps=4, horizon=4, prediction_type="flow")


def make_envs(*lengths: int, truncate: bool = False) -> DummyVecEnv:
    return DummyVecEnv([lambda length=length: Monitor(CountingEnv(length, truncate)) for length in lengths])


def make_model(env: Any, policy: str = "DiffusionMlpPolicy", **kwargs: Any) -> DPPO:
    return DPPO(policy, env, n_steps=12, batch_size=12, seed=0, device="cpu", policy_kwargs=SMALL, **kwargs)


def test_a_step_executes_the_chunk_that_the_noise_leads_to() -> None:
    venv = make_envs(7)
    model = make_model(venv)
    env = NoiseSpaceVecEnv(venv, model, noise_bound=2.0)
    assert env.action_space == spaces.Box(-2, 2, (8,)) and env.observation_space == venv.observation_space
    obs, noise = env.reset(), np.linspace(-2, 2, 8, dtype=np.float32)[None]
    steps = th.zeros(5, 1, 4, 2)
    steps[0] = th.as_tensor(noise).view(1, 4, 2)
    chunk = model.policy.sample_chain(model.policy.obs_to_tensor(obs)[0], deterministic=True, noise=steps).actions
    first = env.step(noise)
    executed = np.stack(venv.envs[0].unwrapped.actions)  # type: ignore[attr-defined]
    np.testing.assert_allclose(executed, model.policy.normalizer.unnormalize_actions(chunk)[0], rtol=1e-6)
    assert first[0][0, 0] == 4 and first[1] == [1 + 2 + 3 + 4] and not first[2] and first[3][0]["n_executed"] == 4
    # The episode ends inside the next chunk.
    obs, rewards, dones, infos = env.step(noise)
    assert obs[0, 0] == 0 and rewards == [5 + 6 + 7] and dones and infos[0]["n_executed"] == 3  # type: ignore[call-overload]
    assert infos[0]["terminal_observation"][0] == 7 and not infos[0]["TimeLimit.truncated"]
    assert (infos[0]["episode"]["r"], infos[0]["episode"]["l"]) == (28, 7)
    # Other noise leads elsewhere.
    assert (env.plan(obs, noise) != env.plan(obs, -noise)).any()


@pytest.mark.parametrize("truncate", [False, True])
def test_every_env_step_belongs_to_one_decision(truncate: bool) -> None:
    """Where envs end at different times."""
    venv = make_envs(5, 7, 12, truncate=truncate)
    env = NoiseSpaceVecEnv(venv, make_model(venv, act_steps=3))
    env.reset()
    returns, lengths = np.zeros(3), np.zeros(3, dtype=int)
    n_ends = 0
    for _ in range(40):
        _, rewards, dones, infos = env.step(np.random.default_rng(0).normal(size=(3, 8)))
        returns += rewards
        lengths += [info["n_executed"] for info in infos]
        for i in np.flatnonzero(dones):
            assert (infos[i]["episode"]["r"], infos[i]["episode"]["l"]) == (returns[i], lengths[i])
            assert infos[i]["TimeLimit.truncated"] == truncate
            returns[i], lengths[i] = 0.0, 0
            n_ends += 1
    assert n_ends > 20


@pytest.mark.parametrize("scheduler", [dict(), dict(scheduler="ddim", inference_steps=2)])
def test_sac_steers_a_file(scheduler: dict[str, Any], tmp_path: Path) -> None:
    venv = make_vec_env("Pendulum-v1", 2, seed=0)
    kwargs = dict(SMALL, prediction_type="epsilon") if scheduler else SMALL
    DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=16, seed=0, policy_kwargs=kwargs).save(tmp_path / "agent")
    env = NoiseSpaceVecEnv(venv, tmp_path / "agent", **scheduler)
    assert env.policy.sampler.inference_steps == (2 if scheduler else 4)
    frozen = {name: value.clone() for name, value in env.policy.state_dict().items()}
    model = SAC("MlpPolicy", env, learning_starts=20, batch_size=16, seed=0, policy_kwargs=dict(net_arch=[16]))
    model.learn(120)
    assert all(th.equal(value, frozen[name]) for name, value in env.policy.state_dict().items())
    assert [episode["l"] for episode in model.ep_info_buffer] == [200, 200]
    model.save(tmp_path / "sac")
    loaded = SAC.load(tmp_path / "sac", env=env)
    returns, lengths = evaluate_policy(loaded, env, 2, return_episode_rewards=True)
    assert len(returns) == 2 and lengths == [200, 200]  # env steps, as Monitor counts them


def test_a_residual_of_zero_is_the_frozen_policy() -> None:
    model = make_model("Pendulum-v1")
    th.nn.init.normal_(model.policy.denoiser.mlp[-1].weight)

    class Nothing:
        def predict(self, obs: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
            return np.zeros((len(obs), 1), dtype=np.float32), None

    results = []
    for steered in (True, False):
        venv: Any = make_vec_env("Pendulum-v1", 3)
        venv.seed(0)
        agent: Any = Nothing() if steered else model
        env = ResidualVecEnv(venv, model) if steered else venv
        results.append(evaluate_policy(agent, env, 6, deterministic=True, return_episode_rewards=True))
    assert results[0] == results[1]


def test_a_residual_is_added_in_halves_of_the_range_and_stays_within_it() -> None:
    venv = make_envs(6, 9)
    model = make_model(venv)
    env = ResidualVecEnv(venv, model, scale=0.5)
    low, high = venv.action_space.low, venv.action_space.high  # type: ignore[attr-defined]
    assert env.observation_space.shape == (5,) and env.observation_space.dtype == np.float64
    obs, rng = env.reset(), np.random.default_rng(0)
    for _ in range(30):
        actions = rng.uniform(-1, 1, (2, 2)).astype(np.float32)
        base = (low + high) / 2 + obs[:, 3:] * (high - low) / 2  # type: ignore[call-overload]
        obs, _, dones, infos = env.step(actions)
        for i in range(2):
            done = venv.envs[i].unwrapped.actions[-1]  # type: ignore[attr-defined]
            np.testing.assert_allclose(done, np.clip(base[i] + 0.25 * (high - low) * actions[i], low, high), atol=1e-6)
            if dones[i]:
                assert env.observation_space.contains(infos[i]["terminal_observation"])
                assert infos[i]["terminal_observation"][0] == (6, 9)[i]
        assert all(env.observation_space.contains(row) for row in obs)


class DictEnv(gym.ObservationWrapper):
    """The same observations under a name."""

    def __init__(self) -> None:
        super().__init__(CountingEnv())
        self.observation_space = spaces.Dict(count=self.env.observation_space)

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return dict(count=observation)


def test_dictionaries_get_a_key_for_the_frozen_policys_action() -> None:
    venv = DummyVecEnv([DictEnv, DictEnv])
    policy = make_model(venv, "DiffusionMultiInputPolicy")
    env = ResidualVecEnv(venv, policy)
    model = SAC("MultiInputPolicy", env, learning_starts=8, batch_size=8, policy_kwargs=dict(net_arch=[16]))
    model.learn(40)
    assert set(env.observation_space.spaces) == {"count", "base_action"}  # type: ignore[attr-defined]
    SAC("MultiInputPolicy", NoiseSpaceVecEnv(venv, policy), learning_starts=8, policy_kwargs=dict(net_arch=[16])).learn(20)


def test_rl_zoo_trains_and_shows_it(tmp_path: Path) -> None:
    DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=16, seed=0, policy_kwargs=SMALL).save(tmp_path / "agent")
    for wrapper, settings in (("NoiseSpaceVecEnv", dict(noise_bound=1.0)), ("ResidualVecEnv", dict(scale=0.2))):
        steering: dict[str, Any] = {f"sb3_dppo.envs.{wrapper}": dict(model="agent.zip", **settings)}
        entry = dict(policy="MlpPolicy", n_timesteps=150, learning_starts=20, batch_size=16, vec_env_wrapper=[steering])
        (tmp_path / "sac.yml").write_text(yaml.safe_dump({"Pendulum-v1": entry}))
        train("--algo", "sac", "--env", "Pendulum-v1", "--conf-file", "sac.yml", "-f", wrapper, cwd=tmp_path)
        enjoy = ("--algo", "sac", "--env", "Pendulum-v1", "-f", wrapper, "-n", "250", "--no-render")
        assert "Mean reward" in run_forked("rl_zoo3.enjoy", *enjoy, cwd=tmp_path)


def test_errors() -> None:
    venv = make_vec_env("Pendulum-v1", 1)
    model = make_model("Pendulum-v1")
    for make, message in (
        (lambda: NoiseSpaceVecEnv(venv, model, noise_bound=0.0), "noise_bound=0.0 must be positive"),
        (lambda: ResidualVecEnv(venv, model, scale=-1), "scale=-1 must be positive"),
        (lambda: NoiseSpaceVecEnv(venv, make_model(CountingEnv())), "spaces do not match"),
        (lambda: NoiseSpaceVecEnv(venv, model, eta=0.0), "eta: for a model's file only"),
        (lambda: NoiseSpaceVecEnv(venv, PPO("MlpPolicy", venv)), "model is a PPO, not a DPPO"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            make()
    grid = DummyVecEnv([GridEnv])
    with pytest.raises(ValueError, match=r"has no place: use a vector or a Dict"):
        ResidualVecEnv(grid, make_model(grid))


def test_a_policy_of_normalised_observations(tmp_path: Path) -> None:
    make_model(VecNormalize(make_envs(3))).learn(12).save(tmp_path / "a")
    for wrap in (NoiseSpaceVecEnv, ResidualVecEnv):
        with pytest.raises(ValueError, match="trained under VecNormalize, whose observations it needs: wrap the envs"):
            wrap(make_envs(3), tmp_path / "a")
        wrap(VecNormalize(make_envs(3), training=False), tmp_path / "a").reset()


def test_an_action_that_can_only_have_one_value() -> None:
    env = CountingEnv(3)
    env.action_space = spaces.Box(np.array([-1.0, 0.5]), np.array([1.0, 0.5]), dtype=np.float64)
    venv = DummyVecEnv([lambda: env])
    residual = ResidualVecEnv(venv, make_model(venv))
    assert np.isfinite(residual.reset()).all()
    assert np.isfinite(residual.step(np.ones((1, 2), np.float32))[0]).all() and env.actions[-1][1] == 0.5


class GridEnv(CountingEnv):
    """Observes a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-np.inf, np.inf, (3, 1), dtype=np.float64)

    def _obs(self) -> np.ndarray:
        return super()._obs()[:, None]
