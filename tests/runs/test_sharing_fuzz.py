"""Shared folders that were damaged, or made to do damage: only documented exceptions come out."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from sb3_dppo import DPPO
from sb3_dppo.runs.sharing import _sha256
from tests.damage import EDITS, TREE_EDITS, Target, Trap, edit_bytes, edit_tree, fuzz


class Sharing(Target):
    undamaged = ("weights", [])
    inputs = st.one_of(
        st.tuples(st.just("config"), TREE_EDITS),
        st.tuples(st.just("config bytes"), EDITS),
        st.tuples(st.just("header"), TREE_EDITS),
        st.tuples(st.just("weights"), EDITS),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        policy_kwargs = dict(net_arch=dict(pi=[8], vf=[8]), denoising_steps=2, horizon=2)
        DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=4, policy_kwargs=policy_kwargs).save_pretrained(folder)
        self.config = (folder / "config.json").read_bytes()
        self.weights = (folder / "model.safetensors").read_bytes()

    def write(self, edits: Any) -> None:
        what, changes = edits
        config, weights = self.config, self.weights
        if what == "config":
            config = json.dumps(edit_tree(json.loads(config), changes)).encode()
        elif what == "config bytes":
            config = edit_bytes(config, changes)
        elif what == "weights":
            weights = edit_bytes(weights, changes)
        else:
            length = int.from_bytes(weights[:8], "little")
            header = json.dumps(edit_tree(json.loads(weights[8 : 8 + length]), changes)).encode()
            weights = len(header).to_bytes(8, "little") + header + weights[8 + length :]
        (self.folder / "model.safetensors").write_bytes(weights)
        if weights is not self.weights:  # As one who means harm would.
            tree = json.loads(config)
            tree["weights_sha256"] = _sha256(self.folder / "model.safetensors")
            config = json.dumps(tree).encode()
        (self.folder / "config.json").write_bytes(config)

    def read(self) -> Any:
        return DPPO.from_pretrained(self.folder, device="cpu")


@pytest.mark.filterwarnings("ignore")
def test_some_damaged_files(tmp_path: Path) -> None:
    fuzz(Sharing(tmp_path), 60, derandomize=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_files(tmp_path: Path) -> None:
    fuzz(Sharing(tmp_path), 3000, derandomize=False)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # The trap works.
    sprung.unlink()
    target = Sharing(tmp_path)
    for name in ("config.json", "model.safetensors"):
        target.write(target.undamaged)
        target.read()
        (tmp_path / name).write_bytes(pickle.dumps(Trap(sprung)))
        with pytest.raises(ValueError):
            target.read()
    assert not sprung.exists()
