"""Saving and loading, after Stable-Baselines3's own tests for its algorithms."""

import os
import stat
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch as th
from diffusers import DDIMScheduler
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dppo import BC, DPPO, Demonstrations
from sb3_dppo.policies import DiffusionActorCriticPolicy

SMALL = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=4, horizon=4)


def make_model(n_envs: int = 2, **kwargs: Any) -> DPPO:
    arguments: dict[str, Any] = dict(n_steps=16, batch_size=32, n_epochs=2, policy_kwargs=SMALL, seed=0, device="cpu")
    return DPPO("DiffusionMlpPolicy", make_vec_env("Pendulum-v1", n_envs, seed=0), **{**arguments, **kwargs})


def states_equal(a: Any, b: Any) -> bool:
    if isinstance(a, th.Tensor):
        return th.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(states_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_round_trip_with_both_optimisers_and_the_base_denoiser(tmp_path: Path) -> None:
    model = make_model(ft_denoising_steps=2)
    model.learn(64)
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model", env=model.env)
    assert states_equal(model.get_parameters(), loaded.get_parameters())
    assert set(model.get_parameters()) == {
        "policy",
        *(f"policy.{name}" for name in ("optimizer", "critic_optimizer", "noise_optimizer")),
    }
    assert any(name.startswith("base_denoiser.") for name in model.get_parameters()["policy"])
    assert len(model.get_parameters()["policy.critic_optimizer"]["state"]) > 0
    assert loaded.num_timesteps == model.num_timesteps
    assert loaded.reward_scaler.statistics.var == model.reward_scaler.statistics.var  # type: ignore[union-attr]
    assert loaded.n_rollouts == model.n_rollouts == 2


def test_loaded_model_acts_identically(tmp_path: Path) -> None:
    model = make_model()
    model.learn(32)
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model")
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert (model.predict(obs, deterministic=True)[0] == loaded.predict(obs, deterministic=True)[0]).all()
    for m in (model, loaded):
        m.set_random_seed(3)
    assert (model.predict(obs)[0] == loaded.predict(obs)[0]).all()


@pytest.mark.parametrize("exact_match", [True, False])
def test_set_parameters(exact_match: bool) -> None:
    model = make_model(ft_denoising_steps=2)
    model.learn(32)
    obs = np.zeros((2, 3), dtype=np.float32)
    original = {name: {k: v for k, v in state.items()} for name, state in model.get_parameters().items()}
    before = model.predict(obs, deterministic=True)[0]
    random = dict(original, policy={name: th.rand_like(value) for name, value in original["policy"].items()})
    original_policy = {name: value.clone() for name, value in original["policy"].items()}
    model.set_parameters(random, exact_match=exact_match)
    assert states_equal(model.get_parameters()["policy"], random["policy"])
    assert not np.allclose(model.predict(obs, deterministic=True)[0], before)
    model.set_parameters(dict(original, policy=original_policy), exact_match=exact_match)
    np.testing.assert_allclose(model.predict(obs, deterministic=True)[0], before)
    with pytest.raises(ValueError, match="nonsense"):
        model.set_parameters({"nonsense": {}})
    incomplete = dict(original, policy={name: v for name, v in original_policy.items() if name != "normalizer.action_scale"})
    with pytest.raises(RuntimeError, match="action_scale"):
        model.set_parameters(incomplete, exact_match=True)
    model.set_parameters(incomplete, exact_match=False)


@pytest.mark.parametrize(
    "changes",
    [
        dict(ft_denoising_steps=1),
        dict(ft_denoising_steps=4, n_steps=32),
        dict(act_steps=2),
        dict(act_steps=1, n_steps=10),
        dict(scheduler="ddim", inference_steps=2, ft_denoising_steps=1, eta=0.3),
        dict(scheduler=DDIMScheduler(set_alpha_to_one=False), inference_steps=4),
        dict(min_sampling_std=0.2, min_logprob_std=0.2, noise_clip=2.0, deterministic_noise="random"),
        dict(learning_rate=1e-5, batch_size=16, shuffle="decisions", bc_coef=0.1, target_kl=0.1),
    ],
)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_loading_with_other_settings(changes: dict[str, Any], n_envs: int, tmp_path: Path) -> None:
    model = make_model(ft_denoising_steps=2)
    model.learn(32)
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model", env=make_vec_env("Pendulum-v1", n_envs), **changes)
    for name in ("act_steps", "ft_denoising_steps", "inference_steps"):
        if name in changes:
            assert getattr(loaded.policy.sampler, name) == changes[name]
    assert states_equal(loaded.get_parameters()["policy"], model.get_parameters()["policy"])
    loaded.learn(64)
    # And once more: what was resolved must not have replaced what was given.
    loaded.save(tmp_path / "again")
    again = DPPO.load(tmp_path / "again", env=make_vec_env("Pendulum-v1", 2), scheduler="ddpm", inference_steps=None)
    assert again.policy.sampler.inference_steps == 4


def test_scheduler_object_survives(tmp_path: Path) -> None:
    model = make_model(scheduler=DDIMScheduler(set_alpha_to_one=False), inference_steps=2)
    model.learn(32)
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model")
    assert loaded.policy.process.scheduler.config.set_alpha_to_one is False
    th.testing.assert_close(loaded.policy.process.table, model.policy.process.table)


def test_as_the_zoo_loads_for_enjoy_and_video(tmp_path: Path) -> None:
    """One env, learning rate 0 and clip range 0: nothing that only matters for training may complain."""
    model = make_model(4, batch_size=256, clip_range_base=0.01)
    model.learn(64)
    model.save(tmp_path / "model")
    custom_objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    loaded = DPPO.load(tmp_path / "model", env=make_vec_env("Pendulum-v1", 1), custom_objects=custom_objects, seed=0)
    assert loaded.predict(np.zeros(3), deterministic=True)[0].shape == (1,)


def test_schedules_that_end_at_zero(tmp_path: Path) -> None:
    model = make_model(min_sampling_std="lin_0.3", learning_rate=lambda p: 1e-3 * p, clip_range=lambda p: 0.1 * p)
    model.learn(40)  # 64 steps are made: beyond the end of the schedules
    assert model.policy.optimizer.param_groups[0]["lr"] == 0
    model.save(tmp_path / "model")
    assert DPPO.load(tmp_path / "model").policy.sampler.config.min_sampling_std == 0


def test_learning_goes_on(tmp_path: Path) -> None:
    model = make_model()
    model.learn(64)
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model", env=make_vec_env("Pendulum-v1", 2, seed=1))
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.num_timesteps == 128
    loaded.learn(32)
    assert loaded.num_timesteps == 32


def test_set_env() -> None:
    model = make_model()
    model.learn(32)
    model.set_env(make_vec_env("Pendulum-v1", 2, seed=5))
    model.learn(32, reset_num_timesteps=False)
    one = make_model(n_envs=1)
    one.set_env("Pendulum-v1")
    one.learn(32, reset_num_timesteps=False)
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_vec_env("Pendulum-v1", 3))


def test_vec_normalize_statistics_travel_beside(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2), norm_reward=False)
    model = DPPO("DiffusionMlpPolicy", env, n_steps=16, batch_size=32, policy_kwargs=SMALL)
    model.learn(64)
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "vecnormalize.pkl"))
    restored = VecNormalize.load(str(tmp_path / "vecnormalize.pkl"), make_vec_env("Pendulum-v1", 2))
    loaded = DPPO.load(tmp_path / "model", env=restored)
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.get_vec_normalize_env() is restored


def test_optimiser_flags_are_those_of_this_machine() -> None:
    model = make_model()
    model.learn(32)
    parameters = model.get_parameters()
    parameters["policy.optimizer"]["param_groups"][0].update(fused=None, capturable=True)
    model.set_parameters(parameters)
    group = model.policy.optimizer.param_groups[0]
    assert group["fused"] is True and group["capturable"] is False
    model.learn(32)


def test_state_dict_names_do_not_depend_on_arguments() -> None:
    names = [
        set(make_model(**kwargs).policy.state_dict())
        for kwargs in (dict(), dict(ft_denoising_steps=1), dict(scheduler="ddim", inference_steps=2), dict(act_steps=1))
    ]
    assert all(each == names[0] for each in names)


def test_pretrained_argument(tmp_path: Path) -> None:
    model = make_model(ft_denoising_steps=2)
    rng = np.random.default_rng(0)
    demonstrations = Demonstrations(rng.normal(size=(50, 3)), rng.uniform(-2, 2, (50, 1)), np.array([20, 30]))
    BC(model, demonstrations).train(1, progress_bar=False)
    model.save(tmp_path / "bc.zip")
    fresh = DPPO(
        "DiffusionMlpPolicy", "Pendulum-v1", pretrained=str(tmp_path / "bc.zip"), n_steps=16, batch_size=32, act_steps=2
    )
    assert states_equal(fresh.policy.state_dict(), model.policy.state_dict())
    assert fresh.pretrained_on_demonstrations
    assert fresh.policy.sampler.act_steps == 2 and fresh.policy.horizon == 4
    fresh.learn(32)
    with pytest.warns(UserWarning, match=r"policy_kwargs\['horizon'\]=8 is ignored"):
        DPPO(
            "DiffusionMlpPolicy", "Pendulum-v1", pretrained=str(tmp_path / "bc.zip"), policy_kwargs=dict(horizon=8), n_steps=16
        )
    with pytest.raises(ValueError, match="observation_space"):
        DPPO("DiffusionMlpPolicy", "Hopper-v5", pretrained=str(tmp_path / "bc.zip"))
    with pytest.raises(ValueError, match="holds a DiffusionMlpPolicy"):
        DPPO("DiffusionUnetPolicy", "Pendulum-v1", pretrained=str(tmp_path / "bc.zip"))
    PPO("MlpPolicy", "Pendulum-v1").save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="is not a saved DPPO model"):
        DPPO("DiffusionMlpPolicy", "Pendulum-v1", pretrained=str(tmp_path / "ppo.zip"))


def test_weights_of_a_policy_that_has_seen_demonstrations() -> None:
    """Taken over by themselves, they explore as the policy did."""
    model, other, third = make_model(), make_model(), make_model()
    rng = np.random.default_rng(0)
    BC(model, Demonstrations(rng.normal(size=(50, 3)), rng.uniform(-2, 2, (50, 1)), np.array([50]))).train(
        1, progress_bar=False
    )
    other.set_parameters(model.get_parameters())
    third.policy.load_state_dict(model.policy.state_dict())
    third.learn(32)
    for taught in (model, other, third):
        assert taught.pretrained_on_demonstrations and taught.policy.sampler.floors() == (0.1, 0.1)


def test_pretrained_without_statistics_of_observations(tmp_path: Path) -> None:
    """What has learned from observations as they are goes on with them."""
    make_model(normalize_observations=False).learn(32).save(tmp_path / "raw")
    make_model().learn(32).save(tmp_path / "normalised")
    for name, normalizes in (("raw", False), ("normalised", True)):
        model = make_model(policy_kwargs={}, pretrained=str(tmp_path / f"{name}.zip"))
        assert model.updates_normalizer == normalizes


class WithAliases(DPPO):
    policy_aliases: ClassVar[dict[str, Any]] = dict(DPPO.policy_aliases)

    def __init__(self, *args: Any, folder: "Unknown | None" = None, **kwargs: Any) -> None:  # type: ignore[name-defined] # noqa: F821
        super().__init__(*args, **kwargs)


def test_subclasses_load(tmp_path: Path) -> None:
    """With arguments of their own, whose types are known to type checkers only."""
    WithAliases("DiffusionMlpPolicy", "Pendulum-v1", n_steps=16, policy_kwargs=SMALL).save(tmp_path / "model")
    assert WithAliases.load(tmp_path / "model", seed=1).seed == 1
    with pytest.raises(TypeError, match="did you mean 'n_steps'"):
        WithAliases.load(tmp_path / "model", n_step=1)


def test_annealed_steps_are_no_untrained_base(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    make_model(ft_denoising_anneal=(1, 1)).learn(64).save(tmp_path / "model")
    DPPO.load(tmp_path / "model", env=make_vec_env("Pendulum-v1", 2)).learn(32)
    assert not any("never trained" in str(warning.message) for warning in recwarn)


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of some network file systems: the file is there."""
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    make_model().save(tmp_path / "model")
    assert (tmp_path / "model.zip").is_file()


def test_load_errors(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model")
    with pytest.raises(TypeError, match="'ft_denoising_step'.*did you mean 'ft_denoising_steps'"):
        DPPO.load(tmp_path / "model", ft_denoising_step=2)
    with pytest.raises(TypeError, match="'xyz'"):
        DPPO.load(tmp_path / "model", xyz=2)
    with pytest.raises(ValueError, match="no env to learn in"):
        DPPO.load(tmp_path / "model").learn(8)

    class Subclass(DPPO):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    assert Subclass.load(tmp_path / "model", n_steps=8).n_steps == 8
    env = make_vec_env("Pendulum-v1", 2)
    loaded = DPPO.load(tmp_path / "model", env=env, stats_window_size=5).learn(32)
    assert loaded.ep_info_buffer is not None and loaded.ep_info_buffer.maxlen == 5
    with pytest.raises(ValueError, match="n_steps=1000.0 must be at least 1, a whole number"):
        DPPO.load(tmp_path / "model", n_steps=1000.0)
    with pytest.raises(ValueError, match="ft_denoising_steps=5"):
        DPPO.load(tmp_path / "model", ft_denoising_steps=5)
    loaded = DPPO.load(tmp_path / "model", env=make_vec_env("Pendulum-v1", 1), n_steps=10)
    with pytest.raises(ValueError, match="n_steps=10 must be a multiple of act_steps=4"):
        loaded.learn(100)
    (tmp_path / "text.zip").write_text("no zip file")
    with pytest.raises(ValueError, match="zip"):
        DPPO.load(tmp_path / "text.zip")
    with pytest.raises(ValueError, match="zip"):
        DPPO("DiffusionMlpPolicy", "Pendulum-v1", pretrained=str(tmp_path / "text.zip"))
    PPO("MlpPolicy", "Pendulum-v1").save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="not a diffusion policy"):
        DPPO.load(tmp_path / "ppo")


def test_save_does_not_hold_the_buffer(tmp_path: Path) -> None:
    model = make_model(n_steps=4096)
    model.save(tmp_path / "model.zip")
    assert (tmp_path / "model.zip").stat().st_size < 200_000
    assert isinstance(DPPO.load(tmp_path / "model.zip").policy, DiffusionActorCriticPolicy)
