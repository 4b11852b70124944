"""Diffusion policies by the network that denoises."""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN

from sb3_dppo.actor_critic import ACTION_GAIN, HIDDEN_GAIN, DiffusionActorCriticPolicy
from sb3_dppo.arguments import check_names
from sb3_dppo.diffusion.denoisers import Denoiser, MlpDenoiser, TransformerDenoiser, UnetDenoiser
from sb3_dppo.diffusion.film_unet import FilmUnetDenoiser

#: The paper's policies for Gym tasks, in policy_kwargs' terms, for pre-training and fine-tuning (Ren et al. 2024, table A7).
#: The constructor's own defaults are for learning from scratch.
PAPER_POLICY_KWARGS: dict[str, Any] = dict(
    denoising_steps=20,
    horizon=4,
    prediction_type="epsilon",
    clip_sample_range=1.0,
    net_arch=dict(pi=[512, 512, 512], vf=[256, 256, 256]),
)


class DiffusionMlpPolicy(DiffusionActorCriticPolicy):
    """
    A policy whose denoiser is an MLP of chunk, time and features. Its arguments are those of
    :class:`~sb3_dppo.actor_critic.DiffusionActorCriticPolicy`.
    """

    def _make_denoiser(self) -> Denoiser:
        arguments = self._constructor_parameters
        denoiser = MlpDenoiser(
            self.action_dim,
            self.horizon,
            self.features_dim,
            arguments["denoising_steps"],
            self.net_arch["pi"],  # type: ignore[call-overload]
            time_dim=arguments["time_dim"],
            activation_fn=self.activation_fn,
            residual=arguments["residual"],
            layer_norm=arguments["layer_norm"],
            obs_encoder_arch=arguments["obs_encoder_arch"],
            film=arguments["film"],
        )
        if self.ortho_init:
            denoiser.apply(partial(self.init_weights, gain=HIDDEN_GAIN))
            self.init_weights(denoiser.mlp[-1], gain=ACTION_GAIN)
        return denoiser


class DiffusionCnnPolicy(DiffusionMlpPolicy):
    """
    ``DiffusionMlpPolicy`` for images, with SB3's ``NatureCNN``. Its arguments are those of
    :class:`~sb3_dppo.actor_critic.DiffusionActorCriticPolicy`.
    """

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] | str = NatureCNN, **kwargs: Any
    ) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)  # type: ignore[misc]


class DiffusionMultiInputPolicy(DiffusionMlpPolicy):
    """
    ``DiffusionMlpPolicy`` for a ``Dict``, with SB3's ``CombinedExtractor``. Its arguments are those of
    :class:`~sb3_dppo.actor_critic.DiffusionActorCriticPolicy`.
    """

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] | str = CombinedExtractor, **kwargs: Any
    ) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)  # type: ignore[misc]


class _SequencePolicy(DiffusionActorCriticPolicy):
    """A policy whose denoiser works along the chunk, where a chunk of one action would leave it nothing to do."""

    def __init__(self, *args: Any, horizon: int = 4, **kwargs: Any) -> None:
        super().__init__(*args, horizon=horizon, **kwargs)  # type: ignore[misc]

    def _widths(self, foreign: Sequence[str] = ("layer_norm", "obs_encoder_arch", "film", "time_dim")) -> Sequence[int]:
        """The denoiser's, which must have been given none of the settings of other denoisers."""
        defaults = inspect.signature(DiffusionActorCriticPolicy).parameters
        for name in foreign:
            value = self._constructor_parameters[name]
            if value and value != defaults[name].default:
                raise ValueError(f"{name}={value} is a setting of DiffusionMlpPolicy: {type(self).__name__} has its own.")
        widths = self.net_arch["pi"]  # type: ignore[call-overload]
        if not widths:
            raise ValueError(f"net_arch['pi']={widths} must have a width for each level or layer of {type(self).__name__}.")
        return widths


# Of the "film" net, in ``net_kwargs``.
FILM_SETTINGS = ("kernel_size", "n_groups", "film_scale", "condition_layers", "norm_eps")


class DiffusionUnetPolicy(_SequencePolicy):
    """
    A policy whose denoiser is a UNet along the chunk.

    :param net: "diffusers", its ``UNet1DModel``, or "film", the conditional UNet of Diffusion Policy (Chi et al. 2023), which
        others' checkpoints have; that one also heeds ``time_dim`` and ``obs_encoder_arch``, and its activation is Mish.
    :param net_kwargs: Of "film": ``kernel_size``, ``n_groups``, ``film_scale``, ``condition_layers`` and ``norm_eps``, see
        :class:`~sb3_dppo.diffusion.film_unet.FilmUnetDenoiser`.
    :param kwargs: See :class:`~sb3_dppo.actor_critic.DiffusionActorCriticPolicy`.
    """

    _default_net_arch: ClassVar[dict[str, list[int]]] = dict(pi=[64, 128], vf=[256, 256, 256])

    def __init__(self, *args: Any, net: str = "diffusers", net_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if net not in ("diffusers", "film"):
            raise ValueError(f"net={net!r} is unknown: choose 'diffusers' or 'film'.")
        if net == "film":
            kwargs = {"activation_fn": "mish", **kwargs}
        self._net_parameters: dict[str, Any] = dict(net=net, net_kwargs=net_kwargs)
        super().__init__(*args, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | self._net_parameters

    def _make_denoiser(self) -> Denoiser:
        sizes, net_kwargs = (self.action_dim, self.horizon, self.features_dim), self._net_parameters["net_kwargs"] or {}
        if self._net_parameters["net"] == "diffusers":
            check_names("net='diffusers'", net_kwargs, ())
            return UnetDenoiser(*sizes, self._widths(), activation_fn=self.activation_fn)
        check_names("net='film'", net_kwargs, FILM_SETTINGS)
        arguments = self._constructor_parameters
        return FilmUnetDenoiser(
            *sizes,
            arguments["denoising_steps"],
            self._widths(foreign=("layer_norm", "film")),
            time_dim=arguments["time_dim"],
            activation_fn=self.activation_fn,
            obs_encoder_arch=arguments["obs_encoder_arch"],
            **net_kwargs,
        )


class DiffusionTransformerPolicy(_SequencePolicy):
    """
    A policy whose denoiser is a transformer along the chunk, ``horizon`` 4 by default. Its arguments are those of
    :class:`~sb3_dppo.actor_critic.DiffusionActorCriticPolicy`;
    ``pi`` of ``net_arch`` is one width per layer, all equal.
    """

    _default_net_arch: ClassVar[dict[str, list[int]]] = dict(pi=[128, 128], vf=[256, 256, 256])

    def _make_denoiser(self) -> Denoiser:
        K = self._constructor_parameters["denoising_steps"]
        return TransformerDenoiser(self.action_dim, self.horizon, self.features_dim, K, self._widths())


POLICIES: dict[str, Any] = dict(
    DiffusionMlpPolicy=DiffusionMlpPolicy,
    DiffusionCnnPolicy=DiffusionCnnPolicy,
    DiffusionMultiInputPolicy=DiffusionMultiInputPolicy,
    DiffusionUnetPolicy=DiffusionUnetPolicy,
    DiffusionTransformerPolicy=DiffusionTransformerPolicy,
)
