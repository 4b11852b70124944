"""Gaussian policies as a process of one step, to compare diffusion with."""

from typing import Any, ClassVar

import torch as th

from sb3_dppo.diffusion.process import Coefficients, Process


class GaussianProcess(Process):
    """
    One transition, from an iterate that is zero: the denoiser's output is the mean of the chunk, and what it learns in
    supervised training is the chunk, by least squares.

    :param scheduler: "ddpm", the default: there is nothing to schedule.
    :param denoising_steps: 1.
    :param inference_steps: 1 or ``None``.
    :param clips: See :class:`~sb3_dppo.diffusion.process.Process`.
    :raises ValueError: for more than one step, or a scheduler.
    """

    starts_from_noise: ClassVar[bool] = False

    def __init__(
        self,
        scheduler: Any = "ddpm",
        denoising_steps: int = 1,
        inference_steps: int | None = None,
        **clips: float | None,
    ) -> None:
        super().__init__(denoising_steps, inference_steps, **clips)
        if (self.denoising_steps, self.inference_steps, scheduler) != (1, 1, "ddpm"):
            raise ValueError(
                f"prediction_type='mean' with denoising_steps={denoising_steps}, inference_steps={inference_steps} and "
                f"scheduler={scheduler!r}: a Gaussian policy has one step, so use denoising_steps=1 and leave the others out."
            )
        prediction = dict.fromkeys(Coefficients._fields, 0.0) | dict(x0_from_output=1.0, mean_from_x0=1.0)
        self._set_table(th.zeros(1, dtype=th.long), th.tensor([list(prediction.values())]).t())

    def draw_timesteps(self, n: int, device: th.device) -> th.Tensor:
        return th.zeros(n, dtype=th.long, device=device)

    def add_noise(self, actions: th.Tensor, noise: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        return th.zeros_like(actions)

    def denoising_target(self, actions: th.Tensor, noise: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        return actions
