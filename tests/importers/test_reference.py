"""What can be wrong with a checkpoint of the reference implementation."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_dppo import DPPO, import_reference_checkpoint

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
    load({}, "not one of a diffusion MLP")
    load({"network.down_modules.0.weight": th.zeros(3)}, "UNet")
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
