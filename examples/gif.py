"""
Agents side by side in a GIF, each in an episode that begins in the same state.

Usage: MUJOCO_GL=egl python examples/gif.py before.zip after.zip [--env Hopper-v5] [-o agents.gif]
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image

from sb3_dppo import DPPO


def frames(agent: str, env: gym.Env, n_steps: int, every: int, seed: int) -> list[np.ndarray]:
    """Pictures of an agent's steps; after the episode's end the last one stays."""
    model = DPPO.load(agent, device="cpu")
    obs, _ = env.reset(seed=seed)
    state, done, pictures = None, False, [np.asarray(env.render())]
    for step in range(1, n_steps + 1):
        if not done:
            action, state = model.predict(obs, state, deterministic=True)
            obs, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
        if step % every == 0:
            pictures.append(pictures[-1] if done else np.asarray(env.render()))
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agents", nargs="+", help="from left to right, as saved by save")
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--steps", type=int, default=400, help="of the env")
    parser.add_argument("--every", type=int, default=8, help="steps between two pictures")
    parser.add_argument("--size", type=int, default=200, help="pixels of a side of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="agents.gif")
    args = parser.parse_args()
    view: dict[str, Any] = dict(width=args.size, height=args.size, camera_name="track")  # MuJoCo's, which follows
    env = gym.make(args.env, render_mode="rgb_array", **view)
    seconds = args.every * env.unwrapped.dt  # type: ignore[attr-defined]
    columns = [frames(agent, env, args.steps, args.every, args.seed) for agent in args.agents]
    pictures = [Image.fromarray(np.hstack(row)).quantize(64) for row in zip(*columns, strict=True)]
    pictures[0].save(args.output, save_all=True, append_images=pictures[1:], duration=round(1000 * seconds), loop=0)
    print(f"Saved {args.output}: {len(pictures)} pictures, {seconds:.3f} s apart")


if __name__ == "__main__":
    main()
