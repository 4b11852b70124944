"""Reading demonstrations, whatever their format; from the command line, too."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_dppo.demonstrations.demonstrations import Demonstrations
from sb3_dppo.demonstrations.lerobot import from_lerobot
from sb3_dppo.demonstrations.minari import from_minari, from_minari_id
from sb3_dppo.demonstrations.npz import BUNDLED, bundled_demonstrations, from_npz
from sb3_dppo.demonstrations.robomimic import from_robomimic
from sb3_dppo.demonstrations.selection import selection_of
from sb3_dppo.demonstrations.trajectories import from_trajectories

if TYPE_CHECKING:
    from minari import MinariDataset


def load_demonstrations(
    source: "str | Path | Sequence[Any] | MinariDataset",
    normalization: str | Path | None = None,
    *,
    obs_keys: Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
    filter_key: str | None = None,
) -> Demonstrations:
    """
    Read demonstrations.

    An .npz file holds ``states`` (N, Do), ``images`` (N, C, H, W) or (N, H, W, C) of bytes, or both, or for the keys of a
    ``Dict`` ``obs/KEY`` (N, ...); ``actions`` (N, Da) and ``traj_lengths`` (E,); optionally ``rewards`` (N,), ``terminals``
    (N,), ``truncations`` (N,) and ``meta``, a JSON string with an ``env_id``. The reference implementation's files hold
    normalised states and actions, with their ranges in a file ``normalization.npz``: it is used if it is passed, or if it lies
    beside a file whose values are all in [-1, 1] and whose ``meta`` does not have ``"units": "env"``, as that of
    :meth:`Demonstrations.save` has.

    Images are read from the file when they are used. Where that is not possible, in compressed .npz files, Minari datasets
    and LeRobot folders, they are unpacked once into a temporary file, in the folder that the environment variable ``TMPDIR``
    names.

    :param source: A bundled set ("hopper-medium", "metaworld-pick-place"), the path of an .npz file, of a robomimic file
        (.hdf5) or of a LeRobot folder (the one with ``meta`` and ``data`` in it), "minari:" and the id of a local Minari
        dataset, such a dataset, or a list of trajectories with the fields of `imitation`: ``obs`` (T + 1, ...), an array or a
        dictionary of them, ``acts`` (T, ...), optionally ``rews`` (T,) and ``terminal``.
    :param normalization: Path of an .npz with ``obs_min``, ``obs_max``, ``action_min`` and ``action_max``, for
        normalised files.
    :param obs_keys: Which of the file's observations make up the env's: a list of vectors, side by side in this order, which
        must be the env's, or a single image; for a ``Dict``, such names for each of its keys. Otherwise all vectors of a
        robomimic file, sorted by name, LeRobot's ``observation.state``, or all that there is under its own name.
    :param filter_key: For robomimic: name of the subset to read, one of those under ``mask`` in the file ("train").
    :return: The demonstrations, in the units of the env.
    :raises ValueError: for a source that can't be found or whose content does not fit together.
    :raises ImportError: if the package that reads it is not installed.
    :raises TypeError: for a source that is none of these.
    """
    path = Path(source).expanduser() if isinstance(source, (str, Path)) else Path()
    for name, value, suffixes, what in (
        ("normalization", normalization, (".npz",), "normalised .npz files"),
        ("filter_key", filter_key, (".hdf5", ".h5"), "robomimic files"),
    ):
        if value is not None and path.suffix not in suffixes:
            shown = str(source) if isinstance(source, (str, Path)) else type(source).__name__
            raise ValueError(f"{name}={str(value)!r} is for {what}, not for source={shown!r}.")
    selection = None if obs_keys is None else selection_of(obs_keys)
    if not isinstance(source, (str, Path)):
        arguments = from_trajectories(source, selection) if isinstance(source, Sequence) else from_minari(source, selection)
    elif str(source) in bundled_demonstrations():
        arguments = from_npz(BUNDLED / f"{source}.npz", None, selection)
    elif str(source).startswith("minari:"):
        arguments = from_minari_id(str(source), selection)
    elif path.suffix == ".npz":
        arguments = from_npz(path, normalization, selection)
    elif path.suffix in (".hdf5", ".h5"):
        arguments = from_robomimic(path, selection, filter_key)
    elif (path / "meta" / "info.json").is_file():
        arguments = from_lerobot(path, selection)
    elif path.exists():
        raise ValueError(
            f"source={str(source)!r} is not an .npz file, a robomimic file (.hdf5) or a LeRobot folder (with meta/info.json), "
            "the formats that are read from a path."
        )
    else:
        arguments = from_minari_id(str(source), selection)
    return Demonstrations(**arguments)


def sources() -> str:
    """What the command lines can read, for their help."""
    bundled = ", ".join(bundled_demonstrations())
    return f"bundled set ({bundled}), .npz file, robomimic file (.hdf5), LeRobot folder, or minari:ID of a Minari dataset"


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """
    :param parser: A parser, to which to add the options of :func:`load_demonstrations`; see :func:`load_from_options`.
    """
    parser.add_argument("--normalization", help="ranges of a normalised .npz file")
    parser.add_argument(
        "--obs-keys",
        nargs="+",
        metavar="NAME",
        help="what makes up an observation: names in the file, laid side by side, or for a Dict KEY:NAME or KEY:NAME,NAME,…",
    )
    parser.add_argument("--filter-key", help="subset of a robomimic file")


def load_from_options(source: str, args: argparse.Namespace) -> Demonstrations:
    """
    :param source: See :func:`load_demonstrations`.
    :param args: Parsed arguments, of :func:`add_source_options` among others.
    :return: The demonstrations.
    :raises ValueError: as :func:`load_demonstrations`, which may raise an ``ImportError``, too.
    """
    obs_keys = args.obs_keys
    if obs_keys is not None and any(":" in item for item in obs_keys):
        if not all(":" in item for item in obs_keys):
            raise ValueError(f"obs-keys={obs_keys} must be names only, or KEY:NAME for every key of a Dict.")
        names_of = {key: names.split(",") for key, _, names in (item.partition(":") for item in obs_keys)}
        if len(names_of) < len(obs_keys):
            raise ValueError(f"obs-keys={obs_keys} names a key twice: write KEY:NAME,NAME.")
        obs_keys = names_of
    return load_demonstrations(source, args.normalization, obs_keys=obs_keys, filter_key=args.filter_key)
