"""The conditional UNet of Diffusion Policy, against what two other implementations computed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_dppo import DPPO, DiffusionUnetPolicy, import_reference_checkpoint
from sb3_dppo.diffusion.film_unet import FilmUnetDenoiser
from sb3_dppo.importers.film_unet import infer_film_unet, rename_film_unet
from tests.importers.test_reference import ReferenceMlp, random_mlp
from tests.test_policies import make_policy

DATA = Path(__file__).parents[1] / "data"
SMALL: dict[str, Any] = dict(net="film", horizon=4, denoising_steps=4, net_arch=dict(pi=[8, 16], vf=[16]))


def box(size: int) -> spaces.Box:
    return spaces.Box(-1, 1, (size,))


def read(name: str) -> tuple[dict[str, Any], dict[str, th.Tensor], dict[str, th.Tensor]]:
    """Settings, weights under our names, and what else there is."""
    with np.load(DATA / f"{name}.npz") as archive:
        config = json.loads(str(archive["config"]))
        arrays = {key: th.as_tensor(archive[key]) for key in archive.files if key != "config"}
    prefix = "weights/diffusion.unet." if name == "lerobot_unet" else "weights/"
    weights = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith("weights/")}
    return config, rename_film_unet(weights), arrays


def build(name: str) -> tuple[FilmUnetDenoiser, th.Tensor, dict[str, th.Tensor], dict[str, Any]]:
    """The network, its condition and the arrays."""
    config, weights, arrays = read(name)
    inferred, _ = infer_film_unet(weights)
    condition = arrays["global_cond"] if name == "lerobot_unet" else arrays["obs"].flatten(1)
    denoiser = FilmUnetDenoiser(
        config["action_dim"],
        arrays["x"].shape[1],
        condition.shape[1],
        100,
        inferred["net_arch"]["pi"],
        time_dim=inferred["time_dim"],
        activation_fn=getattr(nn, config.get("activation_type", "Mish")),
        n_groups=config["n_groups"],
        **inferred["net_kwargs"],
    )
    denoiser.load_state_dict(weights)
    return denoiser, denoiser.encode(condition), arrays, config


@pytest.mark.parametrize("name", ["unet_lift", "unet_small_encoder_bias", "lerobot_unet"])
def test_output_and_gradients_are_theirs(name: str) -> None:
    denoiser, condition, arrays, config = build(name)
    x = arrays["x"].clone().requires_grad_()
    output = denoiser(x, denoiser.embed_timesteps(arrays["t"]), condition)
    th.testing.assert_close(output, arrays["output"], rtol=1e-5, atol=1e-5)
    if "loss" not in arrays:
        return
    loss = (output**2).mean()
    loss.backward()
    assert loss.item() == pytest.approx(arrays["loss"].item(), rel=1e-5)
    assert x.grad is not None
    th.testing.assert_close(x.grad, arrays["input_grad"], rtol=1e-4, atol=1e-6)
    ours = {key: parameter.grad.norm() for key, parameter in denoiser.named_parameters() if parameter.grad is not None}
    names = rename_film_unet({key: th.zeros(()) for key in config["grad_norm_names"]})
    th.testing.assert_close(th.stack([ours[key] for key in names]), arrays["grad_norms"].float(), rtol=1e-4, atol=1e-6)
    assert len(ours) == len(names)


@pytest.mark.parametrize("name", ["unet_lift", "unet_small_encoder_bias"])
@pytest.mark.parametrize("fine_tuned", [False, True])
def test_checkpoints_with_a_unet_are_imported(name: str, fine_tuned: bool, tmp_path: Path) -> None:
    denoiser, condition, arrays, config = build(name)
    tensors = {f"network.{key.removeprefix('weights/')}": value for key, value in arrays.items() if key.startswith("weights/")}
    if fine_tuned:
        tensors = {
            f"{part}.{key.removeprefix('network.')}": value for part in ("actor", "actor_ft") for key, value in tensors.items()
        }
    th.save(dict(ema=tensors), tmp_path / "state.pt")
    model = import_reference_checkpoint(
        tmp_path / "state.pt",
        (box(arrays["obs"].shape[2]), box(config["action_dim"])),
        policy_kwargs=dict(
            denoising_steps=20,
            horizon=config["horizon_steps"],
            activation_fn=config.get("activation_type", "Mish").lower(),
            net_kwargs=dict(n_groups=config["n_groups"]),
        ),
        ft_denoising_steps=10,
    )
    assert isinstance(model.policy, DiffusionUnetPolicy)
    for network in (model.policy.denoiser, model.policy.base_denoiser):
        output = network(arrays["x"], network.embed_timesteps(arrays["t"] % 20), network.encode(arrays["obs"].flatten(1)))
        expected = denoiser(arrays["x"], denoiser.embed_timesteps(arrays["t"] % 20), condition)
        th.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model")
    obs = np.ones((2, arrays["obs"].shape[2]), dtype=np.float32)
    assert (loaded.predict(obs, deterministic=True)[0] == model.predict(obs, deterministic=True)[0]).all()


@pytest.mark.parametrize(
    "name,encoder", [("unet_lift", False), ("unet_small_encoder_bias", False), ("unet_small_encoder_bias", True)]
)
def test_a_dimension_without_range_is_as_in_the_reference(name: str, encoder: bool, tmp_path: Path) -> None:
    """It maps it to -1."""
    _, _, arrays, config = build(name)
    tensors = {f"network.{key.removeprefix('weights/')}": value for key, value in arrays.items() if key.startswith("weights/")}
    n_obs, generator = arrays["obs"].shape[2], th.Generator().manual_seed(0)
    if encoder:
        # With as many outputs as there are observations, so that the blocks' layers fit.
        for index, shape in (("layers.0", (n_obs, n_obs)), ("layers.1", (n_obs, n_obs))):
            tensors[f"network.cond_mlp.{index}.weight"] = 0.3 * th.randn(shape, generator=generator)
            tensors[f"network.cond_mlp.{index}.bias"] = th.zeros(n_obs)
    low, high = -np.ones(n_obs), np.ones(n_obs)
    low[1] = high[1] = 0.7
    ranges = dict(
        obs_min=low, obs_max=high, action_min=-np.ones(config["action_dim"]), action_max=np.ones(config["action_dim"])
    )
    np.savez(tmp_path / "normalization.npz", **ranges)
    kwargs: dict[str, Any] = dict(
        denoising_steps=20, horizon=config["horizon_steps"], net_kwargs=dict(n_groups=config["n_groups"])
    )
    kwargs["activation_fn"] = config.get("activation_type", "Mish").lower()
    boxes = (box(n_obs), box(config["action_dim"]))
    plain = import_reference_checkpoint(tensors, boxes, policy_kwargs=kwargs)
    model = import_reference_checkpoint(tensors, boxes, policy_kwargs=kwargs, normalization=tmp_path / "normalization.npz")
    obs = 0.5 * arrays["obs"].flatten(1)
    obs[:, 1] = 0.7
    theirs = obs.clone()
    theirs[:, 1] = -1.0
    outputs = [
        policy.denoiser(arrays["x"], policy.denoiser.embed_timesteps(arrays["t"] % 20), policy.denoiser.encode(features))
        for policy, features in ((model.policy, model.policy.extract_features(obs)), (plain.policy, theirs))
    ]
    th.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_the_encoder_of_observations_is_the_references() -> None:
    """A residual MLP, after which each block has one linear layer."""
    _, _, arrays, config = build("unet_small_encoder_bias")
    tensors = {f"network.{key.removeprefix('weights/')}": value for key, value in arrays.items() if key.startswith("weights/")}
    obs = arrays["obs"].flatten(1)
    n_obs, activation = obs.shape[1], config.get("activation_type", "Mish").lower()
    encoder = random_mlp("cond_mlp", [n_obs, 24, 24, 24, n_obs], True, False, th.Generator().manual_seed(0))
    model = import_reference_checkpoint(
        tensors | {f"network.{name}": value for name, value in encoder.items()},
        (box(n_obs), box(config["action_dim"])),
        policy_kwargs=dict(
            denoising_steps=20,
            horizon=config["horizon_steps"],
            activation_fn=activation,
            net_kwargs=dict(n_groups=config["n_groups"]),
        ),
    )
    expected = ReferenceMlp(encoder, activation, 0).mlp("cond_mlp", obs)
    th.testing.assert_close(model.policy.denoiser.encode(obs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(obs_encoder_arch=[8, 8], net_kwargs=dict(condition_layers=3, film_scale=False, n_groups=4, kernel_size=3)),
        dict(prediction_type="flow", time_dim=8, activation_fn="relu"),
    ],
)
def test_trains_saves_and_is_shared(settings: dict[str, Any], tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {**SMALL, **settings}
    model = DPPO("DiffusionUnetPolicy", "Pendulum-v1", n_steps=16, batch_size=16, n_epochs=1, policy_kwargs=kwargs, seed=0)
    assert isinstance(model.policy.denoiser, FilmUnetDenoiser)
    model.learn(32)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    model.save_pretrained(tmp_path / "shared")
    obs = np.ones((3, 3), dtype=np.float32)
    expected = model.predict(obs, deterministic=True)[0]
    for loaded in (
        DPPO.load(tmp_path / "model"),
        DPPO.from_pretrained(tmp_path / "shared"),
        DiffusionUnetPolicy.load(tmp_path / "policy"),
    ):
        assert (loaded.predict(obs, deterministic=True)[0] == expected).all()


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(net="chi"), "net='chi' is unknown: choose 'diffusers' or 'film'"),
        (dict(net_kwargs=dict(kernel_size=3), net="diffusers"), "net='diffusers'.*kernel_size"),
        (dict(net_kwargs=dict(kernel_size=4)), "kernel_size=4 must be odd"),
        (dict(net_kwargs=dict(condition_layers=2)), "condition_layers=2 must be 1 or 3"),
        (dict(net_kwargs=dict(n_groups=3)), r"channels must be multiples of 3"),
        (dict(net_kwargs=dict(kernal_size=3)), "kernal_size.*kernel_size"),
        (dict(horizon=3), "horizon=3 can't be halved 1 times"),
        (dict(film=True), "film=True is a setting of DiffusionMlpPolicy"),
        (dict(time_dim=3), "time_dim=3 must be even"),
    ],
)
def test_errors(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make_policy(DiffusionUnetPolicy, **{**SMALL, **kwargs})
