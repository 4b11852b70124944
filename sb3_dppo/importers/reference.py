"""Import of checkpoints of the reference implementation (the code of Ren et al. 2024) as models of this package."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import GymEnv
from torch import nn

from sb3_dppo.dppo import DPPO
from sb3_dppo.policies import PAPER_POLICY_KWARGS

Tensors = dict[str, th.Tensor]


def import_reference_checkpoint(
    checkpoint: str | Path | Mapping[str, Any],
    env_or_spaces: GymEnv | str | tuple[spaces.Space, spaces.Space],
    *,
    policy_kwargs: dict[str, Any],
    normalization: str | Path | None = None,
    **dppo_kwargs: Any,
) -> DPPO:
    """
    Make a model from a checkpoint of the reference implementation, pre-trained or fine-tuned, with an MLP denoiser.

    Widths, residual or plain layers, LayerNorm and the observation encoder are read off the tensors.

    :param checkpoint: Path of the file, which is read without unpickling objects, or a mapping of tensors under its names:
        ``network.…`` of a pre-trained one (of ``model`` and ``ema`` the latter is taken), ``actor.…`` (frozen),
        ``actor_ft.…`` (fine-tuned) and ``critic.…`` of a fine-tuned one.
    :param env_or_spaces: The env, or its observation space and action space. Of an observation history, the space of
        all frames side by side, newest last, as ``VecFrameStack`` gives it.
    :param policy_kwargs: What tensors don't tell: ``denoising_steps``, ``horizon``, ``activation_fn``,
        ``critic_activation_fn``, ``prediction_type`` and the clamps. Otherwise the paper's for Gym tasks.
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
    if not any(name.startswith("mlp_mean.") for name in fine_tuned):
        kind = "a UNet's" if any("down_modules" in name for name in fine_tuned) else "not one of a diffusion MLP"
        raise ValueError(f"checkpoint is {kind}: only checkpoints with an MLP denoiser (mlp_mean) can be imported.")

    if _select(tensors, "actor.") and _select(tensors, "actor_ft.") and dppo_kwargs.get("ft_denoising_steps") is None:
        warnings.warn(
            "The checkpoint is fine-tuned, but ft_denoising_steps is not given: its fine-tuned denoiser now runs every step, "
            "also those that its frozen one ran. Pass the ft_denoising_steps that it was fine-tuned with.",
            stacklevel=2,
        )
    inferred = _infer_architecture(fine_tuned, critic)
    _check_sizes(inferred, tensors)
    given_net_arch = dict(policy_kwargs.get("net_arch") or {})
    for part, widths in inferred["net_arch"].items():
        if part in given_net_arch and list(given_net_arch[part]) != widths:
            raise ValueError(f"policy_kwargs['net_arch'][{part!r}] contradicts the checkpoint, which has {widths}.")
    inferred["net_arch"] = {**PAPER_POLICY_KWARGS["net_arch"], **given_net_arch, **inferred["net_arch"]}
    for name, value in inferred.items():
        if name != "net_arch" and name in policy_kwargs and policy_kwargs[name] != value:
            raise ValueError(f"policy_kwargs[{name!r}]={policy_kwargs[name]} contradicts the checkpoint, which has {value}.")
    policy_kwargs = {**PAPER_POLICY_KWARGS, **policy_kwargs, **inferred}
    model = _make_model(env_or_spaces, policy_kwargs, dict(min_sampling_std=0.1, min_logprob_std=0.1) | dppo_kwargs)
    model.pretrained_on_demonstrations = True
    policy = model.policy
    try:
        policy.denoiser.load_state_dict(_rename_denoiser(fine_tuned))
        policy.base_denoiser.load_state_dict(_rename_denoiser(base))
        if critic:
            policy.critic.load_state_dict(_rename_mlp(critic))
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint does not fit the spaces {model.observation_space} and {model.action_space} or "
            f"policy_kwargs={policy_kwargs} (the horizon): {error}"
        ) from error
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


def _check_sizes(inferred: dict[str, Any], tensors: Tensors) -> None:
    """
    Widths are read off the rows of matrices: a small file could ask for a huge model, whose matrices it does not hold.

    :param inferred: What was read off the tensors.
    :param tensors: All tensors of the checkpoint.
    :raises ValueError: if they can't be the weights of such a model.
    """
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
    time_dim = inferred.get("time_dim", 1)
    networks = [
        (time_dim, 2 * time_dim, time_dim, *inferred["net_arch"]["pi"]),
        inferred.get("obs_encoder_arch", []),
        inferred["net_arch"].get("vf", []),
    ]
    if sum(rows * columns for widths in networks for rows, columns in pairwise(widths)) > sum(storages.values()):
        raise ValueError(f"checkpoint does not hold the matrices between its layers of {inferred['net_arch']}.")


def _select(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _infer_architecture(denoiser: Tensors, critic: Tensors) -> dict[str, Any]:
    """The ``policy_kwargs`` that tensors tell."""
    mlp = _select(denoiser, "mlp_mean.")
    encoder = _select(denoiser, "cond_mlp.")
    inferred: dict[str, Any] = dict(
        net_arch=dict(pi=_widths(mlp)[:-1]), residual=_is_residual(mlp), layer_norm=_has_layer_norm(mlp)
    )
    if "time_embedding.3.bias" in denoiser:
        inferred["time_dim"] = denoiser["time_embedding.3.bias"].numel()
    if encoder:
        inferred["obs_encoder_arch"] = _widths(encoder)
    if critic:
        inferred["net_arch"]["vf"] = _widths(critic)[:-1]
        inferred["critic_residual"] = _is_residual(critic)
        inferred["critic_layer_norm"] = _has_layer_norm(critic)
    return inferred


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


def _make_model(env_or_spaces: Any, policy_kwargs: dict[str, Any], dppo_kwargs: dict[str, Any]) -> DPPO:
    if not isinstance(env_or_spaces, tuple):
        return DPPO("DiffusionMlpPolicy", env_or_spaces, policy_kwargs=policy_kwargs, **dppo_kwargs)
    model = DPPO(
        "DiffusionMlpPolicy",
        None,  # type: ignore[arg-type]
        policy_kwargs=policy_kwargs,
        _init_setup_model=False,
        **dppo_kwargs,
    )
    model.observation_space, model.action_space = env_or_spaces
    model.n_envs = 1
    model._setup_model()
    return model


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
    # The reference maps a dimension without range to -1 and not to 0: what follows from that goes into the first layer's bias.
    constant = th.as_tensor(obs_min == obs_max, device=model.device)
    first_layers: list[Any] = [
        denoiser.obs_encoder[0] if isinstance(denoiser.obs_encoder, nn.Sequential) else denoiser.mlp[0]  # type: ignore[index]
        for denoiser in (policy.denoiser, policy.base_denoiser)
    ]
    if has_critic:
        first_layers.append(policy.critic[0])  # type: ignore[index]
    with th.no_grad():
        for layer in first_layers:
            layer.bias -= layer.weight[:, -width:][:, constant].sum(dim=1)
