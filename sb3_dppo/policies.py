"""Diffusion actor-critic policies: networks, normalisation, sampling with log-probabilities, and acting in chunks."""

import math
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim, get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.nn import functional as F

from sb3_dppo.diffusion.acceleration import COMPILE_OPTIONS, PRECISIONS, Compiled, CudaGraphs, precision_context, threads_for
from sb3_dppo.diffusion.denoisers import Denoiser, MlpDenoiser, TransformerDenoiser, UnetDenoiser, make_mlp
from sb3_dppo.diffusion.process import DenoisingChain, DenoisingProcess, gaussian_log_prob
from sb3_dppo.features.extractors import EXTRACTORS
from sb3_dppo.features.observations import batch_size_of, check_observation_space, parts_of, take, vector_keys

# The std of DDPM's deterministic mode, which is 0 at the last step only.
DDPM_EVALUATION_STD = 1e-3
NORMALIZATION_EPS = 1e-6
# Hidden units of the network for a state-dependent η.
ETA_WIDTH = 64


# The paper's policies for Gym tasks, in policy_kwargs' terms, for pre-training and fine-tuning; the constructor's own defaults
# are for learning from scratch (Ren et al. 2024, table A7).
PAPER_POLICY_KWARGS: dict[str, Any] = dict(
    denoising_steps=20,
    horizon=4,
    prediction_type="epsilon",
    net_arch=dict(pi=[512, 512, 512], vf=[256, 256, 256]),
)


class DiffusionActorCriticPolicy(ActorCriticPolicy):
    """
    An actor that denoises chunks of actions and a critic of observations (Ren et al. 2024, section 4).

    The defaults are for learning from scratch. ``PAPER_POLICY_KWARGS`` are the paper's for imitation and fine-tuning.

    Two denoisers exist: ``denoiser`` is trained and runs the last ``ft_denoising_steps`` of the sampler's steps;
    ``base_denoiser`` is the frozen copy that runs those before. Chains live in normalised action space, [-1, 1].

    What a trained policy fixes comes first, then the sampler's settings, which may be changed when a policy is loaded and
    which :class:`~sb3_dppo.DPPO` passes on from its own arguments of the same names.

    :param observation_space: Observation space: a ``Box`` that is no image, ``Discrete``, ``MultiDiscrete`` or
        ``MultiBinary``; an image for ``DiffusionCnnPolicy``; a ``Dict`` of vectors and images for
        ``DiffusionMultiInputPolicy``.
    :param action_space: Action space, a ``Box`` with finite bounds.
    :param lr_schedule: Learning rate schedule of the actor (could be constant).
    :param net_arch: Hidden widths, of the denoiser under ``pi`` and of the critic under ``vf``.
    :param denoising_steps: K, the steps of the diffusion model.
    :param beta_schedule: diffusers' name of the noise schedule.
    :param horizon: Tp, the actions predicted at once. (4 is the default of ``DiffusionUnetPolicy``.)
    :param prediction_type: What the denoiser predicts: "epsilon" (the noise), "sample" (the clean chunk) or "v_prediction".
    :param clip_sample_range: Clamp of the predicted clean chunk to ± this value, or ``None``.
    :param clip_noise_pred: DDIM only: clamp of the noise that follows from it, or ``None``.
    :param clip_final_action: Clamp of the final sample, or ``None``.
    :param residual: Use residual blocks in the denoiser, so that ``pi`` must be an odd number of equal widths. Like
        ``layer_norm``, ``obs_encoder_arch``, ``film`` and ``time_dim`` not a setting of ``DiffusionUnetPolicy``'s and
        ``DiffusionTransformerPolicy``'s denoisers.
    :param critic_residual: The same for the critic; ``None`` means as ``residual``.
    :param layer_norm: Normalise the hidden layers of the denoiser.
    :param critic_layer_norm: Normalise the hidden layers of the critic.
    :param obs_encoder_arch: Widths of an encoder of the observation inside the denoiser, or ``None``.
    :param film: Let time and observation scale and shift the denoiser's hidden layers, too (FiLM).
    :param time_dim: Size of the time embedding, even.
    :param activation_fn: Activation of the denoiser and its observation encoder.
    :param critic_activation_fn: Activation of the critic.
    :param features_extractor_class: Features extractor, or the name of one of SB3's or ours, as in YAML; actor, base denoiser
        and critic each have their own.
    :param features_extractor_kwargs: Keyword arguments for it.
    :param normalize_images: Whether to divide images by 255.
    :param optimizer_class: Optimiser of the actor and of the critic.
    :param optimizer_kwargs: Keyword arguments for it, except the learning rate. AdamW has no weight decay unless named here.
    :param act_steps: Ta, the actions of a chunk that are executed before planning again. ``None`` means ``horizon``.
    :param scheduler: "ddpm", "ddim" or another diffusers scheduler whose steps are Gaussian with a mean that is affine in the
        sample and the denoiser's output: itself, its name, or its configuration (a mapping with ``_class_name``).
    :param inference_steps: S, the denoising steps that are run. ``None`` means K.
    :param eta: DDIM's η in exploration: 1 is as noisy as DDPM, 0 adds no noise but the floor below.
    :param learn_eta: DDIM only: learn η, from ``eta`` on, one for each action dimension ("action") or as a function of the
        observation ("state"); ``None``: it stays.
    :param eta_range: Bounds of a learned η. It begins at least 1 % of the range inside of them.
    :param ft_denoising_steps: K', the last steps, which are fine-tuned. ``None`` means all.
    :param min_sampling_std: Floor of the std when exploring, at every step, in normalised action space.
    :param min_logprob_std: Floor of the std in log-probabilities.
    :param noise_clip: Clamp of the standard normal noise of each step; the initial iterate is not clamped.
    :param deterministic_noise: The noise of ``predict(deterministic=True)``: "observation" (a pseudo-random function of the
        observation, so that behaviour is distributed as with random noise and yet the same observation gives the same action),
        "zero" (none, which averages modes, and which a fine-tuned policy may never have seen) or "random" (drawn anew each
        time, the reference implementation's evaluation).
    :param compile: See :class:`~sb3_dppo.DPPO`.
    :param precision: See :class:`~sb3_dppo.DPPO`.
    :param use_sde: Not supported; SB3 passes ``False``.
    :raises ValueError: naming the argument, for settings that don't fit together.
    """

    denoiser: Denoiser
    base_denoiser: Denoiser
    critic: nn.Module
    eta_network: nn.Sequential
    obs_center: th.Tensor
    obs_scale: th.Tensor
    action_center: th.Tensor
    action_scale: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: dict[str, list[int]] | None = None,
        denoising_steps: int = 5,
        beta_schedule: str = "squaredcos_cap_v2",
        horizon: int = 1,
        prediction_type: str = "sample",
        clip_sample_range: float | None = 1.0,
        clip_noise_pred: float | None = None,
        clip_final_action: float | None = None,
        residual: bool = True,
        critic_residual: bool | None = None,
        layer_norm: bool = False,
        critic_layer_norm: bool = False,
        obs_encoder_arch: list[int] | None = None,
        film: bool = False,
        time_dim: int = 16,
        activation_fn: type[nn.Module] = nn.ReLU,
        critic_activation_fn: type[nn.Module] = nn.Mish,
        features_extractor_class: type[BaseFeaturesExtractor] | str = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        act_steps: int | None = None,
        scheduler: Any = "ddpm",
        inference_steps: int | None = None,
        eta: float = 1.0,
        learn_eta: str | None = None,
        eta_range: tuple[float, float] = (0.1, 1.0),
        ft_denoising_steps: int | None = None,
        min_sampling_std: float = 0.2,
        min_logprob_std: float = 0.2,
        noise_clip: float = 3.0,
        deterministic_noise: str = "observation",
        compile: bool | str = "auto",
        precision: str = "float32",
        use_sde: bool = False,
    ) -> None:
        if use_sde:
            raise ValueError(
                "use_sde=True is not supported: a diffusion policy explores with the noise of its denoising steps."
            )
        check_action_space(action_space)
        if isinstance(features_extractor_class, str):
            if features_extractor_class not in EXTRACTORS:
                raise ValueError(
                    f"features_extractor_class={features_extractor_class!r} is unknown: choose one of {list(EXTRACTORS)} or a "
                    "class."
                )
            features_extractor_class = EXTRACTORS[features_extractor_class]
        check_observation_space(observation_space, features_extractor_class)
        self._constructor_parameters = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "__class__", "observation_space", "action_space", "lr_schedule", "use_sde")
        }
        self.denoising_steps = denoising_steps
        self.horizon = horizon
        self.act_steps = horizon if act_steps is None else act_steps
        if horizon < 1:
            raise ValueError(f"horizon={horizon} must be at least 1.")
        if not 1 <= self.act_steps <= horizon:
            raise ValueError(f"act_steps={act_steps} must be between 1 and horizon={horizon}: a chunk has no more actions.")
        if deterministic_noise not in ("observation", "zero", "random"):
            raise ValueError(
                f"deterministic_noise={deterministic_noise!r} is unknown: choose 'observation', 'zero' or 'random'."
            )
        # Schedulers compute with numbers, also where the networks are only shapes.
        with th.device("cpu"):
            process = DenoisingProcess(
                scheduler=scheduler,
                denoising_steps=denoising_steps,
                inference_steps=inference_steps,
                beta_schedule=beta_schedule,
                prediction_type=prediction_type,
                clip_sample_range=clip_sample_range,
                clip_noise_pred=clip_noise_pred,
                clip_final_action=clip_final_action,
            )
        self.inference_steps = process.inference_steps
        self.ft_denoising_steps = self.inference_steps if ft_denoising_steps is None else ft_denoising_steps
        if not 1 <= self.ft_denoising_steps <= self.inference_steps:
            raise ValueError(
                f"ft_denoising_steps={ft_denoising_steps} must be between 1 and the {self.inference_steps} steps that are run "
                f"(inference_steps={inference_steps}, denoising_steps={denoising_steps})."
            )
        check_eta(eta, learn_eta, eta_range, process.is_ddim)
        if noise_clip is None or noise_clip <= 0:
            raise ValueError(f"noise_clip={noise_clip} must be positive: use a large number for no clamp.")
        if net_arch is not None and not isinstance(net_arch, dict):
            raise ValueError(f"net_arch={net_arch} must be a dictionary: dict(pi={net_arch}, vf={net_arch}).")
        if min_sampling_std < 0:
            raise ValueError(f"min_sampling_std={min_sampling_std} must not be negative.")
        if min_logprob_std <= 0:
            raise ValueError(f"min_logprob_std={min_logprob_std} must be positive: the last step has no noise of its own.")
        if compile not in COMPILE_OPTIONS:
            raise ValueError(f"compile={compile!r} is unknown: choose True, False or 'auto'.")
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is unknown: choose one of {list(PRECISIONS)}.")
        self.eta = eta
        self.learn_eta = learn_eta
        self.eta_range = eta_range
        self.min_sampling_std = min_sampling_std
        self.min_logprob_std = min_logprob_std
        self.noise_clip = noise_clip
        self.deterministic_noise = deterministic_noise
        self.precision = precision
        self._compile = compile  # nn.Module has a method named compile.
        self._stds_key: tuple[Any, ...] | None = None
        self._stds: tuple[th.Tensor, th.Tensor]
        self._compiled_denoise = Compiled(self._denoise)
        self._denoise_graphs = CudaGraphs(self._denoise)
        self.action_dim = get_action_dim(action_space)
        self._process = [process]  # In a list: modules can't be registered before the constructor of nn.Module has run.

        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=self._default_net_arch() | (net_arch or {}),
            activation_fn=activation_fn,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            share_features_extractor=False,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=self._default_optimizer_kwargs(optimizer_class) | (optimizer_kwargs or {}),
        )

    @staticmethod
    def _default_net_arch() -> dict[str, list[int]]:
        return dict(pi=[256, 256, 256], vf=[256, 256, 256])

    @staticmethod
    def _default_optimizer_kwargs(optimizer_class: type[th.optim.Optimizer]) -> dict[str, Any]:
        # AdamW's own weight decay of 0.01 would pull a fine-tuned policy away from its pre-trained weights.
        return dict(weight_decay=0.0, fused=True) if optimizer_class is th.optim.AdamW else {}

    @abstractmethod
    def _make_denoiser(self) -> Denoiser:
        """
        :return: The network of this kind of policy.
        """

    # ------------------------------------------------------------------ construction

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Create networks, normalisation and optimisers.

        :param lr_schedule: ``lr_schedule(1)`` is the initial learning rate of both optimisers.
        """
        arguments = self._constructor_parameters
        self.process = self._process.pop()
        self.denoiser = self._make_denoiser()
        critic_residual = arguments["critic_residual"]
        self.critic = make_mlp(
            self.features_dim,
            1,
            self.net_arch["vf"],  # type: ignore[call-overload]
            arguments["critic_activation_fn"],
            residual=arguments["residual"] if critic_residual is None else critic_residual,
            layer_norm=arguments["critic_layer_norm"],
        )
        # η's logits: its last bias is that of each action dimension, and the weights before it are those of the observation.
        with th.random.fork_rng(devices=[]):  # What other networks and rollouts draw does not depend on it.
            self.eta_network = make_mlp(self.features_dim, self.action_dim, [ETA_WIDTH], nn.Mish)
        low, high = self.eta_range
        fraction = min(max((self.eta - low) / (high - low), 0.01), 0.99)
        output: Any = self.eta_network[-1]
        nn.init.zeros_(output.weight)
        nn.init.constant_(output.bias, math.log(fraction / (1 - fraction)))
        self.base_denoiser = deepcopy(self.denoiser).requires_grad_(False)
        self.base_features_extractor = deepcopy(self.pi_features_extractor).requires_grad_(False)
        # Without parameters and buffers, the actor's features are also those of the base policy.
        self.extractor_learns = len(self.pi_features_extractor.state_dict()) > 0

        vectors = vector_keys(self.observation_space)
        self._vector_sizes = {key: get_flattened_obs_dim(space) for key, space in vectors.items()}
        # One after the other for a Dict.
        obs_shape = vectors[""].shape if "" in vectors else (sum(self._vector_sizes.values()),)
        self.register_buffer("obs_center", th.zeros(obs_shape))
        self.register_buffer("obs_scale", th.ones(obs_shape))
        box: Any = self.action_space
        smallest, largest = (th.as_tensor(bound, dtype=th.float).flatten() for bound in (box.low, box.high))
        self.register_buffer("action_center", (smallest + largest) / 2)
        self.register_buffer("action_scale", (largest - smallest) / 2)

        self.make_optimizers(lr_schedule(1))
        self.seed(int(th.randint(2**31, (), device="cpu")))

    def make_optimizers(self, learning_rate: float) -> None:
        """
        Create new optimisers, with no state, for the actor, for the critic and for η.

        :param learning_rate: Their initial learning rate.
        """
        actor = [*self.denoiser.parameters(), *self.pi_features_extractor.parameters()]
        critic = [*self.critic.parameters(), *self.vf_features_extractor.parameters()]
        self.optimizer = self.optimizer_class(actor, lr=learning_rate, **self.optimizer_kwargs)  # type: ignore[call-arg]
        self.critic_optimizer = self.optimizer_class(critic, lr=learning_rate, **self.optimizer_kwargs)  # type: ignore[call-arg]
        # Without the state, only the last bias has a gradient.
        eta = self.eta_network.parameters()
        self.eta_optimizer = self.optimizer_class(eta, lr=learning_rate, **self.optimizer_kwargs)  # type: ignore[call-arg]

    @property
    def optimizers(self) -> list[th.optim.Optimizer]:
        """
        :return: Those of the actor, the critic and η.
        """
        return [self.optimizer, self.critic_optimizer, self.eta_optimizer]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(
            observation_space=self.observation_space,
            action_space=self.action_space,
            lr_schedule=self._dummy_schedule,
            **self._constructor_parameters,
        )

    def update_base_denoiser(self) -> None:
        """
        Copy the denoiser, with its features extractor, into the frozen base denoiser.
        """
        self.base_denoiser.load_state_dict(self.denoiser.state_dict())
        self.base_features_extractor.load_state_dict(self.pi_features_extractor.state_dict())

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Moves parameters, by .to() for instance, away from where recorded graphs expect them.
        self._denoise_graphs.clear()
        return super()._apply(*args, **kwargs)

    def set_ft_denoising_steps(self, ft_denoising_steps: int) -> None:
        """
        Fine-tune another number of steps, over what has been learned so far as the base policy.

        :param ft_denoising_steps: K'.
        """
        self.update_base_denoiser()
        self.ft_denoising_steps = self._constructor_parameters["ft_denoising_steps"] = ft_denoising_steps
        self._stds_key = None

    def seed(self, seed: int) -> None:
        """
        Seed the generator that :meth:`predict` draws from.

        :param seed: The seed.
        """
        self._seed = seed
        self._generator: th.Generator | None = None

    @property
    def generator(self) -> th.Generator:
        """
        :return: The generator that :meth:`predict` draws from: its own, so that evaluation does not change training.
        """
        if self._generator is None or self._generator.device.type != self.device.type:
            self._generator = th.Generator(device=self.device).manual_seed(self._seed)
        return self._generator

    # ------------------------------------------------------------------ normalisation

    def set_normalization(
        self, obs_min: np.ndarray, obs_max: np.ndarray, action_min: np.ndarray, action_max: np.ndarray
    ) -> None:
        """
        Map these ranges to [-1, 1]: ``2 * ((x - min) / (max - min + 1e-6) - 0.5)``, and 0 for a dimension without range.

        :param obs_min: Smallest observation, of the observation space's shape. For a ``Dict``, the flat vectors of its keys
            that hold no images, one after the other in the order of its keys.
        :param obs_max: Largest observation.
        :param action_min: Smallest action, shape (Da,).
        :param action_max: Largest action.
        """
        obs_low, obs_range, action_low, action_range = (
            th.as_tensor(np.asarray(value, dtype=np.float64))
            for value in (obs_min, np.subtract(obs_max, obs_min), action_min, np.subtract(action_max, action_min))
        )
        obs_half, action_half = (obs_range + NORMALIZATION_EPS) / 2, (action_range + NORMALIZATION_EPS) / 2
        self.obs_center.copy_(obs_low + obs_half)
        self.obs_scale.copy_(th.where(obs_range > 0, 1 / obs_half, 0.0))
        self.action_center.copy_(th.where(action_range > 0, action_low + action_half, action_low))
        self.action_scale.copy_(action_half)

    @property
    def normalizes_observations(self) -> bool:
        """
        :return: Whether observations are normalised with ranges from demonstrations.
        """
        return bool((self.obs_center != 0).any() or (self.obs_scale != 1).any())

    def normalize_actions(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: Actions of the env, shape (..., Da).
        :return: The same in normalised action space.
        """
        return (actions - self.action_center) / self.action_scale

    def unnormalize_actions(self, actions: th.Tensor) -> np.ndarray:
        """
        :param actions: Normalised chunks, shape (B, Tp, Da).
        :return: Actions for the env, clipped to its bounds, shape (B, Tp, *action_space.shape).
        """
        env_actions = (self.action_center + self.action_scale * actions).cpu().numpy()
        env_actions = env_actions.reshape((*env_actions.shape[:-1], *self.action_space.shape))  # type: ignore[misc]
        return np.clip(env_actions, self.action_space.low, self.action_space.high)  # type: ignore[attr-defined]

    def extract_features(  # type: ignore[override]
        self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor | None = None
    ) -> th.Tensor:
        """
        :param obs: Observations, shape (B, ...).
        :param features_extractor: Which extractor to use; ``None`` means the actor's.
        :return: Features, shape (B, features_dim).
        """
        if isinstance(obs, dict):
            obs = obs | self._normalize_vectors(obs)
        elif self._vector_sizes:
            obs = (obs.float() - self.obs_center) * self.obs_scale
        extractor = self.pi_features_extractor if features_extractor is None else features_extractor
        return super(ActorCriticPolicy, self).extract_features(obs, extractor)

    def _normalize_vectors(self, obs: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
        """
        :param obs: Observations of a ``Dict``.
        :return: Those that are vectors, normalised.
        """
        normalized, start = {}, 0
        for key, size in self._vector_sizes.items():
            shape, rows = obs[key].shape[1:], slice(start, start + size)
            center, scale = self.obs_center[rows].view(shape), self.obs_scale[rows].view(shape)
            normalized[key] = (obs[key].float() - center) * scale
            start += size
        return normalized

    # ------------------------------------------------------------------ sampling

    @property
    def first_ft_position(self) -> int:
        """
        :return: Position in the denoising process of denoising index 0.
        """
        return self.inference_steps - self.ft_denoising_steps

    def draw_noise(self, n: int, generator: th.Generator | None = None) -> th.Tensor:
        """
        :param n: B, the number of decisions.
        :param generator: Where to draw from; ``None`` means PyTorch's default generator.
        :return: What :meth:`sample_chain` takes as ``noise``: standard normal, shape (S+1, B, Tp, Da).
        """
        shape = (self.inference_steps + 1, n, self.horizon, self.action_dim)
        return th.randn(shape, device=self.device, generator=generator)

    def sample_chain(
        self, obs: PyTorchObs, deterministic: bool = False, noise: th.Tensor | None = None, use_base: bool = False
    ) -> DenoisingChain:
        """
        Sample one chunk per observation (Ren et al. 2024, section 4.3 for the floors of the std).

        :param obs: Observations, shape (B, ...).
        :param deterministic: Evaluation instead of exploration: DDPM keeps a small std except at the last step, DDIM uses
            η = 0, and the initial iterate stays random.
        :param noise: Standard normal, shape (S+1, B, Tp, Da): the initial iterate, then one per step in the order in which
            they run, before ``noise_clip``. ``None`` draws it.
        :param use_base: Run the base denoiser at every step.
        :return: Chunks, chains and log-probabilities.
        """
        n_decisions = batch_size_of(obs)
        if noise is None:
            noise = self.draw_noise(n_decisions)
        n_base_steps = self.inference_steps if use_base else self.first_ft_position
        device = noise.device
        with th.inference_mode(), threads_for(n_decisions):
            features = base_features = None
            if n_base_steps > 0:
                base_features = self.extract_features(obs, self.base_features_extractor)  # type: ignore[arg-type]
            if n_base_steps < self.inference_steps:
                shared = base_features is not None and not self.extractor_learns
                features = base_features if shared else self.extract_features(obs)
            eta = None
            if self.learn_eta is not None:
                eta = self.learned_eta(self.extract_features(obs) if features is None else features)
            tensors = (base_features, features, noise, *self._sampling_stds(deterministic, eta, device), eta)
            if self._compile is True:
                chain = self._compiled_denoise(device, *tensors, n_base_steps, deterministic)
            elif self._compile == "auto" and device.type == "cuda":
                chain = self._denoise_graphs(tensors, n_base_steps, deterministic)
            else:
                chain = self._denoise(*tensors, n_base_steps, deterministic)
        # Copies, because tensors made in inference mode can't be used where gradients are computed.
        return DenoisingChain(*(tensor.clone() for tensor in chain))

    def autocast(self) -> AbstractContextManager[Any]:
        """
        :return: A context in which the networks' products have the policy's ``precision``. Distributions stay in float32.
        """
        return precision_context(self.device, self.precision)

    def _denoise(
        self,
        base_features: th.Tensor | None,
        features: th.Tensor | None,
        noise: th.Tensor,
        step_std: th.Tensor,
        log_prob_std: th.Tensor,
        learned_eta: th.Tensor | None,
        n_base_steps: int,
        deterministic: bool,
    ) -> DenoisingChain:
        """
        Run the denoising process: what is left of :meth:`sample_chain` to compile.

        :param base_features: The base denoiser's features, shape (B, features_dim), if it runs.
        :param features: The denoiser's features, likewise.
        :param noise: See :meth:`sample_chain`.
        :param step_std: Std of the noise that is added at each position, shape (S, 1, 1, 1) or (S, B, 1, Da).
        :param log_prob_std: Std of the log-probabilities, shape (K', 1, 1) or (B, K', 1, Da).
        :param learned_eta: DDIM's η, shape (B, 1, Da), if it is learned.
        :param n_base_steps: How many steps the base denoiser runs.
        :param deterministic: See :meth:`sample_chain`.
        :return: Chunks, chains and log-probabilities.
        """
        exploration_eta = self.eta if learned_eta is None else learned_eta
        eta = 0.0 if deterministic and self.process.is_ddim else exploration_eta
        with self.autocast():
            predictions = []
            if base_features is not None:
                predictions += self.base_denoiser.for_chain(base_features, self.process.timesteps[:n_base_steps])
            if features is not None:
                predictions += self.denoiser.for_chain(features, self.process.timesteps[n_base_steps:])
            step_noise = noise[1:].clamp(-self.noise_clip, self.noise_clip) * step_std
            sample, iterates, means = noise[0], [noise[0]], []
            for position, (predict, added_noise) in enumerate(zip(predictions, step_noise.unbind(), strict=True)):
                output = predict(sample).float()
                mean, _ = self.process.transition(sample, output, position, eta)
                if position >= self.first_ft_position:
                    # In log-probabilities η is always the one of exploration.
                    if eta is not exploration_eta:
                        means.append(self.process.transition(sample, output, position, exploration_eta)[0])
                    else:
                        means.append(mean)
                sample = mean + added_noise
                iterates.append(sample)
        iterates[-1] = self.process.clip_final(sample)
        chain = th.stack(iterates[self.first_ft_position :], dim=1)
        log_prob = gaussian_log_prob(chain[:, 1:], th.stack(means, dim=1), log_prob_std)
        return DenoisingChain(iterates[-1], chain, log_prob)

    def _sampling_stds(
        self, deterministic: bool, learned_eta: th.Tensor | None, device: th.device
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        :param deterministic: See :meth:`sample_chain`.
        :param learned_eta: DDIM's η, shape (B, 1, Da), if it is learned.
        :param device: Where the policy is.
        :return: The std of the noise that is added at each position, shape (S, 1, 1, 1) or (S, B, 1, Da), and the std of
            log-probabilities for each denoising index, shape (K', 1, 1) or (B, K', 1, Da).
        """
        key = (deterministic, self.eta, self.min_sampling_std, self.min_logprob_std, device)
        if key == self._stds_key and learned_eta is None:
            return self._stds
        eta = self.eta if learned_eta is None else learned_eta
        sigma = self.process.sigmas()[:, None, None, None]
        if not deterministic:
            std = self._with_eta(sigma, eta).clamp(min=self.min_sampling_std)
        elif self.process.is_ddim:
            std = th.zeros_like(sigma)
        else:
            std = sigma.clamp(min=DDPM_EVALUATION_STD)
            std[-1] = 0.0
        log_prob_eta = eta if learned_eta is None else learned_eta[:, None]
        log_prob_std = self._with_eta(sigma[self.first_ft_position :, 0], log_prob_eta).clamp(min=self.min_logprob_std)
        if learned_eta is None:
            self._stds_key, self._stds = key, (std, log_prob_std)
        return std, log_prob_std

    def _with_eta(self, sigma: th.Tensor, eta: float | th.Tensor) -> th.Tensor:
        """
        :param sigma: Std of some steps with η = 1.
        :param eta: DDIM's η.
        :return: Their std.
        """
        return eta * sigma if self.process.is_ddim else sigma

    def learned_eta(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: The actor's features, shape (N, features_dim).
        :return: DDIM's η, within ``eta_range``, shape (N, 1, Da). Differentiable, but not in the features.
        """
        if self.learn_eta == "state":
            logits = self.eta_network(features.detach())
        else:
            bias: Any = self.eta_network[-1].bias
            logits = bias.expand(len(features), -1)
        low, high = self.eta_range
        return (low + (high - low) * logits.sigmoid())[:, None]

    def encode(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: The actor's features, shape (N, features_dim).
        :return: What the denoiser is conditioned on, shape (N, ...).
        """
        with self.autocast():
            return self.denoiser.encode(features)

    def pair_mean(
        self,
        denoiser: Denoiser,
        condition: th.Tensor,
        chain_prev: th.Tensor,
        denoising_index: th.Tensor,
        eta: float | th.Tensor,
    ) -> th.Tensor:
        """
        Means of single denoising steps, which may be different steps of different chains. Differentiable.

        :param denoiser: ``denoiser`` or ``base_denoiser``.
        :param condition: Its ``encode`` of each pair's features, shape (N, ...).
        :param chain_prev: Iterates before the steps, shape (N, Tp, Da).
        :param denoising_index: Which steps, in 0 … K'-1, shape (N,).
        :param eta: DDIM's η, a number or of shape (N, 1, Da).
        :return: Means of the iterates after the steps, shape (N, Tp, Da).
        """
        with self.autocast():
            embeddings = denoiser.embed_timesteps(self.process.timesteps[self.first_ft_position :])
            output = denoiser(chain_prev, embeddings[denoising_index], condition).float()
        return self.process.transition(chain_prev, output, denoising_index + self.first_ft_position, eta)[0]

    def pair_std(self, denoising_index: th.Tensor, eta: float | th.Tensor) -> th.Tensor:
        """
        :param denoising_index: Which steps, shape (N,).
        :param eta: DDIM's η, a number or of shape (N, 1, Da).
        :return: Their std in log-probabilities, shape (N, 1, 1) or (N, 1, Da).
        """
        sigma = self.process.sigmas()[self.first_ft_position :][denoising_index][:, None, None]
        return self._with_eta(sigma, eta).clamp(min=self.min_logprob_std)

    def chain_log_prob(self, obs: PyTorchObs, chain: th.Tensor) -> th.Tensor:
        """
        Log-probabilities of whole chains. Differentiable.

        :param obs: Observations, shape (B, ...).
        :param chain: Chains, shape (B, K'+1, Tp, Da).
        :return: Elementwise log-densities, shape (B, K', Tp, Da).
        """
        n_decisions, n_steps = len(chain), self.ft_denoising_steps
        if chain.shape[1] != n_steps + 1:
            raise ValueError(f"chain has {chain.shape[1]} iterates, but ft_denoising_steps={n_steps} means {n_steps + 1}.")
        features = self.extract_features(obs)
        condition = self.encode(features).repeat_interleave(n_steps, dim=0)
        eta = self.eta if self.learn_eta is None else self.learned_eta(features).repeat_interleave(n_steps, dim=0)
        denoising_index = th.arange(n_steps, device=chain.device).repeat(n_decisions)
        prev, following = chain[:, :-1].flatten(0, 1), chain[:, 1:].flatten(0, 1)
        mean = self.pair_mean(self.denoiser, condition, prev, denoising_index, eta)
        return gaussian_log_prob(following, mean, self.pair_std(denoising_index, eta)).view_as(chain[:, 1:])

    def bc_loss(
        self, obs: PyTorchObs, actions: th.Tensor, timesteps: th.Tensor | None = None, noise: th.Tensor | None = None
    ) -> th.Tensor:
        """
        The supervised loss of the denoiser (Ho et al. 2020, eq. 14).

        :param obs: Observations, shape (B, ...).
        :param actions: Normalised chunks, shape (B, Tp, Da).
        :param timesteps: Training timesteps in 0 … K-1, shape (B,). ``None`` draws them.
        :param noise: Standard normal, of the shape of ``actions``. ``None`` draws it.
        :return: Mean squared error to what ``prediction_type`` asks for, a scalar.
        """
        if timesteps is None:
            timesteps = th.randint(self.denoising_steps, (len(actions),), device=actions.device)
        if noise is None:
            noise = th.randn_like(actions)
        noisy = self.process.training_scheduler.add_noise(actions, noise, timesteps)
        with self.autocast():
            embeddings = self.denoiser.embed_timesteps(th.arange(self.denoising_steps, device=actions.device))
            output = self.denoiser(noisy, embeddings[timesteps], self.encode(self.extract_features(obs)))
        return F.mse_loss(output.float(), self.process.denoising_target(actions, noise, timesteps))

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observations, shape (B, ...).
        :return: Values, shape (B, 1).
        """
        features = self.extract_features(obs, self.vf_features_extractor)  # type: ignore[arg-type]
        with self.autocast():
            return self.critic(features).float()

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:  # type: ignore[override]
        """
        Sample a fresh chain.

        :param obs: Observations, shape (B, ...).
        :param deterministic: See :meth:`sample_chain`.
        :return: Normalised chunks (B, Tp, Da), values (B, 1) and elementwise log-probabilities (B, K', Tp, Da).
        """
        actions, _, log_prob = self.sample_chain(obs, deterministic)
        return actions, self.predict_values(obs), log_prob

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        Not defined for a diffusion policy.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError(
            "A diffusion policy has no closed-form probability of an action, only of its denoising steps: "
            "use sample_chain(obs) and chain_log_prob(obs, chain)."
        )

    def get_distribution(self, obs: PyTorchObs) -> Any:
        """
        Not defined for a diffusion policy.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError(
            "The action distribution of a diffusion policy has no closed form: use sample_chain(obs) to draw from it."
        )

    # ------------------------------------------------------------------ acting

    def plan(self, obs: PyTorchObs, deterministic: bool = False) -> np.ndarray:
        """
        Sample chunks for acting, from the policy's own generator.

        :param obs: Observations, shape (B, ...).
        :param deterministic: Whether to act deterministically; see ``deterministic_noise``.
        :return: Actions for the env, shape (B, Tp, *action_space.shape).
        """
        if not deterministic or self.deterministic_noise == "random":
            noise = self.draw_noise(batch_size_of(obs), self.generator)
        else:
            noise = self._deterministic_noise(obs)
        return self.unnormalize_actions(self.sample_chain(obs, deterministic, noise).actions)

    def _deterministic_noise(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observations, shape (B, ...).
        :return: Noise that depends on nothing but each observation, shape (S+1, B, Tp, Da).
        """
        n_decisions = batch_size_of(obs)
        shape = (self.inference_steps + 1, n_decisions, self.horizon, self.action_dim)
        if self.deterministic_noise == "zero":
            return th.zeros(shape, device=self.device)
        arrays = [part.cpu().numpy() for part in parts_of(obs)]
        noise = np.empty(shape, dtype=np.float32)
        for row in range(n_decisions):
            seed = 0
            for array in arrays:
                # Adding 0 turns -0.0 into 0.0, which is the same observation.
                seed = zlib.crc32((array[row].astype(np.float32) + 0.0).tobytes(), seed)
            noise[:, row] = np.random.default_rng(seed).standard_normal(noise[:, row].shape, dtype=np.float32)
        return th.as_tensor(noise, device=self.device)

    def empty_chunks(self, n_envs: int, n_actions: int) -> np.ndarray:
        """
        :param n_envs: Number of envs.
        :param n_actions: Actions in a chunk.
        :return: Room for the envs' chunks, of a type that holds the action space's bounds exactly.
        """
        dtype = np.result_type(np.float32, self.action_space.dtype)  # type: ignore[arg-type]
        return np.zeros((n_envs, n_actions, *self.action_space.shape), dtype=dtype)  # type: ignore[misc]

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return th.as_tensor(self.plan(observation, deterministic)[:, 0], device=self.device)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the next action, planning a new chunk for an env only when its last one is used up or its episode starts.
        Called without ``state``, it plans every time.

        :param observation: The observation or, for several envs, observations.
        :param state: What the last call returned: the envs' chunks, shape (n_envs, act_steps, *action_space.shape), and how
            many actions of them were executed, shape (n_envs,).
        :param episode_start: Which envs have just been reset, shape (n_envs,).
        :param deterministic: Whether to act deterministically; see ``deterministic_noise``.
        :return: The actions and the next state.
        :raises ValueError: for a state of another number of envs.
        """
        self.set_training_mode(False)
        if isinstance(observation, tuple):
            raise ValueError(
                "observation is a tuple, probably what a Gymnasium env's reset() returned: pass its first element, "
                "or use the VecEnv API, whose reset() returns observations only."
            )
        obs_tensor, vectorized_env = self.obs_to_tensor(observation)
        n_envs = batch_size_of(obs_tensor)
        if state is None:
            chunks = self.empty_chunks(n_envs, self.act_steps)
            n_executed = np.full(n_envs, self.act_steps)
        else:
            chunks, n_executed = state[0].copy(), state[1].copy()
            if len(chunks) != n_envs:
                raise ValueError(
                    f"state is of {len(chunks)} envs, but observation of {n_envs}: pass state=None to start anew."
                )
        must_plan = n_executed >= self.act_steps
        if episode_start is not None:
            must_plan = must_plan | np.asarray(episode_start, dtype=bool)
        if must_plan.any():
            planned = self.plan(take(obs_tensor, th.as_tensor(must_plan)), deterministic)
            chunks[must_plan] = planned[:, : self.act_steps]
            n_executed[must_plan] = 0
        actions = chunks[np.arange(n_envs), n_executed]
        n_executed += 1
        return actions if vectorized_env else actions[0], (chunks, n_executed)


class DiffusionMlpPolicy(DiffusionActorCriticPolicy):
    __doc__ = DiffusionActorCriticPolicy.__doc__

    def _make_denoiser(self) -> Denoiser:
        arguments = self._constructor_parameters
        return MlpDenoiser(
            self.action_dim,
            self.horizon,
            self.features_dim,
            self.denoising_steps,
            self.net_arch["pi"],  # type: ignore[call-overload]
            time_dim=arguments["time_dim"],
            activation_fn=self.activation_fn,
            residual=arguments["residual"],
            layer_norm=arguments["layer_norm"],
            obs_encoder_arch=arguments["obs_encoder_arch"],
            film=arguments["film"],
        )


class DiffusionCnnPolicy(DiffusionMlpPolicy):
    __doc__ = DiffusionActorCriticPolicy.__doc__

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] | str = NatureCNN, **kwargs: Any
    ) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)  # type: ignore[misc]


class DiffusionMultiInputPolicy(DiffusionMlpPolicy):
    __doc__ = DiffusionActorCriticPolicy.__doc__

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] | str = CombinedExtractor, **kwargs: Any
    ) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)  # type: ignore[misc]


class _SequencePolicy(DiffusionActorCriticPolicy):
    """
    A policy whose denoiser works along the chunk, where a chunk of one action would leave it nothing to do.
    """

    def __init__(self, *args: Any, horizon: int = 4, **kwargs: Any) -> None:
        super().__init__(*args, horizon=horizon, **kwargs)  # type: ignore[misc]

    def _widths(self) -> Sequence[int]:
        """
        :return: Those of the denoiser.
        :raises ValueError: for settings that it does not have.
        """
        for name in ("layer_norm", "obs_encoder_arch", "film"):
            if self._constructor_parameters[name]:
                raise ValueError(
                    f"{name}={self._constructor_parameters[name]} is a setting of DiffusionMlpPolicy: {type(self).__name__}'s "
                    "denoiser has its own."
                )
        return self.net_arch["pi"]  # type: ignore[call-overload]


class DiffusionUnetPolicy(_SequencePolicy):
    __doc__ = DiffusionActorCriticPolicy.__doc__

    @staticmethod
    def _default_net_arch() -> dict[str, list[int]]:
        return dict(pi=[64, 128], vf=[256, 256, 256])

    def _make_denoiser(self) -> Denoiser:
        return UnetDenoiser(self.action_dim, self.horizon, self.features_dim, self._widths(), activation_fn=self.activation_fn)


class DiffusionTransformerPolicy(_SequencePolicy):
    __doc__ = DiffusionActorCriticPolicy.__doc__

    @staticmethod
    def _default_net_arch() -> dict[str, list[int]]:
        return dict(pi=[128, 128], vf=[256, 256, 256])

    def _make_denoiser(self) -> Denoiser:
        return TransformerDenoiser(self.action_dim, self.horizon, self.features_dim, self.denoising_steps, self._widths())


def check_eta(eta: float, learn_eta: str | None, eta_range: tuple[float, float], is_ddim: bool) -> None:
    """
    :param eta: DDIM's η.
    :param learn_eta: How it is learned.
    :param eta_range: Bounds of a learned one.
    :param is_ddim: Whether the sampler is DDIM.
    :raises ValueError: naming the argument that does not fit.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be between 0 and 1.")
    if learn_eta not in (None, "action", "state"):
        raise ValueError(f"learn_eta={learn_eta!r} is unknown: choose 'action', 'state' or None.")
    if learn_eta is not None and not is_ddim:
        raise ValueError(f"learn_eta={learn_eta!r}: only DDIM has an η to learn, so use scheduler='ddim'.")
    if not 0 <= eta_range[0] < eta_range[1] <= 1:
        raise ValueError(f"eta_range={eta_range} must be two numbers with 0 <= low < high <= 1.")


def check_action_space(action_space: spaces.Space) -> None:
    """
    :param action_space: Action space of an env.
    :raises ValueError: if a diffusion policy can't act in it, saying what can be done.
    """
    if not isinstance(action_space, spaces.Box):
        raise ValueError(
            f"env has the action space {action_space}, but diffusion policies are for continuous actions "
            "(a gymnasium.spaces.Box): use another algorithm, such as PPO, for discrete ones."
        )
    if action_space.dtype is None or action_space.dtype.kind != "f":
        raise ValueError(
            f"env has the action space {action_space}, but diffusion policies need one of floating-point numbers."
        )
    with np.errstate(over="ignore"):
        finite = np.isfinite(action_space.high.astype(np.float32) - action_space.low.astype(np.float32)).all()
    if not finite:
        raise ValueError(
            f"env has the action space {action_space} with infinite bounds, but chunks are scaled to the bounds: "
            "wrap the env in gymnasium.wrappers.RescaleAction or set finite low and high."
        )
