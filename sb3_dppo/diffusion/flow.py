"""Flow matching: chunks at the end of straight paths from noise, followed in a few Euler steps."""

from typing import Any

import torch as th

from sb3_dppo.diffusion.process import MAX_DENOISING_STEPS, Coefficients, Process

# What the denoiser is told is so many times the share of noise: as the timesteps of the paper's 20 diffusion steps.
TIME_SCALE = 20


class FlowProcess(Process):
    """
    Euler steps along the velocity that the denoiser predicts (Lipman et al. 2023; Liu et al. 2023), as Gaussian transitions
    whose std is the sampler's floor (Zhang et al. 2025, ReinFlow).

    Noise and chunk mix as (1 - σ)·chunk + σ·noise, so that the velocity is noise - chunk, with σ from 1 to 0. In supervised
    training σ is continuous, so the number of steps can be chosen anew at any time.

    :param scheduler: "ddpm", the default: the steps are those of diffusers' ``FlowMatchEulerDiscreteScheduler``.
    :param denoising_steps: The number of steps unless ``inference_steps`` is given.
    :param inference_steps: S, the steps that are run, equally long: 1 to 1000.
    :param clips: See :class:`~sb3_dppo.diffusion.process.Process`. The predicted clean chunk is where the velocity leads.
    :raises ValueError: for another scheduler, or a number of steps out of range.
    """

    def __init__(
        self,
        scheduler: Any = "ddpm",
        denoising_steps: int = 4,
        inference_steps: int | None = None,
        **clips: float | None,
    ) -> None:
        super().__init__(denoising_steps, inference_steps, **clips)
        from diffusers import FlowMatchEulerDiscreteScheduler

        if scheduler != "ddpm":
            raise ValueError(f"scheduler={scheduler!r} is of diffusion; prediction_type='flow' has its own: leave it out.")
        S = self.inference_steps
        if not 1 <= S <= MAX_DENOISING_STEPS:
            raise ValueError(f"inference_steps={S} must be between 1 and {MAX_DENOISING_STEPS}.")
        euler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIME_SCALE)
        euler.set_timesteps(sigmas=th.linspace(1.0, 1 / S, S, dtype=th.double).tolist())
        sigma, sigma_next = euler.sigmas[:-1].double(), euler.sigmas[1:].double()
        zero, one = th.zeros_like(sigma), th.ones_like(sigma)
        # The step x + (σ' - σ)·velocity, by way of the clean chunk x - σ·velocity, which can be clamped.
        rows = dict.fromkeys(Coefficients._fields, zero) | dict(
            x0_from_sample=one, x0_from_output=-sigma, mean_from_sample=sigma_next / sigma, mean_from_x0=1 - sigma_next / sigma
        )
        self._set_table(euler.timesteps.float(), th.stack(list(rows.values())).float())

    def draw_timesteps(self, n: int, device: th.device) -> th.Tensor:
        return TIME_SCALE * th.rand(n, device=device)

    def add_noise(self, actions: th.Tensor, noise: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        return th.lerp(actions, noise, timesteps[:, None, None] / TIME_SCALE)

    def denoising_target(self, actions: th.Tensor, noise: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        return noise - actions
