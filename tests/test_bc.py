"""Pre-training."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from sb3_dppo import BC, DPPO, Demonstrations, load_demonstrations

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
    assert not model.policy.normalizer.changes_observations
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
    assert th.equal(model.policy.normalizer.obs_center[:3], model.policy.obs_center[6:])
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
        BC(model, make_demonstrations(), batch_size=10).train(10, progress_bar=False)
    assert any(not th.equal(a, b) for a, b in zip(before, model.policy.denoiser.parameters(), strict=True))
    assert model.pretrained_on_demonstrations


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
        "net_arch:{'pi': [32], 'vf': [32]}",
        "-params",
        "act_steps:2",
        "n_steps:16",
    ]
    done = subprocess.run([*command, *options, *kwargs], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Mean reward" in done.stdout and f"{len(load_demonstrations('hopper-medium'))} transitions" in done.stdout
    model = DPPO.load(tmp_path / "a.zip")
    assert model.policy.process.denoising_steps == 4 and model.act_steps == 2
