"""What all diffusion policies have in common: an actor that denoises chunks, a critic, and what they make of observations."""

import inspect
import math
from abc import abstractmethod
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_dppo.arguments import SAMPLER_ARGUMENTS, by_network, check_action_space, check_names, check_policy_arguments
from sb3_dppo.chunks import ChunkPolicy
from sb3_dppo.diffusion.denoisers import Denoiser, activation_class, gather_rows, make_mlp
from sb3_dppo.diffusion.noise import NoiseNetwork
from sb3_dppo.diffusion.process import DenoisingChain, Process
from sb3_dppo.diffusion.processes import make_process
from sb3_dppo.diffusion.sampler import DiffusionSampler
from sb3_dppo.diffusion.settings import SamplerConfig
from sb3_dppo.features.extractors import EXTRACTORS
from sb3_dppo.features.observations import batch_size_of, check_observation_space, take
from sb3_dppo.normalization import Normalizer

# Of orthogonal initial weights, as Stable-Baselines3's policies have: of hidden layers, and of the layer that outputs actions.
HIDDEN_GAIN, ACTION_GAIN = 2**0.5, 0.01
# The arguments that make the denoising process of a trained denoiser, besides the sampler's.
PROCESS_ARGUMENTS = (
    *("denoising_steps", "beta_schedule", "prediction_type", "clip_sample_range", "clip_noise_pred", "clip_final_action"),
)


class DiffusionActorCriticPolicy(ChunkPolicy):
    """
    An actor that denoises chunks of actions and a critic of observations (Ren et al. 2024, section 4).

    The defaults are for learning from scratch. ``PAPER_POLICY_KWARGS`` in :mod:`sb3_dppo.policies` are the
    paper's for imitation and fine-tuning.

    Two denoisers exist: ``denoiser`` is trained and runs the last ``ft_denoising_steps`` of the sampler's steps;
    ``base_denoiser`` is the frozen copy that runs those before. Chains live in normalised action space, [-1, 1].

    These arguments are what a trained policy fixes. The sampler's settings may be changed whenever it is loaded;
    :class:`~sb3_dppo.DPPO` passes them on from its own arguments of the same names.

    :param observation_space: Observation space: a ``Box`` that is no image, ``Discrete``, ``MultiDiscrete`` or
        ``MultiBinary``; an image for ``DiffusionCnnPolicy``; a ``Dict`` of vectors and images for
        ``DiffusionMultiInputPolicy``.
    :param action_space: Action space, a ``Box`` with finite bounds.
    :param lr_schedule: Learning rate schedule of the actor (could be constant).
    :param net_arch: Hidden widths: of the denoiser under ``pi`` and of the critic under ``vf``, or a list for both.
    :param denoising_steps: K, the steps of the diffusion model; of a flow, those that are run unless ``inference_steps`` says
        otherwise.
    :param beta_schedule: diffusers' name of the noise schedule.
    :param horizon: Tp, the actions predicted at once. (4 is the default of ``DiffusionUnetPolicy`` and
        ``DiffusionTransformerPolicy``.)
    :param first_action: Number of the first action in a chunk that is executed: where a chunk begins at the first of several
        observations, as in Chi et al. (2023), their number less one.
    :param prediction_type: What the denoiser predicts: "epsilon" (the noise), "sample" (the clean chunk) or "v_prediction";
        "flow", the velocity of a straight path between noise and chunk, trained by flow matching, for chains of few steps;
        "mean", that of a Gaussian policy, which has no noisy chunk to look at and one step: its BC is least squares.
    :param clip_sample_range: Clamp of the predicted clean chunk to ± this value, or ``None``. "auto": 1, as in the paper, and
        ``None`` where ``prediction_type`` is "sample" or "mean": the denoiser's output is the chunk then and would have no
        gradient beyond the clamp.
    :param clip_noise_pred: DDIM only: clamp of the noise that follows from it, or ``None``.
    :param clip_final_action: Clamp of the final sample, or ``None``.
    :param residual: Use residual blocks in the denoiser, so that ``pi`` must be an odd number of equal widths. ``None``: where
        it is one of three or more. Like ``layer_norm``, ``obs_encoder_arch``, ``film`` and ``time_dim`` not a setting of
        ``DiffusionUnetPolicy``'s and ``DiffusionTransformerPolicy``'s denoisers, except that a UNet with ``net="film"`` takes
        ``obs_encoder_arch`` and ``time_dim``.
    :param critic_residual: The same for the critic; ``None`` means as ``residual``.
    :param layer_norm: Normalise the hidden layers of the denoiser.
    :param critic_layer_norm: Normalise the hidden layers of the critic.
    :param obs_encoder_arch: Widths of an encoder of the observation inside the denoiser, or ``None``.
    :param film: Let time and observation scale and shift the denoiser's hidden layers, too (FiLM).
    :param time_dim: Size of the time embedding, even.
    :param activation_fn: Activation of the denoiser and its observation encoder, a class or a name such as "relu"; the
        transformer keeps its own, and diffusers' UNet, which embeds features with it. ``None``:
        Tanh, as in PPO, where ``prediction_type`` is "sample" or "mean", and elsewhere ReLU, as in the paper.
    :param critic_activation_fn: Activation of the critic. ``None``: in the same way Tanh or Mish.
    :param ortho_init: Use orthogonal initial weights in the critic and in ``DiffusionMlpPolicy``'s denoiser, whose last layer
        is small then: an untrained policy acts around the centre of the action space and explores evenly (Andrychowicz et
        al. 2021). ``None``: where ``prediction_type`` is "sample" or "mean".
    :param log_std_init: Initial log of the std's floor, where that is learned (see ``min_sampling_std``).
    :param features_extractor_class: Features extractor, or the name of one of SB3's or ours, as in YAML; actor, base denoiser
        and critic each have their own.
    :param features_extractor_kwargs: Keyword arguments for it.
    :param normalize_images: Whether to divide images by 255.
    :param optimizer_class: Optimiser of the actor and of the critic.
    :param optimizer_kwargs: Keyword arguments for it, except the learning rate. AdamW has no weight decay unless named here.
    :param share_features_extractor: Not supported: the critic's gradients would change the features that the frozen base
        policy was trained with.
    :param sampler: Settings of :class:`~sb3_dppo.diffusion.settings.SamplerConfig`.
    :raises ValueError: naming the argument, for settings that don't fit together.
    :raises TypeError: for an argument that does not exist.
    """

    denoiser: Denoiser
    base_denoiser: Denoiser
    critic: nn.Sequential
    noise_network: NoiseNetwork
    process: Process
    _default_net_arch: ClassVar[dict[str, list[int]]] = dict(pi=[64, 64], vf=[64, 64])

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        denoising_steps: int = 2,
        beta_schedule: str = "squaredcos_cap_v2",
        horizon: int = 1,
        first_action: int = 0,
        prediction_type: str = "sample",
        clip_sample_range: float | str | None = "auto",
        clip_noise_pred: float | None = None,
        clip_final_action: float | None = None,
        residual: bool | None = None,
        critic_residual: bool | None = None,
        layer_norm: bool = False,
        critic_layer_norm: bool = False,
        obs_encoder_arch: list[int] | None = None,
        film: bool = False,
        time_dim: int = 16,
        activation_fn: type[nn.Module] | str | None = None,
        critic_activation_fn: type[nn.Module] | str | None = None,
        ortho_init: bool | None = None,
        log_std_init: float = 0.0,
        features_extractor_class: type[BaseFeaturesExtractor] | str = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = False,
        **sampler: Any,
    ) -> None:
        own = set(inspect.signature(DiffusionActorCriticPolicy).parameters) - {"sampler"}
        check_names(type(self).__name__, sampler, own | set(SAMPLER_ARGUMENTS))
        check_action_space(action_space)
        if isinstance(features_extractor_class, str):
            if features_extractor_class not in EXTRACTORS:
                name = f"features_extractor_class={features_extractor_class!r}"
                raise ValueError(f"{name} is unknown: choose one of {list(EXTRACTORS)} or a class.")
            features_extractor_class = EXTRACTORS[features_extractor_class]
        check_observation_space(observation_space, features_extractor_class, normalize_images)
        # PPO's networks where actions are predicted, the paper's elsewhere.
        as_ppo = prediction_type in ("sample", "mean")
        activations = ("tanh", "tanh") if as_ppo else ("relu", "mish")
        activation_fn = activation_class("activation_fn", activation_fn or activations[0])
        critic_activation_fn = activation_class("critic_activation_fn", critic_activation_fn or activations[1])
        ortho_init = as_ppo if ortho_init is None else ortho_init
        check_policy_arguments(locals())
        if clip_sample_range == "auto":
            clip_sample_range = None if as_ppo else 1.0
        self._constructor_parameters = {name: value for name, value in locals().items() if name in SETTINGS}
        self.horizon = int(horizon)
        self.action_dim = get_action_dim(action_space)
        self._initial_config = SamplerConfig(**sampler)

        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=self._default_net_arch | (by_network(net_arch) or {}),
            activation_fn=activation_fn,
            ortho_init=ortho_init,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=dict(features_extractor_kwargs or {}),
            share_features_extractor=False,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=self._default_optimizer_kwargs(optimizer_class, optimizer_kwargs or {}),
        )

    @staticmethod
    def _default_optimizer_kwargs(optimizer_class: type[th.optim.Optimizer], given: dict[str, Any]) -> dict[str, Any]:
        if optimizer_class is not th.optim.AdamW:
            return given
        # AdamW's own weight decay of 0.01 would pull a fine-tuned policy away from its pre-trained weights.
        return dict(weight_decay=0.0, fused=not given.get("foreach") and not given.get("differentiable")) | given

    @abstractmethod
    def _make_denoiser(self) -> Denoiser:
        """The network of this kind of policy."""

    def _build(self, lr_schedule: Schedule) -> None:
        """Create networks, normalisation, sampler and optimisers."""
        arguments = self._constructor_parameters
        self.denoiser = self._make_denoiser()
        residual = arguments["residual"] if arguments["critic_residual"] is None else arguments["critic_residual"]
        self.critic = make_mlp(
            self.features_dim,
            1,
            self.net_arch["vf"],  # type: ignore[call-overload]
            arguments["critic_activation_fn"],
            residual=residual,
            layer_norm=arguments["critic_layer_norm"],
        )
        if self.ortho_init:
            self.critic.apply(partial(self.init_weights, gain=HIDDEN_GAIN))
            self.init_weights(self.critic[-1], gain=1.0)
        self.noise_network = NoiseNetwork(self.features_dim, self.action_dim)
        self.log_std = nn.Parameter(th.full((self.action_dim,), float(arguments["log_std_init"])))
        self.base_denoiser = deepcopy(self.denoiser).requires_grad_(False)
        self.base_features_extractor = deepcopy(self.pi_features_extractor).requires_grad_(False)
        # Without parameters and buffers, the actor's features are also those of the base policy.
        self.extractor_learns = len(self.pi_features_extractor.state_dict()) > 0
        box: Any = self.action_space
        self.normalizer = Normalizer(self.observation_space, box, self.normalize_images)
        self.process = self._make_process(self._initial_config)
        chunk_shape, first_action = (self.horizon, self.action_dim), arguments["first_action"]
        self.sampler = DiffusionSampler(self._initial_config, self, chunk_shape, first_action)
        self.make_optimizers(lr_schedule(1))
        self.seed(int(th.randint(2**31, (), device="cpu")))

    @property
    def initial_std(self) -> float:
        """What a learned floor of the std begins with."""
        return math.exp(self._constructor_parameters["log_std_init"])

    def _make_process(self, config: SamplerConfig) -> Process:
        arguments = {name: self._constructor_parameters[name] for name in PROCESS_ARGUMENTS}
        # Schedulers compute with numbers, also where the networks are only shapes.
        with th.device("cpu"):
            process = make_process(config.scheduler, inference_steps=config.inference_steps, **arguments)
        return process.to(self.device)

    def configure_sampler(self, config: SamplerConfig) -> None:
        """Sample with other settings from now on; the base policy stays. At a ValueError the old ones are kept."""
        before, process = self.sampler.config, self.process
        try:
            if (config.scheduler, config.inference_steps) != (before.scheduler, before.inference_steps):
                self.process = self._make_process(config)
            self.sampler.config = config
        except ValueError:
            self.process = process
            raise

    def make_optimizers(self, learning_rate: float) -> None:
        """Create new optimisers, with no state and this initial learning rate, for actor, critic and noise network."""
        actor = [*self.denoiser.parameters(), *self.pi_features_extractor.parameters(), self.log_std]
        critic = [*self.critic.parameters(), *self.vf_features_extractor.parameters()]
        self.optimizer, self.critic_optimizer, self.noise_optimizer = (
            self.optimizer_class(parameters, lr=learning_rate, **self.optimizer_kwargs)  # type: ignore[call-arg]
            for parameters in (actor, critic, list(self.noise_network.parameters()))
        )
        for optimizer in self.optimizers:
            optimizer.register_step_post_hook(self._forget_constants)

    def _forget_constants(self, *_: Any) -> None:
        # Autograd does not see the step of a fused optimiser.
        self.sampler.constants.clear()

    @property
    def optimizers(self) -> list[th.optim.Optimizer]:
        """Those of the actor, the critic and the noise network."""
        return [self.optimizer, self.critic_optimizer, self.noise_optimizer]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        env: dict[str, Any] = dict(observation_space=self.observation_space, action_space=self.action_space)
        return env | dict(lr_schedule=self._dummy_schedule) | self._constructor_parameters | vars(self.sampler.config)

    def update_base_denoiser(self) -> None:
        """Copy the denoiser, with its features extractor, into the frozen base denoiser."""
        self.base_denoiser.load_state_dict(self.denoiser.state_dict())
        self.base_features_extractor.load_state_dict(self.pi_features_extractor.state_dict())

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode, but for the base policy: it is frozen."""
        super().train(mode)
        self.base_denoiser.eval()
        self.base_features_extractor.eval()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Moves parameters, by .to() for instance, away from where the sampler's records expect them.
        self.sampler.forget()
        return super()._apply(*args, **kwargs)

    def _prepare(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor) -> Any:
        """What an extractor takes: normalised, preprocessed and, in training, augmented, if it has a method for that."""
        normalized = self.normalizer.normalize_observations(obs)
        prepared = preprocess_obs(normalized, self.observation_space, normalize_images=self.normalize_images)
        augment: Any = getattr(features_extractor, "augment", None)
        return augment(prepared) if augment is not None and features_extractor.training else prepared

    def extract_features(  # type: ignore[override]
        self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor | None = None
    ) -> th.Tensor:
        """
        :param obs: Observations, shape (B, ...).
        :param features_extractor: Which extractor to use; ``None`` means the actor's.
        :return: Features, shape (B, features_dim).
        """
        extractor = self.pi_features_extractor if features_extractor is None else features_extractor
        return extractor(self._prepare(obs, extractor))  # type: ignore[arg-type]

    def pair_features(
        self, observations: PyTorchObs, decision_index: th.Tensor, with_base: bool
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """
        Features of decisions, of which one may occur several times: an extractor with parameters sees each once.

        :param observations: Of all decisions, shape (D, ...).
        :param decision_index: Which decisions, shape (N,).
        :param with_base: Whether the base policy's features are wanted, too. It sees the same augmented observations.
        :return: The actor's features and those of the base policy, or ``None``, shape (N, features_dim).
        """
        rows = None
        if self.extractor_learns:
            decision_index, rows = decision_index.unique(return_inverse=True)
        prepared = self._prepare(take(observations, decision_index), self.pi_features_extractor)  # type: ignore[arg-type]
        extractors: list[Any] = [self.pi_features_extractor, *([self.base_features_extractor] if with_base else [])]
        features = [extractor(prepared) for extractor in extractors]
        features = features if rows is None else [gather_rows(value, rows) for value in features]
        return features[0], features[1] if with_base else None

    def shared_features(self, obs: PyTorchObs) -> th.Tensor | None:
        """
        Features that actor and critic have in common, to extract them once: those of an extractor without parameters.

        :param obs: Observations, shape (B, ...).
        :return: Shape (B, features_dim), or ``None`` where each has its own.
        """
        return None if self.extractor_learns else self.extract_features(obs)

    def sample_chain(
        self,
        obs: PyTorchObs,
        deterministic: bool = False,
        noise: th.Tensor | None = None,
        use_base: bool = False,
        features: th.Tensor | None = None,
    ) -> DenoisingChain:
        """
        Sample one chunk per observation, see :meth:`~sb3_dppo.diffusion.sampler.DiffusionSampler.sample`.

        :param obs: Observations, shape (B, ...).
        :param deterministic: Evaluation instead of exploration.
        :param noise: Standard normal, shape (S+1, B, Tp, Da). ``None`` draws it.
        :param use_base: Run the base denoiser at every step.
        :param features: Those of :meth:`shared_features`, where they are known.
        :return: Chunks, chains and log-probabilities.
        :raises ValueError: for noise of another shape.
        """
        sampler, n_decisions = self.sampler, batch_size_of(obs)
        if noise is None:
            noise = sampler.draw_noise(n_decisions)
        elif noise.shape != (shape := sampler.noise_shape(n_decisions)):
            raise ValueError(f"noise has the shape {tuple(noise.shape)}, but must have {shape}: see draw_noise.")
        n_base_steps = sampler.inference_steps if use_base else sampler.n_base_steps
        with th.no_grad():
            base_features = features = self.shared_features(obs) if features is None else features
            if features is None and n_base_steps > 0:
                base_features = self.extract_features(obs, self.base_features_extractor)  # type: ignore[arg-type]
            if features is None and (n_base_steps < sampler.inference_steps or sampler.config.has_noise_network):
                features = self.extract_features(obs)
            return sampler.sample(features, base_features, noise, n_base_steps, deterministic)

    def draw_noise(self, n: int, generator: th.Generator | None = None) -> th.Tensor:
        """What :meth:`sample_chain` takes as ``noise``: standard normal, shape (S+1, n, Tp, Da)."""
        return self.sampler.draw_noise(n, generator)

    def chain_log_prob(self, obs: PyTorchObs, chain: th.Tensor) -> th.Tensor:
        """
        Log-probabilities of whole chains, see :meth:`~sb3_dppo.diffusion.sampler.DiffusionSampler.chain_log_prob`.

        :param obs: Observations, shape (B, ...).
        :param chain: Chains, shape (B, K'+1, Tp, Da).
        :return: Elementwise log-densities, shape (B, K', Tp, Da). Differentiable.
        """
        return self.sampler.chain_log_prob(self.extract_features(obs), chain)

    def bc_loss(
        self, obs: PyTorchObs, actions: th.Tensor, timesteps: th.Tensor | None = None, noise: th.Tensor | None = None
    ) -> th.Tensor:
        """
        The supervised loss of the denoiser (Ho et al. 2020, eq. 14).

        :param obs: Observations, shape (B, ...).
        :param actions: Normalised chunks, shape (B, Tp, Da).
        :param timesteps: Training timesteps, shape (B,): 0 … K-1, or of a flow 0 to 20. ``None`` draws them.
        :param noise: Standard normal, of the shape of ``actions``. ``None`` draws it.
        :return: Mean squared error to what ``prediction_type`` asks for, a scalar.
        """
        if timesteps is None:
            timesteps = self.process.draw_timesteps(len(actions), actions.device)
        if noise is None:
            noise = th.randn_like(actions)
        return self.sampler.bc_loss(self.extract_features(obs), actions, timesteps, noise)

    def predict_values(self, obs: PyTorchObs, features: th.Tensor | None = None) -> th.Tensor:
        """Values of observations, shape (B, 1), whose :meth:`shared_features` may be known."""
        if features is None:
            features = self.extract_features(obs, self.vf_features_extractor)  # type: ignore[arg-type]
        with self.sampler.autocast():
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


# What a trained policy fixes: all arguments but self, what the env and the algorithm give, and the sampler's.
SETTINGS = tuple(inspect.signature(DiffusionActorCriticPolicy.__init__).parameters)[4:-1]
