"""
Denoising processes as Gaussian transitions whose mean and std can be differentiated: what all have in common, and those of
diffusion, made of a diffusers scheduler.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch as th
from torch import nn

from sb3_dppo.diffusion.schedulers import AffineStep, affine_steps, check_noise_schedule, make_scheduler, set_timesteps

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# More would take minutes to build and change nothing: diffusers' own models have as many.
MAX_DENOISING_STEPS = 1000
# The least std of DDPM's deterministic mode, at all steps but the last, where it is 0.
DDPM_EVALUATION_STD = 1e-3


class DenoisingChain(NamedTuple):
    """
    One sampled chunk per decision, with the iterates that led to it, in normalised action space.

    :param actions: The clean chunks, shape (B, Tp, Da).
    :param chain: The last K'+1 iterates, noisiest first, shape (B, K'+1, Tp, Da).
    :param log_prob: Elementwise log-densities of ``chain[:, 1:]`` given ``chain[:, :-1]``, shape (B, K', Tp, Da).
    """

    actions: th.Tensor
    chain: th.Tensor
    log_prob: th.Tensor


class Coefficients(NamedTuple):
    """
    What the reverse step at one position of the process needs. For a tensor of N positions each field has shape (N, 1, 1),
    so that positions can be mixed in a batch; for a single position each field is a number.
    """

    x0_from_sample: Any
    x0_from_output: Any
    noise_from_sample: Any
    noise_from_output: Any
    sqrt_alpha: Any
    sqrt_one_minus_alpha: Any
    mean_from_x0: Any
    mean_from_sample: Any
    one_minus_alpha_prev: Any
    sigma: Any


class Process(nn.Module, ABC):
    """
    Transitions N(mean, sigma²) from an initial iterate to a clean chunk, one per *position*: position 0 is the noisiest step
    that is run, position ``inference_steps - 1`` the last one.

    :param denoising_steps: K, the steps of the trained model, at most 1000.
    :param inference_steps: S, the steps that are run. ``None`` means K.
    :param clip_sample_range: Clamp of the predicted clean chunk to ± this value, or ``None``.
    :param clip_noise_pred: DDIM only: clamp of the noise, after the clean chunk was clamped, or ``None``.
    :param clip_final_action: Clamp of the final sample to ± this value, or ``None``.
    :raises ValueError: for a number of denoising steps out of range.
    """

    table: th.Tensor
    timesteps: th.Tensor
    # Whether steps are those of DDIM, which have an η.
    is_ddim = False
    # Whether the initial iterate is noise, or zero.
    starts_from_noise: ClassVar[bool] = True

    def __init__(
        self,
        denoising_steps: int,
        inference_steps: int | None = None,
        clip_sample_range: float | None = 1.0,
        clip_noise_pred: float | None = None,
        clip_final_action: float | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= denoising_steps <= MAX_DENOISING_STEPS:
            raise ValueError(f"denoising_steps={denoising_steps} must be between 1 and {MAX_DENOISING_STEPS}.")
        self.denoising_steps = denoising_steps
        self.inference_steps = denoising_steps if inference_steps is None else inference_steps
        self.clip_sample_range = clip_sample_range
        self.clip_noise_pred = clip_noise_pred
        self.clip_final_action = clip_final_action

    def _set_table(self, timesteps: th.Tensor, table: th.Tensor) -> None:
        """
        :param timesteps: What the denoiser is told at each position, shape (S,).
        :param table: The ``Coefficients`` of each, shape (10, S).
        """
        # Not persistent: a saved policy can be loaded with another sampler.
        self.register_buffer("timesteps", timesteps, persistent=False)
        self.register_buffer("table", table, persistent=False)
        self._numbers = [Coefficients(*column) for column in self.table.t().tolist()]

    @abstractmethod
    def draw_timesteps(self, n: int, device: th.device) -> th.Tensor:
        """Timesteps for supervised training, shape (n,)."""

    @abstractmethod
    def add_noise(self, actions: th.Tensor, noise: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """
        What the denoiser sees in supervised training.

        :param actions: Clean chunks, shape (B, Tp, Da).
        :param noise: Standard normal, the same shape.
        :param timesteps: As drawn by :meth:`draw_timesteps`, shape (B,).
        :return: Noisy chunks, the same shape.
        """

    @abstractmethod
    def denoising_target(self, actions: th.Tensor, noise: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """What the denoiser learns to predict then; arguments and shape as of :meth:`add_noise`."""

    def coefficients(self, position: int | th.Tensor) -> Coefficients:
        """The coefficients at one position, or at the position of each row of a batch, shape (N,)."""
        if isinstance(position, int):
            return self._numbers[position]
        return Coefficients(*self.table[:, position, None, None])

    def transition(
        self, sample: th.Tensor, output: th.Tensor, position: int | th.Tensor, eta: float | th.Tensor = 1.0
    ) -> tuple[th.Tensor, th.Tensor | float]:
        """
        The reverse step from ``sample``.

        :param sample: The current iterate, shape (B, Tp, Da).
        :param output: The denoiser's output there, the same shape.
        :param position: Where in the process: one position, or one per row, shape (B,).
        :param eta: DDIM's η, a number or of shape (B, 1, Da). DDPM has none.
        :return: Mean, shape (B, Tp, Da), and std (no floor applied), a number or of shape (B, 1, 1) or (B, 1, Da).
        """
        c = self.coefficients(position)
        x0 = _combine(c.x0_from_sample, sample, c.x0_from_output, output)
        if self.clip_sample_range is not None:
            x0 = x0.clamp(-self.clip_sample_range, self.clip_sample_range)
        if not self.is_ddim:
            return _combine(c.mean_from_sample, sample, c.mean_from_x0, x0), c.sigma

        if self.clip_sample_range is not None:
            noise = (sample - c.sqrt_alpha * x0) / c.sqrt_one_minus_alpha
        else:
            noise = _combine(c.noise_from_sample, sample, c.noise_from_output, output)
        if self.clip_noise_pred is not None:
            noise = noise.clamp(-self.clip_noise_pred, self.clip_noise_pred)
        sigma = eta * c.sigma
        direction = c.one_minus_alpha_prev - sigma**2
        if isinstance(direction, th.Tensor):
            # Not 0, where the square root has no gradient for η.
            direction = direction.clamp(min=1e-14).sqrt()
        else:
            direction = max(direction, 0.0) ** 0.5
        return _combine(c.mean_from_x0, x0, direction, noise), sigma

    def sigmas(self) -> th.Tensor:
        """The std at every position (no floor applied), for DDIM with η = 1, shape (S,)."""
        return self.table[-1]

    def deterministic_stds(self) -> th.Tensor:
        """The std at every position in deterministic sampling, shape (S,)."""
        return th.zeros_like(self.sigmas())

    def clip_final(self, sample: th.Tensor) -> th.Tensor:
        """The last iterate, clamped if ``clip_final_action`` is set."""
        if self.clip_final_action is None:
            return sample
        return sample.clamp(-self.clip_final_action, self.clip_final_action)


class DenoisingProcess(Process):
    """
    The reverse process of a diffusers scheduler.

    diffusers' ``step`` takes one timestep for the whole batch and returns a sample. Policy gradients need mean and std, for
    batches that mix timesteps; so the tables are derived here from the scheduler (Ho et al. 2020, eq. 6-7 for DDPM;
    Song et al. 2021, eq. 12 for DDIM, with the noise computed again from the clamped clean sample). Those of other schedulers
    are measured, see :func:`~sb3_dppo.diffusion.schedulers.affine_steps`.

    :param scheduler: ``"ddpm"``, ``"ddim"``, or another diffusers scheduler: itself, its name or its configuration. Its class
        and options are kept, while K, the betas, the prediction type and the clamp come from the arguments below.
    :param denoising_steps: See :class:`Process`.
    :param inference_steps: S, at most K. ``None`` means K, the only choice for DDPM.
    :param beta_schedule: diffusers' name of the noise schedule.
    :param prediction_type: What the denoiser's output means: "epsilon" (the noise), "sample" (the clean chunk)
        or "v_prediction".
    :param clips: See :class:`Process`.
    :raises ValueError: for a scheduler whose step is not such a transition, that assumes another noise schedule, or that can't
        run this number of steps.
    """

    def __init__(
        self,
        scheduler: Any = "ddpm",
        denoising_steps: int = 20,
        inference_steps: int | None = None,
        beta_schedule: str = "squaredcos_cap_v2",
        prediction_type: str = "epsilon",
        **clips: float | None,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            others = (*PREDICTION_TYPES, "flow", "mean")
            raise ValueError(f"prediction_type={prediction_type!r} is unknown: choose one of {others}.")
        super().__init__(denoising_steps, inference_steps, **clips)
        self.prediction_type = prediction_type
        config = dict(
            num_train_timesteps=denoising_steps,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
            clip_sample=self.clip_sample_range is not None,
            clip_sample_range=1.0 if self.clip_sample_range is None else self.clip_sample_range,
        )
        # What is added to demonstrations does not depend on the sampler.
        self.training_scheduler = make_scheduler("ddpm", config)
        self.scheduler = make_scheduler(scheduler, config)
        name = type(self.scheduler).__name__
        self.is_ddim = name == "DDIMScheduler"
        check_noise_schedule(self.scheduler, self.training_scheduler)
        self._check_inference_steps(name)
        set_timesteps(self.scheduler, self.inference_steps)
        if name in ("DDPMScheduler", "DDIMScheduler"):
            table = self._make_table(self.scheduler.timesteps)
        else:
            unclamped = make_scheduler(self.scheduler, config | dict(clip_sample=False))
            table = self._measured_table(self.scheduler.timesteps.long(), affine_steps(unclamped, self.inference_steps))
        self._set_table(self.scheduler.timesteps.long(), table)

    def _check_inference_steps(self, name: str) -> None:
        K, S = self.denoising_steps, self.inference_steps
        if name == "DDPMScheduler" and S != K:
            raise ValueError(
                f"inference_steps={S} differs from denoising_steps={K}, but DDPM runs every step: "
                "use scheduler='ddim' for fewer, or leave inference_steps=None."
            )
        if self.is_ddim and (not 1 <= S <= K or K % S != 0):
            divisors = [n for n in range(1, K + 1) if K % n == 0]
            raise ValueError(f"inference_steps={S} must divide denoising_steps={K} for DDIM: choose one of {divisors}.")
        if not 1 <= S <= K:
            raise ValueError(f"inference_steps={S} must be between 1 and denoising_steps={K}.")

    def _make_table(self, timesteps: th.Tensor) -> th.Tensor:
        """The ``Coefficients`` of DDPM or DDIM at every position, shape (10, S)."""
        stride = self.denoising_steps // self.inference_steps if self.is_ddim else 1
        previous = timesteps - stride
        alphas = self.scheduler.alphas_cumprod.double()
        alpha = alphas[timesteps]
        # DDPM ends at the clean sample; DDIM's last target is an option of the scheduler (set_alpha_to_one).
        final_alpha = self.scheduler.final_alpha_cumprod.double() if self.is_ddim else th.ones((), dtype=th.double)
        alpha_prev = th.where(previous >= 0, alphas[previous.clamp(min=0)], final_alpha)
        beta = 1 - alpha / alpha_prev
        variance = beta * (1 - alpha_prev) / (1 - alpha)
        if not self.is_ddim and self.scheduler.config.variance_type == "fixed_large":
            variance = th.where(previous >= 0, beta, 0.0)
        return self._complete_table(
            alpha,
            mean_from_x0=alpha_prev.sqrt() if self.is_ddim else alpha_prev.sqrt() * beta / (1 - alpha),
            mean_from_sample=th.zeros_like(alpha)
            if self.is_ddim
            else (alpha / alpha_prev).sqrt() * (1 - alpha_prev) / (1 - alpha),
            one_minus_alpha_prev=1 - alpha_prev,
            sigma=variance.clamp(min=0).sqrt(),
        )

    def _measured_table(self, timesteps: th.Tensor, steps: list[AffineStep]) -> th.Tensor:
        """The same as ``Coefficients``, shape (10, S)."""
        alpha = self.scheduler.alphas_cumprod.double()[timesteps]
        from_sample, from_output, sigma = th.tensor(steps, dtype=th.double).unbind(dim=1)
        # The output acts through the clean sample that it predicts, which can be clamped.
        x0_from_sample, x0_from_output, _, _ = self._x0_and_noise(alpha)
        mean_from_x0 = from_output / x0_from_output
        return self._complete_table(
            alpha,
            mean_from_x0=mean_from_x0,
            mean_from_sample=from_sample - mean_from_x0 * x0_from_sample,
            one_minus_alpha_prev=th.zeros_like(alpha),  # for DDIM's η only
            sigma=sigma,
        )

    def _x0_and_noise(self, alpha: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """How the clean sample and the noise follow from the sample and the output, the first four ``Coefficients``."""
        sqrt_alpha, sqrt_one_minus_alpha = alpha.sqrt(), (1 - alpha).sqrt()
        zero, one = th.zeros_like(alpha), th.ones_like(alpha)
        return {
            "epsilon": (1 / sqrt_alpha, -sqrt_one_minus_alpha / sqrt_alpha, zero, one),
            "sample": (zero, one, 1 / sqrt_one_minus_alpha, -sqrt_alpha / sqrt_one_minus_alpha),
            "v_prediction": (sqrt_alpha, -sqrt_one_minus_alpha, sqrt_one_minus_alpha, sqrt_alpha),
        }[self.prediction_type]

    def _complete_table(self, alpha: th.Tensor, **coefficients: th.Tensor) -> th.Tensor:
        """All of them, shape (10, S)."""
        predictions = self._x0_and_noise(alpha)
        rows = Coefficients(*predictions, sqrt_alpha=alpha.sqrt(), sqrt_one_minus_alpha=(1 - alpha).sqrt(), **coefficients)
        return th.stack(list(rows)).float()

    def deterministic_stds(self) -> th.Tensor:
        if self.is_ddim:
            return super().deterministic_stds()
        stds = self.sigmas().clamp(min=DDPM_EVALUATION_STD)
        stds[-1] = 0.0
        return stds

    def draw_timesteps(self, n: int, device: th.device) -> th.Tensor:
        return th.randint(self.denoising_steps, (n,), device=device)

    def add_noise(self, actions: th.Tensor, noise: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        return self.training_scheduler.add_noise(actions, noise, timesteps)

    def denoising_target(self, actions: th.Tensor, noise: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return actions
        return self.training_scheduler.get_velocity(actions, noise, timesteps)


def _combine(a: Any, x: th.Tensor, b: Any, y: th.Tensor) -> th.Tensor:
    """a·x + b·y, for numbers in as few operations as there are: their calls dominate for small batches."""
    if not isinstance(b, float):
        return a * x + b * y
    if a == 0.0:
        return b * y
    return th.add(a * x, y, alpha=b)


def gaussian_log_prob(x: th.Tensor, mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """Elementwise log-density of a normal distribution, whose std may be of a broadcastable shape."""
    deviation = (x - mean) / std
    return th.addcmul(-(std.log() + LOG_SQRT_2PI), deviation, deviation, value=-0.5)
