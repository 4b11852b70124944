"""
How long DPPO's parts take, beside the bare matrix products that they need, timed in the same run.

The work is the paper's fine-tuning of Hopper: a residual actor of 3 × 512 and a critic of 3 × 256, 20 denoising steps of which
10 are fine-tuned, chunks of 4 actions, 40 envs, 500 decisions per env and rollout, minibatches of 50 000 pairs, 5 epochs.
Prints a table and, where asked, writes a JSON object and a plot. Run it with nothing else running::

    python benchmarks/speed.py --json speed.json --plot speed.png
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from typing import Any

import parts
import torch as th


def print_table(results: dict[str, Any]) -> None:
    """
    :param results: Rows by name.
    """
    print(f"{'measurement':34} {'median':>11} {'quartiles':>23} {'floor':>11} {'ratio':>7}")
    for name, result in results.items():
        if "ratio" in result:
            milliseconds = [1e3 * result[key] for key in ("median_s", "q1_s", "q3_s", "floor_s")]
            print("{:34} {:8.2f} ms {:9.2f} – {:8.2f} ms {:8.2f} ms {:7.2f}".format(name, *milliseconds, result["ratio"]))


def plot(results: dict[str, Any], path: str) -> None:
    """
    :param results: What was measured.
    :param path: Where to write the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {
        name: result for name, result in results.items() if "ratio" in result and not name.startswith(("threads", "vec_env"))
    }
    figure = plt.figure(figsize=(9.6, 7.2), layout="constrained")
    above, below = figure.subfigures(2, squeeze=False).flat
    bars = above.subplots()
    bars.barh([name.replace("_", " ") for name in rows], [result["ratio"] for result in rows.values()])
    bars.axvline(1.0, color="black", linewidth=1)
    bars.invert_yaxis()
    bars.set_xlabel("time / time of the bare matrix products")
    axes = below.subplots(1, 4)
    for ax, (name, points) in zip(axes, results.get("growth", {}).items(), strict=False):
        x = [point["value"] for point in points]
        ax.plot(x, [point["rollout_s"] for point in points], "o-", label="rollout of 50 decisions per env")
        ax.plot(x, [point["update_epoch_s"] for point in points], "s-", label="update epoch")
        ax.set_xlabel(name)
        ax.set_ylabel("seconds")
        ax.set_ylim(bottom=0)
        if name == "batch_size":
            ax.set_xscale("log")
    below.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of the longest measurements; others have more")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own number")
    parser.add_argument(
        "--only",
        nargs="*",
        default=None,
        help="parts to run: planning iterations unet pixels threads envs growth memory import",
    )
    parser.add_argument("--json", metavar="FILE", default=None, help="write all results there")
    parser.add_argument("--plot", metavar="FILE", default=None, help="write a plot there")
    args = parser.parse_args()
    if args.device == "cuda" and not th.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu.")
    if args.threads is not None:
        th.set_num_threads(args.threads)
    choices: dict[str, Callable[[], dict[str, Any]]] = dict(
        planning=lambda: parts.planning(args.device, args.rounds),
        iterations=lambda: parts.iterations(args.device, args.rounds),
        unet=lambda: parts.unet(args.device, args.rounds),
        pixels=lambda: parts.pixels(args.device, args.rounds),
        threads=lambda: parts.threads(args.rounds),
        envs=lambda: parts.vec_envs(args.rounds),
        growth=lambda: {"growth": parts.growth(args.device, args.rounds)},
        memory=lambda: {"peak_memory": {"bytes": parts.peak_memory(args.device)}},
        **{"import": lambda: {"import": parts.import_time(args.rounds)}},
    )
    unknown = set(args.only or []) - set(choices)
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: choose from {' '.join(choices)}.")
    results: dict[str, Any] = {}
    for name in args.only or choices:
        print(f"… {name}", file=sys.stderr)
        results |= choices[name]()
    print(
        f"{args.device}, {th.get_num_threads()} threads, torch {th.__version__}, {platform.processor() or platform.machine()}"
    )
    print_table(results)
    if "peak_memory" in results:
        print(f"peak memory of an iteration: {results['peak_memory']['bytes'] / 2**20:.0f} MiB")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=2)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
