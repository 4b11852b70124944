"""RL Zoo: registration of DPPO, its hyperparameters and its search space."""

import atexit
import functools
import inspect
import json
import os
import re
import runpy
import sys
import tempfile
import zipfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.callbacks import ProgressBarCallback

from sb3_dppo import ranks
from sb3_dppo.dppo import DPPO

if TYPE_CHECKING:
    import optuna

HYPERPARAMS = Path(str(files("sb3_dppo.hyperparams")))


def register() -> None:
    """
    Make what has been imported of rl_zoo3 know the algorithm "dppo": all scripts take it, and with
    ``rl_zoo3.exp_manager`` there are its hyperparameters from YAML and their optimisation.
    """
    utils, experiments = (sys.modules.get(f"rl_zoo3.{name}") for name in ("utils", "exp_manager"))
    if utils is not None:
        utils.ALGOS["dppo"] = DPPO
    manager = getattr(experiments, "ExperimentManager", None)
    if experiments is not None and manager is not None and "dppo" not in experiments.HYPERPARAMS_SAMPLER:
        from sb3_dppo.heartbeat import with_heartbeat  # Optuna, which is loaded then.

        experiments.HYPERPARAMS_SAMPLER["dppo"] = sample_dppo_params
        experiments.HYPERPARAMS_CONVERTER["dppo"] = convert_dppo_params
        manager.__init__ = _with_our_arguments(manager.__init__)
        manager.objective = _with_fixed_hyperparams(_with_progress(manager.objective))
        manager.hyperparameters_optimization = with_heartbeat(manager.hyperparameters_optimization)


class _TrialId(int):
    """rl_zoo3 asks whether a trial's number is true, which the first one's is not."""

    def __bool__(self) -> bool:
        return True


def _with_our_arguments(init: Any) -> Any:
    """
    rl_zoo3 looks for hyperparameters in its own package only, and with an agent (``-i``) it trains also where it is told to
    tune (``-optimize``).

    :param init: The constructor of ``ExperimentManager``.
    :return: The same. For "dppo" it reads our hyperparameters if the user names no file, every trial begins with the agent,
        and ``--trial-id 0`` is a trial.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        if arguments["algo"] == "dppo":
            if ranks.launched_rank() > 0:
                arguments |= _silence()
            agent = arguments.get("trained_agent", "")
            if arguments.get("config") is None:
                arguments["config"] = str(hyperparams_file(agent))
            if agent and arguments.get("optimize_hyperparameters"):
                arguments["hyperparams"] = {**(arguments.get("hyperparams") or {}), "pretrained": agent}
                arguments["trained_agent"] = ""
            if arguments.get("trial_id") is not None:
                arguments["trial_id"] = _TrialId(arguments["trial_id"])
        init(**arguments)

    return wrapped


def _silence() -> dict[str, Any]:
    """Of several processes, the first one prints, evaluates and saves: what the others are told instead."""
    sys.stdout = open(os.devnull, "w")
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return dict(log_folder=folder.name, tensorboard_log="", eval_freq=-1, save_freq=-1, verbose=0, show_progress=False)


def _with_progress(objective: Any) -> Any:
    """
    rl_zoo3 has no progress bar (``--progress``) in trials.

    :param objective: ``ExperimentManager.objective``.
    :return: The same, with a bar for each trial of "dppo", unless several run at once.
    """

    @functools.wraps(objective)
    def wrapped(manager: Any, trial: "optuna.Trial") -> float:
        if manager.algo != "dppo" or not manager.show_progress or manager.n_jobs != 1:
            return objective(manager, trial)
        given, bar = manager.specified_callbacks, ProgressBarCallback()
        manager.specified_callbacks = [*(given if isinstance(given, list) else [given]), bar]
        try:
            return objective(manager, trial)
        finally:
            manager.specified_callbacks = given
            if hasattr(bar, "pbar"):  # that of a trial that failed is still open
                bar.pbar.close()

    return wrapped


def hyperparams_file(trained_agent: str = "") -> Path:
    """The packaged hyperparameters for it: those for fine-tuning if its policy was pre-trained on demonstrations."""
    if trained_agent and zipfile.is_zipfile(trained_agent):
        with zipfile.ZipFile(trained_agent) as archive:
            if "data" in archive.namelist() and json.loads(archive.read("data")).get("pretrained_on_demonstrations"):
                return HYPERPARAMS / "dppo_finetune.yml"
    return HYPERPARAMS / "dppo.yml"


def _with_fixed_hyperparams(objective: Any) -> Any:
    """
    rl_zoo3 samples hyperparameters without a look at those that the user fixes.

    :param objective: ``ExperimentManager.objective``.
    :return: The same, where a trial of "dppo" begins with parameters that follow from the fixed ones. Among the trial's own,
        they are there when it is trained again (``--trial-id``), too.
    """

    @functools.wraps(objective)
    def wrapped(manager: Any, trial: "optuna.Trial") -> float:
        if manager.algo == "dppo":
            act_steps = _act_steps(manager)
            trial.suggest_int("act_steps", act_steps, act_steps)
            fixed = set(manager._hyperparams)
            if "pretrained" not in fixed and "policy_kwargs" not in fixed:
                if not {"inference_steps", "ft_denoising_steps"} & fixed:  # which must fit it
                    trial.suggest_categorical("denoising_steps", [2, 3, 5])
                trial.suggest_categorical("width", [64, 128, 256])
            if not {"min_sampling_std", "min_logprob_std"} & fixed:
                if "pretrained" in fixed:
                    trial.suggest_float("min_std", 0.05, 0.3, log=True)
                elif "policy_kwargs" not in fixed:
                    trial.suggest_float("log_std_init", -1.0, 0.5)
        return objective(manager, trial)

    return wrapped


@functools.cache
def _act_steps(manager: Any) -> int:
    """``act_steps`` of the models that it makes, which may follow from policy, ``policy_kwargs`` or ``pretrained``."""
    env = manager.create_envs(1, no_log=True)
    try:
        model = DPPO(env=env, device=manager.device, _init_setup_model=False, **manager._hyperparams)
        model._setup_model()
        return model.policy.sampler.act_steps
    finally:
        env.close()


def sample_dppo_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for DPPO hyperparams. It leaves out what a pre-trained policy fixes (``policy_kwargs``) or limits
    (``act_steps``, ``ft_denoising_steps``, the scheduler), so that it also serves with ``pretrained`` in the YAML.

    :param trial: Optuna's trial.
    :param n_actions: Size of the action space.
    :param n_envs: Number of parallel environments.
    :param additional_args: Not used.
    :return: Arguments of DPPO.
    """
    trial.suggest_int("rollout_pow", 9, 12)
    trial.suggest_int("batch_size_pow", 7, 12)
    trial.suggest_categorical("n_epochs", [3, 5, 10])
    trial.suggest_float("learning_rate", 3e-5, 1e-3, log=True)
    trial.suggest_float("critic_learning_rate", 3e-4, 3e-3, log=True)
    trial.suggest_float("one_minus_gamma", 0.001, 0.05, log=True)
    trial.suggest_float("one_minus_gae_lambda", 0.01, 0.2, log=True)
    trial.suggest_categorical("gamma_denoising", [0.8, 0.9, 0.95, 0.99, 1.0])
    # As in PPO, of a ratio of sums.
    trial.suggest_float("clip_range_of_sum", 0.05, 0.8, log=True)
    trial.suggest_float("clip_range_base_fraction", 0.1, 1.0, log=True)
    trial.suggest_int("n_actions", n_actions, n_actions)
    trial.suggest_int("n_envs", n_envs, n_envs)
    return convert_dppo_params(trial.params)


def convert_dppo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """The arguments of DPPO that they stand for."""
    params = dict(sampled_params)
    for name in ("gamma", "gae_lambda"):
        params[name] = 1 - params.pop(f"one_minus_{name}")
    params["batch_size"] = 2 ** params.pop("batch_size_pow")
    # A rollout of about that many env steps, of which each env makes a multiple of ``act_steps``, and at least two decisions.
    act_steps = params.pop("act_steps", 1)
    params["n_steps"] = act_steps * max(2, round(2 ** params.pop("rollout_pow") / (params.pop("n_envs") * act_steps)))
    params["clip_range"] = params.pop("clip_range_of_sum") / (act_steps * params.pop("n_actions"))
    params["clip_range_base"] = params["clip_range"] * params.pop("clip_range_base_fraction")
    if "min_std" in params:
        # One floor for both, so that log-probabilities are those of the noise that was drawn.
        params["min_sampling_std"] = params["min_logprob_std"] = params.pop("min_std")
    policy_kwargs: dict[str, Any] = {name: params.pop(name) for name in ("denoising_steps", "log_std_init") if name in params}
    if "width" in params:
        policy_kwargs["net_arch"] = [params.pop("width")] * 2
    return params | (dict(policy_kwargs=policy_kwargs) if policy_kwargs else {})


def scripts() -> list[str]:
    """The programs among rl_zoo3's modules, such as "train" and "plots.plot_train"."""
    spec = find_spec("rl_zoo3")
    assert spec is not None and spec.submodule_search_locations, "rl_zoo3 is not installed"
    folder = Path(spec.submodule_search_locations[0])
    programs = [path for path in sorted(folder.rglob("*.py")) if re.search(r"__main__|parse_args", path.read_text("utf-8"))]
    return [".".join(path.relative_to(folder).with_suffix("").parts) for path in programs]


def main() -> None:
    """``python -m sb3_dppo.zoo train …``: rl_zoo3's scripts where PyTorch's plug-ins are switched off."""
    names = scripts()
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python -m sb3_dppo.zoo {{{','.join(names)}}} …, with the arguments of rl_zoo3.…")
    # Some scripts start others, which are to know DPPO, too. This process has registered it with `import sb3_dppo`.
    os.environ.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    runpy.run_module(f"rl_zoo3.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
