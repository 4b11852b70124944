"""The plug-in of rl_zoo3, in processes of their own as users run it."""

import argparse
import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml

from sb3_dppo import BC, DPPO, Demonstrations
from sb3_dppo.policies import PAPER_POLICY_KWARGS
from sb3_dppo.zoo import HYPERPARAMS, convert_dppo_params, hyperparams_file, sample_dppo_params, scripts
from tests.commands import run, run_forked

SMALL = "policy_kwargs:dict(net_arch=dict(pi=[16],vf=[16]),denoising_steps=2,horizon=4)"
SHORT_RUN = ("--algo", "dppo", "--env", "Pendulum-v1", "-n", "200", "--eval-freq", "-1", "-params", "n_steps:64", SMALL)


def train(*arguments: str, cwd: Path) -> str:
    return run_forked("rl_zoo3.train", "--num-threads", "1", "--eval-freq", "-1", *arguments, cwd=cwd)


def test_train_enjoy_and_video(tmp_path: Path) -> None:
    arguments = ("--algo", "dppo", "--env", "Pendulum-v1", "-n", "500", "-params", "n_steps:64", "n_envs:2", SMALL)
    out = run("-m", "rl_zoo3.train", "--eval-freq", "-1", *arguments, cwd=tmp_path).stdout
    assert str(HYPERPARAMS / "dppo.yml") in out
    assert (tmp_path / "logs/dppo/Pendulum-v1_1/Pendulum-v1.zip").is_file()
    enjoy = ("--algo", "dppo", "--env", "Pendulum-v1", "-f", "logs", "-n", "450", "--no-render")
    out = run("-m", "rl_zoo3.enjoy", *enjoy, cwd=tmp_path).stdout
    assert "Mean reward" in out
    video = ("--algo", "dppo", "--env", "Pendulum-v1", "-f", "logs", "-n", "20", "-o", "videos")
    run("-m", "rl_zoo3.record_video", *video, cwd=tmp_path, SDL_VIDEODRIVER="dummy")
    assert list((tmp_path / "videos").glob("*.mp4"))


def test_optimise_and_train_a_trial(tmp_path: Path) -> None:
    storage = ("--storage", "sqlite:///study.db", "--study-name", "s")
    common = ("--algo", "dppo", "--env", "Pendulum-v1", "-n", "300", "-params", "n_envs:2", SMALL)
    out = train(*common, "-optimize", "--n-trials", "2", "--eval-episodes", "1", "--no-optim-plots", *storage, cwd=tmp_path)
    assert "Best trial" in out and list((tmp_path / "logs/dppo").glob("report_*.csv"))
    # SMALL is fixed, and stays.
    trials = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db").trials
    assert not any({"width", "denoising_steps", "log_std_init", "min_std"} & set(trial.params) for trial in trials)
    out = train(*common, "--trial-id", "1", *storage, cwd=tmp_path)
    assert "Loading from Optuna study" in out and "'clip_range_base'" in out


def test_trials_fit_what_the_user_fixes(tmp_path: Path) -> None:
    """n_steps is a multiple of the horizon; the stds' floors belong together, so neither is tuned beside a fixed one."""
    policy_kwargs = "dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=2, horizon=3)"
    entry = dict(policy="DiffusionMlpPolicy", n_envs=2, n_timesteps=300, policy_kwargs=policy_kwargs, min_logprob_std=0.5)
    (tmp_path / "fixed.yml").write_text(yaml.dump({"Pendulum-v1": entry}))
    storage = ("--storage", "sqlite:///study.db", "--study-name", "s")
    common = ("--algo", "dppo", "--env", "Pendulum-v1", "--conf-file", "fixed.yml", *storage)
    train(*common, "-optimize", "--n-trials", "2", "--eval-episodes", "1", "--no-optim-plots", cwd=tmp_path)
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    train(*common, "--trial-id", "1", cwd=tmp_path)
    model = DPPO.load(tmp_path / "logs/dppo/Pendulum-v1_2/Pendulum-v1.zip")
    params = convert_dppo_params(study.trials[1].params)
    assert model.n_steps == params["n_steps"] and model.n_steps % 3 == 0
    assert model.batch_size == params["batch_size"] and model.clip_range_base == params["clip_range_base"]
    assert "min_sampling_std" not in params and model.min_logprob_std == 0.5


def one_trial(tmp_path: Path, **entry: Any) -> dict[str, Any]:
    """The arguments of DPPO in one trial with this entry of a YAML file."""
    from rl_zoo3.exp_manager import ExperimentManager

    (tmp_path / "fixed.yml").write_text(yaml.dump({"default": dict(policy="DiffusionMlpPolicy", n_timesteps=4096, **entry)}))
    manager = ExperimentManager(
        argparse.Namespace(),
        "dppo",
        "Pendulum-v1",
        str(tmp_path),
        optimize_hyperparameters=True,
        config=str(tmp_path / "fixed.yml"),
        n_eval_episodes=1,
        device="cpu",
        verbose=0,
    )
    assert manager.setup_experiment() is None
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(manager.objective, n_trials=1)
    return convert_dppo_params(study.trials[0].params)


def test_trials_with_a_pre_trained_agent_of_another_horizon(tmp_path: Path) -> None:
    """Where the horizon is in a file, and floors that are not fixed are equal."""
    params = one_trial(tmp_path, pretrained=str(pretrained(tmp_path / "agent.zip", horizon=7)))
    assert params["n_steps"] % 7 == 0 and 0.03 <= params["min_sampling_std"] == params["min_logprob_std"] <= 0.3
    assert "policy_kwargs" not in params


def test_trials_leave_denoising_steps_that_a_sampler_must_fit(tmp_path: Path) -> None:
    fixed = one_trial(tmp_path, scheduler="ddim", inference_steps=2)
    assert "denoising_steps" not in fixed["policy_kwargs"] and "net_arch" in fixed["policy_kwargs"]


def test_trials_from_scratch_tune_the_policy_and_its_exploration(tmp_path: Path) -> None:
    params = one_trial(tmp_path)
    assert set(params["policy_kwargs"]) == {"denoising_steps", "net_arch", "log_std_init"}
    assert -1 <= params["policy_kwargs"]["log_std_init"] <= 0.5 and "min_sampling_std" not in params


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("act_steps", [1, 3, 16, 100])
def test_converted_n_steps(act_steps: int, n_envs: int) -> None:
    """All envs together make close to a power of two; each makes a multiple of act_steps and at least two decisions."""
    trial = dict(
        n_envs=n_envs,
        batch_size_pow=9,
        one_minus_gamma=0.1,
        one_minus_gae_lambda=0.1,
        clip_range_of_sum=0.2,
        clip_range_base_fraction=1.0,
        n_actions=2,
    )
    for power in range(6, 11):
        params = convert_dppo_params(trial | dict(rollout_pow=power, act_steps=act_steps))
        n_steps = params["n_steps"]
        assert params["clip_range"] == pytest.approx(0.2 / (2 * act_steps))
        assert params["clip_range_base"] == params["clip_range"]
        assert n_steps % act_steps == 0 and n_steps >= 2 * act_steps
        wanted = 2**power / n_envs
        assert abs(n_steps - wanted) <= max(act_steps / 2, 2 * act_steps - wanted)


def pretrained(path: Path, horizon: int = 4) -> Path:
    policy_kwargs = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=10, horizon=horizon)
    model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=64 * horizon, policy_kwargs=policy_kwargs)
    rng = np.random.default_rng(0)
    demonstrations = Demonstrations(rng.normal(size=(50, 3)), rng.uniform(-2, 2, (50, 1)), np.array([50]))
    BC(model, demonstrations).train(1, progress_bar=False)
    model.save(path)
    return path


def test_fine_tuning_a_pre_trained_agent(tmp_path: Path) -> None:
    agent = pretrained(tmp_path / "agent.zip")
    out = train(
        "--algo", "dppo", "--env", "Pendulum-v1", "-n", "3000", "-i", str(agent), "-params", "n_steps:128", cwd=tmp_path
    )
    assert "dppo_finetune.yml" in out
    tuned = DPPO.load(tmp_path / "logs/dppo/Pendulum-v1_1/Pendulum-v1.zip")
    assert (
        tuned.policy.sampler.ft_denoising_steps == 10
        and tuned.policy.process.denoising_steps == 10
        and tuned.num_timesteps == 3072
    )


def test_tuning_of_fine_tuning(tmp_path: Path) -> None:
    """Every trial begins with the agent; one of them, the first, too, is trained again."""
    agent = ("-i", str(pretrained(tmp_path / "agent.zip")))
    common = ("--algo", "dppo", "--env", "Pendulum-v1", *agent, "-params", "n_envs:2", "--storage", "study.log")
    tune = ("-optimize", "--n-trials", "2", "--eval-episodes", "1", "--n-evaluations", "2", "--no-optim-plots", "--progress")
    out = train(*common, "--study-name", "s", *tune, "-n", "4096", cwd=tmp_path)
    assert "dppo_finetune.yml" in out and "Best trial" in out
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log")))
    study = optuna.load_study(study_name="s", storage=storage)
    assert [len(trial.intermediate_values) for trial in study.trials] == [2, 2] and "pretrained" in study.user_attrs
    assert not any({"width", "denoising_steps", "log_std_init", "min_std"} & set(trial.params) for trial in study.trials)
    out = train(*common, "--study-name", "s", "--trial-id", "0", "-n", "300", cwd=tmp_path)
    assert "Loading from Optuna study" in out and "Loading pretrained agent" in out
    model = DPPO.load(tmp_path / "logs/dppo/Pendulum-v1_2/Pendulum-v1.zip")
    assert model.learning_rate(1) == convert_dppo_params(study.trials[0].params)["learning_rate"]
    assert model.pretrained_on_demonstrations


def test_other_algorithms_still_work(tmp_path: Path) -> None:
    out = train("--algo", "ppo", "--env", "Pendulum-v1", "-n", "300", cwd=tmp_path)
    assert "rl_zoo3/hyperparams/ppo.yml" in out


def test_explicit_door(tmp_path: Path) -> None:
    closed = run("-m", "rl_zoo3.train", *SHORT_RUN, cwd=tmp_path, check=False, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert closed.returncode != 0 and "invalid choice: 'dppo'" in closed.stderr
    run("-m", "sb3_dppo.zoo", "train", *SHORT_RUN, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (tmp_path / "logs/dppo/Pendulum-v1_1").is_dir()
    usage = run("-m", "sb3_dppo.zoo", "walk", cwd=tmp_path, check=False)
    assert usage.returncode != 0 and "usage" in usage.stderr and all(name in usage.stderr for name in scripts())


@pytest.mark.slow
def test_explicit_door_of_videos(tmp_path: Path) -> None:
    run("-m", "sb3_dppo.zoo", "train", *SHORT_RUN, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    # It starts record_video in processes of their own.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    record = ("record_training", "--algo", "dppo", "--env", "Pendulum-v1", "-f", "logs", "-n", "20", "-o", "videos")
    quiet = dict(PATH=path, SDL_VIDEODRIVER="dummy", PYTHONWARNINGS="ignore")
    run("-m", "sb3_dppo.zoo", *record, cwd=tmp_path, check=False, TORCH_DEVICE_BACKEND_AUTOLOAD="0", **quiet)
    assert list((tmp_path / "videos").glob("final-model-dppo-*.mp4"))


def test_all_scripts_are_known() -> None:
    modules = {path.stem for path in Path(str(files("rl_zoo3"))).rglob("*.py")}
    programs = {"train", "enjoy", "record_video", "record_training", "load_from_hub", "push_to_hub", "benchmark", "cli"}
    programs |= {"all_plots", "plot_from_file", "plot_train"}
    assert {name.rsplit(".")[-1] for name in scripts()} == programs <= modules


@pytest.mark.parametrize("script", ["load_from_hub", "record_training"])
def test_scripts_without_experiments(script: str, tmp_path: Path) -> None:
    """They import no more of rl_zoo3 than its utilities."""
    algo = ("--algo", "dppo", "--env", "Pendulum-v1", "-f", "no-such-folder")
    done = run("-m", f"rl_zoo3.{script}", *algo, cwd=tmp_path, check=False, TRUST_REMOTE_CODE="False")
    assert "invalid choice" not in done.stderr
    assert ("TRUST_REMOTE_CODE" if script == "load_from_hub" else "no-such-folder/dppo folder was not found") in done.stderr


@pytest.mark.parametrize("first", ["import torch", "import rl_zoo3", "import sb3_dppo"])
def test_algorithms_after_any_first_import(first: str, tmp_path: Path) -> None:
    """PyTorch may be imported before rl_zoo3, or by it: the module under way is waited for."""
    code = (
        f"{first}\n"
        "from rl_zoo3 import ALGOS\n"
        "import sys, types, rl_zoo3.utils\n"
        "assert ALGOS['dppo'].__name__ == 'DPPO' and type(rl_zoo3.utils) is types.ModuleType\n"
        "assert 'optuna' not in sys.modules and 'diffusers' not in sys.modules\n"
        "from rl_zoo3.exp_manager import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER\n"
        "assert 'dppo' in HYPERPARAMS_SAMPLER and 'dppo' in HYPERPARAMS_CONVERTER\n"
    )
    assert run("-c", code, cwd=tmp_path).stderr == ""


def test_registration_that_fails_leaves_pytorch_and_rl_zoo3_importable(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['sb3_dppo.zoo'] = None\n"
        "import torch, rl_zoo3.exp_manager as m\n"
        "assert 'dppo' not in m.ALGOS and 'ppo' in m.ALGOS\n"
    )
    done = run("-c", code, cwd=tmp_path)
    assert "could not register" in done.stderr


def test_registration_after_rl_zoo3_and_twice(tmp_path: Path) -> None:
    code = (
        "import rl_zoo3.exp_manager as m\n"
        "assert 'dppo' not in m.ALGOS\n"
        "import sb3_dppo, _sb3_dppo_autoload\n"
        "_sb3_dppo_autoload.activate()\n"
        "assert m.ALGOS['dppo'] is sb3_dppo.DPPO\n"
    )
    run("-c", code, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_import_costs(tmp_path: Path) -> None:
    """PyTorch's import is not made slower, and ours does not bring in diffusers or torch's compiler."""
    loaded = run("-c", "import torch, sys; print(*sys.modules)", cwd=tmp_path).stdout.split()
    assert "_sb3_dppo_autoload" in loaded and not any(name.startswith(("sb3_dppo", "rl_zoo3")) for name in loaded)
    loaded = run("-c", "import sb3_dppo, sys; print(*sys.modules)", cwd=tmp_path).stdout.split()
    assert not any(name.startswith(("diffusers", "torch._dynamo", "rl_zoo3", "minari", "h5py")) for name in loaded)


@pytest.mark.parametrize("seed", range(3))
def test_sampled_hyperparameters_are_valid(seed: int, tmp_path: Path) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    agent = str(pretrained(tmp_path / "agent.zip"))
    for _ in range(5):
        trial = study.ask()
        params = sample_dppo_params(trial, 1, 2, {})
        assert params == convert_dppo_params(trial.params)
        assert "policy_kwargs" not in params
        for extra in (dict[str, Any](), dict(pretrained=agent, act_steps=2, ft_denoising_steps=5)):
            DPPO("DiffusionMlpPolicy", "Pendulum-v1", **params, **extra)


@pytest.mark.parametrize("name", ["dppo.yml", "dppo_finetune.yml"])
def test_packaged_hyperparameters(name: str) -> None:
    entries = yaml.safe_load((HYPERPARAMS / name).read_text())
    assert "default" in entries
    if name == "dppo.yml":
        classic = {"Pendulum-v1", "MountainCarContinuous-v0", "LunarLanderContinuous-v3", "BipedalWalker-v3"}
        mujoco = {f"{name}-v5" for name in ("InvertedDoublePendulum", "Swimmer", "Hopper", "Walker2d", "HalfCheetah")}
        assert classic | mujoco <= set(entries)
    for entry in entries.values():
        n_envs = entry.get("n_envs", 1)
        arguments = {
            k: v for k, v in entry.items() if k not in ("policy", "n_envs", "n_timesteps", "normalize", "env_wrapper")
        }
        if name == "dppo_finetune.yml":
            arguments["policy_kwargs"] = PAPER_POLICY_KWARGS  # that of the agent to fine-tune
        DPPO(entry["policy"], "Pendulum-v1", **arguments)
        assert n_envs >= 1


POLICIES = {
    "DiffusionMlpPolicy": ("Pendulum-v1", "net_arch=dict(pi=[16] * 3, vf=[16]), film=True"),
    "DiffusionUnetPolicy": ("Pendulum-v1", "net_arch=dict(pi=[8, 16], vf=[16])"),
    "DiffusionTransformerPolicy": ("Pendulum-v1", "net_arch=dict(pi=[16, 16], vf=[16])"),
    "DiffusionCnnPolicy": ("Pixels-v0", "net_arch=dict(pi=[16], vf=[16]), features_extractor_class='VitExtractor'"),
    "DiffusionMultiInputPolicy": ("Dict-v0", "net_arch=dict(pi=[16], vf=[16])"),
}
SAMPLERS: list[dict[str, Any]] = [
    dict(scheduler="ddpm", lr_decay="cosine", lr_warmup=0.1, kl_coef=0.1, ft_denoising_anneal=[1, 1]),
    dict(scheduler="ddim", inference_steps=2, learn_eta="state", eta_range=[0.2, 0.9], eta_learning_rate="lin_1e-3"),
    dict(scheduler={"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1}, inference_steps=3),
]
# All in one process, which takes seconds to start.
TRAIN_ALL = """
import sys

import gymnasium
import rl_zoo3.train

from sb3_dppo import DPPO
from tests.features.test_observations import PixelPendulum, VectorDictEnv

gymnasium.register("Pixels-v0", PixelPendulum, max_episode_steps=8)
gymnasium.register("Dict-v0", VectorDictEnv)
for argument in sys.argv[1:]:
    path, env_id = argument.split(":")
    options = ["--algo", "dppo", "--env", env_id, "--conf-file", path, "--eval-freq", "-1"]
    options += ["--num-threads", "1", "-f", path + ".logs"]
    sys.argv = ["train", *options]
    rl_zoo3.train.train()
    model = DPPO.load(f"{path}.logs/dppo/{env_id}_1/{env_id}.zip")
    print("trained", type(model.policy).__name__, model.num_timesteps)
"""


def test_every_policy_and_sampler_from_yaml(tmp_path: Path) -> None:
    arguments = []
    for policy, (env_id, policy_kwargs) in POLICIES.items():
        for i, sampler in enumerate(SAMPLERS):
            entry = dict(policy=policy, n_timesteps=64, n_envs=2, n_steps=16, batch_size=32, n_epochs=1)
            entry |= sampler | dict(policy_kwargs=f"dict(denoising_steps=4, {policy_kwargs})")
            path = tmp_path / f"{policy}_{i}.yml"
            path.write_text(yaml.safe_dump({env_id: entry}))
            arguments.append(f"{path}:{env_id}")
    root = str(Path(__file__).parent.parent)
    out = run("-c", TRAIN_ALL, *arguments, cwd=tmp_path, PYTHONPATH=root, SDL_VIDEODRIVER="dummy").stdout
    for policy in POLICIES:
        assert out.count(f"trained {policy} 64") == len(SAMPLERS)


def test_hyperparams_file() -> None:
    assert hyperparams_file().name == "dppo.yml"
    assert hyperparams_file("no-such.zip").name == "dppo.yml"
