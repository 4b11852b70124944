"""What is learned about the noise of exploration: DDIM's η, or the std, for each action dimension or of the state."""

from typing import Any

import torch as th
from torch import nn

from sb3_dppo.diffusion.denoisers import make_mlp

# What of it is learned.
LEARNED = (None, "action", "state")
# Hidden units of the network.
WIDTH = 64


class NoiseNetwork(nn.Module):
    """
    Offsets of η or of the log of the std, one for each action dimension. They are 0 to begin with: the last bias is that of
    each action dimension, and the weights before it are those of the state.

    :param features_dim: Size of the observation features.
    :param action_dim: Da.
    """

    def __init__(self, features_dim: int, action_dim: int) -> None:
        super().__init__()
        with th.random.fork_rng(devices=[]):  # What other networks and rollouts draw does not depend on it.
            self.mlp = make_mlp(features_dim + 1, action_dim, [WIDTH], nn.Mish)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        output: Any = self.mlp[-1]
        return output

    def forward(self, features: th.Tensor, progress: float | th.Tensor) -> th.Tensor:
        """
        :param features: The actor's features, shape (N, features_dim), which get no gradients.
        :param progress: How far the chain is, from 0 to 1, a number or of shape (N,).
        :return: Offsets, shape (N, Da).
        """
        column = th.as_tensor(progress, dtype=features.dtype, device=features.device).expand(len(features))[:, None]
        return self.mlp(th.cat([features.detach(), column], dim=1))


def leads_out(x: th.Tensor, gradient: th.Tensor, low: float, high: float) -> th.Tensor:
    """Where a descent step, which goes against the gradient, would take ``x`` from a bound, or beyond it, further out."""
    return ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))


class InwardClamp(th.autograd.Function):
    """A clamp that passes on gradients that lead back inside, so that what is beyond a bound is not stuck there."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, low: float, high: float) -> th.Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: th.Tensor) -> tuple[th.Tensor, None, None]:
        (x,), (low, high), gradient = ctx.saved_tensors, ctx.bounds, gradients[0]
        return th.where(leads_out(x, gradient, low, high), 0.0, gradient), None, None


class StraightClamp(th.autograd.Function):
    """
    A clamp that passes on all gradients, for what the rows of a minibatch share: only the sum of their gradients tells whether
    it leads out of the bounds.
    """

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, low: float, high: float) -> th.Tensor:
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: th.Tensor) -> tuple[th.Tensor, None, None]:
        return gradients[0], None, None
