"""
How long ``learn`` takes from scratch beside PPO: one env, the defaults of both, one thread. They take turns of 4096 env steps.

Usage: python benchmarks/beside_ppo.py [--envs Hopper-v5 Pendulum-v1] [--rounds 7]. Nothing else may run.
"""

import argparse
import statistics
import time
from typing import Any

import torch as th
from stable_baselines3 import PPO

from sb3_dppo import DPPO

# A multiple of the steps of a rollout of either.
STEPS = 4096


def milliseconds(model: Any) -> float:
    """Of wall time per env step, over the next STEPS of them: rollouts and updates."""
    start = time.perf_counter()
    model.learn(STEPS, reset_num_timesteps=False)
    return 1e3 * (time.perf_counter() - start) / STEPS


def describe(model: Any) -> str:
    """The settings that cost time, with the weights that are trained, of actor and critic."""
    sizes = dict(actor=0, critic=0)
    for name, parameter in model.policy.named_parameters():
        if parameter.requires_grad:
            sizes["critic" if name.startswith(("critic", "value_net", "mlp_extractor.value_net")) else "actor"] += (
                parameter.numel()
            )
    minibatches = f"{model.n_epochs} epochs of minibatches of {model.batch_size}"
    return f"{model.n_steps} steps per rollout, {minibatches}, weights: {sizes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=["Hopper-v5", "Pendulum-v1"])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    for env_id in arguments.envs:
        models: list[Any] = [
            DPPO("DiffusionMlpPolicy", env_id, seed=0, device="cpu"),
            PPO("MlpPolicy", env_id, seed=0, device="cpu"),
        ]
        times = [[milliseconds(model) for model in models] for _ in range(arguments.rounds + 1)][1:]
        dppo, ppo = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {env_id} | {dppo:.2f} ms | {ppo:.2f} ms | {dppo / ppo:.2f} |", flush=True)
        for model in models:
            print(f"    {type(model).__name__}: {describe(model)}", flush=True)


if __name__ == "__main__":
    main()
