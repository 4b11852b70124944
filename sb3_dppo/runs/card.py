"""The model card of a shared model: what people and model hubs read."""

import json
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml
from gymnasium import spaces

from sb3_dppo._version import __version__
from sb3_dppo.runs.faults import has_attr


def make_card(model: Any, config: dict[str, Any], returns: Sequence[float] | None, repo_id: str | None) -> str:
    """
    :param model: The model.
    :param config: What its folder says about it.
    :param returns: Of the episodes of an evaluation, if there was one.
    :param repo_id: The model's name on a hub, if it goes there.
    :return: The model's card: Markdown after YAML, as model hubs read it.
    :raises ValueError: for returns that are no numbers, or none.
    """
    spec = model.env.get_attr("spec")[0] if model.env is not None and has_attr(model.env, "spec") else None
    env_id = getattr(spec, "id", None)
    tags = ["reinforcement-learning", "diffusion-policy", "dppo", "stable-baselines3", *([env_id] if env_id else [])]
    metadata: dict[str, Any] = dict(library_name="sb3-dppo", pipeline_tag="robotics", tags=tags)
    results = "None were recorded: see the usage above for how to measure them."
    if returns is not None:
        mean, std, n_episodes = _statistics(returns)
        results = f"Mean return ± standard deviation over {n_episodes} episodes: {mean:.2f} ± {std:.2f}"
        metadata["model-index"] = [_model_index(env_id or "unknown", f"{mean:.2f} +/- {std:.2f}")]
    training = config["training"]
    how = f"{training['num_timesteps']} env steps of DPPO"
    if training["pretrained_on_demonstrations"]:
        how = f"demonstrations (behaviour cloning), then {how}"
    hyperparameters = json.dumps({name: config[name] for name in ("policy_kwargs", "arguments")}, indent=2, ensure_ascii=False)
    normalized, before, after = "", "", ""
    if config["vec_normalize"] is not None:
        normalized = "\nIts `VecNormalize` statistics are in the folder: `from_pretrained` wraps `env` in it.\n"
        before = "normalization = model.get_vec_normalize_env()\nnormalization.training = normalization.norm_reward = False\n"
        after = f"normalization.training, normalization.norm_reward = True, {config['vec_normalize']['norm_reward']}\n"
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---

# {config["policy"]} {f"for {env_id}" if env_id else "by DPPO"}

A diffusion policy, trained on {how} ([Ren et al. 2024](https://arxiv.org/abs/2409.00588)) with sb3-dppo {__version__} and
Stable-Baselines3. The folder holds numbers and text, nothing that is executed.

| | |
| --- | --- |
| Env | {f"`{env_id}`" if env_id else "unknown"} |
| Observations | `{_one_line(model.observation_space)}` |
| Actions | `{_one_line(model.action_space)}` |
| Parameters | {sum(parameter.numel() for parameter in model.policy.denoiser.parameters())} in the denoiser |

## Usage

```python
from sb3_dppo import DPPO
from stable_baselines3.common.evaluation import evaluate_policy

model = DPPO.from_pretrained({json.dumps(repo_id or "path/of/this/folder")}, env={json.dumps(env_id) if env_id else "env"})
{before}print(evaluate_policy(model, model.get_env(), n_eval_episodes=10))
{after}model.learn(100_000, reset_num_timesteps=False)  # training goes on
```
{normalized}
## Results

{results}

## Hyperparameters

```json
{hyperparameters}
```
"""


def _statistics(returns: Sequence[float]) -> tuple[float, float, int]:
    try:
        values = np.asarray(returns, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.full(1, np.nan)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"returns={reprlib.repr(returns)} must be a list of numbers, the returns of episodes: the first that "
            "evaluate_policy(model, env, return_episode_rewards=True) returns."
        )
    return float(values.mean()), float(values.std()), len(values)


def _model_index(env: str, value: str) -> dict[str, Any]:
    """A result as model hubs read it."""
    task = dict(type="reinforcement-learning", name="reinforcement-learning")
    metric = dict(type="mean_reward", value=value, name="mean_reward", verified=False)
    return dict(name="DPPO", results=[dict(task=task, dataset=dict(name=env, type=env), metrics=[metric])])


def _one_line(space: spaces.Space) -> str:
    return " ".join(str(space).split()).replace("`", "'").replace("|", "\\|")
