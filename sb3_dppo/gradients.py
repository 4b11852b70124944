"""Gradient steps: the losses' gradients, slice by slice, and what becomes of them."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch as th

from sb3_dppo import ranks
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
    :param samples: The minibatch.
    :param advantages: Advantages of its pairs, shape (N,).
    :param settings: What else the losses depend on.
    :param train_actor: Whether the actor is trained, or only the critic.
    :param n_slices: Slices of the minibatch whose gradients are accumulated one after the other, for the same result in less
        memory.
    :return: The loss and the metrics. With several ranks, gradients, "loss" and "approx_kl" are those of the whole minibatch,
        and the other metrics add up to it.
    """
    for optimizer in policy.optimizers:
        optimizer.zero_grad()
    # Those that all ranks add up, also one without a share.
    metrics: Metrics = dict.fromkeys(("loss", "approx_kl") if train_actor else ("loss",), samples.returns.new_zeros(()))
    for loss, part_metrics in losses_of_slices(policy, samples, advantages, settings, train_actor, n_slices):
        loss.backward()
        for name, value in {"loss": loss.detach(), **part_metrics}.items():
            metrics[name] = metrics[name] + value if name in metrics else value
    if ranks.size() > 1:
        _add_other_ranks(policy, metrics, train_actor)
    if train_actor:
        policy.sampler.stop_at_bounds()
    return metrics


def _add_other_ranks(policy: DiffusionActorCriticPolicy, metrics: Metrics, train_actor: bool) -> None:
    """Add up the ranks' gradients, losses and divergences, where one without a share has none."""
    parameters: list[th.Tensor] = []
    for optimizer in policy.optimizers if train_actor else [policy.critic_optimizer]:
        parameters += optimizer.param_groups[0]["params"]
    gradients = [th.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for name in {"loss", "approx_kl"} & set(metrics):
        metrics[name] = metrics[name].clone()
    ranks.sum_over_ranks([*gradients, *(metrics[name] for name in ("loss", "approx_kl") if name in metrics)])


def losses_of_slices(
    policy: DiffusionActorCriticPolicy,
    samples: DenoisingRolloutBufferSamples,
    advantages: th.Tensor,
    settings: LossSettings,
    train_actor: bool = True,
    n_slices: int = 1,
) -> Iterator[tuple[th.Tensor, Metrics]]:
    """
    The losses of the actor, of behaviour cloning and of the critic, each slice by slice; arguments as of
    :func:`compute_gradients`. Their sums, and those of the metrics, are the minibatch's: a graph at a time, each to be freed
    before the next.
    """
    own_pairs, own_values = len(samples.decision_index), len(samples.value_index)
    if train_actor:
        for rows in equal_slices(own_pairs, min(n_slices, own_pairs)):
            yield actor_loss(policy, samples.pairs(rows), advantages[rows], settings, samples.n_pairs)
    if train_actor and settings.bc_coef > 0:
        if samples.bc_noise is None:
            raise ValueError(
                f"bc_coef={settings.bc_coef}, but the minibatch has no bc_noise, that of the base policy's chains."
            )
        # One chain for each of the critic's decisions, or where nothing else is said of each pair.
        index, n_chains = samples.bc_index, samples.n_values
        if index is None:
            index, n_chains = samples.decision_index, samples.n_pairs
        for rows in equal_slices(len(index), min(n_slices, len(index))):
            part = samples._replace(bc_noise=samples.bc_noise[:, rows], bc_index=index[rows])
            bc_loss = behaviour_cloning_loss(policy, part, n_chains)
            yield settings.bc_coef * bc_loss, dict(bc_loss=bc_loss.detach())
    # Of about as many rows as the actor's.
    n_slices = math.ceil(own_values * min(n_slices, own_pairs) / max(1, own_pairs))
    for rows in equal_slices(own_values, max(1, min(n_slices, own_values))):
        part = samples._replace(value_index=samples.value_index[rows])
        values = value_loss(policy, part, settings.clip_range_vf, samples.n_values)
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


def mean_metrics(history: Mapping[str, list[th.Tensor]]) -> dict[str, float]:
    """
    :param history: What :func:`compute_gradients` has returned in each gradient step of an update, by name.
    :return: The means over these steps, those of all ranks.
    """
    # Of some minibatches a rank may have had no share.
    means = {name: th.stack(values).sum().item() / len(history["loss"]) for name, values in history.items()}
    for part in ranks.gather(means)[1:]:
        # Of the whole minibatch already, or of this rank's share.
        means |= {name: means.get(name, 0.0) + value for name, value in part.items() if name not in ("loss", "approx_kl")}
    return means


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
