"""The programs and commands on the pages of the documentation run, one after the other, with fewer steps."""

import functools
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import huggingface_hub.constants
import numpy as np
import optuna
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_dppo
from sb3_dppo import BC, DPPO, load_demonstrations
from sb3_dppo.envs import BatchedStep, TorchVecEnv
from tests.commands import run_forked
from tests.demonstrations.files import write_robomimic
from tests.importers import test_lerobot, test_reference
from tests.runs.fake_hub import fake_hub
from tests.test_docs import BLOCK, PAGES, ROOT

PROGRAMS = {
    page.name: [code for language, code in BLOCK.findall(page.read_text("utf-8")) if language == "python"] for page in PAGES
}
# They need what these tests do without.
EXTRAS = ("envpool", "metaworld", "mujoco_playground", "robosuite")
LEROBOT = "outputs/train/hopper/checkpoints/last/pretrained_model"
N_STEPS = 500
# What follows a command, or the part of it that is given here, to make it short.
SHORT = {
    "sb3_dppo.bc": "--epochs 1 --eval-episodes 1",
    "sb3_dppo.demonstrations collect": "--n-episodes 2",
    "sb3_dppo.plots chains": "--steps 3 --chunks 5",
    "rl_zoo3.train": "-n 128 --eval-freq 64 --eval-episodes 1 -params n_steps:64 n_envs:1",
    "rl_zoo3.train -optimize": "--n-trials 1 --n-evaluations 1",
    "rl_zoo3.enjoy": "-n 20",
    "rl_zoo3.record_video": "-n 20",
    "examples/avoiding.py": "--epochs 1 --episodes 2",
    "examples/gif.py": "--steps 8",
    "examples/onnx_runtime.py": "--n-episodes 1",
}
# Those that set the project up, take hours, or are tried elsewhere; envs and packages that are not here.
LEFT_OUT = (
    "pip ",
    "venv",
    "make ",
    "torchrun",
    "benchmarks/",
    "record_training",
    "envpool",
    "my_envs",
    "MetaWorld",
    "Robosuite",
    "--track",
)


class Enough(Exception):
    """A program that goes on until somebody stops it."""


class Arm(gym.Env):
    """The robot of the LeRobot policy that tests have."""

    observation_space = spaces.Box(-np.inf, np.inf, (5,))
    action_space = spaces.Box(-10, 10, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(5, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.ones(5, dtype=np.float32), 1.0, False, False, {}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What the reader of a page has, in this process and in the folder where the programs run."""
    monkeypatch.chdir(tmp_path)
    make, learn, clone, explore, step = DPPO.__init__, DPPO.learn, BC.train, SAC.learn, DummyVecEnv.step
    n_steps = 0

    def step_or_stop(*arguments: Any, **options: Any) -> Any:
        nonlocal n_steps
        n_steps += 1
        if n_steps % N_STEPS == 0:
            raise Enough
        return step(*arguments, **options)

    @functools.wraps(make)  # Names of arguments are checked.
    def make_small(*arguments: Any, **options: Any) -> None:
        make(*arguments, **options | dict(n_steps=16, n_epochs=1))

    monkeypatch.setattr(DPPO, "__init__", make_small)
    monkeypatch.setattr(DPPO, "learn", lambda self, total_timesteps, *args, **options: learn(self, 16, *args, **options))
    monkeypatch.setattr(BC, "train", lambda self, *args, **options: clone(self, n_epochs=1, progress_bar=False))
    monkeypatch.setattr(SAC, "learn", lambda self, total_timesteps: explore(self, 16))
    monkeypatch.setattr(DummyVecEnv, "step", step_or_stop)

    agent = dict(denoising_steps=5, horizon=4)
    model = DPPO("DiffusionMlpPolicy", "Hopper-v5", policy_kwargs=agent, act_steps=4, seed=0)
    for path in ("pretrained", "checkpoints/rl_model_120000_steps"):
        model.save(tmp_path / path)
    model.save_pretrained("hopper-policy")
    th.save({"model": {name: th.as_tensor(value) for name, value in test_reference.weights().items()}}, "state_200.pt")
    ranges = {
        f"{part}_{end}": value * np.ones(n)
        for part, n in (("obs", 11), ("action", 3))
        for end, value in (("min", -1), ("max", 1))
    }
    np.savez("normalization.npz", **ranges)
    Path(LEROBOT).mkdir(parents=True)
    test_lerobot.write(Path(LEROBOT), noise_scheduler_type="DDPM", num_inference_steps=None)
    write_robomimic(Path("lift.hdf5"))
    gym.register("Arm-v0", Arm, max_episode_steps=20)
    names: dict[str, Any] = {name: getattr(sb3_dppo, name) for name in sb3_dppo.__all__}
    names |= dict(
        gym=gym, np=np, spaces=spaces, Path=Path, evaluate_policy=evaluate_policy, CheckpointCallback=CheckpointCallback
    )
    names |= dict(TorchVecEnv=TorchVecEnv, BatchedStep=BatchedStep, env=make_vec_env("Hopper-v5", 1), model=model)
    yield names
    del gym.registry["Arm-v0"]


def prepare(page: str, code: str, names: dict[str, Any]) -> str:
    """The program, with what its text leaves to the reader."""
    if "DiffusionMultiInputPolicy" in code:
        image = FakeImageEnv(screen_height=40, screen_width=40, n_channels=3, discrete=False)
        names["env"] = gym.wrappers.TransformObservation(
            image, lambda obs: dict(image=obs), spaces.Dict(image=image.observation_space)
        )
    if "import_lerobot_policy(" in code:
        code = code.replace('gym.make("Hopper-v5")', 'gym.make("Arm-v0")')
    if page == "zoo.md":
        study = optuna.create_study(study_name="hopper", storage="sqlite:///dppo.db")
        study.optimize(
            lambda trial: trial.report(1.0, 0) or trial.suggest_float("gamma", 0, 1) * trial.suggest_int("K", 1, 3), 4
        )
    return code


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [name for name, programs in PROGRAMS.items() if programs])
def test_programs_run(page: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with fake_hub() as (address, _):
        for name, value in (("ENDPOINT", address), ("HF_HUB_CACHE", str(tmp_path / "cache"))):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        for code in PROGRAMS[page]:
            code = prepare(page, code, names)
            try:
                with suppress(Enough):
                    exec(compile(code, page, "exec"), names)
            except (ImportError, gym.error.NamespaceNotFound):
                needed = [extra for extra in EXTRAS if re.search(extra, code, re.IGNORECASE)]
                assert needed and not any(find_spec(extra) for extra in needed)


def commands(page: Path) -> Iterator[tuple[dict[str, str], str, list[str]]]:
    """Environment variables, module or script, and arguments."""
    for language, block in BLOCK.findall(page.read_text("utf-8")):
        for line in re.sub(r"\\\n", " ", block).splitlines() if language in ("sh", "bash") else []:
            words = shlex.split(line, comments=True)
            if not words or any(name in line for name in LEFT_OUT):
                continue
            start = words.index("python")
            words[start:] = [word for word in words[start + 1 :] if word != "-m"]
            yield dict(word.split("=") for word in words[:start]), words[start], words[start + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=lambda page: page.name)
def test_commands_run(page: Path, names: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("examples", "logs"):
        (tmp_path / folder).mkdir()
    for path in (ROOT / "examples").glob("*.py"):
        (tmp_path / "examples" / path.name).symlink_to(path)
    (tmp_path / "my_module.py").write_text("def act(obs):\n    return [0.0, 0.0, 0.0]\n")
    SAC("MlpPolicy", "Hopper-v5", buffer_size=100).save("sac")
    names["model"].save("agent")
    load_demonstrations("hopper-medium").save("hopper.npz")
    if page.name == "steering.md":
        (entry,) = (block for language, block in BLOCK.findall(page.read_text("utf-8")) if language == "yaml")
        Path("steering.yml").write_text(entry)
    if page.name == "pictures.md":
        for algo in ("dppo", "ppo"):
            run_forked("rl_zoo3.train", "--algo", algo, "--env", "Pendulum-v1", *SHORT["rl_zoo3.train"].split(), cwd=tmp_path)
    for env, program, arguments in commands(page):
        for name, options in SHORT.items():
            if program == name.split()[0] and set(name.split()[1:]) <= set(arguments):
                arguments = [*arguments, *options.split()]
        arguments = ["0" if before == "--trial-id" else word for before, word in pairwise(["", *arguments])]
        run_forked(program, *arguments, cwd=tmp_path, MINARI_DATASETS_PATH=str(tmp_path / "minari"), **env)
