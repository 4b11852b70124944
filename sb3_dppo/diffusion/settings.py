"""The sampler's settings."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sb3_dppo.diffusion.acceleration import COMPILE_OPTIONS, PRECISIONS
from sb3_dppo.diffusion.noise import LEARNED
from sb3_dppo.diffusion.process import Process

# Of a floor that follows from another: nearly all densities stay within the sampler's LOG_PROB_RANGE.
MIN_LOGPROB_STD = 0.05

ALTERNATIVES: dict[str, tuple[Any, ...]] = dict(
    learn_eta=LEARNED,
    learn_std=LEARNED,
    deterministic_noise=("observation", "zero", "random"),
    compile=COMPILE_OPTIONS,
    precision=PRECISIONS,
)


def is_number(value: Any, whole: bool = False) -> bool:
    """Whether it is one, and no truth value."""
    kinds = (int, np.integer) if whole else (int, float, np.number)
    return isinstance(value, kinds) and not isinstance(value, bool)


def are_ordered(values: Any) -> bool:
    """Whether these are two numbers, the first less than the second."""
    return isinstance(values, (tuple, list)) and len(values) == 2 and all(map(is_number, values)) and values[0] < values[1]


@dataclass(frozen=True)
class SamplerConfig:
    """
    The sampler's settings: what may be chosen anew whenever a trained policy is loaded.

    :param act_steps: Ta, the actions of a chunk that are executed before planning again. ``None``: all from the policy's
        ``first_action`` on.
    :param scheduler: "ddpm", "ddim" or another diffusers scheduler whose steps are Gaussian with a mean that is affine in the
        sample and the denoiser's output: itself, its name, or its configuration (a mapping with ``_class_name``)
    :param inference_steps: S, denoising steps that are run: ``None`` for all, for DDIM a divisor of ``denoising_steps``, for
        another scheduler what it can run
    :param eta: DDIM's η when exploring: 1 is as noisy as DDPM, 0 adds no noise but the floor below
    :param learn_eta: DDIM only: learn η, from ``eta`` on, one for each action dimension ("action") or as a function of the
        observation ("state"); ``None``: it stays
    :param eta_range: Bounds of a learned η
    :param learn_std: Learn the floor of the std, from its value on, one for each action dimension ("action") or as a function
        of observation and denoising step ("state", as in ReinFlow, Zhang et al. 2025); ``None``: see ``min_sampling_std``
    :param std_range: Bounds of a learned std. With too little noise a policy forgets what it no longer meets.
    :param ft_denoising_steps: K', the last denoising steps, which are fine-tuned. The others run the frozen pre-trained
        policy. ``None`` means all.
    :param min_sampling_std: Floor of each denoising step's std when exploring, in normalised action space [-1, 1]. ``None``:
        as ``min_logprob_std``; if that is ``None``, too, the floor of both is learned, one for each action dimension.
    :param min_logprob_std: Floor of the std in log-probabilities. ``None``: as ``min_sampling_std``, but at least 0.05.
    :param noise_clip: Clamp of the standard normal noise of each denoising step; the initial iterate is not clamped
    :param deterministic_noise: The noise of ``predict(deterministic=True)``: "observation" (a pseudo-random function of the
        observation, so that behaviour is distributed as with random noise and yet the same observation gives the same
        action), "zero" (none, which averages modes, and which a fine-tuned policy may never have seen) or "random" (drawn
        anew each time, as the paper's evaluations do)
    :param compile: ``True`` compiles denoising with ``torch.compile``: up to a minute at the first calls, then faster for
        small batches; without a C++ compiler it changes nothing. "auto" runs it as CUDA graphs on a GPU and as it is on a CPU.
    :param precision: Of the networks: "float32", "tf32" (on CUDA) or "bfloat16". Chains, log-probabilities and losses are
        computed in float32 in any case.
    :raises ValueError: naming the setting that is out of range or does not fit the others
    """

    act_steps: int | None = None
    scheduler: Any = "ddpm"
    inference_steps: int | None = None
    eta: float = 1.0
    learn_eta: str | None = None
    eta_range: tuple[float, float] = (0.1, 1.0)
    learn_std: str | None = None
    std_range: tuple[float, float] = (0.1, 2.0)
    ft_denoising_steps: int | None = None
    min_sampling_std: float | None = None
    min_logprob_std: float | None = None
    noise_clip: float = 3.0
    deterministic_noise: str = "observation"
    compile: bool | str = False
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, choices in ALTERNATIVES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {list(choices)}.")
        for name in ("act_steps", "inference_steps", "ft_denoising_steps"):
            if getattr(self, name) is not None and not is_number(getattr(self, name), whole=True):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number, or None.")
        if not (is_number(self.eta) and 0 <= self.eta <= 1):
            raise ValueError(f"eta={self.eta!r} must be a number between 0 and 1.")
        if not (are_ordered(self.eta_range) and self.eta_range[0] >= 0 and self.eta_range[1] <= 1):
            raise ValueError(f"eta_range={self.eta_range!r} must be two numbers with 0 <= low < high <= 1.")
        if not (are_ordered(self.std_range) and self.std_range[0] > 0):
            raise ValueError(f"std_range={self.std_range!r} must be two numbers with 0 < low < high.")
        if self.learn_eta is not None and self.learn_std is not None:
            raise ValueError(
                f"learn_eta={self.learn_eta!r} and learn_std={self.learn_std!r} would both be learned from the same noise: "
                "choose one."
            )
        if not (is_number(self.noise_clip) and self.noise_clip > 0):
            raise ValueError(f"noise_clip={self.noise_clip!r} must be a positive number: use a large one for no clamp.")
        if self.min_sampling_std is not None and not (is_number(self.min_sampling_std) and self.min_sampling_std >= 0):
            raise ValueError(f"min_sampling_std={self.min_sampling_std!r} must be a number and not negative.")
        if self.min_logprob_std is not None and not (is_number(self.min_logprob_std) and self.min_logprob_std > 0):
            raise ValueError(
                f"min_logprob_std={self.min_logprob_std!r} must be a positive number: the last step has no noise of its own."
            )

    @property
    def floors(self) -> tuple[Any, Any]:
        """Those of the std in sampling and in log-probabilities, unless they are learned."""
        sampling, log_prob = self.min_sampling_std, self.min_logprob_std
        if log_prob is None and sampling is not None:
            log_prob = max(sampling, MIN_LOGPROB_STD)
        return log_prob if sampling is None else sampling, log_prob

    @property
    def has_log_std(self) -> bool:
        """Whether the floors are the policy's ``log_std``, which is learned."""
        return self.min_sampling_std is None and self.min_logprob_std is None

    @property
    def learns_std(self) -> bool:
        """Whether the floors are learned, in whatever way."""
        return self.learn_std is not None or self.has_log_std

    @property
    def has_noise_network(self) -> bool:
        """Whether something about the noise is learned by a network."""
        return self.learn_eta is not None or self.learn_std is not None

    def check(self, process: Process, horizon: int, first_action: int = 0) -> None:
        """
        :param process: The denoising process that these settings make of the trained model's.
        :param horizon: Tp, actions in a chunk.
        :param first_action: Number of the first action in a chunk that can be executed.
        :raises ValueError: naming the setting that does not fit them.
        """
        if self.act_steps is not None and not 1 <= self.act_steps <= horizon - first_action:
            most = f"horizon={horizon}" + (f" less first_action={first_action}" if first_action else "")
            raise ValueError(f"act_steps={self.act_steps} must be between 1 and {most}: a chunk has no more actions.")
        if self.ft_denoising_steps is not None and not 1 <= self.ft_denoising_steps <= process.inference_steps:
            raise ValueError(
                f"ft_denoising_steps={self.ft_denoising_steps} must be between 1 and the {process.inference_steps} steps that "
                f"are run (inference_steps={self.inference_steps}, denoising_steps={process.denoising_steps})."
            )
        if self.learn_eta is not None and not process.is_ddim:
            raise ValueError(f"learn_eta={self.learn_eta!r}: only a diffusion policy with scheduler='ddim' has an η to learn.")
