"""Examples: an env and its demonstrations, and the notebook."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env


class StraightOn:
    """A policy that goes to the right."""

    def predict(self, obs: np.ndarray, state: Any, deterministic: bool) -> tuple[np.ndarray, Any]:
        return np.tile([1.0, 0.0], (len(obs), 1)), state


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its cells run, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "finetune.ipynb").read_text("utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(line for line in cell["source"] if not line.startswith("%")), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names.update(EPOCHS=1, STEPS=4096, EPISODES=2)
    assert names["after"] > 0
    assert Path("hopper/model.safetensors").is_file()


def test_avoiding() -> None:
    """Demonstrations take each of the three ways, arrive and touch no obstacle; who does ends there."""
    spec: Any = importlib.util.spec_from_file_location("avoiding", EXAMPLES / "avoiding.py")
    avoiding = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(avoiding)
    env = avoiding.AvoidingEnv()
    check_env(env, skip_render_check=True)
    demonstrations = avoiding.demonstrations(6, seed=1)
    episodes = np.split(demonstrations.observations, np.cumsum(demonstrations.traj_lengths)[:-1])
    ways = [episode[np.abs(episode[:, 0]).argmin(), 1] for episode in episodes]
    np.testing.assert_allclose(ways, [*avoiding.WAYS, *avoiding.WAYS], atol=0.35)
    for obstacle in avoiding.OBSTACLES:
        assert np.linalg.norm(demonstrations.observations - obstacle, axis=1).min() >= avoiding.RADIUS
        env.reset()
        env.position = obstacle - [0.2, 0.0]
        _, reward, terminated, _, info = env.step(np.array([1.0, 0.0]))
        assert terminated and reward == 0 and not info["is_success"]
    paths, _ = avoiding.episodes(StraightOn(), 2)
    np.testing.assert_allclose([path[0] for path in paths], [[avoiding.START, 0.0]] * 2)
    np.testing.assert_allclose(np.diff(paths[0][:, 0]), avoiding.STEP, atol=1e-6)
