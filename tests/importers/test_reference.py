"""What can be wrong with a checkpoint of the reference implementation."""

import pickle
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_dppo import DPPO, import_reference_checkpoint
from tests.test_conformance import assert_close

SPACES = (spaces.Box(-np.inf, np.inf, (11,)), spaces.Box(-1, 1, (3,)))
DATA = Path(__file__).parents[1] / "data"


def weights() -> dict[str, Any]:
    with np.load(DATA / "ddpm_hopper.npz") as archive:
        return {name.removeprefix("weights/"): archive[name] for name in archive.files if name.startswith("weights/")}


def test_import_then_train_save_and_load(tmp_path: Path) -> None:
    model = import_reference_checkpoint(
        weights(), "Hopper-v5", policy_kwargs={}, n_steps=16, batch_size=32, act_steps=4, ft_denoising_steps=10
    )
    model.learn(16)
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model")
    assert loaded.policy.horizon == 4 and loaded.policy.process.denoising_steps == 20
    assert loaded.pretrained_on_demonstrations
    obs = np.zeros((2, 11))
    assert (loaded.predict(obs, deterministic=True)[0] == model.predict(obs, deterministic=True)[0]).all()


def test_fine_tuned_checkpoint_needs_its_fine_tuned_steps() -> None:
    with pytest.warns(UserWarning, match="Pass the ft_denoising_steps"):
        import_reference_checkpoint(weights(), SPACES, policy_kwargs={})


def test_width_of_the_critic_may_be_chosen_where_there_is_none() -> None:
    network = {name.replace("actor.", "network."): value for name, value in weights().items() if name.startswith("actor.")}
    model = import_reference_checkpoint({"ema": network}, SPACES, policy_kwargs=dict(net_arch=dict(vf=[32])))
    assert model.policy.critic[0].out_features == 32


def test_widths_that_are_known_may_be_said_again_as_tuples() -> None:
    known = import_reference_checkpoint(weights(), SPACES, policy_kwargs={}, ft_denoising_steps=10).policy.net_arch
    said = {name: tuple(widths) for name, widths in known.items()}  # type: ignore[union-attr]
    model = import_reference_checkpoint(weights(), SPACES, policy_kwargs=dict(net_arch=said), ft_denoising_steps=10)
    assert model.policy.net_arch == known


def test_errors(tmp_path: Path) -> None:
    def load(checkpoint: Any, message: str, **kwargs: Any) -> None:
        arguments: dict[str, Any] = {"env_or_spaces": SPACES, "policy_kwargs": {}, **kwargs}
        with pytest.raises(ValueError, match=message):
            import_reference_checkpoint(checkpoint, **arguments)

    load(tmp_path / "none.pt", "does not exist")
    (tmp_path / "text.pt").write_text("hello")
    load(tmp_path / "text.pt", "can't be read")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print))
    load(tmp_path / "code.pt", "can't be read")
    th.save([1, 2], tmp_path / "list.pt")
    load(tmp_path / "list.pt", "holds a list")
    load({}, "not one of a diffusion policy")
    load(weights(), r"\['net_arch'\]\['pi'\] contradicts", policy_kwargs=dict(net_arch=[8]))
    load({"network.down_modules.0.weight": th.zeros(3)}, "is a UNet's, but lacks a tensor")
    load(weights(), "contradicts the checkpoint", policy_kwargs=dict(residual=False))
    load(weights(), "does not fit the spaces", env_or_spaces=(spaces.Box(-1, 1, (5,)), SPACES[1]))
    load(weights(), "does not fit the spaces", policy_kwargs=dict(horizon=8))
    odd = weights()
    odd["actor_ft.mlp_mean.layers.0.extra"] = np.zeros(3)
    load(odd, "does not fit")
    lacking = weights()
    del lacking["actor_ft.time_embedding.1.weight"]
    load(lacking, "lacks")
    for shape in ((2**16, 1), (2**16, 2**16)):
        huge = weights()
        for name in [name for name in huge if "mlp_mean.layers" in name and huge[name].shape == (64, 64)]:
            huge[name] = th.zeros(()).expand(shape)
        load(huge, "none of plain numbers")
    wide = weights()
    for name in [name for name in wide if "mlp_mean.layers" in name and wide[name].ndim == 2][:-1]:
        wide[name] = np.zeros((2**16, 1), dtype=np.float32)
    load(wide, "does not hold the matrices between its layers")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**6))
    load(tmp_path / "bomb.pt", "holds more than its size allows")
    (tmp_path / "n.npz").write_text("hello")
    load(weights(), "normalization=.*can't be read", normalization=tmp_path / "n.npz")
    np.savez(tmp_path / "n.npz", obs_min=np.zeros(4), obs_max=np.ones(4), action_min=np.zeros(3), action_max=np.ones(3))
    load(weights(), "normalization=.*4 observations", normalization=tmp_path / "n.npz")


class ReferenceMlp:
    """The reference's networks in words: what each tensor of a checkpoint does, written down plainly and slowly."""

    def __init__(self, tensors: dict[str, th.Tensor], activation: str, horizon: int) -> None:
        self.tensors, self.horizon = tensors, horizon
        self.activation = getattr(nn.functional, activation)

    def linear(self, name: str, x: th.Tensor) -> th.Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, name: str, x: th.Tensor, eps: float) -> th.Tensor:
        if f"{name}.weight" not in self.tensors:
            return x
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def mlp(self, name: str, x: th.Tensor) -> th.Tensor:
        if f"{name}.layers.0.weight" in self.tensors:
            n = max(
                int(key[len(f"{name}.layers.") :].split(".")[0]) for key in self.tensors if key.startswith(f"{name}.layers.")
            )
            x = self.linear(f"{name}.layers.0", x)
            for i in range(1, n):
                block = f"{name}.layers.{i}"
                hidden = self.linear(f"{block}.l1", self.activation(self.norm(f"{block}.norm1", x, 1e-6)))
                x = x + self.linear(f"{block}.l2", self.activation(self.norm(f"{block}.norm2", hidden, 1e-6)))
            return self.linear(f"{name}.layers.{n}", x)
        n = len({key.split(".moduleList.")[1].split(".")[0] for key in self.tensors if key.startswith(f"{name}.moduleList.")})
        for i in range(n):
            layer = f"{name}.moduleList.{i}"
            x = self.linear(f"{layer}.linear_1", x)
            if i < n - 1:
                x = self.activation(self.norm(f"{layer}.norm_1", x, 1e-5))
        return x

    def denoise(self, x: th.Tensor, t: th.Tensor, state: th.Tensor) -> th.Tensor:
        half = len(self.tensors["time_embedding.1.weight"].T) // 2
        angles = t[:, None] * th.exp(-np.log(10000) / (half - 1) * th.arange(half))
        time = th.cat([angles.sin(), angles.cos()], -1)
        time = self.linear("time_embedding.3", nn.functional.mish(self.linear("time_embedding.1", time)))
        if any(key.startswith("cond_mlp") for key in self.tensors):
            state = self.mlp("cond_mlp", state)
        return self.mlp("mlp_mean", th.cat([x.flatten(1), time, state], -1)).view_as(x)


def random_mlp(name: str, sizes: list[int], residual: bool, layer_norm: bool, generator: th.Generator) -> dict[str, th.Tensor]:
    def layer(key: str, n_in: int, n_out: int) -> dict[str, th.Tensor]:
        weight = th.randn(n_out, n_in, generator=generator) / n_in**0.5
        return {f"{name}.{key}.weight": weight, f"{name}.{key}.bias": 0.1 * th.randn(n_out, generator=generator)}

    def norm(key: str, n: int) -> dict[str, th.Tensor]:
        return {
            f"{name}.{key}.weight": 1 + 0.1 * th.randn(n, generator=generator),
            f"{name}.{key}.bias": 0.1 * th.randn(n, generator=generator),
        }

    tensors: dict[str, th.Tensor] = {}
    if residual:
        n_blocks, width = (len(sizes) - 3) // 2, sizes[1]
        tensors |= layer("layers.0", sizes[0], width)
        for i in range(1, n_blocks + 1):
            tensors |= layer(f"layers.{i}.l1", width, width) | layer(f"layers.{i}.l2", width, width)
            if layer_norm:
                tensors |= norm(f"layers.{i}.norm1", width) | norm(f"layers.{i}.norm2", width)
        return tensors | layer(f"layers.{n_blocks + 1}", width, sizes[-1])
    for i, (n_in, n_out) in enumerate(pairwise(sizes)):
        tensors |= layer(f"moduleList.{i}.linear_1", n_in, n_out)
        if layer_norm and i < len(sizes) - 2:
            tensors |= norm(f"moduleList.{i}.norm_1", n_out)
    return tensors


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("encoder", [None, [24, 8]])
@pytest.mark.parametrize("n_frames", [1, 3])
def test_every_mlp_of_the_reference_imports(
    residual: bool, layer_norm: bool, encoder: list[int] | None, n_frames: int, tmp_path: Path
) -> None:
    generator = th.Generator().manual_seed(0)
    frame, n_actions, horizon, time_dim = 5, 2, 4, 8
    widths = [32] * 5 if residual else [32, 16]
    condition = encoder[-1] if encoder else frame * n_frames
    checkpoint: dict[str, th.Tensor] = {}
    for actor in ("actor", "actor_ft"):
        checkpoint |= random_mlp(
            f"{actor}.mlp_mean",
            [horizon * n_actions + time_dim + condition, *widths, horizon * n_actions],
            residual,
            layer_norm,
            generator,
        )
        if encoder:
            checkpoint |= random_mlp(f"{actor}.cond_mlp", [frame * n_frames, *encoder], False, False, generator)
        for i, (n_in, n_out) in ((1, (time_dim, 2 * time_dim)), (3, (2 * time_dim, time_dim))):
            checkpoint[f"{actor}.time_embedding.{i}.weight"] = th.randn(n_out, n_in, generator=generator) / 4
            checkpoint[f"{actor}.time_embedding.{i}.bias"] = th.randn(n_out, generator=generator) / 4
    # A critic of another kind than the actor.
    checkpoint |= random_mlp("critic.Q1", [frame * n_frames, 16, 16, 16, 1], not residual, not layer_norm, generator)
    path = tmp_path / "state.pt"
    th.save({"itr": 3, "model": checkpoint}, path)
    obs_min = np.array([-2.0, -1, 0, 1, 0.5], dtype=np.float32)
    obs_max = np.array([2.0, 3, 0.5, 4, 0.5], dtype=np.float32)  # the last one is constant
    np.savez(tmp_path / "n.npz", obs_min=obs_min, obs_max=obs_max, action_min=[-0.5, -1], action_max=[1.0, 0.8])

    model = import_reference_checkpoint(
        path,
        (spaces.Box(-np.inf, np.inf, (frame * n_frames,)), spaces.Box(-1, 1, (n_actions,))),
        policy_kwargs=dict(horizon=horizon, activation_fn=nn.ReLU, critic_activation_fn=nn.Mish),
        normalization=tmp_path / "n.npz",
        ft_denoising_steps=5,
        device="cpu",
    )
    policy = model.policy
    low, high = np.tile(obs_min, n_frames), np.tile(obs_max, n_frames)
    obs = th.as_tensor(low + (high - low) * np.random.default_rng(0).random((6, frame * n_frames)), dtype=th.float)
    normalised = 2 * ((obs - th.as_tensor(low)) / (th.as_tensor(high - low) + 1e-6) - 0.5)
    x, t = th.randn(6, horizon, n_actions, generator=generator), th.tensor([0, 3, 7, 11, 15, 19])
    for prefix, denoiser in (("actor.", policy.base_denoiser), ("actor_ft.", policy.denoiser)):
        tensors = {key.removeprefix(prefix): value for key, value in checkpoint.items() if key.startswith(prefix)}
        expected = ReferenceMlp(tensors, "relu", horizon).denoise(x, t, normalised)
        with th.no_grad():
            ours = denoiser(x, denoiser.embed_timesteps(t), denoiser.encode(policy.extract_features(obs)))
        assert_close(ours, expected)
    expected_value = ReferenceMlp(checkpoint, "mish", horizon).mlp("critic.Q1", normalised)
    with th.no_grad():
        assert_close(policy.predict_values(obs), expected_value)
    # Actions: the reference's normalisation, inverted.
    unnormalised = policy.normalizer.unnormalize_actions(th.full((1, horizon, n_actions), 0.5))
    np.testing.assert_allclose(unnormalised[0, 0], [-0.5 + 0.75 * 1.5, -1 + 0.75 * 1.8], rtol=1e-5)
