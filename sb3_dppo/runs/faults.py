"""Envs that fail and signals that end a run: what is said, what is cleaned up, and what may be survived."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import numpy as np
from stable_baselines3.common import vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_dppo.features.observations import parts_of, stack, take

# Wrappers that hand on the numbers that they get.
HARMLESS_WRAPPERS = (vec_env.VecExtractDictObs, vec_env.VecFrameStack, vec_env.VecMonitor, vec_env.VecTransposeImage)

ON_BAD_ENV = ("raise", "reset")


def are_finite(values: Any) -> np.ndarray:
    """Whether each of the observations or rewards, shape (B, ...), has neither NaN nor infinity, shape (B,)."""
    finite = np.ones(len(parts_of(values)[0]), dtype=bool)
    for part in map(np.asarray, parts_of(values)):
        if part.dtype.kind == "f":
            finite &= np.isfinite(part).reshape(len(part), -1).all(axis=1)
    return finite


def check_finite(name: str, values: Any, when: str) -> None:
    """Refuse observations or rewards of all envs, shape (B, ...), of which one is NaN or infinite."""
    finite = are_finite(values)
    if not finite.all():
        raise _not_finite(name, int(np.argmin(finite)), when)


def changes_numbers(env: VecEnv) -> bool:
    """Whether what comes out of the env may be NaN or infinite although what :class:`EnvGuard` saw was not."""
    while isinstance(env, VecEnvWrapper):
        if type(env) not in HARMLESS_WRAPPERS:
            return True
        env = env.venv
    return False


def has_attr(env: VecEnv, name: str) -> bool:
    """Whether all copies of the env have the attribute or method. Of one that can't tell or is closed, they have not."""
    try:
        return env.has_attr(name)
    # AttributeError in wrappers of other libraries' vector envs, the last two where processes have ended.
    except (NotImplementedError, AttributeError, EOFError, OSError):
        return False


def _not_finite(name: str, env_index: int, when: str) -> ValueError:
    return ValueError(
        f"The {name} of env {env_index} is NaN or infinite {when}: training stops before the policy learns from it. Models "
        "saved so far are not affected. Check the env, for instance with stable_baselines3.common.vec_env.VecCheckNan, or go "
        "on with on_bad_env='reset'."
    )


class EnvGuard:
    """
    A context that watches the envs while a model learns. It stands below ``VecNormalize`` and other wrappers, which remember
    what they see, and not among them: ``EvalCallback`` wants the wrappers of both its envs to be the same.

    An env that returns NaN or infinity raises an error or, with ``on_bad_env="reset"``, is reset. To those outside, its
    episode was truncated, with the last good observation at its end, no reward for its last step and no record of its return;
    ``info["bad_env"]`` is ``True``.

    When ``SubprocVecEnv`` fails or is interrupted in a step, its processes are ended: nobody knows any more which of them have
    answered, and ``close()`` would wait for answers that don't come.

    :param model: The model, with an env, ``on_bad_env``, ``n_bad_env_resets`` and ``describe_env_step()``.
    :raises ValueError: if bad envs shall be reset and can't be.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.venv: VecEnv = model.env
        # Those of other packages may have something else within.
        while isinstance(self.venv, VecEnvWrapper) and isinstance(self.venv.venv, VecEnv):
            self.venv = self.venv.venv
        if model.on_bad_env == "reset" and not has_attr(self.venv, "reset"):
            raise ValueError(f"on_bad_env='reset', but a {type(self.venv).__name__} can't reset a single env: use 'raise'.")
        self._good_obs: VecEnvObs | None = None

    def __enter__(self) -> None:
        own = vars(self.venv)
        watched: dict[str, Callable[..., Any]] = dict(reset=self.reset, step_wait=self.step_wait)
        self._reset, self._step_wait = self.venv.reset, self.venv.step_wait
        if hasattr(type(self.venv), "step_tensors"):
            self._step_tensors = self.venv.step_tensors  # type: ignore[attr-defined]
            watched["step_tensors"] = self.step_tensors
        self._before: dict[str, Any] = {name: own.get(name) for name in watched}
        own.update(watched)

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        for name, before in self._before.items():
            del vars(self.venv)[name]
            if before is not None:
                vars(self.venv)[name] = before
        if error is None or not isinstance(self.venv, SubprocVecEnv):
            return
        death = describe_death(self.venv) if isinstance(error, (EOFError, ConnectionError)) else None
        if death is not None or self.venv.waiting:
            end_processes(self.venv)
        if death is not None:
            raise RuntimeError(death) from error

    def reset(self) -> VecEnvObs:
        """Reset all envs, and see what came."""
        self._good_obs = self._reset()
        check_finite("observation", self._good_obs, "after reset()")
        return self._good_obs

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the envs' step, and see what came."""
        obs, rewards, dones, infos = self._step_wait()
        bad = ~(are_finite(obs) & are_finite(rewards))
        for ended in np.flatnonzero(dones):
            if "terminal_observation" in infos[ended]:
                bad[ended] |= not are_finite(stack([infos[ended]["terminal_observation"]]))[0]
        if bad.any():
            if self.model.on_bad_env == "raise":
                when = self.model.describe_env_step()
                check_finite("observation", obs, when)
                check_finite("reward", rewards, when)
                raise _not_finite("last observation", int(np.argmax(bad)), when)
            for env_index in map(int, np.flatnonzero(bad)):
                self._reset_env(env_index, obs)
                # If none has been seen yet, the next best: it is in the space, too.
                last = take(obs if self._good_obs is None else self._good_obs, env_index)
                infos[env_index].update({"terminal_observation": last, "TimeLimit.truncated": True, "bad_env": True})
                # Monitor's, of an episode that ended by itself: its return may be NaN.
                infos[env_index].pop("episode", None)
                rewards[env_index], dones[env_index] = 0.0, True
            check_finite("observation", obs, "after reset()")
        self._good_obs = obs
        return obs, rewards, dones, infos

    def step_tensors(self, actions: Any) -> Any:
        """Step the envs of a ``TorchVecEnv``, and hear from it what came."""
        step = self._step_tensors(actions)
        finite = step[-1].finite
        if not finite.all():
            raise _not_finite("observation or reward", int(np.argmin(finite)), self.model.describe_env_step())
        return step

    def _reset_env(self, env_index: int, obs: VecEnvObs) -> None:
        """Reset one env, and put the first observation of its new episode among those of all envs."""
        if self.model.n_bad_env_resets == 0:
            warnings.warn(
                f"Env {env_index} returned NaN or infinity and was reset {self.model.describe_env_step()}. Resets are counted "
                "in the logs, as rollout/bad_env_resets.",
                stacklevel=2,
            )
        self.model.n_bad_env_resets += 1
        if has_attr(self.venv, "needs_reset"):
            # A Monitor, which may have been told to refuse this in the middle of an episode.
            self.venv.env_method("set_wrapper_attr", "needs_reset", True, indices=[env_index])
        first_obs, _ = self.venv.env_method("reset", indices=[env_index])[0]
        if isinstance(obs, dict):
            for key in obs:
                obs[key][env_index] = first_obs[key]
        else:
            obs[env_index] = first_obs  # type: ignore[index]


def describe_death(env: SubprocVecEnv) -> str | None:
    """Which of the env's processes has died, and of what; ``None`` if none has."""
    wait([process.sentinel for process in env.processes], timeout=2)
    for env_index, process in enumerate(env.processes):
        code = process.exitcode
        if code is None:
            continue
        if code < 0:
            cause = f"by signal {-code} ({signal.strsignal(-code)}); one that needs too much memory is killed by signal 9"
        else:
            cause = f"with exit code {code}; if the env raised an error, it is printed above"
        return f"The process of env {env_index} has died, {cause}. Models saved so far are not affected."
    return None


def end_processes(env: SubprocVecEnv) -> None:
    """Kill the processes of an env, which can't be used afterwards."""
    env.closed, env.waiting = True, False
    for process in env.processes:
        process.kill()
    for process in env.processes:
        process.join()
    for remote in env.remotes:
        remote.close()


@contextmanager
def interruptible(describe: Callable[[], str]) -> Iterator[None]:
    """Let SIGTERM interrupt as Ctrl-C does, unless the program handles it, and let the ``KeyboardInterrupt`` say where."""
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
