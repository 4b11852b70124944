"""
What ``config.json`` of a shared model may hold: pydantic types, made of the constructors' own annotations, each bounded.

Whoever made the file, what comes out is numbers and names of a sensible size, spaces, and classes from short lists.
"""

import reprlib
import types
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch as th
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn
from typing_extensions import NotRequired

from sb3_dppo.diffusion.process import MAX_DENOISING_STEPS
from sb3_dppo.features.extractors import EXTRACTORS
from sb3_dppo.runs.files import CONFIG_FILE
from sb3_dppo.runs.names import constructor_arguments
from sb3_dppo.runs.spaces import MAX_ITEMS, Finite, Infinity, Space, make_fields

FORMAT = "sb3-dppo 1"
MAX_SIZE = 2**14  # widths, channels, the horizon
MAX_INTEGER = 2**63

# What a configuration may name. A class of a user's own can't be shared without its code.
ACTIVATIONS = "CELU ELU GELU Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 SELU Sigmoid SiLU "
ACTIVATIONS += "Softplus Softsign Tanh Tanhshrink"
OPTIMIZERS = "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD"
CLASSES: dict[type, Mapping[str, type]] = {
    nn.Module: {name: getattr(nn, name) for name in ACTIVATIONS.split()},
    BaseFeaturesExtractor: EXTRACTORS,
    th.optim.Optimizer: {name: getattr(th.optim, name) for name in OPTIMIZERS.split()},
}
# Whose constructors take nothing but numbers and names.
SCHEDULERS = (
    *("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"),
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler"),
)
SCHEDULER_NAMES = ("ddpm", "ddim", *SCHEDULERS)
# What a sampler takes from the denoiser.
FROM_DENOISER = "num_train_timesteps beta_schedule trained_betas prediction_type clip_sample clip_sample_range".split()
# Constructor arguments that belong to a run or to a machine, or that stand elsewhere in the configuration.
NOT_SHARED = {
    *("policy", "env", "policy_kwargs", "pretrained", "rollout_buffer_class", "rollout_buffer_kwargs", "tensorboard_log"),
    *("stats_window_size", "verbose", "device", "compile", "_init_setup_model"),
}
NOT_POLICY_KWARGS = {"observation_space", "action_space", "lr_schedule", "use_sde"}
REQUIRED = ("features_extractor_class", "optimizer_class", "horizon", "denoising_steps", "net_arch")

Steps = Annotated[int, Field(strict=True, ge=1, le=MAX_DENOISING_STEPS)]
Layers = Annotated[int, Field(strict=True, ge=1, le=MAX_ITEMS)]
Size = Annotated[int, Field(strict=True, ge=1, le=MAX_SIZE)]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_INTEGER)]
Name = Annotated[str, Field(max_length=1024)]
Flag = Annotated[bool, Field(strict=True)]
# A number, also as a string as YAML reads "1e-4", or what begins with it and falls to 0 linearly.
Schedule = Finite | Annotated[str, Field(pattern=r"^(lin_)?[0-9.eE+-]+$", max_length=40)]
Widths = Annotated[list[Size], Field(max_length=MAX_ITEMS)]
# What annotations don't say.
SPECIAL: dict[str, Any] = dict(
    denoising_steps=Steps,
    inference_steps=Steps | None,
    ft_denoising_steps=Steps | None,
    horizon=Size,
    depth=Layers,
    net_arch=make_fields("NetArch", dict(pi=Widths, vf=Widths)),
    scheduler=Literal[SCHEDULER_NAMES] | dict[Name, Any],
)
TRAINING = dict(num_timesteps=Count, n_rollouts=Count, n_updates=Count, pretrained_on_demonstrations=Flag)
TRAINING |= dict.fromkeys(("progress_remaining", "reward_mean", "reward_var", "reward_count"), Finite)


def bounded(hint: Any, largest: int = MAX_SIZE) -> Any:
    """The type of what stands for an annotation in JSON, strict and bounded; ``None``, that of null, if nothing does."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if any(get_origin(option) is Callable for option in inner):
            return Schedule | None if type(None) in inner else Schedule
        named = any(get_origin(option) is type for option in inner)
        options = [bounded(option, largest) for option in inner if not (named and option is str)]
        return Union[tuple(option for option in options if option is not None or type(None) in inner)]  # noqa: UP007
    if origin is type and inner[0] in CLASSES:
        classes = CLASSES[inner[0]]
        return Annotated[Literal[tuple(classes)], AfterValidator(classes.__getitem__)]
    if origin is tuple:
        return tuple[tuple(bounded(part, largest) for part in inner)]  # type: ignore[misc]
    if origin is list:
        return Annotated[list[bounded(inner[0], largest)], Field(max_length=MAX_ITEMS)]  # type: ignore[misc]
    if origin is dict:
        # Options of a class, which are read when it is known.
        return Annotated[dict[Name, Any], Field(max_length=MAX_ITEMS)]
    if origin is Literal:
        return hint
    integer = Annotated[int, Field(strict=True, ge=-largest, le=largest)]
    return {int: integer, float: Finite | Infinity, str: Name, bool: Flag}.get(hint)


NORMALIZATION = {name: bounded(hint, MAX_INTEGER) for name, hint in constructor_arguments(VecNormalize).items()}
del NORMALIZATION["venv"], NORMALIZATION["training"]


def _some_of(hints: Mapping[str, Any], excluded: Collection[str] = (), largest: int = MAX_SIZE) -> Any:
    """The type of a constructor's arguments in JSON, of which those that are not required may be absent."""
    fields = {name: SPECIAL.get(name) or bounded(hint, largest) for name, hint in hints.items() if name not in excluded}
    return make_fields("Arguments", {name: hint if name in REQUIRED else NotRequired[hint] for name, hint in fields.items()})


def names_of(algorithm: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The annotations of the algorithm's arguments, and of its policies', that are shared."""
    own, policy = constructor_arguments(algorithm), dict[str, Any]()
    for policy_class in algorithm.policy_aliases.values():
        policy |= constructor_arguments(policy_class)
    policy = {name: hint for name, hint in policy.items() if name not in own and name not in NOT_POLICY_KWARGS}
    return {name: hint for name, hint in own.items() if name not in NOT_SHARED}, policy


@cache
def _config_of(algorithm: Any) -> Any:
    arguments, policy_kwargs = names_of(algorithm)
    fields = dict(
        format=Literal[FORMAT],  # type: ignore[valid-type]
        sb3_dppo_version=Name,
        policy=Literal[tuple(algorithm.policy_aliases)],
        observation_space=Space,
        action_space=Space,
        policy_kwargs=_some_of(policy_kwargs),
        # Folders of before may have "compile", which is not heeded: a stranger's would start a compiler.
        arguments=_some_of({"compile": bool | str, **arguments}, largest=MAX_INTEGER),
        training=make_fields("Training", TRAINING),
        vec_normalize=make_fields("Normalization", NORMALIZATION) | None,
        weights_sha256=Name,
    )
    return make_fields("Config", fields)


def read_config(algorithm: Any, config: Any) -> dict[str, Any]:
    """The configuration, from JSON, with classes and spaces for what stands for them; errors name the field."""
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{CONFIG_FILE} does not have the format {FORMAT!r}: it is of another program or another version.")
    config = read(_config_of(algorithm), config)
    values = config["policy_kwargs"]
    for name, given in (("features_extractor", {"observation_space"}), ("optimizer", {"params", "lr"})):
        if values.get(f"{name}_kwargs") is not None:
            options = _some_of(constructor_arguments(values[f"{name}_class"]), given)
            values[f"{name}_kwargs"] = read(options, values[f"{name}_kwargs"], f"policy_kwargs['{name}_kwargs']")
    scheduler, path = config["arguments"].get("scheduler"), "arguments['scheduler']"
    if isinstance(scheduler, dict):
        import diffusers

        name = read(Literal[SCHEDULERS], scheduler.pop("_class_name", None), f"{path}['_class_name']")
        options = _some_of(constructor_arguments(getattr(diffusers, name)), FROM_DENOISER)
        config["arguments"]["scheduler"] = {"_class_name": name, **read(options, scheduler, path)}
    return config


def read(kind: Any, value: Any, path: str = "") -> Any:
    """The value, from JSON, as this type makes it. Errors name the field, which stands at this path of the configuration."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    for part in first["loc"]:
        # Others say which of several types was tried.
        if part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value)):
            value, path = value[part], f"{path}[{part!r}]" if path else str(part)  # type: ignore[index]
    where = f"{CONFIG_FILE}: {path}" if path else CONFIG_FILE
    if first["type"] == "missing":
        raise ValueError(f"{where} lacks {first['loc'][-1]!r}.")
    if first["type"] == "extra_forbidden":
        raise ValueError(f"{where} is not known to this version.")
    raise ValueError(f"{where}={reprlib.repr(value)}: {first['msg'].removeprefix('Value error, ')}.")
