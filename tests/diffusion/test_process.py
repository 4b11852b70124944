"""The denoising process against diffusers' own ``step``."""

import itertools
from typing import Any

import pytest
import torch as th
from diffusers import DDIMScheduler, DDPMScheduler

from sb3_dppo.diffusion.process import DenoisingProcess, gaussian_log_prob

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]


def draw(n: int, seed: int = 0) -> tuple[th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(seed)
    return th.randn(n, 4, 3, generator=generator), th.randn(n, 4, 3, generator=generator)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [1.0, 0.5, None])
@pytest.mark.parametrize("steps", [1, 5, 20, 100])
def test_ddpm_transition_equals_scheduler_step(prediction_type: str, clip: float | None, steps: int) -> None:
    process = DenoisingProcess("ddpm", steps, prediction_type=prediction_type, clip_sample_range=clip)
    sample, output = draw(6)
    for position, t in enumerate(process.scheduler.timesteps):
        mean, sigma = process.transition(sample, output, position)
        noise = th.randn(sample.shape, generator=th.Generator().manual_seed(7))
        step = process.scheduler.step(output, int(t), sample, generator=th.Generator().manual_seed(7)).prev_sample
        th.testing.assert_close(mean + sigma * noise, step, rtol=1e-5, atol=1e-5 * step.abs().max().item())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("inference_steps,eta", itertools.product([1, 5, 10, 20], [0.0, 0.4, 1.0]))
@pytest.mark.parametrize("options", [{}, {"set_alpha_to_one": False}, {"timestep_spacing": "trailing"}])
def test_ddim_transition_equals_scheduler_step(
    prediction_type: str, clip: float | None, inference_steps: int, eta: float, options: dict[str, Any]
) -> None:
    process = DenoisingProcess(
        DDIMScheduler(**options), 20, inference_steps, prediction_type=prediction_type, clip_sample_range=clip
    )
    sample, output = draw(6)
    noise = th.randn_like(sample)
    for position, t in enumerate(process.scheduler.timesteps):
        mean, sigma = process.transition(sample, output, position, eta)
        step = process.scheduler.step(
            output, int(t), sample, eta, use_clipped_model_output=True, variance_noise=noise
        ).prev_sample
        scale = step.abs().max().item()
        th.testing.assert_close(mean + sigma * noise, step, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_positions_can_be_mixed_in_a_batch(scheduler: str) -> None:
    process = DenoisingProcess(scheduler, 20)
    sample, output = draw(20)
    mean, sigma = process.transition(sample, output, th.arange(20), 0.7)
    for position in range(20):
        row = slice(position, position + 1)
        expected_mean, expected_sigma = process.transition(sample[row], output[row], position, 0.7)
        th.testing.assert_close(mean[row], expected_mean)
        assert sigma[position].item() == pytest.approx(expected_sigma, rel=1e-6)


def test_variance_types() -> None:
    sample, output = draw(2)
    for variance_type in ("fixed_small", "fixed_small_log", "fixed_large"):
        process = DenoisingProcess(DDPMScheduler(variance_type=variance_type), 10)
        for position, t in enumerate(process.scheduler.timesteps):
            mean, sigma = process.transition(sample, output, position)
            noise = th.randn(sample.shape, generator=th.Generator().manual_seed(7))
            step = process.scheduler.step(output, int(t), sample, generator=th.Generator().manual_seed(7)).prev_sample
            th.testing.assert_close(mean + sigma * noise, step, rtol=1e-5, atol=1e-5)


def test_scheduler_is_reduced_to_class_and_options() -> None:
    given = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="sample", set_alpha_to_one=False)
    process = DenoisingProcess(given, 20, 5)
    config = process.scheduler.config
    assert (config.num_train_timesteps, config.beta_schedule, config.prediction_type) == (20, "squaredcos_cap_v2", "epsilon")
    assert config.set_alpha_to_one is False


def test_target_of_each_prediction_type() -> None:
    actions, noise = draw(5)
    timesteps = th.tensor([0, 3, 7, 12, 19])
    for prediction_type in PREDICTION_TYPES:
        process = DenoisingProcess("ddpm", 20, prediction_type=prediction_type, clip_sample_range=None)
        target = process.denoising_target(actions, noise, timesteps)
        noisy = process.scheduler.add_noise(actions, noise, timesteps)
        # A denoiser that hits its target recovers the clean chunk.
        c = process.coefficients(19 - timesteps)
        recovered = c.x0_from_sample * noisy + c.x0_from_output * target
        th.testing.assert_close(recovered, actions, rtol=1e-2, atol=1e-2)


def test_log_prob() -> None:
    x, mean = draw(3)
    std = th.tensor(0.3)
    expected = th.distributions.Normal(mean, std).log_prob(x)
    th.testing.assert_close(gaussian_log_prob(x, mean, std), expected)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(scheduler="ddpm", inference_steps=5), "inference_steps=5 differs from denoising_steps=20.*ddim"),
        (
            dict(scheduler="ddim", inference_steps=3),
            r"inference_steps=3 must divide denoising_steps=20.*\[1, 2, 4, 5, 10, 20\]",
        ),
        (dict(scheduler="ddim", inference_steps=40), "inference_steps=40 must divide"),
        (dict(scheduler="ddim", inference_steps=0), "inference_steps=0 must divide"),
        (dict(scheduler="euler"), "scheduler='euler' is unknown"),
        (dict(scheduler=DDPMScheduler(variance_type="learned")), "variance_type='learned'.*needs a denoiser that predicts it"),
        (dict(scheduler=DDPMScheduler(thresholding=True)), "thresholding"),
        (
            dict(scheduler=DDPMScheduler(variance_type="fixed_large_log")),
            "fixed_large_log.*choose 'fixed_small' or 'fixed_large'",
        ),
        (dict(beta_schedule="cosine"), "cosine.*beta_schedule='cosine'"),
        (dict(prediction_type="noise"), "prediction_type='noise' is unknown"),
        (dict(denoising_steps=0), "denoising_steps=0"),
        (dict(denoising_steps=1001), "denoising_steps=1001 must be between 1 and 1000"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        DenoisingProcess(**arguments)
