"""What is logged about an update."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import explained_variance

from sb3_dppo import ranks
from sb3_dppo.gradients import mean_metrics
from sb3_dppo.losses import STEP_STATISTICS, LossSettings


def log_update(
    model: Any, history: dict[str, list[th.Tensor]], settings: LossSettings, learning_rates: dict[str, float]
) -> None:
    """
    :param model: The algorithm, with its rollout.
    :param history: The metrics of each gradient step by name, see :func:`~sb3_dppo.gradients.compute_gradients`.
    :param settings: What the losses depended on.
    :param learning_rates: Those of the update, by name.
    """
    record, sampler = model.logger.record, model.policy.sampler
    _log_denoising_steps(model.logger, history.pop("by_denoising_step", []), sampler.n_base_steps)
    for name, value in mean_metrics(history).items():
        if name != "base_kl" or settings.kl_coef > 0:  # otherwise it is not computed
            record(f"train/{name}", value)
    buffer = model.rollout_buffer
    rollout = (buffer.old_values[: buffer.size()].cpu().numpy(), buffer.returns.cpu().numpy())
    parts = ranks.gather(rollout)
    old_values, returns = (np.concatenate([part[i] for part in parts]) for i in range(2))
    record("train/explained_variance", explained_variance(old_values, returns))
    record("train/advantage_std", float(np.std(returns - old_values)))
    record("train/n_updates", model._n_updates, exclude="tensorboard")
    record("train/learning_rate", learning_rates["learning_rate"])
    record("train/critic_learning_rate", learning_rates["critic_learning_rate"])
    record("train/ft_denoising_steps", sampler.ft_denoising_steps)
    record("train/clip_range", settings.clip_ranges[-1].item())
    if settings.clip_range_vf is not None:
        record("train/clip_range_vf", settings.clip_range_vf)
    if sampler.config.learn_std != "state":  # it is the same in all decisions
        record("train/std", th.as_tensor(sampler.floors()[0]).mean().item())
    for name, optimizer in dict(actor=model.policy.optimizer, critic=model.policy.critic_optimizer).items():
        gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"] if parameter.grad is not None]
        if gradients:
            record(f"train/{name}_grad_norm", th.nn.utils.get_total_norm(gradients).item())


def _log_denoising_steps(logger: Any, sums: list[th.Tensor], n_base_steps: int) -> None:
    """
    :param logger: Where to.
    :param sums: Of each gradient step that trained the actor, shape (4, K').
    :param n_base_steps: S - K', so that a step has one name however many are fine-tuned.
    """
    parts = ranks.gather(th.stack(sums).sum(dim=0).cpu().numpy() if sums else None)
    totals = [part for part in parts if part is not None]
    if not totals:
        return
    *statistics, n_pairs = np.sum(totals, axis=0)
    for name, values in zip(STEP_STATISTICS, statistics, strict=True):
        for index in np.flatnonzero(n_pairs):
            # Too many for the screen.
            logger.record(
                f"denoising/{name}_{n_base_steps + index:02d}", float(values[index] / n_pairs[index]), exclude="stdout"
            )
