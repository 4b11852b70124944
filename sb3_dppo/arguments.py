"""What users can get wrong: arguments out of range, or that don't fit each other or the env, and what to do about it."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import FloatSchedule

from sb3_dppo import ranks
from sb3_dppo.buffers import DenoisingRolloutBuffer
from sb3_dppo.diffusion.settings import MIN_LOGPROB_STD, SamplerConfig, are_ordered, is_number
from sb3_dppo.runs.faults import ON_BAD_ENV
from sb3_dppo.runs.names import refuse_unknown
from sb3_dppo.schedules import make_schedule

SAMPLER_ARGUMENTS = tuple(field.name for field in fields(SamplerConfig))
# Of SB3's own policies, and why a diffusion policy has no use for them.
OTHER_NOISE = "a diffusion policy explores with the noise of its denoising steps, see min_sampling_std"
NOT_ARGUMENTS = {
    **dict.fromkeys(("use_sde", "sde_sample_freq", "full_std", "use_expln"), OTHER_NOISE),
    "squash_output": "actions are scaled to the bounds of the action space",
}

# PPO's, of the sum of log-probabilities.
CLIP_RANGE = 0.2

# Numbers of DPPO that must be at least or above something.
WHOLE_FROM_ONE = ("n_steps", "batch_size", "n_epochs", "n_accumulate", "eta_update_interval")
NOT_NEGATIVE = ("clip_range_base", "vf_coef", "bc_coef", "kl_coef")
POSITIVE = ("max_grad_norm", "target_kl")
FRACTIONS = ("gamma", "gae_lambda")
SCHEDULES = ("learning_rate", "critic_learning_rate", "eta_learning_rate", "clip_range", "clip_range_vf", "min_sampling_std")
OPTIONAL = ("n_accumulate", "clip_range_base", "max_grad_norm", "target_kl", "clip_range_vf", "clip_range", "min_sampling_std")
CHOICES: dict[str, tuple[Any, ...]] = dict(
    shuffle=("pairs", "decisions", None), on_bad_env=ON_BAD_ENV, normalize_advantage=(True, False)
)


def check_names(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """ValueError for an argument of PPO that has no meaning here, TypeError for another that ``function`` does not know."""
    for name in set(given) & set(NOT_ARGUMENTS):
        raise ValueError(f"{function} has no argument {name!r}: {NOT_ARGUMENTS[name]}. Leave it out.")
    refuse_unknown(function, given, known)


def check_policy(policy: Any, aliases: dict[str, type], base: type) -> None:
    """ValueError for a policy that is no diffusion policy, by name or as a class."""
    known = policy in aliases if isinstance(policy, str) else isinstance(policy, type) and issubclass(policy, base)
    if not known:
        name = getattr(policy, "__name__", repr(policy))
        raise ValueError(
            f"policy={name} is not a diffusion policy: choose one of {list(aliases)}, or a class derived from these."
        )


def by_network(net_arch: Any) -> Any:
    """``net_arch`` as a dictionary: a list is of both networks."""
    return dict(pi=list(net_arch), vf=list(net_arch)) if isinstance(net_arch, (list, tuple)) else net_arch


def check_policy_arguments(given: Mapping[str, Any]) -> None:
    """ValueError that names the argument, for values of a policy's ``policy_kwargs`` that no network can be made of."""
    for name, least in (("horizon", 1), ("denoising_steps", 1), ("first_action", 0), ("time_dim", 1)):
        if not (is_number(given[name], whole=True) and given[name] >= least):
            raise ValueError(f"{name}={given[name]!r} must be at least {least}, a whole number.")
    if given["first_action"] >= given["horizon"]:
        raise ValueError(f"first_action={given['first_action']} must be below horizon={given['horizon']}.")
    for name in ("clip_sample_range", "clip_noise_pred", "clip_final_action"):
        value, others = given[name], (None, "auto") if name == "clip_sample_range" else (None,)
        if value not in others and not (is_number(value) and value > 0):
            raise ValueError(f"{name}={value!r} must be a positive number, or one of {list(others)}.")
    if not is_number(given["log_std_init"]):
        raise ValueError(f"log_std_init={given['log_std_init']!r} must be a number.")
    net_arch, encoder = by_network(given["net_arch"]), given["obs_encoder_arch"]
    if net_arch is not None and not (isinstance(net_arch, dict) and set(net_arch) <= {"pi", "vf"}):
        raise ValueError(f"net_arch={net_arch!r} must be a list of widths, or dict(pi=…, vf=…) of two such lists.")
    for name, widths in {**(net_arch or {}), **({} if encoder is None else {"obs_encoder_arch": encoder})}.items():
        if not (isinstance(widths, (list, tuple)) and all(is_number(width, whole=True) and width >= 1 for width in widths)):
            where = name if name == "obs_encoder_arch" else f"net_arch[{name!r}]"
            raise ValueError(f"{where}={widths!r} must be a list of widths, whole numbers from 1 up.")
    if given["share_features_extractor"]:
        raise ValueError(
            "share_features_extractor=True would let the critic change the frozen base policy's features: leave it out."
        )
    optimizer_class = given["optimizer_class"]
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, th.optim.Optimizer)):
        raise ValueError(f"optimizer_class={optimizer_class!r} must be a class of torch.optim, such as torch.optim.AdamW.")
    if "lr" in (given["optimizer_kwargs"] or {}):
        raise ValueError(
            "optimizer_kwargs['lr']: learning rates are arguments of DPPO, learning_rate and critic_learning_rate."
        )


def check_env(env: Any) -> None:
    """ValueError if there is none."""
    if env is None:
        raise ValueError(
            "env=None: the networks' sizes follow from the env's spaces, so a new model needs one. To predict with a saved "
            "model there is DPPO.load(path)."
        )


def check_seed_and_device(seed: Any, device: Any) -> None:
    """ValueError for what is neither a seed nor one of PyTorch's devices."""
    if seed is not None and not isinstance(seed, (int, np.integer)):
        raise ValueError(f"seed={seed!r} must be a whole number, or None.")
    if device != "auto":
        try:
            th.device(device)
        except RuntimeError:
            raise ValueError(f"device={device!r} is unknown: use 'auto', 'cpu', 'cuda', 'cuda:1' and the like.") from None


def check_action_space(action_space: spaces.Space) -> None:
    """ValueError if a diffusion policy can't act in it, saying what can be done."""
    env_has = f"env has the action space {action_space}"
    if not isinstance(action_space, spaces.Box):
        raise ValueError(
            f"{env_has}, but diffusion policies are for continuous actions (a gymnasium.spaces.Box): use another algorithm, "
            "such as PPO, for discrete ones."
        )
    if action_space.dtype is None or action_space.dtype.kind != "f":
        raise ValueError(f"{env_has}, but diffusion policies need one of floating-point numbers.")
    with np.errstate(over="ignore"):
        finite = np.isfinite(action_space.high.astype(np.float32) - action_space.low.astype(np.float32)).all()
    if not finite:
        raise ValueError(
            f"{env_has} with infinite bounds, but chunks are scaled to the bounds: drop gymnasium.wrappers.ClipAction if they "
            "come from it (actions are clipped anyway), or wrap the env in gymnasium.wrappers.RescaleAction."
        )


def clip_range_schedule(model: Any) -> FloatSchedule:
    """That of the last denoising step, as it is given, or PPO's over the numbers that log-probabilities are averaged over."""
    clip_range = model.clip_range
    if clip_range is None:
        clip_range = CLIP_RANGE / (model.policy.sampler.act_steps * model.policy.action_dim)
    return make_schedule("clip_range", clip_range)


def check_training_arguments(model: Any) -> None:
    """Check what only matters for training: a loaded model may have another number of envs, or never be trained."""
    check_ranges(model)
    act_steps, K = model.policy.sampler.act_steps, model.policy.sampler.ft_denoising_steps
    if model.n_steps % act_steps != 0:
        raise ValueError(
            f"n_steps={model.n_steps} must be a multiple of act_steps={act_steps}, because all envs plan together every "
            f"act_steps env steps: use {max(1, round(model.n_steps / act_steps)) * act_steps}."
        )
    base, clip_range = model.clip_range_base, clip_range_schedule(model)
    if base is not None and base > clip_range(1.0) == clip_range(0.0):
        raise ValueError(f"clip_range_base={base} must not exceed clip_range={clip_range(1.0)}: it is for the noisiest step.")
    config = model.policy.sampler.config
    std, (low, high) = model.policy.initial_std, config.std_range
    if model.n_rollouts == 0 and config.has_log_std and not low <= std <= high:
        raise ValueError(
            f"log_std_init={math.log(std):.4g} means a std of {std:.4g}, outside std_range={config.std_range}: use "
            f"{math.log(low):.4g} to {math.log(high):.4g}, or change std_range."
        )
    if model.normalize_advantage:
        if ranks.size() * model.n_envs * model.n_steps // act_steps < 2:
            raise ValueError(
                f"n_steps={model.n_steps} with n_envs={model.n_envs} and act_steps={act_steps} means one decision in a "
                "rollout, whose advantage can't be normalised: use more, or normalize_advantage=False."
            )
        row, least = ("decision", 2 * K) if model.shuffle_mode == "decisions" else ("pair", 2)
        if model.batch_size < least:
            raise ValueError(
                f"batch_size={model.batch_size} means minibatches of one {row}, whose advantage can't be normalised: use "
                f"at least {least}, or normalize_advantage=False."
            )


def check_ranges(model: Any) -> None:
    """Check what needs no policy. A ValueError names the argument that is out of range."""
    for names, fits, rule in (
        (WHOLE_FROM_ONE, lambda x: is_number(x, whole=True) and x >= 1, "at least 1, a whole number"),
        (("critic_warmup",), lambda x: is_number(x, whole=True) and x >= 0, "at least 0, a whole number"),
        (NOT_NEGATIVE, lambda x: x >= 0, "at least 0"),
        (POSITIVE, lambda x: x > 0, "positive"),
        (FRACTIONS, lambda x: 0 <= x <= 1, "between 0 and 1"),
        (("gamma_denoising",), lambda x: 0 < x <= 1, "above 0 and at most 1"),
        (("ent_coef",), math.isfinite, "finite"),
        # Of which the exponential is finite.
        (("clip_range_rate",), lambda x: -50 <= x <= 50, "between -50 and 50"),
    ):
        for name in names:
            value = getattr(model, name)
            if value is None and name in OPTIONAL:
                continue
            if not (is_number(value) and fits(value)):
                or_none = ", or None" if name in OPTIONAL else ""
                raise ValueError(f"{name}={value!r} must be {rule if is_number(value) else 'a number'}{or_none}.")
    for name in SCHEDULES:
        value = getattr(model, name)
        if value is None and name in OPTIONAL:
            continue
        schedule, positive = make_schedule(name, value), name == "clip_range_vf"
        first, last = float(schedule(1.0)), float(schedule(0.0))
        if not (first >= 0 and last >= 0) or (positive and first == 0):
            rule = "be positive, or None for no clipping" if positive else "not be negative"
            is_constant = is_number(value) or first == last
            values = "" if is_constant else f", which is {first} at the beginning of a run and {last} at its end,"
            raise ValueError(f"{name}={value!r}{values} must {rule}.")
    for name, choices in CHOICES.items():
        if getattr(model, name) not in choices:
            raise ValueError(f"{name}={getattr(model, name)!r} is unknown: choose one of {list(choices)}.")
    anneal = model.ft_denoising_anneal
    is_pair = isinstance(anneal, (tuple, list)) and len(anneal) == 2 and all(is_number(x, whole=True) for x in anneal)
    if anneal is not None and not (is_pair and min(anneal) >= 1):
        raise ValueError(
            f"ft_denoising_anneal={anneal!r} must be two positive numbers: every how many rollouts, by how many steps."
        )
    quantiles = model.advantage_quantiles
    if not (are_ordered(quantiles) and quantiles[0] >= 0 and quantiles[1] <= 1):
        raise ValueError(f"advantage_quantiles={quantiles!r} must be two numbers with 0 <= low < high <= 1.")
    buffer_class = model.rollout_buffer_class
    is_class = isinstance(buffer_class, type)
    if buffer_class is not None and not (is_class and issubclass(buffer_class, DenoisingRolloutBuffer)):
        name = buffer_class.__name__ if is_class else repr(buffer_class)
        raise ValueError(f"rollout_buffer_class={name} keeps no denoising chains: derive it from DenoisingRolloutBuffer.")


def warn_about_training_arguments(model: Any) -> None:
    """Warn of settings that work but are probably not meant."""

    def warn(message: str) -> None:
        warnings.warn(message, stacklevel=5)

    sampler = model.policy.sampler
    n_envs = model.n_envs * ranks.size()
    n_pairs = n_envs * (model.n_steps // sampler.act_steps) * sampler.ft_denoising_steps
    if model.batch_size > n_pairs:
        warn(
            f"batch_size={model.batch_size} is more than the {n_pairs} pairs of a rollout (n_envs={n_envs} × "
            f"n_steps={model.n_steps} / act_steps={sampler.act_steps} × ft_denoising_steps={sampler.ft_denoising_steps}): "
            "each epoch is one minibatch."
        )
    if not model.pretrained_on_demonstrations:
        # Steps that annealing has frozen run what the denoiser was by then.
        if sampler.n_base_steps > 0 and (model.ft_denoising_anneal is None or model.n_rollouts == 0):
            warn(
                f"ft_denoising_steps={sampler.ft_denoising_steps}: the first {sampler.n_base_steps} denoising steps run the "
                "base denoiser, which was never trained. Pre-train it (BC), or leave ft_denoising_steps=None."
            )
        for name in ("kl_coef", "bc_coef"):
            if getattr(model, name) > 0:
                warn(
                    f"{name}={getattr(model, name)} holds the policy to its base policy, which was never trained on "
                    f"demonstrations: pre-train it (BC), or set {name}=0."
                )
    config = sampler.config
    if config.learn_eta is not None and config.has_log_std:
        warn(
            f"learn_eta={config.learn_eta!r}: the std's floor is learned, too, and begins above what η gives, which leaves "
            "η little to learn: give a floor, for instance min_sampling_std=0.1."
        )
    learned = f"std_range={config.std_range}", config.std_range[0]
    argument, floor = learned if config.learns_std else (f"min_logprob_std={config.floors[1]}", config.floors[1])
    if floor < MIN_LOGPROB_STD:
        warn(
            f"{argument}: log-densities are clamped at 2, and most of a step that is so narrow would be above, "
            f"where it has no gradient: use at least {MIN_LOGPROB_STD}."
        )
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None and vec_normalize.norm_reward and model.scale_rewards:
        warn("Rewards are scaled twice: use VecNormalize(norm_reward=False) or scale_rewards=False.")
    normalizer = model.policy.normalizer
    normalizes = normalizer.has_ranges or normalizer.is_running or model.updates_normalizer
    if vec_normalize is not None and vec_normalize.norm_obs and normalizes:
        warn("Observations are normalised twice, as the policy does it itself: use VecNormalize(norm_obs=False).")
    if model.normalize_observations and not model.updates_normalizer:
        warn("normalize_observations=True changes nothing: the policy keeps its demonstrations' ranges, or sees no vectors.")
