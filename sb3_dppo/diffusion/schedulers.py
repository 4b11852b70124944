"""Which diffusers schedulers a diffusion policy can be sampled with, and what their steps are."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th

NAMED = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler"}
# How far a step may be from an affine function, relative to its result: some schedulers compute in float32.
TOLERANCE = 1e-4
# Of the random chunks that they are tried on.
PROBE_SHAPE = (4, 8, 8)


class AffineStep(NamedTuple):
    """A reverse step x' = from_sample · x + from_output · output + sigma · noise, of iterates scaled to unit variance."""

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
    cls, options = _class_and_options(scheduler)
    known = inspect.signature(cls.__init__).parameters
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
    if options.get("variance_type") not in (None, "fixed_small", "fixed_small_log", "fixed_large"):
        raise ValueError(
            f"scheduler: variance_type={options['variance_type']!r} can't be used: choose 'fixed_small' or 'fixed_large'. A "
            "learned one needs a denoiser that predicts it; 'fixed_large_log' makes diffusers take the root of a negative one."
        )
    if "original_inference_steps" in known:
        # Those that LCM and TCD choose from; diffusers' default, 50, is for models of 1000.
        options.setdefault("original_inference_steps", config["num_train_timesteps"])
    with _refusing(cls.__name__, f"for beta_schedule={config['beta_schedule']!r}"):
        return cls(**{**options, **{name: value for name, value in config.items() if name in known}})


def _class_and_options(scheduler: Any) -> tuple[Any, dict[str, Any]]:
    """Its class and the options that were set."""
    # diffusers takes seconds to import: only when a policy is built, not with the package.
    from diffusers import SchedulerMixin, schedulers

    if isinstance(scheduler, SchedulerMixin):
        cls: Any = type(scheduler)
        options = dict(scheduler.config)  # type: ignore[attr-defined]
    elif isinstance(scheduler, (str, Mapping)):
        options = {} if isinstance(scheduler, str) else dict(scheduler)
        name = str(scheduler if isinstance(scheduler, str) else options.get("_class_name"))
        cls = getattr(schedulers, NAMED.get(name, name), None)
        if not (inspect.isclass(cls) and issubclass(cls, SchedulerMixin)):
            raise ValueError(
                f"scheduler={scheduler!r} is unknown, or needs a package that is not installed: choose 'ddpm', 'ddim', a "
                "diffusers scheduler or its name, or a mapping with its name as _class_name."
            )
    else:
        raise ValueError(f"scheduler={scheduler!r} is not a diffusers scheduler: choose 'ddpm' or 'ddim', for instance.")
    defaults = options.get("_use_default_values", ())
    return cls, {name: value for name, value in options.items() if not name.startswith("_") and name not in defaults}


@contextmanager
def _refusing(name: str, situation: str) -> Iterator[None]:
    """Whatever diffusers raises for what a scheduler can't do becomes a ValueError."""
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"scheduler={name}: {reason} ({situation}): change this, or choose another scheduler.") from error


def check_noise_schedule(scheduler: Any, training_scheduler: Any) -> None:
    """
    :param scheduler: The sampler.
    :param training_scheduler: What adds noise when the denoiser is trained.
    :raises ValueError: if the sampler assumes another amount of noise at some timestep, saying which options to change.
    """
    ours, trained = scheduler.alphas_cumprod, training_scheduler.alphas_cumprod
    if ours.shape == trained.shape and th.allclose(ours, trained, rtol=0, atol=1e-6):
        return
    names = ("beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
    options = {name: training_scheduler.config[name] for name in names} | {"snr_shift_scale": 1.0}
    options = {name: value for name, value in options.items() if str(scheduler.config.get(name, value)) != str(value)}
    raise ValueError(
        f"scheduler={type(scheduler).__name__} assumes another noise schedule than the denoiser is trained with: its "
        f"alphas_cumprod goes from {ours[0]:.3g} to {ours[-1]:.3g} in {len(ours)} steps, the denoiser's from "
        f"{trained[0]:.3g} to {trained[-1]:.3g} in {len(trained)}. Give it the options {options}, as in training, or choose "
        "another scheduler."
    )


def set_timesteps(scheduler: Any, inference_steps: int) -> None:
    """
    :param scheduler: A diffusers scheduler.
    :param inference_steps: S, the steps to run, at most K.
    :raises ValueError: if its timesteps are not S different ones that the denoiser knows.
    """
    name, K = type(scheduler).__name__, scheduler.config.num_train_timesteps
    with _refusing(name, f"inference_steps={inference_steps} of {K}"):
        scheduler.set_timesteps(inference_steps)
    timesteps = scheduler.timesteps
    distinct = len(timesteps) == len(timesteps.unique()) == inference_steps
    if not distinct or not timesteps.diff().lt(0).all() or not 0 <= timesteps.min() <= timesteps.max() < K:
        fault = f"a diffusion policy needs as many different ones, in 0 … {K - 1}, from the noisiest on"
    elif (timesteps != timesteps.round()).any():
        fault = "the denoiser knows whole ones"
    else:
        return
    shown = ", ".join(f"{t:.4g}" for t in timesteps[:20].tolist()) + ", …" * (len(timesteps) > 20)
    raise ValueError(
        f"scheduler={name} runs the timesteps {shown} for inference_steps={inference_steps}, but {fault}: try its option "
        f"timestep_spacing='leading' or 'trailing' or steps_offset=0, inference_steps={K} or fewer, or, if it evaluates the "
        "denoiser more than once a step, another scheduler."
    )


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
    set_timesteps(scheduler, inference_steps)
    name, prediction_type = type(scheduler).__name__, scheduler.config.prediction_type
    # Some schedulers' iterates have another variance than 1, which they undo for the denoiser.
    measured, scales = [], []
    generator, step_generator = th.Generator().manual_seed(0), th.Generator()
    keywords = {"generator": step_generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for seed, t in enumerate(scheduler.timesteps, start=1):
        scales.append(1 / float(scheduler.scale_model_input(th.ones(1), t)))
        sample, output = th.randn((2, *PROBE_SHAPE), generator=generator)
        sample = scales[-1] * sample
        step_generator.manual_seed(seed)
        with _refusing(name, f"a step with prediction_type={prediction_type!r}"):
            result = scheduler.step(output, t, sample, **keywords).prev_sample.double()
        noise = th.randn(PROBE_SHAPE, generator=step_generator.manual_seed(seed))
        inputs = th.stack([sample, output, noise], dim=-1).double().flatten(0, -2)
        coefficients = th.linalg.lstsq(inputs, result.reshape(-1, 1)).solution
        if not (inputs @ coefficients - result.reshape(-1, 1)).abs().max() <= TOLERANCE * result.std():
            raise ValueError(
                f"scheduler={name}: its step at timestep {int(t)} is not a Gaussian transition whose mean is affine in the "
                "sample and in the denoiser's output; steps of several evaluations or that use earlier ones are not. Choose "
                "'ddpm', 'ddim' or, for a multistep solver, solver_order=1 (for UniPC also disable_corrector=[0, 1, …])."
            )
        # LAPACK's last digits differ from call to call; a run that is resumed needs the same table.
        measured.append([round(coefficient, 9) for coefficient in coefficients.flatten().tolist()])
    return [
        AffineStep(from_sample * scale / next_scale, from_output / next_scale, abs(sigma) / next_scale)
        for (from_sample, from_output, sigma), scale, next_scale in zip(measured, scales, [*scales[1:], 1.0], strict=True)
    ]
