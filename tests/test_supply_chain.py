"""What an install brings along: hashes of all that is pinned, and a start-up hook that can't break PyTorch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([\w.-]+)(?:\[[\w,]+\])?==([^\s;]+)(?:\s*;\s*([^\\\n]+?))?\s*\\?$", re.MULTILINE)


def pins(text: str) -> set[tuple[str, str, str]]:
    """
    :return: Normalised name, version and marker of each pinned package.
    """
    return {(re.sub(r"[-_.]+", "-", name).lower(), version, marker) for name, version, marker in PIN.findall(text)}


def test_lock_has_a_hash_of_every_pinned_package_but_pytorch() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pinned = pins((ROOT / "constraints.txt").read_text())
    torch = {pin for pin in pinned if pin[0] == "torch"}
    assert len(pinned) > 100 and len(torch) == 1
    assert pins(lock) == pinned - torch, "run `make lock`"
    requirements = re.sub(r"\\\n", "", re.sub(r"^#.*$", "", lock, flags=re.MULTILINE)).split("\n")
    assert all("--hash=sha256:" in line for line in requirements if line.strip())
    assert "://" not in lock


@pytest.mark.parametrize("zoo", ["imported before torch", "imported after torch"])
def test_a_hook_that_raises_leaves_pytorch_importable(zoo: str, tmp_path: Path) -> None:
    (tmp_path / "sb3_dppo").mkdir()
    (tmp_path / "sb3_dppo/__init__.py").write_text("raise RuntimeError('broken installation')")
    # rl_zoo3 imports PyTorch itself, while its utilities are not complete.
    before = "import rl_zoo3.utils as zoo\nassert 'ppo' in zoo.ALGOS and 'dppo' not in zoo.ALGOS\n"
    after = "import rl_zoo3.exp_manager as zoo\nassert 'ppo' in zoo.ALGOS and 'dppo' not in zoo.ALGOS\n"
    code = (
        f"import sys\n{before if zoo == 'imported before torch' else ''}"
        "import torch, _sb3_dppo_autoload\n"
        "assert _sb3_dppo_autoload._ZooFinder in sys.meta_path and torch.ones(2).sum() == 2\n"
        f"{after if zoo == 'imported after torch' else ''}"
        "print('all is well')"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.strip() == "all is well", done.stderr
    assert "sb3-dppo could not register itself with rl_zoo3: RuntimeError('broken installation')" in done.stderr
