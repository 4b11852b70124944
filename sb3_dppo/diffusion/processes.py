"""The kinds of denoising process that there are."""

from collections.abc import Callable
from typing import Any

from sb3_dppo.diffusion.flow import FlowProcess
from sb3_dppo.diffusion.gaussian import GaussianProcess
from sb3_dppo.diffusion.process import DenoisingProcess, Process

# By prediction type; the others are those of diffusion.
KINDS: dict[str, Callable[..., Process]] = dict(flow=FlowProcess, mean=GaussianProcess)


def make_process(scheduler: Any, prediction_type: str, beta_schedule: str, **arguments: Any) -> Process:
    """
    :param scheduler: See :class:`~sb3_dppo.diffusion.process.DenoisingProcess`, as of the others.
    :param prediction_type: What the denoiser's output means.
    :param beta_schedule: diffusers' name of the noise schedule, which only diffusion has.
    :param arguments: ``denoising_steps``, ``inference_steps`` and the clamps.
    :return: The process of this prediction type.
    :raises ValueError: as the process does.
    """
    if prediction_type in KINDS:
        return KINDS[prediction_type](scheduler, **arguments)
    return DenoisingProcess(scheduler, prediction_type=prediction_type, beta_schedule=beta_schedule, **arguments)
