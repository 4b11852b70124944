"""
Env steps per second of whole iterations, by the number of envs: DPPO on tensors (``TorchVecEnv``), DPPO and PPO on the same
envs through NumPy's arrays. The envs are the pendulums of examples/torch_pendulum.py, the settings equal: rollouts of 16
steps, 4 minibatches, 5 epochs, networks of 64 × 64. Each case runs in a process of its own, which also says how much memory
it took at most, and for DPPO which share of the time its matrix products take (PyTorch's profiler). Run it with nothing else
running::

    python benchmarks/many_envs.py --json many_envs.json
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor
from torch.profiler import ProfilerActivity, profile

from sb3_dppo import DPPO

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from torch_pendulum import TorchPendulum

CASES = ("dppo", "dppo_arrays", "ppo")
N_STEPS, N_MINIBATCHES, N_EPOCHS = 16, 4, 5
PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::matmul", "aten::linear")


def make(case: str, n_envs: int) -> Any:
    """
    :param case: One of CASES.
    :param n_envs: Number of envs.
    :return: The model.
    """
    settings: dict[str, Any] = dict(n_steps=N_STEPS, n_epochs=N_EPOCHS, seed=0, device="cpu")
    n_decisions = N_STEPS * n_envs
    if case == "ppo":
        return PPO("MlpPolicy", VecMonitor(TorchPendulum(n_envs)), batch_size=n_decisions // N_MINIBATCHES, **settings)
    env: Any = TorchPendulum(n_envs) if case == "dppo" else VecMonitor(TorchPendulum(n_envs))
    model = DPPO("DiffusionMlpPolicy", env, **settings)
    model.batch_size = n_decisions * model.policy.sampler.ft_denoising_steps // N_MINIBATCHES
    return model


def run(case: str, n_envs: int, rounds: int) -> dict[str, Any]:
    """
    :param case: One of CASES.
    :param n_envs: Number of envs.
    :param rounds: Iterations that are timed.
    :return: What was measured.
    """
    model = make(case, n_envs)
    steps, times = N_STEPS * n_envs, []
    model.learn(2 * steps)
    for _ in range(rounds):
        start = time.perf_counter()
        model.learn(steps, reset_num_timesteps=False)
        times.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    result: dict[str, Any] = dict(case=case, n_envs=n_envs, steps_per_s=steps / statistics.median(times), memory_mib=memory)
    if case == "dppo":
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            start = time.perf_counter()
            model.learn(steps, reset_num_timesteps=False)
            whole = time.perf_counter() - start
        events = recorded.key_averages()
        result["products_share"] = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS) / 1e6 / whole
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-envs", type=int, nargs="+", default=[1, 16, 256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    if args.case is not None:
        print(json.dumps(run(args.case, args.n_envs[0], args.rounds)))
        return
    results = []
    print(f"{'envs':>6} {'case':12} {'env steps/s':>12} {'memory':>10} {'products':>9}")
    for n_envs in args.n_envs:
        for case in CASES:
            arguments = [f"--case={case}", f"--n-envs={n_envs}", f"--rounds={args.rounds}", f"--threads={args.threads}"]
            done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            results.append(result)
            share = f"{result['products_share']:9.0%}" if "products_share" in result else ""
            print(f"{n_envs:6} {case:12} {result['steps_per_s']:12.0f} {result['memory_mib']:6.0f} MiB {share}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(dict(threads=args.threads, torch=th.__version__, results=results), indent=1))


if __name__ == "__main__":
    main()
