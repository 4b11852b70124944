"""Demonstrations with images and dictionaries: files of each format, behaviour cloning and fine-tuning on them."""

import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from sb3_dppo import BC, DPPO, Demonstrations, bc, collect_demonstrations, demonstrations, load_demonstrations
from sb3_dppo.demonstrations.demonstrations import describe
from sb3_dppo.demonstrations.rows import EpisodeRows, read_npz
from sb3_dppo.features.extractors import VitExtractor
from tests.demonstrations.test_demonstrations import write_robomimic
from tests.features.test_observations import PixelPendulum, VectorBoxDictEnv, VectorDictEnv

NETS = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=3, horizon=2)
VIT = dict(features_extractor_class=VitExtractor, features_extractor_kwargs=dict(width=16, spatial_dim=8, random_shift=4))
N = 12
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (N, 16, 16, 3), dtype=np.uint8)
STATES = RNG.normal(size=(N, 2)).astype(np.float32)
ACTIONS = RNG.uniform(-0.9, 0.9, (N, 1)).astype(np.float32)
LENGTHS = np.array([5, 4, 3])


STATE = spaces.Box(-9, 9, (2,))
RGB = spaces.Box(0, 255, (16, 16, 3), np.uint8)


class PictureEnv(gym.Env):
    """
    Nothing to learn, but observations of a chosen space.

    :param space: Observation space.
    """

    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, space: spaces.Space) -> None:
        self.observation_space = space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        return self.observation_space.sample(), 0.0, self.t == 5, False, {}


def image_space(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def make_model(env: Any, policy: str = "DiffusionMultiInputPolicy", **policy_kwargs: Any) -> DPPO:
    arguments: dict[str, Any] = dict(n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu")
    return DPPO(policy, env, policy_kwargs=NETS | policy_kwargs, **arguments)


def dict_demonstrations(**changes: Any) -> Demonstrations:
    return Demonstrations(dict(rgb=IMAGES, state=STATES) | changes, ACTIONS, LENGTHS)


def assert_same(rows: Any, expected: np.ndarray) -> None:
    assert rows.shape == expected.shape and rows.dtype == expected.dtype and len(rows) == len(expected)
    index = np.array([7, 0, 7, 11, 3])
    np.testing.assert_array_equal(rows[index], expected[index])
    np.testing.assert_array_equal(np.asarray(rows[2:9])[1:], expected[3:9])


# ---------------------------------------------------------------------- rows


def test_rows_of_episodes_are_indexed_as_an_array(tmp_path: Path) -> None:
    parts = np.split(IMAGES, np.cumsum(LENGTHS)[:-1])
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for episodes in (parts, [file.create_dataset(str(i), data=part, compression="gzip") for i, part in enumerate(parts)]):
            rows = EpisodeRows(episodes)
            assert_same(rows, IMAGES)
            for index in (np.arange(N)[::-1], IMAGES[:, 0, 0, 0] > 99, np.array([], dtype=int), np.int64(4), -1):
                np.testing.assert_array_equal(rows[index], IMAGES[index])
            for part in (slice(None), slice(3, 10), slice(6, None, 2)):
                assert isinstance(rows[part], EpisodeRows)
                np.testing.assert_array_equal(rows[part][np.arange(2)], IMAGES[part][:2])
    with pytest.raises(IndexError):
        rows[np.array([N])]


# ---------------------------------------------------------------------- .npz


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_of_the_reference(compressed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    channels_first = IMAGES.transpose(0, 3, 1, 2)
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "train.npz", images=channels_first, states=STATES, actions=ACTIONS, traj_lengths=LENGTHS)
    demonstrations = load_demonstrations(tmp_path / "train.npz")
    assert list(demonstrations.parts) == ["images", "states"] and len(demonstrations) == N
    assert isinstance(demonstrations.parts["images"], np.memmap)
    assert_same(demonstrations.parts["images"], channels_first)
    assert_same(demonstrations.parts["states"], STATES)
    renamed = load_demonstrations(tmp_path / "train.npz", obs_keys=dict(rgb="images", state=["states"]))
    assert list(renamed.parts) == ["rgb", "state"]
    assert load_demonstrations(tmp_path / "train.npz", obs_keys=["states"]).observations.shape == (N, 2)  # type: ignore[union-attr]
    # Images alone are no Dict; normalised states beside images are the env's again.
    save(tmp_path / "images.npz", images=channels_first, actions=ACTIONS, traj_lengths=LENGTHS)
    assert_same(load_demonstrations(tmp_path / "images.npz").observations, channels_first)
    ranges = dict(obs_min=np.zeros(2), obs_max=np.full(2, 4.0), action_min=-np.ones(1), action_max=np.ones(1))
    np.savez(tmp_path / "normalization.npz", **ranges)
    save(tmp_path / "small.npz", images=IMAGES, states=STATES / 9, actions=ACTIONS, traj_lengths=LENGTHS)
    np.testing.assert_allclose(load_demonstrations(tmp_path / "small.npz").parts["states"], STATES / 9 * 2 + 2, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("observations", [IMAGES, dict(rgb=IMAGES, state=STATES), {"a/b": STATES}])
def test_save_and_load(observations: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    Demonstrations(observations, ACTIONS, LENGTHS, env_id="Some-v0").save(path)
    loaded = load_demonstrations(path)
    assert loaded.env_id == "Some-v0" and isinstance(loaded.observations, dict) == isinstance(observations, dict)
    expected = observations if isinstance(observations, dict) else {"": observations}
    assert loaded.parts.keys() == expected.keys()
    for key, values in expected.items():
        assert_same(loaded.parts[key], values)
    # NumPy reads it, too, and a file may be replaced by a part of itself while it is read.
    with np.load(path, allow_pickle=False) as archive:
        assert "actions" in archive.files
    loaded.first(2).save(path)
    again = load_demonstrations(path)
    assert len(again) == 9 and [entry.name for entry in tmp_path.iterdir()] == ["d.npz"]
    for key, values in expected.items():
        np.testing.assert_array_equal(again.parts[key][np.arange(9)], values[:9])
        assert_same(loaded.parts[key], values)


def test_malformed_npz(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    fine = dict(images=IMAGES, actions=ACTIONS, traj_lengths=LENGTHS)
    for changes, message in (
        (dict(images=IMAGES.astype(np.float32)), r"images must be bytes \(uint8\).*not float32 of shape \(12, 16, 16, 3\)"),
        (dict(images=IMAGES[:, 0]), "images must be bytes"),
        (dict(images=IMAGES[:5]), "actions has 12 rows, but observations has 5"),
        (dict(states=STATES[:5]), r"observations\['states'\] has 5 rows, but observations\['images'\] has 12"),
        (dict(states=STATES * np.nan), r"observations\['states'\] is NaN or infinite in transition 0"),
    ):
        np.savez(path, **(fine | changes))
        with pytest.raises(ValueError, match=message):
            load_demonstrations(path)
    np.savez(path, actions=ACTIONS, traj_lengths=LENGTHS)
    with pytest.raises(ValueError, match="lacks observations, as states, images or obs/KEY"):
        load_demonstrations(path)
    with pytest.raises(ValueError, match="lacks observations"):
        load_demonstrations(path, obs_keys=["images"])
    # The header of the images promises more than there is.
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        np.savez(path, **fine)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members["images.npy"] = members["images.npy"].replace(b"(12, 16,", b"(99, 16,")
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        with pytest.raises(ValueError, match="d.npz can't be read as .npz"):
            load_demonstrations(path)
    with pytest.raises(ValueError, match="can't be read"):
        path.write_bytes(path.read_bytes()[:-40])
        read_npz(path, ())
    with pytest.raises(ValueError, match="observations is an empty dictionary"):
        Demonstrations({}, ACTIONS, LENGTHS)


# ---------------------------------------------------------------------- other formats


def test_robomimic(tmp_path: Path) -> None:
    content = write_robomimic(tmp_path / "d.hdf5")
    with h5py.File(tmp_path / "d.hdf5", "a") as file:
        for i, part in enumerate(np.split(IMAGES, [4, 7])):
            del file[f"data/demo_{i}/obs/agentview_image"]
            file[f"data/demo_{i}/obs/agentview_image"] = part
    demonstrations = load_demonstrations(
        tmp_path / "d.hdf5", obs_keys=dict(rgb="agentview_image", state=["object", "gripper"], object="object")
    )
    assert isinstance(demonstrations.parts["rgb"], EpisodeRows)
    assert_same(demonstrations.parts["rgb"], IMAGES)
    expected = np.column_stack([np.concatenate(content[f"obs/{key}"]) for key in ("object", "gripper")])
    np.testing.assert_allclose(demonstrations.parts["state"], expected, rtol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_allclose(demonstrations.parts["object"], expected[:, :2], rtol=1e-6)  # type: ignore[arg-type]
    train = load_demonstrations(tmp_path / "d.hdf5", obs_keys=["agentview_image"], filter_key="train").observations
    np.testing.assert_array_equal(train[np.arange(9)], IMAGES[[0, 1, 2, 3, 7, 8, 9, 10, 11]])  # type: ignore[index]
    # Without images nothing of the file stays open.
    load_demonstrations(tmp_path / "d.hdf5")
    demonstrations.save(tmp_path / "d.npz")
    assert_same(load_demonstrations(tmp_path / "d.npz").parts["rgb"], IMAGES)


def test_trajectories() -> None:
    def trajectories(observations: Any) -> list[SimpleNamespace]:
        starts = np.cumsum([0, *LENGTHS])
        return [SimpleNamespace(obs=observations(np.arange(a, b + 1) % N), acts=ACTIONS[a:b]) for a, b in pairwise(starts)]

    demonstrations = load_demonstrations(trajectories(lambda index: IMAGES[index]))
    assert_same(demonstrations.observations, IMAGES)
    # imitation's DictObs is no dict, but has its items.
    for make in (dict, lambda **parts: SimpleNamespace(items=lambda: parts.items())):
        demonstrations = load_demonstrations(
            trajectories(lambda index, make=make: make(rgb=IMAGES[index], kind=index % 3)), obs_keys=dict(a="rgb", b="kind")
        )
        assert_same(demonstrations.parts["a"], IMAGES)
        assert_same(demonstrations.parts["b"], np.arange(N, dtype=np.float32)[:, None] % 3)
    with pytest.raises(ValueError, match="can't choose from source, whose observations are not a Dict"):
        load_demonstrations(trajectories(lambda index: STATES[index]), obs_keys=["a"])


def test_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    space = spaces.Dict(rgb=RGB, state=STATE, kind=spaces.Discrete(3))
    buffers, ends = [], np.cumsum([0, *LENGTHS])
    for i, length in enumerate(LENGTHS):
        index = np.arange(ends[i], ends[i] + length + 1) % N
        buffers.append(
            minari.data_collector.EpisodeBuffer(
                id=i,
                observations=dict(rgb=list(IMAGES[index]), state=list(STATES[index]), kind=list(index % 3)),
                actions=list(ACTIONS[index[:-1]]),
                rewards=[0.5] * length,
                terminations=[False] * length,
                truncations=[False] * (length - 1) + [True],
                infos={},
            )
        )
    action_space = spaces.Box(-1, 1, (1,))
    minari.create_dataset_from_buffers(
        "test/pictures-v0", buffers, observation_space=space, action_space=action_space, data_format="hdf5"
    )
    demonstrations = load_demonstrations("minari:test/pictures-v0")
    assert demonstrations.parts.keys() == {"rgb", "state", "kind"}
    assert isinstance(demonstrations.parts["rgb"], np.memmap)
    assert_same(demonstrations.parts["rgb"], IMAGES)
    assert_same(demonstrations.parts["state"], STATES)
    assert_same(demonstrations.parts["kind"], np.arange(N, dtype=np.float32)[:, None] % 3)
    chosen = load_demonstrations("test/pictures-v0", obs_keys=["state", "kind"])
    assert chosen.observations.shape == (N, 3)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"obs_keys names \['none'\], but the Minari dataset has.*'rgb'"):
        load_demonstrations("minari:test/pictures-v0", obs_keys=["none"])
    with pytest.raises(ValueError, match="not a local Minari dataset: get it with `minari download test/none-v0`"):
        load_demonstrations("minari:test/none-v0")
    BC(make_model(PictureEnv(space), **VIT), demonstrations).train(1, progress_bar=False)


# ---------------------------------------------------------------------- behaviour cloning


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
    model = make_model(
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
        model = make_model(PictureEnv(spaces.Dict(rgb=space, state=STATE)), **VIT)
        obs = BC(model, dict_demonstrations(rgb=images))._observations(np.array([8, 0]))
        assert obs["rgb"].dtype == th.uint8
        # Chunks of two actions, so that chunk 8 is that after the last ones of the first two episodes.
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
    model = make_model(env, **(VIT | dict(horizon=1)))
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
    np.testing.assert_allclose(model.policy.obs_center, np.tile(low + half, 3), rtol=1e-5)


def test_ranges_of_a_dict_are_in_the_order_of_the_policy() -> None:
    demonstrations = collect_demonstrations(VectorDictEnv(), lambda *_: (np.zeros(1), None), 40, seed=0, progress_bar=False)
    model = make_model(VectorDictEnv())
    BC(model, demonstrations).train(1, progress_bar=False)
    parts = {key: np.asarray(rows) for key, rows in demonstrations.parts.items()}
    assert parts["b"].shape == (200, 2, 2) and parts["c"].shape == (200, 1)
    obs = {key: th.as_tensor(values if key != "c" else values[:, 0]) for key, values in parts.items()}
    features = model.policy.extract_features(obs)
    assert features.shape == (200, 2 + 4 + 3)
    assert features[:, :6].amin(0) == pytest.approx(-1, abs=1e-4) and features[:, :6].amax(0) == pytest.approx(1, abs=1e-4)
    assert (features[:, 6:].sum(1) == 1).all()
    frames = VecFrameStack(DummyVecEnv([VectorBoxDictEnv]), 2)
    BC(make_model(frames), demonstrations).train(1, progress_bar=False)


def test_images_are_shifted_in_training_and_not_in_evaluation() -> None:
    space = spaces.Dict(rgb=RGB, state=STATE)
    model = make_model(PictureEnv(space), **VIT)
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
    model = make_model(env, "DiffusionCnnPolicy", **(VIT | kwargs))
    BC(model, Demonstrations(images, actions, np.array([200])), batch_size=50, learning_rate=3e-3).train(
        15, progress_bar=False
    )
    predicted = model.predict(images, deterministic=True)[0]
    assert np.abs(predicted - actions).mean() < 0.2


@pytest.mark.parametrize(
    ("space", "observations", "message"),
    [
        (RGB, dict(rgb=IMAGES, b=STATES), r"a Dict of \['b', 'rgb'\], but .* a single array: choose.*\['NAME'\]"),
        (dict(rgb=RGB), IMAGES, r"a single array, but .* a Dict of \['rgb'\], so that \['rgb'\] are missing"),
        (
            dict(rgb=RGB, state=STATE),
            dict(images=IMAGES, state=STATES),
            r"\['rgb'\] are missing: .* \{'rgb': NAME, 'state': NAME\}",
        ),
        (dict(rgb=image_space(24, 24, 3)), dict(rgb=IMAGES), r"\['rgb'\] of shape \(16, 16, 3\).*\(3, 24, 24\).*ResizeObs"),
        (dict(rgb=RGB), dict(rgb=IMAGES / 255), r"\['rgb'\] that are numbers \(float64\).* images \(uint8, 0 to 255\)"),
        (
            dict(rgb=spaces.Box(0, 1, (16, 16, 3))),
            dict(rgb=IMAGES),
            r"\['rgb'\] that are images \(uint8\).* numbers \(float32\)",
        ),
        (dict(state=spaces.Box(-9, 9, (3,))), dict(state=STATES), r"\['state'\] of shape \(2,\), but .* \(3,\), 1 frame"),
        (dict(kind=spaces.Discrete(3)), dict(kind=STATES), r"\['kind'\] of shape \(2,\), but .*Discrete\(3\)"),
        (dict(kind=spaces.Discrete(3)), dict(kind=STATES[:, :1]), r"\['kind'\] from -.* Discrete\(3\)"),
        (dict(kind=spaces.MultiBinary(2)), dict(kind=np.full((N, 2), 2.0)), r"from 2.0 to 2.0, .*MultiBinary\(2\)"),
    ],
)
def test_observations_of_another_env(space: Any, observations: Any, message: str) -> None:
    env = PictureEnv(spaces.Dict(space) if isinstance(space, dict) else space)
    kwargs = VIT if isinstance(space, spaces.Box) or space.get("rgb", STATE).dtype == np.uint8 else {}
    model = make_model(env, "DiffusionMultiInputPolicy" if isinstance(space, dict) else "DiffusionCnnPolicy", **kwargs)
    with pytest.raises(ValueError, match=message):
        BC(model, Demonstrations(observations, ACTIONS, LENGTHS))


# ---------------------------------------------------------------------- from the env to fine-tuning


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
    model = make_model(DummyVecEnv([make_env]), policy, **(VIT if case.endswith("vit") else {}))
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


POLICY = """
import gymnasium as gym
import numpy as np
from stable_baselines3.common.envs import FakeImageEnv
from tests.features.test_observations import VectorDictEnv

SIZE = dict(screen_height=40, screen_width=40, n_channels=1, discrete=False)
gym.register("Pictures-v0", FakeImageEnv, max_episode_steps=5, kwargs=SIZE)
gym.register("Numbers-v0", VectorDictEnv, max_episode_steps=5)

def act(obs):
    return np.full(gym.make("Pictures-v0").action_space.shape, 0.5) if obs.dtype == np.uint8 else 0 / 0

def act_on_dict(obs):
    return obs["a"][:1]
"""


def test_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_envs.py").write_text(POLICY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(main: Callable[[], None], *arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)
    PPO("CnnPolicy", env, n_steps=16, batch_size=16, device="cpu", seed=0).save(tmp_path / "ppo.zip")
    collect = (demonstrations.main, "collect", "--n-episodes", 3, "--env")
    run(*collect, "my_envs:Pictures-v0", "--model", "ppo.zip", "--algo", "ppo", "-o", "model.npz")
    run(*collect, "my_envs:Pictures-v0", "--policy", "my_envs:act", "-o", "function.npz")
    for name in ("model", "function"):
        recorded = load_demonstrations(tmp_path / f"{name}.npz")
        assert recorded.observations.shape == (15, 40, 40, 1) and recorded.observations.dtype == np.uint8  # type: ignore[union-attr]
    assert (recorded.actions == 0.5).all()

    run(*collect, "my_envs:Numbers-v0", "--policy", "my_envs:act_on_dict", "-o", "dict.npz")
    inspected = run(demonstrations.main, "inspect", "model.npz")
    assert "observations, images of shape (40, 40, 1), uint8\n  " in inspected and "in a sample of 15" in inspected

    with h5py.File(tmp_path / "lift.hdf5", "w") as file:
        rng = np.random.default_rng(0)
        for i in range(2):
            file[f"data/demo_{i}/actions"] = rng.uniform(-1, 1, (6, 1))
            values = dict(x=rng.normal(size=(6, 1)), y=rng.normal(size=6), wide=rng.normal(size=(6, 4)), flat=np.ones((6, 1)))
            for name, value in values.items():
                file[f"data/demo_{i}/obs/{name}"] = value
            file[f"data/demo_{i}/obs/cam"] = rng.integers(3, 200, (6, 16, 16, 3), dtype=np.uint8)
    keys = ("--obs-keys", "b:cam", "a:x,flat")
    inspected = run(demonstrations.main, "inspect", "lift.hdf5", *keys)
    assert "observations['b'], images of shape (16, 16, 3), uint8\n  3 to 199" in inspected
    assert "observations['a'], 2 columns" in inspected and "constant      observations['a'][1]\n" in inspected
    run(demonstrations.main, "convert", "lift.hdf5", "lift.npz", *keys)
    converted = load_demonstrations(tmp_path / "lift.npz")
    assert isinstance(converted.parts["b"], np.memmap) and converted.parts["a"].shape == (12, 2)

    clone = (bc.main, "--epochs", 1, "--eval-episodes", 1, "--env")
    small = ("--policy-kwargs", "denoising_steps:2", "net_arch:{'pi':[16],'vf':[16]}", "-params", "n_steps:16")
    vit = "features_extractor_class:sb3_dppo.features.extractors.VitExtractor"
    run(
        *(*clone, "my_envs:Pictures-v0", "--demos", "model.npz", "--policy", "DiffusionCnnPolicy", "-o", "cnn.zip"),
        *(*small[:1], vit, *small[1:]),
    )
    assert isinstance(DPPO.load(tmp_path / "cnn.zip").policy.pi_features_extractor, VitExtractor)
    multi = ("--policy", "DiffusionMultiInputPolicy", "-o", "multi.zip", *small)
    run(*clone, "my_envs:Numbers-v0", "--demos", "dict.npz", "--obs-keys", "a:a", "b:b", "c:c", *multi)
    assert DPPO.load(tmp_path / "multi.zip").pretrained_on_demonstrations
    with pytest.raises(SystemExit):
        run(*clone, "Pendulum-v1", "--demos", "lift.npz", "--obs-keys", "a", "b:b", "-o", "x.zip")
    assert "must be names only, or KEY:NAME" in capsys.readouterr().err
    with pytest.raises(ValueError, match="features_extractor_class='Vit' is not the full name of a class"):
        bc._parse(["features_extractor_class:Vit"])
