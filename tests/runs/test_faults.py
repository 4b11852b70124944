"""What goes wrong in long runs: each fault ends in a clear message and leaves the last checkpoint usable."""

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_dppo import DPPO
from sb3_dppo.runs.faults import changes_numbers
from tests import scenarios
from tests.scenarios import N_ENVS, SETTINGS, TOTAL, FaultyEnv, process
from tests.toy_envs import WalkEnv

BOTH = pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])


def make_env(fault: str, vec_env_cls: Any = DummyVecEnv, at_step: int = 20) -> VecEnv:
    """The second of three envs is faulty."""
    env_fns = [WalkEnv, partial(FaultyEnv, fault, at_step), WalkEnv]
    return vec_env_cls(env_fns)


def make_model(env: VecEnv, **changes: Any) -> DPPO:
    return DPPO("DiffusionMlpPolicy", env, **{**SETTINGS, **changes})


def goes_on(path: Path) -> bool:
    """Whether a file is whole and can be trained."""
    model = DPPO.load(path, env=make_vec_env(WalkEnv, N_ENVS), critic_learning_rate=1e-3)
    assert all(value.isfinite().all() for value in model.policy.state_dict().values())
    model.learn(16, reset_num_timesteps=False)
    return True


def gone(pid: int) -> bool:
    """Whether a process ends, within some seconds."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


# ------------------------------------------------------------------ envs


@pytest.mark.parametrize(
    "fault,message",
    [
        ("raise", "The process of env 1 has died, with exit code 1; if the env raised an error, it is printed above"),
        ("exit", "The process of env 1 has died, with exit code 3"),
        ("kill", r"The process of env 1 has died, by signal 9 \(Killed\)"),
    ],
)
def test_a_process_that_dies(fault: str, message: str, tmp_path: Path) -> None:
    env = make_env(fault, SubprocVecEnv)
    assert isinstance(env, SubprocVecEnv)
    model = make_model(env)
    with pytest.raises(RuntimeError, match=message):
        model.learn(TOTAL, callback=CheckpointCallback(18, str(tmp_path)))
    assert not any(process.is_alive() for process in env.processes)
    env.close()  # Does not wait for anybody.
    model.save(tmp_path / "after.zip")
    assert goes_on(tmp_path / "after.zip") and goes_on(tmp_path / f"rl_model_{18 * 3}_steps.zip")


def test_a_process_that_is_dead_before_the_first_reset() -> None:
    env = make_env("none", SubprocVecEnv)
    assert isinstance(env, SubprocVecEnv)
    model = make_model(env)
    env.processes[2].kill()
    env.processes[2].join()
    with pytest.raises(RuntimeError, match="The process of env 2 has died, by signal 9"):
        model.learn(TOTAL)
    assert not any(process.is_alive() for process in env.processes)


def test_an_env_that_raises_in_this_process(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError, match="the simulator is unstable"):
        make_model(make_env("raise")).learn(TOTAL, callback=CheckpointCallback(18, str(tmp_path)))
    assert goes_on(tmp_path / f"rl_model_{18 * 3}_steps.zip")


@pytest.mark.parametrize(
    "fault,what",
    [("nan", "observation"), ("inf", "observation"), ("nan reward", "reward"), ("nan at the end", "last observation")],
)
def test_nan_from_an_env_stops_training(fault: str, what: str, tmp_path: Path) -> None:
    env = VecNormalize(make_env(fault))
    model = make_model(env)
    with pytest.raises(ValueError, match=rf"{what} of env 1.* is NaN or infinite after env step 20 \(num_timesteps=57\)"):
        model.learn(TOTAL, callback=CheckpointCallback(18, str(tmp_path)))
    # Nothing has remembered it.
    assert np.isfinite(env.obs_rms.mean).all() and np.isfinite(env.ret_rms.mean)  # type: ignore[union-attr]
    model.save(tmp_path / "after.zip")
    for path in tmp_path.glob("*.zip"):
        fresh = VecNormalize(make_env("none"))
        DPPO.load(path, env=fresh).learn(64, reset_num_timesteps=False)
        assert np.isfinite(fresh.obs_rms.mean).all() and np.isfinite(fresh.ret_rms.mean)  # type: ignore[union-attr]


class Recorder(BaseCallback):
    """Keeps what the learner saw."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        names = ("new_obs", "rewards", "dones", "infos")
        self.steps.append({name: self.locals[name] for name in names})
        return True


@BOTH
@pytest.mark.parametrize("fault", ["nan", "inf", "nan reward", "nan at the end"])
def test_a_bad_env_is_reset(vec_env_cls: Any, fault: str, tmp_path: Path) -> None:
    env = make_env(fault, vec_env_cls)
    model = make_model(env, on_bad_env="reset")
    model.set_logger(configure(str(tmp_path), ["csv"]))
    recorder = Recorder()
    with pytest.warns(UserWarning, match="Env 1 returned NaN or infinity and was reset"):
        model.learn(16 * N_ENVS * 3, callback=recorder)
    before, at = recorder.steps[18], recorder.steps[19]
    assert at["dones"][1] and at["rewards"][1] == 0
    assert at["infos"][1]["bad_env"] and at["infos"][1]["TimeLimit.truncated"]
    last_obs = at["infos"][1]["terminal_observation"]
    # The last good one: where the episode began, if the step before ended one.
    assert (last_obs == before["new_obs"][1]).all()
    assert np.isfinite(at["new_obs"]).all() and (at["new_obs"][1] != last_obs).all()
    assert not any("bad_env" in info for i, step in enumerate(recorder.steps) for info in step["infos"] if i != 19)
    logged = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True)
    assert logged["rolloutbad_env_resets"].tolist() == [0, 1, 1]
    env.close()


@BOTH
@pytest.mark.parametrize("fault", ["nan", "nan reward at the end"])
def test_a_bad_env_below_a_monitor(vec_env_cls: Any, fault: str) -> None:
    """Which keeps records, and may refuse to be reset in the middle of an episode, also inside of another wrapper."""

    def monitored() -> Any:
        return gym.Wrapper(Monitor(FaultyEnv(fault), allow_early_resets=False))

    env = vec_env_cls([monitored] * 2)
    model, recorder = make_model(env, on_bad_env="reset"), Recorder()
    with pytest.warns(UserWarning, match="was reset"):
        model.learn(16 * 2 * 4, callback=recorder)
    env.close()
    assert model.n_bad_env_resets == 2
    assert not any("episode" in info for step in recorder.steps for info in step["infos"] if "bad_env" in info)
    returns = [record["r"] for record in model.ep_info_buffer or ()]
    assert len(returns) > 3 and np.isfinite(returns).all()


def test_a_bad_env_below_a_vec_monitor() -> None:
    env = VecMonitor(make_env("nan"))
    model, recorder = make_model(env, on_bad_env="reset"), Recorder()
    with pytest.warns(UserWarning, match="was reset"):
        model.learn(16 * N_ENVS * 3, callback=recorder)
    infos = [info for step in recorder.steps for info in step["infos"]]
    assert [info for info in infos if "bad_env" in info]
    recorded = [info["episode"]["r"] for info in infos if "episode" in info and "bad_env" not in info]
    assert [record["r"] for record in model.ep_info_buffer or ()] == recorded


def test_envs_that_can_not_be_reset_one_by_one() -> None:
    class TogetherVecEnv(DummyVecEnv):
        def has_attr(self, attr_name: str) -> bool:
            raise NotImplementedError

    with pytest.raises(ValueError, match="on_bad_env='reset', but a TogetherVecEnv can't reset a single env"):
        make_model(TogetherVecEnv([WalkEnv]), on_bad_env="reset").learn(TOTAL)


def test_wrappers_that_can_make_nan_out_of_good_numbers() -> None:
    env = DummyVecEnv([WalkEnv])
    assert not changes_numbers(env) and not changes_numbers(VecMonitor(VecFrameStack(env, 2)))
    assert changes_numbers(VecFrameStack(VecNormalize(env), 2))


def test_a_bad_env_is_reset_below_other_wrappers(tmp_path: Path) -> None:
    env = VecNormalize(VecFrameStack(make_env("nan"), 2))
    model = make_model(env, on_bad_env="reset")
    evaluation = EvalCallback(VecNormalize(VecFrameStack(make_env("none"), 2)), eval_freq=50, n_eval_episodes=1)
    with pytest.warns(UserWarning, match="was reset"):
        model.learn(TOTAL, callback=evaluation)
    assert np.isfinite(env.obs_rms.mean).all() and np.isfinite(env.ret_rms.mean)  # type: ignore[union-attr]
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model", env=env)
    loaded.learn(48, reset_num_timesteps=False)
    assert loaded.n_bad_env_resets == model.n_bad_env_resets == 1
    # Only while learning.
    assert not {"reset", "step_wait"} & set(vars(env.unwrapped))


def test_an_env_that_stays_bad(tmp_path: Path) -> None:
    class Broken(WalkEnv):
        def _obs(self) -> np.ndarray:
            return np.full(2, np.nan, dtype=np.float32)

    for on_bad_env in ("raise", "reset"):
        with pytest.raises(ValueError, match=r"observation of env 0 is NaN or infinite after reset\(\)"):
            make_model(DummyVecEnv([Broken]), on_bad_env=on_bad_env).learn(TOTAL)
    with pytest.raises(ValueError, match="on_bad_env='ignore' is unknown"):
        make_model(DummyVecEnv([WalkEnv]), on_bad_env="ignore")


# ------------------------------------------------------------------ the update


@pytest.mark.parametrize("optimizer_class", [th.optim.AdamW, th.optim.SGD])
def test_a_loss_that_becomes_nan(optimizer_class: Any, tmp_path: Path) -> None:
    policy_kwargs = dict(scenarios.SMALL, optimizer_class=optimizer_class)
    rates = dict(lr_decay="constant", lr_warmup=0.0, critic_learning_rate=lambda p: 1e-3 if p > 0.5 else 1e30)
    model = make_model(make_env("none"), policy_kwargs=policy_kwargs, batch_size=16, **rates)
    with pytest.raises(
        ValueError, match=r"The loss of \d+ of the \d+ gradient steps of update 5 \(num_timesteps=240\) was NaN"
    ):
        model.learn(TOTAL, callback=CheckpointCallback(16, str(tmp_path)))
    # Steps without a finite loss were not made.
    assert all(value.isfinite().all() for value in model.policy.state_dict().values())
    assert len(list(tmp_path.glob("*.zip"))) == 5
    assert all(goes_on(path) for path in tmp_path.glob("*.zip"))


def test_parameters_that_become_infinite(tmp_path: Path) -> None:
    model = make_model(make_env("none"), n_epochs=1, batch_size=1000, critic_learning_rate=lambda p: 1e-3 if p > 0.5 else 1e39)
    with pytest.raises(ValueError, match=r"A parameter of the policy became NaN or infinite in update 5"):
        model.learn(TOTAL, callback=CheckpointCallback(16, str(tmp_path)))
    assert all(goes_on(path) for path in tmp_path.glob("*.zip"))


# ------------------------------------------------------------------ saving


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True).returncode != 0:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    model = make_model(make_env("none"))
    with pytest.raises(
        OSError, match=r"No space left on device: it was not saved, and what was there before is unchanged.*zip"
    ):
        model.learn(10_000, callback=CheckpointCallback(8, str(small_disk)))
    paths = sorted(small_disk.iterdir())
    assert len(paths) > 1 and all(path.suffix == ".zip" for path in paths)
    assert all(goes_on(path) for path in paths)


def test_a_file_that_gets_too_large_leaves_the_one_before(tmp_path: Path) -> None:
    model = make_model(make_env("none"))
    path = tmp_path / "new" / "model.zip"
    model.save(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large: it was not saved, and what was there before is unchanged"):
            model.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == before


def test_names_of_files(tmp_path: Path) -> None:
    model = make_model(make_env("none"))
    for name in ("model", "model.zip", Path("v1.5")):
        model.save(f"{tmp_path}/{name}" if isinstance(name, str) else tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"model.zip", "v1.5"}
    assert oct((tmp_path / "model.zip").stat().st_mode) == oct((tmp_path / "v1.5").stat().st_mode)
    # A link stays one.
    (tmp_path / "latest.zip").symlink_to("model.zip")
    model.save(tmp_path / "latest")
    assert (tmp_path / "latest.zip").is_symlink()
    with (tmp_path / "file.zip").open("wb") as file:
        model.save(file)
    assert all(goes_on(path) for path in tmp_path.iterdir())
    with pytest.raises(OSError, match="it was not saved"):
        model.save(tmp_path / "model.zip" / "below" / "a-file")


# ------------------------------------------------------------------ signals


def test_interrupted_in_each_phase(tmp_path: Path) -> None:
    with process(scenarios.interrupted, str(tmp_path)) as child:
        child.join(120)
        assert child.exitcode == 0
    results = json.loads((tmp_path / "result.json").read_text())
    assert len(results) == 8
    for name, result in results.items():
        phase = "an update" if name.startswith("update") else "a rollout"
        assert "Training was interrupted after " in result["message"]
        assert f"env steps, in {phase}: a model saved now" in result["message"], (name, result)
        assert not any(result["alive"]) and result["handler"], (name, result)
        files = list((tmp_path / name).iterdir())
        assert all(path.suffix == ".zip" for path in files), files
        assert len(files) > 3 and all(goes_on(path) for path in files[-2:]) and goes_on(tmp_path / name / "after.zip")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_no_process_is_left(number: signal.Signals, tmp_path: Path) -> None:
    with process(scenarios.train_with_workers, str(tmp_path)) as child:
        while not list(tmp_path.glob("*.zip")):
            time.sleep(0.01)
            assert child.is_alive()
        workers = json.loads((tmp_path / "result.json").read_text())
        assert all(Path(f"/proc/{pid}").exists() for pid in workers)
        # Ctrl-C in a terminal goes to all, the others to the one that learns.
        (os.killpg if number == signal.SIGINT else os.kill)(child.pid or 0, number)
        child.join(30)
        assert child.exitcode == (-signal.SIGKILL if number == signal.SIGKILL else 1)
        assert all(gone(pid) for pid in workers)
    assert all(goes_on(path) for path in list(tmp_path.glob("*.zip"))[-3:])


def test_a_program_may_handle_sigterm_itself() -> None:
    received = []

    class Terminate(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return True

    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        make_model(make_env("none")).learn(48, callback=Terminate())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [True]
