"""
Models as folders that are safe to share: weights as safetensors, everything else as JSON, nothing that is executed.

Reading takes a stranger's files for what they may be. File names are fixed, :mod:`~sb3_dppo.runs.schema` bounds what the
configuration may say, and a policy is only built when the weights beside it are known to be its own.
"""

import hashlib
import json
import math
import re
import reprlib
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from stable_baselines3.common import utils
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, VecTransposeImage, unwrap_vec_normalize

from sb3_dppo._version import __version__
from sb3_dppo.features.observations import parts_of_space
from sb3_dppo.runs.card import make_card
from sb3_dppo.runs.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from sb3_dppo.runs.schema import CLASSES, FORMAT, FROM_DENOISER, NORMALIZATION, SCHEDULERS, names_of, read_config
from sb3_dppo.runs.spaces import describe_space
from sb3_dppo.schedules import DecaySchedule

MOMENTS = ("mean", "var", "count")  # of running statistics
MAX_JSON_BYTES = 2**20  # of the configuration, and of the header of the weights
MAX_ROLLOUT_BYTES = 2**29  # per env
# What a folder keeps of training, and how a model calls it.
ATTRIBUTES = {name: name for name in ("num_timesteps", "n_rollouts", "pretrained_on_demonstrations")}
ATTRIBUTES |= dict(n_updates="_n_updates", progress_remaining="_current_progress_remaining")


def save_pretrained(
    model: OnPolicyAlgorithm, folder: str | Path, returns: Sequence[float] | None = None, repo_id: str | None = None
) -> None:
    """See :meth:`sb3_dppo.DPPO.save_pretrained`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file: choose another name.")
    config = _make_config(model)
    card = make_card(model, config, returns, repo_id)
    tensors = _policy_tensors(model.policy) | _statistics(model.get_vec_normalize_env())
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    # In a folder beside it and renamed, so that an interruption leaves what was there before.
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        # Not by save_file, which makes files that nobody else may read.
        (unfinished / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        config["weights_sha256"] = _sha256(unfinished / WEIGHTS_FILE)
        text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
        if len(text.encode()) > MAX_JSON_BYTES:
            raise ValueError(f"The configuration takes {len(text)} characters, more than {MAX_JSON_BYTES}: simplify spaces.")
        (unfinished / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        (unfinished / CARD_FILE).write_text(card, encoding="utf-8")
        if folder.exists():
            # Other files in it stay. If this is interrupted, the digest tells that the files don't belong together.
            for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):
                (unfinished / name).replace(folder / name)
        else:
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _policy_tensors(policy: th.nn.Module) -> dict[str, th.Tensor]:
    # SB3 has the actor's features extractor under two names.
    state = policy.state_dict()
    return {f"policy.{name}": value for name, value in state.items() if not name.startswith("features_extractor.")}


def _statistics(vec_normalize: VecNormalize | None) -> dict[str, th.Tensor]:
    if vec_normalize is None:
        return {}
    obs_rms: Any = vec_normalize.obs_rms if vec_normalize.norm_obs else {}
    by_key = {f"obs_rms.{key}": value for key, value in obs_rms.items()} if isinstance(obs_rms, dict) else {"obs_rms": obs_rms}
    statistics = {"ret_rms": vec_normalize.ret_rms, **by_key}
    return {
        f"vec_normalize.{name}.{field}": th.as_tensor(np.array(getattr(value, field), dtype=np.float64))
        for name, value in statistics.items()
        for field in MOMENTS
    }


def _make_config(model: Any) -> dict[str, Any]:
    policy, wrapper, rewards = model.policy, model.get_vec_normalize_env(), model.reward_scaler.statistics
    names = [name for name, cls in model.policy_aliases.items() if cls is type(policy)]
    if not names:
        raise ValueError(
            f"policy={type(policy).__name__} is a class of your own, which a shared folder can't hold: use one of "
            f"{list(model.policy_aliases)}, or save(path) among people who trust each other."
        )
    arguments, policy_kwargs = names_of(type(model))
    # All of them, and not only those that were given: defaults may change.
    parameters = policy._get_constructor_parameters()
    parameters = {name: parameters[name] for name in policy_kwargs if name in parameters} | dict(net_arch=policy.net_arch)
    settings = {name: _encode(name, getattr(wrapper, name)) for name in NORMALIZATION} if wrapper is not None else None
    config = dict(
        format=FORMAT,
        sb3_dppo_version=__version__,
        policy=names[0],
        observation_space=describe_space("observation_space", model.observation_space),
        action_space=describe_space("action_space", model.action_space),
        policy_kwargs=_encode("policy_kwargs", parameters),
        arguments={name: _encode(name, getattr(model, name)) for name in arguments},
        training={name: getattr(model, attribute) for name, attribute in ATTRIBUTES.items()}
        | {f"reward_{field}": float(getattr(rewards, field)) for field in MOMENTS},
        vec_normalize=settings,
    )
    # What is refused when reading is better refused now.
    read_config(type(model), {**config, "weights_sha256": ""})
    return config


def _encode(name: str, value: Any) -> Any:
    """What stands for an argument in JSON."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, utils.FloatSchedule):
        value = value.value_schedule
    if isinstance(value, utils.ConstantSchedule):
        value = float(value.val)
    if isinstance(value, utils.LinearSchedule) and value.end == 0 and value.end_fraction == 1:
        return f"lin_{float(value.start)!r}"
    if isinstance(value, DecaySchedule) and value == DecaySchedule(value.value, "linear") and not callable(value.value):
        return f"lin_{float(value.value)!r}"
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
    if isinstance(value, type) and any(classes.get(value.__name__) is value for classes in CLASSES.values()):
        return value.__name__
    if type(value).__name__ in SCHEDULERS and type(value).__module__.startswith("diffusers."):
        options = {key: item for key, item in value.config.items() if key[0] != "_" and key not in FROM_DENOISER}
        return {"_class_name": type(value).__name__, **_encode(name, options)}
    what = "a class of your own" if isinstance(value, type) else "a function" if callable(value) else reprlib.repr(value)
    raise ValueError(
        f"{name} is {what}, which a shared folder can't hold: use a number, 'lin_NUMBER' for a schedule, or a class of "
        f"PyTorch, Stable-Baselines3 or this package (model.{name.split('[')[0]} = …), or save(path)."
    )


def from_pretrained(algorithm: Any, folder: str | Path, env: Any, device: th.device | str, kwargs: dict[str, Any]) -> Any:
    """See :meth:`sb3_dppo.DPPO.from_pretrained`."""
    if "policy_kwargs" in kwargs:
        raise TypeError("policy_kwargs can't be passed to from_pretrained: the architecture is that of the folder's weights.")
    device = utils.get_device(device)
    config_path, weights_path = (_existing_file(Path(folder), name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    config = read_config(algorithm, _read_json(config_path))
    if _sha256(weights_path) != config["weights_sha256"]:
        raise ValueError(f"{WEIGHTS_FILE} is not the one that {CONFIG_FILE} was saved with: copy the whole folder anew.")
    tensors = _read_weights(weights_path, algorithm.policy_aliases[config["policy"]], config)
    statistics = _read_statistics(tensors, config["vec_normalize"])
    if env is not None:
        env = algorithm._wrap_env(maybe_make_env(env, 0), 0)
        if config["vec_normalize"] is not None:
            env = algorithm._wrap_env(_with_statistics(env, config["vec_normalize"], statistics), 0)
        utils.check_for_correct_spaces(env, config["observation_space"], config["action_space"])
    try:
        model = _make_model(algorithm, config, env, device, kwargs)
    except Exception as error:  # Constructors of networks and optimisers raise almost anything.
        if any(re.search(rf"\b{name}\b", str(error)) for name in kwargs):
            raise  # The caller's, and not the file's.
        raise ValueError(f"{CONFIG_FILE} is not of a model that can be made: {error}") from error
    # Their names have been compared with all but SB3's second ones.
    model.policy.load_state_dict({name.removeprefix("policy."): value for name, value in tensors.items()}, strict=False)
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


def _read_json(path: Path) -> Any:
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{CONFIG_FILE} is larger than {MAX_JSON_BYTES} bytes.")
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG_FILE} is no JSON ({error}).") from error


def _read_weights(path: Path, policy_class: Any, config: dict[str, Any]) -> dict[str, th.Tensor]:
    """All tensors of the file, of which those of the policy are exactly the ones that it needs."""
    with path.open("rb") as stream:
        start = stream.read(8)
    if len(start) < 8 or int.from_bytes(start, "little") > MAX_JSON_BYTES:
        raise ValueError(f"{WEIGHTS_FILE} is no safetensors file, or has a header of more than {MAX_JSON_BYTES} bytes.")
    # Names and shapes of its tensors without the memory, of which a stranger's configuration may ask for any amount. SGD, for
    # other optimisers want real parameters.
    shapes_only = dict(config["policy_kwargs"], optimizer_class=th.optim.SGD, optimizer_kwargs=None)
    try:
        with th.device("meta"):
            policy = policy_class(config["observation_space"], config["action_space"], lambda _: 1.0, **shapes_only)
    except Exception as error:
        raise ValueError(f"{CONFIG_FILE} is not of a policy that can be made: {error}") from error
    expected = {name: f"F32 of the shape {list(value.shape)}" for name, value in _policy_tensors(policy).items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: f"{part.get_dtype()} of the shape {part.get_shape()}" for name, part in slices.items()}
            names = {name for name in found if not name.startswith("vec_normalize.")}
            if names != set(expected):
                unknown, missing = (str(sorted(part))[:500] for part in (names - set(expected), set(expected) - names))
                raise ValueError(f"{WEIGHTS_FILE} does not fit {CONFIG_FILE}: unknown tensors {unknown}, missing {missing}.")
            for name, value in expected.items():
                if found[name] != value:
                    raise ValueError(f"{WEIGHTS_FILE} does not fit {CONFIG_FILE}: {name} is {found[name]}, not {value}.")
            return {name: file.get_tensor(name) for name in found}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{WEIGHTS_FILE} can't be read as safetensors ({error}).") from error


def _make_model(algorithm: Any, config: dict[str, Any], env: VecEnv | None, device: th.device, kwargs: dict[str, Any]) -> Any:
    """A model of untrained networks, with the file's state of training."""
    arguments = {name: value for name, value in config["arguments"].items() if name != "compile"} | kwargs
    policy_kwargs, training = config["policy_kwargs"], config["training"]
    model = algorithm(config["policy"], None, device=device, policy_kwargs=policy_kwargs, _init_setup_model=False, **arguments)
    model.observation_space, model.action_space = config["observation_space"], config["action_space"]
    model.n_envs = 1 if env is None else env.num_envs
    for name, attribute in ATTRIBUTES.items():
        setattr(model, attribute, training[name])
    # A flow may run more steps than it has.
    n_iterates = max(policy_kwargs["denoising_steps"], model.inference_steps or 0) + 1
    _check_rollout(model, policy_kwargs["horizon"], policy_kwargs.get("first_action", 0), n_iterates)
    if env is not None:
        model.set_env(env)
    model._setup_model()
    rewards = model.reward_scaler.statistics
    rewards.mean, rewards.var = np.array(training["reward_mean"]), np.array(training["reward_var"])
    rewards.count = training["reward_count"]
    return model


def _check_rollout(model: Any, horizon: int, first_action: int, n_iterates: int) -> None:
    """Refuse a rollout buffer, which is not allocated yet, of more bytes than a stranger's configuration may ask for."""
    decisions = model.n_steps // max(1, model.act_steps or horizon - first_action)
    parts: Any = parts_of_space(model.observation_space).values()
    n_bytes = sum(math.prod(part.shape) * min(4, part.dtype.itemsize) for part in parts)
    n_bytes += 4 * n_iterates * horizon * (math.prod(model.action_space.shape) + 1)
    if decisions * n_bytes > MAX_ROLLOUT_BYTES:
        raise ValueError(
            f"n_steps={model.n_steps} means a rollout buffer of {decisions * n_bytes} bytes per env, more than "
            f"{MAX_ROLLOUT_BYTES}: pass a smaller n_steps."
        )


def _read_statistics(tensors: dict[str, th.Tensor], settings: dict[str, Any] | None) -> dict[str, RunningMeanStd]:
    """Of all tensors of the file those that are not the policy's, as "ret_rms" and "obs_rms" or "obs_rms.KEY"."""
    found = {name: tensors.pop(name) for name in list(tensors) if name.startswith("vec_normalize.")}
    names = [] if settings is None else ["ret_rms"]
    if settings is not None and settings["norm_obs"]:
        names += ["obs_rms"] if settings["norm_obs_keys"] is None else [f"obs_rms.{key}" for key in settings["norm_obs_keys"]]
    expected = {f"vec_normalize.{name}.{field}" for name in names for field in MOMENTS}
    if set(found) != expected:
        raise ValueError(f"{WEIGHTS_FILE} has the statistics {reprlib.repr(sorted(found))}, not {sorted(expected)}.")
    statistics = {name: RunningMeanStd() for name in names}
    for name, rms in statistics.items():
        mean, var, count = (found[f"vec_normalize.{name}.{field}"] for field in MOMENTS)
        same = mean.shape == var.shape and count.shape == () and mean.dtype == var.dtype == count.dtype == th.float64
        if not same or not all(value.isfinite().all() for value in (mean, var, count)) or (var < 0).any() or count < 0:
            raise ValueError(f"{WEIGHTS_FILE}: vec_normalize.{name} is not the mean, variance and count of something.")
        rms.mean, rms.var, rms.count = mean.numpy(), var.numpy(), float(count)
    return statistics


def _with_statistics(env: VecEnv, settings: dict[str, Any], statistics: dict[str, RunningMeanStd]) -> VecEnv:
    """The env, with these statistics: in its own ``VecNormalize``, or else in one around it."""
    vec_normalize = unwrap_vec_normalize(env)
    if vec_normalize is None:
        # Images are transposed after they were normalised.
        inner = env.venv if isinstance(env, VecTransposeImage) else env
        env = vec_normalize = VecNormalize(inner, **settings)
    vec_normalize.ret_rms = statistics.pop("ret_rms")
    if vec_normalize.norm_obs != settings["norm_obs"]:
        raise ValueError(f"env has VecNormalize(norm_obs={vec_normalize.norm_obs}), but the model was trained with the other.")
    if not settings["norm_obs"]:
        return env
    by_key, space = {name.partition(".")[2]: rms for name, rms in statistics.items()}, vec_normalize.observation_space
    parts = parts_of_space(space)
    for key, rms in by_key.items():
        if key not in parts or parts[key].shape != rms.mean.shape:
            raise ValueError(
                f"env observes {space}, but the model was trained with a VecNormalize of shape {rms.mean.shape} of {key!r}: "
                "put VecNormalize(env) where it was then, for instance inside of VecFrameStack."
            )
    vec_normalize.obs_rms = by_key[""] if settings["norm_obs_keys"] is None else by_key  # type: ignore[assignment]
    for name in ("norm_obs_keys", "clip_obs", "epsilon"):
        setattr(vec_normalize, name, settings[name])
    return env
