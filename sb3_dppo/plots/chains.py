"""What a denoising chain does: the iterates of many chunks for one observation, from noise to action."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from sb3_dppo.dppo import DPPO
from sb3_dppo.features.observations import take


def iterates(model: DPPO, obs: Any, n_chunks: int, seed: int = 0) -> np.ndarray:
    """
    :param model: The model.
    :param obs: One observation of its env.
    :param n_chunks: Chunks to sample, as in evaluation, with random noise.
    :param seed: Seed of the noise.
    :return: The first executable action of each iterate, in normalised action space, shape (K'+1, n_chunks, Da).
    """
    policy = model.policy
    policy.set_training_mode(False)
    batch, _ = policy.obs_to_tensor(obs)
    generator = th.Generator(device=policy.device).manual_seed(seed)
    repeated = take(batch, th.zeros(n_chunks, dtype=th.long, device=policy.device))
    chain = policy.sample_chain(repeated, deterministic=True, noise=policy.draw_noise(n_chunks, generator)).chain
    return chain[:, :, policy.sampler.first_action].transpose(0, 1).cpu().numpy()


def observation_of(env: gym.Env, model: DPPO, n_steps: int, seed: int) -> Any:
    """What is observed after that many steps of the model, or fewer if the episode ends."""
    obs, _ = env.reset(seed=seed)
    state = None
    for _ in range(n_steps):
        action, state = model.predict(obs, state, deterministic=True)
        following, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
        obs = following
    return obs


def plot_chains(chains: Mapping[str, np.ndarray], dims: tuple[int, int]) -> Figure:
    """
    :param chains: Iterates of :func:`iterates`, by title. The last ones that all of them have are shown.
    :param dims: The two action dimensions to show.
    :return: A panel for each: every iterate as a point, coloured by its step, and the paths of a few chunks.
    """
    figure = Figure(figsize=(4.6 * len(chains) + 0.9, 4.4), layout="constrained")
    panels: Any = figure.subplots(1, len(chains), squeeze=False, sharex=True, sharey=True)[0]
    n_iterates = min(len(values) for values in chains.values())
    for panel, (title, values) in zip(panels, chains.items(), strict=True):
        values = values[-n_iterates:]
        n_chunks = values.shape[1]
        x, y = values[..., dims[0]], values[..., dims[1]]
        panel.plot(x[:, :12], y[:, :12], color="0.6", linewidth=0.6, zorder=1)
        steps = np.repeat(np.arange(n_iterates), n_chunks)
        points = panel.scatter(
            x.ravel(), y.ravel(), c=steps, s=7, cmap="viridis", vmin=0, vmax=n_iterates - 1, alpha=0.7, linewidths=0, zorder=2
        )
        panel.add_patch(Rectangle((-1, -1), 2, 2, fill=False, edgecolor="black", linewidth=1, zorder=3))  # the action space
        panel.set_title(title)
        panel.set_xlabel(f"action[{dims[0]}], normalised")
        panel.set_aspect("equal")
    panels[0].set_ylabel(f"action[{dims[1]}], normalised")
    bar: Any = figure.colorbar(
        points, ax=list(panels), label=f"denoising steps done, of the last {n_iterates - 1}", shrink=0.8
    )
    bar.solids.set_alpha(1)
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    return figure
