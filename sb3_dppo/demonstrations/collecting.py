"""Recording demonstrations of a policy."""

import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from tqdm import tqdm

from sb3_dppo.demonstrations.demonstrations import Demonstrations
from sb3_dppo.demonstrations.episodes import Episodes, check_recordable
from sb3_dppo.runs.faults import are_finite

# observation, state, whether an episode starts -> action, state; as ``predict`` of a model
Predict = Callable[[Any, Any, np.ndarray], tuple[np.ndarray, Any]]


class EpisodeError(RuntimeError):
    """
    An episode failed after others were complete; its cause is ``__cause__``.

    :param message: What happened.
    :param demonstrations: The complete episodes.
    """

    def __init__(self, message: str, demonstrations: Demonstrations) -> None:
        super().__init__(message)
        self.demonstrations = demonstrations


def collect_demonstrations(
    env: gym.Env,
    predict: Predict,
    n_episodes: int,
    seed: int | None = None,
    progress_bar: bool = True,
    successes_only: bool = False,
) -> Demonstrations:
    """
    Record episodes of a policy. An interruption (Ctrl+C) keeps the episodes that are complete, and so does an error.

    :param env: The env, whose own observations are recorded, images as they are: with a ``Box`` of actions and observations
        of numbers, or a ``Dict`` of such ones.
    :param predict: The policy, called as ``predict(observation, state, episode_start)``: it gives the action and the next
        state, as ``predict`` of a model does. Actions are clipped to the env's bounds.
    :param n_episodes: Number of episodes to keep.
    :param seed: Episode i is reset with ``seed + i``; ``None`` for a random one.
    :param progress_bar: Display a progress bar.
    :param successes_only: Keep an episode only if its last ``info["is_success"]`` is true, however many others it takes.
    :return: The demonstrations.
    :raises ValueError: for an env with other spaces, actions of another shape, values that are not finite, or
        ``successes_only`` where ``info`` has no ``is_success``.
    :raises EpisodeError: for any error after the first episode, with the complete ones.
    """
    if n_episodes < 1:
        raise ValueError(f"n_episodes={n_episodes} must be at least 1.")
    if not isinstance(env.action_space, spaces.Box):
        raise ValueError(f"Actions must be arrays of numbers, but the env's action space is {env.action_space}, not a Box.")
    check_recordable(env.observation_space, "the env")
    episodes, returns, n_played = Episodes(unpack_images=True), list[float](), 0
    bar = tqdm(total=n_episodes, desc="collect", unit="episode", disable=not progress_bar)
    try:
        while len(returns) < n_episodes:
            columns, last_info = _record_episode(env, predict, None if seed is None else seed + n_played)
            n_played += 1
            if not successes_only or _is_success(last_info):
                episodes.append(columns)
                returns.append(columns["rewards"].sum())
                bar.update()
            shown = {"success": f"{len(returns) / n_played:.0%}"} if successes_only else {"return": f"{np.mean(returns):.2f}"}
            bar.set_postfix(shown)
    except KeyboardInterrupt:
        if not returns:
            raise
        print(f"Interrupted: keeping {len(returns)} complete episodes", file=sys.stderr)
    except Exception as error:
        if not returns:
            raise
        complete = _put_together(episodes, env)
        raise EpisodeError(f"episode {n_played + 1} failed: {error} ({len(returns)} are complete)", complete) from error
    finally:
        bar.close()
    return _put_together(episodes, env)


def _put_together(episodes: Episodes, env: gym.Env) -> Demonstrations:
    return Demonstrations(
        observations=episodes.observations(),
        traj_lengths=np.array(episodes.lengths),
        env_id=None if env.spec is None else env.spec.id,
        rewards=episodes.column("rewards", np.float32),
        **{name: episodes.column(name) for name in ("actions", "terminals", "truncations")},
    )


def _is_success(info: dict[str, Any]) -> bool:
    if "is_success" not in info:
        raise ValueError(
            f"successes_only=True needs info['is_success'], but the env's info holds {sorted(info)}: leave it out."
        )
    return bool(info["is_success"])


def _record_episode(env: gym.Env, predict: Predict, seed: int | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns of an episode, as :class:`~sb3_dppo.demonstrations.episodes.Episodes` takes them, and its last info."""
    space: Any = env.action_space
    rows: dict[str, list[Any]] = {"actions": []}
    obs, state, done = env.reset(seed=seed)[0], None, False
    while not done:
        action, state = predict(obs, state, np.array([not rows["actions"]]))
        action = np.asarray(action)
        if action.shape != space.shape:
            raise ValueError(f"The policy's action has the shape {action.shape}, but the env's are of shape {space.shape}.")
        action = np.clip(action, space.low, space.high).astype(space.dtype)
        # Copies: an env may give the same array again.
        row: dict[str, Any] = {
            f"obs/{key}": np.array(value) for key, value in (obs if isinstance(obs, dict) else {"": obs}).items()
        }
        row["actions"] = action.copy()
        obs, reward, terminated, truncated, info = env.step(action)
        row |= dict(rewards=float(reward), terminals=bool(terminated), truncations=bool(truncated))
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
        done = terminated or truncated
    columns = {name: np.array(values) for name, values in rows.items()}
    for name, values in columns.items():
        if not are_finite(values).all():
            raise ValueError(f"{name.rstrip('/')} of an episode are NaN or infinite (seed {seed}).")
    return columns, info
