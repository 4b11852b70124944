"""Running statistics of observations: when they are kept, and when they change what the policy sees."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import sb3_dppo.dppo
from sb3_dppo import BC, DPPO, Demonstrations
from tests.features.test_observations import PixelPendulum

SMALL = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=2, horizon=2)


def make_model(env: Any = "Pendulum-v1", policy: str = "DiffusionMlpPolicy", **kwargs: Any) -> DPPO:
    arguments: dict[str, Any] = dict(n_steps=64, batch_size=64, n_epochs=1, policy_kwargs=SMALL, seed=0, device="cpu")
    return DPPO(policy, env, **{**arguments, **kwargs})


class Statistics(BaseCallback):
    """Notes by what observations are normalised, at each env step of each rollout."""

    def _on_rollout_start(self) -> None:
        self.rollouts = [*getattr(self, "rollouts", []), []]

    def _on_step(self) -> bool:
        normalizer = self.model.policy.normalizer
        self.rollouts[-1].append((*normalizer.obs_center.tolist(), *normalizer.obs_scale.tolist()))
        return True


@pytest.mark.parametrize("n_envs", [1, 3])
def test_ratios_begin_at_1_and_statistics_change_between_rollouts_only(monkeypatch: pytest.MonkeyPatch, n_envs: int) -> None:
    ratios, compute_gradients = [], sb3_dppo.dppo.compute_gradients

    def noted(policy: Any, samples: Any, *args: Any) -> Any:
        metrics = compute_gradients(policy, samples, *args)
        ratios.append((metrics["ratio"].item(), metrics["approx_kl"].item()))
        return metrics

    monkeypatch.setattr(sb3_dppo.dppo, "compute_gradients", noted)
    statistics = Statistics()
    # One minibatch per update, so that each one is the first.
    model = make_model(make_vec_env("Pendulum-v1", n_envs), batch_size=64 * n_envs * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.learn(4 * 64 * n_envs, statistics)
    assert len(ratios) == 4
    for ratio, kl in ratios:
        assert ratio == pytest.approx(1.0, abs=1e-6) and abs(kl) < 1e-7
    seen = [set(rollout) for rollout in statistics.rollouts]
    assert [len(rollout) for rollout in seen] == [1, 1, 1, 1]
    assert len(set.union(*seen)) == 4 and (0.0, 0.0, 0.0, 1.0, 1.0, 1.0) in seen[0]
    # The decisions of the first rollout, which trained the policy, too; not of the last one, when learning rates cool down.
    assert model.policy.normalizer.obs_count == pytest.approx(3 * 32 * n_envs, abs=0.01)


def test_statistics_are_of_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many decisions, or of a tenth of a longer run's; neither later ones nor another call change them."""
    model = make_model(make_vec_env("Pendulum-v1", 1), lr_decay="constant")
    count, decisions = model.policy.normalizer.obs_count, 64 // model.policy.sampler.act_steps
    monkeypatch.setattr("sb3_dppo.rollouts.MIN_STATISTICS", 3 * decisions)
    model.learn(10 * 64)
    assert count == pytest.approx(3 * decisions, abs=0.01)
    model.learn(10 * 64, reset_num_timesteps=False)
    assert count == pytest.approx(3 * decisions, abs=0.01)
    model.learn(50 * 64, reset_num_timesteps=False)
    assert count == pytest.approx(5 * decisions, abs=0.01)


def demonstrations() -> Demonstrations:
    rng = np.random.default_rng(0)
    return Demonstrations(rng.normal(size=(50, 3)), rng.uniform(-2, 2, (50, 1)), np.array([20, 30]))


@pytest.mark.parametrize(
    ("expected", "kwargs", "wrapper"),
    [
        (True, {}, None),
        (False, dict(normalize_observations=False), None),
        (False, {}, lambda env: VecNormalize(env, norm_reward=False)),
        (True, {}, lambda env: VecNormalize(env, norm_obs=False, norm_reward=False)),
        (True, dict(normalize_observations=True), lambda env: VecNormalize(env, norm_reward=False)),
    ],
)
def test_what_automatic_comes_to(expected: bool, kwargs: dict[str, Any], wrapper: Any) -> None:
    env = make_vec_env("Pendulum-v1", 1)
    model = make_model(env if wrapper is None else wrapper(env), **kwargs)
    twice = kwargs.get("normalize_observations") and wrapper is not None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(64)
    assert (model.policy.normalizer.obs_count > 0) == expected
    assert any("normalised twice" in str(warning.message) for warning in caught) == bool(twice)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_returns_of_a_rollout_that_broke_off_are_forgotten(error: type[BaseException]) -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 22:
                raise error
            return True

    model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu")
    with pytest.raises(error):
        model.learn(64, callback=Stop())
    assert (model.reward_scaler.returns == 0).all()


@pytest.mark.parametrize("kwargs", [{}, dict(normalize_observations=True)])
def test_ranges_of_demonstrations_stay(kwargs: dict[str, Any]) -> None:
    model = make_model(**kwargs)
    BC(model, demonstrations()).train(1, progress_bar=False)
    before = {name: value.clone() for name, value in model.policy.normalizer.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(64)
    assert all(th.equal(before[name], value) for name, value in model.policy.normalizer.state_dict().items())
    assert any("normalize_observations=True" in str(warning.message) for warning in caught) == bool(kwargs)


def test_images_stay_as_they_are_beside_vectors() -> None:
    env = gym.wrappers.TimeLimit(PixelPendulum(as_dict=True), 30)
    model = make_model(env, "DiffusionMultiInputPolicy")
    model.learn(128)
    assert model.policy.normalizer.obs_center.shape == (1,) and model.policy.normalizer.obs_count > 0
    alone = make_model(gym.wrappers.TimeLimit(PixelPendulum(), 30), "DiffusionCnnPolicy", normalize_observations=True)
    with pytest.warns(UserWarning, match="sees no vectors"):
        alone.learn(64)
    assert alone.policy.normalizer.obs_count == 0


class FarAway(gym.ObservationWrapper):
    """Observations in units that no network likes, in float64."""

    def __init__(self) -> None:
        super().__init__(gym.make("Pendulum-v1"))
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def observation(self, observation: Any) -> Any:
        return 1e3 * observation.astype(np.float64) + 500.0


def test_a_file_needs_no_other_statistics(tmp_path: Path) -> None:
    model = make_model(FarAway()).learn(256)
    obs = np.random.default_rng(0).normal(500, 1e3, (20, 3))
    expected = model.predict(obs, deterministic=True)[0]
    model.save(tmp_path / "model.zip")
    model.save_pretrained(tmp_path / "shared")
    env = make_vec_env(FarAway, 2)
    for loaded in (DPPO.load(tmp_path / "model.zip", env=env), DPPO.from_pretrained(tmp_path / "shared", env=env)):
        np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
        # It goes on from them, with another number of envs.
        loaded.learn(128, reset_num_timesteps=False)
        assert loaded.policy.normalizer.obs_count > model.policy.normalizer.obs_count
