"""The conditional UNet of Diffusion Policy (Chi et al. 2023) under the names that other projects give its weights."""

import re
from typing import Any

from sb3_dppo.importers.core import Tensors

# From their names to ours, one after the other: the authors' of DPPO and LeRobot's.
RENAMINGS = (
    (r"^(?:time_mlp|diffusion_step_encoder)\.1\.", "time_mlp.0."),
    (r"^(?:time_mlp|diffusion_step_encoder)\.3\.", "time_mlp.2."),
    (r"^mid_modules\.", "middle."),
    (r"^(down|up)_modules\.(\d+)\.([01])\.", r"\1.\2.\3."),
    (r"^(down|up)_modules\.(\d+)\.2\.(?:conv\.)?", r"\1sample.\2."),
    (r"^final_conv\.", "output."),
    # A convolution and, with a reshaping before it or without, its normalisation.
    (r"\.blocks\.0\.block\.|\.conv1\.block\.", ".conv1."),
    (r"\.blocks\.1\.block\.|\.conv2\.block\.", ".conv2."),
    (r"^output\.0\.block\.", "output.0."),
    (r"(conv[12]|^output\.0)\.2\.", r"\1.1."),
    (r"\.cond_encoder\.", ".encoder."),
    (r"\.residual_conv\.", ".skip."),
)


def is_film_unet(tensors: Tensors) -> bool:
    """Whether tensors, under others' names, are those of such a UNet."""
    return any(name.startswith("down_modules.") for name in tensors)


def rename_film_unet(tensors: Tensors) -> Tensors:
    """
    :param tensors: A UNet's tensors under others' names.
    :return: The same under those of :class:`~sb3_dppo.diffusion.film_unet.FilmUnetDenoiser`.
    """
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in RENAMINGS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def infer_film_unet(tensors: Tensors) -> tuple[dict[str, Any], int]:
    """
    :param tensors: A UNet's tensors under our names.
    :return: The ``policy_kwargs`` that they tell, and at least how many weights such a UNet has.
    :raises ValueError: if some are missing or have another form.
    """

    def shape(name: str, n_dims: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].dim() != n_dims:
            raise ValueError(f"checkpoint is a UNet's, but lacks a tensor {name!r} (our name) of {n_dims} dimensions.")
        return tuple(tensors[name].shape)

    levels = {int(match[1]) for name in tensors if (match := re.match(r"down\.(\d+)\.", name))}
    widths = [shape(f"down.{level}.0.conv1.0.weight", 3)[0] for level in range(len(levels))]
    kernel_size, layers = shape("down.0.0.conv1.0.weight", 3)[2], 3 if "down.0.0.encoder.4.weight" in tensors else 1
    modulation = shape(f"down.0.0.encoder.{4 if layers == 3 else 1}.weight", 2)[0]
    inferred = dict(
        net="film",
        net_arch=dict(pi=widths),
        time_dim=shape("time_mlp.0.weight", 2)[1],
        net_kwargs=dict(kernel_size=kernel_size, film_scale=modulation == 2 * widths[0], condition_layers=layers),
    )
    return inferred, sum(kernel_size * width**2 for width in widths)
