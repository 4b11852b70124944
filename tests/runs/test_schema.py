"""Configurations and weights that were damaged, or made to do damage."""

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dppo import DPPO
from tests.damage import memory_limit
from tests.runs.shared_folders import accept_weights, change_config, change_weights, make_model

# ---------------------------------------------------------------------- hostile folders


def test_missing_files(copied: Path) -> None:
    (copied / "README.md").unlink()
    DPPO.from_pretrained(copied)
    for name in ("config.json", "model.safetensors"):
        content = (copied / name).read_bytes()
        (copied / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"lacks {name}"):
            DPPO.from_pretrained(copied)
        os.mkfifo(copied / name)  # reading it would wait forever
        with pytest.raises(ValueError, match="is not a file"):
            DPPO.from_pretrained(copied)
        (copied / name).unlink()
        (copied / name).write_bytes(content)
    for folder in (copied / "none", copied / "config.json"):
        with pytest.raises(FileNotFoundError, match="no folder that exists"):
            DPPO.from_pretrained(folder)


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: Any) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = to

    return change


MANY_STEPS = r"arguments\['inference_steps'\]=3000000: .*less than or equal to 1000"
BOX = dict(type="Box", shape=[1, 36, 36], dtype="uint8", low=0, high=255)
KWARGS, ARGUMENTS, OBS = "policy_kwargs", "arguments", "observation_space"


@pytest.mark.parametrize(
    "change,message",
    [
        (_set("extra", to=1), "config.json: extra is not known to this version"),
        (lambda config: config.pop("training"), "config.json lacks 'training'"),
        (_set("format", to="sb3-dppo 2"), "does not have the format"),
        (_set("policy", to="os.system"), "policy='os.system': Input should be 'DiffusionMlpPolicy'"),
        (_set("policy", to=["DiffusionMlpPolicy"]), "policy="),
        (_set("policy", to="DiffusionUnetPolicy"), "can be made|does not fit"),
        (_set(KWARGS, to=[]), r"policy_kwargs=\[\]: Input should be a valid dictionary"),
        (_set(KWARGS, "use_sde", to=False), r"policy_kwargs\['use_sde'\] is not known to this version"),
        (_set(KWARGS, "activation_fn", to="torch.nn.ReLU"), r"policy_kwargs\['activation_fn'\]='torch.nn.ReLU'"),
        (_set(KWARGS, "activation_fn", to="os.system"), r"policy_kwargs\['activation_fn'\]='os.system'"),
        (_set(KWARGS, "activation_fn", to="NatureCNN"), r"policy_kwargs\['activation_fn'\]='NatureCNN'"),
        (_set(KWARGS, "activation_fn", to="GELU"), None),  # well-formed
        (_set(KWARGS, "features_extractor_class", to="../x.Extractor"), "features_extractor_class"),
        (_set(KWARGS, "optimizer_class", to="LBFGS"), "optimizer_class"),
        (
            _set(KWARGS, "optimizer_kwargs", to=dict(params=[1])),
            r"policy_kwargs\['optimizer_kwargs'\]\['params'\] is not known",
        ),
        (
            _set(KWARGS, "features_extractor_kwargs", to=dict(observation_space=1)),
            r"policy_kwargs\['features_extractor_kwargs'\]\['observation_space'\] is not known",
        ),
        (
            _set(KWARGS, "net_arch", to=dict(pi=[10**12], vf=[16])),
            r"\['net_arch'\]\['pi'\]\[0\]=1000000000000: .*less than or equal to 16384",
        ),
        (_set(KWARGS, "net_arch", to=dict(pi=[16384] * 101, vf=[16])), "does not fit config.json: unknown tensors"),
        (_set(KWARGS, "net_arch", to=dict(pi=[16], vf=[16] * 100_000)), r"\['net_arch'\]\['vf'\]=.*at most 256 items"),
        (_set(KWARGS, "net_arch", to=dict(pi=[16], vf=[32])), r"policy.critic.0.weight is F32 of the shape \[16, 3\], not"),
        (_set(KWARGS, "net_arch", to=dict(pi=[16], vf=[16], x=[1])), r"\['net_arch'\]\['x'\] is not known"),
        (_set(KWARGS, "net_arch", to=dict(pi=[16], vf=[16, 16, 16])), "unknown tensors|missing"),
        (_set(KWARGS, "net_arch", to=dict(pi=[16.5], vf=[16])), "net_arch"),
        (_set(KWARGS, "horizon", to=True), r"policy_kwargs\['horizon'\]=True"),
        (_set(KWARGS, "horizon", to=-1), "horizon"),
        (_set(KWARGS, "horizon", to=16000), "does not fit|can be made"),
        (_set(KWARGS, "denoising_steps", to=10**9), "denoising_steps"),
        (_set(KWARGS, "denoising_steps", to=16000), r"policy_kwargs\['denoising_steps'\]=16000: .*less than or equal to 1000"),
        (_set(KWARGS, "time_dim", to=16384), "does not fit|can be made"),
        (lambda config: config[KWARGS].pop("horizon"), "policy_kwargs lacks 'horizon'"),
        (_set(ARGUMENTS, "tensorboard_log", to="../../.ssh"), r"arguments\['tensorboard_log'\] is not known"),
        (_set(ARGUMENTS, "pretrained", to="../stranger.zip"), r"arguments\['pretrained'\] is not known"),
        (_set(ARGUMENTS, "env", to="evil_module:Env-v0"), r"arguments\['env'\] is not known"),
        (_set(ARGUMENTS, "learning_rate", to="lambda: 0"), r"arguments\['learning_rate'\]|learning_rate='lambda"),
        (_set(ARGUMENTS, "critic_learning_rate", to="lin_x"), r"arguments\['critic_learning_rate'\]='lin_x'"),
        (_set(ARGUMENTS, "gamma", to=float("nan")), r"arguments\['gamma'\]=nan"),
        (_set(ARGUMENTS, "gamma", to=10**400), r"arguments\['gamma'\]"),
        (_set(ARGUMENTS, "n_steps", to=2**62), "rollout buffer of .* bytes per env.*pass a smaller n_steps"),
        (
            lambda config: (config[KWARGS].update(first_action=3), config[ARGUMENTS].update(n_steps=8 * 10**6)),
            "rollout buffer of .* bytes per env.*pass a smaller n_steps",
        ),
        (_set(ARGUMENTS, "act_steps", to=0), "act_steps=0"),
        (_set(ARGUMENTS, "seed", to=2**62), "can be made"),
        (_set(ARGUMENTS, "ft_denoising_anneal", to=[1, 2, 3]), "ft_denoising_anneal"),
        (lambda config: config[ARGUMENTS].update(scheduler="EulerDiscreteScheduler", inference_steps=3 * 10**6), MANY_STEPS),
        (lambda config: config[ARGUMENTS].update(scheduler="ddim", inference_steps=0), "greater than or equal to 1"),
        (
            _set(ARGUMENTS, "scheduler", to="StableDiffusionPipeline"),
            r"\['scheduler'\]='StableDiffusionPipeline': Input should be",
        ),
        (_set(ARGUMENTS, "scheduler", to="euler"), r"arguments\['scheduler'\]='euler': Input should be 'ddpm', 'ddim'"),
        (
            _set(ARGUMENTS, "scheduler", to={"_class_name": "DiffusionPipeline"}),
            r"\['_class_name'\]='DiffusionPipeline': Input should be",
        ),
        (
            _set(ARGUMENTS, "scheduler", to={"_class_name": ["DDIMScheduler"]}),
            r"\['_class_name'\]=\['DDIMScheduler'\]: Input should be",
        ),
        (
            _set(ARGUMENTS, "scheduler", to={"_class_name": "DDIMScheduler", **dict(num_train_timesteps=10**6)}),
            r"\['scheduler'\]\['num_train_timesteps'\] is not known",
        ),
        (_set(ARGUMENTS, "scheduler", to={"_class_name": "DDIMScheduler", **dict(thresholding=True)}), "thresholding"),
        (_set(ARGUMENTS, "scheduler", to={"_class_name": "DDIMScheduler", **dict(timestep_spacing="x")}), "timestep_spacing"),
        (_set("training", "n_rollouts", to="3"), r"training\['n_rollouts'\]='3'"),
        (_set("training", "more", to=3), r"training\['more'\] is not known"),
        (_set("training", "reward_var", to="nan"), r"training\['reward_var'\]='nan'"),
        (_set("vec_normalize", to={}), "vec_normalize lacks 'norm_obs'"),
        (_set(OBS, to="Box"), "observation_space='Box': Input should be"),
        (_set(OBS, "type", to="Graph"), "observation_space=.*'Graph' found using 'type' does not match"),
        (_set(OBS, "shape", to=[10**6, 10**6]), "more than 4194304 numbers"),
        (_set(OBS, "shape", to=[-3]), r"\['shape'\]\[0\]=-3: .*greater than or equal to 1"),
        (_set(OBS, "shape", to=[4]), "does not fit|numbers, but the space"),
        (_set(OBS, "dtype", to="object"), r"\['dtype'\]='object': Input should be 'float16'"),
        (_set(OBS, "dtype", to="uint8"), "observation_space=.*low has numbers that uint8 does not hold"),
        (_set(OBS, "low", to=[0.0, 1.0]), "has 2 numbers, but the space the shape"),
        (_set(OBS, "low", to=1e300), "numbers that float32 does not hold"),
        (_set(OBS, "low", to=100.0), "low"),
        (_set(OBS, to=dict(type="Discrete", n=2**62, start=0)), r"\['n'\]=.*less than or equal to 4194304"),
        (_set(OBS, to=dict(type="Discrete", n=0, start=0)), r"\['n'\]=0: .*greater than or equal to 1"),
        (
            _set(OBS, to=dict(type="MultiDiscrete", nvec=[2**62, 2**62], dtype="int64")),
            r"\['nvec'\]\[0\]=.*less than or equal to 4194304",
        ),
        (
            _set(OBS, to=dict(type="Dict", spaces=dict(a=dict(type="Dict", spaces={})))),
            "'Dict' found using 'type' does not match",
        ),
        (_set(OBS, to=dict(type="Dict", spaces={})), "can be made"),
        (_set(OBS, to=dict(type="MultiBinary", shape=[])), "does not fit"),
        (
            _set(
                OBS,
                to=dict(type="Dict", spaces={k: dict(type="Box", shape=[2**21], dtype="int8", low=0, high=1) for k in "abc"}),
            ),
            "more than 4194304 numbers",
        ),
        (_set(OBS, to=dict(type="Dict", spaces={str(i): BOX for i in range(300)})), "at most 256 items"),
        (_set("action_space", to=dict(type="Discrete", n=2, start=0)), "can be made"),
        (_set("action_space", "high", to="inf"), "infinite bounds"),
    ],
)
def test_hostile_configurations(change: Callable[[dict[str, Any]], Any], message: str | None, copied: Path) -> None:
    change_config(copied, change)
    if message is None:
        DPPO.from_pretrained(copied)
        return
    with pytest.raises(ValueError, match=message):
        DPPO.from_pretrained(copied)


@pytest.mark.parametrize(
    "changes",
    [
        dict(net_arch=dict(pi=[16384] * 255, vf=[16384] * 255)),
        dict(policy="DiffusionUnetPolicy", horizon=16384, net_arch=dict(pi=[16384] * 14, vf=[1])),
        dict(
            policy="DiffusionTransformerPolicy", horizon=16384, net_arch=dict(pi=[16384] * 256, vf=[1]), denoising_steps=1000
        ),
        dict(
            policy="DiffusionCnnPolicy",
            observation_space=dict(BOX, shape=[1, 2048, 2048]),
            features_extractor_class="VitExtractor",
            features_extractor_kwargs=dict(depth=256, width=16384, patch_size=1, spatial_dim=16384),
        ),
    ],
)
def test_networks_that_do_not_fit_in_memory(changes: dict[str, Any], copied: Path) -> None:
    """Terabytes, of which nothing is allocated."""

    def change(config: dict[str, Any]) -> None:
        for name, value in changes.items():
            (config if name in config else config[KWARGS])[name] = value

    change_config(copied, change)
    start = time.monotonic()
    with memory_limit(2**30), pytest.raises(ValueError, match="does not fit config.json"):
        DPPO.from_pretrained(copied)
    assert time.monotonic() - start < 30


def test_a_stranger_does_not_choose_to_compile(saved: Path, copied: Path) -> None:
    assert "compile" not in json.loads((saved / "config.json").read_text())[ARGUMENTS]
    change_config(copied, _set(ARGUMENTS, "compile", to=True))
    assert DPPO.from_pretrained(copied).compile is False
    assert DPPO.from_pretrained(copied, compile="auto").compile == "auto"


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[]", "does not have the format"),
        (b"[" * 500_000, "is no JSON"),
        (b" " * 2**21, "larger than"),
        (pickle.dumps(print), "is no JSON"),
        (b"9" * 10_000, "is no JSON"),
    ],
)
def test_configurations_that_are_none(content: bytes, message: str, copied: Path) -> None:
    (copied / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        DPPO.from_pretrained(copied)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda tensors: tensors.pop("policy.normalizer.action_scale"), r"missing \['policy.norma"),
        (lambda tensors: tensors.update(more=th.zeros(1)), r"unknown tensors \['more'\]"),
        (
            _set("policy.normalizer.action_scale", to=th.zeros(2)),
            r"policy.normalizer.action_scale is F32 of the shape \[2\], not F32 of the shape \[1\]",
        ),
        (_set("policy.normalizer.action_scale", to=th.zeros(1, dtype=th.double)), "policy.normalizer.action_scale is F64"),
        (_set("vec_normalize.ret_rms.mean", to=th.zeros(1)), "has the statistics"),
    ],
)
def test_weights_that_do_not_fit(change: Callable[[dict[str, Any]], Any], message: str, copied: Path) -> None:
    change_weights(copied, change)
    with pytest.raises(ValueError, match=message):
        DPPO.from_pretrained(copied)


def test_damaged_weights(copied: Path) -> None:
    path = copied / "model.safetensors"
    content = path.read_bytes()
    for damaged in (
        b"",
        content[:4],
        content[:100],
        content[:-1],
        content + b"\0",
        (2**40).to_bytes(8, "little") + content[8:],
        (2**21).to_bytes(8, "little") + b" " * 2**21,
        content.replace(b"F32", b"F99"),
        pickle.dumps(print),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not the one that"):
            DPPO.from_pretrained(copied)
        accept_weights(copied)
        with pytest.raises(ValueError, match="safetensors"):
            DPPO.from_pretrained(copied)


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_statistics_that_are_none(value: float, tmp_path: Path) -> None:
    make_model(VecNormalize(make_vec_env("Pendulum-v1", 1), norm_reward=False)).save_pretrained(tmp_path / "model")
    change_weights(tmp_path / "model", _set("vec_normalize.obs_rms.var", to=th.full((3,), value, dtype=th.double)))
    with pytest.raises(ValueError, match="not the mean, variance and count"):
        DPPO.from_pretrained(tmp_path / "model")
