"""Checkpoints that were damaged, or made to do damage: only documented exceptions come out."""

import io
import pickle
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import strategies as st

from sb3_dppo import import_reference_checkpoint
from tests.damage import EDITS, Target, Trap, edit_bytes, edit_zip, fuzz

DATA = Path(__file__).parents[1] / "data"


class Reference(Target):
    undamaged = ("file", [])
    inputs = st.one_of(
        st.tuples(st.just("file"), EDITS),
        st.tuples(st.just("member"), st.floats(0, 1, exclude_max=True), EDITS),
        st.tuples(
            st.just("tensors"),
            st.lists(
                st.tuples(
                    st.floats(0, 1, exclude_max=True),
                    st.sampled_from(["remove", "rename", "replace", "stretch", "meta", "sparse", "other"]),
                    st.lists(st.sampled_from([0, 1, 3, 4, 8, 11, 2**16]), max_size=3),
                    st.sampled_from([th.float32, th.float64, th.int64, th.complex64, th.bool]),
                ),
                min_size=1,
                max_size=3,
            ),
        ),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        written = io.BytesIO()
        th.save({"ema": self.weights()}, written)
        self.data = written.getvalue()

    def write(self, edits: Any) -> None:
        path = self.folder / "state.pt"
        if edits[0] == "file":
            path.write_bytes(edit_bytes(self.data, edits[1]))
        elif edits[0] == "member":
            path.write_bytes(edit_zip(self.data, edits[1], lambda content: edit_bytes(content, edits[2])))
        else:
            tensors: dict[Any, Any] = self.weights()
            for where, kind, shape, dtype in edits[1]:
                if tensors:
                    name = list(tensors)[int(where * len(tensors))]
                    value = tensors.pop(name)
                    small = [size for size in shape if size < 2**16]
                    tensors |= {
                        "remove": {},
                        "rename": {name.replace("mean", "x").replace("1", "2"): value},
                        "replace": {name: th.zeros(small, dtype=dtype)},
                        "stretch": {name: th.zeros((), dtype=dtype).expand(shape)},
                        "meta": {name: th.zeros(shape, dtype=dtype, device="meta")},
                        "sparse": {name: th.zeros(small, dtype=dtype).to_sparse()},
                        "other": {name: shape},
                    }[kind]
            th.save({"ema": tensors}, path)

    def read(self) -> Any:
        env_spaces = (spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)))
        return import_reference_checkpoint(self.folder / "state.pt", env_spaces, policy_kwargs=dict(horizon=2), device="cpu")

    def weights(self) -> dict[str, th.Tensor]:
        return reference_weights()


class ReferenceUnet(Reference):
    """The same of a UNet for eleven observations and three actions, eight steps ahead."""

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(DATA / "unet_small_encoder_bias.npz") as archive:
            return {name: archive[name] for name in archive.files if name.startswith("weights/")}

    def weights(self) -> dict[str, th.Tensor]:
        return {name.replace("weights/", "network."): th.as_tensor(value) for name, value in self.arrays.items()}

    def read(self) -> Any:
        env_spaces = (spaces.Box(-1, 1, (11,)), spaces.Box(-1, 1, (3,)))
        kwargs: dict[str, Any] = dict(horizon=8, net_kwargs=dict(n_groups=4))
        return import_reference_checkpoint(self.folder / "state.pt", env_spaces, policy_kwargs=kwargs, device="cpu")


def reference_weights() -> dict[str, th.Tensor]:
    """A small pre-trained denoiser under the reference's names: three observations, two actions, two steps ahead."""
    shapes = {
        **{"time_embedding.1.weight": (8, 4), "time_embedding.1.bias": (8,)},
        **{"time_embedding.3.weight": (4, 8), "time_embedding.3.bias": (4,)},
        **{"mlp_mean.layers.0.weight": (8, 11), "mlp_mean.layers.0.bias": (8,)},
        **{"mlp_mean.layers.1.l1.weight": (8, 8), "mlp_mean.layers.1.l1.bias": (8,)},
        **{"mlp_mean.layers.1.l2.weight": (8, 8), "mlp_mean.layers.1.l2.bias": (8,)},
        **{"mlp_mean.layers.2.weight": (4, 8), "mlp_mean.layers.2.bias": (4,)},
    }
    return {f"network.{name}": th.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", [Reference, ReferenceUnet])
def test_some_damaged_files(target: type[Reference], tmp_path: Path) -> None:
    fuzz(target(tmp_path), 60, derandomize=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", [Reference, ReferenceUnet])
def test_many_damaged_files(target: type[Reference], tmp_path: Path) -> None:
    fuzz(target(tmp_path), 3000, derandomize=False)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    sprung, target = tmp_path / "sprung", Reference(tmp_path)
    target.write(target.undamaged)
    target.read()
    for path_of_tensors in (True, False, None):
        if path_of_tensors is None:
            (tmp_path / "state.pt").write_bytes(pickle.dumps(Trap(sprung)))
        else:
            state = {"ema": {**reference_weights(), "x": Trap(sprung)}}
            th.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=path_of_tensors)
        with pytest.raises(ValueError, match="can't be read as a PyTorch file of tensors"):
            target.read()
    assert not sprung.exists()
