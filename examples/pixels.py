"""
Learn from what a camera sees: images of 64 × 64, stacked, with the paper's vision transformer as the encoder.

Where there is no screen, MuJoCo draws with ``MUJOCO_GL=egl`` (on a GPU or in software) or ``MUJOCO_GL=osmesa``::

    MUJOCO_GL=egl python examples/pixels.py --env Hopper-v5 --timesteps 100000
"""

import argparse

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

from sb3_dppo import DPPO
from sb3_dppo.features.extractors import VitExtractor

SIZE = 64


class PixelObservation(gym.ObservationWrapper):
    """
    Observe the rendered image instead of the state.

    :param env: An env that renders images of 64 × 64.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        image = self.env.render()
        assert isinstance(image, np.ndarray)
        return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5", help="a MuJoCo task")
    parser.add_argument("--timesteps", type=int, default=100_000)
    parser.add_argument("--n-envs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def make_env(n_envs: int, seed: int) -> VecTransposeImage:
        env_kwargs = dict(render_mode="rgb_array", width=SIZE, height=SIZE)
        envs = make_vec_env(args.env, n_envs, seed, env_kwargs=env_kwargs, wrapper_class=PixelObservation)
        # Three frames, for velocities can't be seen in one.
        return VecTransposeImage(VecFrameStack(envs, 3))

    model = DPPO(
        "DiffusionCnnPolicy",
        make_env(args.n_envs, args.seed),
        n_steps=256,
        policy_kwargs=dict(features_extractor_class=VitExtractor, features_extractor_kwargs=dict(random_shift=4)),
        seed=args.seed,
        verbose=1,
    )
    model.learn(args.timesteps, progress_bar=True)
    mean, std = evaluate_policy(model, make_env(1, args.seed + 1000), n_eval_episodes=10)
    print(f"{args.env}: return {mean:.0f} ± {std:.0f} over 10 episodes")
    model.save("pixels.zip")


if __name__ == "__main__":
    main()
