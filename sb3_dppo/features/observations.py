"""Observations of envs: one tensor (or array), or a dictionary of them, and what a policy's features extractor takes."""

from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN

Obs = TypeVar("Obs")


def batch_size_of(obs: Any) -> int:
    """B."""
    return (next(iter(obs.values())) if isinstance(obs, dict) else obs).shape[0]


def parts_of(obs: Any) -> list[Any]:
    """The tensors or arrays, by sorted key."""
    return [obs[key] for key in sorted(obs)] if isinstance(obs, dict) else [obs]


def parts_of_space(observation_space: spaces.Space) -> dict[str, spaces.Space]:
    """The spaces by key, under the empty key if there is no ``Dict``."""
    return dict(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else {"": observation_space}


def part_name(key: str) -> str:
    """What messages call it."""
    return f"observations[{key!r}]" if key else "observations"


def take(obs: Obs, index: Any) -> Obs:
    """These rows."""
    return {key: value[index] for key, value in obs.items()} if isinstance(obs, dict) else obs[index]  # type: ignore[return-value, index]


def to_tensors(obs: Any, device: th.device) -> Any:
    """Arrays or tensors as tensors on the device, without a copy if they are there."""
    if isinstance(obs, dict):
        return {key: th.as_tensor(value, device=device) for key, value in obs.items()}
    return th.as_tensor(obs, device=device)


def to_arrays(obs: Any) -> Any:
    """Tensors as arrays of their own: a simulator may write its next observations into the memory of the last ones."""
    if isinstance(obs, dict):
        return {key: value.cpu().numpy().copy() for key, value in obs.items()}
    return obs.cpu().numpy().copy()


def stack(observations: list[Any]) -> Any:
    """One batch of them."""
    if isinstance(observations[0], dict):
        return {key: np.stack([obs[key] for obs in observations]) for key in observations[0]}
    return np.stack(observations)


def vector_keys(observation_space: spaces.Space, normalize_images: bool = True) -> dict[str, spaces.Box]:
    """The boxes that hold vectors and no images, under the empty key for a ``Box``: what can be normalised by ranges."""
    return {
        key: space
        for key, space in parts_of_space(observation_space).items()
        if isinstance(space, spaces.Box) and not is_image_space(space, normalized_image=not normalize_images)
    }


def check_observation_space(
    observation_space: spaces.Space, features_extractor_class: Any, normalize_images: bool = True
) -> None:
    """
    :param observation_space: Observation space of an env.
    :param features_extractor_class: The policy's features extractor. One of a user's own takes what SB3 can preprocess.
    :param normalize_images: Whether images are bytes, to be divided by 255; otherwise each ``Box`` of three dimensions is an
        image, which stays as it is.
    :raises ValueError: if the extractor can't take the space, saying what can be done.
    """
    env_has = f"env has the observation space {observation_space}"
    for key, space in parts_of_space(observation_space).items():
        part = f"{key!r}" if key else "it"
        if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise ValueError(
                f"{env_has}, but {part} is a {type(space).__name__}: wrap the env in gymnasium.wrappers.FlattenObservation, "
                "or make it a Dict of boxes and discrete spaces."
            )
        if np.any(getattr(space, "start", 0) != 0):
            raise ValueError(f"{env_has}, but {part} must start at 0: shift it in a wrapper, such as TransformObservation.")
        if isinstance(space, spaces.Box) and space.shape == ():
            raise ValueError(
                f"{env_has}, but {part} must have a dimension: make its shape (1,), for instance with "
                "gymnasium.wrappers.ReshapeObservation(env, (1,))."
            )
        # Of what SB3's NatureCNN can look at, also in a Dict.
        is_image = is_image_space(space, normalized_image=not normalize_images)
        sides = (space.shape or ())[1:]
        if features_extractor_class in (NatureCNN, CombinedExtractor) and is_image and min(sides) < 36:
            raise ValueError(
                f"{env_has}, but {part} must be at least 36 × 36 for SB3's NatureCNN: enlarge it (gymnasium.wrappers."
                "ResizeObservation), or use features_extractor_class='VitExtractor'."
            )
    is_dict = isinstance(observation_space, spaces.Dict)
    is_image = is_image_space(observation_space, normalized_image=not normalize_images)
    if features_extractor_class is FlattenExtractor:
        if is_dict:
            raise ValueError(
                f"{env_has}, but this policy takes a flat one: use DiffusionMultiInputPolicy, or wrap the env in "
                "gymnasium.wrappers.FlattenObservation."
            )
        if is_image_space(observation_space):
            raise ValueError(f"{env_has}, an image, but this policy is for vectors: use DiffusionCnnPolicy.")
    elif features_extractor_class is NatureCNN and not is_image:
        raise ValueError(
            f"{env_has}, but DiffusionCnnPolicy is for images (uint8, 0 to 255, at least 36 × 36; or float, channels first, "
            f"with normalize_images=False): use {'DiffusionMultiInputPolicy' if is_dict else 'DiffusionMlpPolicy'}."
        )
    elif features_extractor_class is CombinedExtractor and not is_dict:
        raise ValueError(
            f"{env_has}, but DiffusionMultiInputPolicy is for a Dict: use "
            f"{'DiffusionCnnPolicy' if is_image else 'DiffusionMlpPolicy'}."
        )
