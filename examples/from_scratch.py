"""Learn Hopper-v5 from scratch with the default settings, evaluate, save and load."""

import argparse

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_dppo import DPPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--timesteps", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = DPPO("DiffusionMlpPolicy", args.env, seed=args.seed, verbose=1)
    model.learn(args.timesteps, progress_bar=True)
    model.save("dppo_from_scratch")

    model = DPPO.load("dppo_from_scratch")
    mean, std = evaluate_policy(model, make_vec_env(args.env, 10, seed=10_000 + args.seed), n_eval_episodes=20)
    print(f"Return: {mean:.0f} ± {std:.0f} over 20 episodes")


if __name__ == "__main__":
    main()
