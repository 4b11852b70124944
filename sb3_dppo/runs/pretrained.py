"""Saved models to start from."""

import warnings
from typing import Any

import torch as th
from stable_baselines3.common.save_util import load_from_zip_file


def read_pretrained(model: Any, path: str) -> dict[str, th.Tensor]:
    """The state dict of a saved model's policy, whose architecture a new model, not set up yet, takes over."""
    try:
        data, params, _ = load_from_zip_file(path, device=model.device)
    except FileNotFoundError:
        raise FileNotFoundError(f"pretrained={path!r}: there is no such file.") from None
    if not data or "ft_denoising_steps" not in data:
        raise ValueError(f"pretrained={path!r} is not a saved DPPO model.")
    if data["policy_class"].__name__ != model.policy_class.__name__:
        raise ValueError(
            f"pretrained={path!r} holds a {data['policy_class'].__name__}, not a {model.policy_class.__name__}: "
            f"pass policy={data['policy_class'].__name__!r}."
        )
    for name in ("observation_space", "action_space"):
        if data[name] != getattr(model, name):
            raise ValueError(f"pretrained={path!r} was made for the {name} {data[name]}, not for {getattr(model, name)}.")
    for name, value in model.policy_kwargs.items():
        if name not in data["policy_kwargs"] or data["policy_kwargs"][name] != value:
            warnings.warn(
                f"policy_kwargs[{name!r}]={value} is ignored: the architecture is that of pretrained={path!r}.", stacklevel=3
            )
    weights: Any = params["policy"]
    if model.normalize_observations is None and data["n_rollouts"] > 0 and weights["normalizer.obs_count"] == 0:
        model.normalize_observations = False  # It has learned from observations as they are.
    model.policy_kwargs = data["policy_kwargs"]
    model.pretrained_on_demonstrations = data.get("pretrained_on_demonstrations", False)
    return weights
