"""The kinds of denoising process that there are."""

from typing import Any

from sb3_dppo.diffusion.flow import FlowProcess
from sb3_dppo.diffusion.gaussian import GaussianProcess
from sb3_dppo.diffusion.process import DenoisingProcess, Process

# By prediction type; the others are those of diffusion.
KINDS: dict[str, type[Process]] = dict(flow=FlowProcess, mean=GaussianProcess)


def make_process(scheduler: Any, prediction_type: str, **arguments: Any) -> Process:
    """
    :param scheduler: See :class:`~sb3_dppo.diffusion.process.DenoisingProcess`, as of the others.
    :param prediction_type: What the denoiser's output means.
    :param arguments: ``denoising_steps``, ``inference_steps``, ``beta_schedule`` and the clamps.
    :return: The process of this prediction type.
    :raises ValueError: as the process does.
    """
    kind: Any = KINDS.get(prediction_type, DenoisingProcess)
    return kind(scheduler, prediction_type=prediction_type, **arguments)
