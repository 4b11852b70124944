"""Learning curves of RL Zoo's folders of runs, with the spread of their seeds."""

import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

FILE = "evaluations.npz"
# RL Zoo's runs are called ALGORITHM/ENV_NUMBER, and with --uuid end in one.
ZOO_RUN = re.compile(r"(.+)_\d+(?:_[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})?")
REPETITIONS = 2000  # of the bootstrap


class Curve(NamedTuple):
    """
    The evaluations of one run.

    :param timesteps: When, shape (n,).
    :param returns: Mean return of each evaluation's episodes, shape (n,).
    """

    timesteps: np.ndarray
    returns: np.ndarray


def read_curves(folders: Iterable[str | Path]) -> dict[tuple[str, str], list[Curve]]:
    """
    :param folders: Folders of RL Zoo, such as ``logs/dppo`` or ``logs/dppo/Hopper-v5_1``, or of an ``EvalCallback``.
    :return: Curves by env and algorithm, as the names of the folders tell them; where several folders have runs of the same,
        with the folder's path in place of the algorithm's name. Each run counts once.
    :raises ValueError: Where there is no evaluation.
    """
    runs: dict[Path, tuple[str, Path]] = {}
    for folder in map(Path, folders):
        files = sorted(folder.rglob(FILE))
        if not files:
            raise ValueError(f"There is no {FILE} in {str(folder)!r}: train with RL Zoo's --eval-freq, or an EvalCallback.")
        for file in files:
            run = file.resolve().parent
            name = ZOO_RUN.fullmatch(run.name)
            runs[run] = (run.name, run) if name is None else (name[1], run.parent)
    labels = set(runs.values())
    curves: dict[tuple[str, str], list[Curve]] = defaultdict(list)
    for run, (env, parent) in runs.items():
        try:
            with np.load(run / FILE) as data:
                curve = Curve(data["timesteps"], data["results"].mean(axis=1))
        except (zipfile.BadZipFile, EOFError, KeyError) as error:
            raise ValueError(f"{run / FILE} is damaged, or is just being written ({error}).") from error
        is_unique = sum((name, folder.name) == (env, parent.name) for name, folder in labels) == 1
        label = "" if parent == run else parent.name
        curves[env, label if is_unique else str(parent)].append(curve)
    return dict(curves)


def spread(runs: list[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    :param runs: Runs of one algorithm in one env.
    :return: Timesteps of the run with most evaluations up to where all runs go, and mean and standard deviation over the runs
        there, interpolated where their evaluations were at other times; of one run it is 0.
    """
    end = min(run.timesteps[-1] for run in runs)
    longest = max(runs, key=lambda run: int((run.timesteps <= end).sum()))
    timesteps = longest.timesteps[longest.timesteps <= end]
    values = np.stack([np.interp(timesteps, run.timesteps, run.returns) for run in runs])
    return timesteps, values.mean(axis=0), values.std(axis=0, ddof=min(1, len(runs) - 1))


def bootstrap_interval(statistic: Callable[..., Any], *scores: np.ndarray) -> np.ndarray:
    """
    Ours and not rliable's, which stops with a TypeError with the newest version of its dependency arch.

    :param statistic: A statistic of arrays of scores.
    :param scores: The arrays, shape (runs, tasks). Runs are drawn with replacement, for each task anew.
    :return: Bounds of its 95 % interval, shape (2, ...).
    """
    rng = np.random.default_rng(0)
    draws = [
        statistic(*(np.take_along_axis(array, rng.integers(len(array), size=array.shape), axis=0) for array in scores))
        for _ in range(REPETITIONS)
    ]
    return np.percentile(draws, [2.5, 97.5], axis=0)


def interquartile_means(curves: dict[tuple[str, str], list[Curve]]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """
    Interquartile means of the runs' last evaluations, with 95 % bootstrap intervals over the runs (Agarwal et al. 2021).

    :param curves: Of :func:`read_curves`.
    :return: Mean, low and high by env and algorithm.
    :raises ImportError: Without rliable.
    """
    from rliable.metrics import aggregate_iqm

    means = {}
    for key, runs in curves.items():
        scores = np.array([[run.returns[-1]] for run in runs])
        low, high = bootstrap_interval(aggregate_iqm, scores)
        means[key] = (float(aggregate_iqm(scores)), float(low), float(high))
    return means


def plot_curves(curves: dict[tuple[str, str], list[Curve]]) -> Figure:
    """One panel for each env, a line for each algorithm: the mean over its runs, and one standard deviation around it."""
    envs = list(dict.fromkeys(env for env, _ in curves))
    n_columns = min(4, len(envs))
    n_rows = -(-len(envs) // n_columns)
    figure = Figure(figsize=(max(5.0, 4.0 * n_columns), 3.4 * n_rows), layout="constrained")
    panels: Any = figure.subplots(n_rows, n_columns, squeeze=False)
    for panel in panels.flat[len(envs) :]:
        panel.set_visible(False)
    for panel, env in zip(panels.flat, envs, strict=False):
        for (name, algorithm), runs in curves.items():
            if name == env:
                timesteps, mean, std = spread(runs)
                label = f"{algorithm or 'run'} ({len(runs)} run{'s' if len(runs) > 1 else ''})"
                (line,) = panel.plot(timesteps, mean, label=label)
                panel.fill_between(timesteps, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set_title(env)
        panel.set_xlabel("env steps")
        panel.set_ylabel("return")
        panel.legend(loc="best", fontsize="small")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure
