"""LeRobot's Diffusion policies: files as its versions write them, around weights and outputs of its own network."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from diffusers import DDIMScheduler, DDPMScheduler
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, FrameStackObservation
from safetensors.torch import save_file

from sb3_dppo import BC, DPPO, Demonstrations, import_lerobot_policy

DATA = Path(__file__).parents[1] / "data"
# Two steps of three numbers of the robot's state and two of the env's.
SPACES = (spaces.Box(-np.inf, np.inf, (10,)), spaces.Box(-10, 10, (2,)))
LOW, HIGH = np.array([-1.0, 0.0, 2.0]), np.array([1.0, 4.0, 2.0])  # the last one has no range
MEAN, STD = np.array([0.5, -0.5]), np.array([2.0, 0.1])
ACTION_LOW, ACTION_HIGH = np.array([-2.0, 1.0]), np.array([2.0, 5.0])


def arrays() -> dict[str, np.ndarray]:
    with np.load(DATA / "lerobot_unet.npz") as archive:
        return {name: archive[name] for name in archive.files if name != "config"}


def statistics() -> dict[str, dict[str, np.ndarray]]:
    return {
        "observation.state": dict(min=LOW, max=HIGH),
        "observation.environment_state": dict(mean=MEAN, std=STD),
        "action": dict(min=ACTION_LOW, max=ACTION_HIGH),
    }


def write(folder: Path, new: bool = True, **changes: Any) -> Path:
    """A policy's folder, as versions from 0.4 on write it or as earlier ones did."""
    config: dict[str, Any] = dict(
        type="diffusion",
        n_obs_steps=2,
        horizon=16,
        n_action_steps=8,
        noise_scheduler_type="DDIM",
        num_train_timesteps=20,
        num_inference_steps=5,
        prediction_type="epsilon",
        n_groups=8,
    )
    shapes = {"observation.state": [3], "observation.environment_state": [2]}
    tensors = {name.removeprefix("weights/"): th.as_tensor(value) for name, value in arrays().items() if "weights/" in name}
    stats = {
        f"{name}.{kind}": th.as_tensor(value).float() for name, kinds in statistics().items() for kind, value in kinds.items()
    }
    if new:
        types = dict(zip(shapes, ("STATE", "ENV"), strict=True))
        config["input_features"] = {name: dict(type=types[name], shape=shape) for name, shape in shapes.items()}
        config["normalization_mapping"] = dict(STATE="MIN_MAX", ENV="MEAN_STD", ACTION="MIN_MAX")
        save_file(stats, folder / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    else:
        del config["type"]
        config["input_shapes"] = shapes
        config["input_normalization_modes"] = dict(zip(shapes, ("min_max", "mean_std"), strict=True))
        config["output_normalization_modes"] = dict(action="min_max")
        for name, value in stats.items():
            feature, kind = name.rsplit(".", 1)
            part = "unnormalize_outputs" if feature == "action" else "normalize_inputs"
            tensors[f"{part}.buffer_{feature.replace('.', '_')}.{kind}"] = value
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def normalized(frames: np.ndarray) -> np.ndarray:
    """Frames, shape (..., 5), as LeRobot normalises them."""
    state, env_state = frames[..., :3], frames[..., 3:]
    span = np.where(HIGH > LOW, HIGH - LOW, 1e-8)
    return np.concatenate([2 * (state - LOW) / span - 1, (env_state - MEAN) / (STD + 1e-8)], axis=-1)


@pytest.mark.parametrize("new", [True, False])
def test_plans_as_lerobot_does(new: bool, tmp_path: Path) -> None:
    model, data = import_lerobot_policy(write(tmp_path, new), SPACES), arrays()
    policy, denoiser = model.policy, model.policy.denoiser
    output = denoiser(
        th.as_tensor(data["x"]), denoiser.embed_timesteps(th.as_tensor(data["t"]) % 20), th.as_tensor(data["global_cond"])
    )
    if (data["t"] < 20).all():
        th.testing.assert_close(output, th.as_tensor(data["output"]), rtol=1e-5, atol=1e-5)
    # Observations and the whole chain, by the loop that it runs.
    rng = np.random.default_rng(0)
    frames = rng.uniform(-1, 1, (3, 2, 5)).astype(np.float32)
    frames[..., 2] = 2.0
    condition = th.as_tensor(normalized(frames).reshape(3, 10), dtype=th.float32)
    th.testing.assert_close(policy.extract_features(th.as_tensor(frames.reshape(3, 10))), condition, rtol=1e-4, atol=1e-4)
    scheduler: Any = DDIMScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(5)
    steps = th.zeros(6, 3, 16, 2)
    sample = steps[0] = th.randn(3, 16, 2)
    for t in scheduler.timesteps:
        output = denoiser(sample, denoiser.embed_timesteps(t.expand(3)), condition)
        sample = scheduler.step(output, t, sample, use_clipped_model_output=True).prev_sample
    chain = policy.sample_chain(th.as_tensor(frames.reshape(3, 10)), deterministic=True, noise=steps)
    th.testing.assert_close(chain.actions, sample, rtol=1e-3, atol=1e-3)
    # Eight actions from number one on, which is at the second of the two observations.
    expected = (sample[:, 1:].detach().numpy() + 1) / 2 * (ACTION_HIGH - ACTION_LOW) + ACTION_LOW
    np.testing.assert_allclose(policy.executable(chain.actions), np.clip(expected, -10, 10), rtol=1e-3, atol=5e-3)
    assert policy.sampler.act_steps == 8 and policy.sampler.first_action == 1
    assert model.pretrained_on_demonstrations


def test_the_network_is_lerobots(tmp_path: Path) -> None:
    """With as many timesteps as it was recorded with."""
    data = arrays()
    folder = write(tmp_path, noise_scheduler_type="DDPM", num_train_timesteps=100, num_inference_steps=None)
    model = import_lerobot_policy(folder, SPACES)
    for denoiser in (model.policy.denoiser, model.policy.base_denoiser):
        output = denoiser(
            th.as_tensor(data["x"]), denoiser.embed_timesteps(th.as_tensor(data["t"])), th.as_tensor(data["global_cond"])
        )
        th.testing.assert_close(output, th.as_tensor(data["output"]), rtol=1e-5, atol=1e-5)
    scheduler: Any = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    steps, condition = th.randn(101, 3, 16, 2), th.as_tensor(data["global_cond"])
    sample = steps[0]
    for t, noise in zip(scheduler.timesteps, steps[1:], strict=True):
        output = denoiser(sample, denoiser.embed_timesteps(t.expand(3)), condition)
        sample = scheduler.step(output, t, sample, generator=th.Generator().manual_seed(int(t))).prev_sample
        noise.copy_(th.randn(3, 16, 2, generator=th.Generator().manual_seed(int(t))))
    model.policy.configure_sampler(replace(model.policy.sampler.config, min_sampling_std=0.0, noise_clip=100.0))
    features, S = condition, model.policy.process.inference_steps
    chain = model.policy.sampler.sample(features, features, steps, n_base_steps=S)
    th.testing.assert_close(chain.actions, sample, rtol=1e-3, atol=1e-3)


class TwoStates(gym.Env):
    """Observes what the policy does, and counts steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (5,))
    action_space = spaces.Box(-10, 10, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return np.full(5, 0.1, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return np.full(5, 0.1 * self.t, dtype=np.float32), float(action[0]), self.t >= 20, False, {}


def test_is_fine_tuned_cloned_further_saved_and_shared(tmp_path: Path) -> None:
    env = FlattenObservation(FrameStackObservation(TwoStates(), 2, padding_type="reset"))
    model = import_lerobot_policy(
        write(tmp_path), env, n_steps=16, batch_size=16, ft_denoising_steps=2, policy_kwargs=dict(net_arch=dict(vf=[16]))
    )
    assert model.policy.critic[0].out_features == 16
    base = {name: value.clone() for name, value in model.policy.base_denoiser.state_dict().items()}
    model.learn(32)
    assert all(th.equal(value, base[name]) for name, value in model.policy.base_denoiser.state_dict().items())
    model.save(tmp_path / "model")
    model.save_pretrained(tmp_path / "shared")
    obs = np.ones((2, 10), dtype=np.float32)
    for loaded in (DPPO.load(tmp_path / "model"), DPPO.from_pretrained(tmp_path / "shared")):
        assert (loaded.predict(obs, deterministic=True)[0] == model.predict(obs, deterministic=True)[0]).all()
    rng = np.random.default_rng(0)
    demonstrations = Demonstrations(rng.normal(size=(60, 10)), rng.uniform(-2, 2, (60, 2)), np.array([30, 30]))
    BC(model, demonstrations).train(1, progress_bar=False)


def test_errors(tmp_path: Path) -> None:
    def load(message: str, env: Any = SPACES, folder: Path | None = None, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            import_lerobot_policy(write(tmp_path, **changes) if folder is None else folder, env)

    load("no config.json that can be read", folder=tmp_path / "none")
    load("'act': only 'diffusion'", type="act")
    camera = {"observation.state": dict(type="STATE", shape=[3]), "observation.image": dict(type="VISUAL", shape=[3, 96, 96])}
    load("observes observation.image: only policies without cameras", input_features=camera)
    load("names no input_features", input_features={})
    load(r"input_features is \['observation.state'\], and not a mapping", input_features=["observation.state"])
    load("the shape of observation.state is None, and not a list", input_features={"observation.state": {}})
    load("observation.state is 3, and not a mapping", input_features={"observation.state": 3})
    load(r"the shape of observation.state is \[0\], and not", input_features={"observation.state": dict(shape=[0])})
    load("normalization_mapping is 'MIN_MAX', and not a mapping", normalization_mapping="MIN_MAX")
    load("n_obs_steps='2' must be a positive whole number", n_obs_steps="2")
    load("beta_end=0.5 is not diffusers' default", beta_schedule="linear", beta_end=0.5)
    load("observation.state is normalised by QUANTILES", normalization_mapping=dict(STATE="QUANTILES"))
    load("lack the mean of observation.state", normalization_mapping=dict(STATE="MEAN_STD"))
    load(r"wrap env in FlattenObservation\(FrameStackObservation\(env, 2", env=(spaces.Box(-1, 1, (5,)), SPACES[1]))
    load("inference_steps=7 must divide", num_inference_steps=7)
    load("inference_steps=5 differs from denoising_steps=20", noise_scheduler_type="DDPM")
    load("act_steps=16 must be between 1 and horizon=16 less first_action=1", n_action_steps=16)
    with pytest.raises(ValueError, match=r"net_kwargs'\]\['kernel_size'\] contradicts"):
        import_lerobot_policy(write(tmp_path), SPACES, policy_kwargs=dict(net_kwargs=dict(kernel_size=3)))
    folder = write(tmp_path)
    (folder / "model.safetensors").write_bytes(b"nothing")
    load("can't be read as a file of tensors", folder=folder)
