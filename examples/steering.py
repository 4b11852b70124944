"""
Steer a pre-trained policy, which stays as it is, with SAC: by the noise that its chains begin with, or by a residual.

Usage: python examples/steering.py pretrained.zip [--env Hopper-v5] [--how noise|residual] [--timesteps 100000]
"""

import argparse
from typing import Any

from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_dppo import DPPO
from sb3_dppo.envs import NoiseSpaceVecEnv, ResidualVecEnv


def steered(env_id: str, model: DPPO, how: str, n_envs: int, seed: int) -> VecEnv:
    """
    :param env_id: Gymnasium id.
    :param model: What has the frozen policy.
    :param how: "noise" or "residual".
    :param n_envs: Number of envs.
    :param seed: Seed of the first one.
    :return: Envs with the policy in them.
    """
    envs = make_vec_env(env_id, n_envs, seed=seed)
    return NoiseSpaceVecEnv(envs, model, noise_bound=1.5) if how == "noise" else ResidualVecEnv(envs, model, scale=0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pretrained", help="the agent to steer, as saved by sb3_dppo.bc")
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--how", choices=["noise", "residual"], default="noise")
    parser.add_argument("--timesteps", type=int, default=100_000, help="of SAC: decisions or, with a residual, env steps")
    parser.add_argument("--n-envs", type=int, default=4)
    parser.add_argument("--n-episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # DDIM keeps more of the initial noise than DDPM; a flow needs no other sampler.
    flow = DPPO.load(args.pretrained, device="cpu").policy_kwargs.get("prediction_type") == "flow"
    sampler: dict[str, Any] = {} if flow else dict(scheduler="ddim", inference_steps=5)
    policy = DPPO.load(args.pretrained, device="cpu", **sampler)
    plain = make_vec_env(args.env, 10, seed=args.seed + 1000)
    mean, std = evaluate_policy(policy, plain, args.n_episodes, deterministic=True)
    print(f"Before: {mean:.0f} ± {std:.0f} ({args.n_episodes} episodes, deterministic)")

    model = SAC("MlpPolicy", steered(args.env, policy, args.how, args.n_envs, args.seed), gradient_steps=-1, seed=args.seed)
    model.learn(args.timesteps, progress_bar=True)
    model.save("steered")
    mean, std = evaluate_policy(model, steered(args.env, policy, args.how, 10, args.seed + 1000), args.n_episodes)
    print(f"After:  {mean:.0f} ± {std:.0f}. SAC's model, which needs {args.pretrained} beside it: steered.zip")


if __name__ == "__main__":
    main()
