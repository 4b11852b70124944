"""The algorithm: its arguments, and when what is updated. Its losses are in :mod:`sb3_dppo.losses`."""

import inspect
from collections import ChainMap, defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import update_learning_rate

from sb3_dppo import arguments, ranks
from sb3_dppo.actor_critic import DiffusionActorCriticPolicy
from sb3_dppo.buffers import DenoisingRolloutBuffer, DenoisingRolloutBufferSamples, RewardScaler
from sb3_dppo.diagnostics import log_update
from sb3_dppo.diffusion.acceleration import CPU_SLICE_SIZE, keep_freed_memory
from sb3_dppo.features.observations import check_observation_space
from sb3_dppo.gradients import check_update, compute_gradients, gradient_step, losses_of_slices
from sb3_dppo.losses import LossSettings, Metrics, clip_ranges, pair_advantages
from sb3_dppo.policies import POLICIES
from sb3_dppo.rollouts import DecisionRollouts
from sb3_dppo.runs.pretrained import read_pretrained
from sb3_dppo.schedules import make_schedule


class DPPO(DecisionRollouts):
    """
    Diffusion Policy Policy Optimization (DPPO): PPO on the denoising steps of a diffusion policy.

    Paper: https://arxiv.org/abs/2409.00588 (Ren et al. 2024)

    A *decision* is a chunk of actions denoised from one observation; it is the transition that GAE sees. Each of its
    fine-tuned denoising steps is a Gaussian action of PPO, with the decision's advantage. ``total_timesteps`` and
    ``n_steps`` count env steps. The defaults are for learning from scratch; for fine-tuning see the documentation.

    What is not listed below (``act_steps``, ``scheduler``, ``ft_denoising_steps``, …) is described at
    :class:`~sb3_dppo.diffusion.settings.SamplerConfig`; here ``min_sampling_std`` may be a schedule, too. With neither
    ``min_sampling_std`` nor ``min_logprob_std``, a policy that has learned from demonstrations has both at 0.1.

    Schedules are numbers, functions of the current progress remaining (from 1 to 0), or strings: "lin_1e-3" goes linearly from
    1e-3 to 0. What is assigned to a model acts from its next rollout or update on.

    :param policy: The policy model to use ("DiffusionMlpPolicy", "DiffusionCnnPolicy", "DiffusionMultiInputPolicy",
        "DiffusionUnetPolicy", "DiffusionTransformerPolicy" or a class)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of the actor, a schedule
    :param critic_learning_rate: Learning rate of the critic, a schedule
    :param lr_decay: "constant", or along which curve a factor of the learning rates goes to zero: "linear" or "cosine", with
        the progress remaining, or "cooldown", linear over the last third of each call of :meth:`learn` (Hägele et al. 2024)
    :param lr_warmup: Fraction of training in which they first rise linearly from zero
    :param n_steps: Env steps per env and rollout, a multiple of ``act_steps``
    :param batch_size: (decision, denoising step) pairs in a minibatch, about: an epoch is split into nearly equal ones
    :param n_epochs: Number of epochs when optimising the surrogate loss
    :param gamma: Discount factor of a decision of ``act_steps`` env steps; of a shorter one, γ^(its length / act_steps)
    :param gamma_denoising: Discount of the advantage per denoising step that is still to come
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator, per decision
    :param clip_range: Clipping parameter at the last denoising step, a schedule. Log-probabilities are averaged over the
        executed actions and their dimensions, so ratios stay closer to 1 than in PPO. ``None`` means 0.2, as in PPO, over the
        number of these.
    :param clip_range_base: Clipping parameter at the noisiest fine-tuned step; ``None`` means ``clip_range`` at every step
    :param clip_range_rate: How sharply the clipping parameter grows between them, exponentially; 0 is linear
    :param clip_range_vf: Clipping parameter for the value function, a schedule or ``None``. It depends on the reward scaling.
    :param normalize_advantage: Whether to normalise the advantage over each minibatch
    :param advantage_quantiles: Clamp advantages between these two quantiles of the minibatch
    :param ent_coef: Coefficient of the mean of a learned η (``learn_eta``) or of the log of a learned std, which is the
        entropy but for a constant: it keeps exploration from getting small
    :param vf_coef: Value function coefficient for the loss calculation
    :param bc_coef: Coefficient of the log-probability, under the current policy, of chains sampled from the base policy
    :param kl_coef: Coefficient of the KL divergence of the denoising steps from the base policy's, per action dimension
    :param max_grad_norm: The maximum value for the gradient clipping, of actor and critic separately, or ``None``
    :param target_kl: Stop the epochs of an update, before the step, when the approximate KL divergence exceeds 1.5 times this,
        as in PPO. It is a mean over executed actions and their dimensions: divide PPO's 0.01 to 0.03 by their number. In good
        fine-tuning it is 1e-5 to 1e-3.
    :param critic_warmup: First rollouts of the model, or after behaviour cloning, on which only the critic is trained
    :param scale_rewards: Whether to divide the decisions' rewards by the running std of their discounted return, and to clip
        them to ± 10
    :param normalize_observations: Whether to normalise vectors in observations by their running mean and std, a part of the
        policy. They are of its first decisions, a tenth of those of a call of :meth:`learn` or 30 000 if these are more, and
        change between rollouts; the std never shrinks. ``None``: unless the env is under ``VecNormalize(norm_obs=True)``. A
        policy that has seen demonstrations keeps their ranges. Images stay as they are.
    :param shuffle: "pairs" draws minibatches from all pairs, "decisions" keeps the pairs of a decision together, so that its
        features are extracted once. ``None`` means "decisions" if the features extractor has parameters, else "pairs".
    :param eta_learning_rate: Learning rate of what ``learn_eta`` or ``learn_std`` learns, which has an optimiser of its own, a
        schedule
    :param eta_update_interval: Gradient steps of the actor between two of it
    :param ft_denoising_anneal: Two numbers (n, d): after every n rollouts ``ft_denoising_steps`` decreases by d, down to 1,
        the denoiser as it is then becomes the base policy, which runs all steps before, and the optimisers start anew.
        ``None``: it stays.
    :param n_accumulate: Slices of a minibatch whose gradients are accumulated one after the other, for the same result in less
        memory. ``None`` means one on a GPU, and on a CPU as many as keep a slice within its caches.
    :param on_bad_env: What to do when an env returns NaN or infinity: "raise" an error, or "reset" this env and treat its
        episode as truncated after the last good observation. Resets are logged as ``rollout/bad_env_resets``.
    :param pretrained: Path of a saved model whose policy to start from. Its ``policy_kwargs`` replace those given here.
    :param rollout_buffer_class: Rollout buffer class to use. ``None`` means ``DenoisingRolloutBuffer``.
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param stats_window_size: Over how many episodes the logged success rate, episode length and reward are averaged
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: Arguments of the policy, see :class:`~sb3_dppo.actor_critic.DiffusionActorCriticPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as the device), 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run; auto is the GPU if possible
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param unknown: Nothing: arguments of other algorithms are refused with a reason
    :raises ValueError: naming the argument, for settings or an env that don't fit
    :raises TypeError: for an argument that does not exist
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = POLICIES
    policy: DiffusionActorCriticPolicy
    rollout_buffer: DenoisingRolloutBuffer  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[DiffusionActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        critic_learning_rate: float | str | Schedule = 1e-3,
        lr_decay: str = "cooldown",
        lr_warmup: float = 0.0,
        n_steps: int = 1024,
        batch_size: int = 128,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gamma_denoising: float = 0.9,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule | None = None,
        clip_range_base: float | None = None,
        clip_range_rate: float = 3.0,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        advantage_quantiles: tuple[float, float] = (0.0, 1.0),
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        bc_coef: float = 0.0,
        kl_coef: float = 0.0,
        max_grad_norm: float | None = 0.5,
        target_kl: float | None = None,
        critic_warmup: int = 0,
        scale_rewards: bool = True,
        normalize_observations: bool | None = None,
        shuffle: str | None = None,
        act_steps: int | None = None,
        scheduler: Any = "ddpm",
        inference_steps: int | None = None,
        eta: float = 1.0,
        learn_eta: str | None = None,
        eta_range: tuple[float, float] = (0.1, 1.0),
        learn_std: str | None = None,
        std_range: tuple[float, float] = (0.1, 2.0),
        eta_learning_rate: float | str | Schedule = 1e-3,
        eta_update_interval: int = 1,
        ft_denoising_steps: int | None = None,
        ft_denoising_anneal: tuple[int, int] | None = None,
        min_sampling_std: float | str | Schedule | None = None,
        min_logprob_std: float | None = None,
        noise_clip: float = 3.0,
        deterministic_noise: str = "observation",
        n_accumulate: int | None = None,
        compile: bool | str = False,
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
        **unknown: Any,
    ) -> None:
        arguments.check_names(f"{type(self).__name__}()", unknown, inspect.signature(DPPO.__init__).parameters)
        arguments.check_policy(policy, self.policy_aliases, DiffusionActorCriticPolicy)
        arguments.check_seed_and_device(seed, device)
        if env is not None:
            env = maybe_make_env(env, verbose)
            arguments.check_action_space(env.action_space)
            check_observation_space(env.observation_space, None)
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
        self.normalize_observations = normalize_observations
        self.shuffle = shuffle
        self.act_steps = act_steps
        self.scheduler = scheduler
        self.inference_steps = inference_steps
        self.eta = eta
        self.learn_eta = learn_eta
        self.eta_range = eta_range
        self.learn_std = learn_std
        self.std_range = std_range
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
        self._init_run()

        if _init_setup_model:
            arguments.check_env(env)
        params = None if pretrained is None else read_pretrained(self, pretrained)
        if _init_setup_model:
            self._setup_model()
            arguments.check_training_arguments(self)
            if params is not None:
                self.policy.load_state_dict(params)

    def _setup_lr_schedule(self) -> None:
        self._lr_arguments = (self.learning_rate, self.lr_decay, self.lr_warmup)
        self.lr_schedule = make_schedule("learning_rate", *self._lr_arguments)

    def _setup_model(self) -> None:
        arguments.check_ranges(self)
        ranks.join()
        self._setup_lr_schedule()
        # As PPO keeps them.
        if self.clip_range is not None:
            self.clip_range = make_schedule("clip_range", self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = make_schedule("clip_range_vf", self.clip_range_vf)
        self.set_random_seed(self.seed)
        if self.device.type == "cpu":
            keep_freed_memory()
        for name in set(arguments.SAMPLER_ARGUMENTS) & set(self.policy_kwargs):
            raise ValueError(
                f"policy_kwargs[{name!r}]: {name} is an argument of DPPO itself: pass {name}={self.policy_kwargs[name]!r}."
            )
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **vars(self._sampler_config()), **self.policy_kwargs
        ).to(self.device)
        self._make_rollout_buffer()

    def _check_before_learning(self) -> None:
        self._configure_sampler()
        arguments.check_training_arguments(self)
        arguments.warn_about_training_arguments(self)

    @property
    def shuffle_mode(self) -> str:
        """What ``shuffle`` comes to: "pairs" or "decisions"."""
        if self.shuffle is not None:
            return self.shuffle
        return "decisions" if self.policy.extractor_learns else "pairs"

    def train(self) -> None:
        """Update actor and critic, which share no parameters, on the current rollout."""
        self._begin_update()
        begins_normalization = self.updates_normalizer and not self.policy.normalizer.is_running
        if begins_normalization:
            self._begin_normalization()
        self.policy.set_training_mode(True)
        learning_rates = self._learning_rates()
        for optimizer, learning_rate in zip(self.policy.optimizers, learning_rates.values(), strict=True):
            update_learning_rate(optimizer, learning_rate)
        settings, train_actor = self._loss_settings(), self.n_rollouts >= self.critic_warmup
        history: dict[str, list[th.Tensor]] = defaultdict(list)
        for samples in self._minibatches():
            n_slices = self.n_accumulate or self._default_slices(samples)
            metrics = compute_gradients(self.policy, samples, self._advantages(samples), settings, train_actor, n_slices)
            for name, value in metrics.items():
                history[name].append(value)
            # Before the step: the one that would go too far is not made.
            if train_actor and self.target_kl is not None and metrics["approx_kl"] > 1.5 * self.target_kl:
                if self.verbose >= 1:
                    print(f"Early stopping after {self._n_updates} gradient steps: approx_kl exceeds 1.5 × {self.target_kl}")
                break
            gradient_step(self._optimizers(train_actor), metrics["loss"], self.max_grad_norm)
            self._n_updates += 1
        check_update(self.policy, history["loss"], f"{self.n_rollouts + 1} (num_timesteps={self.num_timesteps})")
        self.n_rollouts += 1
        log_update(self, history, settings, learning_rates)
        if self.updates_normalizer and not begins_normalization and self.gathers_statistics:
            self._update_normalizer()
        if self.ft_denoising_anneal is not None and self.n_rollouts % self.ft_denoising_anneal[0] == 0:
            self._anneal(self.ft_denoising_anneal[1])

    def loss(self, samples: DenoisingRolloutBufferSamples) -> tuple[th.Tensor, Metrics]:
        """
        The update rule as one function of a minibatch (Ren et al. 2024, section 4); see :mod:`sb3_dppo.losses`.

        :param samples: A minibatch.
        :return: The loss, and metrics that stay on the device: "policy_gradient_loss", "value_loss", "approx_kl",
            "clip_fraction", "ratio", "bc_loss", "base_kl" and "eta", with ``learn_std="state"`` also "std", and sums over the
            pairs of each denoising index, "by_denoising_step".
        """
        parts = list(losses_of_slices(self.policy, samples, self._advantages(samples), self._loss_settings()))
        loss = th.stack([loss for loss, _ in parts]).sum()
        return loss, dict(ChainMap(*(metrics for _, metrics in parts), dict(bc_loss=th.zeros_like(loss.detach()))))

    def _optimizers(self, train_actor: bool) -> list[th.optim.Optimizer]:
        """Those that make the next gradient step."""
        optimizers = [self.policy.critic_optimizer]
        if train_actor:
            optimizers.append(self.policy.optimizer)
            if self.policy.sampler.config.has_noise_network and self._n_updates % self.eta_update_interval == 0:
                optimizers.append(self.policy.noise_optimizer)
        return optimizers

    def _default_slices(self, samples: DenoisingRolloutBufferSamples) -> int:
        return max(1, round(len(samples.decision_index) / CPU_SLICE_SIZE)) if self.device.type == "cpu" else 1

    def _minibatches(self) -> Iterator[DenoisingRolloutBufferSamples]:
        """The minibatches of all epochs."""
        for _ in range(self.n_epochs):
            ranks.share_random_numbers(self.device)
            for samples in self.rollout_buffer.get(self.batch_size, self.shuffle_mode):
                if self.bc_coef > 0:
                    # One chain of the base policy per decision and epoch.
                    noise = self.policy.draw_noise(samples.n_values)
                    if samples.whole is not None:
                        noise = noise[:, samples.whole.own_values]
                    samples = samples._replace(bc_noise=noise, bc_index=samples.value_index)
                yield samples

    def _advantages(self, samples: DenoisingRolloutBufferSamples) -> th.Tensor:
        K, quantiles = self.policy.sampler.ft_denoising_steps, self.advantage_quantiles
        return pair_advantages(samples, K, self.gamma_denoising, self.normalize_advantage, quantiles)

    def _loss_settings(self) -> LossSettings:
        """What the losses depend on now."""
        progress, sampler, vf = self._current_progress_remaining, self.policy.sampler, self.clip_range_vf
        clip_range = arguments.clip_range_schedule(self)(progress)
        ranges = clip_ranges(sampler.ft_denoising_steps, clip_range, self.clip_range_base, self.clip_range_rate, self.device)
        clip_range_vf = None if vf is None else make_schedule("clip_range_vf", vf)(progress)
        return LossSettings(ranges, clip_range_vf, self.vf_coef, self.ent_coef, self.bc_coef, self.kl_coef)

    def _learning_rates(self) -> dict[str, float]:
        """Those of actor, critic and noise network now."""
        if self._lr_arguments != (self.learning_rate, self.lr_decay, self.lr_warmup):
            self._setup_lr_schedule()
        progress, shape = self._current_progress_remaining, (self.lr_decay, self.lr_warmup)
        rates = dict(learning_rate=self.lr_schedule(progress)) | {
            name: make_schedule(name, getattr(self, name), *shape)(progress)
            for name in ("critic_learning_rate", "eta_learning_rate")
        }
        return {name: self.cooldown_factor * rate for name, rate in rates.items()}

    def _anneal(self, n_steps: int) -> None:
        """Fine-tune fewer denoising steps from now on, over what has been learned so far as the base policy."""
        steps = max(1, self.policy.sampler.ft_denoising_steps - n_steps)
        if steps == self.policy.sampler.ft_denoising_steps:
            return
        # Kept as the argument, so that a saved model goes on from here.
        self.ft_denoising_steps = steps
        self.policy.update_base_denoiser()
        self._apply_settings()
        # Adam's moments are of gradients that came from other steps.
        self.policy.make_optimizers(self.lr_schedule(self._current_progress_remaining))

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", "policy.critic_optimizer", "policy.noise_optimizer"], []
