"""Sources of demonstrations."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from sb3_dppo import load_demonstrations
from sb3_dppo.demonstrations.npz import bundled_demonstrations
from tests.demonstrations.files import arrays


def test_bundled_set() -> None:
    assert bundled_demonstrations() == ["hopper-medium", "metaworld-pick-place"]
    demonstrations = load_demonstrations("hopper-medium")
    assert demonstrations.env_id == "Hopper-v5"
    assert demonstrations.observations.shape == (len(demonstrations), 11)
    assert demonstrations.actions.shape == (len(demonstrations), 3)
    assert demonstrations.n_episodes > 30 and demonstrations.returns is not None
    env = gym.make("Hopper-v5")
    assert env.action_space.contains(demonstrations.actions[0])


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist.*hopper-medium"):
        load_demonstrations(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="can't be read as .npz"):
        load_demonstrations(tmp_path / "text.npz")
    (tmp_path / "d.csv").write_text("1,2")
    for path in (tmp_path / "d.csv", tmp_path):
        with pytest.raises(ValueError, match="not an .npz file, a robomimic file.*LeRobot folder"):
            load_demonstrations(path)
    with pytest.raises(ValueError, match="neither a bundled set.*hopper-medium.*Minari"):
        load_demonstrations("hopper-expert")
    with pytest.raises(TypeError, match="Minari dataset, not int"):
        load_demonstrations(3)  # type: ignore[arg-type]


def test_normalization_where_it_does_not_belong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is for normalised .npz files"):
        load_demonstrations("hopper-medium", normalization="n.npz")
    np.savez(tmp_path / "d.npz", **arrays())
    np.savez(tmp_path / "n.npz", obs_min=np.zeros(4), obs_max=np.ones(4), action_min=np.zeros(2), action_max=np.ones(2))
    with pytest.raises(ValueError, match="4 obs ranges"):
        load_demonstrations(tmp_path / "d.npz", normalization=tmp_path / "n.npz")
    np.savez(tmp_path / "d.npz", **arrays(meta=np.array("[]")))
    with pytest.raises(ValueError, match="meta must be a JSON object"):
        load_demonstrations(tmp_path / "d.npz")


def test_libraries_of_formats_are_imported_when_they_are_needed() -> None:
    code = "import sb3_dppo, sys; sb3_dppo.load_demonstrations('hopper-medium'); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    ).stdout.split()
    assert "sb3_dppo.demonstrations.robomimic" in loaded
    assert not {"h5py", "minari", "pyarrow", "diffusers"} & set(loaded)
