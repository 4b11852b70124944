"""``python -m sb3_dppo.demonstrations``: inspect, convert and collect demonstrations."""

import argparse
import importlib
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_dppo.demonstrations.collecting import EpisodeError, Predict, collect_demonstrations
from sb3_dppo.demonstrations.demonstrations import Demonstrations, are_constant, check_output
from sb3_dppo.demonstrations.loading import add_source_options, load_from_options, sources
from sb3_dppo.demonstrations.rows import is_image, rows_at_once
from sb3_dppo.features.observations import part_name


def describe(demonstrations: Demonstrations) -> str:
    """Numbers, lengths, returns and ranges, in a few lines."""
    n, lengths, returns = len(demonstrations), demonstrations.traj_lengths, demonstrations.returns
    flags = dict(terminated=demonstrations.terminals, truncated=demonstrations.truncations)
    last = demonstrations.starts + lengths - 1
    ends = [f"{np.count_nonzero(values[last])} {word}" for word, values in flags.items() if values is not None]
    lines = [
        f"env           {demonstrations.env_id or 'unknown'}",
        f"episodes      {demonstrations.n_episodes}",
        f"transitions   {n}",
        f"lengths       min {lengths.min()}, mean {lengths.mean():.1f}, max {lengths.max()}",
        "returns       unknown, there are no rewards"
        if returns is None
        else f"returns       {returns.mean():.2f} ± {returns.std():.2f}, min {returns.min():.2f}, max {returns.max():.2f}",
        f"last steps    {', '.join(ends) or 'unknown, there are no flags'}",
    ]
    constant: list[str] = []
    columns = {part_name(key): rows for key, rows in demonstrations.parts.items()}
    for name, rows in (columns | dict(actions=demonstrations.actions)).items():
        if is_image(rows):
            sample = rows[np.unique(np.linspace(0, n - 1, rows_at_once(rows)).astype(int))]
            lines.append(f"{name}, images of shape {rows.shape[1:]}, {rows.dtype}")
            lines.append(f"  {sample.min()} to {sample.max()}, mean {sample.mean():.1f}, in a sample of {len(sample)}")
            continue
        values = np.asarray(rows).reshape(n, -1)
        low, high = values.min(axis=0), values.max(axis=0)
        lines.append(f"{name}, {values.shape[1]} columns (min, max)")
        lines += [f"  {i:4d}  {low[i]:12.5g}  {high[i]:12.5g}" for i in range(values.shape[1])]
        constant += [f"{name}[{i}]" for i in np.flatnonzero(are_constant(low, high))]
    lines.append(f"constant      {', '.join(constant) or 'none'}")
    return "\n".join(lines)


def _predict_of_model(env: gym.Env, args: argparse.Namespace) -> Predict:
    """A saved model as a policy, of which ``args`` name the file, and how it acts."""
    from rl_zoo3.utils import ALGOS
    from stable_baselines3.common.utils import check_for_correct_spaces
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    from sb3_dppo.dppo import DPPO

    algos: dict[str, Any] = {**ALGOS, "dppo": DPPO}
    algo = args.algo or "dppo"
    if algo not in algos:
        raise ValueError(f"algo={algo!r} must be one of {sorted(algos)}.")
    for name, path in (("model", args.model), ("vec-normalize", args.vec_normalize)):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{name}={path!r} does not exist.")
    model = algos[algo].load(args.model, device=args.device)
    # As the model's own env was wrapped: with the channels of images first.
    check_for_correct_spaces(model._wrap_env(env, monitor_wrapper=False), model.observation_space, model.action_space)
    if args.seed is not None:
        model.set_random_seed(args.seed)
    # What is recorded are the env's own observations; the model alone sees normalised ones.
    normalizer = None
    if args.vec_normalize is not None:
        normalizer = VecNormalize.load(args.vec_normalize, DummyVecEnv([lambda: env]))

    def predict(obs: Any, state: Any, episode_start: np.ndarray) -> tuple[np.ndarray, Any]:
        seen = obs if normalizer is None else normalizer.normalize_obs(obs)
        return model.predict(seen, state, episode_start, deterministic=args.deterministic)

    return predict


def _predict_of_function(name: str) -> Predict:
    """A function of the observation, named as "module:function", as a policy."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"policy={name!r} must be module:function.")
    act = getattr(importlib.import_module(module), function, None)
    if not callable(act):
        raise ValueError(f"policy={name!r}: module {module} has no function {function!r}.")
    return lambda obs, state, episode_start: (act(obs), None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sb3_dppo.demonstrations", description="Inspect, convert and collect demonstrations."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("path", help=sources())
    add_source_options(source)
    commands.add_parser("inspect", parents=[source], help="print numbers, lengths, returns and ranges")
    convert = commands.add_parser("convert", parents=[source], help="write an .npz file")
    convert.add_argument("output", help=".npz file to write, or minari:ID")
    convert.add_argument("--max-episodes", type=int, help="keep the first ones only")
    collect = commands.add_parser("collect", help="record episodes of a policy")
    collect.add_argument("--env", required=True, help="Gymnasium id of the environment")
    policy = collect.add_mutually_exclusive_group(required=True)
    policy.add_argument("--model", help="zip file of a saved model")
    policy.add_argument("--policy", metavar="MODULE:FUNCTION", help="a function of the observation that gives the action")
    collect.add_argument("--algo", help="RL Zoo's name of the model's algorithm (default: dppo)")
    collect.add_argument("--vec-normalize", help="vecnormalize.pkl that the model was trained with")
    collect.add_argument("--deterministic", action="store_true", help="the model acts deterministically")
    collect.add_argument("--device", default="auto", help="device of the model")
    collect.add_argument("--n-episodes", type=int, required=True)
    collect.add_argument("--seed", type=int, help="of the first episode; those after count up")
    collect.add_argument("--successes-only", action="store_true", help="keep episodes that end with info['is_success']")
    collect.add_argument("-o", "--output", required=True, help=".npz file to write, or minari:ID")
    return parser


def _env_and_policy(args: argparse.Namespace) -> tuple[gym.Env, Predict]:
    """The env and the policy that the arguments of ``collect`` name."""
    if args.n_episodes < 1:
        raise ValueError(f"n-episodes={args.n_episodes} must be at least 1.")
    if args.policy is not None and (args.algo is not None or args.vec_normalize is not None or args.deterministic):
        raise ValueError("algo, vec-normalize and deterministic are for a model, not for a policy.")
    try:
        env = gym.make(args.env)
    except gym.error.Error as error:
        raise ValueError(f"env={args.env!r} can't be made ({error}).") from error
    return env, _predict_of_model(env, args) if args.policy is None else _predict_of_function(args.policy)


def main() -> None:
    """The command line."""
    parser = _parser()
    args = parser.parse_args()
    try:
        if args.command != "inspect":
            check_output(args.output)  # before the work, not after
        if args.command == "collect":
            env, predict = _env_and_policy(args)
        else:
            demonstrations = load_from_options(args.path, args)
        if args.command == "convert" and args.max_episodes is not None:
            demonstrations = demonstrations.first(args.max_episodes)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    if args.command == "inspect":
        print(describe(demonstrations))
        return
    if args.command == "collect":
        # Not in the try: an error of the policy's own comes with its traceback.
        try:
            demonstrations = collect_demonstrations(
                env, predict, args.n_episodes, args.seed, successes_only=args.successes_only
            )
        except EpisodeError as error:
            error.demonstrations.save(args.output)
            print(f"Saved the complete episodes to {args.output}: {error.demonstrations.summary}")
            raise
        env.close()
    demonstrations.save(args.output)
    print(f"Saved {args.output}: {demonstrations.summary}")


if __name__ == "__main__":
    main()
