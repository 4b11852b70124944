"""
What the package costs those who don't use it: seconds to import Stable-Baselines3 and to start RL Zoo with PPO, without it
and with it.

Usage: python benchmarks/startup.py [--rounds 10]. Nothing else may run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

ZOO = [
    "-m",
    "rl_zoo3.train",
    "--algo",
    "ppo",
    "--env",
    "Pendulum-v1",
    "-n",
    "1",
    "--eval-freq",
    "-1",
    "-f",
    "logs",
    "--num-threads",
    "1",
]
WITHOUT = dict(TORCH_DEVICE_BACKEND_AUTOLOAD="0")
# By name: a program, without the package and with it.
PAIRS: dict[str, tuple[tuple[list[str], dict[str, str]], tuple[list[str], dict[str, str]]]] = {
    "import stable_baselines3": ((["-c", "import stable_baselines3"], WITHOUT), (["-c", "import stable_baselines3"], {})),
    "import sb3_dppo": ((["-c", "import stable_baselines3"], WITHOUT), (["-c", "import sb3_dppo"], {})),
    "rl_zoo3.train --algo ppo": ((ZOO, WITHOUT), (ZOO, {})),
}


def seconds(arguments: list[str], variables: dict[str, str], folder: str) -> float:
    """How long a Python process takes, from start to end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], env={**os.environ, **variables}, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    print("| | without | with | ratio |\n| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for name, pair in PAIRS.items():
            for program in pair:  # fills the file system's cache
                seconds(*program, folder)
            times = [[seconds(*program, folder) for program in pair] for _ in range(rounds)]
            without, with_package = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"| `{name}` | {without:.2f} s | {with_package:.2f} s | {with_package / without:.3f} |", flush=True)


if __name__ == "__main__":
    main()
