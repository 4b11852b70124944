"""EnvPool's envs beside Gymnasium's."""

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from rl_zoo3.utils import get_class_by_name
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dppo import DPPO
from sb3_dppo.envs import EnvPoolVecEnv, use_envpool
from tests.commands import run, run_forked
from tests.test_zoo import SMALL, train

USE_ENVPOOL = "vec_env_wrapper:'sb3_dppo.envs.use_envpool'"


def test_no_env_is_imported_with_the_package(tmp_path: Path) -> None:
    code = "import sys, sb3_dppo.envs; assert not {'envpool', 'metaworld', 'mujoco'} & set(sys.modules)"
    run("-c", code, cwd=tmp_path)


def test_name_in_hyperparameters() -> None:
    assert get_class_by_name(USE_ENVPOOL.split("'")[1]) is use_envpool


def test_error_without_envpool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3-dppo\[envpool\]'"):
        EnvPoolVecEnv("Hopper-v5")


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Walker2d-v5"])
def test_episodes_are_gymnasiums(env_id: str) -> None:
    """From the same states the same actions lead to the same steps, over ends of episodes too."""
    pytest.importorskip("envpool")
    n_envs, length = 6, 18
    env = EnvPoolVecEnv(env_id, n_envs, seed=0, env_kwargs=dict(max_episode_steps=length))
    twins: list[Any] = [gym.make(env_id, max_episode_steps=length) for _ in range(n_envs)]

    def follow(i: int, obs: np.ndarray) -> None:
        # Observations are the state but for the position along the track, which nothing depends on.
        twins[i].reset()
        n_positions = twins[i].unwrapped.model.nq
        twins[i].unwrapped.set_state(np.insert(obs[: n_positions - 1], 0, 0.0), obs[n_positions - 1 :])

    for i, obs in enumerate(env.reset()):
        follow(i, obs)
    rng = np.random.default_rng(0)
    n_terminated = n_truncated = 0
    for _ in range(60):
        actions = rng.uniform(-1, 1, (n_envs, *env.action_space.shape)).astype(np.float32)
        new_obs, rewards, dones, infos = env.step(actions)
        for i, twin in enumerate(twins):
            obs, reward, terminated, truncated, _ = twin.step(actions[i])
            assert dones[i] == (terminated or truncated)
            np.testing.assert_allclose(infos[i].get("terminal_observation", new_obs[i]), obs, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(rewards[i], reward, rtol=1e-5)
            if dones[i]:
                assert infos[i]["TimeLimit.truncated"] == (truncated and not terminated)
                assert not np.allclose(new_obs[i], obs, atol=1e-3)
                follow(i, new_obs[i])
            n_terminated += terminated
            n_truncated += truncated
    assert n_terminated > 0 and n_truncated > 0
    env.close()


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "HalfCheetah-v5", "Ant-v5"])
def test_spaces_and_types_are_those_of_make_vec_env(env_id: str) -> None:
    pytest.importorskip("envpool")
    env, other = EnvPoolVecEnv(env_id, 2), make_vec_env(env_id, 2)
    assert env.observation_space == other.observation_space and env.action_space == other.action_space
    actions = np.stack([env.action_space.sample() for _ in range(2)])
    assert env.reset().dtype == other.reset().dtype
    for value, other_value in zip(env.step(actions)[:3], other.step(actions)[:3], strict=True):
        assert value.dtype == other_value.dtype and value.shape == other_value.shape
    assert env.get_attr("spec")[0].id == env_id and env.render_mode is None
    assert env.env_is_wrapped(Monitor) == [False, False]
    env.close()
    env.close()


def test_seeds() -> None:
    pytest.importorskip("envpool")
    env = EnvPoolVecEnv("Hopper-v5", 3, seed=5)
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 3, 3))

    def episode_starts(env: EnvPoolVecEnv) -> np.ndarray:
        return np.stack([env.reset()] + [env.step(action)[0] for action in actions])

    first = episode_starts(env)
    assert not np.array_equal(first[0, 0], first[0, 1])
    assert not np.array_equal(episode_starts(env), first)
    env.seed(5)
    np.testing.assert_array_equal(episode_starts(env), first)
    np.testing.assert_array_equal(episode_starts(EnvPoolVecEnv("Hopper-v5", 3, seed=5)), first)
    # The second copy has the seed after the first's.
    np.testing.assert_array_equal(EnvPoolVecEnv("Hopper-v5", 1, seed=6).reset()[0], first[0, 1])
    assert not np.array_equal(EnvPoolVecEnv("Hopper-v5", 3).reset(), first[0])
    EnvPoolVecEnv("Hopper-v5", 3, seed=2**32 - 2).reset()


def test_training_and_going_on_in_gymnasium(tmp_path: Path) -> None:
    pytest.importorskip("envpool")
    env = VecNormalize(EnvPoolVecEnv("Hopper-v5", 4, env_kwargs=dict(max_episode_steps=30), filename=str(tmp_path / "log")))
    policy_kwargs = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=2, horizon=4)
    arguments: dict[str, Any] = dict(n_steps=64, batch_size=128, n_epochs=1, policy_kwargs=policy_kwargs)
    model = DPPO("DiffusionMlpPolicy", env, seed=0, **arguments).learn(512)
    assert model.ep_info_buffer and 0 < model.ep_info_buffer[-1]["l"] <= 30
    assert model.logger.name_to_value["rollout/ep_len_mean"] <= 30
    logged = load_results(str(tmp_path))
    assert list(logged["l"])[-1] == model.ep_info_buffer[-1]["l"]
    again = DPPO(
        "DiffusionMlpPolicy",
        VecNormalize(EnvPoolVecEnv("Hopper-v5", 4, env_kwargs=dict(max_episode_steps=30))),
        seed=0,
        **arguments,
    )
    assert again.learn(512).ep_info_buffer[-1]["r"] == model.ep_info_buffer[-1]["r"]  # type: ignore[index]
    returns, _ = evaluate_policy(model, EnvPoolVecEnv("Hopper-v5", 2), n_eval_episodes=4, warn=True)
    assert np.isfinite(returns)
    model.save(tmp_path / "agent")
    DPPO.load(tmp_path / "agent", env=make_vec_env("Hopper-v5", 2)).learn(128)


def test_errors() -> None:
    pytest.importorskip("envpool")
    for arguments, message in (
        (("LunarBase-v0",), "env_id='LunarBase-v0' is none of EnvPool's"),
        (("CartPole-v1",), "must be Box"),
        (("Hopper-v5", 0), "n_envs=0"),
        (("Hopper-v5", 1, None, dict(healthy_z_range=(0.5, 2.0))), "healthy_z_range"),
    ):
        with pytest.raises(ValueError, match=message):
            EnvPoolVecEnv(*arguments)  # type: ignore[arg-type]
    env = EnvPoolVecEnv("Hopper-v5")
    for call in (lambda: env.get_attr("model"), lambda: env.set_attr("frame_skip", 1), lambda: env.env_method("state_vector")):
        with pytest.raises(AttributeError, match="its envs are not objects and have no"):
            call()
    with pytest.raises(ValueError, match="options="):
        env.set_options({"x": 1})


def test_in_place_of_other_envs(tmp_path: Path) -> None:
    pytest.importorskip("envpool")

    def make(**kwargs: Any) -> gym.Env:
        return gym.make("Hopper-v5", **kwargs)

    env_kwargs = dict(max_episode_steps=9, terminate_when_unhealthy=False)
    env = use_envpool(make_vec_env(make, 2, seed=3, env_kwargs=env_kwargs))
    assert isinstance(env, EnvPoolVecEnv)
    np.testing.assert_array_equal(env.reset(), EnvPoolVecEnv("Hopper-v5", 2, seed=3).reset())
    ends = [env.step(np.ones((2, 3)))[2].all() for _ in range(18)]
    assert np.flatnonzero(ends).tolist() == [8, 17]
    rendered = make_vec_env("Hopper-v5", env_kwargs=dict(render_mode="rgb_array"))
    assert use_envpool(rendered) is rendered
    with pytest.raises(ValueError, match="env_wrapper=.*FlattenObservation"):
        use_envpool(make_vec_env(make, wrapper_class=gym.wrappers.FlattenObservation))


def test_in_rl_zoo(tmp_path: Path) -> None:
    pytest.importorskip("envpool")
    common = ("--algo", "dppo", "--env", "Pendulum-v1")
    train(*common, "-n", "1000", "--seed", "1", "-params", "n_steps:64", "n_envs:2", USE_ENVPOOL, SMALL, cwd=tmp_path)
    folder = tmp_path / "logs/dppo/Pendulum-v1_1"
    assert len(load_results(str(folder))) == 4 and (folder / "envpool.monitor.csv").is_file()
    out = run_forked("rl_zoo3.enjoy", *common, "-f", "logs", "-n", "450", "--no-render", cwd=tmp_path)
    assert "Mean reward" in out
