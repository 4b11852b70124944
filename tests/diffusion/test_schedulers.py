"""diffusers' other schedulers: their steps are the policy's transitions, or they are refused with a reason."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_dppo import DPPO
from sb3_dppo.diffusion.process import DenoisingProcess
from sb3_dppo.diffusion.schedulers import make_scheduler

K = 20
SUPPORTED: dict[str, tuple[Any, int]] = {
    "euler": ("EulerDiscreteScheduler", K),
    "euler_leading": (diffusers.EulerDiscreteScheduler(timestep_spacing="leading"), 5),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", K),
    "lcm": ({"_class_name": "LCMScheduler", "original_inference_steps": K}, 4),
    "tcd": ({"_class_name": "TCDScheduler", "original_inference_steps": K}, 4),
    "ddim_parallel": ("DDIMParallelScheduler", 5),
    "ddpm_parallel": ("DDPMParallelScheduler", K),
    "dpm_solver_1": ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1}, 10),
    "sde_dpm_solver_1": (
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1, "algorithm_type": "sde-dpmsolver++"},
        10,
    ),
}
BATCH = (3, 4, 2)


def denoise(sample: th.Tensor, t: int) -> th.Tensor:
    return th.tanh(2 * sample + 0.1 * t) + 0.3 * sample.flip(-1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_chain_of_transitions_equals_a_loop_of_steps(name: str, prediction_type: str) -> None:
    given, n_steps = SUPPORTED[name]
    if name == "euler_ancestral" and prediction_type == "sample":
        pytest.skip("diffusers has not implemented it")
    process = DenoisingProcess(given, K, n_steps, prediction_type=prediction_type, clip_sample_range=None)
    config = dict(num_train_timesteps=K, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False)
    scheduler = make_scheduler(given, config)
    scheduler.set_timesteps(n_steps)
    generator = th.Generator().manual_seed(1)
    sample = theirs = th.randn(BATCH, generator=generator)
    if scheduler.init_noise_sigma > 1:
        theirs = sample / scheduler.scale_model_input(th.ones(1), scheduler.timesteps[0])
    for position, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(theirs, t)
        th.testing.assert_close(scaled, sample, rtol=1e-3, atol=1e-3)
        theirs = scheduler.step(denoise(scaled, int(t)), t, theirs, generator=th.Generator().manual_seed(position)).prev_sample
        mean, sigma = process.transition(sample, denoise(sample, int(t)), position)
        noise = th.randn(BATCH, generator=th.Generator().manual_seed(position))
        sample = mean + sigma * noise
    th.testing.assert_close(sample, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SUPPORTED)
def test_learns_saves_and_loads_with_each(name: str, tmp_path: Path) -> None:
    scheduler, n_steps = SUPPORTED[name]
    model = DPPO(
        "DiffusionMlpPolicy",
        make_vec_env("Pendulum-v1", 2),
        n_steps=16,
        batch_size=32,
        scheduler=scheduler,
        inference_steps=n_steps,
        policy_kwargs=dict(denoising_steps=K, horizon=2, prediction_type="epsilon", net_arch=dict(pi=[32] * 3, vf=[32] * 3)),
        seed=0,
        device="cpu",
    )
    model.learn(32)
    obs, noise = th.randn(3, 3), model.policy.draw_noise(3)
    chain = model.policy.sample_chain(obs, noise=noise)
    replayed = model.policy.chain_log_prob(obs, chain.chain)
    th.testing.assert_close(replayed, chain.log_prob, rtol=1e-3, atol=1e-3)
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model", env=model.env)
    assert th.equal(loaded.policy.sample_chain(obs, noise=noise).actions, chain.actions)
    # Another sampler for the same denoiser.
    DPPO.load(tmp_path / "model", env=model.env, scheduler="ddim", inference_steps=5).learn(32)


def test_the_clean_sample_is_clamped() -> None:
    process = DenoisingProcess("EulerAncestralDiscreteScheduler", K, clip_sample_range=1.0)
    sample, output = 3 * th.randn(BATCH), 3 * th.randn(BATCH)
    for position in range(K):
        c = process.coefficients(position)
        x0 = (c.x0_from_sample * sample + c.x0_from_output * output).clamp(-1, 1)
        mean, _ = process.transition(sample, output, position)
        th.testing.assert_close(mean, c.mean_from_sample * sample + c.mean_from_x0 * x0, rtol=1e-4, atol=1e-4)
    # The last step ends at the clean sample.
    th.testing.assert_close(mean, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler,inference_steps,message",
    [
        ("DPMSolverMultistepScheduler", 10, "use earlier ones.*solver_order=1"),
        ("UniPCMultistepScheduler", 10, "use earlier ones"),
        ("DEISMultistepScheduler", 10, "use earlier ones"),
        ("HeunDiscreteScheduler", K, "a diffusion policy needs as many different ones"),
        ("KDPM2DiscreteScheduler", K, "a diffusion policy needs as many different ones"),
        ("PNDMScheduler", K, "a diffusion policy needs as many different ones"),
        ("DDIMInverseScheduler", 10, "from the noisiest on"),
        ("EulerDiscreteScheduler", 10, "fractional timesteps.*timestep_spacing='leading' or inference_steps=20"),
        ("FlowMatchEulerDiscreteScheduler", K, "has no beta_schedule"),
        ("EDMEulerScheduler", K, "has no beta_schedule"),
        ("LCMScheduler", 4, "can't run inference_steps=4 of 20.*original_steps"),
        ("UNet1DModel", K, "scheduler='UNet1DModel' is unknown"),
        ({"solver_order": 1}, K, "is unknown.*_class_name"),
        ({"_class_name": "DDIMScheduler", "eta": 1.0}, 5, "DDIMScheduler has no option 'eta'"),
        (3, K, "scheduler=3 is not a diffusers scheduler"),
    ],
)
def test_others_are_refused_with_a_reason(scheduler: Any, inference_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        DenoisingProcess(scheduler, K, inference_steps)


def test_those_that_predict_no_clean_sample_are_refused() -> None:
    with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler: prediction_type"):
        DenoisingProcess("EulerAncestralDiscreteScheduler", K, prediction_type="sample")
