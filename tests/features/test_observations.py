"""Images and dictionaries of observations, and the policies for them."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_dppo import BC, DPPO, Demonstrations
from sb3_dppo.features import VitExtractor
from sb3_dppo.features.observations import check_observation_space, vector_keys

NETS = dict(pi=[16], vf=[16])


class PixelPendulum(gym.ObservationWrapper):
    """Pendulum-v1 seen as an image of 64 × 64, alone or in a Dict with its angular velocity."""

    def __init__(self, as_dict: bool = False) -> None:
        super().__init__(gym.make("Pendulum-v1", render_mode="rgb_array"))
        self.as_dict = as_dict
        image = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        velocity = spaces.Box(-8.0, 8.0, (1,), np.float64)
        self.observation_space = spaces.Dict(rgb=image, velocity=velocity) if as_dict else image

    def observation(self, observation: np.ndarray) -> Any:
        frame: Any = self.env.render()
        image = np.ascontiguousarray(frame[10:490:8, 10:490:8][:64, :64])
        image = np.pad(image, [(0, 64 - image.shape[0]), (0, 64 - image.shape[1]), (0, 0)], mode="edge")
        return dict(rgb=image, velocity=observation[2:].astype(np.float64)) if self.as_dict else image


class VectorDictEnv(gym.Env):
    """A Dict of vectors and discrete values; the best action is the first number."""

    observation_space = spaces.Dict(
        a=spaces.Box(-1, 1, (2,), np.float64), b=spaces.Box(-9, 9, (2, 2), np.float32), c=spaces.Discrete(3)
    )
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        self.obs = self._draw()
        return self.obs, {}

    def _draw(self) -> dict[str, Any]:
        rng = self.np_random
        return dict(a=rng.uniform(-1, 1, 2), b=rng.uniform(-9, 9, (2, 2)).astype(np.float32), c=int(rng.integers(3)))

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        reward = -float((action[0] - self.obs["a"][0]) ** 2)
        self.t += 1
        self.obs = self._draw()
        return self.obs, reward, False, self.t >= 5, {}


def make_model(policy: str, env: Any, **kwargs: Any) -> DPPO:
    policy_kwargs = dict(net_arch=NETS, denoising_steps=2) | kwargs.pop("policy_kwargs", {})
    arguments: dict[str, Any] = dict(n_steps=16, batch_size=16, n_epochs=2, seed=0, device="cpu")
    return DPPO(policy, env, policy_kwargs=policy_kwargs, **(arguments | kwargs))


VIT = dict(features_extractor_class=VitExtractor, features_extractor_kwargs=dict(width=16, spatial_dim=8, random_shift=4))
CASES = {
    "cnn": ("DiffusionCnnPolicy", lambda: PixelPendulum(), dict()),
    "cnn-vit": ("DiffusionCnnPolicy", lambda: PixelPendulum(), dict(policy_kwargs=VIT)),
    "dict": ("DiffusionMultiInputPolicy", lambda: PixelPendulum(as_dict=True), dict()),
    "dict-vit-chunks": (
        "DiffusionMultiInputPolicy",
        lambda: PixelPendulum(as_dict=True),
        dict(policy_kwargs=VIT | dict(horizon=4), act_steps=2),
    ),
    "dict-vectors": ("DiffusionMultiInputPolicy", VectorDictEnv, dict(policy_kwargs=dict(horizon=2))),
    "unet-vit": ("DiffusionUnetPolicy", lambda: PixelPendulum(), dict(policy_kwargs=VIT | dict(net_arch=dict(pi=[8, 16])))),
    "mlp-film": ("DiffusionMlpPolicy", "Pendulum-v1", dict(policy_kwargs=dict(film=True, net_arch=dict(pi=[16] * 3)))),
    "unet": ("DiffusionUnetPolicy", "Pendulum-v1", dict(policy_kwargs=dict(net_arch=dict(pi=[8, 16])))),
    "transformer": ("DiffusionTransformerPolicy", "Pendulum-v1", dict(policy_kwargs=dict(net_arch=dict(pi=[16, 16])))),
    "transformer-vit": (
        "DiffusionTransformerPolicy",
        lambda: PixelPendulum(as_dict=True),
        dict(policy_kwargs=VIT | dict(net_arch=dict(pi=[16, 16]))),
    ),
}


SAMPLERS: dict[str, dict[str, Any]] = {
    "ddpm": dict(scheduler="ddpm"),
    "ddim": dict(scheduler="ddim"),
    "ddim-eta-per-action": dict(scheduler="ddim", learn_eta="action", eta=0.5, min_sampling_std=0.05),
    "ddim-eta-of-state": dict(scheduler="ddim", learn_eta="state", eta=0.5, min_sampling_std=0.05),
    "euler": dict(scheduler="EulerDiscreteScheduler"),
}
# One case of each policy class, and DDPM and DDIM for all.
EVERY_SAMPLER = ("mlp-film", "unet", "transformer", "cnn", "dict-vectors")


@pytest.mark.parametrize(
    "case,sampler",
    [(case, sampler) for case in CASES for sampler in SAMPLERS if case in EVERY_SAMPLER or sampler in ("ddpm", "ddim")],
)
def test_train_save_load_predict(case: str, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    policy, make_env, kwargs = CASES[case]
    env = make_env if isinstance(make_env, str) else DummyVecEnv([make_env, make_env])
    model = make_model(policy, env, **SAMPLERS[sampler], **kwargs)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(64)
    changed = [name for name, value in model.policy.state_dict().items() if not th.equal(value, before[name])]
    assert any(name.startswith("denoiser.") for name in changed)
    assert any(name.startswith("critic.") for name in changed)
    assert not any(name.startswith("base_") for name in changed)
    assert any(name.startswith("noise_network.") for name in changed) == ("eta" in sampler)
    if list(model.policy.pi_features_extractor.parameters()):
        # Encoders learn with their networks, and observations of images stay bytes.
        assert any(name.startswith("pi_features_extractor.") for name in changed)
        assert any(name.startswith("vf_features_extractor.") for name in changed)
        assert model.shuffle_mode == "decisions"
        stored = model.rollout_buffer.observations
        assert (stored["rgb"] if isinstance(stored, dict) else stored).dtype == th.uint8

    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    obs, state = model.get_env().reset(), None
    starts = np.ones(model.n_envs, dtype=bool)
    loaded_state: Any = None
    for _ in range(3):
        action, state = model.predict(obs, state, starts, deterministic=True)
        same_action, loaded_state = loaded.predict(obs, loaded_state, starts, deterministic=True)
        np.testing.assert_array_equal(action, same_action)
        obs, _, starts, _ = model.get_env().step(action)
    mean, _ = evaluate_policy(loaded, DummyVecEnv([make_env]) if callable(make_env) else model.get_env(), n_eval_episodes=1)
    assert np.isfinite(mean)
    loaded.learn(32)


def test_sb3s_fake_image_env_and_frames() -> None:
    def make_env() -> gym.Env:
        return FakeImageEnv(screen_height=40, screen_width=40, n_channels=3, discrete=False)

    make_model("DiffusionCnnPolicy", make_env()).learn(32)
    stacked = VecFrameStack(DummyVecEnv([make_env, make_env]), 4)
    model = make_model("DiffusionCnnPolicy", stacked)
    assert model.observation_space.shape == (12, 40, 40)
    model.learn(32)
    dict_model = make_model("DiffusionMultiInputPolicy", VecFrameStack(DummyVecEnv([VectorBoxDictEnv]), 3))
    assert dict_model.observation_space["a"].shape == (6,)
    dict_model.learn(32)


class VectorBoxDictEnv(VectorDictEnv):
    """Without the discrete part, which can't be stacked."""

    observation_space = spaces.Dict(a=spaces.Box(-1, 1, (2,), np.float64))

    def _draw(self) -> dict[str, Any]:
        return dict(a=self.np_random.uniform(-1, 1, 2))


def test_dict_observations_can_be_normalised() -> None:
    model = make_model("DiffusionMultiInputPolicy", DummyVecEnv([VectorDictEnv]))
    policy = model.policy
    low, high = np.array([-1, -1, -9, -9, -9, -9.0]), np.array([1, 1, 9, 9, 9, 9.0])
    policy.normalizer.set_ranges(low, high, np.array([-1.0]), np.array([1.0]))
    obs = dict(a=th.tensor([[1.0, -1.0]]), b=th.tensor([[[9.0, -9.0], [0.0, 4.5]]]), c=th.tensor([2]))
    features = policy.extract_features(obs)
    expected = th.tensor([[1, -1, 1, -1, 0, 0.5, 0, 0, 1]])
    th.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    env = VecNormalize(DummyVecEnv([VectorDictEnv]), norm_obs_keys=["a", "b"], norm_reward=False)
    make_model("DiffusionMultiInputPolicy", env).learn(32)


@pytest.mark.parametrize("as_dict", [False, True])
def test_float_images_train_save_load_and_predict(as_dict: bool, tmp_path: Path) -> None:
    class FloatImages(gym.ObservationWrapper):
        """Divides the images by 255."""

        def __init__(self) -> None:
            super().__init__(PixelPendulum())
            image = gym.spaces.Box(0, 1, (3, 64, 64), np.float32)
            self.observation_space = gym.spaces.Dict(image=image) if as_dict else image

        def observation(self, observation: np.ndarray) -> Any:
            image = np.moveaxis(observation, -1, 0).astype(np.float32) / 255
            return dict(image=image) if as_dict else image

    policy = "DiffusionMultiInputPolicy" if as_dict else "DiffusionCnnPolicy"
    model = make_model(policy, FloatImages(), policy_kwargs=dict(normalize_images=False)).learn(16)
    assert model.policy.normalizer.obs_center.numel() == 0  # images are no vectors
    images = np.random.default_rng(0).random((20, 3, 64, 64), dtype=np.float32)
    demonstrations = Demonstrations(dict(image=images) if as_dict else images, np.zeros((20, 1)), np.array([20]))
    BC(model, demonstrations).train(1, progress_bar=False)
    model.save(tmp_path / "model")
    obs = FloatImages().reset(seed=0)[0]
    loaded = DPPO.load(tmp_path / "model", device="cpu")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


def test_a_dict_policy_learns() -> None:
    model = make_model("DiffusionMultiInputPolicy", DummyVecEnv([VectorDictEnv] * 4), n_steps=32, batch_size=64, n_epochs=5)
    env = DummyVecEnv([VectorDictEnv])
    env.seed(0)
    before, _ = evaluate_policy(model, env, n_eval_episodes=50)
    model.learn(4_000)
    env.seed(0)
    after, _ = evaluate_policy(model, env, n_eval_episodes=50)
    assert after > 0.6 * before, (before, after)  # Returns are negative.


def test_the_encoder_runs_once_per_decision() -> None:
    rows = []
    for n_steps in (1, 4):
        model = make_model(
            "DiffusionCnnPolicy",
            FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False),
            ft_denoising_steps=n_steps,
            policy_kwargs=dict(denoising_steps=4),
            n_epochs=1,
            batch_size=1000,
        )
        model.pretrained_on_demonstrations = True
        seen: list[int] = []
        callback = model._setup_learn(16)[1]
        model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)
        model.policy.pi_features_extractor.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(len(output)))
        model.train()
        rows.append(sum(seen))
    assert rows[0] == rows[1] == 16


@pytest.mark.parametrize(
    ("policy", "space", "message"),
    [
        ("DiffusionMlpPolicy", spaces.Box(0, 255, (3, 40, 40), np.uint8), "use DiffusionCnnPolicy"),
        ("DiffusionMlpPolicy", spaces.Dict(a=spaces.Box(-1, 1, (2,))), "use DiffusionMultiInputPolicy"),
        ("DiffusionCnnPolicy", spaces.Box(-1, 1, (2,)), "use DiffusionMlpPolicy"),
        ("DiffusionCnnPolicy", spaces.Dict(a=spaces.Box(-1, 1, (2,))), "use DiffusionMultiInputPolicy"),
        ("DiffusionMultiInputPolicy", spaces.Box(-1, 1, (2,)), "use DiffusionMlpPolicy"),
        ("DiffusionMlpPolicy", spaces.Tuple([spaces.Box(-1, 1, (2,))]), "FlattenObservation"),
        ("DiffusionMlpPolicy", spaces.Discrete(3, start=1), "it must start at 0: shift it in a wrapper"),
        ("DiffusionMlpPolicy", spaces.MultiDiscrete([3, 3], start=[0, 1]), "it must start at 0"),
        ("DiffusionMultiInputPolicy", spaces.Dict(a=spaces.Discrete(3, start=1)), "'a' must start at 0: shift it"),
        ("DiffusionMlpPolicy", spaces.Box(-1, 1, ()), r"it must have a dimension.*ReshapeObservation\(env, \(1,\)\)"),
        ("DiffusionMultiInputPolicy", spaces.Dict(a=spaces.Box(-1, 1, ())), "'a' must have a dimension"),
        ("DiffusionCnnPolicy", spaces.Box(0, 1, (3, 40, 40)), "float, channels first, with normalize_images=False"),
    ],
)
def test_wrong_policies_are_refused(policy: str, space: spaces.Space, message: str) -> None:
    class Env(gym.Env):
        observation_space = space
        action_space = spaces.Box(-1, 1, (1,))

    with pytest.raises(ValueError, match=message):
        make_model(policy, Env())


def test_spaces_that_sb3_cannot_preprocess_are_refused() -> None:
    for space, message in (
        (spaces.Dict(a=spaces.Dict(b=spaces.Box(-1, 1, (2,)))), "'a' is a Dict: wrap the env in .*FlattenObservation"),
        (spaces.Text(3), "it is a Text: wrap"),
    ):
        with pytest.raises(ValueError, match=message):
            check_observation_space(space, None)


FLOAT_IMAGE = spaces.Box(0, 1, (3, 40, 40), np.float32)


@pytest.mark.parametrize(
    ("extractor_class", "space"),
    [
        (NatureCNN, FLOAT_IMAGE),
        (CombinedExtractor, spaces.Dict(image=FLOAT_IMAGE, vector=spaces.Box(-1, 1, (2,)))),
        (FlattenExtractor, FLOAT_IMAGE),
    ],
)
def test_float_images_are_images_where_they_are_not_divided(extractor_class: Any, space: spaces.Space) -> None:
    check_observation_space(space, extractor_class, normalize_images=False)
    assert list(vector_keys(space, normalize_images=False)) == (["vector"] if isinstance(space, spaces.Dict) else [])
    assert len(vector_keys(space)) == (2 if isinstance(space, spaces.Dict) else 1)
    images = spaces.Dict(image=spaces.Box(0, 255, (3, 40, 40), np.uint8))
    assert not vector_keys(images) and not vector_keys(images, normalize_images=False)


def test_what_is_said_of_a_box_without_dimensions_helps() -> None:
    class Env(gym.Env):
        observation_space = spaces.Box(-1, 1, ())
        action_space = spaces.Box(-1, 1, (1,))

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
            return self.observation_space.sample(), {}

        def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
            return self.observation_space.sample(), 0.0, False, False, {}

    make_model("DiffusionMlpPolicy", gym.wrappers.ReshapeObservation(Env(), (1,))).learn(16)
