"""
Models as folders that are safe to share: weights as safetensors, everything else as JSON, nothing that is executed.

Reading takes a stranger's files for what they may be. File names are fixed. Classes are named from short lists. Whatever the
configuration asks for must be what the constructors' annotations say and no larger than the weights beside it.
"""

import hashlib
import json
import math
import reprlib
import shutil
import sys
import types
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch as th
import yaml
from gymnasium import spaces
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule, check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, VecTransposeImage, unwrap_vec_normalize
from torch import nn
from torch.overrides import TorchFunctionMode

from sb3_dppo._version import __version__
from sb3_dppo.dppo import DPPO, SAMPLER_ARGUMENTS
from sb3_dppo.features.extractors import EXTRACTORS
from sb3_dppo.features.observations import parts_of_space
from sb3_dppo.policies import DiffusionActorCriticPolicy

SelfDPPO = TypeVar("SelfDPPO", bound=DPPO)

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
FORMAT = "sb3-dppo 1"

MAX_JSON_BYTES = 2**20  # of the configuration, and of the header of the weights
MAX_ITEMS = 256  # layers of a network, keys of a Dict
MAX_SIZE = 2**14  # widths, channels, the horizon
MAX_DENOISING_STEPS = 1000
MAX_OBSERVATION_SIZE = 2**22  # numbers in an observation or action: an image of 1024 × 1024 with four channels
MAX_ROLLOUT_BYTES = 2**29  # per env
MAX_INTEGER = 2**63

# What a configuration may name. A class of a user's own can't be shared without its code.
CLASSES: dict[type, Mapping[str, type]] = {
    nn.Module: {
        name: getattr(nn, name)
        for name in (
            *("CELU", "ELU", "GELU", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish", "PReLU"),
            *("ReLU", "ReLU6", "SELU", "Sigmoid", "SiLU", "Softplus", "Softsign", "Tanh", "Tanhshrink"),
        )
    },
    BaseFeaturesExtractor: EXTRACTORS,
    th.optim.Optimizer: {
        name: getattr(th.optim, name)
        for name in (
            *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"),
            "SGD",
        )
    },
}
# Whose constructors take nothing but numbers and names.
SCHEDULERS = (
    *("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"),
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler"),
)
# What make_scheduler takes from the denoiser.
DENOISER_OPTIONS = {
    *("num_train_timesteps", "beta_schedule", "trained_betas", "prediction_type", "clip_sample", "clip_sample_range")
}
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

# Constructor arguments that belong to a run or to a machine, or that stand elsewhere in the configuration.
NOT_SHARED = {
    *("policy", "env", "policy_kwargs", "pretrained", "rollout_buffer_class", "rollout_buffer_kwargs", "tensorboard_log"),
    *("stats_window_size", "verbose", "device", "_init_setup_model", "return"),
}
NOT_POLICY_KWARGS = {*SAMPLER_ARGUMENTS, "min_sampling_std", "observation_space", "action_space", "lr_schedule", "use_sde"}
NOT_POLICY_KWARGS |= {"return"}
NORMALIZATION = {
    name: hint for name, hint in get_type_hints(VecNormalize.__init__).items() if name not in ("venv", "training", "return")
}
TRAINING = dict(
    num_timesteps=int,
    n_rollouts=int,
    n_updates=int,
    progress_remaining=float,
    pretrained_on_demonstrations=bool,
    reward_mean=float,
    reward_var=float,
    reward_count=float,
)
FIELDS = (
    *("format", "sb3_dppo_version", "policy", "observation_space", "action_space", "policy_kwargs", "arguments", "training"),
    *("vec_normalize", "weights_sha256"),
)


# ---------------------------------------------------------------------- saving


def save_pretrained(model: DPPO, folder: str | Path) -> None:
    """
    See :meth:`sb3_dppo.DPPO.save_pretrained`.

    :param model: The model.
    :param folder: Where.
    :raises ValueError: naming what can't be written as JSON, before anything is written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file: choose another name.")
    config = _make_config(model)
    tensors = {f"policy.{name}": value for name, value in _policy_tensors(model.policy).items()}
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        tensors |= _statistics(vec_normalize)
    # In a folder beside it and renamed, so that an interruption leaves what was there before.
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        # Not by save_file, which makes files that nobody else may read.
        (unfinished / WEIGHTS_FILE).write_bytes(save(contiguous, metadata={"format": "pt"}))
        config["weights_sha256"] = _sha256(unfinished / WEIGHTS_FILE)
        text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
        if len(text.encode()) > MAX_JSON_BYTES:
            raise ValueError(f"The configuration takes {len(text)} characters, more than {MAX_JSON_BYTES}: simplify spaces.")
        (unfinished / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        (unfinished / CARD_FILE).write_text(_make_card(model, config), encoding="utf-8")
        if folder.exists():
            # Other files in it stay. If this is interrupted, the digest tells that the files don't belong together.
            for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):
                (unfinished / name).replace(folder / name)
        else:
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _policy_tensors(policy: DiffusionActorCriticPolicy) -> dict[str, th.Tensor]:
    # SB3 has the actor's features extractor under two names.
    return {name: value for name, value in policy.state_dict().items() if not name.startswith("features_extractor.")}


def _statistics(vec_normalize: VecNormalize) -> dict[str, th.Tensor]:
    """
    :param vec_normalize: The wrapper.
    :return: Its statistics under the names that they have in the file, float64.
    """
    statistics = {"ret_rms": vec_normalize.ret_rms}
    if vec_normalize.norm_obs:
        by_key = vec_normalize.obs_rms if isinstance(vec_normalize.obs_rms, dict) else {"": vec_normalize.obs_rms}
        statistics |= {f"obs_rms{'.' if key else ''}{key}": value for key, value in by_key.items()}
    return {
        f"vec_normalize.{name}.{field}": th.as_tensor(np.array(getattr(value, field), dtype=np.float64))
        for name, value in statistics.items()
        for field in ("mean", "var", "count")
    }


def _make_config(model: DPPO) -> dict[str, Any]:
    policy, vec_normalize, rewards = model.policy, model.get_vec_normalize_env(), model.reward_scaler.statistics
    names = [name for name, cls in model.policy_aliases.items() if cls is type(policy)]
    if not names:
        raise ValueError(
            f"policy={type(policy).__name__} is a class of your own, which a shared folder can't hold: use one of "
            f"{list(model.policy_aliases)}, or save(path) among people who trust each other."
        )
    policy_kwargs = {name: value for name, value in policy._constructor_parameters.items() if name not in NOT_POLICY_KWARGS}
    arguments = {name: getattr(model, name) for name in get_type_hints(DPPO.__init__) if name not in NOT_SHARED}
    training = dict(
        num_timesteps=model.num_timesteps,
        n_rollouts=model.n_rollouts,
        n_updates=model._n_updates,
        progress_remaining=model._current_progress_remaining,
        pretrained_on_demonstrations=model.pretrained_on_demonstrations,
        reward_mean=float(rewards.mean),
        reward_var=float(rewards.var),
        reward_count=float(rewards.count),
    )
    normalization = None
    if vec_normalize is not None:
        normalization = {name: _encode(name, getattr(vec_normalize, name)) for name in NORMALIZATION}
    config = {
        "format": FORMAT,
        "sb3_dppo_version": __version__,
        "policy": names[0],
        "observation_space": encode_space("observation_space", model.observation_space),
        "action_space": encode_space("action_space", model.action_space),
        # All of them, and not only those that were given: defaults may change.
        "policy_kwargs": _encode("policy_kwargs", {**policy_kwargs, "net_arch": policy.net_arch}),
        "arguments": {name: _encode(name, value) for name, value in arguments.items()},
        "training": training,
        "vec_normalize": normalization,
    }
    # What is refused when reading is better refused now.
    _decode_arguments("arguments", config["arguments"], DPPO.__init__, NOT_SHARED, MAX_INTEGER)
    _decode_policy_kwargs(config["policy_kwargs"])
    return config


def _encode(name: str, value: Any) -> Any:
    """
    :param name: Name of the argument, for errors.
    :param value: Its value.
    :return: What stands for it in JSON.
    :raises ValueError: if nothing does.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, FloatSchedule):
        value = value.value_schedule
    if isinstance(value, ConstantSchedule):
        value = float(value.val)
    if isinstance(value, LinearSchedule) and value.end == 0 and value.end_fraction == 1:
        return f"lin_{float(value.start)!r}"
    if type(value).__name__ == "SimpleLinearSchedule":  # RL Zoo's
        return f"lin_{float(value.initial_value)!r}"
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and not math.isnan(value):
        return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, (list, tuple)):
        return [_encode(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _encode(f"{name}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, type):
        for classes in CLASSES.values():
            if classes.get(value.__name__) is value:
                return value.__name__
    if type(value).__name__ in SCHEDULERS and type(value).__module__.startswith("diffusers."):
        options = {key: item for key, item in value.config.items() if key[0] != "_" and key not in DENOISER_OPTIONS}
        return {"_class_name": type(value).__name__, **_encode(name, options)}
    what = "a class of your own" if isinstance(value, type) else "a function" if callable(value) else reprlib.repr(value)
    raise ValueError(
        f"{name} is {what}, which a shared folder can't hold: use a number, 'lin_NUMBER' for a schedule, or a class of "
        f"PyTorch, Stable-Baselines3 or this package (model.{name.split('[')[0]} = …), or save(path)."
    )


def encode_space(name: str, space: spaces.Space) -> dict[str, Any]:
    """
    :param name: Its name, for errors.
    :param space: An observation or action space.
    :return: What :func:`decode_space` reads.
    :raises ValueError: if it can't be written.
    """
    encoded: dict[str, Any] = dict(type=type(space).__name__)
    if isinstance(space, spaces.Box):
        encoded |= dict(shape=list(space.shape), dtype=str(space.dtype))
        encoded |= dict(low=_encode_bounds(name, space.low), high=_encode_bounds(name, space.high))
    elif isinstance(space, spaces.Discrete):
        encoded |= dict(n=int(space.n), start=int(space.start))
    elif isinstance(space, spaces.MultiDiscrete):
        encoded |= dict(nvec=space.nvec.flatten().tolist(), dtype=str(space.dtype))
    elif isinstance(space, spaces.MultiBinary):
        encoded |= dict(shape=list(space.shape))
    elif isinstance(space, spaces.Dict):
        encoded |= dict(spaces={key: encode_space(f"{name}[{key!r}]", part) for key, part in space.spaces.items()})
    if type(space) not in (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Dict) or (
        decode_space(name, encoded) != space
    ):
        raise ValueError(
            f"{name}={space} can't be shared: use a Box, Discrete, MultiDiscrete, MultiBinary or a Dict of these."
        )
    return encoded


def _encode_bounds(name: str, bounds: np.ndarray) -> Any:
    values = bounds.flatten()
    return _encode(name, values[0] if (values == values[0]).all() else values.tolist())


# ---------------------------------------------------------------------- reading


def from_pretrained(
    algorithm: type[SelfDPPO], folder: str | Path, env: GymEnv | str | None, device: th.device | str, kwargs: dict[str, Any]
) -> SelfDPPO:
    """
    See :meth:`sb3_dppo.DPPO.from_pretrained`.

    :param algorithm: The model's class.
    :param folder: The folder.
    :param env: The env, or ``None``.
    :param device: Device on which the code should run.
    :param kwargs: Constructor arguments to change.
    :return: The model.
    :raises FileNotFoundError: for a missing folder or file.
    :raises ValueError: for files that are no such model.
    """
    config_path, weights_path = (_existing_file(Path(folder), name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    config = _read_config(config_path)
    policy_class: Any = algorithm.policy_aliases.get(_decode("policy", config["policy"], str))
    if policy_class is None:
        raise ValueError(f"{CONFIG_FILE}: policy={config['policy']!r} is none of {list(algorithm.policy_aliases)}.")
    observation_space, action_space = (decode_space(name, config[name]) for name in ("observation_space", "action_space"))
    policy_kwargs = _decode_policy_kwargs(config["policy_kwargs"])
    arguments = _decode_arguments("arguments", config["arguments"], DPPO.__init__, NOT_SHARED, MAX_INTEGER) | kwargs
    training = _decode_fields("training", config["training"], TRAINING)
    normalize = None
    if config["vec_normalize"] is not None:
        normalize = _decode_fields("vec_normalize", config["vec_normalize"], NORMALIZATION)

    if _sha256(weights_path) != config["weights_sha256"]:
        raise ValueError(
            f"{WEIGHTS_FILE} is not the one that {CONFIG_FILE} was saved with (weights_sha256): the folder was not copied or "
            "written completely."
        )
    tensors = _read_weights(weights_path, policy_class, observation_space, action_space, policy_kwargs)
    statistics = {name: tensors.pop(name) for name in list(tensors) if name.startswith("vec_normalize.")}
    _check_statistics(statistics, normalize)

    if env is not None:
        env = algorithm._wrap_env(maybe_make_env(env, 0), 0)
        if normalize is not None:
            env = algorithm._wrap_env(_with_statistics(env, normalize, statistics), 0)
        check_for_correct_spaces(env, observation_space, action_space)
    try:
        no_env: Any = None
        model: Any = algorithm(
            policy_class, no_env, device=device, policy_kwargs=policy_kwargs, _init_setup_model=False, **arguments
        )
        model.observation_space, model.action_space = observation_space, action_space
        model.n_envs = 1 if env is None else env.num_envs
        model._current_progress_remaining = training["progress_remaining"]
        _check_rollout(model, policy_kwargs)
        if env is not None:
            model.set_env(env)
        model._setup_model()
    except Exception as error:  # Constructors of networks and optimisers raise almost anything.
        raise ValueError(f"{CONFIG_FILE} is not of a model that can be made: {error}") from error
    policy_tensors = {name.removeprefix("policy."): value for name, value in tensors.items()}
    model.policy.load_state_dict(policy_tensors | _second_names(policy_tensors))
    _restore_training(model, training)
    return model


def _existing_file(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"folder={str(folder)!r} is no folder that exists.")
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"folder={str(folder)!r} lacks {name}: it was not made by save_pretrained, or not completely.")
    if not path.is_file():
        raise ValueError(f"{path} is not a file.")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{CONFIG_FILE} is larger than {MAX_JSON_BYTES} bytes.")
    try:
        config = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG_FILE} is no JSON ({error}).") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{CONFIG_FILE} does not have the format {FORMAT!r}: it is of another program or another version.")
    if set(config) != set(FIELDS):
        unknown, missing = sorted(set(config) - set(FIELDS)), sorted(set(FIELDS) - set(config))
        raise ValueError(f"{CONFIG_FILE} has the unknown fields {reprlib.repr(unknown)} and lacks {missing}.")
    return config


def _read_weights(
    path: Path,
    policy_class: type[DiffusionActorCriticPolicy],
    observation_space: spaces.Space,
    action_space: spaces.Space,
    policy_kwargs: dict[str, Any],
) -> dict[str, th.Tensor]:
    """
    :param path: Path of the weights.
    :param policy_class: Class of the policy.
    :param observation_space: Its observation space.
    :param action_space: Its action space.
    :param policy_kwargs: Its architecture.
    :return: All tensors of the file, of which those of the policy are the ones that it needs.
    :raises ValueError: if the file is damaged, or if tensors are missing, unknown or of other types or shapes.
    """
    with path.open("rb") as stream:
        start = stream.read(8)
    if len(start) < 8 or int.from_bytes(start, "little") > MAX_JSON_BYTES:
        raise ValueError(f"{WEIGHTS_FILE} is no safetensors file, or has a header of more than {MAX_JSON_BYTES} bytes.")
    try:
        # A policy that needs more than the file holds does not fit it. Tables are not in the file; a transformer's layers are
        # copies of one more.
        with AllocationLimit(2 * (path.stat().st_size // 4) + 2**20):
            policy = policy_class(observation_space, action_space, lambda _: 1.0, **policy_kwargs)  # type: ignore[arg-type]
    except Exception as error:
        raise ValueError(f"{CONFIG_FILE} is not of a policy that can be made: {error}") from error
    expected = {f"policy.{name}": value for name, value in _policy_tensors(policy).items()}
    dtypes = {th.float32: "F32"}
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}
            names = {name for name in found if not name.startswith("vec_normalize.")}
            if names != set(expected):
                unknown, missing = (reprlib.repr(sorted(part)) for part in (names - set(expected), set(expected) - names))
                raise ValueError(f"{WEIGHTS_FILE} does not fit {CONFIG_FILE}: unknown tensors {unknown}, missing {missing}.")
            for name, value in expected.items():
                shape, dtype = found[name].get_shape(), found[name].get_dtype()
                if shape != list(value.shape) or dtype != dtypes.get(value.dtype):
                    raise ValueError(
                        f"{WEIGHTS_FILE} does not fit {CONFIG_FILE}: {name} is {dtype} of the shape {shape}, not "
                        f"{dtypes.get(value.dtype)} of {list(value.shape)}."
                    )
            return {name: file.get_tensor(name) for name in found}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{WEIGHTS_FILE} can't be read as safetensors ({error}).") from error


class AllocationLimit(TorchFunctionMode):
    """
    A context in which new tensors are refused, before they are allocated, when they come to more than a number of elements.

    :param n_elements: How many are allowed altogether.
    """

    factories = (th.empty, th.zeros, th.ones, th.full, th.rand, th.randn, th.arange, th.linspace)

    def __init__(self, n_elements: int) -> None:
        super().__init__()
        self.left = n_elements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.factories:
            self.left -= func(*args, **{**kwargs, "device": "meta"}).numel()
        elif func is th.Tensor.clone:
            self.left -= args[0].numel()
        if self.left < 0:
            raise ValueError("it needs more numbers than the weights have.")
        return func(*args, **kwargs)


def _second_names(tensors: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    prefix = "pi_features_extractor."
    return {name.removeprefix("pi_"): value for name, value in tensors.items() if name.startswith(prefix)}


def _check_rollout(model: DPPO, policy_kwargs: dict[str, Any]) -> None:
    """
    :param model: A model that is not set up yet.
    :param policy_kwargs: Its architecture.
    :raises ValueError: if it would allocate too large a rollout buffer.
    """
    horizon, n_steps = policy_kwargs["horizon"], policy_kwargs["denoising_steps"]
    decisions = model.n_steps // max(1, model.act_steps or horizon)
    space = model.observation_space
    parts: Any = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    n_bytes = sum(math.prod(part.shape) * min(4, part.dtype.itemsize) for part in parts)
    n_bytes += 4 * (n_steps + 1) * horizon * (math.prod(model.action_space.shape or ()) + 1)
    if decisions * n_bytes > MAX_ROLLOUT_BYTES:
        raise ValueError(
            f"n_steps={model.n_steps} means a rollout buffer of {decisions * n_bytes} bytes per env, more than "
            f"{MAX_ROLLOUT_BYTES}: pass a smaller n_steps."
        )


def _restore_training(model: DPPO, training: dict[str, Any]) -> None:
    model.num_timesteps = training["num_timesteps"]
    model.n_rollouts = training["n_rollouts"]
    model._n_updates = training["n_updates"]
    model.pretrained_on_demonstrations = training["pretrained_on_demonstrations"]
    statistics = model.reward_scaler.statistics
    statistics.mean, statistics.var = (np.array(training[name]) for name in ("reward_mean", "reward_var"))
    statistics.count = training["reward_count"]


# ---------------------------------------------------------------------- VecNormalize


def _check_statistics(tensors: dict[str, th.Tensor], settings: dict[str, Any] | None) -> None:
    """
    :param tensors: Those of the file that are not the policy's.
    :param settings: Arguments of ``VecNormalize``, or ``None`` if there was none.
    :raises ValueError: if they don't belong together.
    """
    names = []
    if settings is not None:
        names = ["ret_rms"]
        if settings["norm_obs"]:
            keys = settings["norm_obs_keys"]
            names += ["obs_rms"] if keys is None else [f"obs_rms.{key}" for key in keys]
    expected = {f"vec_normalize.{name}.{field}" for name in names for field in ("mean", "var", "count")}
    if set(tensors) != expected:
        raise ValueError(f"{WEIGHTS_FILE} has the statistics {reprlib.repr(sorted(tensors))}, not {sorted(expected)}.")
    for name in names:
        mean, var, count = (tensors[f"vec_normalize.{name}.{field}"] for field in ("mean", "var", "count"))
        same = mean.shape == var.shape and count.shape == () and mean.dtype == var.dtype == count.dtype == th.float64
        if not same or not all(value.isfinite().all() for value in (mean, var, count)) or (var < 0).any() or count < 0:
            raise ValueError(f"{WEIGHTS_FILE}: vec_normalize.{name} is not the mean, variance and count of something.")


def _with_statistics(env: VecEnv, settings: dict[str, Any], tensors: dict[str, th.Tensor]) -> VecEnv:
    """
    :param env: The env to learn in.
    :param settings: Arguments of the ``VecNormalize`` that the model was trained with.
    :param tensors: Its statistics.
    :return: The env, with these statistics: in its own ``VecNormalize``, or else in one around it.
    :raises ValueError: if they are of other observations.
    """

    def statistics(name: str) -> RunningMeanStd:
        rms = RunningMeanStd()
        mean, var, count = (tensors[f"vec_normalize.{name}.{field}"].numpy() for field in ("mean", "var", "count"))
        rms.mean, rms.var, rms.count = mean, var, float(count)
        return rms

    vec_normalize = unwrap_vec_normalize(env)
    if vec_normalize is None:
        # Images are transposed after they were normalised.
        inner = env.venv if isinstance(env, VecTransposeImage) else env
        env = vec_normalize = VecNormalize(inner, **settings)
    vec_normalize.ret_rms = statistics("ret_rms")
    if vec_normalize.norm_obs != settings["norm_obs"]:
        raise ValueError(f"env has VecNormalize(norm_obs={vec_normalize.norm_obs}), but the model was trained with the other.")
    if not settings["norm_obs"]:
        return env
    keys = settings["norm_obs_keys"]
    found = {"": statistics("obs_rms")} if keys is None else {key: statistics(f"obs_rms.{key}") for key in keys}
    space = vec_normalize.observation_space
    parts = parts_of_space(space)
    for key, rms in found.items():
        if key not in parts or parts[key].shape != rms.mean.shape:
            raise ValueError(
                f"env observes {space}, but the model was trained with a VecNormalize of shape {rms.mean.shape} of {key!r}: "
                "put VecNormalize(env) where it was then, for instance inside of VecFrameStack."
            )
    vec_normalize.obs_rms = found[""] if keys is None else found  # type: ignore[assignment]
    for name in ("norm_obs_keys", "clip_obs", "epsilon"):
        setattr(vec_normalize, name, settings[name])
    return env


# ---------------------------------------------------------------------- from JSON


def _decode_policy_kwargs(values: Any) -> dict[str, Any]:
    decoded = _decode_arguments("policy_kwargs", values, DiffusionActorCriticPolicy.__init__, NOT_POLICY_KWARGS)
    for name in ("features_extractor_class", "optimizer_class", "horizon", "denoising_steps", "net_arch"):
        if decoded.get(name) is None:
            raise ValueError(f"{CONFIG_FILE} lacks policy_kwargs[{name!r}].")
    if set(decoded["net_arch"]) != {"pi", "vf"}:
        raise ValueError(f"{CONFIG_FILE}: net_arch must have pi and vf, not {reprlib.repr(decoded['net_arch'])}.")
    if not 1 <= decoded["denoising_steps"] <= MAX_DENOISING_STEPS or decoded["horizon"] < 1:
        raise ValueError(f"{CONFIG_FILE}: denoising_steps must be 1 to {MAX_DENOISING_STEPS} and horizon positive.")
    for name, not_given in (
        ("features_extractor", {"self", "observation_space", "return"}),
        ("optimizer", {"self", "params", "lr", "return"}),
    ):
        values = decoded.get(f"{name}_kwargs")
        if values is not None:
            constructor = decoded[f"{name}_class"].__init__
            decoded[f"{name}_kwargs"] = _decode_arguments(f"{name}_kwargs", values, constructor, not_given)
    return decoded


def _decode_arguments(
    name: str, values: Any, function: Callable[..., Any], excluded: set[str], largest: int = MAX_SIZE
) -> dict[str, Any]:
    """
    :param name: What they are, for errors.
    :param values: Arguments from JSON.
    :param function: What they are of, with annotations.
    :param excluded: Names that may not be among them.
    :param largest: Largest integer.
    :return: The arguments.
    :raises ValueError: for an unknown name, or a value that is not of the annotated type.
    """
    hints = {key: hint for key, hint in get_type_hints(function).items() if key not in excluded}
    if not isinstance(values, dict) or not set(values) <= set(hints):
        unknown = reprlib.repr(sorted(set(values) - set(hints)) if isinstance(values, dict) else values)
        raise ValueError(f"{CONFIG_FILE}: {name} has {unknown}, which this version does not know.")
    return {key: _decode(f"{name}[{key!r}]", value, hints[key], largest) for key, value in values.items()}


def _decode_fields(name: str, values: Any, hints: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(values, dict) or set(values) != set(hints):
        raise ValueError(f"{CONFIG_FILE}: {name} must have the fields {sorted(hints)}, no others.")
    return {key: _decode(f"{name}[{key!r}]", value, hints[key], MAX_INTEGER) for key, value in values.items()}


def _decode(name: str, value: Any, hint: Any, largest: int = MAX_SIZE) -> Any:
    """
    :param name: Where it stands, for errors.
    :param value: A value from JSON.
    :param hint: The type that it stands for.
    :param largest: Largest integer, in absolute value.
    :return: A value of that type.
    :raises ValueError: if it is not of that type.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in inner:
            try:
                return _decode(name, value, option, largest)
            except ValueError:
                continue
    elif hint is Any:
        return _decode_scheduler(name, value)
    elif origin is type and isinstance(value, str) and value in CLASSES.get(inner[0], {}):
        return CLASSES[inner[0]][value]
    elif origin is tuple and isinstance(value, list) and len(value) == len(inner):
        return tuple(_decode(name, item, part, largest) for item, part in zip(value, inner, strict=True))
    elif origin is list and isinstance(value, list) and len(value) <= MAX_ITEMS:
        return [_decode(name, item, inner[0], largest) for item in value]
    elif origin is dict and isinstance(value, dict) and len(value) <= MAX_ITEMS:
        # What is in a dictionary of anything is checked by those who know what it is for.
        return value if inner[1] is Any else {key: _decode(name, item, inner[1], largest) for key, item in value.items()}
    elif origin is Callable and isinstance(value, str):
        return value  # of a schedule, which DPPO reads
    elif hint is float and value in ("inf", "-inf"):
        return float(value)
    elif _is_scalar(value, hint, largest):
        return value
    raise ValueError(
        f"{CONFIG_FILE}: {name}={reprlib.repr(value)} is not {getattr(hint, '__name__', hint)} of a sensible size."
    )


def _is_scalar(value: Any, hint: Any, largest: int) -> bool:
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= largest
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    return hint in (str, bool, type(None)) and isinstance(value, hint)


def _decode_scheduler(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or value.get("_class_name") not in SCHEDULERS:
        raise ValueError(f"{CONFIG_FILE}: {name}={reprlib.repr(value)} must be a name, or options with one as _class_name.")
    import diffusers

    constructor = getattr(diffusers, value["_class_name"]).__init__
    options = {key: item for key, item in value.items() if key != "_class_name"}
    decoded = _decode_arguments(name, options, constructor, DENOISER_OPTIONS | {"return"})
    return {"_class_name": value["_class_name"], **decoded}


SPACE_FIELDS: dict[str, dict[str, Any]] = {
    "Box": dict(shape=list[int], dtype=str, low=Any, high=Any),
    "Discrete": dict(n=int, start=int),
    "MultiDiscrete": dict(nvec=list[int], dtype=str),
    "MultiBinary": dict(shape=list[int]),
    "Dict": dict(spaces=dict[str, Any]),
}


def decode_space(name: str, value: Any) -> spaces.Space:
    """
    :param name: Name of the space, for errors.
    :param value: What :func:`encode_space` made.
    :return: The space.
    :raises ValueError: if it is no such thing, or too large.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    fields = SPACE_FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None or set(value) != {"type", *fields}:
        raise ValueError(f"{CONFIG_FILE}: {name}={reprlib.repr(value)} is no {', '.join(SPACE_FIELDS)} with its fields.")
    decoded = {
        key: value[key] if hint is Any else _decode(f"{name}[{key!r}]", value[key], hint, MAX_INTEGER)
        for key, hint in fields.items()
    }
    shape, dtype = decoded.get("shape", [1]), decoded.get("dtype", "int64")
    if min(shape, default=1) < 1 or math.prod(shape) > MAX_OBSERVATION_SIZE or dtype not in DTYPES:
        raise ValueError(f"{CONFIG_FILE}: {name} has the shape {shape} and dtype {dtype!r}: it is too large or unknown.")
    if kind == "Dict":
        return _decode_dict_space(name, decoded["spaces"])
    if kind == "Box":
        low, high = (_decode_bounds(f"{name}.{key}", decoded[key], shape, dtype) for key in ("low", "high"))
    try:
        if kind == "Box":
            return spaces.Box(low, high, tuple(shape), np.dtype(dtype))  # type: ignore[arg-type]
        if kind == "Discrete":
            return spaces.Discrete(decoded["n"], start=decoded["start"])
        if kind == "MultiDiscrete":
            return spaces.MultiDiscrete(decoded["nvec"], dtype=np.dtype(dtype))  # type: ignore[arg-type]
        return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    except (AssertionError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{CONFIG_FILE}: {name}={reprlib.repr(value)} is no such space: {error}") from error


def _decode_dict_space(name: str, values: dict[str, Any]) -> spaces.Dict:
    parts, size = OrderedDict(), 0
    for key, value in values.items():
        if isinstance(value, dict) and value.get("type") == "Dict":
            raise ValueError(f"{CONFIG_FILE}: {name}[{key!r}] is a Dict in a Dict.")
        parts[key] = decode_space(f"{name}[{key!r}]", value)
        size += math.prod(parts[key].shape or ())
        if size > MAX_OBSERVATION_SIZE:
            raise ValueError(f"{CONFIG_FILE}: {name} has more than {MAX_OBSERVATION_SIZE} numbers.")
    # Ordered, because a Dict sorts other dictionaries, but the order is that of the normalisation's rows.
    return spaces.Dict(parts)  # type: ignore[arg-type]


def _decode_bounds(name: str, value: Any, shape: list[int], dtype: str) -> np.ndarray:
    """
    :param name: For errors.
    :param value: One number for all, or one for each.
    :param shape: Shape of the space.
    :param dtype: Its type.
    :return: The bounds, of this shape and type.
    """
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) not in (1, math.prod(shape)):
        raise ValueError(f"{CONFIG_FILE}: {name} has {len(numbers)} numbers, but the space the shape {shape}.")
    is_float = np.dtype(dtype).kind == "f"
    exact = [_decode(name, number, float if is_float else int, 2**64) for number in numbers]
    with np.errstate(over="ignore"):
        limits: Any = np.finfo(dtype) if is_float else np.iinfo(dtype)  # type: ignore[arg-type]
        low, high = limits.min.item() if is_float else limits.min, limits.max.item() if is_float else limits.max
        if any(not low <= number <= high and number not in (-math.inf, math.inf) for number in exact):
            raise ValueError(f"{CONFIG_FILE}: {name} has numbers that {dtype} does not hold.")
        return np.broadcast_to(np.array(exact, dtype=dtype), math.prod(shape)).reshape(shape).copy()


# ---------------------------------------------------------------------- the card


def _make_card(model: DPPO, config: dict[str, Any]) -> str:
    """
    :param model: The model.
    :param config: Its configuration.
    :return: A model card: Markdown after YAML, as model hubs read it.
    """
    spec = None if model.env is None else model.env.get_attr("spec")[0]
    env_id = getattr(spec, "id", None)
    tags = ["reinforcement-learning", "diffusion-policy", "dppo", "stable-baselines3", *([env_id] if env_id else [])]
    metadata = dict(library_name="sb3-dppo", pipeline_tag="reinforcement-learning", tags=tags)
    training = config["training"]
    how = f"{training['num_timesteps']} env steps of DPPO"
    if training["pretrained_on_demonstrations"]:
        how = f"demonstrations (behaviour cloning), then {how}"
    hyperparameters = json.dumps({name: config[name] for name in ("policy_kwargs", "arguments")}, indent=2, ensure_ascii=False)
    env = json.dumps(env_id) if env_id else "env"
    normalized = ""
    if config["vec_normalize"] is not None:
        normalized = "\nIts `VecNormalize` statistics are in the folder: `from_pretrained` wraps `env` in it.\n"
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---

# {config["policy"]} {f"for {env_id}" if env_id else "by DPPO"}

A diffusion policy, trained on {how} ([Ren et al. 2024](https://arxiv.org/abs/2409.00588)) with sb3-dppo {__version__} and
Stable-Baselines3. The folder holds numbers and text, nothing that is executed.

| | |
| --- | --- |
| Env | {f"`{env_id}`" if env_id else "not registered"} |
| Observations | `{_one_line(model.observation_space)}` |
| Actions | `{_one_line(model.action_space)}` |
| Parameters | {sum(parameter.numel() for parameter in model.policy.denoiser.parameters())} in the denoiser |

## Usage

```python
from sb3_dppo import DPPO
from stable_baselines3.common.evaluation import evaluate_policy

model = DPPO.from_pretrained("path/of/this/folder", env={env})
print(evaluate_policy(model, model.get_env(), n_eval_episodes=10))
model.learn(100_000, reset_num_timesteps=False)  # training goes on
```
{normalized}
## Results

None were recorded: see the usage above for how to measure them.

## Hyperparameters

```json
{hyperparameters}
```
"""


def _one_line(space: spaces.Space) -> str:
    return " ".join(str(space).split()).replace("`", "'").replace("|", "\\|")
