"""Behaviour cloning: supervised pre-training of a model's denoiser on demonstrations."""

import argparse
import ast
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc import locate
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.envs.registration import parse_env_id
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, unwrap_vec_wrapper
from tqdm.rich import tqdm

from sb3_dppo.demonstrations.demonstrations import Demonstrations, are_constant
from sb3_dppo.demonstrations.loading import add_source_options, load_demonstrations, load_from_options, sources
from sb3_dppo.demonstrations.matching import check_actions, match_observations
from sb3_dppo.dppo import DPPO
from sb3_dppo.features.extractors import EXTRACTORS
from sb3_dppo.features.observations import parts_of_space, vector_keys
from sb3_dppo.policies import PAPER_POLICY_KWARGS
from sb3_dppo.runs.faults import has_attr

if TYPE_CHECKING:
    from minari import MinariDataset


class BC:
    """
    Behaviour cloning of a diffusion policy: AdamW, a cosine learning rate and an exponential moving average (EMA) of the
    weights (Ren et al. 2024, appendix D; Chi et al. 2023). The ranges of the demonstrations' vectors and actions become the
    policy's normalisation. Observations are read one minibatch at a time.

    :param model: The model whose policy to train.
    :param demonstrations: What to imitate: demonstrations, or what :func:`~sb3_dppo.load_demonstrations` takes.
    :param batch_size: Chunks in a minibatch, about: an epoch is split into nearly equal ones.
    :param learning_rate: Learning rate at the beginning; it goes to zero along a cosine.
    :param weight_decay: AdamW's weight decay.
    :param ema_decay: Decay of the EMA, which is also warmed up: min(ema_decay, (1 + t) / (10 + t)) at its update t.
    :param ema_update_every: Gradient steps between two updates of the EMA. It is also updated after the last step.
    :param eval_env: Where to evaluate the EMA of the policy during training, or ``None``.
    :param n_eval_episodes: Episodes of an evaluation.
    :param eval_freq: Epochs between two evaluations.
    :raises TypeError: if the model is another algorithm's.
    :raises ValueError: if a number is below 1, or if the demonstrations don't fit the model's env.
    """

    def __init__(
        self,
        model: DPPO,
        demonstrations: "Demonstrations | str | Path | Sequence[Any] | MinariDataset",
        *,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-6,
        ema_decay: float = 0.995,
        ema_update_every: int = 10,
        eval_env: gym.Env | VecEnv | None = None,
        n_eval_episodes: int = 10,
        eval_freq: int = 10,
    ) -> None:
        if not isinstance(model, DPPO):
            raise TypeError(f"model={type(model).__name__} must be a DPPO, whose policy is a diffusion policy.")
        if not isinstance(demonstrations, Demonstrations):
            demonstrations = load_demonstrations(demonstrations)
        self.model = model
        self.demonstrations = demonstrations
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.ema_decay = ema_decay
        self.ema_update_every = ema_update_every
        self.eval_env = eval_env
        self.n_eval_episodes = n_eval_episodes
        self.eval_freq = eval_freq
        for name in ("batch_size", "ema_update_every", "n_eval_episodes", "eval_freq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        env = model.get_env()
        frames = None if env is None else unwrap_vec_wrapper(env, VecFrameStack)
        # Without an env nothing says how many frames it stacks.
        n_stack = None if env is None else 1 if frames is None else frames.stacked_obs.n_stack  # type: ignore[attr-defined]
        self.n_stack, self.axes = match_observations(demonstrations, model.observation_space, n_stack)
        check_actions(demonstrations, model.action_space)  # type: ignore[arg-type]
        self._check_env_id()
        self.first_action = model.policy.sampler.first_action
        self.episode_starts = np.repeat(demonstrations.starts, demonstrations.traj_lengths)
        # The transition at which each chunk's first executed action is.
        length = model.policy.horizon - self.first_action
        self.first = demonstrations.chunk_starts(length)
        short = demonstrations.traj_lengths[demonstrations.traj_lengths < length]
        if len(short) > 0:
            warnings.warn(
                f"{len(short)} of {demonstrations.n_episodes} episodes ({short.sum()} transitions) are left out: they are "
                f"shorter than a chunk of {length} actions (horizon={model.policy.horizon}).",
                stacklevel=2,
            )

    def _check_env_id(self) -> None:
        env_id, env = self.demonstrations.env_id, self.model.get_env()
        spec = None if env is None or not has_attr(env, "spec") else env.get_attr("spec", 0)[0]
        if env_id is None or spec is None or spec.id == env_id:
            return
        if _without_version(spec.id) != _without_version(env_id):
            raise ValueError(
                f"demonstrations are of {env_id}, but the model's env is {spec.id}. If they fit all the same: "
                "dataclasses.replace(demonstrations, env_id=None)."
            )
        warnings.warn(f"The demonstrations are of {env_id}, another version of the model's env {spec.id}.", stacklevel=3)

    def _set_normalization(self) -> None:
        """Give the policy the ranges of the demonstrations, per frame where frames are stacked."""
        vec_normalize = self.model.get_vec_normalize_env()
        if vec_normalize is not None and vec_normalize.norm_obs:
            warnings.warn(
                "The model's env is wrapped in VecNormalize, but demonstrations are of the env's own observations, which the "
                "policy normalises itself: use VecNormalize(norm_obs=False).",
                stacklevel=3,
            )
        actions = self.demonstrations.actions
        low, high = actions.min(axis=0), actions.max(axis=0)
        constant = np.flatnonzero(are_constant(low, high)).tolist()
        if constant:
            warnings.warn(
                f"Actions {constant} (from 0) never change in the demonstrations: the policy will keep them where they are, "
                "in fine-tuning, too.",
                stacklevel=3,
            )
        # Not in set_ranges: what an imported policy was trained with has to stay as it is.
        obs_low, obs_high = self._extreme(np.min), self._extreme(np.max)
        self.model.policy.normalizer.set_ranges(
            obs_low, np.where(are_constant(obs_low, obs_high), obs_low, obs_high), low, high
        )

    def _extreme(self, extreme: Callable[..., np.ndarray]) -> np.ndarray:
        """The minimum or maximum of the demonstrations' vectors, as the policy takes it."""
        values = {
            key: np.concatenate([extreme(np.asarray(self.demonstrations.parts[key]), axis=0)] * self.n_stack, axis=-1)
            for key in vector_keys(self.model.observation_space, self.model.policy.normalize_images)
        }
        return values[""] if "" in values else np.concatenate([np.empty(0), *(value.ravel() for value in values.values())])

    def _observations(self, index: np.ndarray) -> Any:
        """The observations before some transitions, as the policy takes them. Only these are read."""
        tensors = {}
        for key, space in parts_of_space(self.model.observation_space).items():
            values = self.demonstrations.stacked_observations(index, self.n_stack, key)
            values = np.transpose(values, (0, *(axis + 1 for axis in self.axes[key])))
            values = np.ascontiguousarray(values).reshape(len(index), *(space.shape or ()))
            dtype = th.uint8 if is_image_space(space) else th.float
            tensors[key] = th.as_tensor(values, dtype=dtype, device=self.model.device)
        return tensors[""] if "" in tensors else tensors

    def train(self, n_epochs: int, progress_bar: bool = True, log_interval: int = 1) -> DPPO:
        """
        Train the denoiser. Its EMA ends up in the model's denoiser and base denoiser, also after an interruption, and the
        optimisers of the model start anew.

        :param n_epochs: Passes over the demonstrations.
        :param progress_bar: Display a progress bar.
        :param log_interval: Epochs between two logs; there is one after every evaluation and after the last epoch, too.
        :return: The model.
        """
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        if n_epochs < 1:
            raise ValueError(f"n_epochs={n_epochs} must be at least 1.")
        self._set_normalization()
        policy, steps_ahead = self.model.policy, np.arange(self.model.policy.horizon) - self.first_action
        actions = th.as_tensor(self.demonstrations.actions, dtype=th.float, device=policy.device)
        actions = policy.normalizer.normalize_actions(actions)
        n_batches = max(1, round(len(self.first) / self.batch_size))
        step, n_steps = 0, n_epochs * n_batches
        parameters = list(policy.optimizer.param_groups[0]["params"])
        optimizer = th.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)
        lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=n_steps)
        ema = EMAModel(parameters, decay=self.ema_decay)
        logger = self._logger()
        policy.set_training_mode(True)
        bar = tqdm(total=n_steps, desc="BC", unit="step", disable=not progress_bar)
        try:
            for epoch in range(1, n_epochs + 1):
                losses = []
                for batch in th.randperm(len(self.first)).tensor_split(n_batches):
                    index = self.first[batch.numpy()]
                    # A chunk of actions is put together when it is used: all of them would be Tp times the actions. Before an
                    # episode's first action there are copies of it, as there are of its first observation.
                    rows = np.maximum(index[:, None] + steps_ahead, self.episode_starts[index][:, None])
                    loss = policy.bc_loss(self._observations(index), actions[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    lr_scheduler.step()
                    losses.append(loss.detach())
                    step += 1
                    bar.update()
                    if step % self.ema_update_every == 0 or step == n_steps:
                        ema.step(parameters)
                evaluates = self.eval_env is not None and (epoch % self.eval_freq == 0 or epoch == n_epochs)
                if evaluates:
                    self._evaluate(ema, parameters, logger)
                if evaluates or epoch % log_interval == 0 or epoch == n_epochs:
                    logger.record("bc/epoch", epoch)
                    logger.record("bc/loss", th.stack(losses).mean().item())
                    logger.record("bc/learning_rate", lr_scheduler.get_last_lr()[0])
                    logger.dump(epoch)
        finally:
            bar.close()
            if step < n_steps:  # interrupted
                ema.step(parameters)
            ema.copy_to(parameters)
            policy.update_base_denoiser()
            policy.make_optimizers(self.model.lr_schedule(1))
            policy.set_training_mode(False)
            self.model.pretrained_on_demonstrations = True
            policy.configure_sampler(self.model._sampler_config())
            self.model.n_rollouts = 0
        return self.model

    def _evaluate(self, ema: Any, parameters: list[th.nn.Parameter], logger: Logger) -> None:
        """Log the return of the EMA of the policy."""
        assert self.eval_env is not None
        policy = self.model.policy
        ema.store(parameters)
        ema.copy_to(parameters)
        # The base denoiser runs the first steps, so it must follow.
        policy.update_base_denoiser()
        mean, std = evaluate_policy(self.model, self.eval_env, self.n_eval_episodes, warn=False)
        ema.restore(parameters)
        policy.set_training_mode(True)
        logger.record("eval/mean_reward", mean)
        logger.record("eval/std_reward", std)

    def _logger(self) -> Logger:
        if self.model._custom_logger:
            return self.model.logger
        return configure_logger(self.model.verbose, self.model.tensorboard_log, "BC")


def _without_version(env_id: str) -> Any:
    try:
        return parse_env_id(env_id)[:2]
    except gym.error.Error:  # a file may hold anything
        return env_id


def main() -> None:
    """
    The command line: pre-train a policy and save it, as ``rl_zoo3.train --algo dppo -i`` takes it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_dppo.bc", description="Pre-train a diffusion policy on demonstrations."
    )
    parser.add_argument("--env", required=True, help="Gymnasium id of the environment")
    parser.add_argument("--demos", required=True, help=sources())
    add_source_options(parser)
    parser.add_argument("-o", "--output", required=True, help="zip file to write")
    parser.add_argument("--policy", default="DiffusionMlpPolicy")
    parser.add_argument(
        "--policy-kwargs", nargs="+", default=[], metavar="KEY:VALUE", help="such as horizon:8; the paper's settings otherwise"
    )
    parser.add_argument("-params", "--hyperparams", nargs="+", default=[], metavar="KEY:VALUE", help="arguments of DPPO")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eval-episodes", type=int, default=20, help="episodes of the final evaluation, 0 for none")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-threads", type=int, default=0, help="threads for PyTorch, 0 for its default")
    parser.add_argument("-tb", "--tensorboard-log", default=None)
    args = parser.parse_args()
    if args.num_threads > 0:
        th.set_num_threads(args.num_threads)
    output = Path(args.output)
    if output.suffix != ".zip":
        parser.error(f"--output {output} must end in .zip")
    output.parent.mkdir(parents=True, exist_ok=True)

    try:
        demonstrations = load_from_options(args.demos, args)
        print(demonstrations.summary)
        bc = _behaviour_cloning(demonstrations, args)
    except (ValueError, TypeError, ImportError, gym.error.Error) as error:
        parser.error(str(error))
    try:
        bc.train(args.epochs, log_interval=max(1, args.epochs // 5))
    except KeyboardInterrupt:
        print("Interrupted: saving what was learned so far")
    model = bc.model
    model.save(output)
    print(f"Saved {output}")
    if args.eval_episodes > 0:
        assert model.env is not None
        # Other seeds than training: the env's generator goes on from an unrelated one.
        model.env.seed(10_000 + (args.seed or 0))
        mean, std = evaluate_policy(model, model.env, args.eval_episodes)
        print(f"Mean reward: {mean:.2f} +/- {std:.2f} over {args.eval_episodes} episodes")


def _behaviour_cloning(demonstrations: Demonstrations, args: argparse.Namespace) -> BC:
    """What the arguments of the command line ask for."""
    policy_kwargs: dict[str, Any] = dict(PAPER_POLICY_KWARGS)
    if args.policy in ("DiffusionUnetPolicy", "DiffusionTransformerPolicy"):
        del policy_kwargs["net_arch"]  # widths of an MLP
    for name, value in _parse(args.policy_kwargs).items():
        paper = policy_kwargs.get(name)
        policy_kwargs[name] = {**paper, **value} if isinstance(paper, dict) and isinstance(value, dict) else value
    model = DPPO(
        args.policy,
        args.env,
        policy_kwargs=policy_kwargs,
        verbose=1,
        seed=args.seed,
        device=args.device,
        tensorboard_log=args.tensorboard_log,
        **_parse(args.hyperparams),
    )
    return BC(model, demonstrations, batch_size=args.batch_size, learning_rate=args.learning_rate)


def _parse(items: list[str]) -> dict[str, Any]:
    """What "key:value" strings mean: values are Python literals, plain words or for classes their names."""
    parsed: dict[str, Any] = {}
    for item in items:
        key, colon, value = item.partition(":")
        if not colon:
            raise ValueError(f"{item!r} must be KEY:VALUE.")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            if any(bracket in value for bracket in "([{"):
                raise ValueError(f"{item!r}: the value must be a Python literal, such as {{'pi': [64, 64]}}.") from None
            parsed[key] = getattr(th.nn, value, value) if key.endswith("activation_fn") else value
            if key == "features_extractor_class":
                parsed[key] = EXTRACTORS.get(value) or locate(value)
                if parsed[key] is None:
                    raise ValueError(
                        f"{key}={value!r} is not the full name of a class, such as sb3_dppo.features.extractors.VitExtractor."
                    ) from None
    return parsed


if __name__ == "__main__":
    main()
