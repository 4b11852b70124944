"""Import of checkpoints of the reference implementation (the code of Ren et al. 2024) as models of this package."""

import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import GymEnv
from torch import nn

from sb3_dppo.diffusion.film_unet import FilmBlock, FilmUnetDenoiser
from sb3_dppo.dppo import DPPO
from sb3_dppo.importers.core import Tensors, check_sizes, make_pretrained_model, merged_policy_kwargs
from sb3_dppo.importers.film_unet import infer_film_unet, is_film_unet, rename_film_unet


def import_reference_checkpoint(
    checkpoint: str | Path | Mapping[str, Any],
    env_or_spaces: GymEnv | str | tuple[spaces.Space, spaces.Space],
    *,
    policy_kwargs: dict[str, Any],
    normalization: str | Path | None = None,
    **dppo_kwargs: Any,
) -> DPPO:
    """
    Make a model from a checkpoint of the reference implementation, pre-trained or fine-tuned, with an MLP or a UNet denoiser.

    Widths, residual or plain layers, LayerNorm, observation encoders and the kind of a UNet's blocks are read off the tensors.

    :param checkpoint: Path of the file, which is read without unpickling objects, or a mapping of tensors under its names:
        ``network.…`` of a pre-trained one (of ``model`` and ``ema`` the latter is taken), ``actor.…`` (frozen),
        ``actor_ft.…`` (fine-tuned) and ``critic.…`` of a fine-tuned one.
    :param env_or_spaces: The env, or its observation space and action space. Of an observation history, the space of
        all frames side by side, newest last, as ``VecFrameStack`` gives it.
    :param policy_kwargs: What tensors don't tell: ``denoising_steps``, ``horizon``, ``activation_fn``,
        ``critic_activation_fn``, ``prediction_type``, the clamps and, of a UNet, ``net_kwargs=dict(n_groups=…, norm_eps=…)``.
        Otherwise the paper's for Gym tasks, and Mish in a UNet.
    :param normalization: Path of the .npz with ``obs_min``, ``obs_max``, ``action_min`` and ``action_max`` of one frame.
        ``None``: observations are taken as they are, actions scaled to the action space's bounds.
    :param dppo_kwargs: Arguments of :class:`~sb3_dppo.DPPO`, such as ``ft_denoising_steps`` and ``scheduler``. The floors of
        the std are the paper's, 0.1, otherwise.
    :return: The model.
    :raises ValueError: if it is not such a checkpoint, or does not fit the spaces.
    """
    tensors = _read_tensors(checkpoint)
    base = _select(tensors, "actor.") or _select(tensors, "network.")
    fine_tuned = _select(tensors, "actor_ft.") or base
    base = base or fine_tuned
    critic = _select(tensors, "critic.Q1.")
    is_unet = is_film_unet(fine_tuned)
    if not is_unet and not any(name.startswith("mlp_mean.") for name in fine_tuned):
        raise ValueError("checkpoint is not one of a diffusion policy with an MLP (mlp_mean) or a UNet (down_modules).")

    if _select(tensors, "actor.") and _select(tensors, "actor_ft.") and dppo_kwargs.get("ft_denoising_steps") is None:
        warnings.warn(
            "The checkpoint is fine-tuned, but ft_denoising_steps is not given: its fine-tuned denoiser now runs every step, "
            "also those that its frozen one ran. Pass the ft_denoising_steps that it was fine-tuned with.",
            stacklevel=2,
        )
    inferred, n_weights = _infer_unet(fine_tuned) if is_unet else _infer_mlp(fine_tuned)
    n_weights += _infer_critic(critic, inferred)
    check_sizes(n_weights, inferred["net_arch"], tensors)
    rename = _rename_unet if is_unet else _rename_denoiser
    model = make_pretrained_model(
        "DiffusionUnetPolicy" if is_unet else "DiffusionMlpPolicy",
        env_or_spaces,
        merged_policy_kwargs(inferred, policy_kwargs),
        dppo_kwargs,
        rename(fine_tuned),
        rename(base),
        _rename_mlp(critic),
    )
    if normalization is not None:
        _set_normalization(model, Path(normalization), has_critic=bool(critic))
    return model


def _read_tensors(checkpoint: str | Path | Mapping[str, Any]) -> Tensors:
    """Tensors under the reference's names."""
    if isinstance(checkpoint, (str, Path)):
        if not Path(checkpoint).is_file():
            raise ValueError(f"checkpoint={str(checkpoint)!r} does not exist.")
        _check_archive(Path(checkpoint))
        try:
            checkpoint = th.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # th.load raises almost anything for what it did not write.
            raise ValueError(f"checkpoint can't be read as a PyTorch file of tensors: {error}") from error
    for key in ("ema", "model"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, Mapping) or not all(isinstance(name, str) for name in checkpoint):
        raise ValueError(f"checkpoint holds a {type(checkpoint).__name__}, not tensors under names.")
    tensors = {name: th.as_tensor(value) for name, value in checkpoint.items() if isinstance(value, (th.Tensor, np.ndarray))}
    for name, value in tensors.items():
        dense = value.device.type != "meta" and value.layout == th.strided and not value.is_quantized
        if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"checkpoint: the tensor {name!r} is none of plain numbers.")
    return tensors


def _check_archive(path: Path) -> None:
    """
    :param path: Path of a checkpoint.
    :raises ValueError: if it is not as PyTorch has written files since 1.6: a zip without compression, so that what it holds
        is no larger than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # zipfile raises almost anything for what is no zip.
        raise ValueError(f"checkpoint can't be read as a PyTorch file of tensors: {error}") from error
    if size > path.stat().st_size:
        raise ValueError("checkpoint can't be read as a PyTorch file of tensors: it holds more than its size allows.")


def _count_matrices(widths: Sequence[int]) -> int:
    """Weights between layers of these widths."""
    return sum(rows * columns for rows, columns in pairwise(widths))


def _select(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _infer_mlp(denoiser: Tensors) -> tuple[dict[str, Any], int]:
    """The ``policy_kwargs`` that the tensors of an MLP denoiser tell, and at least how many weights it has."""
    mlp = _select(denoiser, "mlp_mean.")
    inferred: dict[str, Any] = dict(
        net_arch=dict(pi=_widths(mlp)[:-1]), residual=_is_residual(mlp), layer_norm=_has_layer_norm(mlp)
    )
    time_dim = 1
    if "time_embedding.3.bias" in denoiser:
        time_dim = inferred["time_dim"] = denoiser["time_embedding.3.bias"].numel()
    n_encoder_weights = _infer_encoder(denoiser, inferred)
    return inferred, _count_matrices([time_dim, 2 * time_dim, time_dim, *inferred["net_arch"]["pi"]]) + n_encoder_weights


def _infer_unet(denoiser: Tensors) -> tuple[dict[str, Any], int]:
    """The same of a UNet denoiser."""
    inferred, n_weights = infer_film_unet(rename_film_unet(denoiser))
    return inferred, n_weights + _infer_encoder(denoiser, inferred)


def _infer_encoder(denoiser: Tensors, inferred: dict[str, Any]) -> int:
    """Note the widths of the observation's encoder, if there is one, and return at least how many weights it has."""
    encoder = _select(denoiser, "cond_mlp.")
    if not encoder:
        return 0
    inferred["obs_encoder_arch"] = _widths(encoder)
    return _count_matrices(inferred["obs_encoder_arch"])


def _infer_critic(critic: Tensors, inferred: dict[str, Any]) -> int:
    """Note what the critic's tensors tell, if there are any, and return at least how many weights it has."""
    if not critic:
        return 0
    inferred["net_arch"]["vf"] = _widths(critic)[:-1]
    inferred["critic_residual"] = _is_residual(critic)
    inferred["critic_layer_norm"] = _has_layer_norm(critic)
    return _count_matrices(inferred["net_arch"]["vf"])


def _is_residual(mlp: Tensors) -> bool:
    return any(name.startswith("layers.") for name in mlp)


def _has_layer_norm(mlp: Tensors) -> bool:
    return any("norm" in name for name in mlp)


def _widths(mlp: Tensors) -> list[int]:
    """Widths of its layers, the output's last."""
    return [len(value) for name, value in mlp.items() if name.endswith("weight") and value.dim() == 2]


def _rename_mlp(mlp: Tensors) -> Tensors:
    """The same under the names of :func:`~sb3_dppo.diffusion.denoisers.make_mlp`."""
    if _is_residual(mlp):
        return {re.sub(r"\.l(\d)\.", r".linear\1.", name.removeprefix("layers.")): value for name, value in mlp.items()}
    stride = 3 if _has_layer_norm(mlp) else 2  # Linear, LayerNorm and activation are numbered.
    renamed = {}
    for name, value in mlp.items():
        match = re.fullmatch(r"moduleList\.(\d+)\.(linear|norm)_1\.(weight|bias)", name)
        if match is None:
            raise ValueError(f"checkpoint has a tensor {name!r} that no MLP of the reference has.")
        renamed[f"{stride * int(match[1]) + (match[2] == 'norm')}.{match[3]}"] = value
    return renamed


def _rename_denoiser(denoiser: Tensors) -> Tensors:
    """The same under the names of :class:`~sb3_dppo.diffusion.denoisers.MlpDenoiser`."""
    renamed = {f"mlp.{name}": value for name, value in _rename_mlp(_select(denoiser, "mlp_mean.")).items()}
    renamed |= {f"obs_encoder.{name}": value for name, value in _rename_mlp(_select(denoiser, "cond_mlp.")).items()}
    # Index 0 of the reference's time embedding has no weights: the sinusoids.
    for index in (1, 3):
        for kind in ("weight", "bias"):
            name = f"time_embedding.{index}.{kind}"
            if name not in denoiser:
                raise ValueError(f"checkpoint lacks the tensor {name!r}.")
            renamed[f"time_mlp.{index - 1}.{kind}"] = denoiser[name]
    return renamed


def _rename_unet(denoiser: Tensors) -> Tensors:
    """The same under the names of :class:`~sb3_dppo.diffusion.film_unet.FilmUnetDenoiser`."""
    encoder = {f"obs_encoder.{name}": value for name, value in _rename_mlp(_select(denoiser, "cond_mlp.")).items()}
    unet = {name: value for name, value in denoiser.items() if not name.startswith("cond_mlp.")}
    return rename_film_unet(unet) | encoder


def _set_normalization(model: DPPO, path: Path, has_critic: bool) -> None:
    """
    :param model: The model.
    :param path: The reference's file of ranges.
    :param has_critic: Whether the critic was imported too.
    """
    # Here and not above, so that the package can be imported without it (see sb3_dppo/__init__.py).
    from sb3_dppo.demonstrations.npz import read_ranges

    try:
        ranges = read_ranges(path)
    except ValueError as error:
        raise ValueError(f"normalization={str(path)!r}: {error}") from error
    policy, frame = model.policy, len(ranges["obs_min"])
    width = int(np.prod(model.observation_space.shape))  # type: ignore[arg-type]
    if frame == 0 or width % frame != 0 or len(ranges["action_min"]) != policy.action_dim:
        raise ValueError(f"normalization={str(path)!r} is of {frame} observations and {len(ranges['action_min'])} actions.")
    obs_min, obs_max = (np.tile(ranges[name], width // frame) for name in ("obs_min", "obs_max"))
    shape = model.observation_space.shape
    policy.normalizer.set_ranges(
        obs_min.reshape(shape),
        obs_max.reshape(shape),
        ranges["action_min"],
        ranges["action_max"],  # type: ignore[arg-type]
    )
    # The reference maps a dimension without range to -1 and not to 0: what follows from that goes into the biases of layers
    # that see it.
    constant = th.as_tensor(obs_min == obs_max, device=model.device)
    layers = [pair for denoiser in (policy.denoiser, policy.base_denoiser) for pair in _layers_of_observations(denoiser)]
    if has_critic:
        layers.append((nn.Identity(), policy.critic[0]))  # type: ignore[index]
    with th.no_grad():
        for activation, layer in layers:
            difference = activation(th.tensor(-1.0)) - activation(th.tensor(0.0))
            layer.bias += difference * layer.weight[:, -width:][:, constant].sum(dim=1)


def _layers_of_observations(denoiser: Any) -> list[tuple[Any, Any]]:
    """The linear layers whose last inputs are the observation, after an activation."""
    if isinstance(denoiser.obs_encoder, nn.Sequential):
        return [(nn.Identity(), denoiser.obs_encoder[0])]
    if isinstance(denoiser, FilmUnetDenoiser):
        encoders = [module.encoder for module in denoiser.modules() if isinstance(module, FilmBlock)]
        return [(nn.Identity(), e[0]) if isinstance(e[0], nn.Linear) else (e[0], e[1]) for e in encoders]
    return [(nn.Identity(), denoiser.mlp[0])]
