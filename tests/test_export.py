"""Exported planners: they compute what the policy does, for any batch, without PyTorch."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_dppo import DPPO
from sb3_dppo.export import TOLERANCE, _read_agent, export_onnx, main
from tests.toy_envs import CountingEnv

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
EXAMPLE = Path(__file__).parents[1] / "examples" / "onnx_runtime.py"
CHUNKS = dict(horizon=4, denoising_steps=4, net_arch=[32, 32])


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def example() -> Any:
    """The example that acts without PyTorch."""
    spec: Any = importlib.util.spec_from_file_location("onnx_runtime", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_from_scratch(tmp_path: Path, example: Any) -> None:
    """Running statistics, a learned std, float64 and asymmetric bounds; the example plans as the policy."""
    model = DPPO("DiffusionMlpPolicy", CountingEnv(), n_steps=32, batch_size=32, n_epochs=1, seed=0).learn(32)
    assert export_onnx(model, tmp_path / "a.onnx") <= TOLERANCE
    planner = example.Planner(str(tmp_path / "a.onnx"))
    for step in range(3):
        obs = np.array([step, 7.0, 0.1])
        np.testing.assert_allclose(planner(obs)[0], model.predict(obs, deterministic=True)[0], atol=1e-5)


@pytest.mark.parametrize("sampler", [dict(scheduler="ddim", inference_steps=2, ft_denoising_steps=1), dict(learn_std="state")])
def test_chunks(tmp_path: Path, example: Any, sampler: dict[str, Any]) -> None:
    """Base steps, first_action, other samplers; the noise of the wrong batch is refused, another batch is not."""
    kwargs: dict[str, Any] = dict(CHUNKS, prediction_type="epsilon", first_action=1)
    model = DPPO("DiffusionMlpPolicy", CountingEnv(), act_steps=2, n_steps=32, policy_kwargs=kwargs, seed=0, **sampler)
    model.policy.seed(1)
    path = tmp_path / "folder" / "a.onnx"
    export_onnx(model, path)
    planner = example.Planner(str(path))
    assert (planner.act_steps, planner.kind) == (2, "observation")
    obs = np.array([[1.0, 7.0, 0.1], [2.0, 7.0, 0.1]])
    chunks = [planner(row) for row in obs]
    expected = model.policy.plan(model.policy.obs_to_tensor(obs)[0], deterministic=True)
    assert expected.shape == (2, 3, 2)
    np.testing.assert_allclose(chunks, expected, atol=1e-5)
    # What exported the graph does not keep anything of it.
    model.policy.sample_chain(model.policy.obs_to_tensor(obs)[0], deterministic=True).actions.numpy()


def test_dict_and_vec_normalize(tmp_path: Path) -> None:
    """Images and vectors; the statistics of VecNormalize become a part of the graph."""
    env = VecNormalize(
        DummyVecEnv([lambda: SimpleMultiObsEnv(discrete_actions=False)]), norm_reward=False, norm_obs_keys=["vec"]
    )
    model = DPPO("DiffusionMultiInputPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=0).learn(32)
    export_onnx(model, tmp_path / "a.onnx")
    session = session_of(tmp_path / "a.onnx")
    assert {part.name for part in session.get_inputs()} == {"vec", "img", "noise"}
    env.training = False
    obs = model.observation_space.sample()
    noise = model.policy.draw_noise(1)
    normalized = model.policy.obs_to_tensor(env.normalize_obs(obs))[0]
    expected = model.policy.executable(model.policy.sample_chain(normalized, True, noise).actions)
    feed = dict(vec=obs["vec"][None].astype(np.float32), img=obs["img"][None], noise=noise.numpy())
    (actions,) = session.run(None, feed)
    np.testing.assert_allclose(actions, expected, atol=1e-5)


def test_bounds_are_kept(tmp_path: Path) -> None:
    """Those of a float64 box that float32 would round outwards, also where one dimension can't move."""
    env = CountingEnv()
    env.action_space = spaces.Box(np.array([-0.1, 0.3]), np.array([0.1, 0.3]), dtype=np.float64)
    model = DPPO("DiffusionMlpPolicy", env, n_steps=32, policy_kwargs=dict(horizon=2), seed=0)
    with th.no_grad():
        model.policy.denoiser.mlp[-1].weight *= 1000
    export_onnx(model, tmp_path / "a.onnx")
    session, rng = session_of(tmp_path / "a.onnx"), np.random.default_rng(0)
    shape = model.policy.sampler.noise_shape(64)
    feed = {
        name: rng.standard_normal(size).astype(np.float32) for name, size in dict(observation=(64, 3), noise=shape).items()
    }
    (actions,) = session.run(None, feed)
    moving = actions[..., 0].astype(np.float64)
    assert -0.1 <= moving.min() < -0.0999 and 0.0999 < moving.max() <= 0.1
    np.testing.assert_allclose(actions[..., 1], 0.3, rtol=1e-6)


def test_training_goes_on_as_without(tmp_path: Path) -> None:
    def trained(export: bool) -> tuple[Any, ...]:
        model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=32, batch_size=32, n_epochs=1, seed=0).learn(32)
        model.observation_space.seed(0)
        if export:
            export_onnx(model, tmp_path / "a.onnx")
        model.learn(32, reset_num_timesteps=False)
        return model.policy.denoiser.mlp[0].weight.detach(), model.observation_space.sample()

    for one, other in zip(trained(False), trained(True), strict=True):
        assert np.array_equal(one, other)


def test_statistics_of_another_env(tmp_path: Path) -> None:
    model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=32)
    other = VecNormalize(DummyVecEnv([lambda: SimpleMultiObsEnv(discrete_actions=False)]), norm_obs_keys=["vec"])
    with pytest.raises(ValueError, match="statistics of another env"):
        export_onnx(model, tmp_path / "a.onnx", other)
    assert not list(tmp_path.iterdir())


def test_without_delay_and_with(tmp_path: Path, example: Any) -> None:
    """With a delay, chunks go on where the old one stopped, from observations of that many steps before."""
    model = DPPO("DiffusionMlpPolicy", CountingEnv(), act_steps=2, n_steps=32, policy_kwargs=CHUNKS, seed=0)
    export_onnx(model, tmp_path / "a.onnx")
    planner = example.Planner(str(tmp_path / "a.onnx"))
    for delay in (0, 1):
        env = CountingEnv(length=6)
        assert example.episode(env, planner, delay, None, 0) == 21
        chunks = [planner(np.array([t, 6.0, 0.1])) for t in (0, 2 - delay, 4 - delay)]
        expected = [*chunks[0][:2], *chunks[1][delay : delay + 2], *chunks[2][delay : delay + 2]]
        np.testing.assert_allclose(env.actions, expected, atol=1e-6)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=32, seed=0)
    model.save_pretrained(tmp_path / "shared")
    command = [sys.executable, "-m", "sb3_dppo.export", str(tmp_path / "shared"), "-o", str(tmp_path / "b.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Saved {tmp_path / 'b.onnx'}: its actions differ from PyTorch's by"), done.stdout
    assert session_of(tmp_path / "b.onnx").get_outputs()[0].shape == ["batch", 1, 1]
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), norm_reward=False)
    DPPO("DiffusionMlpPolicy", env, n_steps=32, seed=0).save_pretrained(tmp_path / "normalized")
    with pytest.raises(ValueError, match="name its env by --env"):
        _read_agent(str(tmp_path / "normalized"), None)
    assert _read_agent(str(tmp_path / "normalized"), "Pendulum-v1").get_vec_normalize_env() is not None
    DPPO("DiffusionMlpPolicy", env, n_steps=32, seed=0).save(tmp_path / "normalized.zip")
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "normalized.zip")])
    with pytest.raises(SystemExit):
        main()
    assert "was trained under VecNormalize: pass --vec-normalize" in capsys.readouterr().err
    done = subprocess.run([*command[:-1], "b.zip"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "path='b.zip' must end in .onnx" in done.stderr
