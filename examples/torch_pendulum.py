"""
Thousands of envs at once, as tensors: Gymnasium's Pendulum-v1 written in PyTorch, and DPPO on it::

    python examples/torch_pendulum.py --n-envs 512 --steps 4000000

An env of your own, such as one of Isaac Lab, is wrapped in the same way: a subclass of TorchVecEnv with two methods.
"""

import argparse
import math

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_dppo import DPPO
from sb3_dppo.envs import BatchedStep, TorchVecEnv


class TorchPendulum(TorchVecEnv):
    """
    Pendulums that start with a random angle and velocity and are truncated after 200 steps.

    :param n_envs: Number of pendulums.
    :param device: Where they are simulated.
    """

    max_speed, max_torque, dt, gravity, episode_length = 8.0, 2.0, 0.05, 10.0, 200

    def __init__(self, n_envs: int, device: th.device | str = "cpu") -> None:
        high = np.array([1.0, 1.0, self.max_speed], dtype=np.float32)
        torques = spaces.Box(-self.max_torque, self.max_torque, (1,), np.float32)
        super().__init__(n_envs, spaces.Box(-high, high), torques, device)
        self.generator = th.Generator(device=self.device)
        self.angle, self.speed, self.n_steps = (th.zeros(n_envs, device=self.device) for _ in range(3))

    def reset_all(self, seed: int | None) -> th.Tensor:
        if seed is not None:
            self.generator.manual_seed(seed)
        self._reset(th.ones(self.num_envs, dtype=th.bool, device=self.device))
        return self._observe()

    def step_all(self, actions: th.Tensor) -> BatchedStep:
        torque = actions[:, 0]
        upright = (self.angle + math.pi) % (2 * math.pi) - math.pi
        rewards = -(upright**2 + 0.1 * self.speed**2 + 0.001 * torque**2)
        acceleration = 1.5 * self.gravity * th.sin(self.angle) + 3.0 * torque
        self.speed = (self.speed + acceleration * self.dt).clamp(-self.max_speed, self.max_speed)
        self.angle = self.angle + self.speed * self.dt
        self.n_steps = self.n_steps + 1
        last_obs, truncated = self._observe(), self.n_steps >= self.episode_length
        self._reset(truncated)
        return BatchedStep(self._observe(), rewards, th.zeros_like(truncated), truncated, last_obs)

    def _observe(self) -> th.Tensor:
        return th.stack([th.cos(self.angle), th.sin(self.angle), self.speed], dim=1)

    def _reset(self, envs: th.Tensor) -> None:
        angle, speed = 2 * th.rand(2, self.num_envs, generator=self.generator, device=self.device) - 1
        self.angle = th.where(envs, math.pi * angle, self.angle)
        self.speed = th.where(envs, speed, self.speed)
        self.n_steps = th.where(envs, 0.0, self.n_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-envs", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4_000_000)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = "cuda" if args.device == "auto" and th.cuda.is_available() else args.device.replace("auto", "cpu")
    # Rollouts of a few steps in many envs: large minibatches, and few epochs.
    settings = dict(n_steps=32, batch_size=32 * args.n_envs // 8, n_epochs=5, learning_rate=1e-3)
    model = DPPO("DiffusionMlpPolicy", TorchPendulum(args.n_envs, device), **settings, seed=0, device=device, verbose=1)
    model.learn(args.steps)
    mean, std = evaluate_policy(model, TorchPendulum(100, device), n_eval_episodes=100)
    print(f"return over 100 episodes: {mean:.0f} ± {std:.0f}")


if __name__ == "__main__":
    main()
