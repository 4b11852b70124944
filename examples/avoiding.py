"""
Why diffusion policies explore well: three ways around obstacles, cloned by a diffusion policy and by a Gaussian one.

Usage: python examples/avoiding.py [-o avoiding.png] [--epochs 400] [--finetune 0]

Each picture shows whole episodes that begin at one place, with the noise that DPPO explores with. A diffusion policy's chunks
belong to one of the demonstrated ways; a Gaussian policy's are its mean with noise around it (as in the paper's figure on
structured exploration).
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from matplotlib.figure import Figure
from stable_baselines3.common.env_util import make_vec_env

from sb3_dppo import BC, DPPO, Demonstrations

OBSTACLES = np.array([[0.0, 0.45], [0.0, -0.45]])
RADIUS = 0.15
STEP = 0.1
WAYS = (0.95, 0.0, -0.95)  # where they pass the obstacles
START, GOAL = -1.0, 1.0
HORIZON, ACT_STEPS = 8, 4


class AvoidingEnv(gym.Env):
    """
    A point goes from left to right between two discs or around them; it observes where it is and moves as it wants. Reward 1
    on the other side; a collision ends the episode without.
    """

    observation_space = spaces.Box(-2.0, 2.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def _obs(self) -> np.ndarray:
        return self.position.astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position, self.t = np.array([START, 0.0]), 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.position = np.clip(self.position + STEP * np.clip(action, -1, 1), -2, 2)
        self.t += 1
        collides = bool((np.linalg.norm(self.position - OBSTACLES, axis=1) < RADIUS).any())
        arrives = bool(self.position[0] >= GOAL) and not collides
        return self._obs(), float(arrives), collides or arrives, self.t >= 60, dict(is_success=arrives)


def demonstrations(n_episodes: int, seed: int) -> Demonstrations:
    """Episodes that take each of the three ways in turn, with noise."""
    rng, env = np.random.default_rng(seed), AvoidingEnv()
    observations: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    lengths: list[int] = []
    while len(lengths) < n_episodes:
        way = np.array([0.0, WAYS[len(lengths) % len(WAYS)]])
        obs, _ = env.reset()
        episode: list[tuple[np.ndarray, np.ndarray]] = []
        done = False
        while not done:
            target = way if obs[0] < -0.25 else np.array([GOAL + 0.2, way[1] if obs[0] < 0.25 else 0.0])
            direction = (target - obs) / np.linalg.norm(target - obs)
            action = np.clip(0.9 * direction + 0.15 * rng.standard_normal(2), -1, 1).astype(np.float32)
            episode.append((obs, action))
            obs, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
        if info["is_success"]:
            observations += [obs for obs, _ in episode]
            actions += [action for _, action in episode]
            lengths.append(len(episode))
    return Demonstrations(np.array(observations), np.array(actions), np.array(lengths))


def clone(prediction_type: str, n_epochs: int, seed: int) -> DPPO:
    """A policy that imitates the demonstrations: a diffusion policy ("epsilon") or a Gaussian one ("mean")."""
    chain = dict(denoising_steps=20) if prediction_type == "epsilon" else dict(denoising_steps=1)
    policy_kwargs = dict(
        horizon=HORIZON, prediction_type=prediction_type, net_arch=[256, 256, 256], activation_fn="mish", **chain
    )
    model = DPPO(
        "DiffusionMlpPolicy",
        make_vec_env(AvoidingEnv, 8, seed=seed),
        act_steps=ACT_STEPS,
        n_steps=120,
        learning_rate=1e-4,
        policy_kwargs=policy_kwargs,
        seed=seed,
        device="cpu",
    )
    BC(model, demonstrations(150, seed), batch_size=128, learning_rate=1e-3).train(n_epochs)
    return model


def episodes(model: DPPO, n: int) -> tuple[list[np.ndarray], float]:
    """Paths of n episodes with the noise of exploration, and how many of them arrive."""
    envs = [AvoidingEnv() for _ in range(n)]
    obs = np.stack([env.reset()[0] for env in envs])
    paths: list[list[np.ndarray]] = [[row.copy()] for row in obs]
    done, arrived, state = np.zeros(n, dtype=bool), 0, None
    while not done.all():
        actions, state = model.predict(obs, state, deterministic=False)
        for i in np.flatnonzero(~done):
            obs[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
            paths[i].append(obs[i].copy())
            done[i], arrived = terminated or truncated, arrived + int(reward)
    return [np.array(path) for path in paths], arrived / n


def picture(models: dict[str, DPPO], n_episodes: int) -> Figure:
    """Their episodes, side by side."""
    from matplotlib.patches import Circle

    figure = Figure(figsize=(4.5 * len(models), 3.9), layout="constrained")
    panels: Any = figure.subplots(1, len(models), squeeze=False, sharex=True, sharey=True)[0]
    for panel, (title, model) in zip(panels, models.items(), strict=True):
        paths, success = episodes(model, n_episodes)
        for path in paths:
            panel.plot(path[:, 0], path[:, 1], color="tab:blue", alpha=0.35, linewidth=0.9)
        for center in OBSTACLES:
            panel.add_patch(Circle(tuple(center), RADIUS, color="tab:red", alpha=0.6))
        panel.axvline(GOAL, color="tab:green", linestyle="--")
        panel.set_title(f"{title}: {success:.0%} arrive")
        panel.set_xlabel("x")
        panel.set_aspect("equal")
        panel.set_xlim(START - 0.1, GOAL + 0.2)
        panel.set_ylim(-1.25, 1.25)
    panels[0].set_ylabel("y")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", default="avoiding.png")
    parser.add_argument("--epochs", type=int, default=400, help="of behaviour cloning")
    parser.add_argument("--finetune", type=int, default=0, help="env steps of DPPO after it")
    parser.add_argument("--episodes", type=int, default=60, help="to draw")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kinds = {"diffusion policy": "epsilon", "Gaussian policy": "mean"}
    models = {title: clone(kind, args.epochs, args.seed) for title, kind in kinds.items()}
    for model in models.values() if args.finetune else ():
        model.learn(args.finetune)
    picture(models, args.episodes).savefig(args.output, dpi=130)
    print(f"Saved {args.output}")


if __name__ == "__main__":
    main()
