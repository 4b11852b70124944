"""Training runs for tests that kill them: what the processes of these tests run."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_dppo import DPPO
from tests.toy_envs import ResumableWalkEnv, WalkEnv

assert diffusers.DDPMScheduler  # It takes seconds to load, once for all processes that are forked from one that has.

SMALL = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=4, horizon=4)
TOTAL = 480
N_ENVS = 3
# With all that has a state of its own; rollouts of 16 env steps in each of 3 envs.
SETTINGS: dict[str, Any] = dict(
    n_steps=16,
    batch_size=48,
    n_epochs=2,
    policy_kwargs=SMALL,
    act_steps=4,
    ft_denoising_anneal=(3, 1),
    critic_warmup=1,
    bc_coef=0.01,
    learning_rate=1e-3,
    lr_decay="cosine",
    lr_warmup=0.1,
    min_sampling_std="lin_0.3",
    seed=0,
    device="cpu",
)


@contextmanager
def process(target: Callable[..., None], *args: Any) -> Iterator[Any]:
    """A process that runs this. Neither it nor what it starts outlives the context."""
    child = multiprocessing.get_context("forkserver").Process(target=_in_a_group, args=(target, *args))
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join()
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # type: ignore[arg-type]


def _in_a_group(target: Callable[..., None], *args: Any) -> None:
    os.setsid()  # As a program that is started in a terminal.
    # Python leaves a signal ignored that the parent ignores, as a shell does that starts something in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*args)


def make_env(resumable: bool, vec_env_cls: type[VecEnv] = DummyVecEnv) -> VecNormalize:
    env_class = ResumableWalkEnv if resumable else WalkEnv
    # Processes of envs have generators of their own.
    env_kwargs = dict(shared_generators=vec_env_cls is DummyVecEnv)
    return VecNormalize(make_vec_env(env_class, N_ENVS, env_kwargs=env_kwargs, vec_env_cls=vec_env_cls), gamma=0.9)


def make_model(resumable: bool = False, **changes: Any) -> DPPO:
    return DPPO("DiffusionMlpPolicy", make_env(resumable), **{**SETTINGS, **changes})


def fingerprint(model: DPPO) -> dict[str, str]:
    """Of everything that a run depends on."""
    env = model.get_vec_normalize_env()
    assert env is not None
    parts = dict(
        parameters=model.get_parameters(),
        counters=[model.num_timesteps, model._n_updates, model.n_rollouts, model._total_timesteps],
        progress=model._current_progress_remaining,
        steps=model.ft_denoising_steps,
        normalization=[env.obs_rms.mean, env.obs_rms.var, env.ret_rms.var, env.ret_rms.count],  # type: ignore[union-attr]
        rewards=[model.reward_scaler.statistics.var, model.reward_scaler.returns],
        generators=[th.get_rng_state(), model.policy.generator.get_state(), np.random.get_state()],
        last_obs=model._last_obs,
    )
    return {name: hashlib.sha256(repr(_plain(part)).encode()).hexdigest()[:16] for name, part in parts.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, (th.Tensor, np.ndarray, np.generic)) else value


class StopAt(BaseCallback):
    """
    :param num_timesteps: When to stop.
    """

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        self.stop = num_timesteps

    def _on_step(self) -> bool:
        return self.num_timesteps < self.stop


def train(folder: str, resumable: bool, save_freq: int = 1) -> None:
    """A run that saves checkpoints, and at last what came out."""
    th.set_num_threads(1)
    model = make_model(resumable).learn(TOTAL, callback=CheckpointCallback(save_freq, folder))
    write(folder, fingerprint(model))


def stop_cleanly(folder: str, resumable: bool, num_timesteps: int) -> None:
    """The same run, stopped by a callback and then saved."""
    th.set_num_threads(1)
    make_model(resumable).learn(TOTAL, callback=StopAt(num_timesteps)).save(Path(folder) / "stopped")


def resume(folder: str, checkpoint: str, resumable: bool) -> None:
    """The documented way, in a process that knows nothing of the first."""
    th.set_num_threads(1)
    np.random.seed(int.from_bytes(os.urandom(4), "little"))
    th.manual_seed(int.from_bytes(os.urandom(4), "little"))
    model = DPPO.load(checkpoint, env=make_env(resumable))
    model.learn(TOTAL - model.num_timesteps, reset_num_timesteps=False)
    write(folder, fingerprint(model))


def write(folder: str, result: Any) -> None:
    (Path(folder) / "result.json").write_text(json.dumps(result))


class FaultyEnv(WalkEnv):
    """
    Goes wrong at one step of its life.

    :param fault: "raise", "exit", "kill", "nan", "inf", "nan at the end", "nan reward", "nan reward at the end", "none", or
        "signal N PID" to send a signal.
    :param at_step: The step.
    """

    def __init__(self, fault: str, at_step: int = 20) -> None:
        super().__init__()
        self.fault, self.at_step, self.t = fault, at_step, 0

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        self.t += 1
        if self.t != self.at_step or self.fault == "none":
            return obs, reward, terminated, truncated, info
        if self.fault == "raise":
            raise ArithmeticError("the simulator is unstable")
        if self.fault == "exit":
            os._exit(3)
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault.startswith("signal"):
            _, number, pid = self.fault.split()
            os.kill(int(pid), int(number))
            time.sleep(0.3)
            return obs, reward, terminated, truncated, info
        if self.fault == "nan reward":
            return obs, np.nan, False, False, info
        if self.fault == "nan reward at the end":
            return obs, np.nan, True, False, info
        value = dict(nan=np.nan, inf=-np.inf).get(self.fault, np.nan)
        return np.array([value, 0], dtype=np.float32), reward, self.fault == "nan at the end", False, info


class Signalling:
    """
    Sends a signal to the process that pickles it, once.

    :param number: The signal.
    """

    def __init__(self, number: int) -> None:
        self.number: int | None = number

    def __reduce__(self) -> tuple[Any, ...]:
        number, self.number = self.number, None
        if number is not None:
            os.kill(os.getpid(), number)
        return dict, ()


class SignallingCheckpoints(CheckpointCallback):
    """
    Sends a signal to this process when something is about to happen.

    :param when: "planning", "stepping", "update" or "saving".
    :param number: The signal.
    :param folder: Where to save checkpoints.
    """

    def __init__(self, when: str, number: int, folder: str) -> None:
        super().__init__(5, folder)
        self.when, self.number = when, number

    def _on_step(self) -> bool:
        if self.num_timesteps == 25 * N_ENVS:
            owner, name = dict(
                planning=(self.model.policy.normalizer, "unnormalize_actions"),
                update=(self.model.rollout_buffer, "_get_samples"),  # type: ignore[attr-defined]
            ).get(self.when, (None, ""))
            if self.when == "saving":
                self.model.signalling = Signalling(self.number)  # type: ignore[attr-defined]
            function = getattr(owner, name, None)  # In a step, the env does it.

            def signalled(*args: Any, **kwargs: Any) -> Any:
                os.kill(os.getpid(), self.number)
                assert function is not None
                return function(*args, **kwargs)

            if function is not None:
                setattr(owner, name, signalled)
        return super()._on_step()


def interrupted(folder: str) -> None:
    """Ctrl-C and SIGTERM in each phase, one after the other."""
    th.set_num_threads(1)
    results = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        for when in ("planning", "stepping", "update", "saving"):
            fault = f"signal {int(number)} {os.getpid()}" if when == "stepping" else "none"
            checkpoints = Path(folder) / f"{when}-{int(number)}"
            # One of them: another's signal would come when nobody expects it any more.
            env = SubprocVecEnv([partial(FaultyEnv, fault, 26), WalkEnv, WalkEnv], start_method="fork")
            model = DPPO("DiffusionMlpPolicy", env, **SETTINGS)
            message = "not interrupted"
            try:
                model.learn(TOTAL, callback=SignallingCheckpoints(when, number, str(checkpoints)))
            except KeyboardInterrupt as error:
                message = str(error)
            env.close()
            model.__dict__.pop("signalling", None)
            model.save(checkpoints / "after")
            results[checkpoints.name] = dict(
                message=message,
                alive=[child.is_alive() for child in env.processes],
                handler=signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
            )
    write(folder, results)


def train_with_workers(folder: str) -> None:
    """A long run with processes, whose numbers are written down."""
    th.set_num_threads(1)
    env = make_vec_env(WalkEnv, N_ENVS, vec_env_cls=SubprocVecEnv)
    assert isinstance(env, SubprocVecEnv)
    write(folder, [child.pid for child in env.processes])
    DPPO("DiffusionMlpPolicy", env, **SETTINGS).learn(10**7, callback=CheckpointCallback(10, folder))
