"""The conditional one-dimensional UNet of Diffusion Policy (Chi et al. 2023), whose weights others have trained."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch as th
from torch import nn

from sb3_dppo.diffusion.denoisers import SinusoidalDenoiser, check_unet, make_mlp


class ConvBlock(nn.Sequential):
    """
    A convolution along the chunk, group normalisation and an activation.

    :param n_in: Channels in.
    :param n_out: Channels out.
    :param kernel_size: Size of the convolution's kernel, odd.
    :param n_groups: Groups of channels that are normalised together.
    :param norm_eps: What is added to variances in normalisation.
    :param activation_fn: Activation.
    """

    def __init__(
        self, n_in: int, n_out: int, kernel_size: int, n_groups: int, norm_eps: float, activation_fn: type[nn.Module]
    ) -> None:
        convolution = nn.Conv1d(n_in, n_out, kernel_size, padding=kernel_size // 2)
        super().__init__(convolution, nn.GroupNorm(n_groups, n_out, eps=norm_eps), activation_fn())


class FilmBlock(nn.Module):
    """
    Two convolutions around a skip connection; between them, the condition scales and shifts the channels, or only shifts them.

    :param n_in: Channels in.
    :param n_out: Channels out.
    :param condition_dim: Size of the condition.
    :param scale: Whether it also scales.
    :param encoder_layers: Linear layers of the condition's encoder: 1, after an activation, or 3, with activations between.
    :param block: ``kernel_size``, ``n_groups``, ``norm_eps`` and ``activation_fn`` of :class:`ConvBlock`.
    """

    def __init__(self, n_in: int, n_out: int, condition_dim: int, scale: bool, encoder_layers: int, **block: Any) -> None:
        super().__init__()
        self.scale = scale
        self.conv1, self.conv2 = ConvBlock(n_in, n_out, **block), ConvBlock(n_out, n_out, **block)
        size, activation_fn = n_out * (2 if scale else 1), block["activation_fn"]
        self.encoder = (
            nn.Sequential(activation_fn(), nn.Linear(condition_dim, size))
            if encoder_layers == 1
            else make_mlp(condition_dim, size, [size, size], activation_fn)
        )
        self.skip = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """
        :param x: Shape (B, n_in, T).
        :param condition: Shape (B, condition_dim).
        :return: Shape (B, n_out, T).
        """
        hidden, modulation = self.conv1(x), self.encoder(condition)[..., None]
        if self.scale:
            scale, shift = modulation.chunk(2, dim=1)
            hidden = th.addcmul(shift, scale, hidden)
        else:
            hidden = hidden + modulation
        return self.conv2(hidden) + self.skip(x)


class FilmBlocks(nn.Sequential):
    """Blocks one after the other, all with the same condition."""

    def forward(self, x: th.Tensor, condition: th.Tensor) -> th.Tensor:  # type: ignore[override]
        """Arguments and result as of :meth:`FilmBlock.forward`."""
        for block in self:
            x = block(x, condition)
        return x


class FilmUnetDenoiser(SinusoidalDenoiser):
    """
    A UNet along the chunk, each of whose residual blocks is modulated by the time embedding and the observation features.

    :param action_dim: Da, its channels in and out.
    :param horizon: Tp, the length that it works on.
    :param features_dim: Size of the observation features.
    :param denoising_steps: K, the number of timesteps to embed.
    :param net_arch: Channels of each level; the chunk is halved between levels.
    :param time_dim: Size of the time embedding, even.
    :param activation_fn: Activation.
    :param obs_encoder_arch: Widths of a residual encoder of the features, the last one its output size; ``None``: no encoder.
    :param kernel_size: Size of the convolutions' kernels, odd.
    :param n_groups: Groups of channels that are normalised together.
    :param film_scale: Whether the condition scales channels, or only shifts them.
    :param condition_layers: Linear layers from the condition to each block: 1 or 3.
    :param norm_eps: What is added to variances in normalisation.
    :raises ValueError: for a horizon that can't be halved that often, or channels that can't be grouped.
    """

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        features_dim: int,
        denoising_steps: int,
        net_arch: Sequence[int],
        time_dim: int = 16,
        activation_fn: type[nn.Module] = nn.Mish,
        obs_encoder_arch: Sequence[int] | None = None,
        kernel_size: int = 5,
        n_groups: int = 8,
        film_scale: bool = True,
        condition_layers: int = 1,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(denoising_steps, time_dim, 4 * time_dim)
        check_unet(horizon, net_arch, n_groups)
        for name, value, fits, rule in (
            ("kernel_size", kernel_size, kernel_size % 2 == 1, "odd, so that convolutions keep the chunk's length"),
            ("condition_layers", condition_layers, condition_layers in (1, 3), "1 or 3"),
        ):
            if not fits:
                raise ValueError(f"{name}={value} must be {rule}.")
        self.obs_encoder = nn.Identity()
        if obs_encoder_arch:
            arch = list(obs_encoder_arch)
            if len(arch) % 2 != 0 or len(set(arch[:-1])) != 1:
                raise ValueError(
                    f"obs_encoder_arch={arch} must be an odd number of equal widths, then the last: as [256, 32]."
                )
            self.obs_encoder = make_mlp(features_dim, arch[-1], arch[:-1], activation_fn, residual=True)
            features_dim = arch[-1]

        settings: Any = dict(kernel_size=kernel_size, n_groups=n_groups, norm_eps=norm_eps, activation_fn=activation_fn)
        condition_dim = time_dim + features_dim

        def make_block(n_in: int, n_out: int) -> FilmBlock:
            return FilmBlock(n_in, n_out, condition_dim, film_scale, condition_layers, **settings)

        levels = list(pairwise([action_dim, *net_arch]))
        # Each level up sees what the one down made of the same length.
        upwards = levels[:0:-1]
        self.down = nn.ModuleList(FilmBlocks(make_block(n_in, n), make_block(n, n)) for n_in, n in levels)
        self.downsample = nn.ModuleList(nn.Conv1d(n, n, 3, stride=2, padding=1) for n in net_arch[:-1])
        self.middle = FilmBlocks(*(make_block(net_arch[-1], net_arch[-1]) for _ in range(2)))
        self.up = nn.ModuleList(FilmBlocks(make_block(2 * n, n_in), make_block(n_in, n_in)) for n_in, n in upwards)
        self.upsample = nn.ModuleList(nn.ConvTranspose1d(n_in, n_in, 4, stride=2, padding=1) for n_in, _ in upwards)
        self.output = nn.Sequential(ConvBlock(net_arch[0], net_arch[0], **settings), nn.Conv1d(net_arch[0], action_dim, 1))

    def forward(self, sample: th.Tensor, time_embedding: th.Tensor, condition: th.Tensor) -> th.Tensor:
        condition = th.cat([time_embedding.expand(sample.shape[0], -1), condition], dim=1)
        x, skips = sample.transpose(1, 2), []
        for level, blocks in enumerate(self.down):
            x = blocks(x, condition)
            skips.append(x)
            if level < len(self.downsample):
                x = self.downsample[level](x)
        x = self.middle(x, condition)
        for blocks, upsample in zip(self.up, self.upsample, strict=True):
            x = upsample(blocks(th.cat([x, skips.pop()], dim=1), condition))
        return self.output(x).transpose(1, 2)
