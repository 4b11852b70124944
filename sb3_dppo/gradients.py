"""Gradient steps: the losses' gradients, slice by slice, and what becomes of them."""

import math
from collections.abc import Iterable, Iterator

import torch as th

from sb3_dppo.actor_critic import DiffusionActorCriticPolicy
from sb3_dppo.buffers import DenoisingRolloutBufferSamples, equal_slices
from sb3_dppo.losses import LossSettings, Metrics, actor_loss, behaviour_cloning_loss, value_loss


def compute_gradients(
    policy: DiffusionActorCriticPolicy,
    samples: DenoisingRolloutBufferSamples,
    advantages: th.Tensor,
    settings: LossSettings,
    train_actor: bool = True,
    n_slices: int = 1,
) -> Metrics:
    """
    Compute the gradients of the losses of a minibatch.

    :param policy: The policy.
    :param samples: The minibatch. Its ``bc_noise``, if any, comes with a ``bc_index``.
    :param advantages: Advantages of its pairs, shape (N,).
    :param settings: What else the losses depend on.
    :param train_actor: Whether the actor is trained, or only the critic.
    :param n_slices: Slices of the minibatch whose gradients are accumulated one after the other, for the same result in less
        memory.
    :return: The loss and the metrics.
    """
    for optimizer in policy.optimizers:
        optimizer.zero_grad()
    metrics: Metrics = {}
    for loss, part_metrics in _losses_of_slices(policy, samples, advantages, settings, train_actor, n_slices):
        loss.backward()
        for name, value in {"loss": loss.detach(), **part_metrics}.items():
            metrics[name] = metrics[name] + value if name in metrics else value
    return metrics


def _losses_of_slices(
    policy: DiffusionActorCriticPolicy,
    samples: DenoisingRolloutBufferSamples,
    advantages: th.Tensor,
    settings: LossSettings,
    train_actor: bool,
    n_slices: int,
) -> Iterator[tuple[th.Tensor, Metrics]]:
    """Their sums, and those of the metrics, are the minibatch's: a graph at a time, each to be freed before the next."""
    n_pairs, n_values = len(samples.decision_index), len(samples.value_index)
    if train_actor:
        for rows in equal_slices(n_pairs, min(n_slices, n_pairs)):
            yield actor_loss(policy, samples.pairs(rows), advantages[rows], settings, n_pairs)
    if train_actor and samples.bc_noise is not None and samples.bc_index is not None:
        n_chains = len(samples.bc_index)
        for rows in equal_slices(n_chains, min(n_slices, n_chains)):
            part = samples._replace(bc_noise=samples.bc_noise[:, rows], bc_index=samples.bc_index[rows])
            bc_loss = behaviour_cloning_loss(policy, part, n_chains)
            yield settings.bc_coef * bc_loss, dict(bc_loss=bc_loss.detach())
    # Of about as many rows as the actor's.
    n_slices = math.ceil(n_values * min(n_slices, n_pairs) / n_pairs)
    for rows in equal_slices(n_values, max(1, min(n_slices, n_values))):
        part = samples._replace(value_index=samples.value_index[rows])
        values = value_loss(policy, part, settings.clip_range_vf, n_values)
        yield settings.vf_coef * values, dict(value_loss=values.detach())


def gradient_step(optimizers: Iterable[th.optim.Optimizer], loss: th.Tensor, max_grad_norm: float | None = None) -> None:
    """Make a gradient step, each optimiser's gradients clipped to this norm; leave it out if the loss is NaN or infinite."""
    not_finite = (~loss.isfinite()).float()
    for optimizer in optimizers:
        if max_grad_norm is not None:
            th.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
        if optimizer.defaults.get("fused"):
            # Looks at this on the device; the host does not have to wait for a GPU.
            optimizer.found_inf = not_finite  # type: ignore[attr-defined]
            optimizer.step()
        elif not not_finite:
            optimizer.step()


def check_update(policy: DiffusionActorCriticPolicy, losses: list[th.Tensor], where: str) -> None:
    """
    ValueError if a loss or a parameter is NaN or infinite. For once per update, as it waits for a GPU, and before a callback
    can save the policy.
    """
    finite_losses = th.stack(losses).isfinite()
    advice = "Saved models are not affected. Lower the learning rates, set max_grad_norm, or rescale rewards and observations."
    if not finite_losses.all():
        bad = (~finite_losses).cpu().numpy()
        raise ValueError(
            f"The loss of {bad.sum()} of the {len(bad)} gradient steps of update {where} was NaN or infinite, first that of "
            f"step {bad.argmax() + 1}. These steps were left out. {advice}"
        )
    if not th.stack(th._foreach_norm(list(policy.parameters()))).isfinite().all():
        raise ValueError(f"A parameter of the policy became NaN or infinite in update {where}. {advice}")
