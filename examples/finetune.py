"""Imitate demonstrations, fine-tune with DPPO, evaluate before and after, and plot the learning curve: all in Python."""

import argparse

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_dppo import BC, DPPO, load_demonstrations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--demos", default="hopper-medium", help="bundled set, .npz file or Minari dataset id")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--timesteps", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="finetune.png")
    args = parser.parse_args()

    env = make_vec_env(args.env, n_envs=8, seed=args.seed)
    eval_env = make_vec_env(args.env, n_envs=10, seed=10_000 + args.seed)
    model = DPPO(
        "DiffusionMlpPolicy",
        env,
        # The policy: chunks of 4 actions in 20 denoising steps.
        policy_kwargs=dict(horizon=4, denoising_steps=20, prediction_type="epsilon", net_arch=[256, 256, 256]),
        # All 4 actions are executed before planning again; the last 10 denoising steps are fine-tuned.
        act_steps=4,
        ft_denoising_steps=10,
        min_sampling_std=0.1,
        min_logprob_std=0.1,
        # Small rollouts and careful steps: the policy is good already.
        n_steps=256,
        batch_size=1280,
        n_epochs=5,
        max_grad_norm=None,
        gamma=0.99,
        gamma_denoising=0.99,
        gae_lambda=0.95,
        clip_range=0.05,
        clip_range_base=0.01,
        lr_decay="constant",
        seed=args.seed,
    )
    BC(model, load_demonstrations(args.demos)).train(args.epochs)
    before, before_std = evaluate_policy(model, eval_env, n_eval_episodes=50)
    print(f"After behaviour cloning: {before:.0f} ± {before_std:.0f} over 50 episodes")

    evaluation = EvalCallback(
        eval_env, n_eval_episodes=20, eval_freq=max(1, args.timesteps // 80), log_path="finetune_evaluations", verbose=0
    )
    model.learn(args.timesteps, callback=evaluation, progress_bar=True)
    after, after_std = evaluate_policy(model, eval_env, n_eval_episodes=50)
    print(f"After fine-tuning:       {after:.0f} ± {after_std:.0f} over 50 episodes")
    model.save("dppo_finetuned")

    with np.load("finetune_evaluations/evaluations.npz") as log:
        steps, returns = log["timesteps"], log["results"]
    means, stds = returns.mean(axis=1), returns.std(axis=1)
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([0, *steps], [before, *means], label="mean of 20 episodes, deterministic")
    axes.fill_between(steps, means - stds, means + stds, alpha=0.2)
    axes.set(xlabel="env steps", ylabel="return", title=f"DPPO fine-tuning in {args.env}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.output, dpi=120)
    print(f"Agent: dppo_finetuned.zip, learning curve: {args.output}")


if __name__ == "__main__":
    main()
