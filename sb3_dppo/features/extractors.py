"""Features extractors for images."""

from typing import TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from torch import nn
from torch.nn import functional as F

from sb3_dppo.features.observations import parts_of_space

Observations = TypeVar("Observations", th.Tensor, dict[str, th.Tensor])


class VitExtractor(BaseFeaturesExtractor):
    """
    The paper's pixel encoder: a small vision transformer, whose patches are weighted by learned weights that see the
    proprioception (Ren et al. 2024, appendix D; Hu et al. 2023 for the encoder).

    For an image, or a ``Dict`` of images and vectors, which are the proprioception and are appended to the features.

    Any features extractor may have a method ``augment``, like this one: it is called in training, once for each part of a
    minibatch that goes through the actor's or the critic's. With ``kl_coef``, the base policy sees what the actor sees.

    :param observation_space: Observation space, with channels first.
    :param patch_size: Side of a patch in pixels; it must divide the images' sides.
    :param depth: Transformer layers.
    :param width: Size of a patch's embedding.
    :param n_heads: Attention heads.
    :param spatial_dim: Features of an image.
    :param random_shift: In :meth:`augment`, shift images at random by up to this many pixels in each direction, with their
        border repeated; 0 for none. The paper uses 4.
    :param normalized_image: Whether images are already divided by 255, and so are float; see SB3's ``NatureCNN``.
    :raises ValueError: if there is no image, or if its sides are no multiples of ``patch_size``.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        patch_size: int = 8,
        depth: int = 1,
        width: int = 128,
        n_heads: int = 4,
        spatial_dim: int = 128,
        random_shift: int = 0,
        normalized_image: bool = False,
    ) -> None:
        parts = parts_of_space(observation_space)
        images = {
            key: space
            for key, space in parts.items()
            if is_image_space(space, check_channels=False, normalized_image=normalized_image)
        }
        if not images:
            raise ValueError(
                f"VitExtractor: the observation space {observation_space} holds no image (uint8, 0 to 255; or float, with "
                "normalize_images=False and features_extractor_kwargs=dict(normalized_image=True))."
            )
        self.vector_keys = [key for key in parts if key not in images]
        n_vector = sum(spaces.utils.flatdim(parts[key]) for key in self.vector_keys)
        super().__init__(observation_space, features_dim=spatial_dim * len(images) + n_vector)
        self.random_shift = random_shift
        self.encoders = nn.ModuleDict()
        self.image_keys = list(images)
        for index, (key, space) in enumerate(images.items()):
            assert space.shape is not None
            if any(side % patch_size for side in space.shape[1:]):
                raise ValueError(
                    f"VitExtractor: image {key!r} of shape {space.shape} (channels first) can't be cut into patches of "
                    f"patch_size={patch_size}: resize it, for instance with gymnasium.wrappers.ResizeObservation."
                )
            # Keys may hold characters that names of modules can't.
            self.encoders[str(index)] = _ImageEncoder(space.shape, n_vector, patch_size, depth, width, n_heads, spatial_dim)

    def augment(self, observations: Observations) -> Observations:
        """
        Change observations at random, in a way that should not change what the policy does.

        :param observations: Preprocessed observations, images in [0, 1], shape (B, C, H, W).
        :return: The same with each image shifted by pixels of its own, if there is a ``random_shift``.
        """
        if self.random_shift == 0:
            return observations
        if not isinstance(observations, dict):
            return shift_at_random(observations, self.random_shift)
        return observations | {key: shift_at_random(observations[key], self.random_shift) for key in self.image_keys}

    def forward(self, observations: th.Tensor | dict[str, th.Tensor]) -> th.Tensor:
        """
        :param observations: Preprocessed observations, images in [0, 1], shape (B, C, H, W).
        :return: Features, shape (B, features_dim).
        """
        parts = observations if isinstance(observations, dict) else {"": observations}
        first = parts[self.image_keys[0]]
        vectors = th.cat([first.new_empty(first.shape[0], 0), *(parts[key].flatten(1) for key in self.vector_keys)], dim=1)
        features = [self.encoders[str(index)](parts[key], vectors) for index, key in enumerate(self.image_keys)]
        return th.cat([*features, vectors], dim=1)


class _ImageEncoder(nn.Module):
    """
    :param shape: Shape of the image, channels first.
    :param n_vector: Size of the proprioception.
    :param patch_size: See :class:`VitExtractor`, also for the others.
    """

    def __init__(
        self, shape: tuple[int, ...], n_vector: int, patch_size: int, depth: int, width: int, n_heads: int, spatial_dim: int
    ) -> None:
        super().__init__()
        n_patches = (shape[1] // patch_size) * (shape[2] // patch_size)
        self.patches = nn.Conv2d(shape[0], width, patch_size, stride=patch_size)
        self.position = nn.Parameter(0.02 * th.randn(1, n_patches, width))
        layer = nn.TransformerEncoderLayer(
            width, n_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        # One row per feature of the patches: where in the image that feature is looked for depends on the proprioception.
        self.spatial = nn.Sequential(nn.Linear(n_patches + n_vector, spatial_dim), nn.LayerNorm(spatial_dim), nn.ReLU())
        self.weight = nn.Parameter(th.randn(width, spatial_dim) / width**0.5)

    def forward(self, image: th.Tensor, vectors: th.Tensor) -> th.Tensor:
        """
        :param image: Shape (B, C, H, W).
        :param vectors: Shape (B, n_vector).
        :return: Shape (B, spatial_dim).
        """
        embedded = self.transformer(self.patches(image).flatten(2).transpose(1, 2) + self.position)
        by_feature = th.cat([embedded.transpose(1, 2), vectors[:, None].expand(-1, embedded.shape[2], -1)], dim=2)
        return (self.spatial(by_feature) * self.weight).sum(dim=1)


def shift_at_random(images: th.Tensor, pad: int) -> th.Tensor:
    """
    Random-shift augmentation (Kostrikov et al. 2021, section 3).

    :param images: Images, shape (B, C, H, W), float.
    :param pad: Largest shift in pixels, with the border repeated.
    :return: Each image shifted by whole pixels of its own, of the same shape.
    """
    n, _, height, width = images.shape
    padded = F.pad(images, (pad,) * 4, mode="replicate")
    offsets = th.randint(2 * pad + 1, (2, n, 1), device=images.device)
    rows = offsets[0] + th.arange(height, device=images.device)
    columns = offsets[1] + th.arange(width, device=images.device)
    index = th.arange(n, device=images.device)[:, None, None]
    # Indices around the channel dimension come first: (B, H, W, C).
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# What can be named where a class can't be written, as in YAML.
EXTRACTORS = {cls.__name__: cls for cls in (FlattenExtractor, NatureCNN, CombinedExtractor, VitExtractor)}
