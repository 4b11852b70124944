"""Demonstrations that were damaged, or made to do damage: only documented exceptions come out of what reads them."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import strategies as st

from sb3_dppo import Demonstrations, load_demonstrations
from tests.damage import EDITS, TREE_EDITS, Target, Trap, edit_bytes, edit_tree, edit_zip, fuzz
from tests.demonstrations.files import arrays, lerobot_frames, write_lerobot, write_robomimic

HEADERS = st.fixed_dictionaries(
    dict(
        descr=st.sampled_from(["<f4", "<f8", "|O", "<U9", "|V8", "<i8", "|b1", "<c16", "<M8[s]", "|S0", "x", [("a", "<f4")]]),
        fortran_order=st.booleans(),
        shape=st.lists(st.sampled_from([0, 1, 2, 3, 12, 2**20, 2**31, 2**40, 2**62, -1]), max_size=3).map(tuple),
    )
)


class Npz(Target):
    undamaged = ("file", [])
    inputs = st.one_of(
        st.tuples(st.just("file"), EDITS),
        st.tuples(st.just("member"), st.floats(0, 1, exclude_max=True), EDITS),
        st.tuples(st.just("header"), st.floats(0, 1, exclude_max=True), HEADERS),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        written = io.BytesIO()
        np.savez_compressed(written, **arrays())
        self.data = written.getvalue()

    def write(self, edits: Any) -> None:
        if edits[0] == "file":
            data = edit_bytes(self.data, edits[1])
        elif edits[0] == "member":
            data = edit_zip(self.data, edits[1], lambda content: edit_bytes(content, edits[2]))
        else:
            header = repr(edits[2]).encode()
            start = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
            data = edit_zip(self.data, edits[1], lambda content: start + content[128:])
        (self.folder / "d.npz").write_bytes(data)

    def read(self) -> Any:
        return load_demonstrations(self.folder / "d.npz")


def read_images(demonstrations: Demonstrations) -> None:
    """Images are read when they are used."""
    for key in demonstrations.parts:
        demonstrations.stacked_observations(np.arange(len(demonstrations)), 2, key)


class NpzImages(Npz):
    """Images that are memory-mapped."""

    save: Callable[..., None] = staticmethod(np.savez)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        written = io.BytesIO()
        self.save(written, **arrays(images=np.zeros((12, 3, 8, 8), np.uint8)))
        self.data = written.getvalue()

    def read(self) -> Any:
        read_images(load_demonstrations(self.folder / "d.npz"))


class CompressedImages(NpzImages):
    """Images that are unpacked into a temporary file."""

    save = staticmethod(np.savez_compressed)


class Ranges(Npz):
    """The file of ranges beside normalised demonstrations."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        np.savez(folder / "normalised.npz", **arrays())
        written = io.BytesIO()
        np.savez(written, obs_min=-np.ones(3), obs_max=np.ones(3), action_min=-np.ones(2), action_max=np.ones(2))
        self.data = written.getvalue()

    def read(self) -> Any:
        return load_demonstrations(self.folder / "normalised.npz", normalization=self.folder / "d.npz")


class Robomimic(Target):
    undamaged = ("bytes", [])
    inputs = st.one_of(
        st.tuples(st.just("bytes"), EDITS),
        st.tuples(
            st.just("nodes"),
            st.lists(
                st.tuples(
                    st.floats(0, 1, exclude_max=True),
                    st.sampled_from(
                        [
                            "delete",
                            "group",
                            "array",
                            "soft",
                            "link",
                            "huge",
                            "external",
                            "virtual",
                            "empty",
                            "text",
                            "compound",
                        ]
                    ),
                    st.sampled_from([(), (0,), (3,), (2,), (3, 2), (2, 0), (3, 2, 2), (1, 3)]),
                    st.sampled_from(["f4", "f8", "i1", "u8", "?", "c16", "S3", "f2"]),
                ),
                min_size=1,
                max_size=3,
            ),
        ),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        write_robomimic(folder / "other.hdf5", (3, 1, 2), images=False)
        self.data = (folder / "other.hdf5").read_bytes()

    def write(self, edits: Any) -> None:
        data = self.data
        if edits[0] == "bytes":
            data = edit_bytes(data, edits[1])
        # A new file, and not the one that may still be open.
        (self.folder / "d.hdf5").unlink(missing_ok=True)
        (self.folder / "d.hdf5").write_bytes(data)
        if edits[0] == "nodes":
            with h5py.File(self.folder / "d.hdf5", "a") as file:
                for where, kind, shape, dtype in edits[1]:
                    names: list[str] = []
                    file.visit(names.append)
                    if names:
                        self.change(file, names[int(where * len(names))], kind, shape, dtype)

    def change(self, file: h5py.File, name: str, kind: str, shape: tuple[int, ...], dtype: str) -> None:
        """Put something else in a node's place."""
        del file[name]
        if kind == "group":
            file.create_group(name)
        elif kind == "array":
            file[name] = np.ones(shape, dtype)
        elif kind == "soft":
            file[name] = h5py.SoftLink("/data" if shape else "/" + name)
        elif kind == "link":
            file[name] = h5py.ExternalLink(str(self.folder / "other.hdf5"), name)
        elif kind == "huge":
            file.create_dataset(name, (2**40, 2), "f4", chunks=(2**10, 2))
        elif kind == "external":
            file.create_dataset(name, (3, 2), "f4", external=[("/etc/passwd", 0, 24)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((3, 2), "f4")
            layout[:] = h5py.VirtualSource(str(self.folder / "other.hdf5"), "data/demo_0/actions", (3, 2))
            file.create_virtual_dataset(name, layout)
        elif kind == "empty":
            file[name] = h5py.Empty("f4")
        elif kind == "text":
            file[name] = ["a", "b", "c"]
        elif kind == "compound":
            file[name] = np.zeros(3, [("a", "f4"), ("b", "O" if shape == () else "i4")][: 1 if shape == () else 2])

    def read(self) -> Any:
        return load_demonstrations(self.folder / "d.hdf5", filter_key="train")


class RobomimicImages(Robomimic):
    """Images that stay in the file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        write_robomimic(folder / "other.hdf5", (3, 1, 2))
        with h5py.File(folder / "other.hdf5", "a") as file:
            for episode in file["data"].values():
                images = episode["obs/agentview_image"][()]
                del episode["obs/agentview_image"]
                episode.create_dataset("obs/agentview_image", data=images, compression="gzip", fletcher32=True)
        self.data = (folder / "other.hdf5").read_bytes()

    def read(self) -> Any:
        obs_keys = dict(rgb="agentview_image", state=["object"])
        read_images(load_demonstrations(self.folder / "d.hdf5", obs_keys=obs_keys))


class LeRobot(Target):
    undamaged = ("parquet", [])
    inputs = st.one_of(st.tuples(st.just("info"), TREE_EDITS), st.tuples(st.just("parquet"), EDITS))

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        frames = lerobot_frames((3, 4))
        write_lerobot(folder / "d", frames, [np.arange(7)])
        self.info_path, self.parquet_path = folder / "d" / "meta" / "info.json", next((folder / "d").rglob("*.parquet"))
        self.info, self.parquet = json.loads(self.info_path.read_text()), self.parquet_path.read_bytes()

    def write(self, edits: Any) -> None:
        info, parquet = self.info, self.parquet
        if edits[0] == "info":
            info = edit_tree(info, edits[1])
        else:
            parquet = edit_bytes(parquet, edits[1])
        self.info_path.write_text(json.dumps(info))
        self.parquet_path.write_bytes(parquet)

    def read(self) -> Any:
        return load_demonstrations(self.folder / "d")


TARGETS: dict[str, type[Target]] = dict(
    npz=Npz,
    npz_images=NpzImages,
    compressed_images=CompressedImages,
    ranges=Ranges,
    robomimic=Robomimic,
    robomimic_images=RobomimicImages,
    lerobot=LeRobot,
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_some_damaged_files(name: str, tmp_path: Path) -> None:
    fuzz(TARGETS[name](tmp_path), 60, derandomize=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_many_damaged_files(name: str, tmp_path: Path) -> None:
    fuzz(TARGETS[name](tmp_path), 3000, derandomize=False)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    npz = Npz(tmp_path)
    npz.write(npz.undamaged)
    npz.read()
    (tmp_path / "d.npz").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError):
        npz.read()
    for allow in (dict(states=np.array([Trap(sprung)])), dict(more=np.array([Trap(sprung)]))):
        np.savez(tmp_path / "d.npz", **{**arrays(), **allow})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="pickle"):
            npz.read()
    assert not sprung.exists()
