"""Sharing models as folders without executable content."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from diffusers import DDIMScheduler
from gymnasium import spaces
from safetensors.torch import load_file, save_file
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, unwrap_vec_normalize
from torch import nn

from sb3_dppo import BC, DPPO, Demonstrations
from sb3_dppo.features.extractors import VitExtractor
from sb3_dppo.runs.schema import CLASSES, read
from sb3_dppo.runs.sharing import _sha256
from sb3_dppo.runs.spaces import Space, describe_space

SMALL = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=4, horizon=4)
FILES = {"config.json", "model.safetensors", "README.md"}


class SpaceEnv(gym.Env):
    """
    Random observations of any space.

    :param observation_space: The space.
    """

    def __init__(self, observation_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, spaces.Box(-1, 2, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 1.0, self.np_random.random() < 0.1, False, {}


IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
DICT = spaces.Dict(
    {
        "z": spaces.Box(-np.inf, np.inf, (3,), np.float64),
        "camera": IMAGE,
        "kind": spaces.Discrete(3),
        "b": spaces.Box(0, 1, (2,)),
    }
)


def make_model(env: Any = "Pendulum-v1", policy: str = "DiffusionMlpPolicy", **kwargs: Any) -> DPPO:
    arguments: dict[str, Any] = dict(n_steps=16, batch_size=32, n_epochs=2, policy_kwargs=SMALL, seed=0, device="cpu")
    return DPPO(policy, env, **{**arguments, **kwargs})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharing") / "model"
    make_model().learn(16).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((saved / name).read_bytes())
    return folder


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change: Callable[[dict[str, th.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    accept_weights(folder)


def accept_weights(folder: Path) -> None:
    change_config(folder, lambda config: config.update(weights_sha256=_sha256(folder / "model.safetensors")))


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
    assert loaded.learning_rate == "lin_1e-3" and loaded.critic_learning_rate == 2e-3 and loaded.clip_range == "lin_0.2"
    assert loaded.policy.process.scheduler.config.set_alpha_to_one is False
    th.testing.assert_close(loaded.policy.process.table, model.policy.process.table, rtol=0, atol=0)
    assert model.ft_denoising_steps == loaded.ft_denoising_steps == loaded.policy.ft_denoising_steps == 1  # annealed
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
    assert loaded.policy.normalizes_observations
    assert loaded.policy.min_sampling_std == model._min_sampling_std(model._current_progress_remaining)
    for field in ("mean", "var", "count"):
        assert getattr(loaded.reward_scaler.statistics, field) == getattr(model.reward_scaler.statistics, field)
    with pytest.raises(ValueError, match="no env to learn in"):
        loaded.learn(8)


def test_changing_arguments(saved: Path) -> None:
    loaded = DPPO.from_pretrained(str(saved), scheduler="ddim", inference_steps=2, act_steps=1, n_steps=10)
    assert loaded.policy.inference_steps == 2 and loaded.policy.act_steps == 1
    loaded = DPPO.from_pretrained(saved, env=make_vec_env("Pendulum-v1", 3), learning_rate=lambda _: 1e-5)
    assert loaded.learn(48).num_timesteps == 48
    with pytest.raises(TypeError, match=r"from_pretrained\(\).*'ft_denoising_step'.*did you mean 'ft_denoising_steps'"):
        DPPO.from_pretrained(saved, ft_denoising_step=2)
    with pytest.raises(ValueError, match="ft_denoising_steps=9"):
        DPPO.from_pretrained(saved, ft_denoising_steps=9)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        DPPO.from_pretrained(saved, env="Hopper-v5")


def test_bounds_of_spaces() -> None:
    for space in (
        spaces.Box(np.array([-np.inf, -1.1, 0]), np.array([np.inf, 2.2, 1e30]), dtype=np.float32),
        spaces.Box(-0.1, 0.1, (), np.float64),
        spaces.Box(-128, 127, (2, 3), np.int8),
        spaces.Box(np.finfo(np.float64).min, np.finfo(np.float64).max, (2,), np.float64),
        spaces.Discrete(4, start=-2),
        spaces.MultiDiscrete([3, 4], dtype=np.int32),  # type: ignore[arg-type]
        spaces.MultiBinary([2, 3]),
        DICT,
    ):
        encoded = json.loads(json.dumps(describe_space("space", space), allow_nan=False))
        decoded = read(Space, encoded)
        assert decoded == space
        if isinstance(space, spaces.Box) and isinstance(decoded, spaces.Box):
            assert decoded.dtype == space.dtype
            for bound in ("low", "high", "bounded_below", "bounded_above"):
                np.testing.assert_array_equal(getattr(decoded, bound), getattr(space, bound))
    assert len(json.dumps(describe_space("image", spaces.Box(0, 255, (1024, 1024, 3), np.uint8)))) < 100


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


def test_card(saved: Path) -> None:
    text = (saved / "README.md").read_text()
    _, front_matter, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front_matter)
    assert metadata["pipeline_tag"] == "reinforcement-learning" and "Pendulum-v1" in metadata["tags"]
    usage = body.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", str(saved)).replace("100_000", "16")
    done = subprocess.run([sys.executable, "-c", usage], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hyperparameters = json.loads(body.split("```json\n")[1].split("```")[0])
    assert hyperparameters["policy_kwargs"]["denoising_steps"] == 4 and hyperparameters["arguments"]["n_steps"] == 16


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
        (dict(policy_kwargs={**SMALL, "denoising_steps": 2000}), "denoising_steps must be 1 to 1000"),
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


KWARGS, ARGUMENTS, OBS = "policy_kwargs", "arguments", "observation_space"


@pytest.mark.parametrize(
    "change,message",
    [
        (_set("extra", to=1), r"unknown fields \['extra'\]"),
        (lambda config: config.pop("training"), r"lacks \['training'\]"),
        (_set("format", to="sb3-dppo 2"), "does not have the format"),
        (_set("policy", to="os.system"), "policy='os.system' is none of"),
        (_set("policy", to=["DiffusionMlpPolicy"]), "policy="),
        (_set("policy", to="DiffusionUnetPolicy"), "can be made|does not fit"),
        (_set(KWARGS, to=[]), "policy_kwargs has"),
        (_set(KWARGS, "use_sde", to=False), r"policy_kwargs has \['use_sde'\], which this version does not know"),
        (_set(KWARGS, "activation_fn", to="torch.nn.ReLU"), r"policy_kwargs\['activation_fn'\]='torch.nn.ReLU'"),
        (_set(KWARGS, "activation_fn", to="os.system"), r"policy_kwargs\['activation_fn'\]='os.system'"),
        (_set(KWARGS, "activation_fn", to="NatureCNN"), r"policy_kwargs\['activation_fn'\]='NatureCNN'"),
        (_set(KWARGS, "activation_fn", to="GELU"), None),  # well-formed
        (_set(KWARGS, "features_extractor_class", to="../x.Extractor"), "features_extractor_class"),
        (_set(KWARGS, "optimizer_class", to="LBFGS"), "optimizer_class"),
        (_set(KWARGS, "optimizer_kwargs", to=dict(params=[1])), "optimizer_kwargs has"),
        (_set(KWARGS, "features_extractor_kwargs", to=dict(observation_space=1)), "features_extractor_kwargs has"),
        (_set(KWARGS, "net_arch", to=dict(pi=[10**12], vf=[16])), "net_arch.*sensible size"),
        (_set(KWARGS, "net_arch", to=dict(pi=[16384] * 101, vf=[16])), "needs more numbers than the weights have"),
        (_set(KWARGS, "net_arch", to=dict(pi=[16], vf=[16] * 100_000)), "net_arch.*sensible size"),
        (_set(KWARGS, "net_arch", to=dict(pi=[16], vf=[32])), r"policy.critic.0.weight is F32 of the shape \[16, 3\], not"),
        (_set(KWARGS, "net_arch", to=dict(pi=[16], vf=[16], x=[1])), "net_arch must have pi and vf"),
        (_set(KWARGS, "net_arch", to=dict(pi=[16], vf=[16, 16, 16])), "unknown tensors|missing"),
        (_set(KWARGS, "net_arch", to=dict(pi=[16.5], vf=[16])), "net_arch"),
        (_set(KWARGS, "horizon", to=True), r"policy_kwargs\['horizon'\]=True"),
        (_set(KWARGS, "horizon", to=-1), "horizon"),
        (_set(KWARGS, "horizon", to=16000), "does not fit|can be made"),
        (_set(KWARGS, "denoising_steps", to=10**9), "denoising_steps"),
        (_set(KWARGS, "denoising_steps", to=16000), "denoising_steps must be 1 to 1000"),
        (_set(KWARGS, "time_dim", to=16384), "does not fit|can be made"),
        (lambda config: config[KWARGS].pop("horizon"), r"lacks policy_kwargs\['horizon'\]"),
        (_set(ARGUMENTS, "tensorboard_log", to="../../.ssh"), r"arguments has \['tensorboard_log'\]"),
        (_set(ARGUMENTS, "pretrained", to="../stranger.zip"), r"arguments has \['pretrained'\]"),
        (_set(ARGUMENTS, "env", to="evil_module:Env-v0"), r"arguments has \['env'\]"),
        (_set(ARGUMENTS, "learning_rate", to="lambda: 0"), r"arguments\['learning_rate'\]|learning_rate='lambda"),
        (_set(ARGUMENTS, "critic_learning_rate", to="lin_x"), "critic_learning_rate='lin_x' is not a schedule"),
        (_set(ARGUMENTS, "gamma", to=float("nan")), r"arguments\['gamma'\]=nan"),
        (_set(ARGUMENTS, "gamma", to=10**400), r"arguments\['gamma'\]"),
        (_set(ARGUMENTS, "n_steps", to=2**62), "rollout buffer of .* bytes per env.*pass a smaller n_steps"),
        (_set(ARGUMENTS, "act_steps", to=0), "act_steps=0"),
        (_set(ARGUMENTS, "seed", to=2**62), "can be made"),
        (_set(ARGUMENTS, "ft_denoising_anneal", to=[1, 2, 3]), "ft_denoising_anneal"),
        (_set(ARGUMENTS, "scheduler", to="euler"), "scheduler='euler'"),
        (_set(ARGUMENTS, "scheduler", to={"_class_name": "DiffusionPipeline"}), "scheduler.*must be a name"),
        (_set(ARGUMENTS, "scheduler", to={"_class_name": ["DDIMScheduler"]}), "scheduler.*must be a name"),
        (
            _set(ARGUMENTS, "scheduler", to={"_class_name": "DDIMScheduler", **dict(num_train_timesteps=10**6)}),
            "scheduler.*which this version does not know",
        ),
        (_set(ARGUMENTS, "scheduler", to={"_class_name": "DDIMScheduler", **dict(thresholding=True)}), "thresholding"),
        (_set(ARGUMENTS, "scheduler", to={"_class_name": "DDIMScheduler", **dict(timestep_spacing="x")}), "timestep_spacing"),
        (_set("training", "n_rollouts", to="3"), r"training\['n_rollouts'\]='3'"),
        (_set("training", "more", to=3), "training must have the fields"),
        (_set("training", "reward_var", to="nan"), r"training\['reward_var'\]='nan'"),
        (_set("vec_normalize", to={}), "vec_normalize must have the fields"),
        (_set(OBS, to="Box"), "observation_space='Box' is no"),
        (_set(OBS, "type", to="Graph"), "observation_space=.* is no"),
        (_set(OBS, "shape", to=[10**6, 10**6]), "too large"),
        (_set(OBS, "shape", to=[-3]), "too large or unknown"),
        (_set(OBS, "shape", to=[4]), "does not fit|numbers, but the space"),
        (_set(OBS, "dtype", to="object"), "too large or unknown"),
        (_set(OBS, "dtype", to="uint8"), "observation_space.low|is no such space"),
        (_set(OBS, "low", to=[0.0, 1.0]), "has 2 numbers, but the space the shape"),
        (_set(OBS, "low", to=1e300), "numbers that float32 does not hold"),
        (_set(OBS, "low", to=100.0), "low"),
        (_set(OBS, to=dict(type="Discrete", n=2**62, start=0)), "can be made"),
        (_set(OBS, to=dict(type="Discrete", n=0, start=0)), "no such space"),
        (_set(OBS, to=dict(type="MultiDiscrete", nvec=[2**62, 2**62], dtype="int64")), "can be made"),
        (_set(OBS, to=dict(type="Dict", spaces=dict(a=dict(type="Dict", spaces={})))), "is a Dict in a Dict"),
        (_set(OBS, to=dict(type="Dict", spaces={})), "can be made"),
        (_set(OBS, to=dict(type="MultiBinary", shape=[])), "does not fit"),
        (
            _set(
                OBS,
                to=dict(type="Dict", spaces={k: dict(type="Box", shape=[2**21], dtype="int8", low=0, high=1) for k in "abc"}),
            ),
            "more than 4194304 numbers",
        ),
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
        (lambda tensors: tensors.pop("policy.action_scale"), r"missing \['policy.action_scale'\]"),
        (lambda tensors: tensors.update(more=th.zeros(1)), r"unknown tensors \['more'\]"),
        (_set("policy.action_scale", to=th.zeros(2)), r"policy.action_scale is F32 of the shape \[2\], not F32 of \[1\]"),
        (_set("policy.action_scale", to=th.zeros(1, dtype=th.double)), "policy.action_scale is F64"),
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
