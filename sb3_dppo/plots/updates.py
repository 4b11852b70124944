"""A sheet of diagnostics of one run: what its updates did."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

# By name, when and what.
Scalars = Mapping[str, tuple[np.ndarray, np.ndarray]]


def read_scalars(folder: str | Path) -> Scalars:
    """
    :param folder: A run's folder of TensorBoard events, or one with a ``progress.csv`` of Stable-Baselines3's logger.
    :return: Env steps and values of each that was logged, by name.
    :raises ValueError: Where neither is.
    """
    folder = Path(folder)
    table = folder / "progress.csv"
    if table.is_file():
        import pandas as pd

        data = pd.read_csv(table)
        if "time/total_timesteps" not in data:
            raise ValueError(f"{str(table)!r} has no column time/total_timesteps: it is not of a training.")
        steps = data["time/total_timesteps"]
        known = {name: data[name].notna() & steps.notna() for name in data.columns if data[name].dtype.kind in "if"}
        return {name: (steps[rows].to_numpy(), data[name][rows].to_numpy()) for name, rows in known.items()}
    runs = sorted({path.parent for path in folder.rglob("events.out.tfevents.*")})
    if len(runs) != 1:
        found = f"several runs, {[str(run) for run in runs[:3]]}: name one of them" if runs else "no run that was logged"
        raise ValueError(f"In {str(folder)!r} there is {found} (tensorboard_log=…, or RL Zoo's --tensorboard-log).")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs[0]), size_guidance=dict(scalars=0)).Reload()
    scalars = {}
    for name in events.Tags()["scalars"]:
        values = events.Scalars(name)
        scalars[name] = (np.array([value.step for value in values]), np.array([value.value for value in values]))
    return scalars


def plot_updates(scalars: Scalars) -> Figure:
    """
    :param scalars: Of :func:`read_scalars`.
    :return: Return, divergence, clipped pairs and std of each denoising step, the critic's explained variance, and the spread
        of the advantages.
    :raises ValueError: Where it was no run of DPPO.
    """
    if "train/clip_fraction" not in scalars or "train/approx_kl" not in scalars:
        raise ValueError("Of updates of DPPO nothing was logged there.")
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    panels: Any = figure.subplots(2, 3)
    _plot(panels[0, 0], scalars, ["rollout/ep_rew_mean"], "return in training")
    panels[0, 0].get_legend().remove()
    _plot_steps(panels[0, 1], scalars, "clip_fraction", "clipped pairs")
    _plot_steps(panels[0, 2], scalars, "approx_kl", "divergence (approx_kl)")
    _plot_steps(panels[1, 0], scalars, "std", "std in log-probabilities")
    _plot(panels[1, 1], scalars, ["train/explained_variance"], "explained variance of the critic")
    panels[1, 1].get_legend().remove()
    panels[1, 1].set_ylim(-0.1, 1.05)
    _plot(
        panels[1, 2],
        scalars,
        ["train/advantage_std", "train/actor_grad_norm", "train/critic_grad_norm"],
        "spread and gradients",
    )
    panels[1, 2].set_yscale("log")
    for panel in panels.flat:
        panel.set_xlabel("env steps")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _plot(panel: Any, scalars: Scalars, names: list[str], title: str) -> None:
    for name in names:
        if name in scalars:
            panel.plot(*scalars[name], label=name.partition("/")[2])
    panel.set_title(title)
    panel.legend(fontsize="small")


def _plot_steps(panel: Any, scalars: Scalars, statistic: str, title: str) -> None:
    """A line for each denoising step, from the noisiest (dark) to the last (bright); of their mean where there are none."""
    prefix = f"denoising/{statistic}_"
    names = sorted((name for name in scalars if name.startswith(prefix)), key=lambda name: int(name.rpartition("_")[2]))
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(1, len(names))))
    for i, (name, color) in enumerate(zip(names, colors, strict=False)):
        label = {0: "noisiest step", len(names) - 1: "last step"}.get(i) if len(names) > 1 else None
        panel.plot(*scalars[name], color=color, label=label, linewidth=1)
    if not names and f"train/{statistic}" in scalars:
        panel.plot(*scalars[f"train/{statistic}"])
    panel.set_title(title)
    if len(names) > 1:
        panel.legend(fontsize="small")
