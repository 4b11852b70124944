"""Pre-training."""

import csv
import gc
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch as th
from diffusers.training_utils import EMAModel
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_dppo import BC, DPPO, Demonstrations, bc, collect_demonstrations, load_demonstrations
from sb3_dppo.demonstrations.__main__ import describe
from sb3_dppo.features.extractors import VitExtractor
from tests.demonstrations.files import (
    IMAGES,
    LENGTHS,
    RGB,
    STATE,
    STATES,
    VIT,
    N,
    PictureEnv,
    dict_demonstrations,
    image_space,
    make_image_model,
)
from tests.features.test_observations import VectorBoxDictEnv, VectorDictEnv
from tests.toy_envs import CountingEnv

SMALL = dict(net_arch=dict(pi=[32], vf=[16]), denoising_steps=5, horizon=4)


def make_demonstrations(n: int = 300, obs_dim: int = 3, act_dim: int = 1) -> Demonstrations:
    """The action is a function of the observation; the last observation never changes."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(-3, 5, (n, obs_dim)).astype(np.float32)
    observations[:, -1] = 0.7
    actions = np.repeat(np.tanh(observations[:, :1]), act_dim, axis=1)
    return Demonstrations(observations, actions, np.array([n // 3, n - n // 3]))


def make_model(env: Any = "Pendulum-v1", **kwargs: Any) -> DPPO:
    return DPPO("DiffusionMlpPolicy", env, n_steps=16, batch_size=32, policy_kwargs=SMALL, seed=0, device="cpu", **kwargs)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_learns_to_imitate(prediction_type: str) -> None:
    policy_kwargs = dict(SMALL, prediction_type=prediction_type, horizon=1, net_arch=dict(pi=[64, 64, 64], vf=[16]))
    model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=16, batch_size=32, policy_kwargs=policy_kwargs, seed=0)
    demonstrations = make_demonstrations(1000)
    actions = demonstrations.actions[:200]

    def error() -> float:
        predicted = model.predict(demonstrations.observations[:200], deterministic=True)[0]
        return float(np.abs(predicted - actions).mean())

    before = error()
    BC(model, demonstrations, batch_size=32, learning_rate=2e-3).train(40, progress_bar=False)
    assert error() < 0.1 < 0.4 < before


def test_ends_with_ema_in_both_denoisers_and_new_optimisers(tmp_path: Path) -> None:
    model = make_model(ft_denoising_steps=2)
    model.learn(32)
    assert model.policy.optimizer.state
    model.set_logger(configure(str(tmp_path), ["csv"]))
    BC(model, make_demonstrations()).train(3)
    for name, value in model.policy.denoiser.state_dict().items():
        assert th.equal(value, model.policy.base_denoiser.state_dict()[name])
    assert not model.policy.optimizer.state and not model.policy.critic_optimizer.state
    assert model.policy.optimizer.param_groups[0]["lr"] == model.lr_schedule(1)
    assert model.pretrained_on_demonstrations and model.n_rollouts == 0
    assert "bc/loss" in (tmp_path / "progress.csv").read_text()
    model.learn(32)


def test_normalisation_is_that_of_the_demonstrations() -> None:
    model, demonstrations = make_model(), make_demonstrations()
    BC(model, demonstrations)
    assert not model.policy.normalizer.has_ranges
    BC(model, demonstrations).train(1, progress_bar=False)
    features = model.policy.extract_features(th.as_tensor(demonstrations.observations))
    assert features[:, :-1].min() == pytest.approx(-1, abs=1e-5) and features[:, :-1].max() == pytest.approx(1, abs=1e-5)
    assert (features[:, -1] == 0).all()


def test_frame_stacking_pads_as_vec_frame_stack_does() -> None:
    env = VecFrameStack(make_vec_env("Pendulum-v1", 1, seed=0), 3)
    observations, frames, lengths = [], [], []
    for _ in range(2):
        obs = env.reset()
        for _ in range(5):
            observations.append(obs[0])
            frames.append(obs[0, -3:])
            obs = env.step(np.zeros((1, 1), dtype=np.float32))[0]
        lengths.append(5)
    demonstrations = Demonstrations(np.array(frames), np.zeros((10, 1)), np.array(lengths))
    np.testing.assert_array_equal(demonstrations.stacked_observations(np.arange(10), 3), observations)
    model = make_model(env)
    BC(model, demonstrations).train(1, progress_bar=False)
    assert model.policy.normalizer.obs_center.shape == (9,)
    assert th.equal(model.policy.normalizer.obs_center[:3], model.policy.normalizer.obs_center[6:])
    model.learn(16)


def test_evaluation_uses_the_ema_and_training_goes_on(tmp_path: Path) -> None:
    model = make_model()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    BC(model, make_demonstrations(), eval_env=make_vec_env("Pendulum-v1", 1), n_eval_episodes=1, eval_freq=1).train(2)
    assert "eval/mean_reward" in (tmp_path / "progress.csv").read_text()


def test_interruption_keeps_what_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    before = [p.clone() for p in model.policy.denoiser.parameters()]
    calls, loss = [0], model.policy.bc_loss

    def interrupt(*args: Any) -> th.Tensor:
        calls[0] += 1
        if calls[0] == 30:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(model.policy, "bc_loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        BC(model, make_demonstrations(), batch_size=10, ema_update_every=100).train(10, progress_bar=False)
    assert any(not th.equal(a, b) for a, b in zip(before, model.policy.denoiser.parameters(), strict=True))
    assert model.pretrained_on_demonstrations


def test_ema_counts_the_steps_of_the_whole_training_and_sees_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    updated_at: list[int] = []
    model, update = make_model(), EMAModel.step
    calls, loss = [0], model.policy.bc_loss

    def count(*args: Any) -> th.Tensor:
        calls[0] += 1
        return loss(*args)

    monkeypatch.setattr(model.policy, "bc_loss", count)
    monkeypatch.setattr(EMAModel, "step", lambda self, parameters: updated_at.append(calls[0]) or update(self, parameters))
    BC(model, make_demonstrations(), batch_size=42).train(3, progress_bar=False)
    assert calls == [21] and updated_at == [10, 20, 21]


def test_a_short_training_returns_what_it_learned() -> None:
    weights = []
    for kwargs in (dict(), dict(ema_decay=0.0, ema_update_every=1)):  # the second without an average
        model = make_model()
        BC(model, make_demonstrations(), batch_size=42, **kwargs).train(1, progress_bar=False)  # type: ignore[arg-type]
        weights.append(th.nn.utils.parameters_to_vector(model.policy.denoiser.parameters()))
    th.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_chunks_are_gathered_for_a_minibatch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 100_000
    demonstrations = Demonstrations(np.zeros((n, 3), np.float32), np.zeros((n, 2), np.float32), np.array([n]))
    kwargs: dict[str, Any] = dict(policy_kwargs=dict(SMALL, horizon=16), n_steps=16, normalize_advantage=False, device="cpu")
    model = DPPO("DiffusionMlpPolicy", CountingEnv(), **kwargs)
    held = []

    def tensors() -> int:
        storages = (x.untyped_storage() for x in gc.get_objects() if type(x) is th.Tensor)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    gc.collect()
    others = tensors()  # of tests before this one

    def measure(observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        held.append(tensors() - others + tracemalloc.get_traced_memory()[1])
        assert actions.shape == (len(observations), 16, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(model.policy, "bc_loss", measure)
    tracemalloc.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            BC(model, demonstrations).train(1, progress_bar=False)
    finally:
        tracemalloc.stop()
    # All chunks alone would be more.
    assert held[0] < 16 * demonstrations.actions.nbytes, held[0]


def test_bad_numbers() -> None:
    for name in ("batch_size", "ema_update_every", "n_eval_episodes", "eval_freq"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            BC(make_model(), make_demonstrations(), **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_epochs=0 must be at least 1"):
        BC(make_model(), make_demonstrations()).train(0)


@pytest.mark.parametrize(
    "demonstrations,message",
    [
        (make_demonstrations(obs_dim=4), r"shape \(4,\), but the model's env has \(3,\)"),
        (make_demonstrations(obs_dim=1), r"shape \(1,\), but the model's env has \(3,\), 1 frame"),
        (make_demonstrations(act_dim=2), "actions of size 2, but the model's env has 1"),
        (Demonstrations(np.zeros((9, 3)), np.full((9, 1), 5.0), np.array([9])), "outside the bounds"),
        (Demonstrations(np.zeros((9, 3)), np.zeros((9, 1)), np.array([9]), env_id="Hopper-v5"), "of Hopper-v5.*Pendulum-v1"),
        (Demonstrations(np.zeros((6, 3)), np.zeros((6, 1)), np.array([3, 3])), "horizon=4 is longer than every episode"),
    ],
)
def test_errors_before_training(demonstrations: Demonstrations, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BC(make_model(), demonstrations)


def test_sources_and_other_algorithms() -> None:
    model = DPPO("DiffusionMlpPolicy", "Hopper-v5", policy_kwargs=SMALL, device="cpu")
    assert BC(model, "hopper-medium").demonstrations.env_id == load_demonstrations("hopper-medium").env_id
    with pytest.raises(TypeError, match="model=PPO must be a DPPO"):
        BC(PPO("MlpPolicy", "Pendulum-v1", device="cpu"), "hopper-medium")  # type: ignore[arg-type]


def test_warnings() -> None:
    with pytest.warns(UserWarning, match="VecNormalize"):
        model = make_model(VecNormalize(make_vec_env("Pendulum-v1", 1), norm_reward=False))
        BC(model, make_demonstrations()).train(1, progress_bar=False)
    other = Demonstrations(np.zeros((9, 3)), np.zeros((9, 1)), np.array([9]), env_id="Pendulum-v0")
    with pytest.warns(UserWarning, match="another version"):
        BC(make_model(), other)


def test_command_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sb3_dppo.bc",
        "--env",
        "Hopper-v5",
        "--demos",
        "hopper-medium",
        "-o",
        str(tmp_path / "a.zip"),
    ]
    options = ["--epochs", "1", "--batch-size", "2000", "--eval-episodes", "1", "--seed", "0", "--num-threads", "1"]
    kwargs = [
        "--policy-kwargs",
        "denoising_steps:4",
        "net_arch:{'pi': [32]}",
        "activation_fn:silu",
        "-params",
        "act_steps:2",
        "n_steps:16",
    ]
    done = subprocess.run([*command, *options, *kwargs], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Mean reward" in done.stdout and f"{len(load_demonstrations('hopper-medium'))} transitions" in done.stdout
    model = DPPO.load(tmp_path / "a.zip")
    assert model.policy.process.denoising_steps == 4 and model.act_steps == 2
    # The rest of the paper's architecture stays.
    assert model.policy.net_arch == dict(pi=[32], vf=[256, 256, 256]) and isinstance(model.policy.denoiser.mlp[1], th.nn.SiLU)


@pytest.mark.parametrize("format", ["npz", "hdf5"])
def test_only_a_minibatch_is_in_memory(format: str, tmp_path: Path) -> None:
    n, side = 160, 256
    path = tmp_path / f"d.{format}"
    if format == "npz":
        np.savez(
            path, images=np.zeros((n, side, side, 3), np.uint8), actions=np.zeros((n, 1)), traj_lengths=np.array([n // 2] * 2)
        )
    else:
        with h5py.File(path, "w") as file:
            for i in range(2):
                file[f"data/demo_{i}/actions"] = np.zeros((n // 2, 1))
                file[f"data/demo_{i}/obs/cam"] = np.zeros((n // 2, side, side, 3), np.uint8)
    assert path.stat().st_size > 30e6
    kwargs = dict(width=8, spatial_dim=4, n_heads=2, patch_size=64)
    model = make_image_model(
        PictureEnv(image_space(side, side, 3)),
        "DiffusionCnnPolicy",
        features_extractor_class=VitExtractor,
        features_extractor_kwargs=kwargs,
    )
    tracemalloc.start()
    try:
        demonstrations = load_demonstrations(path, obs_keys=None if format == "npz" else ["cam"])
        BC(model, demonstrations, batch_size=8).train(1, progress_bar=False)
        describe(demonstrations.first(1))
        in_training = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A minibatch has 1.6 MB, in the file's order and in the env's.
    assert in_training < 16e6, in_training


@pytest.mark.parametrize("channels_first", [False, True])
def test_channels_are_put_where_the_env_has_them(channels_first: bool) -> None:
    images = IMAGES.transpose(0, 3, 1, 2) if channels_first else IMAGES
    for space in (RGB, image_space(3, 16, 16)):
        model = make_image_model(PictureEnv(spaces.Dict(rgb=space, state=STATE)), **VIT)
        obs = BC(model, dict_demonstrations(rgb=images))._observations(np.array([10, 0]))
        assert obs["rgb"].dtype == th.uint8
        np.testing.assert_array_equal(obs["rgb"], IMAGES[[10, 0]].transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(obs["state"], STATES[[10, 0]])


def test_frames_are_stacked_as_by_the_env() -> None:
    class Replay(PictureEnv):
        """Observes the demonstrations' episodes, one after the other."""

        def __init__(self) -> None:
            super().__init__(spaces.Dict(rgb=RGB, state=STATE))
            self.row = 0

        def reset(self, **kwargs: Any) -> tuple[Any, dict]:
            return self._obs(), {}

        def _obs(self) -> dict[str, np.ndarray]:
            return dict(rgb=IMAGES[self.row % N], state=STATES[self.row % N])

        def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
            self.row += 1
            return self._obs(), 0.0, self.row in np.cumsum(LENGTHS), False, {}

    env = VecFrameStack(DummyVecEnv([Replay]), 3)
    model = make_image_model(env, **(VIT | dict(horizon=1)))
    bc = BC(model, dict_demonstrations())
    assert bc.n_stack == 3
    cloned = bc._observations(np.arange(N))
    wrapped: Any = model.get_env()  # also with channels first
    obs = wrapped.reset()
    for row in range(N):
        for key in ("rgb", "state"):
            np.testing.assert_array_equal(cloned[key][row], obs[key][0])
        obs = wrapped.step(np.zeros((1, 1), np.float32))[0]
    bc.train(1, progress_bar=False)
    low = STATES.min(axis=0)
    half = (STATES.max(axis=0) - low + 1e-6) / 2
    np.testing.assert_allclose(model.policy.normalizer.obs_center, np.tile(low + half, 3), rtol=1e-5)


def test_ranges_of_a_dict_are_in_the_order_of_the_policy() -> None:
    demonstrations = collect_demonstrations(VectorDictEnv(), lambda *_: (np.zeros(1), None), 40, seed=0, progress_bar=False)
    model = make_image_model(VectorDictEnv())
    BC(model, demonstrations).train(1, progress_bar=False)
    parts = {key: np.asarray(rows) for key, rows in demonstrations.parts.items()}
    assert parts["b"].shape == (200, 2, 2) and parts["c"].shape == (200, 1)
    obs = {key: th.as_tensor(values if key != "c" else values[:, 0]) for key, values in parts.items()}
    features = model.policy.extract_features(obs)
    assert features.shape == (200, 2 + 4 + 3)
    assert features[:, :6].amin(0) == pytest.approx(-1, abs=1e-4) and features[:, :6].amax(0) == pytest.approx(1, abs=1e-4)
    assert (features[:, 6:].sum(1) == 1).all()
    frames = VecFrameStack(DummyVecEnv([VectorBoxDictEnv]), 2)
    BC(make_image_model(frames), demonstrations).train(1, progress_bar=False)


def test_images_are_shifted_in_training_and_not_in_evaluation() -> None:
    space = spaces.Dict(rgb=RGB, state=STATE)
    model = make_image_model(PictureEnv(space), **VIT)
    seen = []
    extractor = model.policy.pi_features_extractor
    extractor.register_forward_hook(lambda module, inputs, output: seen.append((len(output), module.training)))
    evaluation = DummyVecEnv([lambda: PictureEnv(space)])
    bc = BC(model, dict_demonstrations(), batch_size=3, eval_env=evaluation, n_eval_episodes=1, eval_freq=1)
    bc.train(2, progress_bar=False)
    training = [shifts for size, shifts in seen if size > 1]
    acting = [shifts for size, shifts in seen if size == 1]
    assert len(training) == 6 and all(training)
    assert acting and not any(acting)
    assert not extractor.training


def test_imitates_what_only_the_image_tells() -> None:
    bright = np.arange(200) % 2
    images = np.random.default_rng(0).integers(0, 30, (200, 16, 16, 3)).astype(np.uint8)
    images[bright == 1] += 200
    actions = np.where(bright, 0.7, -0.7)[:, None]
    env = PictureEnv(RGB)
    kwargs = dict(horizon=1, net_arch=dict(pi=[32, 32, 32], vf=[16]), prediction_type="sample")
    model = make_image_model(env, "DiffusionCnnPolicy", **(VIT | kwargs))
    BC(model, Demonstrations(images, actions, np.array([200])), batch_size=50, learning_rate=3e-3).train(
        15, progress_bar=False
    )
    predicted = model.predict(images, deterministic=True)[0]
    assert np.abs(predicted - actions).mean() < 0.2


def test_a_column_that_hardly_changes_is_constant() -> None:
    demonstrations = make_demonstrations()
    demonstrations.observations[0, -1] += 1e-6  # type: ignore[index]
    model = make_model()
    BC(model, demonstrations).train(1, progress_bar=False)
    assert model.policy.normalizer.obs_scale[-1] == 0 and (model.policy.normalizer.obs_scale[:2] > 0).all()


def test_warns_of_what_is_left_out() -> None:
    demonstrations = make_demonstrations()
    short = Demonstrations(demonstrations.observations, demonstrations.actions, np.array([3, 2, 295]))
    with pytest.warns(UserWarning, match=r"2 of 3 episodes \(5 transitions\) are left out: .* of 4 actions"):
        BC(make_model(), short)
    demonstrations.actions[:] = 0.5
    with pytest.warns(UserWarning, match=r"Actions \[0\] \(from 0\) never change"):
        BC(make_model(), demonstrations).train(1, progress_bar=False)


def test_every_evaluation_and_the_last_epoch_are_logged(tmp_path: Path) -> None:
    model = make_model()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    env = make_vec_env("Pendulum-v1")
    BC(model, make_demonstrations(), eval_env=env, n_eval_episodes=1, eval_freq=2).train(5, False, log_interval=3)
    rows = list(csv.DictReader((tmp_path / "progress.csv").open()))
    assert [(row["bc/epoch"], row["eval/mean_reward"] != "") for row in rows] == [
        ("2", True),
        ("3", False),
        ("4", True),
        ("5", True),
    ]


def test_ids_without_a_version_and_other_namespaces() -> None:
    demonstrations = make_demonstrations()
    for env_id in ("DoorOpen", "my/Pendulum-v1", "no id at all!"):
        with pytest.raises(ValueError, match=r"are of .*, but .* is Pendulum-v1\. If they fit all the same"):
            BC(make_model(), replace(demonstrations, env_id=env_id))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy-kwargs", "horizon"], "'horizon' must be KEY:VALUE"),
        (["--policy-kwargs", "net_arch:dict(pi=[8])"], "the value must be a Python literal, such as {'pi': [64, 64]}"),
        (["--env", "Pendulum-v1"], "they are of another env"),
        (["--env", "NoSuchEnv-v0"], "NoSuchEnv"),
        (["-params", "n_steps:0"], "n_steps"),
    ],
)
def test_errors_of_the_command_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = ["bc", "--env", "Hopper-v5", "--demos", "hopper-medium", "-o", str(tmp_path / "a.zip"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="2"):
        bc.main()
    assert message in capsys.readouterr().err
