"""
Act with an exported policy, without PyTorch: plan the next chunk while the last one is executed, as real robots need.

Usage: python examples/onnx_runtime.py policy.onnx [--env Hopper-v5] [--act-steps 3] [--delay 1] [--hz 50]

A chunk that is planned during ``delay`` control steps begins with actions for a past in which the old chunk went on, so it is
executed from action number ``delay`` on: ``act_steps`` + ``delay`` must not exceed the actions that a chunk has.
"""

import argparse
import json
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime

TYPES = {f"tensor({name})": name for name in ("uint8", "int8", "int16", "int32", "int64")} | {"tensor(float)": "float32"}


class Planner:
    """
    Chunks of actions for one env, as ``predict(deterministic=True)`` plans them. Where statistics of VecNormalize are in the
    graph and ``deterministic_noise`` is "observation", the noise is another, for it follows from what the env observes.

    :param path: What ``python -m sb3_dppo.export`` wrote.
    """

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        details = self.session.get_modelmeta().custom_metadata_map
        self.act_steps, self.kind = (json.loads(details[name]) for name in ("act_steps", "deterministic_noise"))
        *self.inputs, self.noise = self.session.get_inputs()
        self.seconds: list[float] = []

    def __call__(self, obs: Any) -> np.ndarray:
        """The actions of a new chunk for an observation of the env, its images with channels first."""
        start = time.perf_counter()
        obs = obs if isinstance(obs, dict) else {"observation": obs}
        feed = {part.name: np.asarray(obs[part.name])[None].astype(TYPES[part.type]) for part in self.inputs}
        steps, _, *chunk = self.noise.shape
        seed = 0
        for name in sorted(feed):
            seed = zlib.crc32((feed[name].astype(np.float32) + 0.0).tobytes(), seed)
        rng = np.random.default_rng(seed if self.kind == "observation" else None)
        noise = rng.standard_normal((steps, *chunk), dtype=np.float32)[:, None] * (self.kind != "zero")
        actions = self.session.run(None, feed | {"noise": noise})[0][0]
        self.seconds.append(time.perf_counter() - start)
        return actions


def episode(env: gym.Env, planner: Planner, delay: int, hz: float | None, seed: int) -> float:
    """
    :param env: Env.
    :param planner: What plans.
    :param delay: Control steps that planning may take, in which the old chunk goes on.
    :param hz: Control steps per second; ``None`` as many as there can be.
    :param seed: Of the env's reset.
    :return: The return of one episode.
    """
    obs, _ = env.reset(seed=seed)
    chunk, number, left, done, total = planner(obs), 0, planner.act_steps, False, 0.0
    with ThreadPoolExecutor(max_workers=1) as executor:
        while not done:
            start = time.perf_counter()
            if left == delay:
                following = executor.submit(planner, obs)
            if left == 0:
                chunk, number, left = following.result(), delay, planner.act_steps
            obs, reward, terminated, truncated, _ = env.step(chunk[number])
            number, left, done, total = number + 1, left - 1, terminated or truncated, total + float(reward)
            if hz is not None:
                time.sleep(max(0.0, 1 / hz - (time.perf_counter() - start)))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="file that was exported")
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--act-steps", type=int, help="actions of a chunk to execute, instead of the policy's own number")
    parser.add_argument("--delay", type=int, default=0, help="control steps that planning may take; fewer than act_steps")
    parser.add_argument("--hz", type=float, help="control steps per second; without it as fast as possible")
    parser.add_argument("--n-episodes", type=int, default=10)
    args = parser.parse_args()
    env, planner = gym.make(args.env), Planner(args.policy)
    planner.act_steps = planner.act_steps if args.act_steps is None else args.act_steps
    n_actions = planner.session.get_outputs()[0].shape[1]
    if not 0 <= args.delay < planner.act_steps or planner.act_steps + args.delay > n_actions:
        parser.error(f"delay={args.delay} must be below act_steps={planner.act_steps}, both together at most {n_actions}.")
    returns = [episode(env, planner, args.delay, args.hz, seed) for seed in range(args.n_episodes)]
    print(f"Return: {np.mean(returns):.0f} ± {np.std(returns):.0f} ({args.n_episodes} episodes)")
    median, slow = np.percentile(planner.seconds, [50, 99]) * 1000
    print(f"Planning: median {median:.2f} ms, 99 % within {slow:.2f} ms")


if __name__ == "__main__":
    main()
