"""Sharing models as folders without executable content."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from diffusers import DDIMScheduler
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, unwrap_vec_normalize
from torch import nn

from sb3_dppo import BC, DPPO, Demonstrations
from sb3_dppo.features.extractors import VitExtractor
from sb3_dppo.runs.schema import CLASSES
from tests.runs.shared_folders import DICT, FILES, IMAGE, SMALL, SpaceEnv, make_model

# ---------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "policy,space,policy_kwargs",
    [
        ("DiffusionMlpPolicy", spaces.Box(-1, 1, (3,)), dict(layer_norm=True, activation_fn=nn.Mish, obs_encoder_arch=[8, 8])),
        (
            "DiffusionMlpPolicy",
            spaces.Discrete(5),
            dict(optimizer_class=th.optim.Adam, optimizer_kwargs=dict(betas=(0.8, 0.9))),
        ),
        ("DiffusionMlpPolicy", spaces.MultiDiscrete([2, 3]), {}),
        ("DiffusionMlpPolicy", spaces.MultiBinary(4), {}),
        ("DiffusionUnetPolicy", spaces.Box(-1, 1, (3,)), dict(net_arch=dict(pi=[8, 16], vf=[16, 16, 16]))),
        ("DiffusionTransformerPolicy", spaces.Box(-1, 1, (3,)), dict(net_arch=dict(pi=[16, 16], vf=[16]))),
        ("DiffusionCnnPolicy", IMAGE, dict(features_extractor_kwargs=dict(features_dim=16))),
        ("DiffusionMultiInputPolicy", DICT, dict(features_extractor_kwargs=dict(cnn_output_dim=16))),
        (
            "DiffusionMultiInputPolicy",
            DICT,
            dict(
                features_extractor_class=VitExtractor,
                features_extractor_kwargs=dict(patch_size=12, width=16, spatial_dim=8, random_shift=2),
            ),
        ),
    ],
)
def test_round_trip(policy: str, space: spaces.Space, policy_kwargs: dict[str, Any], tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: SpaceEnv(space)] * 2)
    model = make_model(env, policy, policy_kwargs={**SMALL, **policy_kwargs}, ft_denoising_steps=4)
    model.learn(32)
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == FILES
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1
    loaded = DPPO.from_pretrained(tmp_path / "model", env=env, device="cpu")
    state, expected = loaded.policy.state_dict(), model.policy.state_dict()
    assert state.keys() == expected.keys() and all(th.equal(state[name], expected[name]) for name in state)
    obs = env.reset()
    for deterministic in (True, False):
        for m in (model, loaded):
            m.set_random_seed(3)
        np.testing.assert_array_equal(
            loaded.predict(obs, None, None, deterministic)[0], model.predict(obs, None, None, deterministic)[0]
        )
    assert loaded.observation_space == model.observation_space and loaded.action_space == model.action_space
    if isinstance(loaded.observation_space, spaces.Dict):
        assert list(loaded.observation_space) == list(model.observation_space)  # type: ignore[call-overload]
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 64
    # And what was loaded can be shared again.
    loaded.save_pretrained(tmp_path / "again")


def test_arguments_and_training_state(tmp_path: Path) -> None:
    arguments: dict[str, Any] = dict(
        learning_rate="lin_1e-3",
        critic_learning_rate=np.float64(2e-3),
        clip_range=LinearSchedule(0.2, 0.0, 1.0),
        min_sampling_std="lin_0.3",
        scheduler=DDIMScheduler(set_alpha_to_one=False, clip_sample_range=3.0),
        inference_steps=2,
        ft_denoising_anneal=(1, 1),
        advantage_quantiles=(0.01, 0.99),
        noise_clip=float("inf"),
        max_grad_norm=0.5,
        deterministic_noise="zero",
    )
    model = make_model(**arguments)
    rng = np.random.default_rng(0)
    BC(model, Demonstrations(rng.normal(size=(50, 3)), rng.uniform(-2, 2, (50, 1)), np.array([20, 30]))).train(
        1, progress_bar=False
    )
    model.learn(32)
    model.save_pretrained(tmp_path / "model")
    loaded = DPPO.from_pretrained(tmp_path / "model")
    assert loaded.learning_rate == "lin_1e-3" and loaded.critic_learning_rate == 2e-3 and loaded.clip_range(0.5) == 0.1
    assert loaded.policy.process.scheduler.config.set_alpha_to_one is False
    th.testing.assert_close(loaded.policy.process.table, model.policy.process.table, rtol=0, atol=0)
    assert model.ft_denoising_steps == loaded.ft_denoising_steps == loaded.policy.sampler.ft_denoising_steps == 1  # annealed
    for name in (
        "ft_denoising_anneal",
        "advantage_quantiles",
        "noise_clip",
        "max_grad_norm",
        "num_timesteps",
        "n_rollouts",
        "seed",
    ):
        assert getattr(loaded, name) == getattr(model, name), name
    assert loaded.pretrained_on_demonstrations and loaded._n_updates == model._n_updates
    assert loaded.policy.normalizer.has_ranges
    assert loaded.policy.sampler.config.min_sampling_std == model._sampler_config().min_sampling_std
    for field in ("mean", "var", "count"):
        assert getattr(loaded.reward_scaler.statistics, field) == getattr(model.reward_scaler.statistics, field)
    with pytest.raises(ValueError, match="no env to learn in"):
        loaded.learn(8)


def test_changing_arguments(saved: Path) -> None:
    loaded = DPPO.from_pretrained(str(saved), scheduler="ddim", inference_steps=2, act_steps=1, n_steps=10)
    assert loaded.policy.sampler.inference_steps == 2 and loaded.policy.sampler.act_steps == 1
    loaded = DPPO.from_pretrained(saved, env=make_vec_env("Pendulum-v1", 3), learning_rate=lambda _: 1e-5)
    assert loaded.learn(48).num_timesteps == 48
    with pytest.raises(TypeError, match=r"from_pretrained\(\).*'ft_denoising_step'.*did you mean 'ft_denoising_steps'"):
        DPPO.from_pretrained(saved, ft_denoising_step=2)
    with pytest.raises(TypeError, match="policy_kwargs can't be passed .*: the architecture is that of the folder's"):
        DPPO.from_pretrained(saved, policy_kwargs=dict(horizon=8))
    # What the caller passed is not blamed on the file.
    for changes in (dict(ft_denoising_steps=9), dict(scheduler="ddim", inference_steps=3), dict(eta=2.0), dict(learn_eta="x")):
        with pytest.raises(ValueError, match=list(changes)[-1]) as caught:
            DPPO.from_pretrained(saved, **changes)
        assert "config.json" not in str(caught.value)
    with pytest.raises(RuntimeError, match="nowhere"):
        DPPO.from_pretrained(saved, device="nowhere")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        DPPO.from_pretrained(saved, env="Hopper-v5")


def test_every_class_that_may_be_named_works(tmp_path: Path) -> None:
    for activation_fn in CLASSES[nn.Module].values():
        make_model(policy_kwargs={**SMALL, "activation_fn": activation_fn}).save_pretrained(tmp_path / "model")
        loaded = DPPO.from_pretrained(tmp_path / "model")
        assert loaded.policy.activation_fn is activation_fn
    for optimizer_class in CLASSES[th.optim.Optimizer].values():
        model = make_model(
            policy_kwargs={**SMALL, "optimizer_class": optimizer_class, "optimizer_kwargs": dict(maximize=True)}
        )
        model.save_pretrained(tmp_path / "model")
        loaded = DPPO.from_pretrained(tmp_path / "model", env="Pendulum-v1")
        assert type(loaded.policy.optimizer) is optimizer_class
        assert loaded.policy.optimizer.param_groups[0]["maximize"] is True
        loaded.learn(16)


# ---------------------------------------------------------------------- VecNormalize


def test_vec_normalize(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=0), norm_reward=False, clip_obs=5.0)
    model = make_model(env).learn(64)
    model.save_pretrained(tmp_path / "model")
    raw = np.array([[0.3, 0.4, 2.0]])
    own = VecNormalize(make_vec_env("Pendulum-v1", 1), training=False, norm_reward=True)
    for given in ("Pendulum-v1", gym.make("Pendulum-v1"), make_vec_env("Pendulum-v1", 3), own):
        loaded = DPPO.from_pretrained(tmp_path / "model", env=given)
        restored = loaded.get_vec_normalize_env()
        assert restored is not None and (given is not own or restored is own)
        np.testing.assert_array_equal(restored.normalize_obs(raw), env.normalize_obs(raw))
        assert restored.ret_rms.var == env.ret_rms.var and restored.obs_rms.count == env.obs_rms.count  # type: ignore[union-attr]
        assert restored.clip_obs == 5.0
        loaded.learn(48)
    assert own.training is False and own.norm_reward is True  # the user's own
    assert DPPO.from_pretrained(tmp_path / "model").get_vec_normalize_env() is None


def test_vec_normalize_of_some_keys_beside_images(tmp_path: Path) -> None:
    env = VecNormalize(DummyVecEnv([lambda: SpaceEnv(DICT)]), norm_obs_keys=["b", "z"])
    model = make_model(env, "DiffusionMultiInputPolicy", scale_rewards=False).learn(16)
    model.save_pretrained(tmp_path / "model")
    loaded = DPPO.from_pretrained(tmp_path / "model", env=SpaceEnv(DICT))
    restored = loaded.get_vec_normalize_env()
    assert restored is not None and restored.norm_obs_keys == ["b", "z"]
    assert (restored.obs_rms["z"].mean == env.obs_rms["z"].mean).all()  # type: ignore[index]
    loaded.learn(16)


def test_vec_normalize_inside_of_a_frame_stack(tmp_path: Path) -> None:
    model = make_model(VecFrameStack(VecNormalize(make_vec_env("Pendulum-v1", 1), norm_reward=False), 2)).learn(16)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"put VecNormalize\(env\) where it was then"):
        DPPO.from_pretrained(tmp_path / "model", env=VecFrameStack(make_vec_env("Pendulum-v1", 1), 2))
    env = VecFrameStack(VecNormalize(make_vec_env("Pendulum-v1", 1), norm_reward=False), 2)
    DPPO.from_pretrained(tmp_path / "model", env=env)
    expected = unwrap_vec_normalize(model.get_env())  # type: ignore[arg-type]
    assert (unwrap_vec_normalize(env).obs_rms.mean == expected.obs_rms.mean).all()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="norm_obs=False"):
        other = VecNormalize(make_vec_env("Pendulum-v1", 1), norm_obs=False)
        DPPO.from_pretrained(tmp_path / "model", env=VecFrameStack(other, 2))


# ---------------------------------------------------------------------- what can't be shared


class OwnExtractor(BaseFeaturesExtractor):
    pass


class OwnPolicy(DPPO.policy_aliases["DiffusionMlpPolicy"]):  # type: ignore[misc, name-defined]
    pass


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(learning_rate=lambda _: 1e-3), r"learning_rate is a function.*'lin_NUMBER'.*model.learning_rate = …"),
        (dict(clip_range=LinearSchedule(0.2, 0.1, 1.0)), "clip_range is a function"),
        (
            dict(policy_kwargs={**SMALL, "activation_fn": OwnExtractor}),
            r"policy_kwargs\['activation_fn'\] is a class of your own",
        ),
        (dict(policy=OwnPolicy), "policy=OwnPolicy is a class of your own"),
        (dict(env=SpaceEnv(spaces.Box(-1, np.linspace(1, 2, 10**5, dtype=np.float32)))), "configuration takes .* characters"),
    ],
)
def test_what_is_refused_when_saving(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    try:
        model = make_model(**change)
    except TypeError:  # no activation
        model = make_model()
        model.policy._constructor_parameters["activation_fn"] = OwnExtractor
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "folder" / "model")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_schedule_can_be_replaced_before_saving(tmp_path: Path) -> None:
    model = make_model(learning_rate=lambda _: 1e-3)
    model.learning_rate = 1e-4
    model.save_pretrained(tmp_path / "model")
    assert DPPO.from_pretrained(tmp_path / "model").learning_rate == 1e-4


# ---------------------------------------------------------------------- saving is all or nothing


def test_an_error_leaves_what_was_there(saved: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "notes.txt").write_text("mine")
    model = DPPO.from_pretrained(saved)
    model.num_timesteps = 1234
    before = {path.name: path.read_bytes() for path in copied.iterdir()}

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sb3_dppo.runs.sharing.make_card", full_disk)
        for folder in (copied, copied.parent / "new"):
            with pytest.raises(OSError, match="No space"):
                model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert [path.name for path in copied.parent.iterdir()] == ["model"]
    model.save_pretrained(copied)
    assert DPPO.from_pretrained(copied).num_timesteps == 1234 and (copied / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(copied / "notes.txt")


def test_a_killed_process_leaves_a_whole_model_or_none(saved: Path, tmp_path: Path) -> None:
    program = f"""
import itertools
from sb3_dppo import DPPO
model = DPPO.from_pretrained({str(saved)!r})
print("ready", flush=True)
for i in itertools.count():
    model.save_pretrained(f"{tmp_path}/model-{{i}}")
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        while not (tmp_path / "model-3").exists():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    folders = list(tmp_path.glob("model-*"))
    assert len(folders) >= 4
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == FILES
    DPPO.from_pretrained(folders[-1])


def test_files_of_two_models_are_told_apart(saved: Path, copied: Path) -> None:
    other = copied.parent / "other"
    make_model(seed=1).save_pretrained(other)
    (other / "model.safetensors").replace(copied / "model.safetensors")
    with pytest.raises(ValueError, match="not the one that config.json was saved with"):
        DPPO.from_pretrained(copied)


@pytest.mark.parametrize(
    "sampler",
    [
        dict(scheduler="ddim", inference_steps=2, learn_eta="state", eta_range=(0.2, 0.9)),
        dict(scheduler="EulerDiscreteScheduler"),
        dict(scheduler={"_class_name": "LCMScheduler", "original_inference_steps": 4}, inference_steps=2),
    ],
)
def test_samplers(sampler: dict[str, Any], tmp_path: Path) -> None:
    policy_kwargs = dict(denoising_steps=4, film=True, net_arch=dict(pi=[16] * 3, vf=[16]))
    model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=32, batch_size=32, policy_kwargs=policy_kwargs, **sampler)
    model.learn(64).save_pretrained(tmp_path / "shared")
    loaded = DPPO.from_pretrained(tmp_path / "shared", env="Pendulum-v1")
    obs = th.randn(3, 3)
    noise = model.policy.draw_noise(3)
    for left, right in zip(*(m.policy.sample_chain(obs, noise=noise) for m in (model, loaded)), strict=True):
        assert th.equal(left, right)
    assert loaded.scheduler == model.scheduler and loaded.learn_eta == model.learn_eta
    loaded.learn(32)
