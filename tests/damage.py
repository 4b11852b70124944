"""Damage to files, for tests of what reads them: only documented exceptions may come out."""

import io
import json
import resource
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

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


class Trap:
    """
    Makes a file where it is unpickled.

    :param path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
