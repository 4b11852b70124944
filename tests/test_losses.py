"""The update rule as functions of a minibatch."""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_dppo import DPPO
from sb3_dppo.buffers import DenoisingRolloutBufferSamples
from sb3_dppo.features.extractors import VitExtractor
from sb3_dppo.losses import clip_ranges, pair_advantages

SMALL: dict[str, Any] = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=4, horizon=4)


class PixelEnv(gym.Env):
    """Observes noise."""

    observation_space = spaces.Box(0, 255, (3, 16, 16), np.uint8)
    action_space = spaces.Box(-1, 1, (2,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.integers(256, size=(3, 16, 16), dtype=np.uint8), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        return self.np_random.integers(256, size=(3, 16, 16), dtype=np.uint8), float(action[0]), False, self.t == 9, {}


class LearningExtractor(BaseFeaturesExtractor):
    """Has parameters, and counts what it sees."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, 5)
        self.linear = nn.Linear(3, 5)
        self.rows = 0

    def forward(self, obs: th.Tensor) -> th.Tensor:
        self.rows += len(obs)
        return self.linear(obs)


def rolled_out(env: Any = "Pendulum-v1", policy: str = "DiffusionMlpPolicy", **kwargs: Any) -> DPPO:
    """
    :return: A model with a rollout, whose policy is still the one that made it.
    """
    arguments: dict[str, Any] = dict(n_steps=16, batch_size=16, n_epochs=1, policy_kwargs=SMALL, seed=0, device="cpu")
    model = DPPO(policy, make_vec_env(env, 2), **{**arguments, "learning_rate": 0.0, "critic_learning_rate": 0.0, **kwargs})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.learn(32)
    return model


@pytest.mark.parametrize("shuffle", ["pairs", "decisions"])
@pytest.mark.parametrize("extractor", [None, LearningExtractor])
def test_the_order_of_pairs_does_not_matter(shuffle: str, extractor: Any) -> None:
    policy_kwargs = SMALL if extractor is None else dict(SMALL, features_extractor_class=extractor)
    model = rolled_out(shuffle=shuffle, policy_kwargs=policy_kwargs)
    samples = next(model.rollout_buffer.get(None, shuffle))
    expected, metrics = model.loss(samples)
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    order = th.randperm(len(samples.decision_index))
    names = ("decision_index", "denoising_index", "chain_prev", "chain_next", "old_log_prob")
    permuted = samples._replace(**{name: getattr(samples, name)[order] for name in names})
    loss, metrics = model.loss(permuted)
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    th.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_an_extractor_with_parameters_sees_each_decision_once() -> None:
    model = rolled_out(policy_kwargs=dict(SMALL, features_extractor_class=LearningExtractor))
    samples = next(model.rollout_buffer.get(None, "pairs"))
    extractor: Any = model.policy.pi_features_extractor
    extractor.rows = 0
    model.loss(samples)
    assert extractor.rows == model.rollout_buffer.size() < len(samples.decision_index)


def samples_of(
    advantages: list[float], decision_index: list[int], denoising_index: list[int]
) -> DenoisingRolloutBufferSamples:
    nothing = th.zeros(0)
    return DenoisingRolloutBufferSamples(
        *(nothing, nothing, nothing, th.tensor(advantages), nothing),
        *(th.tensor(decision_index), th.tensor(denoising_index)),
        *(nothing, nothing, nothing, th.zeros(0, dtype=th.long)),
    )


def test_advantages() -> None:
    samples = samples_of([1.0, 3.0], [0, 1, 1, 0], [0, 0, 1, 1])
    np.testing.assert_allclose(pair_advantages(samples, 2, 0.5, normalize=False), [0.5, 1.5, 3, 1])
    expected = np.array([-1, 1, 1, -1]) / np.std([-1, 1, 1, -1], ddof=1)
    np.testing.assert_allclose(pair_advantages(samples, 2), expected, rtol=1e-6)
    clamped = pair_advantages(samples_of([0.0, 1, 2, 100], [0, 1, 2, 3], [0] * 4), 1, 1.0, False, (0.0, 0.5))
    np.testing.assert_allclose(clamped, [0, 1, 1.5, 1.5])


@pytest.mark.parametrize("value", [-1.8011, 1e-3, 12345.678, 0.0])
def test_rounding_does_not_become_an_advantage(value: float) -> None:
    for n in (2, 5, 1000):
        assert (pair_advantages(samples_of([value], [0] * n, [0] * n), 1) == 0).all()
    # Small differences that are none of rounding are still scaled up.
    different = pair_advantages(samples_of([1.0, 1.0001], [0, 1], [0, 0]), 1)
    np.testing.assert_allclose(different, [-(0.5**0.5), 0.5**0.5], rtol=1e-2)


def test_clip_range_grows_from_base() -> None:
    i = np.arange(4) / 3
    expected = 0.01 + 0.09 * (np.exp(3 * i) - 1) / (np.exp(3) - 1)
    np.testing.assert_allclose(clip_ranges(4, 0.1, 0.01, 3.0), expected, rtol=1e-5)
    np.testing.assert_allclose(clip_ranges(4, 0.1, 0.01, 0.0), [0.01, 0.04, 0.07, 0.1], rtol=1e-5)
    np.testing.assert_allclose(clip_ranges(4, 0.005, 0.01), [0.005] * 4, rtol=1e-5)  # a schedule has come below the base
    np.testing.assert_allclose(clip_ranges(4, 0.1), [0.1] * 4, rtol=1e-5)
    np.testing.assert_allclose(clip_ranges(1, 0.2, 0.01), [0.2], rtol=1e-5)


def image_model(**extractor_kwargs: Any) -> DPPO:
    kwargs = dict(width=8, spatial_dim=4, n_heads=2, **extractor_kwargs)
    policy_kwargs = dict(SMALL, features_extractor_class=VitExtractor, features_extractor_kwargs=kwargs)
    return rolled_out(PixelEnv, "DiffusionCnnPolicy", policy_kwargs=policy_kwargs, kl_coef=1.0, ft_denoising_steps=2)


def test_a_policy_has_no_divergence_from_itself_whatever_augments_its_observations() -> None:
    model = image_model(random_shift=4)
    model.policy.set_training_mode(True)
    samples = next(model.rollout_buffer.get(None, "decisions"))
    features, base_features = model.policy.pair_features(samples.observations, samples.decision_index, True)
    th.testing.assert_close(features, base_features)
    assert model.loss(samples)[1]["base_kl"] == pytest.approx(0.0, abs=1e-9)
    # The images are shifted anew each time.
    assert not th.equal(features, model.policy.pair_features(samples.observations, samples.decision_index, True)[0])


def test_the_base_policy_stays_in_evaluation_mode() -> None:
    class Normalising(BaseFeaturesExtractor):
        def __init__(self, observation_space: spaces.Space) -> None:
            super().__init__(observation_space, 3)
            self.norm = nn.BatchNorm1d(3)

        def forward(self, obs: th.Tensor) -> th.Tensor:
            return self.norm(obs)

    model = rolled_out(policy_kwargs=dict(SMALL, features_extractor_class=Normalising), kl_coef=1.0)
    base: Any = model.policy.base_features_extractor
    assert not base.training and not model.policy.base_denoiser.training
    assert base.norm.num_batches_tracked == 0 and (base.norm.running_mean == 0).all()
    actor: Any = model.policy.pi_features_extractor
    assert actor.norm.num_batches_tracked > 0


def test_behaviour_cloning_samples_one_base_chain_per_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rolled_out(bc_coef=0.1, ft_denoising_steps=4, batch_size=8)
    rows: list[int] = []
    sample_chain = model.policy.sample_chain

    def counting(obs: th.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(obs))
        return sample_chain(obs, *args, **kwargs)

    monkeypatch.setattr(model.policy, "sample_chain", counting)
    model.train()
    assert sum(rows) == model.rollout_buffer.size()
