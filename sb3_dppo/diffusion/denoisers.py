"""The networks that predict noise (or the clean chunk) from a noisy chunk, a timestep and observation features."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

# Those that YAML names, as RL Zoo does.
ACTIVATIONS: dict[str, type[nn.Module]] = dict(
    tanh=nn.Tanh, relu=nn.ReLU, elu=nn.ELU, leaky_relu=nn.LeakyReLU, silu=nn.SiLU, gelu=nn.GELU, mish=nn.Mish
)


def activation_class(name: str, value: Any) -> type[nn.Module]:
    """
    :param name: Name of the argument, for the error.
    :param value: A class of modules, or the name of one of ``ACTIVATIONS``.
    :return: The class.
    :raises ValueError: for anything else.
    """
    if isinstance(value, str) and value in ACTIVATIONS:
        return ACTIVATIONS[value]
    if isinstance(value, type) and issubclass(value, nn.Module):
        return value
    raise ValueError(f"{name}={value!r} is unknown: choose one of {list(ACTIVATIONS)}, or a class such as torch.nn.ReLU.")


class ResidualBlock(nn.Module):
    """
    Two pre-activation linear layers around a skip connection.

    :param width: Input and output size.
    :param activation_fn: Activation before each linear layer.
    :param layer_norm: Whether to normalise before each activation.
    """

    def __init__(self, width: int, activation_fn: type[nn.Module], layer_norm: bool) -> None:
        super().__init__()
        # 1e-6 and not PyTorch's 1e-5: what released checkpoints were trained with.
        self.norm1 = nn.LayerNorm(width, eps=1e-6) if layer_norm else nn.Identity()
        self.linear1 = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6) if layer_norm else nn.Identity()
        self.linear2 = nn.Linear(width, width)
        self.activation1 = activation_fn()
        self.activation2 = activation_fn()

    def branch(self) -> tuple[nn.Module, ...]:
        """The layers beside the skip connection, in order."""
        return (self.norm1, self.activation1, self.linear1, self.norm2, self.activation2, self.linear2)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return _residual(self.branch(), x)


def make_mlp(
    input_dim: int,
    output_dim: int,
    net_arch: Sequence[int],
    activation_fn: type[nn.Module],
    residual: bool | None = False,
    layer_norm: bool = False,
) -> nn.Sequential:
    """
    :param input_dim: Size of the input.
    :param output_dim: Size of the output.
    :param net_arch: Widths of the hidden layers.
    :param activation_fn: Activation of the hidden layers.
    :param residual: Use one linear layer followed by residual blocks of two, instead of plain layers. ``None``: if these are
        an odd number of equal widths, at least three.
    :param layer_norm: Whether to normalise the hidden layers.
    :return: The network, with a linear last layer.
    :raises ValueError: for a residual network of an even number of layers or of different widths.
    """
    layers: list[nn.Module] = []
    last = input_dim
    can_be_residual = len(net_arch) % 2 == 1 and len(set(net_arch)) == 1
    if residual or (residual is None and can_be_residual and len(net_arch) > 1):
        if not can_be_residual:
            raise ValueError(
                f"net_arch={list(net_arch)}: with residual=True it must be an odd number of equal widths, one layer and then "
                "blocks of two, such as [256, 256, 256]; or set residual=False."
            )
        last = net_arch[0]
        layers.append(nn.Linear(input_dim, last))
        layers.extend(ResidualBlock(last, activation_fn, layer_norm) for _ in range(len(net_arch) // 2))
    else:
        for width in net_arch:
            layers.append(nn.Linear(last, width))
            if layer_norm:
                layers.append(nn.LayerNorm(width))
            layers.append(activation_fn())
            last = width
    layers.append(nn.Linear(last, output_dim))
    return nn.Sequential(*layers)


def is_plain(module: nn.Module) -> bool:
    """
    :param module: A layer, or a network of layers.
    :return: Whether it computes what its class says, so that its weights can be read and its ``forward`` called without it:
        it has no hooks, and no layer is of a subclass (with an adapter or a parametrisation of its weights, for instance).
    """
    return all(
        (type(part) in _PLAIN or not isinstance(part, _PLAIN))
        and not (part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)
        for part in module.modules()
    )


_PLAIN = (nn.Linear, nn.Identity, nn.Sequential, ResidualBlock)


def plain_functions(layers: Iterable[nn.Module]) -> list[Callable[[th.Tensor], th.Tensor]]:
    """
    The same computation with fewer calls, which for a single decision cost more than the matrix products.

    :param layers: Layers of :func:`make_mlp`, all of them plain.
    :return: A function for each, of a batch, shape (B, input size).
    """
    functions: list[Callable[[th.Tensor], th.Tensor]] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            functions.append(partial(_linear, layer.weight.t(), layer.bias))
        elif isinstance(layer, ResidualBlock):
            branch = (part for part in layer.branch() if not isinstance(part, nn.Identity))
            functions.append(partial(_residual, plain_functions(branch)))
        else:
            functions.append(layer.forward)
    return functions


def _linear(weight: th.Tensor, bias: th.Tensor | None, x: th.Tensor) -> th.Tensor:
    return x @ weight if bias is None else th.addmm(bias, x, weight)


def _residual(branch: Iterable[Callable[[th.Tensor], th.Tensor]], x: th.Tensor) -> th.Tensor:
    hidden = x
    for function in branch:
        hidden = function(hidden)
    return x + hidden


def gather_rows(values: th.Tensor, index: th.Tensor) -> th.Tensor:
    """
    ``values[index]`` of a matrix, whose gradient several threads do not add up in any order, but always in the same.
    """
    return F.embedding(index, values)


def sinusoids_of(timesteps: th.Tensor, size: int) -> th.Tensor:
    """
    :param timesteps: Timesteps, shape (T,).
    :param size: Size of the embedding, even.
    :return: Sines and cosines of them, shape (T, size).
    """
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(timesteps, size, downscale_freq_shift=1)


class Denoiser(nn.Module, ABC):
    """
    What predicts noise, from what :meth:`encode` makes of the observation and :meth:`embed_timesteps` of the timestep.
    """

    obs_encoder: nn.Module

    def prepare(self, timesteps: th.Tensor) -> Any:
        """
        :param timesteps: Timesteps of a chain's steps, shape (S,).
        :return: What :meth:`for_chain` needs of them, whatever is observed.
        """
        return self.embed_timesteps(timesteps)

    def for_chain(self, features: th.Tensor, prepared: Any) -> list[Callable[[th.Tensor], th.Tensor]]:
        """
        Begin a denoising chain: what does not change along it is computed here, once.

        :param features: Observation features, shape (B, features_dim).
        :param prepared: Of :meth:`prepare`.
        :return: For each step, a function of noisy chunks, shape (B, Tp, Da), that returns the prediction.
        """
        condition = self.encode(features)
        return [partial(self, time_embedding=row, condition=condition) for row in prepared]

    def encode(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: Observation features, shape (B, features_dim).
        :return: What the chain is conditioned on, shape (B, condition_dim).
        """
        return self.obs_encoder(features)

    @abstractmethod
    def embed_timesteps(self, timesteps: th.Tensor) -> th.Tensor:
        """
        :param timesteps: Training timesteps, shape (T,). They are whole numbers below K, or any in a flow.
        :return: Their embeddings, shape (T, embedding_dim).
        """

    @abstractmethod
    def forward(self, sample: th.Tensor, time_embedding: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """
        :param sample: Noisy chunks, shape (B, Tp, Da).
        :param time_embedding: From :meth:`embed_timesteps`, shape (embedding_dim,) for all rows or (B, embedding_dim).
        :param condition: From :meth:`encode`, shape (B, condition_dim).
        :return: The prediction, shape (B, Tp, Da).
        """


class SinusoidalDenoiser(Denoiser):
    """
    A denoiser that embeds timesteps by a small network of their sines and cosines.

    :param denoising_steps: K, the number of timesteps to embed.
    :param time_dim: Size of the embedding, even.
    :param hidden_dim: Hidden units of the network.
    :raises ValueError: for a size that is odd or less than 4.
    """

    sinusoids: th.Tensor

    def __init__(self, denoising_steps: int, time_dim: int, hidden_dim: int) -> None:
        super().__init__()
        if time_dim < 4 or time_dim % 2 != 0:
            raise ValueError(f"time_dim={time_dim} must be even and at least 4.")
        self.register_buffer("sinusoids", sinusoids_of(th.arange(denoising_steps), time_dim), persistent=False)
        self.time_mlp = nn.Sequential(nn.Linear(time_dim, hidden_dim), nn.Mish(), nn.Linear(hidden_dim, time_dim))

    def embed_timesteps(self, timesteps: th.Tensor) -> th.Tensor:
        # Those of a flow are no whole numbers, and so not in the table.
        in_table = not timesteps.is_floating_point()
        return self.time_mlp(self.sinusoids[timesteps] if in_table else sinusoids_of(timesteps, self.sinusoids.shape[1]))


class _PlainChain(NamedTuple):
    """
    An ``MlpDenoiser`` as functions, its first layer by what it sees.

    :param chunk_weight: The noisy chunk's part, shape (Tp·Da, width).
    :param obs_weight: The encoded observation's, shape (condition_dim, width).
    :param time_parts: What each timestep adds, shape (width,).
    :param following: The layers after it.
    """

    chunk_weight: th.Tensor
    obs_weight: th.Tensor
    time_parts: tuple[th.Tensor, ...]
    following: list[Callable[[th.Tensor], th.Tensor]]


class MlpDenoiser(SinusoidalDenoiser):
    """
    A multilayer perceptron on the noisy chunk, the time embedding and the observation features.

    :param action_dim: Da, size of one action.
    :param horizon: Tp, actions in a chunk.
    :param features_dim: Size of the observation features.
    :param denoising_steps: K, the number of timesteps to embed.
    :param net_arch: Widths of the hidden layers.
    :param time_dim: Size of the time embedding, even.
    :param obs_encoder_arch: Widths of an encoder of the features, the last one its output size; ``None``: no encoder.
    :param film: Whether time embedding and features also scale and shift the hidden layers before each activation or residual
        block (FiLM, Perez et al. 2018), from the identity on.
    :param mlp: ``activation_fn``, also of the encoder, ``residual`` and ``layer_norm`` of :func:`make_mlp`.
    """

    mlp: nn.Sequential
    film: nn.Linear | None

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        features_dim: int,
        denoising_steps: int,
        net_arch: Sequence[int],
        time_dim: int = 16,
        obs_encoder_arch: Sequence[int] | None = None,
        film: bool = False,
        **mlp: Any,
    ) -> None:
        super().__init__(denoising_steps, time_dim, 2 * time_dim)
        mlp = {"activation_fn": nn.ReLU, "residual": True, **mlp}
        self.obs_encoder = nn.Identity()
        if obs_encoder_arch:
            self.obs_encoder = make_mlp(features_dim, obs_encoder_arch[-1], obs_encoder_arch[:-1], mlp["activation_fn"])
            features_dim = obs_encoder_arch[-1]
        chunk_dim = horizon * action_dim
        self.input_sizes = [chunk_dim, time_dim, features_dim]
        self.mlp = make_mlp(sum(self.input_sizes), chunk_dim, net_arch, **mlp)
        # Activations and residual blocks, whose inputs are modulated.
        self._modulated = [not isinstance(layer, (nn.Linear, nn.LayerNorm)) for layer in self.mlp]
        self._widths = list(net_arch[: sum(self._modulated)])
        self.film = None
        if film:
            if not self._widths:
                raise ValueError(
                    f"net_arch={list(net_arch)} has no residual block that film=True could modulate: use three layers or "
                    "more, or residual=False."
                )
            self.film = nn.Linear(time_dim + features_dim, 2 * sum(self._widths))
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def prepare(self, timesteps: th.Tensor) -> Any:
        first = self.mlp[0]
        if self.film is not None or type(self) is not MlpDenoiser or type(first) is not nn.Linear or not is_plain(self):
            return super().prepare(timesteps)
        # The first layer by what it sees: at each step only the noisy chunk's part is computed anew.
        chunk_weight, time_weight, obs_weight = first.weight.t().split(self.input_sizes)
        time_parts = _linear(time_weight, first.bias, self.embed_timesteps(timesteps)).unbind()
        return _PlainChain(chunk_weight, obs_weight, time_parts, plain_functions([*self.mlp][1:]))

    def for_chain(self, features: th.Tensor, prepared: Any) -> list[Callable[[th.Tensor], th.Tensor]]:
        if not isinstance(prepared, _PlainChain):
            return super().for_chain(features, prepared)
        obs_part = self.encode(features) @ prepared.obs_weight

        def predict(time_part: th.Tensor, sample: th.Tensor) -> th.Tensor:
            hidden = th.addmm(obs_part, sample.flatten(1), prepared.chunk_weight).add_(time_part)
            for layer in prepared.following:
                hidden = layer(hidden)
            return hidden.view_as(sample)

        return [partial(predict, time_part) for time_part in prepared.time_parts]

    def forward(self, sample: th.Tensor, time_embedding: th.Tensor, condition: th.Tensor) -> th.Tensor:
        inputs = th.cat([sample.flatten(1), time_embedding.expand(sample.shape[0], -1), condition], dim=1)
        if self.film is None:
            return self.mlp(inputs).view_as(sample)
        modulation = self.film(inputs[:, self.input_sizes[0] :])
        scales, shifts = (iter(part.split(self._widths, dim=1)) for part in modulation.chunk(2, dim=1))
        hidden = inputs
        for layer, modulated in zip(self.mlp, self._modulated, strict=True):
            if modulated:
                hidden = th.addcmul(hidden + next(shifts), hidden, next(scales))
            hidden = layer(hidden)
        return hidden.view_as(sample)


def check_unet(horizon: int, net_arch: Sequence[int], n_groups: int) -> None:
    """
    :param horizon: Tp.
    :param net_arch: Channels of each level.
    :param n_groups: Groups of channels that are normalised together.
    :raises ValueError: for a horizon that can't be halved that often, or channels that can't be grouped.
    """
    halvings = len(net_arch) - 1
    if horizon % 2**halvings != 0:
        raise ValueError(
            f"horizon={horizon} can't be halved {halvings} times, once between two levels of net_arch={list(net_arch)}: "
            f"use a multiple of {2**halvings}, fewer levels, or DiffusionMlpPolicy."
        )
    if any(channels % n_groups for channels in net_arch):
        raise ValueError(
            f"net_arch={list(net_arch)}: the UNet's channels must be multiples of {n_groups}, its normalisation groups."
        )


class UnetDenoiser(Denoiser):
    """
    diffusers' ``UNet1DModel`` along the chunk, conditioned by adding an embedding of the features to the time embedding,
    which its residual blocks add to each channel.

    :param action_dim: Da, the UNet's channels in and out.
    :param horizon: Tp, the length that it works on.
    :param features_dim: Size of the observation features.
    :param net_arch: Channels of each level, multiples of 8; the chunk is halved between levels.
    :param activation_fn: Activation of the features' embedding.
    :raises ValueError: for a horizon that the UNet does not return unchanged, or channels that it can't group.
    """

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        features_dim: int,
        net_arch: Sequence[int],
        activation_fn: type[nn.Module] = nn.Mish,
    ) -> None:
        super().__init__()
        from diffusers import UNet1DModel

        check_unet(horizon, net_arch, n_groups=8)
        unet: Any = UNet1DModel(
            sample_size=horizon,
            in_channels=action_dim,
            out_channels=action_dim,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            freq_shift=1.0,
            flip_sin_to_cos=False,
            down_block_types=("DownResnetBlock1D",) * len(net_arch),
            up_block_types=("UpResnetBlock1D",) * (len(net_arch) - 1),
            mid_block_type="MidResTemporalBlock1D",
            out_block_type="OutConv1DBlock",
            block_out_channels=tuple(net_arch),
            act_fn="mish",
        )
        # The UNet adds the embedding that it is given: time and features are embedded here, once per chain.
        self.time_proj, unet.time_proj = unet.time_proj, nn.Identity()
        self.time_mlp, unet.time_mlp = unet.time_mlp, nn.Identity()
        self.unet = unet
        self.obs_encoder = make_mlp(features_dim, net_arch[0], [4 * net_arch[0]], activation_fn)

    def embed_timesteps(self, timesteps: th.Tensor) -> th.Tensor:
        return self.time_mlp(self.time_proj(timesteps))

    def forward(self, sample: th.Tensor, time_embedding: th.Tensor, condition: th.Tensor) -> th.Tensor:
        return self.unet(sample.transpose(1, 2), time_embedding + condition).sample.transpose(1, 2)


class TransformerDenoiser(SinusoidalDenoiser):
    """
    A transformer whose tokens are the chunk's noisy actions; they attend to each other and to two more tokens, the timestep's
    and the observation's (Chi et al. 2023, section 3, without the causal mask: the chunk is denoised as a whole).

    :param action_dim: Da, size of one action.
    :param horizon: Tp, actions in a chunk.
    :param features_dim: Size of the observation features.
    :param denoising_steps: K, the number of timesteps to embed.
    :param net_arch: Width of each layer, all equal and multiples of ``n_heads``.
    :param n_heads: Attention heads.
    :raises ValueError: for other widths.
    """

    def __init__(
        self, action_dim: int, horizon: int, features_dim: int, denoising_steps: int, net_arch: Sequence[int], n_heads: int = 4
    ) -> None:
        width = net_arch[0]
        if len(set(net_arch)) != 1 or width % n_heads != 0:
            raise ValueError(
                f"net_arch={list(net_arch)}: a transformer's layers have one width, a multiple of its {n_heads} heads, "
                "such as [128, 128]."
            )
        super().__init__(denoising_steps, width, width)
        self.obs_encoder = nn.Linear(features_dim, width)
        self.tokens = nn.Linear(action_dim, width)
        self.position = nn.Parameter(0.02 * th.randn(horizon, width))
        layer = nn.TransformerDecoderLayer(
            width, n_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerDecoder(layer, len(net_arch), norm=nn.LayerNorm(width))
        self.output = nn.Linear(width, action_dim)

    def forward(self, sample: th.Tensor, time_embedding: th.Tensor, condition: th.Tensor) -> th.Tensor:
        memory = th.stack([time_embedding.expand(sample.shape[0], -1), condition], dim=1)
        return self.output(self.transformer(self.tokens(sample) + self.position, memory))
