"""Exported planners: they compute what the policy does, for any batch, without PyTorch."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_dppo import DPPO
from sb3_dppo.export import TOLERANCE, export_onnx
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


def test_command(tmp_path: Path) -> None:
    model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=32, seed=0)
    model.save_pretrained(tmp_path / "shared")
    command = [sys.executable, "-m", "sb3_dppo.export", str(tmp_path / "shared"), "-o", str(tmp_path / "b.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Saved {tmp_path / 'b.onnx'}: its actions differ from PyTorch's by"), done.stdout
    assert session_of(tmp_path / "b.onnx").get_outputs()[0].shape == ["batch", 1, 1]
    done = subprocess.run([*command[:-1], "b.zip"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "path='b.zip' must end in .onnx" in done.stderr
