"""Recording demonstrations."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dppo import BC, DPPO, collect_demonstrations, load_demonstrations
from sb3_dppo.demonstrations.__main__ import describe
from sb3_dppo.demonstrations.collecting import EpisodeError
from tests.demonstrations.files import VIT, make_image_model
from tests.features.test_observations import PixelPendulum
from tests.toy_envs import CountingEnv


def test_collected_ends() -> None:
    for truncate in (False, True):
        recorded = collect_demonstrations(CountingEnv(3, truncate), lambda obs, *_: (np.zeros(2), None), 2, progress_bar=False)
        ends = [False, False, True] * 2
        assert recorded.terminals is not None and recorded.terminals.tolist() == [end and not truncate for end in ends]
        assert recorded.truncations is not None and recorded.truncations.tolist() == [end and truncate for end in ends]
        assert recorded.observations[:, 0].tolist() == [0, 1, 2] * 2 and recorded.rewards.tolist() == [1, 2, 3] * 2  # type: ignore[union-attr]
        assert recorded.env_id is None


def test_interruption_keeps_complete_episodes() -> None:
    calls = [0]

    def predict(obs: np.ndarray, state: Any, episode_start: np.ndarray) -> tuple[np.ndarray, Any]:
        calls[0] += 1
        if calls[0] == 9:
            raise KeyboardInterrupt
        assert bool(episode_start[0]) == (state is None) == (obs[0] == 0)
        return np.zeros(2), calls[0]

    assert collect_demonstrations(CountingEnv(3), predict, 5).traj_lengths.tolist() == [3, 3]
    calls[0] = 8
    with pytest.raises(KeyboardInterrupt):
        collect_demonstrations(CountingEnv(3), predict, 5)


def test_successes_only() -> None:
    class EveryThird(CountingEnv):
        """Succeeds in every third episode."""

        n_episodes = 0

        def step(self, action: np.ndarray) -> Any:
            *outcome, info = super().step(action)
            self.n_episodes += outcome[2] or outcome[3]
            return *outcome, info | {"is_success": bool(outcome[2] and self.n_episodes % 3 == 0)}

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            seeds.append(seed)
            return super().reset(seed=seed, options=options)

    seeds: list[int | None] = []
    acted = [0]

    def predict(obs: np.ndarray, state: Any, episode_start: np.ndarray) -> tuple[np.ndarray, Any]:
        acted[0] += 1
        return np.full(2, acted[0] / 100), None

    recorded = collect_demonstrations(EveryThird(2), predict, 2, seed=7, progress_bar=False, successes_only=True)
    assert seeds == [7, 8, 9, 10, 11, 12] and recorded.traj_lengths.tolist() == [2, 2]
    np.testing.assert_allclose(recorded.actions[:, 0], [0.05, 0.06, 0.11, 0.12])
    with pytest.raises(ValueError, match=r"successes_only=True needs info\['is_success'\], but .* holds \[\]: leave it out"):
        collect_demonstrations(CountingEnv(2), predict, 2, progress_bar=False, successes_only=True)


def test_envs_that_cannot_be_recorded() -> None:
    env = CountingEnv()
    env.action_space = spaces.Discrete(2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"the env's action space is Discrete\(2\), not a Box"):
        collect_demonstrations(env, lambda obs, *_: (np.array(0), None), 1)
    env = CountingEnv()
    env.observation_space = spaces.Dict(a=env.observation_space, b=spaces.Tuple([spaces.Discrete(2)]))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"the env's observations\['b'\] are Tuple\(Discrete\(2\)\): wrap it in.*FlattenObs"):
        collect_demonstrations(env, lambda obs, *_: (np.zeros(2), None), 1)
    with pytest.raises(ValueError, match="n_episodes=0 must be at least 1"):
        collect_demonstrations(CountingEnv(), lambda obs, *_: (np.zeros(2), None), 0)


def test_constant_columns_survive_behaviour_cloning() -> None:
    env = CountingEnv()  # two of its three observations never change
    demonstrations = collect_demonstrations(env, lambda obs, *_: (np.array([np.sin(obs[0]), -0.25]), None), 5)
    assert "constant      observations[1], observations[2], actions[1]" in describe(demonstrations)
    policy_kwargs = dict(net_arch=dict(pi=[32], vf=[16]), denoising_steps=5, horizon=4)
    model = DPPO("DiffusionMlpPolicy", CountingEnv(), n_steps=16, batch_size=20, policy_kwargs=policy_kwargs, seed=0)
    BC(model, demonstrations).train(2, progress_bar=False)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    features = model.policy.extract_features(th.as_tensor(demonstrations.observations))
    assert (features[:, 1:] == 0).all() and features[:, 0].abs().max() == pytest.approx(1, abs=1e-5)
    assert model.policy.normalizer.normalize_actions(th.as_tensor(demonstrations.actions)).abs().max() <= 1.00001
    actions = model.predict(demonstrations.observations.astype(np.float64))[0]
    np.testing.assert_allclose(actions[:, 1], -0.25, atol=1e-5)
    model.learn(16)


@pytest.mark.parametrize("case", ["cnn-vit", "dict", "dict-vit"])
def test_collect_clone_and_fine_tune(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    as_dict = case.startswith("dict")

    def make_env() -> gym.Env:
        return gym.wrappers.TimeLimit(PixelPendulum(as_dict=as_dict), 30)

    rng = np.random.default_rng(0)
    recorded = collect_demonstrations(make_env(), lambda *_: (rng.uniform(-2, 2, 1), None), 2, seed=0, progress_bar=False)
    recorded.save(tmp_path / "d.npz")
    demonstrations = load_demonstrations(tmp_path / "d.npz")
    image = demonstrations.parts["rgb" if as_dict else ""]
    assert image.shape == (60, 64, 64, 3) and len(np.unique(image[np.arange(60)])) > 2
    policy = "DiffusionMultiInputPolicy" if as_dict else "DiffusionCnnPolicy"
    model = make_image_model(DummyVecEnv([make_env]), policy, **(VIT if case.endswith("vit") else {}))
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    BC(model, demonstrations, batch_size=16).train(2, progress_bar=False)
    cloned = {name: value.clone() for name, value in model.policy.state_dict().items()}
    for name in ("denoiser.", "pi_features_extractor.", "base_features_extractor."):
        assert any(not th.equal(cloned[key], before[key]) for key in cloned if key.startswith(name))
    model.learn(200)
    assert any(not th.equal(value, cloned[key]) for key, value in model.policy.state_dict().items())
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model", device="cpu")
    obs = {key: rows[np.arange(3)] for key, rows in demonstrations.parts.items()}
    actions = [m.predict(obs if as_dict else obs[""], deterministic=True)[0] for m in (model, loaded)]
    np.testing.assert_array_equal(*actions)


def test_an_error_keeps_complete_episodes() -> None:
    class Breaks(CountingEnv):
        """In its third episode, an observation is not finite."""

        n_episodes = 0

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.n_episodes += 1
            return super().reset(seed=seed, options=options)

        def step(self, action: np.ndarray) -> Any:
            obs, *rest = super().step(action)
            return obs * (np.nan if self.n_episodes == 3 else 1), *rest

    with pytest.raises(EpisodeError, match=r"episode 3 failed: obs of an episode are NaN or infinite \(seed 9\)") as caught:
        collect_demonstrations(Breaks(3), lambda *_: (np.zeros(2), None), 5, seed=7, progress_bar=False)
    assert caught.value.demonstrations.traj_lengths.tolist() == [3, 3]
    assert isinstance(caught.value.__cause__, ValueError)
