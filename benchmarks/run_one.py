"""One run of a learning study: training with evaluations that leave no trace in it."""

import argparse
import fcntl
import inspect
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import yaml
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization
from study import Run, digest

import sb3_dppo
from sb3_dppo import BC, DPPO, load_demonstrations
from sb3_dppo.envs import NoiseSpaceVecEnv, ResidualVecEnv
from sb3_dppo.policies import PAPER_POLICY_KWARGS

CLASSES: dict[str, type[BaseAlgorithm]] = {"dppo": DPPO, "ppo": PPO, "sac": SAC}
WRAPPERS: dict[str, Any] = {"noise": NoiseSpaceVecEnv, "residual": ResidualVecEnv}
# Envs that are evaluated side by side: a policy decides for ten in little more time than for one.
EVAL_ENVS = 10
# Of a training, at most.
TRAINING_ROWS = 100
# What says nothing about the algorithm.
NOT_ARGUMENTS = {"self", "policy", "env", "seed", "device", "verbose", "tensorboard_log", "_init_setup_model", "unknown"}


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """
    Inside, the global generators begin with a seed; after it, they go on where they were.

    :param seed: Seed.
    """
    states = random.getstate(), np.random.get_state(), th.get_rng_state()
    set_random_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        th.set_rng_state(states[2])


class RandomPolicy:
    """
    Actions drawn uniformly from the action space.

    :param env: The envs that it acts in.
    :param seed: Seed.
    """

    def __init__(self, env: VecEnv, seed: int) -> None:
        self.action_space = env.action_space
        self.action_space.seed(seed)

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        """One action for each observation."""
        return np.stack([self.action_space.sample() for _ in range(len(observation))]), None


class Evaluations(BaseCallback):
    """
    Evaluates the policy at even distances, the end excepted, and notes how training's own episodes do.

    :param run: The run.
    :param env: Envs of its own.
    """

    def __init__(self, run: Run, env: VecEnv) -> None:
        super().__init__()
        self.run = run
        self.env = env
        # The same episodes at every evaluation and for every algorithm, but others for each seed and none of training's.
        self.seed = 1_000_000 + 1000 * run.seed
        self.n_done = 0
        # Of the env, also where the algorithm's step is a chunk.
        self.env_steps = 0
        self.rows: list[list[float]] = []
        self.seconds = np.zeros(2)
        # The returns of training's episodes since the last of the rows of their means, which are at least this apart.
        self.training_returns: list[float] = []
        self.training_rows: list[list[float]] = []
        self.distance = run.steps / TRAINING_ROWS

    def _on_rollout_end(self) -> None:
        last = self.training_rows[-1][0] if self.training_rows else 0
        if self.training_returns and self.env_steps - last >= self.distance:
            mean, n = float(np.mean(self.training_returns)), len(self.training_returns)
            self.training_rows.append([self.env_steps, round(mean, 2), n])
            self.training_returns = []

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        self.training_returns += [info["episode"]["r"] for info in infos if "episode" in info]
        self.env_steps += sum(info.get("n_executed", 1) for info in infos)
        due = self.env_steps * self.run.evaluations // self.run.steps
        # Past the last one, what is due is the evaluation after the last update.
        if self.n_done < min(due, self.run.evaluations - 1):
            self.n_done += 1
            before = clocks()
            self.evaluate(self.model, self.run.eval_episodes)
            self.seconds += clocks() - before
        # On-policy algorithms end by themselves, after a whole rollout.
        return self.run.steering is None or self.env_steps < self.run.steps

    def evaluate(self, policy: Any, episodes: int) -> None:
        """
        :param policy: A model, or the random policy.
        :param episodes: Number of episodes.
        """
        with undisturbed(self.seed):
            if isinstance(policy, BaseAlgorithm) and policy.get_vec_normalize_env() is not None:
                assert policy.env is not None
                sync_envs_normalization(policy.env, self.env)
            self.env.seed(self.seed)
            returns, _ = evaluate_policy(policy, self.env, episodes, deterministic=True, return_episode_rewards=True)
        self.rows.append([self.env_steps, float(np.mean(returns)), float(np.std(returns)), episodes])


def clocks() -> np.ndarray:
    """Seconds of CPU and of the wall."""
    return np.array([time.process_time(), time.perf_counter()])


def run_one(run: Run, policies: Path, demonstrations: Path) -> dict[str, Any]:
    """
    :param run: What to do.
    :param policies: Folder of pre-trained policies, which are made there if they are missing.
    :param demonstrations: Folder of demonstrations.
    :return: The line for the file of results.
    """
    pretrained = None if run.pretraining is None else pretrained_policy(run, policies, demonstrations)
    # What the constructor takes beside the run's arguments.
    start: dict[str, Any] = {} if pretrained is None or run.steering else {"pretrained": str(pretrained)}
    versions: dict[str, str | None] = {name: version(name) for name in ("stable_baselines3", "torch", "gymnasium", "mujoco")}
    versions.update(sb3_dppo=sb3_dppo.__version__, sb3_dppo_commit=commit())
    seconds = np.zeros(2)
    with tempfile.TemporaryDirectory() as folder:
        if run.algo == "random":
            eval_env = make_vec_env(run.env, min(EVAL_ENVS, run.final_eval_episodes))
            evaluations = Evaluations(run, eval_env)
            evaluations.evaluate(RandomPolicy(eval_env, evaluations.seed), run.final_eval_episodes)
        else:
            if run.settings == "zoo":
                model, eval_env, callbacks = from_zoo(run, folder, start)
            elif pretrained is not None and run.steering is not None:
                model, eval_env, callbacks = steering(run, pretrained)
            else:
                model, eval_env, callbacks = from_defaults(run, start)
            evaluations = Evaluations(run, eval_env)
            if start:
                evaluations.evaluate(model, run.final_eval_episodes)
            before = clocks()
            model.learn(run.steps, callback=[*callbacks, evaluations])
            seconds = clocks() - before - evaluations.seconds
            evaluations.evaluate(model, run.final_eval_episodes)
            assert model.env is not None
            model.env.close()
        eval_env.close()
    fields = ("study", "env", "algorithm", "seed", "hash", "policy", "settings", "pretraining", "steps")
    return {
        **{field: getattr(run, field) for field in fields},
        **({} if run.steering is None else {"steering": run.steering}),
        "arguments": used_arguments(run),
        "evaluations": evaluations.rows,
        "training": evaluations.training_rows,
        "cpu_seconds": round(float(seconds[0]), 2),
        "wall_seconds": round(float(seconds[1]), 2),
        "versions": versions,
    }


def pretrained_policy(run: Run, policies: Path, demonstrations: Path) -> Path:
    """
    :param run: A run that has a pre-trained policy.
    :param policies: Folder of such policies.
    :param demonstrations: Folder of demonstrations.
    :return: The file of the policy of the run's env and seed, which is made if it is missing, once for all runs.
    """
    how = run.pretraining
    assert how is not None
    policies.mkdir(parents=True, exist_ok=True)
    path = policies / f"{digest([run.env, run.seed, how])}.zip"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            file = demonstrations / how["demonstrations"]
            kwargs = PAPER_POLICY_KWARGS if how["policy_kwargs"] is None else how["policy_kwargs"]
            model = DPPO(how["policy"], run.env, seed=run.seed, device="cpu", policy_kwargs=kwargs)
            source = load_demonstrations(file if file.exists() else how["demonstrations"])
            BC(model, source, **how["arguments"]).train(how["epochs"], progress_bar=False)
            model.save(path)
    return path


def from_defaults(run: Run, start: dict[str, Any]) -> tuple[BaseAlgorithm, VecEnv, list[BaseCallback]]:
    """The model as a user makes it who changes nothing, and envs for evaluation."""
    model = CLASSES[run.algo](run.policy, run.env, seed=run.seed, device="cpu", **run.arguments, **start)
    return model, make_vec_env(run.env, min(EVAL_ENVS, run.eval_episodes)), []


def steering(run: Run, pretrained: Path) -> tuple[BaseAlgorithm, VecEnv, list[BaseCallback]]:
    """The model in an env that the pre-trained policy is a part of, and another such env for evaluation."""
    how = run.steering
    assert how is not None

    def make(seed: int | None) -> VecEnv:
        # One, for chunks of several would be cut where an episode ends in one of them.
        return WRAPPERS[how["wrapper"]](make_vec_env(run.env, 1, seed=seed), pretrained, **how["arguments"])

    model = CLASSES[run.algo](run.policy, make(run.seed), seed=run.seed, device="cpu", **run.arguments)
    return model, make(None), []


def from_zoo(run: Run, folder: str, start: dict[str, Any]) -> tuple[BaseAlgorithm, VecEnv, list[BaseCallback]]:
    """The model as RL Zoo makes it from the entry, envs for evaluation, and the entry's callbacks."""
    from rl_zoo3.exp_manager import ExperimentManager

    # RL Zoo looks for the entry by the env's id and wants a number of steps there.
    config = Path(folder, "entry.yml")
    config.write_text(yaml.safe_dump({run.env: {**run.arguments, **start, "n_timesteps": run.steps}}), "utf-8")
    manager = ExperimentManager(
        argparse.Namespace(),
        run.algo,
        run.env,
        folder,
        n_timesteps=run.steps,
        eval_freq=-1,
        seed=run.seed,
        verbose=0,
        device="cpu",
        config=str(config),
    )
    experiment = manager.setup_experiment()
    assert experiment is not None
    # RL Zoo itself leaves an entry's env_kwargs out in evaluation.
    manager.eval_env_kwargs = manager.env_kwargs
    return experiment[0], manager.create_envs(min(EVAL_ENVS, run.eval_episodes), eval_env=True), manager.callbacks


def used_arguments(run: Run) -> dict[str, Any]:
    """What the constructor was given and, for what it was not, its defaults at the time, all as JSON takes it."""
    arguments = dict(run.arguments)
    if run.algo in CLASSES:
        parameters = inspect.signature(CLASSES[run.algo].__init__).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items() if name not in NOT_ARGUMENTS}
        arguments = {**defaults, **arguments}
    return json.loads(json.dumps(arguments, default=str))


def commit() -> str | None:
    """The last Git commit of our package's code, with a mark if it has been changed since; none where it is installed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(sb3_dppo.__file__).parent), *arguments, "--", "."]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        last = git("log", "-1", "--format=%H")
        return last + (" with changes" if git("status", "--porcelain") else "") if last else None
    except (OSError, subprocess.CalledProcessError):
        return None
