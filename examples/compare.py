"""
Compare an agent before and after fine-tuning: evaluation of both, and the learning curve in between.

Usage: python examples/compare.py BEFORE.zip RUN_FOLDER [-o learning_curve.png]
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.results_plotter import ts2xy, window_func

from sb3_dppo import DPPO

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def evaluate(path: Path, env_id: str, n_episodes: int, seed: int) -> tuple[float, float]:
    """
    :param path: A saved agent.
    :param env_id: Gymnasium id.
    :param n_episodes: How many episodes to play, deterministically.
    :param seed: Seed of the envs.
    :return: Mean and standard deviation of the return.
    """
    env = make_vec_env(env_id, n_envs=10, seed=seed)
    mean, std = evaluate_policy(DPPO.load(path, device="cpu"), env, n_episodes, deterministic=True)
    env.close()
    return float(mean), float(std)  # type: ignore[arg-type]


def plot(run: Path, env_id: str, before: float, after: float, output: Path) -> None:
    """
    :param run: Folder with the training envs' monitor files.
    :param env_id: Gymnasium id.
    :param before: Mean return before training.
    :param after: Mean return after it.
    :param output: PNG to write.
    """
    steps, returns = ts2xy(load_results(str(run)), "timesteps")
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(
        steps, returns, ".", markersize=3, alpha=0.3, color="tab:blue", label="training episodes, with exploration noise"
    )
    if len(returns) >= 20:
        smooth_steps, smooth = window_func(steps, returns, 20, np.mean)
        axes.plot(smooth_steps, smooth, color="tab:blue", label="mean of 20 episodes")
    axes.axhline(before, linestyle="--", color="tab:gray", label=f"pre-trained, evaluated: {before:.0f}")
    axes.axhline(after, linestyle="--", color="tab:green", label=f"fine-tuned, evaluated: {after:.0f}")
    axes.set(xlabel="env steps", ylabel="return", title=f"DPPO fine-tuning in {env_id}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.4), ncols=2, fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the agent before fine-tuning")
    parser.add_argument("run", type=Path, help="folder of the fine-tuning run, as rl_zoo3 writes it")
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--n-episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=123_456, help="seed of the evaluation envs: another one than training's")
    parser.add_argument("-o", "--output", type=Path, default=None, help="PNG to write")
    args = parser.parse_args()
    output = args.output or args.run / "learning_curve.png"
    agent = args.run / f"{args.env.replace('/', '-')}.zip"
    before, before_std = evaluate(args.before, args.env, args.n_episodes, args.seed)
    print(f"Before: {before:.0f} ± {before_std:.0f} ({args.n_episodes} episodes, deterministic)")
    after, after_std = evaluate(agent, args.env, args.n_episodes, args.seed)
    print(f"After:  {after:.0f} ± {after_std:.0f} ({args.n_episodes} episodes, deterministic)")
    print(f"The return after is {after / before:.2f} times the one before")
    plot(args.run, args.env, before, after, output)
    print(f"Agent: {agent}\nLearning curve: {output}")


if __name__ == "__main__":
    main()
