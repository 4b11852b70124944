"""Envs that fail and signals that end a run: what is said, what is cleaned up, and what may be survived."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_dppo.observations import parts_of, stack, take

ON_BAD_ENV = ("raise", "reset")


def are_finite(values: Any) -> np.ndarray:
    """
    :param values: Observations or rewards, shape (B, ...).
    :return: Whether each has neither NaN nor infinity, shape (B,).
    """
    finite = np.ones(len(parts_of(values)[0]), dtype=bool)
    for part in map(np.asarray, parts_of(values)):
        if part.dtype.kind == "f":
            finite &= np.isfinite(part).reshape(len(part), -1).all(axis=1)
    return finite


def check_finite(obs: VecEnvObs, rewards: np.ndarray, when: str) -> None:
    """
    :param obs: Observations of all envs.
    :param rewards: Rewards of all envs.
    :param when: Which env step this is, for the error.
    :raises ValueError: naming the env and the step, if one is NaN or infinite.
    """
    for name, values in (("observation", obs), ("reward", rewards)):
        finite = are_finite(values)
        if not finite.all():
            raise ValueError(
                f"The {name} of env {int(np.argmin(finite))} is NaN or infinite {when}: training stops before the policy "
                "learns from it. Models saved so far are not affected. Check the env, for instance with "
                "stable_baselines3.common.vec_env.VecCheckNan, or go on with on_bad_env='reset'."
            )


class ResetBadEnvs(VecEnvWrapper):
    """
    Resets an env that returns NaN or infinity. To those outside, its episode was truncated, with the last good observation at
    its end and no reward for its last step; ``info["bad_env"]`` is ``True``.

    :param venv: The envs, without other wrappers: those may remember what they see.
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.n_resets = 0
        self._good_obs: VecEnvObs

    def reset(self) -> VecEnvObs:
        """
        Reset all envs.

        :return: Their observations.
        """
        self._good_obs = self.venv.reset()
        return self._good_obs

    def step_wait(self) -> VecEnvStepReturn:
        """
        Wait for the envs' step, and reset those in which it went wrong.

        :return: Observations, rewards, whether episodes have ended, and further information.
        """
        obs, rewards, dones, infos = self.venv.step_wait()
        bad = ~(are_finite(obs) & are_finite(rewards))
        for env_index in np.flatnonzero(dones & ~bad):
            bad[env_index] = not are_finite(stack([infos[env_index]["terminal_observation"]]))[0]
        for env_index in map(int, np.flatnonzero(bad)):
            if self.n_resets == 0:
                warnings.warn(
                    f"Env {env_index} returned NaN or infinity and was reset. Further resets are counted in the logs, as "
                    "rollout/bad_env_resets.",
                    stacklevel=2,
                )
            self.n_resets += 1
            last_obs = take(self._good_obs, env_index)
            infos[env_index].update({"terminal_observation": last_obs, "TimeLimit.truncated": True, "bad_env": True})
            rewards[env_index], dones[env_index] = 0.0, True
            first_obs, _ = self.venv.env_method("reset", indices=[env_index])[0]
            if isinstance(obs, dict):
                for key in obs:
                    obs[key][env_index] = first_obs[key]
            else:
                obs[env_index] = first_obs  # type: ignore[index]
        self._good_obs = obs
        return obs, rewards, dones, infos


def reset_bad_envs(env: VecEnv) -> VecEnv:
    """
    :param env: The env.
    :return: The same, with :class:`ResetBadEnvs` below all other wrappers.
    """
    if not isinstance(env, VecEnvWrapper):
        return ResetBadEnvs(env)
    if not isinstance(env, ResetBadEnvs):
        env.venv = reset_bad_envs(env.venv)
    return env


def n_bad_env_resets(env: VecEnv) -> int:
    """
    :param env: An env with :class:`ResetBadEnvs`.
    :return: How many resets there have been.
    """
    while isinstance(env, VecEnvWrapper) and not isinstance(env, ResetBadEnvs):
        env = env.venv
    assert isinstance(env, ResetBadEnvs)
    return env.n_resets


@contextmanager
def report_dead_workers(env: VecEnv) -> Iterator[None]:
    """
    Where a step of ``SubprocVecEnv`` fails or is interrupted, end its processes: nobody knows any more which of them have
    answered, and ``close()`` would wait for answers that don't come.

    :param env: The env.
    :return: A context for calls of the env.
    :raises RuntimeError: naming the env whose process has died.
    """
    try:
        yield
    except BaseException as error:
        while isinstance(env, VecEnvWrapper):
            env = env.venv
        if isinstance(env, SubprocVecEnv):
            broken = isinstance(error, (EOFError, ConnectionError))
            death = _describe_death(env) if broken else ""
            if broken or env.waiting:
                _end_processes(env)
            if broken:
                raise RuntimeError(death) from error
        raise


def _describe_death(env: SubprocVecEnv) -> str:
    """
    :param env: An env, one of whose pipes is broken.
    :return: Which process has died, and of what.
    """
    wait([process.sentinel for process in env.processes], timeout=5)
    for env_index, process in enumerate(env.processes):
        code = process.exitcode
        if code is None:
            continue
        if code < 0:
            cause = f"by signal {-code} ({signal.Signals(-code).name}); a process that needs too much memory is killed so"
        else:
            cause = f"with exit code {code}; if the env raised an error, it is printed above"
        return f"The process of env {env_index} has died, {cause}. Models saved so far are not affected."
    return "The pipe to the process of an env is broken. Models saved so far are not affected."


def _end_processes(env: SubprocVecEnv) -> None:
    """
    :param env: The env, which can't be used afterwards.
    """
    env.closed, env.waiting = True, False
    for process in env.processes:
        process.kill()
    for process in env.processes:
        process.join()
    for remote in env.remotes:
        remote.close()


@contextmanager
def interruptible(describe: Callable[[], str]) -> Iterator[None]:
    """
    Let SIGTERM interrupt as Ctrl-C does, unless the program handles it, and let the ``KeyboardInterrupt`` say where.

    :param describe: Returns what to say.
    :return: A context for a long computation.
    """
    in_charge = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if in_charge:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = (describe(),)
        raise
    finally:
        if in_charge:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
