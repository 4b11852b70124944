"""diffusers' other schedulers: their steps are the policy's transitions, or they are refused with a reason."""

import inspect
import itertools
import time
from pathlib import Path
from typing import Any

import diffusers
import diffusers.schedulers
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_dppo import DPPO
from sb3_dppo.diffusion.process import DenoisingProcess

K = 20
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SUPPORTED: dict[str, tuple[Any, int]] = {
    "euler": ("EulerDiscreteScheduler", K),
    "euler_leading": (diffusers.EulerDiscreteScheduler(timestep_spacing="leading"), 5),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", K),
    "lcm": ("LCMScheduler", 4),
    "tcd": (diffusers.TCDScheduler(), K),
    "tcd_original_steps": ({"_class_name": "TCDScheduler", "original_inference_steps": 10}, 4),
    "ddim_parallel": ("DDIMParallelScheduler", 5),
    "ddpm_parallel": ("DDPMParallelScheduler", K),
    "dpm_solver_1": ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1}, 10),
    "dpm_solver_1_all": (
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1, "timestep_spacing": "trailing"},
        K,
    ),
    "sde_dpm_solver_1": (
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1, "algorithm_type": "sde-dpmsolver++"},
        10,
    ),
    "deis_1": ({"_class_name": "DEISMultistepScheduler", "solver_order": 1}, 5),
    "unipc_1": ({"_class_name": "UniPCMultistepScheduler", "solver_order": 1, "disable_corrector": [*range(5)]}, 5),
}
BATCH = (3, 4, 2)
# What runs by its name alone: with S = K, and with S = K/4.
BY_NAME = {
    "DDIMScheduler": (True, True),
    "DDIMParallelScheduler": (True, True),
    "DDPMScheduler": (True, False),
    "DDPMParallelScheduler": (True, True),
    "EulerDiscreteScheduler": (True, False),
    "EulerAncestralDiscreteScheduler": (True, False),
    "LCMScheduler": (True, True),
    "TCDScheduler": (True, True),
    "UnCLIPScheduler": (True, True),
}
MISSING_PREDICTION_TYPES = {"EulerAncestralDiscreteScheduler": "sample", "UnCLIPScheduler": "v_prediction"}


def denoise(sample: th.Tensor, t: int) -> th.Tensor:
    return th.tanh(2 * sample + 0.1 * t) + 0.3 * sample.flip(-1)


def check_against_steps(process: DenoisingProcess) -> None:
    """A chain of transitions equals a loop of the scheduler's own steps."""
    scheduler = type(process.scheduler)(**without_private(process.scheduler.config))
    scheduler.set_timesteps(process.inference_steps)
    generator = th.Generator().manual_seed(1)
    sample = theirs = th.randn(BATCH, generator=generator)
    if scheduler.init_noise_sigma > 1:
        theirs = sample / scheduler.scale_model_input(th.ones(1), scheduler.timesteps[0])
    for position, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(theirs, t)
        assert_close(sample, scaled)
        noise = th.randn(BATCH, generator=th.Generator().manual_seed(position))
        arguments: dict[str, Any] = dict(generator=th.Generator().manual_seed(position))
        if process.is_ddim:
            arguments = dict(eta=1.0, use_clipped_model_output=True, variance_noise=noise)
        elif "generator" not in inspect.signature(scheduler.step).parameters:
            arguments = {}
        theirs = scheduler.step(denoise(scaled, int(t)), t, theirs, **arguments).prev_sample
        mean, sigma = process.transition(sample, denoise(sample, int(t)), position)
        sample = mean + sigma * noise
    assert_close(sample, theirs)


def assert_close(actual: th.Tensor, expected: th.Tensor) -> None:
    th.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def without_private(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_chain_of_transitions_equals_a_loop_of_steps(name: str, prediction_type: str) -> None:
    given, n_steps = SUPPORTED[name]
    if name == "euler_ancestral" and prediction_type == "sample":
        pytest.skip("diffusers has not implemented it")
    check_against_steps(DenoisingProcess(given, K, n_steps, prediction_type=prediction_type, clip_sample_range=None))


@pytest.mark.parametrize("name", sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")))
def test_every_scheduler_runs_or_is_refused_with_a_reason(name: str) -> None:
    for n_train, divisor, prediction_type in itertools.product((20, 100), (1, 4), PREDICTION_TYPES):
        runs = BY_NAME.get(name, (False, False))[divisor > 1] and MISSING_PREDICTION_TYPES.get(name) != prediction_type
        arguments: dict[str, Any] = dict(prediction_type=prediction_type, clip_sample_range=None)
        if runs:
            check_against_steps(DenoisingProcess(name, n_train, n_train // divisor, **arguments))
        else:
            with pytest.raises(ValueError, match="scheduler|inference_steps"):
                DenoisingProcess(name, n_train, n_train // divisor, **arguments)


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


def test_measured_tables_are_the_same_every_time() -> None:
    tables = []
    for _ in range(30):
        junk = th.rand(int(th.randint(1, 1000, ())))  # Memory is elsewhere each time.
        tables.append(DenoisingProcess("EulerDiscreteScheduler", 100, beta_schedule="squaredcos_cap_v2").table)
        del junk
    assert all(th.equal(table, tables[0]) for table in tables)


def solver(**options: Any) -> dict[str, Any]:
    return {"_class_name": "DPMSolverMultistepScheduler", **options}


@pytest.mark.parametrize(
    "scheduler,inference_steps,message",
    [
        ("DPMSolverMultistepScheduler", 10, "use earlier ones.*solver_order=1"),
        ("UniPCMultistepScheduler", 10, "use earlier ones.*disable_corrector"),
        ("DEISMultistepScheduler", 10, "use earlier ones"),
        (
            solver(solver_order=1),
            K,
            "11, 10, 10, 9.*a diffusion policy needs as many different ones.*spacing='leading' or 'trail",
        ),
        (solver(solver_order=1, use_karras_sigmas=True), 5, "a diffusion policy needs as many different ones"),
        (solver(solver_order=1, algorithm_type="dpmsolver"), 5, "Multistep.*final_sigmas_type.*sigma_min"),
        ("HeunDiscreteScheduler", K, "a diffusion policy needs as many different ones.*more than once a step"),
        ("KDPM2DiscreteScheduler", K, "a diffusion policy needs as many different ones"),
        ("PNDMScheduler", K, "a diffusion policy needs as many different ones"),
        ("DDIMInverseScheduler", 10, "from the noisiest on"),
        ("EulerDiscreteScheduler", 10, "16.89.*whole ones.*timestep_spacing='leading'.*inference_steps=20"),
        (diffusers.DDPMScheduler(steps_offset=1), K, "scheduler=DDPMScheduler runs the timesteps 20, 19.*steps_offset=0"),
        (diffusers.DDIMScheduler(steps_offset=1), K, "scheduler=DDIMScheduler runs the timesteps 20, 19.*steps_offset=0"),
        (diffusers.DDIMScheduler(timestep_spacing="wide"), 5, "scheduler=DDIMScheduler: wide"),
        ("FlowMatchEulerDiscreteScheduler", K, "has no beta_schedule"),
        ("EDMEulerScheduler", K, "has no beta_schedule"),
        (
            {"_class_name": "LCMScheduler", "original_inference_steps": 3},
            4,
            "LCMScheduler: .*original_steps.*inference_steps=4",
        ),
        ({"_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 1.0}, 5, "CogVideoXDPMScheduler.*missing.*timestep_back"),
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
    with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler: prediction_type.*prediction_type='sample'.*choose"):
        DenoisingProcess("EulerAncestralDiscreteScheduler", K, prediction_type="sample")


@pytest.mark.parametrize(
    "scheduler,beta_schedule,way_out",
    [
        ("LCMScheduler", "linear", "'beta_start': 0.0001, 'beta_end': 0.02"),
        ("TCDScheduler", "linear", "'beta_start': 0.0001, 'beta_end': 0.02"),
        (diffusers.DDIMScheduler(beta_start=0.5, beta_end=0.9), "linear", "'beta_start': 0.0001, 'beta_end': 0.02"),
        (diffusers.DDIMScheduler(trained_betas=[0.1] * K), "squaredcos_cap_v2", "'trained_betas': None"),
        (diffusers.DDPMScheduler(rescale_betas_zero_snr=True), "squaredcos_cap_v2", "'rescale_betas_zero_snr': False"),
        ("CogVideoXDDIMScheduler", "squaredcos_cap_v2", "'snr_shift_scale': 1.0"),
    ],
)
def test_a_sampler_with_another_noise_schedule_is_refused(scheduler: Any, beta_schedule: str, way_out: str) -> None:
    arguments: dict[str, Any] = dict(beta_schedule=beta_schedule, prediction_type="sample")
    with pytest.raises(ValueError, match=f"assumes another noise schedule.*{way_out}"):
        DenoisingProcess(scheduler, K, **arguments)
    # The way out is one.
    config = {"_class_name": scheduler} if isinstance(scheduler, str) else dict(scheduler.config)
    name = config.get("_class_name", type(scheduler).__name__)
    options: dict[str, Any] = dict(beta_start=0.0001, beta_end=0.02, trained_betas=None, rescale_betas_zero_snr=False)
    options |= dict(snr_shift_scale=1.0) if "Cog" in name else {}
    check_against_steps(DenoisingProcess({"_class_name": name, **options}, K, clip_sample_range=None, **arguments))


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "EulerDiscreteScheduler", "DDPMParallelScheduler", "LCMScheduler"])
def test_too_many_steps_are_refused_before_they_are_laid_out(scheduler: str) -> None:
    start = time.process_time()
    for n_steps in (0, -1, K + 1, 10**12):
        with pytest.raises(ValueError, match=f"inference_steps={n_steps}"):
            DenoisingProcess(scheduler, K, n_steps)
    with pytest.raises(ValueError, match="denoising_steps=1000000000000 must be between 1 and 1000"):
        DenoisingProcess(scheduler, 10**12)
    assert time.process_time() - start < 5
