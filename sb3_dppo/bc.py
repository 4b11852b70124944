"""Behaviour cloning: supervised pre-training of a model's denoiser on demonstrations."""

import argparse
import ast
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from pydoc import locate
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, unwrap_vec_wrapper
from tqdm.rich import tqdm

from sb3_dppo.demonstrations.demonstrations import (
    SOURCES,
    Demonstrations,
    add_source_options,
    load_from_options,
    stacking_axis,
)
from sb3_dppo.demonstrations.rows import Rows, is_image
from sb3_dppo.dppo import DPPO
from sb3_dppo.features.extractors import EXTRACTORS
from sb3_dppo.features.observations import part_name, parts_of_space, vector_keys
from sb3_dppo.policies import PAPER_POLICY_KWARGS


class BC:
    """
    Behaviour cloning of a diffusion policy: AdamW, a cosine learning rate and an exponential moving average (EMA) of the
    weights (Ren et al. 2024, appendix D; Chi et al. 2023). The ranges of the demonstrations' vectors and actions become the
    policy's normalisation. Observations are read one minibatch at a time.

    :param model: The model whose policy to train.
    :param demonstrations: What to imitate.
    :param batch_size: Chunks in a minibatch.
    :param learning_rate: Learning rate at the beginning; it goes to zero along a cosine.
    :param weight_decay: AdamW's weight decay.
    :param ema_decay: Decay of the EMA, which is also warmed up: min(ema_decay, (1 + t) / (10 + t)) at its update t.
    :param ema_update_every: Gradient steps between two updates of the EMA.
    :param eval_env: Where to evaluate the EMA of the policy during training, or ``None``.
    :param n_eval_episodes: Episodes of an evaluation.
    :param eval_freq: Epochs between two evaluations.
    :raises ValueError: if the demonstrations don't fit the model's env.
    """

    def __init__(
        self,
        model: DPPO,
        demonstrations: Demonstrations,
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
        self.n_stack, self.axes = self._check_demonstrations()
        self.first, chunks = demonstrations.chunks(model.policy.horizon)
        self.chunks = th.as_tensor(chunks, dtype=th.float, device=model.device)

    def _check_demonstrations(self) -> tuple[int, dict[str, tuple[int, ...]]]:
        """
        :return: How many frames the model's env stacks, and by key the axes of the demonstrations' observations in the order
            in which the env has them.
        :raises ValueError: if the demonstrations can't be of that env.
        """
        demonstrations, model = self.demonstrations, self.model
        parts, env_parts = demonstrations.parts, parts_of_space(model.observation_space)
        missing = [key for key in env_parts if key not in parts]
        if missing:
            have = "a single array" if "" in parts else f"a Dict of {sorted(parts)}"
            wanted = "a single array" if missing == [""] else f"a Dict of {sorted(env_parts)}"
            example = "['NAME']" if missing == [""] else f"{{{', '.join(f'{key!r}: NAME' for key in env_parts)}}}"
            raise ValueError(
                f"demonstrations have as observations {have}, but the model's env {wanted}"
                f"{'' if missing == [''] else f', so that {missing} are missing'}: choose with load_demonstrations' obs_keys, "
                f"such as {example}."
            )
        n_stack = self._n_stack(next(iter(env_parts)))
        axes = {key: matching_axes(key, parts[key], space, n_stack) for key, space in env_parts.items()}
        if demonstrations.actions.shape[1] != model.policy.action_dim:
            raise ValueError(
                f"demonstrations have actions of size {demonstrations.actions.shape[1]}, but the model's env has "
                f"{model.policy.action_dim}: they are of another env."
            )
        low, high = (bound.flatten() for bound in (model.action_space.low, model.action_space.high))  # type: ignore[attr-defined]
        slack = 1e-3 * (high - low)
        outside = ((demonstrations.actions < low - slack) | (demonstrations.actions > high + slack)).any(axis=1)
        if outside.any():
            raise ValueError(
                f"demonstrations have {outside.sum()} actions outside the bounds of the model's env, the first in transition "
                f"{outside.argmax()}: they are of another env, or normalised (see load_demonstrations' normalization)."
            )
        self._check_env_id()
        return n_stack, axes

    def _n_stack(self, key: str) -> int:
        """
        :param key: A key of the observations.
        :return: How many frames the model's env stacks; without an env, how many of the demonstrations' fit into the model's.
        """
        env = self.model.get_env()
        if env is not None:
            stacked = unwrap_vec_wrapper(env, VecFrameStack)
            return 1 if stacked is None else stacked.stacked_obs.n_stack  # type: ignore[attr-defined]
        shape = parts_of_space(self.model.observation_space)[key].shape
        assert shape is not None
        return max(1, math.prod(shape) // math.prod(self.demonstrations.parts[key].shape[1:]))

    def _check_env_id(self) -> None:
        env_id, env = self.demonstrations.env_id, self.model.get_env()
        spec = None if env is None or not env.has_attr("spec") else env.get_attr("spec", 0)[0]
        if env_id is None or spec is None or spec.id == env_id:
            return
        if spec.id.rpartition("-v")[0] != env_id.rpartition("-v")[0]:
            raise ValueError(f"demonstrations are of {env_id}, but the model's env is {spec.id}.")
        warnings.warn(f"The demonstrations are of {env_id}, another version of the model's env {spec.id}.", stacklevel=3)

    def _set_normalization(self) -> None:
        """
        Give the policy the ranges of the demonstrations, per frame where frames are stacked.
        """
        vec_normalize = self.model.get_vec_normalize_env()
        if vec_normalize is not None and vec_normalize.norm_obs:
            warnings.warn(
                "The model's env is wrapped in VecNormalize, but demonstrations are of the env's own observations, which the "
                "policy normalises itself: use VecNormalize(norm_obs=False).",
                stacklevel=4,
            )
        actions = self.demonstrations.actions
        self.model.policy.normalizer.set_ranges(
            self._extreme(np.min), self._extreme(np.max), actions.min(axis=0), actions.max(axis=0)
        )

    def _extreme(self, extreme: Callable[..., np.ndarray]) -> np.ndarray:
        """
        :param extreme: NumPy's minimum or maximum.
        :return: That of the demonstrations' vectors, as the policy takes it.
        """
        values = {
            key: np.concatenate([extreme(np.asarray(self.demonstrations.parts[key]), axis=0)] * self.n_stack, axis=-1)
            for key in vector_keys(self.model.observation_space)
        }
        return values[""] if "" in values else np.concatenate([np.empty(0), *(value.ravel() for value in values.values())])

    def _observations(self, index: np.ndarray) -> Any:
        """
        :param index: Which chunks, shape (B,).
        :return: The observations before them, as the policy takes them. Only these are read.
        """
        tensors = {}
        for key, space in parts_of_space(self.model.observation_space).items():
            values = self.demonstrations.stacked_observations(self.first[index], self.n_stack, key)
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
        :param log_interval: Epochs between two logs.
        :return: The model.
        """
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        if n_epochs < 1:
            raise ValueError(f"n_epochs={n_epochs} must be at least 1.")
        self._set_normalization()
        policy, n_chunks = self.model.policy, len(self.chunks)
        chunks = policy.normalizer.normalize_actions(self.chunks)
        n_batches = max(1, round(n_chunks / self.batch_size))
        parameters = list(policy.optimizer.param_groups[0]["params"])
        optimizer = th.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)
        lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=n_epochs * n_batches)
        ema = EMAModel(parameters, decay=self.ema_decay)
        logger = self._logger()
        policy.set_training_mode(True)
        try:
            for epoch in tqdm(range(1, n_epochs + 1), desc="BC", unit="epoch", disable=not progress_bar):
                losses = []
                for step, index in enumerate(th.randperm(n_chunks).tensor_split(n_batches)):
                    loss = policy.bc_loss(self._observations(index.numpy()), chunks[index.to(chunks.device)])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    lr_scheduler.step()
                    losses.append(loss.detach())
                    if step % self.ema_update_every == 0:
                        ema.step(parameters)
                if self.eval_env is not None and (epoch % self.eval_freq == 0 or epoch == n_epochs):
                    self._evaluate(ema, parameters, logger)
                if epoch % log_interval == 0:
                    logger.record("bc/epoch", epoch)
                    logger.record("bc/loss", th.stack(losses).mean().item())
                    logger.record("bc/learning_rate", lr_scheduler.get_last_lr()[0])
                    logger.dump(epoch)
        finally:
            ema.copy_to(parameters)
            policy.update_base_denoiser()
            policy.make_optimizers(self.model.lr_schedule(1))
            policy.set_training_mode(False)
            self.model.pretrained_on_demonstrations = True
            self.model.n_rollouts = 0
        return self.model

    def _evaluate(self, ema: Any, parameters: list[th.nn.Parameter], logger: Logger) -> None:
        """
        Log the return of the EMA of the policy.

        :param ema: diffusers' ``EMAModel``.
        :param parameters: The parameters that are trained.
        :param logger: Where to log.
        """
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


def matching_axes(key: str, rows: Rows, space: spaces.Space, n_stack: int) -> tuple[int, ...]:
    """
    :param key: Key of the observations, for errors.
    :param rows: The demonstrations' observations under this key, shape (N, ...).
    :param space: The model's space of them.
    :param n_stack: Frames that the model's env stacks.
    :return: The axes of a row in the order of the space: images may have their channels first or last.
    :raises ValueError: if the demonstrations can't be of that space.
    """
    name = part_name(key)
    if not isinstance(space, spaces.Box):
        check_categories(name, np.asarray(rows), space)
        return tuple(range(rows.ndim - 1))
    if is_image_space(space) != is_image(rows):
        of_demonstrations = "images (uint8)" if is_image(rows) else f"numbers ({rows.dtype}) of shape {rows.shape[1:]}"
        of_env = "images (uint8, 0 to 255)" if is_image_space(space) else f"numbers ({space.dtype})"
        raise ValueError(
            f"demonstrations have {name} that are {of_demonstrations}, but the model's env has {of_env} of shape "
            f"{space.shape}."
        )
    stacked = list(rows.shape)
    stacked[stacking_axis(rows)] *= n_stack
    orders = [(0, 1, 2), (2, 0, 1), (1, 2, 0)] if is_image(rows) else [tuple(range(rows.ndim - 1))]
    for axes in orders:
        if tuple(stacked[1 + axis] for axis in axes) == space.shape:
            return axes
    hint = ""
    if is_image(rows):
        hint = ". Channels may be first or last, but the size must be the same: see gymnasium.wrappers.ResizeObservation"
    raise ValueError(
        f"demonstrations have {name} of shape {rows.shape[1:]}, but the model's env has {space.shape}, {n_stack} frame(s): "
        f"they are of another env{hint}."
    )


def check_categories(name: str, values: np.ndarray, space: spaces.Space) -> None:
    """
    :param name: What messages call the observations.
    :param values: The demonstrations' observations, shape (N, ...).
    :param space: The model's space of them, ``Discrete``, ``MultiDiscrete`` or ``MultiBinary``.
    :raises ValueError: if they are of another shape or no numbers of categories.
    """
    n_categories: Any = space.n if isinstance(space, spaces.Discrete) else getattr(space, "nvec", 2)
    if values.shape[1:] != (space.shape or (1,)):
        raise ValueError(f"demonstrations have {name} of shape {values.shape[1:]}, but the model's env has {space}.")
    if ((values % 1 != 0) | (values < 0) | (values >= n_categories)).any():
        raise ValueError(f"demonstrations have {name} from {values.min()} to {values.max()}, but the model's env has {space}.")


def main() -> None:
    """
    The command line: pre-train a policy and save it, as ``rl_zoo3.train --algo dppo -i`` takes it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_dppo.bc", description="Pre-train a diffusion policy on demonstrations."
    )
    parser.add_argument("--env", required=True, help="Gymnasium id of the environment")
    parser.add_argument("--demos", required=True, help=SOURCES)
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
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    returns = demonstrations.returns
    print(
        f"{len(demonstrations)} transitions, {demonstrations.n_episodes} episodes"
        + ("" if returns is None else f", return {returns.mean():.0f} ± {returns.std():.0f}")
    )
    policy_kwargs = dict(PAPER_POLICY_KWARGS)
    if args.policy in ("DiffusionUnetPolicy", "DiffusionTransformerPolicy"):
        del policy_kwargs["net_arch"]  # widths of an MLP
    model = DPPO(
        args.policy,
        args.env,
        policy_kwargs={**policy_kwargs, **_parse(args.policy_kwargs)},
        verbose=1,
        seed=args.seed,
        device=args.device,
        tensorboard_log=args.tensorboard_log,
        **_parse(args.hyperparams),
    )
    try:
        BC(model, demonstrations, batch_size=args.batch_size, learning_rate=args.learning_rate).train(
            args.epochs, log_interval=max(1, args.epochs // 5)
        )
    except KeyboardInterrupt:
        print("Interrupted: saving what was learned so far")
    model.save(output)
    print(f"Saved {output}")
    if args.eval_episodes > 0:
        assert model.env is not None
        # Other seeds than training: the env's generator goes on from an unrelated one.
        model.env.seed(10_000 + (args.seed or 0))
        mean, std = evaluate_policy(model, model.env, args.eval_episodes)
        print(f"Mean reward: {mean:.2f} +/- {std:.2f} over {args.eval_episodes} episodes")


def _parse(items: list[str]) -> dict[str, Any]:
    """
    :param items: "key:value" strings, values being Python literals, plain words or for classes their names.
    :return: The dictionary that they mean.
    """
    parsed: dict[str, Any] = {}
    for item in items:
        key, _, value = item.partition(":")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = getattr(th.nn, value) if key.endswith("activation_fn") else value
            if key == "features_extractor_class":
                parsed[key] = EXTRACTORS.get(value) or locate(value)
                if parsed[key] is None:
                    raise ValueError(
                        f"{key}={value!r} is not the full name of a class, such as sb3_dppo.features.extractors.VitExtractor."
                    ) from None
    return parsed


if __name__ == "__main__":
    main()
