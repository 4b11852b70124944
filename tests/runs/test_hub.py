"""The Hugging Face hub: models go there and come back. A server on this machine stands for it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sb3_dppo import DPPO
from tests.runs.fake_hub import COMMIT, fake_hub
from tests.runs.shared_folders import FILES, make_model

PUSH = """
from tests.runs.shared_folders import make_model
print(make_model().push_to_hub("user/pendulum", returns=[-100.0, -300.0], token="hf_test"))
"""
PULL = """
from sb3_dppo import DPPO
for name, revision in {models}:
    try:
        model = DPPO.from_pretrained(name, env="Pendulum-v1", n_steps=32, revision=revision)
        print(model.n_steps, model.predict(model.observation_space.high, deterministic=True)[0].item())
    except FileNotFoundError as error:
        print(error)
"""


def run(program: str, folder: Path, **variables: str) -> str:
    """What a program prints, or its error, with the hub's cache in a folder: huggingface_hub reads its settings at import."""
    env = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    env |= dict(HF_HOME=str(folder), HF_HUB_DISABLE_XET="1", **variables)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False)
    return done.stdout if done.returncode == 0 else done.stderr


def test_there_and_back(tmp_path: Path) -> None:
    model = make_model()
    action = model.predict(model.observation_space.high, deterministic=True)[0].item()  # type: ignore[attr-defined]
    with fake_hub() as (address, repositories):
        program = PUSH + PULL.format(models=[("user/pendulum", None), ("user/hopper", None)])
        url, loaded, missing = run(program, tmp_path, HF_ENDPOINT=address).splitlines()
        assert url == f"{address}/user/pendulum"
        assert loaded == f"32 {action}"
        assert missing.startswith("folder='user/hopper' is no folder that exists, and no model that you can get"), missing
        files = repositories["user/pendulum"]
        assert set(files) == FILES
        card = files["README.md"].decode()
        metadata = yaml.safe_load(card.split("---\n")[1])
        assert metadata["library_name"] == "sb3-dppo"
        assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == "-200.00 +/- 100.00"
        assert 'from_pretrained("user/pendulum", env="Pendulum-v1")' in card
    # Without the hub, from the cache.
    program = PULL.format(models=[("user/pendulum", None), ("user/pendulum", COMMIT), ("user/hopper", None)])
    *loaded_twice, missing = run(program, tmp_path, HF_HUB_OFFLINE="1").splitlines()
    assert loaded_twice == [f"32 {action}"] * 2
    assert missing.startswith("folder='user/hopper' is no folder that exists, and no model that you can get"), missing


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the form user/name is a folder; what can't be on the hub is refused before anything is sent."""
    model = make_model()
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("user/pendulum")
    assert DPPO.from_pretrained("user/pendulum").num_timesteps == 0
    with pytest.raises(ValueError, match="revision='main' is of a model on the hub"):
        DPPO.from_pretrained("user/pendulum", revision="main")
    with pytest.raises(ValueError, match="repo_id='pendulum' must be of the form 'user/name'"):
        model.push_to_hub("pendulum")


@pytest.mark.parametrize("returns", [[], [1.0, float("nan")], 3.0, "good", [[1.0]]])
def test_returns(tmp_path: Path, returns: Any) -> None:
    with pytest.raises(ValueError, match="returns=.* must be a list of numbers"):
        make_model().save_pretrained(tmp_path / "a", returns=returns)
    assert not (tmp_path / "a").exists()
