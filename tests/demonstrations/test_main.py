"""The program that inspects, converts and collects demonstrations."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dppo import DPPO, bc, load_demonstrations
from sb3_dppo.demonstrations.__main__ import main
from sb3_dppo.demonstrations.collecting import EpisodeError
from sb3_dppo.features.extractors import VitExtractor
from tests.demonstrations.files import lerobot_frames, write_lerobot, write_robomimic

POLICY = """
import numpy as np

CONSTANT = 3

def act(obs):
    return np.clip(-obs[1:2] - obs[2:], -1, 1)  # pushes against what it sees

def too_far(obs):
    return [9.0]

def wrong(obs):
    return 0.0

def broken(obs):
    raise ValueError("of the policy's own")

def breaks_later(obs, calls=[0]):
    calls[0] += 1
    return [0.0] if calls[0] <= 250 else [np.nan, 0.0]
"""


def run(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sb3_dppo.demonstrations", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["demonstrations", *map(str, arguments)])
    main()


def test_inspect_and_convert(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "lift.hdf5")
    done = run("inspect", "lift.hdf5", "--obs-keys", "object", "--filter-key", "train", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["env           unknown", "episodes      2", "transitions   9"]
    assert lines[3] == "lengths       min 4, mean 4.5, max 5"
    assert lines[4].startswith("returns       ") and "±" in lines[4]
    assert lines[5] == "last steps    2 terminated" and lines[6] == "observations, 2 columns (min, max)"
    low, high = map(float, lines[7].split()[1:])
    values = load_demonstrations(tmp_path / "lift.hdf5", obs_keys=["object"], filter_key="train").observations[:, 0]
    assert (low, high) == (pytest.approx(values.min(), rel=1e-4), pytest.approx(values.max(), rel=1e-4))
    assert lines[-1] == "constant      none"

    done = run("convert", tmp_path / "lift.hdf5", tmp_path / "new" / "lift.npz", "--max-episodes", 2)
    assert done.returncode == 0, done.stderr
    assert "2 episodes, 7 transitions, return" in done.stdout
    converted, original = (load_demonstrations(tmp_path / name) for name in ("new/lift.npz", "lift.hdf5"))
    np.testing.assert_array_equal(converted.observations, original.observations[:7])
    np.testing.assert_array_equal(converted.actions, original.actions[:7])
    np.testing.assert_array_equal(converted.terminals, original.terminals[:7])  # type: ignore[index]
    assert converted.traj_lengths.tolist() == [4, 3]


def test_inspect_bundled_and_lerobot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "inspect", "hopper-medium")
    output = capsys.readouterr().out
    assert "env           Hopper-v5" in output and "transitions   25119" in output and "1314" in output
    frames = lerobot_frames((4, 3))
    frames["observation.state"][:, 1] = 0.5
    del frames["next.reward"], frames["next.done"]
    call(monkeypatch, "inspect", write_lerobot(tmp_path / "pusht", frames, [np.arange(7)]))
    output = capsys.readouterr().out
    assert "returns       unknown" in output and "last steps    unknown" in output
    assert "constant      observations[1]\n" in output


def test_collect_from_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PPO("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), seed=0, device="cpu").save(tmp_path / "ppo.zip")
    collect = ["collect", "--env", "Pendulum-v1", "--model", tmp_path / "ppo.zip", "--algo", "ppo", "--n-episodes", 2]
    done = run(*collect, "--seed", 3, "-o", tmp_path / "new" / "d.npz")
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stderr and "return=" in done.stderr  # progress
    assert "2 episodes, 400 transitions, return" in done.stdout
    recorded = load_demonstrations(tmp_path / "new" / "d.npz")
    assert recorded.env_id == "Pendulum-v1" and recorded.traj_lengths.tolist() == [200, 200]
    assert recorded.terminals is not None and not recorded.terminals.any()
    assert recorded.truncations is not None and np.flatnonzero(recorded.truncations).tolist() == [199, 399]

    # The same actions lead through the same states and rewards.
    env = gym.make("Pendulum-v1")
    assert recorded.rewards is not None
    for i in range(2):
        obs = env.reset(seed=3 + i)[0]
        for t in range(200 * i, 200 * i + 200):
            np.testing.assert_allclose(recorded.observations[t], obs, rtol=1e-5, atol=1e-6)
            obs, reward, *_ = env.step(recorded.actions[t])
            assert recorded.rewards[t] == pytest.approx(reward, rel=1e-5, abs=1e-6)

    # A seed repeats everything, the model's noise, too.
    call(monkeypatch, *collect, "--seed", 3, "-o", tmp_path / "again.npz")
    np.testing.assert_array_equal(load_demonstrations(tmp_path / "again.npz").actions, recorded.actions)
    call(monkeypatch, *collect, "--seed", 3, "--deterministic", "-o", tmp_path / "d.npz")
    deterministic = load_demonstrations(tmp_path / "d.npz")
    model = PPO.load(tmp_path / "ppo.zip", device="cpu")
    np.testing.assert_allclose(
        deterministic.actions, model.predict(deterministic.observations, deterministic=True)[0], rtol=1e-4, atol=1e-5
    )
    assert not np.array_equal(deterministic.actions, recorded.actions)


def test_collect_executes_the_chunks_of_dppo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy_kwargs = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=3, horizon=4)
    model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", act_steps=4, policy_kwargs=policy_kwargs, seed=0, device="cpu")
    model.save(tmp_path / "dppo.zip")
    call(
        monkeypatch,
        *("collect", "--env", "Pendulum-v1", "--model", tmp_path / "dppo.zip", "--n-episodes", 2, "--deterministic"),
        *("--seed", 0, "--device", "cpu", "-o", tmp_path / "d.npz"),
    )
    recorded = load_demonstrations(tmp_path / "d.npz")
    for i in range(0, 400, 4):  # 200 is a multiple of 4: an episode starts with a new chunk
        chunk = model.policy.plan(model.policy.obs_to_tensor(recorded.observations[i])[0], deterministic=True)[0]
        np.testing.assert_allclose(recorded.actions[i : i + 4], chunk, rtol=1e-4, atol=1e-5)


def test_collect_from_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policy.py").write_text(POLICY)
    collect = ["collect", "--env", "Pendulum-v1", "--n-episodes", 1, "-o", tmp_path / "d.npz", "--policy"]
    done = run(*collect, "my_policy:act", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    recorded = load_demonstrations(tmp_path / "d.npz")
    expected = np.clip(-recorded.observations[:, 1:2] - recorded.observations[:, 2:], -1, 1)
    np.testing.assert_allclose(recorded.actions, expected, rtol=1e-6)

    monkeypatch.syspath_prepend(tmp_path)
    call(monkeypatch, *collect, "my_policy:too_far")
    assert (load_demonstrations(tmp_path / "d.npz").actions == 2).all()
    with pytest.raises(ValueError, match=r"action has the shape \(\), but the env's are of shape \(1,\)"):
        call(monkeypatch, *collect, "my_policy:wrong")
    with pytest.raises(ValueError, match="of the policy's own"):
        call(monkeypatch, *collect, "my_policy:broken")
    collect[collect.index(1)] = 3
    with pytest.raises(EpisodeError, match=r"episode 2 failed: .* has the shape \(2,\).* \(1 are complete\)"):
        call(monkeypatch, *collect, "my_policy:breaks_later")
    assert load_demonstrations(tmp_path / "d.npz").traj_lengths.tolist() == [200]


def test_collect_with_vec_normalize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 1, seed=0))
    model = PPO("MlpPolicy", env, policy_kwargs=dict(net_arch=[8]), n_steps=64, batch_size=64, seed=0, device="cpu").learn(64)
    model.save(tmp_path / "ppo.zip")
    env.save(str(tmp_path / "vecnormalize.pkl"))
    call(
        monkeypatch,
        *("collect", "--env", "Pendulum-v1", "--model", tmp_path / "ppo.zip", "--algo", "ppo", "--n-episodes", 1),
        *("--vec-normalize", tmp_path / "vecnormalize.pkl", "--deterministic", "-o", tmp_path / "d.npz"),
    )
    recorded = load_demonstrations(tmp_path / "d.npz")
    assert np.linalg.norm(recorded.observations[:, :2], axis=1) == pytest.approx(1, abs=1e-5)  # cosine and sine
    expected = model.predict(env.normalize_obs(recorded.observations), deterministic=True)[0]
    np.testing.assert_allclose(recorded.actions, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("inspect none.npz", "none.npz does not exist"),
        (
            "inspect hopper-medium --obs-keys a",
            r"names \['a'\], but .*hopper-medium.npz has the observations \['states'\]",
        ),
        ("convert hopper-medium d.hdf5", "path='d.hdf5' must end in .npz"),
        ("convert hopper-medium /proc/version/d.npz", "path='/proc/version/d.npz': nothing can be written in /proc/version"),
        ("inspect hopper-medium --obs-keys s:states s:states", "names a key twice: write KEY:NAME,NAME"),
        ("convert hopper-medium d.npz --max-episodes 0", "n_episodes=0 must be at least 1"),
        ("collect --env Nope-v0 --policy m:f --n-episodes 1 -o d.npz", "env='Nope-v0' can't be made"),
        ("collect --env Pendulum-v1 --policy none.such:f --n-episodes 1 -o d.npz", "No module named 'none'"),
        ("collect --env Pendulum-v1 --policy json --n-episodes 1 -o d.npz", "policy='json' must be module:function"),
        ("collect --env Pendulum-v1 --policy json:no --n-episodes 1 -o d.npz", "module json has no function 'no'"),
        ("collect --env Pendulum-v1 --policy json:loads --algo ppo --n-episodes 1 -o d.npz", "are for a model"),
        ("collect --env Pendulum-v1 --policy json:loads --n-episodes 0 -o d.npz", "n-episodes=0 must be at least 1"),
        ("collect --env Pendulum-v1 --policy json:loads --n-episodes 1 -o d.txt", "path='d.txt' must end in .npz"),
        ("collect --env Pendulum-v1 --model m.zip --n-episodes 1 -o d.npz", "model='m.zip' does not exist"),
        ("collect --env Pendulum-v1 --model m.zip --algo ppp --n-episodes 1 -o d.npz", "algo='ppp' must be one of.*'dppo'"),
        ("collect --env Pendulum-v1 --n-episodes 1 -o d.npz", "one of the arguments --model --policy is required"),
    ],
)
def test_errors(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        call(monkeypatch, *arguments.split())
    assert exit_info.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


def test_models_of_other_envs_and_missing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    PPO("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), device="cpu").save(tmp_path / "ppo.zip")
    common = ["--model", tmp_path / "ppo.zip", "--algo", "ppo", "--n-episodes", 1, "-o", tmp_path / "d.npz"]
    with pytest.raises(SystemExit):
        call(monkeypatch, "collect", "--env", "MountainCarContinuous-v0", *common)
    assert "spaces do not match" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(monkeypatch, "collect", "--env", "Pendulum-v1", *common, "--vec-normalize", "none.pkl")
    assert "vec-normalize='none.pkl' does not exist" in capsys.readouterr().err


ENVS = """
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


def test_programs_with_images_and_dictionaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_envs.py").write_text(ENVS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(program: Callable[[], None], *arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        program()
        return capsys.readouterr().out

    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)
    PPO("CnnPolicy", env, n_steps=16, batch_size=16, device="cpu", seed=0).save(tmp_path / "ppo.zip")
    collect = (main, "collect", "--n-episodes", 3, "--env")
    run(*collect, "my_envs:Pictures-v0", "--model", "ppo.zip", "--algo", "ppo", "-o", "model.npz")
    run(*collect, "my_envs:Pictures-v0", "--policy", "my_envs:act", "-o", "function.npz")
    for name in ("model", "function"):
        recorded = load_demonstrations(tmp_path / f"{name}.npz")
        assert recorded.observations.shape == (15, 40, 40, 1) and recorded.observations.dtype == np.uint8  # type: ignore[union-attr]
    assert (recorded.actions == 0.5).all()

    run(*collect, "my_envs:Numbers-v0", "--policy", "my_envs:act_on_dict", "-o", "dict.npz")
    inspected = run(main, "inspect", "model.npz")
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
    inspected = run(main, "inspect", "lift.hdf5", *keys)
    assert "observations['b'], images of shape (16, 16, 3), uint8\n  3 to 199" in inspected
    assert "observations['a'], 2 columns" in inspected and "constant      observations['a'][1]\n" in inspected
    run(main, "convert", "lift.hdf5", "lift.npz", *keys)
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
