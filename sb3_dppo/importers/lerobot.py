"""Import of LeRobot's Diffusion policies as models of this package."""

import json
import math
from pathlib import Path
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import GymEnv

from sb3_dppo.dppo import DPPO
from sb3_dppo.importers.core import Tensors, check_sizes, make_pretrained_model, merged_policy_kwargs
from sb3_dppo.importers.film_unet import infer_film_unet, rename_film_unet
from sb3_dppo.normalization import Normalizer

UNET = "diffusion.unet."
# In the order in which LeRobot's policy sees them.
STATES = {"observation.state": "STATE", "observation.environment_state": "ENV"}
# What a configuration that does not say it means.
DEFAULTS: dict[str, Any] = dict(
    n_obs_steps=2,
    horizon=16,
    n_action_steps=8,
    n_groups=8,
    noise_scheduler_type="DDPM",
    num_train_timesteps=100,
    num_inference_steps=None,
    beta_schedule="squaredcos_cap_v2",
    beta_start=0.0001,
    beta_end=0.02,
    prediction_type="epsilon",
    clip_sample=True,
    clip_sample_range=1.0,
)
# LeRobot divides by standard deviations plus this.
EPS = 1e-8


def import_lerobot_policy(
    folder: str | Path,
    env_or_spaces: GymEnv | str | tuple[spaces.Space, spaces.Space],
    *,
    policy_kwargs: dict[str, Any] | None = None,
    **dppo_kwargs: Any,
) -> DPPO:
    """
    Make a model from a Diffusion policy of LeRobot whose observations are vectors (``observation.state`` and
    ``observation.environment_state``). Its chunks begin at the first of ``n_obs_steps`` observations. With DDPM it samples as
    LeRobot does; DDIM here computes the noise anew where the clean chunk was clamped, which LeRobot does not.

    :param folder: Folder with ``config.json``, ``model.safetensors`` and, of newer versions, the normalisation in
        ``policy_preprocessor…`` and ``policy_postprocessor…``.
    :param env_or_spaces: The env, or its observation space and action space. It observes the vectors of ``n_obs_steps`` steps
        side by side, oldest first, the environment's state after the robot's. LeRobot repeats the first observation of an
        episode, as ``FlattenObservation(FrameStackObservation(env, n_obs_steps, padding_type="reset"))`` of Gymnasium does;
        ``VecFrameStack`` puts zeros there.
    :param policy_kwargs: What the files don't tell: the critic's ``net_arch``. Otherwise the paper's for Gym tasks.
    :param dppo_kwargs: Arguments of :class:`~sb3_dppo.DPPO`. The sampler and ``act_steps`` are those of the configuration, and
        the floors of the std the paper's, 0.1, otherwise.
    :return: The model.
    :raises ValueError: if it is no such policy, has cameras, or does not fit the spaces.
    """
    folder = Path(folder)
    config = _read_config(folder)
    sizes = _sizes_of_states(config)
    tensors = _read_tensors(folder)
    unet = rename_film_unet({name.removeprefix(UNET): value for name, value in tensors.items() if name.startswith(UNET)})
    inferred, n_weights = infer_film_unet(unet)
    check_sizes(n_weights, inferred["net_arch"], tensors)
    inferred |= dict(
        horizon=config["horizon"],
        first_action=config["n_obs_steps"] - 1,
        denoising_steps=config["num_train_timesteps"],
        beta_schedule=config["beta_schedule"],
        prediction_type=config["prediction_type"],
        clip_sample_range=config["clip_sample_range"] if config["clip_sample"] else None,
    )
    inferred["net_kwargs"]["n_groups"] = config["n_groups"]
    sampler = dict(
        scheduler=config["noise_scheduler_type"].lower(),
        inference_steps=config["num_inference_steps"],
        act_steps=config["n_action_steps"],
    )
    merged = merged_policy_kwargs(inferred, policy_kwargs or {})
    n_obs_steps = config["n_obs_steps"]
    hint = (
        f"The policy observes {n_obs_steps} steps of {sizes}, {n_obs_steps * sum(sizes.values())} numbers: wrap env in "
        f"FlattenObservation(FrameStackObservation(env, {n_obs_steps}, padding_type='reset')). "
    )
    model = make_pretrained_model(
        "DiffusionUnetPolicy", env_or_spaces, merged, sampler | dppo_kwargs, unet, unet, critic={}, hint=hint
    )
    _set_normalization(model.policy.normalizer, config, tensors, sizes)
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration with LeRobot's defaults."""
    path = folder / "config.json"
    try:
        read = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"folder={str(folder)!r} has no config.json that can be read: {error}") from error
    kind = read.get("type", "diffusion") if isinstance(read, dict) else type(read).__name__
    if kind != "diffusion":
        raise ValueError(f"folder={str(folder)!r} is of a policy of the type {kind!r}: only 'diffusion' can be imported.")
    config = DEFAULTS | {name: read[name] for name in read if name in DEFAULTS} | {"read": read}
    for name in ("n_obs_steps", "horizon", "n_action_steps", "n_groups", "num_train_timesteps"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"config.json: {name}={config[name]!r} must be a positive whole number.")
    for name in ("beta_start", "beta_end"):
        # With them, diffusers' linear schedules are others than ours.
        if config["beta_schedule"] != "squaredcos_cap_v2" and config[name] != DEFAULTS[name]:
            raise ValueError(f"config.json: {name}={config[name]!r} is not diffusers' default, {DEFAULTS[name]}.")
    return config


def _mapping(read: dict[str, Any], name: str) -> dict[str, Any]:
    """What the configuration says about this, nothing if it is silent."""
    value = read.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"config.json: {name} is {value!r}, and not a mapping.")
    return value


def _sizes_of_states(config: dict[str, Any]) -> dict[str, int]:
    """The sizes of the vectors that the policy observes."""
    read = config["read"]
    features = _mapping(read, "input_features")
    shapes = _mapping(read, "input_shapes") or {name: _mapping(features, name).get("shape") for name in features}
    cameras = sorted(set(shapes) - set(STATES))
    if cameras:
        raise ValueError(f"The policy observes {', '.join(cameras)}: only policies without cameras can be imported.")
    if not shapes:
        raise ValueError("config.json names no input_features.")
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"config.json: the shape of {name} is {shape!r}, and not a list of positive whole numbers.")
    return {name: math.prod(shapes[name]) for name in STATES if name in shapes}


def _read_tensors(folder: Path) -> Tensors:
    """The weights, and the statistics of newer versions under their own names."""
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for path in [folder / "model.safetensors", *sorted(folder.glob("policy_*normalizer_processor.safetensors"))]:
        try:
            tensors |= load_file(path)
        except Exception as error:  # safetensors raises errors of its own for what it did not write.
            raise ValueError(f"{path} can't be read as a file of tensors: {error}") from error
    return tensors


def _mode(read: dict[str, Any], name: str) -> str:
    """How a feature is normalised: "MIN_MAX", "MEAN_STD" or "IDENTITY"."""
    if read.get("normalization_mapping") is not None:
        by_type = _mapping(read, "normalization_mapping")
        return str(by_type.get({**STATES, "action": "ACTION"}[name], "IDENTITY")).rpartition(".")[2]
    modes = _mapping(read, "input_normalization_modes") | _mapping(read, "output_normalization_modes")
    return str(modes.get(name, "identity")).upper()


def _statistics(config: dict[str, Any], tensors: Tensors, name: str, size: int) -> tuple[str, th.Tensor, th.Tensor]:
    """How a feature of this size is normalised, with its least and largest values, or its mean and std."""
    mode = _mode(config["read"], name)
    kinds = dict(MIN_MAX=("min", "max"), MEAN_STD=("mean", "std"), IDENTITY=()).get(mode)
    if kinds is None:
        raise ValueError(f"config.json: {name} is normalised by {mode}: only MIN_MAX, MEAN_STD and IDENTITY are known.")
    values = [th.zeros(size), th.ones(size)]
    for index, kind in enumerate(kinds):
        buffer = f"buffer_{name.replace('.', '_')}.{kind}"
        candidates = (f"{name}.{kind}", f"normalize_inputs.{buffer}", f"unnormalize_outputs.{buffer}")
        found = next((tensors[candidate] for candidate in candidates if candidate in tensors), None)
        if found is None or not found.isfinite().all():
            raise ValueError(f"The policy's files lack the {kind} of {name}, by which it is normalised.")
        if found.numel() != size:
            raise ValueError(f"The policy's files have the {kind} of {found.numel()} numbers for {name}, which has {size}.")
        values[index] = found.double().flatten()
    return mode, values[0], values[1]


def _set_normalization(normalizer: Normalizer, config: dict[str, Any], tensors: Tensors, sizes: dict[str, int]) -> None:
    """Normalise as LeRobot does."""
    centers, scales = [], []
    for name, size in sizes.items():
        mode, first, second = _statistics(config, tensors, name, size)
        if mode == "MIN_MAX":
            # A number without range is mapped to -1.
            center, scale = th.where(second > first, (first + second) / 2, first + 1), 2 / (second - first)
            scale = th.where(second > first, scale, 1.0)
        else:
            center, scale = first, 1 / (second + (EPS if mode == "MEAN_STD" else 0.0))
        centers.append(center)
        scales.append(scale)
    n, shape = config["n_obs_steps"], normalizer.obs_center.shape
    mode, first, second = _statistics(config, tensors, "action", normalizer.action_center.numel())
    actions = ((first + second) / 2, ((second - first) / 2).clamp(min=EPS)) if mode == "MIN_MAX" else (first, second)
    normalizer.set_affine(th.cat(centers).repeat(n).view(shape), th.cat(scales).repeat(n).view(shape), *actions)
