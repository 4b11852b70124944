"""Model cards."""

import json
import subprocess
import sys
from pathlib import Path

import yaml


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
