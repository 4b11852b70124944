"""Model cards."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_dppo import DPPO


def test_card(saved: Path) -> None:
    text = (saved / "README.md").read_text()
    _, front_matter, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front_matter)
    assert metadata["pipeline_tag"] == "robotics" and "Pendulum-v1" in metadata["tags"]
    usage = body.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", str(saved)).replace("100_000", "16")
    done = subprocess.run([sys.executable, "-c", usage], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hyperparameters = json.loads(body.split("```json\n")[1].split("```")[0])
    assert hyperparameters["policy_kwargs"]["denoising_steps"] == 4 and hyperparameters["arguments"]["n_steps"] == 16


def test_the_usage_of_vec_normalize_leaves_its_statistics_alone(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1"), norm_reward=False)
    DPPO("DiffusionMlpPolicy", env, n_steps=16, batch_size=16).learn(16).save_pretrained(tmp_path / "a")
    usage = (tmp_path / "a" / "README.md").read_text().split("```python\n")[1].split("model.learn")[0]
    names: dict[str, Any] = {}
    exec(usage.replace("path/of/this/folder", str(tmp_path / "a")), names)
    restored = names["model"].get_vec_normalize_env()
    assert restored.obs_rms.count == env.obs_rms.count  # type: ignore[union-attr]
    assert restored.training and not restored.norm_reward


def test_a_model_whose_envs_are_closed(tmp_path: Path) -> None:
    env = SubprocVecEnv([partial(gym.make, "Pendulum-v1")] * 2)
    model = DPPO("DiffusionMlpPolicy", env, n_steps=16, batch_size=16)
    env.close()
    model.save_pretrained(tmp_path / "a")
    assert "| Env | unknown |" in (tmp_path / "a" / "README.md").read_text()
