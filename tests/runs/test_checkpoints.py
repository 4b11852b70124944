"""Exact resume: a file goes on as the run would have, whenever it was saved, and however the run ended."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_dppo import DPPO
from tests import scenarios
from tests.scenarios import N_ENVS, SETTINGS, SMALL, TOTAL, StopAt, fingerprint, make_env, make_model, process
from tests.toy_envs import WalkEnv


def run(folder: Path, target: Callable[..., None], *args: Any) -> Path:
    """In a process of its own, to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    with process(target, str(folder), *args) as child:
        child.join(120)
        assert child.exitcode == 0
    return folder


def result_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "result.json").read_text())


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("rl_model_*.zip"), key=lambda path: int(path.stem.split("_")[-2]))


def disturb() -> None:
    """What a new process would have: other random numbers."""
    th.manual_seed(12345)
    np.random.seed(12345)
    random.seed(12345)


def go_on(path: Path, resumable: bool, **changes: Any) -> DPPO:
    disturb()
    model = DPPO.load(path, env=make_env(resumable), **changes)
    return model.learn(TOTAL - model.num_timesteps, reset_num_timesteps=False)


def test_a_checkpoint_goes_on_as_the_run_that_never_stopped(tmp_path: Path) -> None:
    model = make_model(resumable=True)
    model.learn(TOTAL, callback=CheckpointCallback(1, str(tmp_path)))
    expected = fingerprint(model)
    # After the first env step, in the first rollout, at and after its end, in the middle, at the very end.
    for n_steps in (1, 5, 16, 17, 77, 96, 159, 160):
        path = tmp_path / f"rl_model_{n_steps * N_ENVS}_steps.zip"
        assert DPPO.load(path).num_timesteps == n_steps * N_ENVS
        assert fingerprint(go_on(path, resumable=True)) == expected, n_steps


def test_what_a_checkpoint_holds_matters(tmp_path: Path) -> None:
    """Each part, by taking it away."""
    path = tmp_path / "model.zip"
    make_model(resumable=True).learn(TOTAL, callback=StopAt(200)).save(path)
    expected = fingerprint(go_on(path, resumable=True))["parameters"]

    def without(**parts: Any) -> str:
        disturb()
        model = DPPO.load(path, env=make_env(True))
        assert model._run_state is not None
        for name, value in parts.items():
            setattr(model._run_state, name, value)
        return fingerprint(model.learn(TOTAL - model.num_timesteps, reset_num_timesteps=False))["parameters"]

    assert without() == expected
    for part in ("generators", "normalization", "env_states"):
        assert without(**{part: None}) != expected, part


def test_a_stopped_run_that_is_saved_and_one_that_goes_on_in_memory(tmp_path: Path) -> None:
    """After a whole number of rollouts nothing is lost either way."""
    model = make_model(resumable=True).learn(96)
    model.save(tmp_path / "model")
    model.learn(96, reset_num_timesteps=False)
    disturb()
    loaded = DPPO.load(tmp_path / "model", env=make_env(True)).learn(96, reset_num_timesteps=False)
    assert fingerprint(loaded) == fingerprint(model)
    # To save a model that was loaded and has not gone on yet is to copy the file.
    DPPO.load(tmp_path / "model").save(tmp_path / "copy")
    disturb()
    assert fingerprint(DPPO.load(tmp_path / "copy", env=make_env(True)).learn(96, reset_num_timesteps=False)) == fingerprint(
        model
    )


@pytest.mark.parametrize("vec_env_cls", [None, SubprocVecEnv])
def test_an_env_without_a_state_is_reset_with_a_seed_of_the_file(vec_env_cls: Any, tmp_path: Path) -> None:
    make_model().learn(TOTAL, callback=[CheckpointCallback(25, str(tmp_path)), StopAt(300)]).save(tmp_path / "stopped.zip")
    path = tmp_path / "rl_model_300_steps.zip"
    results = []
    for file in (path, path, tmp_path / "stopped.zip"):
        disturb()
        env = make_env(False, vec_env_cls) if vec_env_cls else make_env(False)
        model = DPPO.load(file, env=env)
        results.append(fingerprint(model.learn(TOTAL - model.num_timesteps, reset_num_timesteps=False)))
        env.close()
    assert results[0] == results[1] == results[2]
    if vec_env_cls is None:
        assert fingerprint(go_on(path, False, seed=1)) == fingerprint(go_on(path, False, seed=1)) != results[0]
        # A number of envs of its own.
        loaded = DPPO.load(path, env=make_vec_env(WalkEnv, 2))
        loaded.learn(64, reset_num_timesteps=False)
        assert loaded.num_timesteps == 288 + 64 + 32  # From the start of the rollout, to 64 after the file, in whole rollouts.


def test_a_new_run_from_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    make_model().learn(TOTAL, callback=StopAt(200)).save(tmp_path / "model")
    env = make_env(False)
    model = DPPO.load(tmp_path / "model", env=env)
    model.learn(48)
    assert model.num_timesteps == 48
    assert env.ret_rms.count < 100  # The statistics are the new env's own.
    # And later there is nothing left to go back to.
    model.learn(48, reset_num_timesteps=False)
    assert model.num_timesteps == 96


def test_force_reset_false_leaves_the_env_as_it_is(tmp_path: Path) -> None:
    model = make_model().learn(96)
    model.save(tmp_path / "model")
    assert model.env is not None
    model.learn(96, reset_num_timesteps=False)
    other = make_model().learn(96)
    disturb()
    loaded = DPPO.load(tmp_path / "model", env=other.env, force_reset=False).learn(96, reset_num_timesteps=False)
    assert fingerprint(loaded) == fingerprint(model)


@pytest.mark.parametrize("resumable", [True, False])
def test_force_reset_false_with_a_file_from_the_middle_of_a_rollout(resumable: bool, tmp_path: Path) -> None:
    """It goes on at the rollout's start, where the env, left where it is, would not be."""
    path = tmp_path / "model.zip"
    left = make_model(resumable).learn(TOTAL, callback=StopAt(200))
    left.save(path)
    with pytest.warns(UserWarning, match="force_reset=False has no effect: the file was saved 9 env steps after the start"):
        disturb()
        model = DPPO.load(path, env=left.env, force_reset=False)
        model.learn(TOTAL - model.num_timesteps, reset_num_timesteps=False)
    assert fingerprint(model) == fingerprint(go_on(path, resumable))


class PlainVecEnv(DummyVecEnv):
    """One that answers no questions about attributes, as SB3's algorithms don't ask any."""

    def get_attr(self, attr_name: str, indices: Any = None) -> Any:
        if attr_name != "render_mode":
            raise NotImplementedError
        return super().get_attr(attr_name, indices)


def test_a_vec_env_that_knows_no_attributes(tmp_path: Path) -> None:
    model = DPPO("DiffusionMlpPolicy", PlainVecEnv([WalkEnv] * N_ENVS), **SETTINGS)
    model.learn(96, callback=CheckpointCallback(10, str(tmp_path)))
    loaded = DPPO.load(last_checkpoint(tmp_path), env=PlainVecEnv([WalkEnv] * N_ENVS))
    assert loaded.learn(96, reset_num_timesteps=False).num_timesteps > 96


def test_saved_at_the_end_of_a_rollout(tmp_path: Path) -> None:
    class SaveAtEnd(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            self.model.save(tmp_path / f"{self.num_timesteps}.zip")

    model = make_model(resumable=True).learn(TOTAL, callback=SaveAtEnd())
    assert fingerprint(go_on(tmp_path / "144.zip", resumable=True)) == fingerprint(model)


def kill_and_resume(
    folder: Path, resumable: bool, rng: random.Random, reference: Callable[[bool, int], dict[str, str]]
) -> int:
    """
    :return: Env steps of the last checkpoint.
    """
    folder.mkdir()
    with process(scenarios.train, str(folder), resumable) as child:
        reached = folder / f"rl_model_{N_ENVS * rng.randrange(1, TOTAL // N_ENVS - 4)}_steps.zip"
        while not reached.exists():
            time.sleep(0.001)
            assert child.is_alive()
        # In the next steps: when planning, stepping, updating or saving.
        time.sleep(rng.uniform(0, 0.03))
    assert child.exitcode == -signal.SIGKILL
    checkpoint = last_checkpoint(folder)
    # Whole, each of them: what was being written has another name.
    for path in folder.glob("*.zip"):
        DPPO.load(path)
    steps = int(checkpoint.stem.split("_")[-2])
    resumed = result_of(run(folder / "resumed", scenarios.resume, str(checkpoint), resumable))
    assert resumed == reference(resumable, steps)
    return steps


def references(folder: Path) -> Callable[[bool, int], dict[str, str]]:
    @cache
    def stopped_cleanly(steps: int) -> dict[str, str]:
        stopped = run(folder / f"stopped-{steps}", scenarios.stop_cleanly, False, steps) / "stopped.zip"
        return result_of(run(folder / f"resumed-{steps}", scenarios.resume, str(stopped), False))

    @cache
    def never_stopped() -> dict[str, str]:
        return result_of(run(folder / "never-stopped", scenarios.train, True, 1000))

    return lambda resumable, steps: never_stopped() if resumable else stopped_cleanly(steps)


@pytest.mark.parametrize("resumable", [True, False])
def test_killed_and_resumed(resumable: bool, tmp_path: Path) -> None:
    kill_and_resume(tmp_path / "killed", resumable, random.Random(), references(tmp_path))


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    reference, rng = references(tmp_path), random.Random()
    steps = [kill_and_resume(tmp_path / f"killed-{i}", i % 2 == 0, rng, reference) for i in range(24)]
    print("killed after the checkpoints at", sorted(steps), "of", TOTAL, "env steps")
    assert len(set(steps)) > 12


def test_settings_are_those_that_have_a_state() -> None:
    """So that the tests above mean something."""
    model = make_model(resumable=True).learn(TOTAL)
    assert model.ft_denoising_steps == 1 and SETTINGS["policy_kwargs"]["denoising_steps"] == 4
    assert len(model.ep_info_buffer or ()) > 20


@pytest.mark.slow
def test_checkpoints_of_the_zoo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rl_zoo3.train", "--algo", "dppo", "--env", "Pendulum-v1", "-f", str(tmp_path)]
    command += ["--num-threads", "1", "--n-timesteps", "1000000", "--save-freq", "500", "--eval-freq", "-1", "--seed", "0"]
    command += ["-params", "n_steps:128", f"policy_kwargs:dict({', '.join(f'{k}={v}' for k, v in SMALL.items())})"]
    folder = tmp_path / "dppo" / "Pendulum-v1_1"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        try:
            while len(list(folder.glob("rl_model_*.zip"))) < 3:
                time.sleep(0.1)
                assert run.poll() is None, run.communicate()[1]
            # The zoo saves the agent when it is interrupted, so it does when it is terminated.
            run.terminate()
            assert run.wait(60) == 0 and (folder / "Pendulum-v1.zip").exists()
        finally:
            run.kill()
    for path in (last_checkpoint(folder), folder / "Pendulum-v1.zip"):
        results = []
        for seed in (1, 2):
            disturb()
            model = DPPO.load(path, env=make_vec_env("Pendulum-v1", 4, seed=seed))
            at = model.num_timesteps
            model.learn(3000, reset_num_timesteps=False)
            results.append(model.get_parameters()["policy"])
            assert model.num_timesteps >= at + 3000
        assert all(th.equal(results[0][name], results[1][name]) for name in results[0])
