"""
What several processes gain, and what their talking costs: one iteration of DPPO on 40 Hopper-v5 envs in all, with the paper's
networks (actor 3 × 512, critic 3 × 256), and the sum of the gradients over ranks, as one flat buffer and by PyTorch's
``DistributedDataParallel``. Run it with nothing else running::

    torchrun --standalone --nproc-per-node 1 benchmarks/ranks.py
    torchrun --standalone --nproc-per-node 2 benchmarks/ranks.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch as th
import torch.distributed as dist
from stable_baselines3.common.env_util import make_vec_env
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sb3_dppo import DPPO, ranks
from sb3_dppo.policies import PAPER_POLICY_KWARGS

N_ENVS = 40


def median(call: Callable[[], Any], rounds: int) -> float:
    """
    :param call: What is timed.
    :param rounds: How often.
    :return: Seconds.
    """
    times = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gradients(wrap: Callable[[nn.Module], nn.Module], after: Callable[[nn.Module], Any]) -> Callable[[], None]:
    """
    :param wrap: What is made of the network.
    :param after: What happens after its gradients are known.
    :return: Forward and backward pass of a network as large as the actor.
    """
    sizes = [64, 512, 512, 512, 12]
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    network, x = wrap(nn.Sequential(*layers)), th.randn(256, 64)

    def call() -> None:
        network.zero_grad(set_to_none=False)
        network(x).square().mean().backward()
        after(network)

    return call


def flat_sum(network: nn.Module) -> None:
    """
    :param network: Whose gradients are added up.
    """
    ranks.sum_over_ranks(parameter.grad for parameter in network.parameters() if parameter.grad is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    th.set_num_threads(1)
    ranks.join()
    if ranks.size() == 1:
        dist.init_process_group("gloo")
    env = make_vec_env("Hopper-v5", N_ENVS // ranks.size())
    settings: Any = dict(act_steps=4, ft_denoising_steps=10, n_steps=200, batch_size=5000, n_epochs=5, clip_range=0.01)
    model = DPPO(
        "DiffusionMlpPolicy",
        env,
        policy_kwargs=PAPER_POLICY_KWARGS,
        normalize_observations=False,
        seed=0,
        device="cpu",
        **settings,
    )
    steps = settings["n_steps"] * N_ENVS
    model.learn(steps)
    seconds = dict(iteration=median(lambda: model.learn(steps, reset_num_timesteps=False), args.rounds))
    plain = gradients(lambda network: network, lambda network: None)
    flat = gradients(lambda network: network, flat_sum)
    for call in (plain, flat):
        call()
    seconds |= dict(gradients=median(plain, 200), flat=median(flat, 200))
    if ranks.size() > 1:
        ddp = gradients(DistributedDataParallel, lambda network: None)
        ddp()
        seconds["ddp"] = median(ddp, 200)
    if ranks.rank() == 0:
        print(f"{ranks.size()} ranks:", ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items()))
    ranks.leave()


if __name__ == "__main__":
    main()
