"""What the processes of tests/test_ranks.py run: python -m tests.rank_program SCENARIO FOLDER, alone or under torchrun."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_dppo import DPPO, ranks
from tests.toy_envs import ResumableWalkEnv, WalkEnv

# Envs of all processes together.
N_ENVS = 4
DDIM = dict(denoising_steps=4, net_arch=[16])


class PictureEnv(gym.Env):
    """A picture of where the last action was; episodes of five steps."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
        self.action_space = spaces.Box(-1, 1, (2,))

    def _obs(self) -> np.ndarray:
        picture = np.zeros((1, 36, 36), np.uint8)
        row, column = (18 + 17 * self.position).astype(int)
        picture[0, row, column:] = 255
        return picture

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.position = 0, self.np_random.uniform(-1, 1, 2)
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.position = np.clip(self.position + 0.3 * action, -1, 1)
        return self._obs(), -float(np.abs(self.position).sum()), False, self.t == 5, {}


CASES: dict[str, dict[str, Any]] = dict(
    cooling_down=dict(lr_decay="cooldown"),
    learned_std=dict(learn_std="state", advantage_quantiles=(0.05, 0.95), target_kl=5e-4),
    learned_eta=dict(scheduler="ddim", learn_eta="state", min_sampling_std=0.1, ent_coef=0.01, policy_kwargs=DDIM),
    annealed=dict(
        **dict(ft_denoising_steps=3, ft_denoising_anneal=(1, 1), min_sampling_std=0.1, bc_coef=0.1, kl_coef=0.1),
        **dict(n_accumulate=2, policy_kwargs=DDIM),
    ),
    pixels=dict(policy="DiffusionCnnPolicy", policy_kwargs=dict(net_arch=[16])),
    # So few pairs that ranks have no share of some minibatches.
    small=dict(n_steps=4, batch_size=2, n_epochs=1),
)


def make_model(env_class: type[gym.Env], n_envs: int | None = None, **changes: Any) -> DPPO:
    env = DummyVecEnv([lambda: Monitor(env_class())] * (n_envs or N_ENVS // ranks.size()))
    arguments: dict[str, Any] = dict(policy="DiffusionMlpPolicy", n_steps=16, batch_size=48, n_epochs=2, seed=0, device="cpu")
    arguments["lr_decay"] = "constant"  # so that one run and two shorter ones are the same
    return DPPO(env=env, **{**arguments, **changes})


def save_parameters(model: DPPO, path: Path) -> None:
    if ranks.rank() == 0:
        parameters = {name: value.numpy() for name, value in model.policy.state_dict().items()}
        logged = {name: value for name, value in model.logger.name_to_value.items() if isinstance(value, float)}
        np.savez(path, num_timesteps=model.num_timesteps, **parameters, **{f"logged/{k}": v for k, v in logged.items()})


def update_three_times(folder: Path) -> None:
    for name, changes in CASES.items():
        model = make_model(PictureEnv if name == "pixels" else WalkEnv, **changes)
        model.set_logger(configure(str(folder / name), ["csv"] if ranks.rank() == 0 else []))
        model.learn(3 * model.n_steps * N_ENVS)
        save_parameters(model, folder / f"{name}.npz")


def train_and_save(folder: Path) -> None:
    """Once without a pause, and once saved in the middle of the third rollout."""
    model = make_model(ResumableWalkEnv)
    model.learn(4 * 16 * N_ENVS)
    save_parameters(model, folder / "whole.npz")

    class Save(BaseCallback):
        def _on_step(self) -> bool:
            if ranks.rank() == 0 and self.num_timesteps == 2 * 16 * N_ENVS + 5 * N_ENVS:
                self.model.save(folder / "middle.zip")
            return True

    make_model(ResumableWalkEnv).learn(3 * 16 * N_ENVS, callback=Save())
    model = make_model(ResumableWalkEnv)
    model.learn(2 * 16 * N_ENVS)
    if ranks.rank() == 0:
        model.save(folder / "end.zip")
    ranks.gather(None)  # The file is there.


def resume(folder: Path) -> None:
    for name in ("middle", "end"):
        model = DPPO.load(folder / f"{name}.zip", env=DummyVecEnv([ResumableWalkEnv] * (N_ENVS // ranks.size())))
        model.learn(4 * 16 * N_ENVS - model.num_timesteps, reset_num_timesteps=False)
        save_parameters(model, folder / f"{name}.npz")


def stop(folder: Path) -> None:
    """The last rank's callback stops training."""

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return ranks.rank() < ranks.size() - 1 or self.n_calls < 20

    model = make_model(WalkEnv)
    model.learn(100 * 16 * N_ENVS, callback=Stop())
    rank = ranks.rank()
    ranks.leave()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    (folder / f"stopped_{rank}.json").write_text(json.dumps(dict(n_rollouts=model.n_rollouts, threads=threads)))


def fail(folder: Path) -> None:
    class FailingEnv(WalkEnv):
        def step(self, action: np.ndarray) -> Any:
            if ranks.rank() == 1:
                raise RuntimeError("the simulator broke")
            return super().step(action)

    make_model(FailingEnv).learn(16 * N_ENVS)


def hang(folder: Path) -> None:
    """A simulator that never answers, after one of the ranks has evaluated for longer than that would take to be noticed."""

    class HangingEnv(WalkEnv):
        def step(self, action: np.ndarray) -> Any:
            if ranks.rank() == 1 and (folder / "evaluated").exists():
                time.sleep(1000)
            return super().step(action)

    class Evaluate(BaseCallback):
        def _on_step(self) -> bool:
            if ranks.rank() == 0 and self.n_calls == 20:
                start = time.monotonic()
                while time.monotonic() - start < 2 * ranks.HANG_SECONDS:
                    self.model.predict(self.locals["new_obs"])
                    time.sleep(0.1)
                (folder / "evaluated").touch()
            return True

    make_model(HangingEnv).learn(100 * 16 * N_ENVS, callback=Evaluate())


def restart(folder: Path) -> None:
    """A program that goes on from its last checkpoint, if there is one. A rank of its first life is killed."""
    env = DummyVecEnv([ResumableWalkEnv] * (N_ENVS // ranks.size()))
    checkpoints = sorted((folder / "checkpoints").glob("*.zip"), key=lambda path: path.stat().st_mtime)
    model = DPPO.load(checkpoints[-1], env=env) if checkpoints else make_model(ResumableWalkEnv)

    class Kill(BaseCallback):
        def _on_step(self) -> bool:
            if not checkpoints and ranks.rank() == 1 and self.n_calls == 41:
                # Within a rollout ranks do not wait for each other: the first may still be on its way to its checkpoint.
                while not any((folder / "checkpoints").glob("*.zip")):
                    time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGKILL)
            return True

    # Of the steps of one env: in the third rollout.
    callbacks = [CheckpointCallback(35 if ranks.rank() == 0 else 10**9, str(folder / "checkpoints")), Kill()]
    model.learn(4 * 16 * N_ENVS - model.num_timesteps, callback=callbacks, reset_num_timesteps=not checkpoints)
    save_parameters(model, folder / f"restarted_{len(checkpoints)}.npz")
    model = make_model(ResumableWalkEnv)
    model.learn(4 * 16 * N_ENVS)
    save_parameters(model, folder / "whole.npz")


def different_envs(folder: Path) -> None:
    make_model(WalkEnv, n_envs=1 + ranks.rank()).learn(16)


def vec_normalize(folder: Path) -> None:
    DPPO("DiffusionMlpPolicy", VecNormalize(DummyVecEnv([WalkEnv])), n_steps=16).learn(16)


if __name__ == "__main__":
    th.set_num_threads(1)
    ranks.join()
    {
        function.__name__: function
        for function in (update_three_times, train_and_save, resume, stop, fail, hang, restart, different_envs, vec_normalize)
    }[sys.argv[1]](Path(sys.argv[2]))
