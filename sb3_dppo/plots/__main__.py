"""
Pictures of runs.

    python -m sb3_dppo.plots curves logs/dppo logs/ppo -o curves.png
    python -m sb3_dppo.plots updates tb/Hopper-v5/DPPO_1 -o updates.png
    python -m sb3_dppo.plots chains finetuned.zip --before pretrained.zip --env Hopper-v5 -o chains.png
"""

import argparse
from pathlib import Path

import gymnasium as gym
from matplotlib.figure import Figure

from sb3_dppo.dppo import DPPO
from sb3_dppo.plots.chains import iterates, observation_of, plot_chains
from sb3_dppo.plots.curves import interquartile_means, plot_curves, read_curves
from sb3_dppo.plots.updates import plot_updates, read_scalars
from sb3_dppo.runs.checkpoints import is_of_vec_normalize


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sb3_dppo.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    curves = commands.add_parser("curves", help="evaluations against env steps, with the spread over runs")
    curves.add_argument("folders", nargs="+", help="RL Zoo's, such as logs/dppo or logs/dppo/Hopper-v5_1")
    updates = commands.add_parser("updates", help="what the updates of a run did")
    updates.add_argument("folder", help="of TensorBoard events, or with a progress.csv")
    chains = commands.add_parser("chains", help="denoising chains of one observation, from noise to action")
    chains.add_argument("agent", help="what was saved by save (.zip)")
    chains.add_argument("--before", help="the same policy before fine-tuning, to show beside it")
    chains.add_argument("--env", required=True)
    chains.add_argument("--steps", type=int, default=20, help="steps of the agent before the observation")
    chains.add_argument("--chunks", type=int, default=200, help="how many to sample")
    chains.add_argument("--dims", type=int, nargs=2, default=(0, 1), help="action dimensions to show")
    chains.add_argument("--seed", type=int, default=0)
    for command in (curves, updates, chains):
        command.add_argument("-o", "--output", help="file to write: .png, .svg or .pdf")
    return parser


def _chains(args: argparse.Namespace) -> Figure:
    models = {"before fine-tuning": args.before, "after fine-tuning": args.agent} if args.before else {"": args.agent}
    loaded = {title: DPPO.load(path, device="cpu") for title, path in models.items()}
    agent = list(loaded.values())[-1]
    if any(map(is_of_vec_normalize, loaded.values())):
        raise ValueError(
            "A policy that was trained under VecNormalize sees other observations than the env's, which are shown."
        )
    n_dims = agent.policy.action_dim
    if n_dims == 1:
        raise ValueError(f"The actions of {args.agent} have one dimension, but a picture of chains shows two.")
    if not all(0 <= dim < n_dims for dim in args.dims) or args.dims[0] == args.dims[1]:
        raise ValueError(f"dims={list(args.dims)} must be two of the {n_dims} dimensions of an action.")
    env = gym.make(args.env)
    obs = observation_of(env, agent, args.steps, args.seed)
    env.close()
    return plot_chains(
        {title: iterates(model, obs, args.chunks, args.seed) for title, model in loaded.items()}, tuple(args.dims)
    )


def _curves(args: argparse.Namespace) -> Figure:
    curves = read_curves(args.folders)
    try:
        for (env, algorithm), (mean, low, high) in interquartile_means(curves).items():
            n_runs = len(curves[env, algorithm])
            interval = f"95 % interval {low:.1f} to {high:.1f}, {n_runs} runs" if n_runs > 1 else "one run"
            print(f"{env} {algorithm}: interquartile mean of the last evaluations {mean:.1f} ({interval})")
    except ImportError:
        print("For interquartile means with their intervals, install rliable.")
    return plot_curves(curves)


def main() -> None:
    """The command line."""
    parser = _parser()
    args = parser.parse_args()
    output = Path(args.output or f"{args.command}.png")
    try:
        if output.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"output={str(output)!r} must end in .png, .svg or .pdf.")
        if args.command == "updates":
            figure = plot_updates(read_scalars(args.folder))
        else:
            figure = _curves(args) if args.command == "curves" else _chains(args)
    except (ValueError, OSError, gym.error.Error) as error:
        parser.error(str(error))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    print(f"Saved {output}")


if __name__ == "__main__":
    main()
