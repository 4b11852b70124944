"""Learning studies: the command line, what it keeps and shows, and evaluation that leaves training alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_dppo import DPPO, collect_demonstrations

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import report  # noqa: E402
import run_one  # noqa: E402
import study  # noqa: E402

SMALL = {"n_steps": 64, "batch_size": 64, "n_epochs": 1}
STUDY: dict[str, Any] = {
    "envs": ["Pendulum-v1"],
    "algorithms": {
        "dppo": {"algo": "dppo", "arguments": {**SMALL, "policy_kwargs": {"net_arch": [16]}}},
        "broken": {"algo": "ppo", "arguments": {"no_such_argument": 1}},
        "random": {"algo": "random"},
    },
    "baseline": "dppo",
    "steps": 300,
    "seeds": [0],
    "evaluations": 2,
    "eval_episodes": 1,
    "final_eval_episodes": 2,
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def command(*arguments: Any) -> list[str]:
    return [sys.executable, str(BENCHMARKS / "learning.py"), *map(str, arguments)]


def call(*arguments: Any) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """A folder with a study that two workers have run, and what they printed."""
    folder = tmp_path_factory.mktemp("study")
    return folder, call("run", write(folder), "--results", folder, "--workers", 2)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "tiny.jsonl").read_text().splitlines()]


def test_a_failure_is_reported_and_the_others_finish(first: tuple[Path, subprocess.CompletedProcess]) -> None:
    folder, done = first
    assert done.returncode == 1
    assert "broken, seed 0 failed" in done.stderr and "unexpected keyword argument 'no_such_argument'" in done.stderr
    rows = {row["algorithm"]: row for row in rows_of(folder)}
    assert set(rows) == {"dppo", "random"}
    row = rows["dppo"]
    # 300 steps are 5 rollouts of 64.
    assert [[steps, episodes] for steps, _, _, episodes in row["evaluations"]] == [[150, 1], [320, 2]]
    assert row["arguments"]["n_steps"] == 64 and row["arguments"]["noise_clip"] == 3.0
    assert row["steps"] == 300 and row["cpu_seconds"] > 0
    # Episodes of 200 steps, one of which ends in the fourth rollout.
    ((steps, mean, n_episodes),) = row["training"]
    assert (steps, n_episodes) == (256, 1) and mean < 0
    assert {"sb3_dppo_commit", "torch", "gymnasium", "mujoco", "stable_baselines3"} <= set(row["versions"])
    assert rows["random"]["evaluations"][0][::3] == [0, 2]


def test_what_is_done_is_not_done_again_unless_its_line_is_removed(first: tuple[Path, subprocess.CompletedProcess]) -> None:
    folder, _ = first
    arguments = ["run", folder / "tiny.yml", "--results", folder, "--only", "*/dppo", "*/random"]
    before = rows_of(folder)
    again = call(*arguments)
    assert again.returncode == 0 and "2 of 2 runs are done" in again.stdout and rows_of(folder) == before
    kept = [row for row in before if row["algorithm"] == "random"]
    (folder / "tiny.jsonl").write_text(json.dumps(kept[0]) + "\n")
    late = call(*arguments, "--limit-minutes", 0)
    assert late.returncode == 0 and "1 runs are left" in late.stdout and rows_of(folder) == kept
    assert call(*arguments).returncode == 0
    repeated = next(row for row in rows_of(folder) if row["algorithm"] == "dppo")
    assert repeated["evaluations"] == next(row for row in before if row["algorithm"] == "dppo")["evaluations"]


def test_ctrl_c_ends_the_workers(tmp_path: Path) -> None:
    path = write(tmp_path, algorithms={"dppo": {"algo": "dppo"}}, steps=10_000_000)
    # A shell lets what it starts in the background ignore Ctrl-C, and so would all that this starts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command("run", path, "--results", tmp_path), stdout=subprocess.DEVNULL, preexec_fn=heed)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not (workers := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # the worker is at work
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(30) == 130
    finally:
        process.terminate()  # which ends the worker, too
    assert len(workers) == 1 and not Path(f"/proc/{workers[0]}").exists() and not (tmp_path / "tiny.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: 0 is wrong here. Input should be greater than or equal to 1"),
        ({"sedes": [0]}, "sedes: there is no such field (value [0]); there are envs, algorithms, steps"),
        (
            {"algorithms": {"a": {"algo": "td3"}}, "baseline": None},
            "algorithms.a.algo: 'td3' is wrong here. Input should be 'dppo'",
        ),
        (
            {"algorithms": {"a": {"algo": "ppo", "lr": 1}}, "baseline": None},
            "algorithms.a.lr: there is no such field (value 1)",
        ),
        ({"baseline": "sac"}, "baseline: 'sac' is not in the study; it has dppo, broken, random."),
        ({"seeds": [1, 1]}, "seeds names one twice"),
        ({"env_overrides": {"Hopper-v5": {"steps": 1}}}, "env_overrides: 'Hopper-v5' is not in the study"),
        (
            {"algorithms": {"a": {"algo": "random", "settings": "zoo"}}, "baseline": None},
            "algorithms.a: settings: zoo goes neither",
        ),
        (
            {"algorithms": {"a": {"algo": "ppo", "pretraining": "bc"}}, "baseline": None},
            "algorithms.a: pretraining goes neither without algo: dppo",
        ),
        (
            {"algorithms": {"a": {"algo": "dppo", "pretraining": "bc"}}, "baseline": None},
            "algorithms.a.pretraining: 'bc' is not in the study; it has none.",
        ),
        (
            {"pretraining": {"bc": {"epochs": 1, "demonstrations": {"Hopper-v5": "hopper-medium"}}}},
            "pretraining.bc.demonstrations has all: 'Pendulum-v1' is not in the study; it has Hopper-v5.",
        ),
        ({"pretraining": {"bc": {"demonstrations": {}}}}, "pretraining.bc.epochs: this field is missing"),
        (
            {"pretraining": {"bc": {"epochs": 1, "demonstrations": {}, "net": 1}}},
            "pretraining.bc.net: there is no such field (value 1); there are demonstrations, epochs",
        ),
    ],
)
def test_bad_studies_name_the_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        study.read_study(write(tmp_path, **changes))
    assert message in str(error.value) and str(tmp_path / "tiny.yml") in str(error.value)


def test_a_bad_study_ends_the_program_without_a_traceback(tmp_path: Path) -> None:
    done = call("run", write(tmp_path, evaluations="many"), "--results", tmp_path)
    assert done.returncode == 2 and "evaluations: 'many' is wrong here" in done.stderr and "Traceback" not in done.stderr


def test_the_studies_here() -> None:
    studies = {path.stem: study.read_study(path) for path in (BENCHMARKS / "studies").glob("*.yml")}
    assert all(read.runs() for read in studies.values())
    defaults, million = studies["defaults"], studies["million"]
    runs = defaults.runs()
    assert len(runs) == 8 * 3 * 3 and [run.seed for run in runs[:24]] == [0] * 24
    assert all(run.arguments == {} and run.settings == "defaults" for run in runs)
    # RL Zoo's own entry, by the name of an older version of the env.
    ppo = next(run for run in million.runs() if run.algorithm == "ppo" and run.env == "Walker2d-v5")
    assert ppo.arguments["normalize"] is True and ppo.policy == "MlpPolicy" and "n_timesteps" not in ppo.arguments


def test_overrides_and_hashes(tmp_path: Path) -> None:
    override = {"Pendulum-v1": {"steps": 500, "arguments": {"dppo": {"gamma": 0.9}}}}
    plain = study.read_study(write(tmp_path)).runs()
    changed = study.read_study(write(tmp_path, env_overrides=override)).runs()
    assert changed[0].steps == 500 and changed[0].arguments["gamma"] == 0.9 and changed[0].arguments["n_steps"] == 64
    # Nothing is different for the random policy, which takes no steps.
    assert [a.hash != b.hash for a, b in zip(plain, changed, strict=True)] == [True, True, False]
    evaluated_more = study.read_study(write(tmp_path, evaluations=5)).runs()
    assert [run.key for run in evaluated_more] == [run.key for run in plain]
    zoo = {"dppo": {"algo": "dppo", "settings": "zoo"}}
    with pytest.raises(ValueError, match=r"algorithms.dppo.zoo_env: RL Zoo's dppo.yml has no entry for 'Reacher-v5'"):
        study.read_study(write(tmp_path, envs=["Reacher-v5"], algorithms=zoo)).runs()


def one(algo: str, **changes: Any) -> study.Run:
    arguments = {**SMALL, **({"policy_kwargs": {"net_arch": [16]}} if algo == "dppo" else {})}
    fields = dict(study="tiny", env="Pendulum-v1", algorithm=algo, algo=algo, policy=study.POLICIES[algo], seed=0, steps=256)
    numbers = dict(evaluations=1, eval_episodes=1, final_eval_episodes=1)
    return study.Run(**{**fields, **numbers, "settings": "defaults", "pretraining": None, "arguments": arguments, **changes})


def trained(run: study.Run, evaluated: bool = True) -> tuple[list[th.Tensor], Any]:
    """Parameters after training, and what the global generators give then."""
    model, env, _ = run_one.from_defaults(run, {})
    callback = run_one.Evaluations(run, env)
    model.learn(run.steps, callback=callback if evaluated else None)
    assert len(callback.rows) == (run.evaluations - 1 if evaluated else 0)
    return list(model.policy.parameters()), (random.random(), np.random.random(), th.rand(1).item())


@pytest.mark.parametrize("algo", ["dppo", "ppo"])
def test_evaluation_does_not_disturb_training(algo: str) -> None:
    parameters, numbers = trained(one(algo), evaluated=False)
    for evaluations in (1, 4):
        others, other_numbers = trained(one(algo, evaluations=evaluations))
        assert all(th.equal(a, b) for a, b in zip(parameters, others, strict=True)) and numbers == other_numbers


@pytest.mark.parametrize(("algo", "cls"), [("dppo", DPPO), ("ppo", PPO)])
def test_defaults_are_what_a_user_types(algo: str, cls: Any) -> None:
    run = one(algo, arguments={})
    model, env, _ = run_one.from_defaults(run, {})
    expected = cls(run.policy, "Pendulum-v1", seed=0)
    assert type(model) is cls and env is not model.env and model.env.num_envs == 1
    pairs = zip(model.policy.parameters(), expected.policy.parameters(), strict=True)
    assert all(th.equal(a, b.cpu()) for a, b in pairs)
    assert (model.n_steps, model.batch_size, model.n_epochs) == (expected.n_steps, expected.batch_size, expected.n_epochs)


def test_zoo_settings(tmp_path: Path) -> None:
    entry = {**SMALL, "policy": "MlpPolicy", "n_envs": 2, "normalize": True, "learning_rate": "lin_1e-3"}
    entry["policy_kwargs"] = "dict(net_arch=[8], activation_fn=nn.ReLU)"
    run = one("ppo", settings="zoo", arguments=entry, evaluations=2)
    model, env, _ = run_one.from_zoo(run, str(tmp_path), {})
    assert model.env.num_envs == 2 and model.learning_rate(0.5) == pytest.approx(5e-4)
    assert isinstance(model.policy.mlp_extractor.policy_net[1], th.nn.ReLU)
    normalised = model.get_vec_normalize_env()
    callback = run_one.Evaluations(run, env)
    model.learn(run.steps, callback=callback)
    count = normalised.obs_rms.count
    callback.evaluate(model, 1)
    # In sync, and not itself trained.
    np.testing.assert_array_equal(env.obs_rms.mean, normalised.obs_rms.mean)
    assert env.obs_rms.count == normalised.obs_rms.count == count and not env.training and not env.norm_reward
    # Rewards as the env gives them: an episode of 200 steps costs hundreds.
    assert [row[0] for row in callback.rows] == [128, 256] and callback.rows[-1][1] < -100
    assert json.loads(json.dumps(run_one.used_arguments(run)))["normalize"] is True


def test_pretrained_policies_are_shared_by_algorithms(tmp_path: Path) -> None:
    pretraining = {
        "demonstrations": {"Pendulum-v1": "swings.npz"},
        "epochs": 1,
        "policy_kwargs": {"net_arch": [16], "prediction_type": "epsilon", "horizon": 2},
        "arguments": {"batch_size": 32},
    }
    algorithms = {
        name: {"algo": "dppo", "pretraining": "bc", "arguments": {**SMALL, "act_steps": act_steps}}
        for name, act_steps in (("plan at once", 1), ("plan later", 2))
    }
    changes = dict(algorithms=algorithms, pretraining={"bc": pretraining}, baseline=None)
    runs = study.read_study(write(tmp_path, **changes)).runs()
    assert len({run.hash for run in runs}) == 2 and runs[0].hash != runs[0].model_copy(update={"pretraining": None}).hash
    env = gym.make("Pendulum-v1")
    swings = collect_demonstrations(env, lambda *_: (env.action_space.sample(), None), 2, seed=0, progress_bar=False)
    (tmp_path / "demos").mkdir()
    swings.save(tmp_path / "demos" / "swings.npz")
    done = call("run", tmp_path / "tiny.yml", "--results", tmp_path, "--demonstrations", tmp_path / "demos", "--workers", 2)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert len(list((tmp_path / "policies").glob("*.zip"))) == 1
    for row in rows:
        # Before, in between and at the end.
        assert [evaluation[0] for evaluation in row["evaluations"]][::2] == [0, 320] and len(row["evaluations"]) == 3
        assert row["pretraining"]["demonstrations"] == "swings.npz" and row["arguments"]["pretrained"] is None
    start = {"pretrained": str(next((tmp_path / "policies").glob("*.zip")))}
    model, _, _ = run_one.from_defaults(runs[0], start)
    assert model.pretrained_on_demonstrations and model.policy.horizon == 2 and model.act_steps == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrapper", ["noise", "residual"])
def test_a_frozen_policy_is_steered_for_as_many_env_steps(wrapper: str, tmp_path: Path) -> None:
    pretraining = {
        "demonstrations": {"Pendulum-v1": "swings.npz"},
        "epochs": 1,
        "policy_kwargs": {"horizon": 2, "net_arch": [16]},
    }
    env = gym.make("Pendulum-v1")
    swings = collect_demonstrations(env, lambda *_: (env.action_space.sample(), None), 1, seed=0, progress_bar=False)
    swings.save(tmp_path / "swings.npz")
    steering = {"wrapper": wrapper, "arguments": {"scheduler": "ddim"}}
    algorithm = {"algo": "sac", "pretraining": "bc", "steering": steering, "arguments": {"learning_starts": 10_000}}
    changes: Any = dict(algorithms={"sac": algorithm}, pretraining={"bc": pretraining}, baseline=None)
    (run,) = study.read_study(write(tmp_path, **changes)).runs()
    assert run.policy == "MlpPolicy" and run.hash != run.model_copy(update={"steering": None}).hash
    row = run_one.run_one(run, tmp_path / "policies", tmp_path)
    assert row["steering"] == steering and row["arguments"]["learning_starts"] == 10_000
    steps = [evaluation[0] for evaluation in row["evaluations"]]
    assert steps == [150, 300]
    assert [training[2] for training in row["training"]] == [1]
    algorithm["algo"] = "dppo"
    with pytest.raises(ValueError, match="steering goes with algo: sac"):
        study.read_study(write(tmp_path, **changes))


def test_pretrained_policies_take_the_entry_for_fine_tuning(tmp_path: Path) -> None:
    pretraining = {"bc": {"demonstrations": {"Hopper-v5": "hopper-medium"}, "epochs": 1}}
    algorithms = {"dppo": {"algo": "dppo", "settings": "zoo", "pretraining": "bc", "arguments": {"n_epochs": 7}}}
    changes: Any = dict(algorithms=algorithms, pretraining=pretraining, baseline=None, envs=["Hopper-v5"])
    (run,) = study.read_study(write(tmp_path, **changes)).runs()
    assert run.arguments["ft_denoising_steps"] == 10 and run.arguments["n_epochs"] == 7
    assert run.policy == "DiffusionMlpPolicy" and run.pretraining is not None
    assert run.pretraining["demonstrations"] == "hopper-medium"


def test_the_random_policy_is_uniform_and_repeatable() -> None:
    env = make_vec_env("Pendulum-v1", 2)
    actions = [run_one.RandomPolicy(env, 3).predict(np.zeros((500, 3)))[0] for _ in range(2)]
    np.testing.assert_array_equal(*actions)
    assert actions[0].shape == (500, 1) and actions[0].min() < -1.9 and actions[0].max() > 1.9


@pytest.fixture
def results(tmp_path: Path) -> tuple[study.Study, Path]:
    """A study of two envs with results in which "dppo" gains twice as much as "ppo"."""
    algorithms = {name: {"algo": name} for name in ("dppo", "ppo", "random")}
    changes = dict(envs=["Pendulum-v1", "Hopper-v5"], algorithms=algorithms, baseline="ppo", seeds=[0, 1, 2])
    read = study.read_study(write(tmp_path, **changes))
    path = study.results_file(read, tmp_path)
    for run in read.runs():
        level = {"random": 10.0, "ppo": 110.0, "dppo": 210.0}[run.algo] + run.seed - 1
        row = {
            **run.model_dump(),
            "hash": run.hash,
            "cpu_seconds": 90.0,
            "evaluations": [[150, 250.0, 1.0, 1], [320, level, 1.0, 2]],
        }
        study.append_result(path, row)
    return read, path


def test_show_without_rliable(
    results: tuple[study.Study, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rliable", None)
    read, path = results
    study.append_result(path, {**study.read_results(path)[0], "hash": "of other arguments"})
    report.show(read, path, markdown=True, picture=str(path.with_suffix(".png")))
    printed = capsys.readouterr().out
    assert "### Hopper-v5" in printed and "| dppo | 3 | 210.0 ± 1.0 | 250.0 ± 0.0 | 200.0 | 2.00 | 1.5 |" in printed
    assert "| random | 3 | 10.0 ± 1.0 | – | – | – | – |" in printed
    assert "pip install 'sb3-dppo[benchmarks]'" in printed and "18 of 18 runs are done" in printed
    assert "1 results of other arguments" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report.show(read, path)
    assert "210.0 ± 1.0" in capsys.readouterr().out


def test_show_with_rliable(results: tuple[study.Study, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rliable.metrics")
    read, path = results
    report.show(read, path, picture=str(path.with_suffix(".png")))
    printed = capsys.readouterr().out
    assert "Over 2 tasks: " in printed and "ppo: interquartile mean 1.00 [" in printed
    assert "dppo: interquartile mean 2.00 [" in printed and "probability of improvement over ppo 1.00 [1.00, 1.00]" in printed
    assert path.with_suffix(".png").exists()


def test_tasks_without_a_scale_are_left_out(results: tuple[study.Study, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rliable.metrics")
    read, path = results
    rows = study.read_results(path)
    path.unlink()
    for row in rows:
        if row["env"] == "Hopper-v5" and row["algorithm"] == "ppo":
            row["evaluations"][-1][1] = 0.0
        study.append_result(path, row)
    report.show(read, path)
    printed = capsys.readouterr().out
    assert "Over 1 tasks (without Hopper-v5)" in printed and "200.0" in printed and "2.00" in printed


def test_show_without_results(tmp_path: Path) -> None:
    done = call("show", write(tmp_path), "--results", tmp_path)
    assert done.returncode == 2 and "has no results of this study: run it first" in done.stderr


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.jsonl"
    path.write_text('{"env": 1}\n{"env": 1\n')
    with pytest.raises(ValueError, match=r"tiny.jsonl, line 2, is not JSON"):
        study.read_results(path)


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "tiny.jsonl"
    code = "import sys; from pathlib import Path; from study import append_result\n"
    code += "for i in range(50): append_result(Path(sys.argv[1]), {'who': sys.argv[2], 'text': 'x' * 20_000})"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    started = [subprocess.Popen([sys.executable, "-c", code, str(path), str(i)], env=environment) for i in range(2)]
    assert [process.wait(60) for process in started] == [0, 0]
    assert len(study.read_results(path)) == 100


def test_infinite_arguments_reach_the_run(tmp_path: Path) -> None:
    algorithms = dict(STUDY["algorithms"], dppo={"algo": "dppo", "arguments": {"noise_clip": float("inf")}})
    (run, *_) = study.read_study(write(tmp_path, algorithms=algorithms)).runs()
    assert study.Run.model_validate_json(run.model_dump_json()).key == run.key
