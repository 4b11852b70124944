"""What all importers do: make a model of what is known about a policy, and give it the weights."""

from collections.abc import Mapping
from typing import Any

import torch as th

from sb3_dppo.arguments import by_network
from sb3_dppo.dppo import DPPO
from sb3_dppo.policies import PAPER_POLICY_KWARGS

Tensors = dict[str, th.Tensor]
# Of which an importer and a user may know a part each.
IN_PARTS = ("net_arch", "net_kwargs")


def merged_policy_kwargs(inferred: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param inferred: What a policy's files tell.
    :param given: What the user says.
    :return: Both together and, for the rest, the paper's.
    :raises ValueError: where they contradict each other.
    """
    merged = {**PAPER_POLICY_KWARGS, **given, **inferred}
    for name, value in inferred.items():
        if name in IN_PARTS:
            said = dict(by_network(given.get(name)) or {})
            for part, known in value.items():
                if part in said and not _same(said[part], known):
                    raise ValueError(f"policy_kwargs[{name!r}][{part!r}] contradicts the checkpoint, which has {known}.")
            merged[name] = {**PAPER_POLICY_KWARGS.get(name, {}), **said, **value}
        elif name in given and not _same(given[name], value):
            raise ValueError(f"policy_kwargs[{name!r}]={given[name]} contradicts the checkpoint, which has {value}.")
    return merged


def _same(given: Any, known: Any) -> bool:
    """Whether they are equal; it does not matter of what type a sequence of widths is."""
    sequences = isinstance(given, (list, tuple)) and isinstance(known, (list, tuple))
    return list(given) == list(known) if sequences else given == known


def check_sizes(n_weights: int, net_arch: Any, tensors: Tensors) -> None:
    """
    Widths are read off the rows of matrices: a small file could ask for a huge model, whose matrices it does not hold.

    :param n_weights: At least how many weights such a model has.
    :param net_arch: Its widths, for the error.
    :param tensors: All tensors of the file.
    :raises ValueError: if they can't be the weights of such a model.
    """
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
    if n_weights > sum(storages.values()):
        raise ValueError(f"checkpoint does not hold the matrices between its layers of {net_arch}.")


def make_pretrained_model(
    policy: str,
    env_or_spaces: Any,
    policy_kwargs: dict[str, Any],
    dppo_kwargs: dict[str, Any],
    denoiser: Tensors,
    base_denoiser: Tensors,
    critic: Tensors,
    hint: str = "",
) -> DPPO:
    """
    :param policy: Name of the policy.
    :param env_or_spaces: The env, or its observation space and action space.
    :param policy_kwargs: The policy's arguments.
    :param dppo_kwargs: DPPO's. The floors of the std are the paper's, 0.1, otherwise.
    :param denoiser: Weights under our names, as are the others.
    :param base_denoiser: Those of the frozen one.
    :param critic: None, for one that has to be trained.
    :param hint: What to do about weights that don't fit, for the error.
    :return: The model.
    :raises ValueError: if the weights don't fit.
    """
    dppo_kwargs = dict(min_sampling_std=0.1, min_logprob_std=0.1) | dppo_kwargs
    if isinstance(env_or_spaces, tuple):
        nothing: Any = None
        model = DPPO(policy, nothing, policy_kwargs=policy_kwargs, _init_setup_model=False, **dppo_kwargs)
        model.observation_space, model.action_space = env_or_spaces
        model.n_envs = 1
        model._setup_model()
    else:
        model = DPPO(policy, env_or_spaces, policy_kwargs=policy_kwargs, **dppo_kwargs)
    model.pretrained_on_demonstrations = True
    try:
        model.policy.denoiser.load_state_dict(denoiser)
        model.policy.base_denoiser.load_state_dict(base_denoiser)
        if critic:
            model.policy.critic.load_state_dict(critic)
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint does not fit the spaces {model.observation_space} and {model.action_space} or "
            f"policy_kwargs={policy_kwargs} (the horizon). {hint}{error}"
        ) from error
    return model
