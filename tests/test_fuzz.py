"""Files that were damaged, or made to do damage: only documented exceptions come out of what reads them."""

import io
import json
import pickle
import resource
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sb3_dppo import DPPO, Demonstrations, import_reference_checkpoint, load_demonstrations
from sb3_dppo.runs.sharing import _sha256
from tests.demonstrations.files import arrays, lerobot_frames, write_lerobot, write_robomimic

# ---------------------------------------------------------------------- mutations

# What is done, where as a fraction of the length, how much, with which bytes.
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "overwrite", "insert", "delete", "truncate", "splice"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 63),
        st.sampled_from(
            [b"\0", b"\xff", b"\x80", b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"\1", b"../", b'"', b"9" * 9]
        )
        | st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)
VALUES = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, -1.5, 1e308, float("inf"), float("nan")),
        *("", "x", "../../etc/passwd", "/dev/zero", "os.system", "inf", "lin_1", "ddim", "ReLU", "AdamW", "VitExtractor"),
        *(
            [],
            [0],
            [1, 2],
            [2**40],
            [[]],
            {},
            {"pi": [1], "vf": [1]},
            {"type": "Discrete", "n": 3, "start": 0},
            {"a": {"b": []}},
        ),
        *("DiffusionUnetPolicy", "DiffusionMultiInputPolicy", "uint8", [0, 8], [8, 4], "F64", "U8", [10**9, 10**9]),
    ]
)
# Which node, what becomes of it, a new value.
TREE_EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["replace", "replace", "remove", "add", "double"]), VALUES),
    min_size=1,
    max_size=3,
)


def edit_bytes(data: bytes, edits: list[tuple[str, float, int, bytes]]) -> bytes:
    edited = bytearray(data)
    for kind, where, amount, new in edits:
        at = int(where * len(edited))
        if kind == "flip" and edited:
            edited[at] ^= 1 << amount % 8
        elif kind == "overwrite":
            edited[at : at + len(new)] = new
        elif kind == "insert":
            edited[at:at] = new
        elif kind == "delete":
            del edited[at : at + amount]
        elif kind == "truncate":
            del edited[at:]
        elif kind == "splice":
            edited[at:at] = edited[at // 2 : at // 2 + amount]
    return bytes(edited)


def edit_tree(tree: Any, edits: list[tuple[float, str, Any]]) -> Any:
    """Change nodes of something made of dictionaries and lists."""
    tree = json.loads(json.dumps(tree))
    for where, kind, value in edits:
        value = deepcopy(value)
        nodes: list[tuple[Any, Any]] = []

        def collect(node: Any, nodes: list[tuple[Any, Any]] = nodes) -> None:
            for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []:
                nodes.append((node, key))
                collect(node[key])

        collect(tree)
        if not nodes:
            return value
        parent, key = nodes[int(where * len(nodes))]
        if kind == "remove":
            del parent[key]
        elif kind == "add" and isinstance(parent, dict):
            parent[str(value)[:20]] = value
        elif kind == "double":
            parent[key] = [parent[key], parent[key]]
        else:
            parent[key] = value
    return tree


def edit_zip(data: bytes, where: float, edit: Callable[[bytes], bytes]) -> bytes:
    """Change a member of a zip file, whose checksum is right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info: archive.read(info) for info in archive.infolist()}
    names = list(members)
    members[names[int(where * len(names))]] = edit(members[names[int(where * len(names))]])
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for info, content in members.items():
            archive.writestr(info.filename, content, info.compress_type)
    return written.getvalue()


# ---------------------------------------------------------------------- what is read


class Target:
    """
    Something that reads files.

    :param folder: Where to put them.
    """

    undamaged: tuple[Any, ...]
    inputs: st.SearchStrategy[Any]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, edits: Any) -> None:
        """Write the file with these edits."""
        raise NotImplementedError

    def read(self) -> Any:
        """Read it."""
        raise NotImplementedError


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
        DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=2, policy_kwargs=policy_kwargs).save_pretrained(folder)
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
        th.save({"ema": reference_weights()}, written)
        self.data = written.getvalue()

    def write(self, edits: Any) -> None:
        path = self.folder / "state.pt"
        if edits[0] == "file":
            path.write_bytes(edit_bytes(self.data, edits[1]))
        elif edits[0] == "member":
            path.write_bytes(edit_zip(self.data, edits[1], lambda content: edit_bytes(content, edits[2])))
        else:
            tensors: dict[Any, Any] = reference_weights()
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


@contextmanager
def memory_limit(n_bytes: int) -> Iterator[None]:
    """Let this process reserve no more than so many bytes in addition."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


TARGETS: dict[str, type[Target]] = dict(
    from_pretrained=Sharing,
    npz=Npz,
    npz_images=NpzImages,
    compressed_images=CompressedImages,
    ranges=Ranges,
    robomimic=Robomimic,
    robomimic_images=RobomimicImages,
    lerobot=LeRobot,
    reference=Reference,
)


def fuzz(target: Target, n_files: int, derandomize: bool) -> None:
    target.write(target.undamaged)
    target.read()
    refused = 0

    @settings(
        max_examples=n_files,
        deadline=timedelta(seconds=10),  # Nothing may hang.
        derandomize=derandomize,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def read(edits: Any) -> None:
        nonlocal refused
        target.write(edits)
        try:
            target.read()
        except ValueError:  # the documented one
            refused += 1

    with memory_limit(2**31):
        read()
    assert refused > n_files / 5  # The damage is real.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_some_damaged_files(name: str, tmp_path: Path) -> None:
    fuzz(TARGETS[name](tmp_path), 60, derandomize=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_many_damaged_files(name: str, tmp_path: Path) -> None:
    fuzz(TARGETS[name](tmp_path), 3000, derandomize=False)


class Trap:
    """
    Makes a file where it is unpickled.

    :param path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # The trap works.
    sprung.unlink()

    sharing, npz, reference = (cls(tmp_path) for cls in (Sharing, Npz, Reference))
    for name, read in (
        ("config.json", sharing.read),
        ("model.safetensors", sharing.read),
        ("d.npz", npz.read),
        ("state.pt", reference.read),
    ):
        for target in (sharing, npz, reference):
            target.write(target.undamaged)
        read()
        (tmp_path / name).write_bytes(pickle.dumps(Trap(sprung)))
        with pytest.raises(ValueError):
            read()
    for allow in (dict(states=np.array([Trap(sprung)])), dict(more=np.array([Trap(sprung)]))):
        np.savez(tmp_path / "d.npz", **{**arrays(), **allow})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="pickle"):
            npz.read()
    for zipped in (True, False):
        th.save(
            {"ema": {**reference_weights(), "x": Trap(sprung)}}, tmp_path / "state.pt", _use_new_zipfile_serialization=zipped
        )
        with pytest.raises(ValueError, match="can't be read as a PyTorch file of tensors"):
            reference.read()
    assert not sprung.exists()
