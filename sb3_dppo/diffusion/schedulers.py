"""Which diffusers schedulers a diffusion policy can be sampled with, and what their steps are."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch as th

NAMED = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler"}
# How far a step may be from an affine function, relative to its result: some schedulers compute in float32.
TOLERANCE = 1e-4
# Of the random chunks that they are tried on.
PROBE_SHAPE = (4, 8, 8)


class AffineStep(NamedTuple):
    """
    A reverse step x' = from_sample · x + from_output · output + sigma · noise, of iterates scaled to unit variance.
    """

    from_sample: float
    from_output: float
    sigma: float


def make_scheduler(scheduler: Any, config: dict[str, Any]) -> Any:
    """
    :param scheduler: "ddpm", "ddim", the name of a diffusers scheduler, its configuration (a mapping with the name as
        ``_class_name``, as diffusers saves it) or a scheduler, whose class and remaining options are kept.
    :param config: The options that a trained denoiser fixes.
    :return: A new diffusers scheduler.
    :raises ValueError: for one that does not exist or that can't have these options.
    """
    # diffusers takes seconds to import: only when a policy is built, not with the package.
    import diffusers
    from diffusers import SchedulerMixin

    options: dict[str, Any] = {}
    if isinstance(scheduler, (str, Mapping)):
        if not isinstance(scheduler, str):
            options = dict(scheduler)
        name = scheduler if isinstance(scheduler, str) else options.pop("_class_name", None)
        cls = getattr(diffusers, NAMED.get(name, str(name)), None)
        if not (inspect.isclass(cls) and issubclass(cls, SchedulerMixin)):
            raise ValueError(
                f"scheduler={scheduler!r} is unknown: choose 'ddpm', 'ddim', a diffusers scheduler or its name, or a mapping "
                "with its name as _class_name."
            )
    elif isinstance(scheduler, SchedulerMixin):
        cls, options = type(scheduler), dict(scheduler.config)  # type: ignore[attr-defined]
    else:
        raise ValueError(f"scheduler={scheduler!r} is not a diffusers scheduler: choose 'ddpm' or 'ddim', for instance.")
    known = inspect.signature(cls.__init__).parameters
    # diffusers lists the options that were left at their defaults, and would ignore new values for these.
    options = {name: value for name, value in options.items() if not name.startswith("_")}
    if unknown := set(options) - set(known):
        raise ValueError(
            f"scheduler: {cls.__name__} has no option {sorted(unknown)[0]!r}, but {sorted(set(known) - {'self'})}."
        )
    for name in ("num_train_timesteps", "beta_schedule", "prediction_type"):
        if name not in known:
            raise ValueError(
                f"scheduler={cls.__name__} has no {name}, so it is not for the noise that a diffusion policy is trained with: "
                "choose 'ddpm' or 'ddim', for instance."
            )
    if options.get("thresholding", False):
        raise ValueError(
            "scheduler: thresholding=True makes a step depend on the whole sample: use clip_sample_range instead."
        )
    if "learned" in str(options.get("variance_type", "")):
        raise ValueError("scheduler: a learned variance_type needs a denoiser that predicts it: use 'fixed_small'.")
    if "trained_betas" in known:
        options["trained_betas"] = None
    return cls(**{**options, **{name: value for name, value in config.items() if name in known}})


def affine_steps(scheduler: Any, inference_steps: int) -> list[AffineStep]:
    """
    Find the steps of a scheduler by running it on random numbers, from which its coefficients follow as those of a linear
    regression without an error. Steps that depend on earlier ones leave an error, and so does all else that is not a Gaussian
    transition with a mean that is affine in the sample and in the denoiser's output.

    :param scheduler: A diffusers scheduler without a clamp, whose timesteps have not been set.
    :param inference_steps: S, the steps to run.
    :return: The steps, the noisiest first.
    :raises ValueError: for another kind of step, or timesteps that the denoiser does not know.
    """
    name, K = type(scheduler).__name__, scheduler.config.num_train_timesteps
    try:
        scheduler.set_timesteps(inference_steps)
    except ValueError as error:
        raise ValueError(f"scheduler={name} can't run inference_steps={inference_steps} of {K}: {error}") from error
    timesteps = scheduler.timesteps
    distinct = len(timesteps) == len(timesteps.unique()) == inference_steps
    if not distinct or not timesteps.diff().lt(0).all() or not 0 <= timesteps.min() <= timesteps.max() < K:
        raise ValueError(
            f"scheduler={name} runs the timesteps {timesteps.tolist()} for inference_steps={inference_steps}, but a diffusion "
            f"policy needs as many different ones, in 0 … {K - 1}, from the noisiest on."
        )
    if (timesteps != timesteps.round()).any():
        raise ValueError(
            f"scheduler={name} runs the fractional timesteps {[round(t, 2) for t in timesteps.tolist()]} for "
            f"inference_steps={inference_steps}, but the denoiser knows whole ones: use its option "
            f"timestep_spacing='leading' or inference_steps={K}."
        )
    # Some schedulers' iterates have another variance than 1, which they undo for the denoiser.
    measured, scales = [], []
    generator, step_generator = th.Generator().manual_seed(0), th.Generator()
    keywords = {"generator": step_generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for seed, t in enumerate(timesteps, start=1):
        scales.append(1 / float(scheduler.scale_model_input(th.ones(1), t)))
        sample, output = th.randn((2, *PROBE_SHAPE), generator=generator)
        sample = scales[-1] * sample
        step_generator.manual_seed(seed)
        try:
            result = scheduler.step(output, t, sample, **keywords).prev_sample.double()
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"scheduler={name}: {error}") from error
        noise = th.randn(PROBE_SHAPE, generator=step_generator.manual_seed(seed))
        inputs = th.stack([sample, output, noise], dim=-1).double().flatten(0, -2)
        coefficients = th.linalg.lstsq(inputs, result.reshape(-1, 1)).solution
        if (inputs @ coefficients - result.reshape(-1, 1)).abs().max() > TOLERANCE * result.std():
            raise ValueError(
                f"scheduler={name}: its step at timestep {int(t)} is not a Gaussian transition whose mean is affine in the "
                "sample and in the denoiser's output; steps of several evaluations or that use earlier ones are not. Choose "
                "'ddpm', 'ddim' or, for a multistep solver, solver_order=1."
            )
        measured.append(coefficients.flatten().tolist())
    return [
        AffineStep(from_sample * scale / next_scale, from_output / next_scale, abs(sigma) / next_scale)
        for (from_sample, from_output, sigma), scale, next_scale in zip(measured, scales, [*scales[1:], 1.0], strict=True)
    ]
