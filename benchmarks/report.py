"""Tables and plots of a learning study's results."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from study import Study, key_of, read_results

from sb3_dppo.plots.curves import bootstrap_interval

HEADER = ["algorithm", "seeds", "last", "best", "over random", "ratio to baseline", "CPU min"]
MISSING = "–"


@dataclass
class Scores:
    """
    Normalised scores of the last evaluations: 0 is the random policy and 1 the baseline's mean.

    :param tasks: The envs, all those in which random policy, baseline and the compared algorithms have results.
    :param values: By algorithm, shape (seeds, tasks).
    """

    tasks: list[str] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)


def load(study: Study, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """
    :param study: The study.
    :param path: Its file of results.
    :return: A row for each of the study's runs that is done, and what a reader must know about them.
    """
    rows = {key_of(row): row for row in read_results(path)}
    runs = study.runs()
    # A study may come to show fewer runs than its file has, but never others.
    found = [rows[run.key] for run in runs if run.key in rows]
    if not found:
        raise ValueError(f"{path} has no results of this study: run it first (`learning.py run`).")
    frame = pd.DataFrame(found)
    frame["last"] = [evaluations[-1][1] for evaluations in frame["evaluations"]]
    frame["best"] = [max(evaluation[1] for evaluation in evaluations) for evaluations in frame["evaluations"]]
    notes = [f"{len(found)} of {len(runs)} runs are done."]
    if len(rows) > len(found):
        notes.append(f"{len(rows) - len(found)} results of other arguments, steps, seeds, envs or algorithms are left out.")
    for (env, algorithm), group in frame.groupby(["env", "algorithm"], sort=False):
        if len({str(arguments) for arguments in group["arguments"]}) > 1:
            notes.append(f"{algorithm} in {env}: the constructor's defaults have changed between its runs.")
    return frame, notes


def tables(study: Study, frame: pd.DataFrame) -> dict[str, list[list[str]]]:
    """
    :param study: The study.
    :param frame: From :func:`load`.
    :return: Rows under ``HEADER`` by env.
    """
    result = {}
    for env in study.envs:
        means = frame[frame["env"] == env].groupby("algorithm")["last"].mean()
        gains = means - means.get(study.random, np.nan)
        # No ratio to a baseline that is no better than chance.
        scale = gains.get(study.baseline, np.nan)
        scale = scale if scale > 0 else np.nan
        rows = []
        for name in study.algorithms:
            group = frame[(frame["env"] == env) & (frame["algorithm"] == name)]
            trained = len(group) and name != study.random
            rows.append(
                [
                    name,
                    str(len(group)),
                    mean_and_std(group["last"]),
                    mean_and_std(group["best"]) if trained else MISSING,
                    number(gains.get(name, np.nan)) if trained else MISSING,
                    number(gains.get(name, np.nan) / scale, 2) if trained else MISSING,
                    number(group["cpu_seconds"].mean() / 60) if trained else MISSING,
                ]
            )
        result[env] = rows
    return result


def number(value: Any, digits: int = 1) -> str:
    """A number, or a dash for NaN."""
    return f"{value:.{digits}f}" if np.isfinite(value) else MISSING


def mean_and_std(values: pd.Series) -> str:
    """Mean ± standard deviation over seeds."""
    if len(values) < 2:
        return number(values.mean())
    return f"{number(values.mean())} ± {number(values.std())}"


def scores(study: Study, frame: pd.DataFrame) -> Scores:
    """
    :param study: The study.
    :param frame: From :func:`load`.
    :return: Scores of all algorithms but the random one; no tasks where none can be compared.
    """
    names = [name for name in study.algorithms if name != study.random]
    if study.random is None or study.baseline in (None, study.random):
        return Scores()
    last = frame.pivot_table(index=["algorithm", "seed"], columns="env", values="last")
    means = last.groupby("algorithm").mean()
    compared = [name for name in names if name in means.index]
    if not {study.random, study.baseline} <= set(means.index):
        return Scores()
    random, baseline = means.loc[study.random], means.loc[study.baseline]
    # Without a baseline that is better than chance there is no scale.
    complete = means.loc[compared].notna().all() & (baseline > random)
    tasks = [env for env in study.envs if complete.get(env, False)]
    normalised = (last[tasks] - random[tasks]) / (baseline[tasks] - random[tasks])
    values = {name: normalised.loc[name].dropna().to_numpy() for name in compared}
    return Scores(tasks, values) if tasks and all(len(array) for array in values.values()) else Scores()


def summary(study: Study, frame: pd.DataFrame) -> list[str]:
    """
    :param study: The study.
    :param frame: From :func:`load`.
    :return: Lines about all tasks together.
    """
    try:
        from rliable import metrics
    except ImportError:
        return ["For interquartile means with intervals over all tasks: pip install 'sb3-dppo[benchmarks]'."]
    compared = scores(study, frame)
    if not compared.tasks:
        return ["No task yet in which random policy, baseline (better than random) and all algorithms have results."]
    excluded = ", ".join(env for env in study.envs if env not in compared.tasks)
    lines = [
        f"Over {len(compared.tasks)} tasks{f' (without {excluded})' if excluded else ''}: scores 0 for the random policy and "
        f"1 for the mean of {study.baseline}; 95 % intervals from a stratified bootstrap over seeds, this scale held fixed."
    ]
    for name, values in compared.values.items():
        line = f"{name}: interquartile mean {_interval(metrics.aggregate_iqm, values)}, {len(values)} seeds"
        if name != study.baseline:
            better = _interval(metrics.probability_of_improvement, values, compared.values[str(study.baseline)])
            line += f"; probability of improvement over {study.baseline} {better}"
        lines.append(line)
    return lines


def _interval(statistic: Callable[..., Any], *values: np.ndarray) -> str:
    """The statistic with its interval."""
    low, high = bootstrap_interval(statistic, *values)
    return f"{statistic(*values):.2f} [{low:.2f}, {high:.2f}]"


def show(study: Study, path: Path, markdown: bool = False, picture: str | None = None) -> None:
    """
    Print tables and, where asked, draw a plot.

    :param study: The study.
    :param path: Its file of results.
    :param markdown: Whether to print Markdown.
    :param picture: File of the plot.
    """
    frame, notes = load(study, path)
    console = Console()
    header = [f"ratio to {study.baseline}" if name == "ratio to baseline" and study.baseline else name for name in HEADER]
    for env, rows in tables(study, frame).items():
        if markdown:
            print(f"### {env}\n")
            for row in [header, ["---", *["---:"] * (len(header) - 1)], *rows]:
                print(f"| {' | '.join(row)} |")
            print()
        else:
            table = Table(title=env, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
            for index, name in enumerate(header):
                table.add_column(name.replace(" ", "\n"), justify="right" if index else "left", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            console.print(table)
    notes = ["Returns are means ± standard deviations over seeds, of the last and of each run's best evaluation.", *notes]
    for line in notes + summary(study, frame):
        print(f"- {line}" if markdown else line)
    if picture is not None:
        plot(study, frame, picture)


def plot(study: Study, frame: pd.DataFrame, path: str) -> None:
    """
    Learning curves of each env, mean and standard deviation over seeds, and performance profiles.

    :param study: The study.
    :param frame: From :func:`load`.
    :param path: PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter

    compared = scores(study, frame)
    panels = len(study.envs) + bool(compared.tasks)
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.8 * rows), layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for env, ax in zip(study.envs, axes, strict=False):
        _curves(study, frame[frame["env"] == env], ax)
        ax.set(title=env, xlabel="env steps", ylabel="return")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    if compared.tasks:
        _profiles(study, compared, axes[panels - 1])
    for ax in axes[panels:]:
        ax.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(study.algorithms))
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


def _curves(study: Study, frame: pd.DataFrame, ax: Any) -> None:
    """The curves of one env."""
    for index, name in enumerate(study.algorithms):
        group = frame[frame["algorithm"] == name]
        if not len(group):
            ax.plot([], [], label=name, color=f"C{index}")
        elif name == study.random:
            ax.axhline(group["last"].mean(), color=f"C{index}", linestyle="--", label=name)
        else:
            # By number, since the last evaluation may come some steps later.
            curves = [pd.DataFrame(evaluations)[[0, 1]] for evaluations in group["evaluations"]]
            table = pd.concat(curves).groupby(level=0).agg(["mean", "std"]).fillna(0.0)
            steps, mean, std = table[0]["mean"], table[1]["mean"], table[1]["std"]
            ax.plot(steps, mean, label=name, color=f"C{index}")
            ax.fill_between(steps, mean - std, mean + std, alpha=0.2, color=f"C{index}")


def _profiles(study: Study, compared: Scores, ax: Any) -> None:
    """Performance profiles: which share of runs, of all tasks alike, is above a normalised score."""
    thresholds = np.linspace(0.0, max(1.0, *(float(values.max()) for values in compared.values.values())), 51)

    def profile(values: np.ndarray) -> np.ndarray:
        return (values > thresholds[:, None, None]).mean(axis=(1, 2))

    for name, values in compared.values.items():
        color = f"C{list(study.algorithms).index(name)}"
        ax.plot(thresholds, profile(values), label=name, color=color)
        ax.fill_between(thresholds, *bootstrap_interval(profile, values), alpha=0.2, color=color)
    ax.set(title="performance profiles", xlabel="normalised score", ylabel="share of runs above it")
