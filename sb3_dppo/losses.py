"""
The update rule: PPO's losses where the actions are denoising steps (Ren et al. 2024, section 4). Read it from top to bottom.

A minibatch holds N pairs (decision, denoising index) for the actor and V decisions for the critic. Each loss is a sum over the
rows that it is given, divided by how many the whole minibatch has, so that the parts of a minibatch add up to its loss.
"""

import math
from dataclasses import dataclass

import torch as th

from sb3_dppo.actor_critic import DiffusionActorCriticPolicy
from sb3_dppo.buffers import DenoisingRolloutBufferSamples
from sb3_dppo.diffusion.process import gaussian_log_prob
from sb3_dppo.diffusion.sampler import mean_log_prob, mean_over_executed
from sb3_dppo.features.observations import take

Metrics = dict[str, th.Tensor]
# What is known of each denoising index: divergence from the policy of the rollout, clipped pairs, std in log-probabilities.
STEP_STATISTICS = ("approx_kl", "clip_fraction", "std")


@dataclass(frozen=True)
class LossSettings:
    """
    What the losses of an update depend on besides the policy and the minibatch.

    :param clip_ranges: Clipping parameter of the ratio at each denoising index, see :func:`clip_ranges`, shape (K',)
    :param clip_range_vf: Clipping parameter of the values, or ``None``
    :param vf_coef: Coefficient of the value loss
    :param ent_coef: Coefficient of the mean of η, and of the log of a learned std
    :param bc_coef: Coefficient of the behaviour-cloning loss
    :param kl_coef: Coefficient of the KL divergence from the base policy
    """

    clip_ranges: th.Tensor
    clip_range_vf: float | None = None
    vf_coef: float = 0.5
    ent_coef: float = 0.0
    bc_coef: float = 0.0
    kl_coef: float = 0.0


def actor_loss(
    policy: DiffusionActorCriticPolicy,
    samples: DenoisingRolloutBufferSamples,
    advantages: th.Tensor,
    settings: LossSettings,
    n_pairs: int,
) -> tuple[th.Tensor, Metrics]:
    """
    The clipped policy loss over denoising steps, the bonus for noise, and the KL divergence from the base policy.

    :param policy: The policy.
    :param samples: A minibatch, or a part of one.
    :param advantages: Advantages of its pairs, of :func:`pair_advantages`, shape (N,).
    :param settings: Clipping parameters and coefficients.
    :param n_pairs: Pairs of the whole minibatch.
    :return: The loss, and what it is made of.
    """
    sampler, index = policy.sampler, samples.denoising_index
    n_executed = samples.n_executed[samples.decision_index]
    features, base_features = policy.pair_features(samples.observations, samples.decision_index, settings.kl_coef > 0)

    eta = sampler.eta(features)
    mean = sampler.step_mean(policy.denoiser, features, samples.chain_prev, index, eta)
    std = sampler.step_std(features, index, eta)
    log_prob = mean_log_prob(gaussian_log_prob(samples.chain_next, mean, std), n_executed, sampler.first_action)
    log_ratio = log_prob - samples.old_log_prob
    ratio = log_ratio.exp()

    clip_range = settings.clip_ranges[index]
    clipped_ratio = th.clamp(ratio, 1 - clip_range, 1 + clip_range)
    policy_loss = -th.min(advantages * ratio, advantages * clipped_ratio).sum() / n_pairs

    mean_eta = (eta.mean() if isinstance(eta, th.Tensor) else th.full_like(policy_loss, eta)) * (len(ratio) / n_pairs)
    loss = policy_loss - settings.ent_coef * mean_eta
    if settings.ent_coef != 0 and sampler.config.learns_std:
        loss = loss - settings.ent_coef * std.log().mean() * (len(ratio) / n_pairs)

    base_kl = th.zeros_like(policy_loss)
    if base_features is not None:
        # Of Gaussians with equal std. Of the base policy's mean, only η has a gradient.
        base_mean = sampler.step_mean(policy.base_denoiser, base_features, samples.chain_prev, index, eta)
        divergence = 0.5 * ((mean - base_mean) / std) ** 2
        base_kl = mean_over_executed(divergence, n_executed, sampler.first_action).sum() / n_pairs
        loss = loss + settings.kl_coef * base_kl

    with th.no_grad():
        # k3 in Schulman's "Approximating KL Divergence": unbiased, and never negative.
        approx_kl, clipped = (ratio - 1) - log_ratio, (ratio - 1).abs() > clip_range
        metrics = dict(
            policy_gradient_loss=policy_loss,
            approx_kl=approx_kl.sum() / n_pairs,
            clip_fraction=clipped.sum() / n_pairs,
            ratio=ratio.sum() / n_pairs,
            base_kl=base_kl,
            eta=mean_eta,
            by_denoising_step=_sums_by_step(index, sampler.ft_denoising_steps, approx_kl, clipped, std),
        )
        if sampler.config.learn_std == "state":
            metrics["std"] = std.mean() * (len(ratio) / n_pairs)
    return loss, {name: value.detach() for name, value in metrics.items()}


def _sums_by_step(index: th.Tensor, n_steps: int, approx_kl: th.Tensor, clipped: th.Tensor, std: th.Tensor) -> th.Tensor:
    """Over the pairs of each of K' denoising indices: ``STEP_STATISTICS``, and how many pairs there are, shape (4, K')."""
    rows = th.stack([approx_kl, clipped.float(), std.mean(dim=(1, 2)), th.ones_like(approx_kl)])
    # A product, for index_add_ goes row by row on a CPU.
    return rows @ (index[:, None] == th.arange(n_steps, device=index.device)).float()


def value_loss(
    policy: DiffusionActorCriticPolicy, samples: DenoisingRolloutBufferSamples, clip_range_vf: float | None, n_values: int
) -> th.Tensor:
    """
    :param policy: The policy.
    :param samples: A minibatch, or a part of one.
    :param clip_range_vf: See :class:`LossSettings`.
    :param n_values: The critic's decisions in the whole minibatch.
    :return: Half the mean squared error of the critic.
    """
    index = samples.value_index
    values, returns = policy.predict_values(take(samples.observations, index)).flatten(), samples.returns[index]
    squared_error = (values - returns) ** 2
    if clip_range_vf is not None:
        old_values = samples.old_values[index]
        clipped = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)
        squared_error = th.max(squared_error, (clipped - returns) ** 2)
    return (0.5 * squared_error).sum() / max(1, n_values)  # More minibatches than decisions leave some without one.


def behaviour_cloning_loss(
    policy: DiffusionActorCriticPolicy, samples: DenoisingRolloutBufferSamples, n_chains: int
) -> th.Tensor:
    """
    :param policy: The policy.
    :param samples: A minibatch with ``bc_noise`` and ``bc_index``, one chain of the base policy for each of M decisions, or a
        part of one.
    :param n_chains: Chains of the whole minibatch.
    :return: Minus the log-probability, under the current policy, of these chains' steps, averaged over chains, steps, actions
        and action dimensions.
    """
    assert samples.bc_noise is not None and samples.bc_index is not None
    obs = take(samples.observations, samples.bc_index)
    chain = policy.sample_chain(obs, noise=samples.bc_noise, use_base=True).chain
    log_prob = policy.chain_log_prob(obs, chain).flatten(0, 1)
    whole_chunk = th.full((len(log_prob),), policy.horizon, device=log_prob.device)
    return -mean_log_prob(log_prob, whole_chunk).sum() / (n_chains * policy.sampler.ft_denoising_steps)


def pair_advantages(
    samples: DenoisingRolloutBufferSamples,
    ft_denoising_steps: int,
    gamma_denoising: float = 1.0,
    normalize: bool = True,
    quantiles: tuple[float, float] = (0.0, 1.0),
) -> th.Tensor:
    """
    Advantages of the pairs: normalised over the whole minibatch, clamped between two of its quantiles and discounted by the
    denoising steps that are still to come.

    :param samples: A minibatch, or a rank's share.
    :param ft_denoising_steps: K'.
    :param gamma_denoising: Discount of a denoising step.
    :param normalize: Whether to normalise.
    :param quantiles: The two quantiles.
    :return: Shape (N,).
    """
    whole = samples.whole
    advantages = samples.advantages[samples.decision_index] if whole is None else whole.advantages
    if normalize and len(advantages) > 1:
        std, largest = advantages.std(), advantages.abs().max()
        normalized = (advantages - advantages.mean()) / (std + 1e-8)
        # Advantages that differ by rounding alone, as those of one decision do, are no better or worse than their mean.
        advantages = th.where(std > 1e-6 * largest, normalized, 0.0)
    if tuple(quantiles) != (0.0, 1.0):
        low, high = (advantages.quantile(quantile) for quantile in quantiles)
        advantages = advantages.clamp(low, high)
    if whole is not None:
        advantages = advantages[whole.own_pairs]
    steps_to_come = ft_denoising_steps - 1 - samples.denoising_index
    return advantages * gamma_denoising**steps_to_come


def clip_ranges(
    ft_denoising_steps: int,
    clip_range: float,
    clip_range_base: float | None = None,
    rate: float = 3.0,
    device: th.device | str = "cpu",
) -> th.Tensor:
    """
    The clipping parameter grows exponentially from the noisiest step to the last (Ren et al. 2024, appendix C).

    :param ft_denoising_steps: K'.
    :param clip_range: At the last step.
    :param clip_range_base: At the noisiest. ``None``: the same at every step.
    :param rate: How sharply it grows; 0 is linear.
    :param device: Where.
    :return: That of each denoising index, shape (K',).
    """
    if ft_denoising_steps == 1 or clip_range_base is None:
        return th.full((ft_denoising_steps,), clip_range, device=device)
    progress = th.arange(ft_denoising_steps, device=device) / (ft_denoising_steps - 1)
    growth = progress if rate == 0 else th.expm1(rate * progress) / math.expm1(rate)
    # A schedule may have brought the one below the other.
    base = min(clip_range_base, clip_range)
    return base + (clip_range - base) * growth
