"""The algorithm: rollouts of decisions, and the policy update over their denoising steps."""

import difflib
import inspect
import io
import math
import pathlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import (
    FloatSchedule,
    LinearSchedule,
    explained_variance,
    obs_as_tensor,
    update_learning_rate,
)
from stable_baselines3.common.vec_env import VecEnv

from sb3_dppo.buffers import (
    DenoisingRolloutBuffer,
    DenoisingRolloutBufferSamples,
    RewardScaler,
    equal_slices,
    mean_log_prob,
    mean_over_executed,
)
from sb3_dppo.diffusion.acceleration import CPU_SLICE_SIZE, keep_freed_memory
from sb3_dppo.diffusion.process import gaussian_log_prob
from sb3_dppo.features.observations import check_observation_space, stack, take
from sb3_dppo.policies import (
    DiffusionActorCriticPolicy,
    DiffusionCnnPolicy,
    DiffusionMlpPolicy,
    DiffusionMultiInputPolicy,
    DiffusionTransformerPolicy,
    DiffusionUnetPolicy,
    check_action_space,
)
from sb3_dppo.runs.checkpoints import RunState
from sb3_dppo.runs.faults import ON_BAD_ENV, EnvGuard, check_finite, interruptible
from sb3_dppo.runs.files import atomic_write

SelfDPPO = TypeVar("SelfDPPO", bound="DPPO")

SAMPLER_ARGUMENTS = (
    "act_steps",
    "scheduler",
    "inference_steps",
    "eta",
    "learn_eta",
    "eta_range",
    "ft_denoising_steps",
    "min_logprob_std",
    "noise_clip",
    "deterministic_noise",
    "compile",
    "precision",
)


class DPPO(OnPolicyAlgorithm):
    """
    Diffusion Policy Policy Optimization (DPPO): PPO on the denoising steps of a diffusion policy.

    Paper: https://arxiv.org/abs/2409.00588 (Ren et al. 2024)

    A *decision* is a chunk of actions denoised from one observation; it is the transition that GAE sees. Each of its
    fine-tuned denoising steps is a Gaussian action of PPO, with the decision's advantage. ``total_timesteps`` and
    ``n_steps`` count env steps. The defaults are for learning from scratch; for fine-tuning see the documentation.

    :param policy: The policy model to use ("DiffusionMlpPolicy", "DiffusionCnnPolicy", "DiffusionMultiInputPolicy",
        "DiffusionUnetPolicy", "DiffusionTransformerPolicy" or a class)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of the actor, it can be a function of the current progress remaining (from 1 to 0)
    :param critic_learning_rate: Learning rate of the critic, likewise; a string such as "lin_1e-3" means a linear schedule
    :param lr_decay: What both learning rates are multiplied by on the way to the end: "constant" for 1, "linear" or "cosine"
        for a factor that goes to zero
    :param lr_warmup: Fraction of training in which they first rise linearly from zero
    :param n_steps: Env steps per env and rollout, a multiple of ``act_steps``
    :param batch_size: (decision, denoising step) pairs in a minibatch, about: an epoch is split into nearly equal ones
    :param n_epochs: Number of epochs when optimising the surrogate loss
    :param gamma: Discount factor of a decision that lasts ``act_steps`` env steps; of a shorter one,
        γ^(its length / act_steps)
    :param gamma_denoising: Discount of the advantage per denoising step that is still to come
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator, per decision
    :param clip_range: Clipping parameter at the last denoising step, it can be a function of the current progress remaining.
        Log-probabilities are averaged over action dimensions, so ratios stay closer to 1 than in PPO; a clip fraction of
        0.1 to 0.2 is worth aiming at.
    :param clip_range_base: Clipping parameter at the noisiest fine-tuned step; ``None`` means ``clip_range`` at every step
    :param clip_range_rate: How sharply the clipping parameter grows between them, exponentially; 0 is linear
    :param clip_range_vf: Clipping parameter for the value function, or ``None``. It depends on the reward scaling.
    :param normalize_advantage: Whether to normalise the advantage over each minibatch
    :param advantage_quantiles: Clamp advantages between these two quantiles of the minibatch
    :param ent_coef: Coefficient of the mean of η, which keeps a learned one (``learn_eta``) from getting small
    :param vf_coef: Value function coefficient for the loss calculation
    :param bc_coef: Coefficient of the log-probability, under the current policy, of chains sampled from the base policy
    :param kl_coef: Coefficient of the KL divergence of the denoising steps from the base policy's, per action dimension
    :param max_grad_norm: The maximum value for the gradient clipping, of actor and critic separately, or ``None``
    :param target_kl: Stop the epochs of an update, before the step, when the approximate KL divergence exceeds this. It is a
        mean per action dimension, 1e-5 to 1e-3 in good runs: the usual 0.01 to 0.03 of PPO never stops anything here.
    :param critic_warmup: First rollouts of the model, or after behaviour cloning, on which only the critic is trained
    :param scale_rewards: Whether to divide the decisions' rewards by the running std of their discounted return
    :param shuffle: "pairs" draws minibatches from all pairs, "decisions" keeps the pairs of a decision together, so that its
        features are extracted once. ``None`` means "decisions" if the features extractor has parameters, else "pairs".
    :param act_steps: Ta, the actions of a chunk that are executed before planning again. ``None`` means the policy's
        ``horizon``.
    :param scheduler: "ddpm", "ddim" or another diffusers scheduler whose steps are Gaussian with a mean that is affine in the
        sample and the denoiser's output: itself, its name, or its configuration (a mapping with ``_class_name``)
    :param inference_steps: S, denoising steps that are run: ``None`` for all, for DDIM a divisor of ``denoising_steps``, for
        another scheduler what it can run
    :param eta: DDIM's η when exploring
    :param learn_eta: DDIM only: learn η, from ``eta`` on, one for each action dimension ("action") or as a function of the
        observation ("state"); ``None``: it stays
    :param eta_range: Bounds of a learned η
    :param eta_learning_rate: Learning rate of η, which has an optimiser of its own, likewise a number or a function
    :param eta_update_interval: Gradient steps of the actor between two of η
    :param ft_denoising_steps: K', the last denoising steps, which are fine-tuned. The others run the frozen pre-trained
        policy.
        ``None`` means all.
    :param ft_denoising_anneal: Two numbers (n, d): after every n rollouts ``ft_denoising_steps`` decreases by d, down to 1,
        the denoiser as it is then becomes the base policy, which runs all steps before, and the optimisers start anew.
        ``None``: it stays.
    :param min_sampling_std: Floor of each denoising step's std when exploring, in normalised action space [-1, 1]; it can be a
        function of the current progress remaining, or a string such as "lin_0.1"
    :param min_logprob_std: Floor of the std in log-probabilities
    :param noise_clip: Clamp of the standard normal noise of each denoising step
    :param deterministic_noise: The noise of ``predict(deterministic=True)``: "observation" (a pseudo-random function of the
        observation), "zero" (none) or "random" (drawn anew each time, as the paper's evaluations do)
    :param n_accumulate: Slices of a minibatch whose gradients are accumulated one after the other, for the same result in less
        memory. ``None`` means one on a GPU, and on a CPU as many as keep a slice within its caches.
    :param compile: ``True`` compiles denoising with ``torch.compile``: up to a minute at the first calls, then faster for
        small batches; without a C++ compiler it changes nothing. "auto" runs it as CUDA graphs on a GPU and as it is on a CPU.
    :param precision: Of the networks: "float32", "tf32" (on CUDA) or "bfloat16". Chains, log-probabilities and losses are
        computed in float32 in any case.
    :param on_bad_env: What to do when an env returns NaN or infinity: "raise" an error, or "reset" this env and treat its
        episode as truncated after the last good observation. Resets are logged as ``rollout/bad_env_resets``.
    :param pretrained: Path of a saved model whose policy to start from. Its ``policy_kwargs`` replace those given here.
    :param rollout_buffer_class: Rollout buffer class to use. ``None`` means ``DenoisingRolloutBuffer``.
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation, see
        :class:`~sb3_dppo.policies.DiffusionActorCriticPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: naming the argument, for settings or an env that don't fit
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "DiffusionMlpPolicy": DiffusionMlpPolicy,
        "DiffusionCnnPolicy": DiffusionCnnPolicy,
        "DiffusionMultiInputPolicy": DiffusionMultiInputPolicy,
        "DiffusionUnetPolicy": DiffusionUnetPolicy,
        "DiffusionTransformerPolicy": DiffusionTransformerPolicy,
    }
    policy: DiffusionActorCriticPolicy
    rollout_buffer: DenoisingRolloutBuffer  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[DiffusionActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        critic_learning_rate: float | str | Schedule = 1e-3,
        lr_decay: str = "constant",
        lr_warmup: float = 0.0,
        n_steps: int = 512,
        batch_size: int = 256,
        n_epochs: int = 5,
        gamma: float = 0.999,
        gamma_denoising: float = 0.9,
        gae_lambda: float = 0.98,
        clip_range: float | Schedule = 0.1,
        clip_range_base: float | None = None,
        clip_range_rate: float = 3.0,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        advantage_quantiles: tuple[float, float] = (0.0, 1.0),
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        bc_coef: float = 0.0,
        kl_coef: float = 0.0,
        max_grad_norm: float | None = None,
        target_kl: float | None = None,
        critic_warmup: int = 0,
        scale_rewards: bool = True,
        shuffle: str | None = None,
        act_steps: int | None = None,
        scheduler: Any = "ddpm",
        inference_steps: int | None = None,
        eta: float = 1.0,
        learn_eta: str | None = None,
        eta_range: tuple[float, float] = (0.1, 1.0),
        eta_learning_rate: float | str | Schedule = 1e-3,
        eta_update_interval: int = 1,
        ft_denoising_steps: int | None = None,
        ft_denoising_anneal: tuple[int, int] | None = None,
        min_sampling_std: float | str | Schedule = 0.2,
        min_logprob_std: float = 0.2,
        noise_clip: float = 3.0,
        deterministic_noise: str = "observation",
        n_accumulate: int | None = None,
        compile: bool | str = "auto",
        precision: str = "float32",
        on_bad_env: str = "raise",
        pretrained: str | None = None,
        rollout_buffer_class: type[DenoisingRolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if env is not None:
            env = maybe_make_env(env, verbose)
            check_action_space(env.action_space)
            if isinstance(env.observation_space, spaces.Tuple):
                check_observation_space(env.observation_space, None)
        if not isinstance(policy, str) and not issubclass(policy, DiffusionActorCriticPolicy):
            raise ValueError(f"policy={policy.__name__} is not a diffusion policy: choose one of {list(self.policy_aliases)}.")
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,  # type: ignore[arg-type]
            use_sde=False,
            sde_sample_freq=-1,
            rollout_buffer_class=rollout_buffer_class,  # type: ignore[arg-type]
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        # As given: a file is loaded with other settings by replacing these, so what follows from them is kept elsewhere.
        self.critic_learning_rate = critic_learning_rate
        self.lr_decay = lr_decay
        self.lr_warmup = lr_warmup
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.gamma_denoising = gamma_denoising
        self.clip_range = clip_range
        self.clip_range_base = clip_range_base
        self.clip_range_rate = clip_range_rate
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.advantage_quantiles = advantage_quantiles
        self.bc_coef = bc_coef
        self.kl_coef = kl_coef
        self.target_kl = target_kl
        self.critic_warmup = critic_warmup
        self.scale_rewards = scale_rewards
        self.shuffle = shuffle
        self.act_steps = act_steps
        self.scheduler = scheduler
        self.inference_steps = inference_steps
        self.eta = eta
        self.learn_eta = learn_eta
        self.eta_range = eta_range
        self.eta_learning_rate = eta_learning_rate
        self.eta_update_interval = eta_update_interval
        self.ft_denoising_steps = ft_denoising_steps
        self.ft_denoising_anneal = ft_denoising_anneal
        self.min_sampling_std = min_sampling_std
        self.min_logprob_std = min_logprob_std
        self.noise_clip = noise_clip
        self.deterministic_noise = deterministic_noise
        self.n_accumulate = n_accumulate
        self.compile = compile
        self.precision = precision
        self.on_bad_env = on_bad_env

        self.n_rollouts = 0
        self.n_bad_env_resets = 0
        # RL Zoo's plug-in reads it in saved files, to choose hyperparameters.
        self.pretrained_on_demonstrations = False
        self.reward_scaler = RewardScaler()
        # The start of the rollout under way, from which a file that is saved now goes on.
        self._rollout_start: RunState | None = None
        # In files, and in a model that was loaded from one, until it learns.
        self._run_state: RunState | None = None

        params = None if pretrained is None else self._read_pretrained(pretrained)
        if _init_setup_model:
            self._setup_model()
            self._check_training_arguments()
            if params is not None:
                self.policy.load_state_dict(params)

    # ------------------------------------------------------------------ setup

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = make_schedule("learning_rate", self.learning_rate)

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self._critic_lr_schedule = make_schedule("critic_learning_rate", self.critic_learning_rate)
        self._eta_lr_schedule = make_schedule("eta_learning_rate", self.eta_learning_rate)
        self._clip_range = make_schedule("clip_range", self.clip_range)
        self._clip_range_vf = None if self.clip_range_vf is None else make_schedule("clip_range_vf", self.clip_range_vf)
        self._min_sampling_std = make_schedule("min_sampling_std", self.min_sampling_std)
        self.set_random_seed(self.seed)
        if self.device.type == "cpu":
            keep_freed_memory()
        for name in {*SAMPLER_ARGUMENTS, "min_sampling_std"} & set(self.policy_kwargs):
            raise ValueError(
                f"policy_kwargs[{name!r}]: {name} is an argument of DPPO itself: pass {name}={self.policy_kwargs[name]!r}."
            )
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            min_sampling_std=max(0.0, self._min_sampling_std(self._current_progress_remaining)),
            **{name: getattr(self, name) for name in SAMPLER_ARGUMENTS},
            **self.policy_kwargs,
        ).to(self.device)
        self._make_rollout_buffer()

    def _make_rollout_buffer(self) -> None:
        buffer_class: type[DenoisingRolloutBuffer] = self.rollout_buffer_class or DenoisingRolloutBuffer  # type: ignore[assignment]
        self.rollout_buffer = buffer_class(
            self.n_steps,
            self.observation_space,
            self.action_space,
            horizon=self.policy.horizon,
            act_steps=self.policy.act_steps,
            ft_denoising_steps=self.policy.ft_denoising_steps,
            device=self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
            **self.rollout_buffer_kwargs,
        )

    def _read_pretrained(self, path: str) -> dict[str, th.Tensor]:
        """
        Take over the architecture of a saved model.

        :param path: Path of the model.
        :return: The state dict of its policy.
        :raises ValueError: if it is of another policy class or of an env with other spaces.
        """
        data, params, _ = load_from_zip_file(path, device=self.device)
        if not data or "policy_class" not in data:
            raise ValueError(f"pretrained={path!r} is not a saved DPPO model.")
        if data["policy_class"].__name__ != self.policy_class.__name__:
            raise ValueError(
                f"pretrained={path!r} holds a {data['policy_class'].__name__}, not a {self.policy_class.__name__}: "
                f"pass policy={data['policy_class'].__name__!r}."
            )
        for name in ("observation_space", "action_space"):
            if data[name] != getattr(self, name):
                raise ValueError(f"pretrained={path!r} was made for the {name} {data[name]}, not for {getattr(self, name)}.")
        for name, value in self.policy_kwargs.items():
            if name not in data["policy_kwargs"] or data["policy_kwargs"][name] != value:
                warnings.warn(
                    f"policy_kwargs[{name!r}]={value} is ignored: the architecture is that of pretrained={path!r}.",
                    stacklevel=3,
                )
        self.policy_kwargs = data["policy_kwargs"]
        self.pretrained_on_demonstrations = data.get("pretrained_on_demonstrations", False)
        return params["policy"]  # type: ignore[return-value]

    def _check_training_arguments(self) -> None:
        """
        Check what only matters for training: a loaded model may have another number of envs, or never be trained.

        :raises ValueError: naming the argument.
        """
        act_steps = self.policy.act_steps
        if self.n_steps < 1 or self.n_steps % act_steps != 0:
            raise ValueError(
                f"n_steps={self.n_steps} must be a multiple of act_steps={act_steps}, because all envs plan together every "
                f"act_steps env steps: use {max(1, round(self.n_steps / act_steps)) * act_steps}."
            )
        if self.shuffle not in (None, "pairs", "decisions"):
            raise ValueError(f"shuffle={self.shuffle!r} is unknown: choose 'pairs', 'decisions' or None.")
        for name in ("batch_size", "n_epochs", "n_accumulate", "eta_update_interval"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.on_bad_env not in ON_BAD_ENV:
            raise ValueError(f"on_bad_env={self.on_bad_env!r} is unknown: choose 'raise' or 'reset'.")
        if self.lr_decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"lr_decay={self.lr_decay!r} is unknown: choose 'constant', 'linear' or 'cosine'.")
        if not 0 <= self.lr_warmup < 1:
            raise ValueError(f"lr_warmup={self.lr_warmup} must be at least 0 and below 1: it is a fraction of training.")
        if self.ft_denoising_anneal is not None and min(self.ft_denoising_anneal) < 1:
            raise ValueError(
                f"ft_denoising_anneal={self.ft_denoising_anneal} must be two positive numbers: after how many rollouts, each "
                "time, and by how many steps ft_denoising_steps decreases."
            )
        if not 0 < self.gamma_denoising <= 1:
            raise ValueError(f"gamma_denoising={self.gamma_denoising} must be above 0 and at most 1.")
        low, high = self.advantage_quantiles
        if not 0 <= low < high <= 1:
            raise ValueError(f"advantage_quantiles={self.advantage_quantiles} must be two numbers with 0 <= low < high <= 1.")

    def _warn_about_training_arguments(self) -> None:
        """
        Warn of settings that work but are probably not meant.
        """
        act_steps = self.policy.act_steps
        n_pairs = self.n_envs * (self.n_steps // act_steps) * self.policy.ft_denoising_steps
        if self.batch_size > n_pairs:
            warnings.warn(
                f"batch_size={self.batch_size} is more than the {n_pairs} pairs of a rollout (n_envs={self.n_envs} × "
                f"n_steps={self.n_steps} / act_steps={act_steps} × ft_denoising_steps={self.policy.ft_denoising_steps}): "
                "each epoch is one minibatch.",
                stacklevel=3,
            )
        n_base_steps = self.policy.first_ft_position
        if n_base_steps > 0 and not self.pretrained_on_demonstrations:
            warnings.warn(
                f"ft_denoising_steps={self.policy.ft_denoising_steps}: the first {n_base_steps} denoising steps run the base "
                "denoiser, which was never trained on demonstrations and is not trained now. Pre-train it (BC), or leave "
                "ft_denoising_steps=None.",
                stacklevel=3,
            )
        if self._vec_normalize_env is not None:
            if self._vec_normalize_env.norm_reward and self.scale_rewards:
                warnings.warn(
                    "Rewards are scaled twice, by VecNormalize and by scale_rewards=True: "
                    "use VecNormalize(norm_reward=False) or scale_rewards=False.",
                    stacklevel=3,
                )
            if self._vec_normalize_env.norm_obs and self.policy.normalizes_observations:
                warnings.warn(
                    "VecNormalize changes the observations of a policy that normalises them itself, with the ranges of its "
                    "demonstrations: use VecNormalize(norm_obs=False).",
                    stacklevel=3,
                )

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed the generators of Python, NumPy, PyTorch, the env, the action space and the policy.

        :param seed: The seed; ``None`` leaves everything as it is.
        """
        super().set_random_seed(seed)
        if seed is not None and hasattr(self, "policy"):
            self.policy.seed(seed)

    # ------------------------------------------------------------------ rollouts

    def learn(
        self: SelfDPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "DPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDPPO:
        """
        Return a trained model.

        :param total_timesteps: Env steps to train on, a lower bound: rollouts are completed
        :param callback: Callback(s) called at every env step with state of the algorithm
        :param log_interval: Rollouts between two logs
        :param tb_log_name: The name of the run for TensorBoard logging
        :param reset_num_timesteps: Whether to reset the number of timesteps, used in logging and schedules
        :param progress_bar: Display a progress bar using tqdm and rich
        :return: The trained model
        """
        if self.env is None:
            raise ValueError("The model has no env to learn in: pass env to DPPO.load(path, env=env), or call set_env(env).")
        self._check_training_arguments()
        self._warn_about_training_arguments()
        with interruptible(self._describe_interruption), EnvGuard(self):
            return super().learn(
                total_timesteps=int(total_timesteps),
                callback=callback,
                log_interval=log_interval,
                tb_log_name=tb_log_name,
                reset_num_timesteps=reset_num_timesteps,
                progress_bar=progress_bar,
            )

    def _describe_interruption(self) -> str:
        """
        :return: Where training is, for the one who interrupts it.
        """
        where = f"Training was interrupted after {self.num_timesteps} env steps"
        if self._rollout_start is None:
            return f"{where}, in an update: a model saved now holds a part of it. Checkpoints go on exactly."
        return f"{where}, in a rollout: a model saved now goes on exactly at the start of this rollout, as a checkpoint does."

    def describe_env_step(self) -> str:
        """
        :return: Which env step is being made, for errors.
        """
        return f"after env step {self.num_timesteps // self.n_envs + 1} (num_timesteps={self.num_timesteps})"

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The last rollout may go beyond the total: schedules end at 0 and not below, where learning rates would be negative.
        self._current_progress_remaining = max(0.0, 1.0 - num_timesteps / total_timesteps)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, BaseCallback]:
        run_state, self._run_state, self._rollout_start = self._run_state, None, None
        if run_state is not None and not reset_num_timesteps:
            run_state.restore(self)
        total_timesteps, callback = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
        if run_state is not None and not reset_num_timesteps:
            # After ``total_timesteps`` was counted from where the file was saved: what was collected of its rollout is
            # collected again.
            self.num_timesteps = self._num_timesteps_at_start = run_state.num_timesteps
        assert self._last_episode_starts is not None
        if self._last_episode_starts.all():
            self.reward_scaler.forget_episodes(self.n_envs)
        return total_timesteps, callback

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: DenoisingRolloutBuffer,  # type: ignore[override]
        n_rollout_steps: int,
    ) -> bool:
        """
        Collect decisions with the current policy and fill the rollout buffer.

        :param env: The training environment
        :param callback: Callback that will be called at each env step (and at the beginning and end of the rollout)
        :param rollout_buffer: Buffer to fill
        :param n_rollout_steps: Env steps per env
        :return: Whether the rollout was completed: ``False`` if a callback stopped it
        """
        assert self._last_obs is not None, "No previous observation was provided"
        self._rollout_start = RunState.of(self)
        self.policy.set_training_mode(False)
        self.policy.min_sampling_std = self._min_sampling_std(self._current_progress_remaining)
        rollout_buffer.reset()
        act_steps = self.policy.act_steps
        chunks = self.policy.empty_chunks(env.num_envs, self.policy.horizon)
        n_executed = np.zeros(env.num_envs, dtype=np.int64)
        dones = np.zeros(env.num_envs, dtype=bool)

        callback.on_rollout_start()

        for n_steps in range(n_rollout_steps):
            # All envs plan at common boundaries, and those whose episode has just ended in between.
            planning = np.ones_like(dones) if n_steps % act_steps == 0 else dones
            if planning.any():
                chunks[planning] = self._plan(np.flatnonzero(planning), rollout_buffer)
                n_executed[planning] = 0
            actions = chunks[np.arange(env.num_envs), n_executed]
            n_executed += 1

            new_obs, rewards, dones, infos = env.step(actions)
            # Again, for wrappers may have made it out of finite numbers.
            when = self.describe_env_step()
            check_finite("observation", new_obs, when)
            check_finite("reward", rewards, when)
            self.num_timesteps += env.num_envs

            # Give access to local variables
            callback.update_locals(locals())
            if not callback.on_step():
                self.reward_scaler.forget_episodes(env.num_envs)  # These decisions are dropped.
                return False

            self._update_info_buffer(infos, dones)
            rollout_buffer.add_rewards(rewards)
            self._end_episodes(dones, infos, rollout_buffer)
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones

        with th.no_grad():
            last_values = self.policy.predict_values(obs_as_tensor(self._last_obs, self.device))  # type: ignore[arg-type]
        if self.scale_rewards:
            rollout_buffer.scale_rewards(self.reward_scaler)
        rollout_buffer.compute_returns_and_advantage(last_values)
        if self.on_bad_env == "reset":
            self.logger.record("rollout/bad_env_resets", self.n_bad_env_resets)

        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _plan(self, env_index: np.ndarray, rollout_buffer: DenoisingRolloutBuffer) -> np.ndarray:
        """
        Make a decision in some envs.

        :param env_index: Which envs, shape (B,).
        :param rollout_buffer: Where to keep it.
        :return: Chunks for the envs, shape (B, Tp, *action_space.shape).
        """
        obs = obs_as_tensor(take(self._last_obs, env_index), self.device)  # type: ignore[arg-type]
        sampled = self.policy.sample_chain(obs)
        actions = self.policy.unnormalize_actions(sampled.actions)
        # After the actions have left a GPU, so that it works while the envs step.
        with th.no_grad():
            values = self.policy.predict_values(obs)
        rollout_buffer.add(env_index, obs, sampled.chain, sampled.log_prob, values)
        return actions

    def _end_episodes(self, dones: np.ndarray, infos: list[dict[str, Any]], rollout_buffer: DenoisingRolloutBuffer) -> None:
        """
        Tell the buffer which episodes have ended, with the value of the last observation of those that were truncated.

        :param dones: Which episodes have ended, shape (n_envs,).
        :param infos: What the envs said of the last step.
        :param rollout_buffer: The buffer.
        """
        ended = np.flatnonzero(dones)
        if len(ended) == 0:
            return
        bootstrap_values = np.zeros(len(ended))
        truncated = [i for i, env_index in enumerate(ended) if infos[env_index].get("TimeLimit.truncated", False)]
        if truncated:
            last_obs = stack([infos[ended[i]]["terminal_observation"] for i in truncated])
            with th.no_grad():
                values = self.policy.predict_values(obs_as_tensor(last_obs, self.device))  # type: ignore[arg-type]
            bootstrap_values[truncated] = values.cpu().numpy().flatten()
        rollout_buffer.end_episodes(ended, bootstrap_values)

    # ------------------------------------------------------------------ update

    def loss(self, samples: DenoisingRolloutBufferSamples) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        The update rule: clipped policy loss over denoising steps, value loss over decisions (Ren et al. 2024, section 4).

        :param samples: A minibatch.
        :return: The loss, and metrics that stay on the device: "policy_gradient_loss", "value_loss", "approx_kl",
            "clip_fraction", "ratio", "bc_loss", "base_kl" and "eta".
        """
        return self._loss(samples, self._pair_advantages(samples), len(samples.decision_index), len(samples.value_index))

    def _loss(
        self, samples: DenoisingRolloutBufferSamples, advantages: th.Tensor, n_pairs: int, n_values: int
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        What some pairs and decisions of a minibatch contribute to its loss and metrics, which are the sums of all parts.

        :param samples: Part of a minibatch.
        :param advantages: Advantages of its pairs, shape (N,).
        :param n_pairs: Pairs of the whole minibatch.
        :param n_values: Decisions of the critic in the whole minibatch.
        :return: Contribution to the loss and to the metrics.
        """
        policy, denoising_index = self.policy, samples.denoising_index
        features = self._pair_features(samples)
        eta = policy.eta if policy.learn_eta is None else policy.learned_eta(features)
        mean = policy.pair_mean(policy.denoiser, policy.encode(features), samples.chain_prev, denoising_index, eta)
        log_prob = gaussian_log_prob(samples.chain_next, mean, policy.pair_std(denoising_index, eta))
        log_ratio = mean_log_prob(log_prob, samples.n_executed[samples.decision_index]) - samples.old_log_prob
        ratio = log_ratio.exp()

        clip_range = self._clip_ranges()[denoising_index]
        clipped_ratio = th.clamp(ratio, 1 - clip_range, 1 + clip_range)
        policy_loss = -th.min(advantages * ratio, advantages * clipped_ratio).sum() / n_pairs
        value_loss = th.zeros_like(policy_loss)
        if len(samples.value_index) > 0:
            value_loss = self._value_errors(samples).sum() / n_values
        mean_eta = (eta.mean() if isinstance(eta, th.Tensor) else th.full_like(policy_loss, eta)) * (len(ratio) / n_pairs)
        loss = policy_loss + self.vf_coef * value_loss - self.ent_coef * mean_eta

        bc_loss = th.zeros_like(policy_loss)
        if self.bc_coef > 0:
            bc_loss = self._bc_losses(samples).sum() / (n_pairs * policy.ft_denoising_steps)
            loss = loss + self.bc_coef * bc_loss
        base_kl = th.zeros_like(policy_loss)
        if self.kl_coef > 0:
            base_kl = self._base_kls(samples, mean, eta).sum() / n_pairs
            loss = loss + self.kl_coef * base_kl
        with th.no_grad():
            metrics = dict(
                policy_gradient_loss=policy_loss.detach(),
                value_loss=value_loss.detach(),
                # k3 in Schulman's "Approximating KL Divergence": unbiased, and never negative.
                approx_kl=((ratio - 1) - log_ratio).sum() / n_pairs,
                clip_fraction=((ratio - 1).abs() > clip_range).sum() / n_pairs,
                ratio=ratio.sum() / n_pairs,
                bc_loss=bc_loss.detach(),
                base_kl=base_kl.detach(),
                eta=mean_eta.detach(),
            )
        return loss, metrics

    def _pair_features(
        self, samples: DenoisingRolloutBufferSamples, features_extractor: BaseFeaturesExtractor | None = None
    ) -> th.Tensor:
        """
        :param samples: A minibatch.
        :param features_extractor: Which extractor to use; ``None`` means the actor's.
        :return: The observation features of each pair, shape (N, features_dim).
        """
        index, n_steps = samples.decision_index, self.policy.ft_denoising_steps
        if self.shuffle_mode == "pairs":
            return self.policy.extract_features(take(samples.observations, index), features_extractor)
        # Pairs of a decision stand together, so that features are extracted once for all of them.
        features = self.policy.extract_features(take(samples.observations, index[::n_steps]), features_extractor)
        return features.repeat_interleave(n_steps, dim=0)

    def _pair_advantages(self, samples: DenoisingRolloutBufferSamples) -> th.Tensor:
        """
        :param samples: A minibatch.
        :return: Advantages of its pairs: normalised, clamped between quantiles and discounted by the denoising steps that are
            still to come, shape (N,).
        """
        advantages = samples.advantages[samples.decision_index]
        if self.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        if tuple(self.advantage_quantiles) != (0.0, 1.0):
            low, high = (advantages.quantile(quantile) for quantile in self.advantage_quantiles)
            advantages = advantages.clamp(low, high)
        steps_to_come = self.policy.ft_denoising_steps - 1 - samples.denoising_index
        return advantages * self.gamma_denoising**steps_to_come

    def _clip_ranges(self) -> th.Tensor:
        """
        :return: The clip range at each denoising index, growing exponentially from ``clip_range_base`` at the noisiest to
            ``clip_range`` at the last (Ren et al. 2024, appendix C), shape (K',).
        """
        clip_range, n_steps = self._clip_range(self._current_progress_remaining), self.policy.ft_denoising_steps
        if n_steps == 1 or self.clip_range_base is None:
            return th.full((n_steps,), clip_range, device=self.device)
        progress = th.arange(n_steps, device=self.device) / (n_steps - 1)
        growth = progress
        if self.clip_range_rate != 0:
            growth = th.expm1(self.clip_range_rate * progress) / math.expm1(self.clip_range_rate)
        # A schedule may have brought the one below the other.
        base = min(self.clip_range_base, clip_range)
        return base + (clip_range - base) * growth

    def _value_errors(self, samples: DenoisingRolloutBufferSamples) -> th.Tensor:
        """
        :param samples: A minibatch.
        :return: Half the squared error of the critic at each of its decisions, shape (V,).
        """
        index = samples.value_index
        values, returns = self.policy.predict_values(take(samples.observations, index)).flatten(), samples.returns[index]
        squared_error = (values - returns) ** 2
        if self._clip_range_vf is not None:
            clip_range_vf = self._clip_range_vf(self._current_progress_remaining)
            old_values = samples.old_values[index]
            clipped = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)
            squared_error = th.max(squared_error, (clipped - returns) ** 2)
        return 0.5 * squared_error

    def _base_kls(self, samples: DenoisingRolloutBufferSamples, mean: th.Tensor, eta: float | th.Tensor) -> th.Tensor:
        """
        :param samples: A minibatch.
        :param mean: Means of its pairs' denoising steps, shape (N, Tp, Da).
        :param eta: DDIM's η, which the base policy shares, a number or of shape (N, 1, Da).
        :return: KL divergence of each step from the base policy's, of Gaussians with equal std, averaged over executed actions
            and action dimensions, shape (N,).
        """
        policy = self.policy
        # Of the base policy's mean, only η has a gradient.
        features = self._pair_features(samples, policy.base_features_extractor)  # type: ignore[arg-type]
        with policy.autocast():
            condition = policy.base_denoiser.encode(features)
        base_mean = policy.pair_mean(policy.base_denoiser, condition, samples.chain_prev, samples.denoising_index, eta)
        divergence = 0.5 * ((mean - base_mean) / policy.pair_std(samples.denoising_index, eta)) ** 2
        return mean_over_executed(divergence, samples.n_executed[samples.decision_index])

    def _bc_losses(self, samples: DenoisingRolloutBufferSamples) -> th.Tensor:
        """
        :param samples: A minibatch with ``bc_noise``.
        :return: Minus the log-probability, under the current policy, of the steps of chains sampled from the base policy for
            each pair's observation, shape (N * K',).
        """
        obs = take(samples.observations, samples.decision_index)
        chain = self.policy.sample_chain(obs, noise=samples.bc_noise, use_base=True).chain
        log_prob = self.policy.chain_log_prob(obs, chain).flatten(0, 1)
        return -mean_log_prob(log_prob, th.full((len(log_prob),), self.policy.horizon, device=self.device))

    def train(self) -> None:
        """
        Update policy and critic on the current rollout.
        """
        self._rollout_start = None
        self.policy.set_training_mode(True)
        progress = self._current_progress_remaining
        factor = self._learning_rate_factor()
        update_learning_rate(self.policy.optimizer, factor * self.lr_schedule(progress))
        update_learning_rate(self.policy.critic_optimizer, factor * self._critic_lr_schedule(progress))
        update_learning_rate(self.policy.eta_optimizer, factor * self._eta_lr_schedule(progress))
        train_actor = self.n_rollouts >= self.critic_warmup
        metrics: dict[str, list[th.Tensor]] = {}
        for samples in self._minibatches():
            batch_metrics = self._compute_gradients(samples)
            for name, value in batch_metrics.items():
                metrics.setdefault(name, []).append(value)
            # Before the step: the one that would go too far is not made.
            if self.target_kl is not None and batch_metrics["approx_kl"] > 1.5 * self.target_kl:
                if self.verbose >= 1:
                    print(f"Early stopping after {self._n_updates} gradient steps: approx_kl exceeds 1.5 × {self.target_kl}")
                break
            self._step(train_actor, batch_metrics["loss"])
        self._check_update(metrics["loss"])
        self.n_rollouts += 1
        self._log_update(metrics)
        if self.ft_denoising_anneal is not None and self.n_rollouts % self.ft_denoising_anneal[0] == 0:
            self._anneal(self.ft_denoising_anneal[1])

    @property
    def shuffle_mode(self) -> str:
        """
        :return: What ``shuffle`` comes to: "pairs" or "decisions".
        """
        if self.shuffle is not None:
            return self.shuffle
        return "decisions" if self.policy.extractor_learns else "pairs"

    def _minibatches(self) -> Iterator[DenoisingRolloutBufferSamples]:
        """
        :return: The minibatches of all epochs.
        """
        for _ in range(self.n_epochs):
            for samples in self.rollout_buffer.get(self.batch_size, self.shuffle_mode):
                if self.bc_coef > 0:
                    samples = samples._replace(bc_noise=self.policy.draw_noise(len(samples.decision_index)))
                yield samples

    def _anneal(self, n_steps: int) -> None:
        """
        Fine-tune fewer denoising steps from now on.

        :param n_steps: How many fewer.
        """
        steps = max(1, self.policy.ft_denoising_steps - n_steps)
        if steps == self.policy.ft_denoising_steps:
            return
        # Kept as the argument, so that a saved model goes on from here.
        self.ft_denoising_steps = steps
        self.policy.set_ft_denoising_steps(steps)
        # Adam's moments are of gradients that came from other steps.
        self.policy.make_optimizers(self.lr_schedule(self._current_progress_remaining))
        self._make_rollout_buffer()

    def _learning_rate_factor(self) -> float:
        """
        :return: What ``lr_warmup`` and ``lr_decay`` make of both learning rates now.
        """
        done = 1.0 - self._current_progress_remaining
        if done < self.lr_warmup:
            return done / self.lr_warmup
        remaining = (1.0 - done) / (1.0 - self.lr_warmup)
        factors = dict(constant=1.0, linear=remaining, cosine=0.5 * (1.0 - math.cos(math.pi * remaining)))
        return factors[self.lr_decay]

    def _compute_gradients(self, samples: DenoisingRolloutBufferSamples) -> dict[str, th.Tensor]:
        """
        Compute the gradients of :meth:`loss`, slice by slice.

        :param samples: A minibatch.
        :return: The loss and the metrics.
        """
        for optimizer in self.policy.optimizers:
            optimizer.zero_grad()
        n_pairs, n_values = len(samples.decision_index), len(samples.value_index)
        group = self.policy.ft_denoising_steps if self.shuffle_mode == "decisions" else 1
        n_slices = self.n_accumulate or (round(n_pairs / CPU_SLICE_SIZE) if self.device.type == "cpu" else 1)
        n_slices = min(max(1, n_slices), n_pairs // group)
        pair_slices = equal_slices(n_pairs, n_slices, group)
        # The critic's decisions in slices of about as many rows.
        value_slices = equal_slices(n_values, max(1, min(n_slices, math.ceil(n_values * n_slices / n_pairs))))
        advantages = self._pair_advantages(samples)
        metrics: dict[str, th.Tensor] = {}
        for pairs, values in zip_longest(pair_slices, value_slices, fillvalue=slice(0, 0)):
            part = samples.part(pairs, values)
            loss, part_metrics = self._loss(part, advantages[pairs], n_pairs, n_values)
            loss.backward()
            for name, value in {"loss": loss.detach(), **part_metrics}.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        return metrics

    def _step(self, train_actor: bool, loss: th.Tensor) -> None:
        """
        One gradient step, which is left out if the loss is NaN or infinite.

        :param train_actor: Whether the actor is trained, or only the critic.
        :param loss: The loss of the minibatch.
        """
        not_finite = (~loss.isfinite()).float()
        optimizers = [self.policy.critic_optimizer]
        if train_actor:
            optimizers.append(self.policy.optimizer)
            if self.policy.learn_eta is not None and self._n_updates % self.eta_update_interval == 0:
                optimizers.append(self.policy.eta_optimizer)
        for optimizer in optimizers:
            if self.max_grad_norm is not None:
                th.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.max_grad_norm)
            if optimizer.defaults.get("fused"):
                # Looks at this on the device; the host does not have to wait for a GPU.
                optimizer.found_inf = not_finite  # type: ignore[attr-defined]
                optimizer.step()
            elif not not_finite:
                optimizer.step()
        self._n_updates += 1

    def _check_update(self, losses: list[th.Tensor]) -> None:
        """
        Check once per update, for it waits for a GPU, and before a callback can save the policy.

        :param losses: Losses of the minibatches.
        :raises ValueError: if a loss or a parameter is NaN or infinite.
        """
        finite_losses = th.stack(losses).isfinite()
        where = f"update {self.n_rollouts + 1} (num_timesteps={self.num_timesteps})"
        advice = (
            "Models saved so far are not affected. Lower the learning rates, set max_grad_norm, or look at the scale of "
            "rewards and observations."
        )
        if not finite_losses.all():
            bad = (~finite_losses).cpu().numpy()
            raise ValueError(
                f"The loss of {bad.sum()} of the {len(bad)} gradient steps of {where} was NaN or infinite, first that of step "
                f"{bad.argmax() + 1}. These steps were left out. {advice}"
            )
        if not th.stack(th._foreach_norm(list(self.policy.parameters()))).isfinite().all():
            raise ValueError(f"A parameter of the policy became NaN or infinite in {where}. {advice}")

    def _log_update(self, metrics: dict[str, list[th.Tensor]]) -> None:
        """
        :param metrics: Values of each minibatch.
        """
        for name, values in metrics.items():
            self.logger.record(f"train/{name}", th.stack(values).mean().item())
        buffer, progress = self.rollout_buffer, self._current_progress_remaining
        old_values, returns = buffer.old_values[: buffer.size()].cpu().numpy(), buffer.returns.cpu().numpy()
        self.logger.record("train/explained_variance", explained_variance(old_values, returns))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        factor = self._learning_rate_factor()
        self.logger.record("train/learning_rate", factor * self.lr_schedule(progress))
        self.logger.record("train/critic_learning_rate", factor * self._critic_lr_schedule(progress))
        self.logger.record("train/ft_denoising_steps", self.policy.ft_denoising_steps)
        self.logger.record("train/clip_range", self._clip_range(progress))
        if self._clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", self._clip_range_vf(progress))
        self.logger.record("train/min_sampling_std", self.policy.min_sampling_std)

    # ------------------------------------------------------------------ saving

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", "policy.critic_optimizer", "policy.eta_optimizer"], []

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_rollout_start"]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model in a zip file, with all that training needs to go on: ``DPPO.load(path, env=env).learn(total_timesteps,
        reset_num_timesteps=False)``. A file saved in the middle of a rollout, as by ``CheckpointCallback``, goes on at the
        start of this rollout. A path holds the whole new file or what was there before, whatever happens while it is written.

        :param path: Path of the file (".zip" is added if it has no suffix), or an open file
        :param exclude: Attributes to leave out, in addition to the default ones
        :param include: Attributes to save that would be left out by default
        :raises OSError: if the file can't be written, for instance because the disk is full
        """
        opened: AbstractContextManager[Any] = nullcontext(path)
        if isinstance(path, (str, pathlib.Path)):
            path = pathlib.Path(path)
            opened = atomic_write(path if path.suffix else path.with_suffix(".zip"))
        loaded = self._run_state
        self._run_state = loaded or self._rollout_start or RunState.of(self)
        try:
            with opened as file:
                super().save(file, exclude, include)
        finally:
            self._run_state = loaded

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: th.device | str = "auto") -> None:
        """
        Load parameters from a zip file or a nested dictionary, see ``BaseAlgorithm.set_parameters``.

        :param load_path_or_dict: Path, file, or dictionary of state dicts as ``get_parameters`` returns it
        :param exact_match: Whether the parameters must be complete
        :param device: Device on which the code should run
        """
        super().set_parameters(load_path_or_dict, exact_match=exact_match, device=device)
        # How an optimiser runs belongs to this machine and not to the file.
        for optimizer in self.policy.optimizers:
            for group in optimizer.param_groups:
                group.update(
                    {flag: optimizer.defaults.get(flag) for flag in ("fused", "foreach", "capturable") if flag in group}
                )

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfDPPO],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfDPPO:
        """
        Load the model from a zip file, see ``BaseAlgorithm.load``.

        :param path: Path of the file, or the file
        :param env: The env to run the loaded model on, with as many copies as you like; ``None`` if it is only to predict
        :param device: Device on which the code should run
        :param custom_objects: Dictionary of objects to replace upon loading
        :param print_system_info: Whether to print system info from the saved model and the current system info
        :param force_reset: Force a call to ``reset()`` before training
        :param kwargs: Constructor arguments to change, for instance ``ft_denoising_steps``, ``scheduler`` or ``n_steps``. With
            a ``seed``, training goes on with other random numbers than it would have.
        :return: The loaded model
        :raises TypeError: for an argument that the constructor does not have
        """
        cls._check_names("load", kwargs)
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        if model._run_state is not None and kwargs.get("seed") is not None:
            model._run_state.generators = None
        return model

    @classmethod
    def _check_names(cls, method: str, kwargs: dict[str, Any]) -> None:
        known = set(inspect.signature(DPPO.__init__).parameters) | set(inspect.signature(cls.__init__).parameters)
        known -= {"self", "policy", "env", "pretrained", "_init_setup_model"}
        for name in kwargs:
            if name not in known:
                similar = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {similar[0]!r}?" if similar else f"it takes {sorted(known)}."
                raise TypeError(f"{cls.__name__}.{method}() got an unexpected argument {name!r}: {hint}")

    def save_pretrained(self, folder: str | pathlib.Path) -> None:
        """
        Save the model in a folder that is safe to share: weights as safetensors, settings and spaces as JSON, a model card,
        and nothing that is executed when it is loaded. The optimisers' state is not in it: to go on exactly, use :meth:`save`.

        :param folder: The folder, made if it doesn't exist. In one that does, the files of an earlier model are replaced and
            others stay.
        :raises ValueError: naming the argument that can't be written, such as a function or a class of your own
        """
        from sb3_dppo.runs.sharing import save_pretrained

        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(
        cls: type[SelfDPPO],
        folder: str | pathlib.Path,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        **kwargs: Any,
    ) -> SelfDPPO:
        """
        Load a model from a folder that :meth:`save_pretrained` made. Nothing in it is executed, whoever made it.

        :param folder: The folder
        :param env: The env to run the model on, with as many copies as you like; ``None`` if it is only to predict. If the
            model was trained with ``VecNormalize``, the env gets its statistics, in a ``VecNormalize`` of its own or a new one
        :param device: Device on which the code should run
        :param kwargs: Constructor arguments to change, for instance ``ft_denoising_steps``, ``scheduler`` or ``n_steps``
        :return: The model
        :raises FileNotFoundError: if the folder, or a file that belongs in it, does not exist
        :raises ValueError: for files that are damaged, too large or not of such a model, or an env that does not fit it
        :raises TypeError: for an argument that the constructor does not have
        """
        from sb3_dppo.runs.sharing import from_pretrained

        cls._check_names("from_pretrained", kwargs)
        return from_pretrained(cls, folder, env, device, kwargs)


def make_schedule(name: str, value: float | str | Schedule) -> FloatSchedule:
    """
    :param name: Name of the argument, for the error.
    :param value: A number, also as a string as YAML reads "1e-4", a schedule, or "lin_" followed by the number that a linear
        schedule begins with.
    :return: A function of the progress remaining, from 1 to 0.
    :raises ValueError: for another string.
    """
    if not isinstance(value, (str, int, float)) and not callable(value):
        raise ValueError(f"{name}={value!r} is not a schedule: use a number, 'lin_NUMBER' or a function.")
    if not isinstance(value, str):
        return FloatSchedule(value)
    try:
        if value.startswith("lin_"):
            return FloatSchedule(LinearSchedule(float(value.removeprefix("lin_")), 0.0, 1.0))
        return FloatSchedule(float(value))
    except ValueError:
        raise ValueError(f"{name}={value!r} is not a schedule: use a number, 'lin_NUMBER' or a function.") from None
