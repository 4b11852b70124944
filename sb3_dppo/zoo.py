"""RL Zoo: registration of DPPO, its hyperparameters and its search space."""

import functools
import inspect
import json
import runpy
import sys
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS

from sb3_dppo.dppo import DPPO

HYPERPARAMS = Path(str(files("sb3_dppo.hyperparams")))


def register() -> None:
    """
    Make rl_zoo3 know the algorithm "dppo": train, enjoy, hyperparameters from YAML and their optimisation.
    """
    from rl_zoo3.exp_manager import ExperimentManager

    ALGOS["dppo"] = DPPO
    HYPERPARAMS_SAMPLER["dppo"] = sample_dppo_params
    HYPERPARAMS_CONVERTER["dppo"] = convert_dppo_params
    if not hasattr(ExperimentManager.__init__, "__wrapped__"):
        ExperimentManager.__init__ = _with_packaged_hyperparams(ExperimentManager.__init__)  # type: ignore[method-assign]


def _with_packaged_hyperparams(init: Any) -> Any:
    """
    rl_zoo3 looks for hyperparameters in its own package only.

    :param init: The constructor of ``ExperimentManager``.
    :return: The same, reading ours for "dppo" if the user names no file.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        if arguments["algo"] == "dppo" and arguments.get("config") is None:
            arguments["config"] = str(hyperparams_file(arguments.get("trained_agent", "")))
        init(**arguments)

    return wrapped


def hyperparams_file(trained_agent: str = "") -> Path:
    """
    :param trained_agent: Path of a saved model to go on with, or "".
    :return: The packaged hyperparameters for it: those for fine-tuning if its policy was pre-trained on demonstrations.
    """
    if trained_agent and zipfile.is_zipfile(trained_agent):
        with zipfile.ZipFile(trained_agent) as archive:
            if "data" in archive.namelist() and json.loads(archive.read("data")).get("pretrained_on_demonstrations"):
                return HYPERPARAMS / "dppo_finetune.yml"
    return HYPERPARAMS / "dppo.yml"


def sample_dppo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for DPPO hyperparams. It leaves out what a pre-trained policy fixes (``policy_kwargs``) or limits
    (``act_steps``, ``ft_denoising_steps``, the scheduler), so that it also serves with ``pretrained`` in the YAML.

    :param trial: Optuna's trial.
    :param n_actions: Size of the action space.
    :param n_envs: Number of parallel environments.
    :param additional_args: Not used.
    :return: Arguments of DPPO.
    """
    trial.suggest_int("n_steps_pow", 6, 10)
    trial.suggest_int("batch_size_pow", 9, 14)
    trial.suggest_categorical("n_epochs", [5, 10, 20])
    trial.suggest_float("learning_rate", 3e-5, 1e-3, log=True)
    trial.suggest_float("critic_learning_rate", 3e-4, 3e-3, log=True)
    trial.suggest_float("one_minus_gamma", 0.001, 0.05, log=True)
    trial.suggest_float("one_minus_gae_lambda", 0.01, 0.2, log=True)
    trial.suggest_categorical("gamma_denoising", [0.8, 0.9, 0.95, 0.99, 1.0])
    trial.suggest_float("clip_range", 0.01, 0.2, log=True)
    trial.suggest_float("clip_range_base_fraction", 0.1, 1.0, log=True)
    trial.suggest_float("min_sampling_std", 0.03, 0.3, log=True)
    return convert_dppo_params(trial.params)


def convert_dppo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters of a trial.
    :return: The arguments of DPPO that they stand for.
    """
    params = dict(sampled_params)
    for name in ("gamma", "gae_lambda"):
        params[name] = 1 - params.pop(f"one_minus_{name}")
    for name in ("n_steps", "batch_size"):
        params[name] = 2 ** params.pop(f"{name}_pow")
    params["clip_range_base"] = params["clip_range"] * params.pop("clip_range_base_fraction")
    return params


def main() -> None:
    """
    ``python -m sb3_dppo.zoo train …``: rl_zoo3's scripts where PyTorch's plug-ins are switched off.
    """
    scripts = ("train", "enjoy", "record_video")
    if len(sys.argv) < 2 or sys.argv[1] not in scripts:
        sys.exit(f"usage: python -m sb3_dppo.zoo {{{','.join(scripts)}}} …, with the arguments of rl_zoo3.…")
    register()
    runpy.run_module(f"rl_zoo3.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
