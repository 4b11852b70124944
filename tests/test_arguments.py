"""Arguments that do not fit end in an error that names them, before any work is done, and says what to do."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_dppo import DPPO, ranks
from sb3_dppo.arguments import warn_about_training_arguments
from tests.test_sb3_conventions import SMALL, make_model

NAN = float("nan")


@pytest.mark.parametrize(
    "name,value",
    [
        ("gamma", -0.1),
        ("gamma", 1.1),
        ("gamma", NAN),
        ("gamma_denoising", 0.0),
        ("gamma_denoising", 1.1),
        ("gae_lambda", -0.1),
        ("gae_lambda", 1.1),
        ("learning_rate", -1e-3),
        ("learning_rate", NAN),
        ("critic_learning_rate", -1e-3),
        ("critic_learning_rate", "-1e-3"),
        ("eta_learning_rate", -1e-3),
        ("lr_warmup", 1.0),
        ("lr_decay", "slow"),
        ("n_steps", 0),
        ("n_epochs", 0),
        ("batch_size", 0),
        ("batch_size", None),
        ("clip_range", -0.1),
        ("clip_range", NAN),
        ("clip_range_base", -0.1),
        ("clip_range_vf", -0.2),
        ("advantage_quantiles", (0.9, 0.1)),
        ("advantage_quantiles", (-0.1, 1.0)),
        ("advantage_quantiles", (0.0, 1.1)),
        ("vf_coef", -0.5),
        ("bc_coef", -0.1),
        ("kl_coef", -0.1),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", -1.0),
        ("target_kl", 0.0),
        ("target_kl", -0.01),
        ("critic_warmup", -1),
        ("eta_update_interval", 0),
        ("n_accumulate", 0),
        ("ft_denoising_anneal", (0, 1)),
        ("ft_denoising_steps", 0),
        ("inference_steps", 0),
        ("act_steps", 0),
        ("min_sampling_std", -0.1),
        ("min_logprob_std", 0.0),
        ("noise_clip", 0.0),
        ("ent_coef", "auto"),
        ("seed", "1"),
        ("device", "gpu"),
        ("n_steps", 100.5),
        ("batch_size", "256"),
        ("gamma", "0.99"),
        ("shuffle", "rows"),
        ("advantage_quantiles", None),
        ("advantage_quantiles", (0.9, 0.1)),
        ("eta_range", None),
        ("std_range", (0.1,)),
        ("ft_denoising_anneal", 5),
        ("eta", "0.5"),
        ("min_logprob_std", "0.1"),
        ("lr_warmup", "0.1"),
        ("act_steps", 1.0),
        ("rollout_buffer_class", "DenoisingRolloutBuffer"),
        ("clip_range_rate", 100.0),
        ("critic_warmup", 1.5),
        ("batch_size", np.float32(8)),
        ("learning_rate", lambda remaining: remaining - 0.5),
        ("learning_rate", lambda remaining: 1e-3 if remaining > 0 else NAN),
    ],
)
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        make_model(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        dict(gamma=0.0, gae_lambda=0.0, clip_range_base=0.0),
        dict(gamma=1.0, gae_lambda=1.0, gamma_denoising=1.0, clip_range_base=0.1, clip_range=0.1),
        dict(learning_rate=0.0, critic_learning_rate=0.0, clip_range=0.0),
        dict(vf_coef=0.0, bc_coef=0.0, kl_coef=0.0, critic_warmup=0, min_sampling_std=0.0, clip_range_vf=0.1),
    ],
)
def test_ends_of_the_ranges_are_inside(settings: dict[str, Any]) -> None:
    make_model(**settings).learn(16)


def test_other_policies_and_no_env() -> None:
    with pytest.raises(
        ValueError, match=r"policy='MlpPolicy' is not a diffusion policy: choose one of \['DiffusionMlpPolicy'"
    ):
        DPPO("MlpPolicy", "Pendulum-v1")
    with pytest.raises(ValueError, match="policy=ActorCriticPolicy is not a diffusion policy"):
        DPPO(ActorCriticPolicy, "Pendulum-v1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="env=None: the networks' sizes follow from"):
        DPPO("DiffusionMlpPolicy", None)  # type: ignore[arg-type]


def test_names_in_policy_kwargs() -> None:
    with pytest.raises(TypeError, match="DiffusionMlpPolicy got an unexpected argument 'horizont': did you mean 'horizon'"):
        make_model(policy_kwargs=dict(horizont=4))
    with pytest.raises(ValueError, match="horizon='4' must be at least 1, a whole number"):
        make_model(policy_kwargs=dict(horizon="4"))


def test_arguments_of_methods(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="total_timesteps='1e5' must be a finite number"):
        model.learn("1e5")  # type: ignore[arg-type]
    model.save(tmp_path / "model")
    assert DPPO.load(tmp_path / "model", env="Pendulum-v1").n_envs == 1
    with pytest.raises(FileNotFoundError, match=r"pretrained='nope.zip': there is no such file"):
        make_model(pretrained="nope.zip")


def test_clip_range_base_above_clip_range() -> None:
    with pytest.raises(ValueError, match=r"clip_range_base=0\.2"):
        make_model(clip_range=0.1, clip_range_base=0.2)
    # A schedule may bring the one below the other.
    make_model(clip_range=lambda progress: 0.3 * progress, clip_range_base=0.2).learn(32)


def test_advantage_of_a_single_pair() -> None:
    """Minus its mean, nothing is left of it."""
    one_step: dict[str, Any] = dict(env="Pendulum-v1", policy_kwargs=SMALL | dict(denoising_steps=1))
    with pytest.raises(ValueError, match="batch_size=1 .*normalize_advantage"):
        make_model(batch_size=1)
    with pytest.raises(ValueError, match="n_steps=1 .*normalize_advantage"):
        make_model(n_steps=1, **one_step)
    make_model(batch_size=1, normalize_advantage=False).learn(16)
    make_model(n_steps=1, normalize_advantage=False, **one_step).learn(2)


@pytest.mark.parametrize("shuffle", ["pairs", "decisions"])
def test_no_minibatch_of_one_row(shuffle: str) -> None:
    model = make_model(env="Pendulum-v1", n_steps=7, batch_size=2, policy_kwargs=SMALL | dict(denoising_steps=1))
    model.learn(7)
    sizes = [len(samples.decision_index) for samples in model.rollout_buffer.get(2, shuffle)]
    assert sum(sizes) == 7 and min(sizes) == 2


def test_minibatches_are_of_all_ranks(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    model = make_model(n_steps=16)
    pairs = model.n_envs * 16 * model.policy.sampler.ft_denoising_steps
    model.batch_size = 2 * pairs
    with pytest.warns(UserWarning, match=f"batch_size={2 * pairs} is more than the {pairs} pairs"):
        warn_about_training_arguments(model)
    recwarn.clear()
    monkeypatch.setattr(ranks, "size", lambda: 2)
    warn_about_training_arguments(model)
    assert not [warning for warning in recwarn if "batch_size" in str(warning.message)]


def test_a_learned_std_begins_within_its_range() -> None:
    with pytest.raises(ValueError, match=r"log_std_init=-3 means a std of 0.04979, outside std_range=\(0.1, 2.0\)"):
        make_model(policy_kwargs=SMALL | dict(log_std_init=-3.0))
    make_model(policy_kwargs=SMALL | dict(log_std_init=-3.0), std_range=(0.04, 1.0)).learn(16)


def test_eta_below_a_learned_floor() -> None:
    ddim = dict(scheduler="ddim", learn_eta="action", policy_kwargs=SMALL | dict(prediction_type="epsilon"))
    with pytest.warns(UserWarning, match="learn_eta='action': the std's floor is learned, too"):
        make_model(**ddim).learn(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model(**ddim, min_sampling_std=0.1).learn(16)


def test_learning_for_no_number_of_steps() -> None:
    with pytest.raises(ValueError, match="total_timesteps=nan must be a finite number"):
        make_model().learn(NAN)  # type: ignore[arg-type]


def test_an_optimiser_with_a_learning_rate_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"optimizer_kwargs\['lr'\]: learning rates are arguments of DPPO"):
        make_model(policy_kwargs=SMALL | dict(optimizer_kwargs=dict(lr=1e-3)))


def test_advantage_of_a_single_decision() -> None:
    with pytest.raises(ValueError, match="n_steps=4 .*normalize_advantage"):
        make_model(env="Pendulum-v1", n_steps=4, policy_kwargs=SMALL | dict(horizon=4))


def test_rollout_buffer_of_ppo() -> None:
    with pytest.raises((TypeError, ValueError), match="rollout_buffer_class=.*DenoisingRolloutBuffer"):
        make_model(rollout_buffer_class=RolloutBuffer)


# ---------------------------------------------------------------------- entries copied from PPO's


@pytest.mark.parametrize(
    "name,value",
    [
        ("share_features_extractor", True),
        ("use_sde", True),
        ("use_expln", True),
        ("full_std", False),
        ("squash_output", True),
    ],
)
def test_policy_kwargs_of_ppo(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=name) as error:
        make_model(policy_kwargs=SMALL | {name: value})
    assert "unexpected keyword" not in str(error.value)


@pytest.mark.parametrize("name,value", [("use_sde", True), ("sde_sample_freq", 4)])
def test_arguments_of_ppo(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=name) as error:
        make_model(**{name: value})
    # What Python says of any name that it does not know is not all.
    assert not str(error.value).endswith(f"unexpected keyword argument '{name}'")


def test_residual_that_cannot_be() -> None:
    for net_arch in ([64, 64], dict(pi=[8, 4], vf=[16]), dict(pi=[8], vf=[16, 4])):
        with pytest.raises(ValueError, match="net_arch"):
            make_model(policy_kwargs=dict(net_arch=net_arch, residual=True))


def test_clip_action() -> None:
    with pytest.raises(ValueError, match="ClipAction"):
        make_model(env=gym.wrappers.ClipAction(gym.make("Pendulum-v1")))


def test_probability_of_an_action() -> None:
    """What imitation's BC and GAIL ask for: the error names what to use."""
    policy = make_model().policy
    with pytest.raises(NotImplementedError, match=r"sb3_dppo\.BC|BC\("):
        policy.evaluate_actions(th.zeros(1, 3), th.zeros(1, 1))


# ---------------------------------------------------------------------- files


def test_changes_that_a_folder_fixes(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "folder")
    with pytest.raises((TypeError, ValueError), match="policy_kwargs") as error:
        DPPO.from_pretrained(tmp_path / "folder", policy_kwargs=dict(horizon=4))
    assert "config.json" not in str(error.value)


def test_values_out_of_range_of_a_file(tmp_path: Path) -> None:
    """A model is also loaded only to predict, as the zoo does: with no learning rate and no clip range, for one env."""
    model = make_model()
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model", learning_rate=0.0, clip_range=lambda _: 0.0)
    assert np.isfinite(loaded.predict(loaded.observation_space.sample())[0]).all()
    with pytest.raises(ValueError, match="n_epochs=0"):
        DPPO.load(tmp_path / "model", env=model.env, n_epochs=0).learn(16)


def test_settings_that_fit_only_together() -> None:
    """What was assigned is checked with what was assigned beside it, not with what was there before."""
    model = make_model(policy_kwargs=SMALL | dict(horizon=4), act_steps=4).learn(16)
    model.act_steps, model.n_steps = 2, 6
    model.learn(12)
    assert model.policy.sampler.act_steps == 2


def test_warnings_name_the_line_of_the_user() -> None:
    with pytest.warns(UserWarning, match="each epoch is one minibatch") as warned:
        make_model(batch_size=1000).learn(16)
    assert warned[0].filename == __file__


def test_a_floor_below_what_densities_may_be() -> None:
    with pytest.warns(UserWarning, match="min_logprob_std=0.02: log-densities are clamped"):
        make_model(min_sampling_std=0.02, min_logprob_std=0.02).learn(16)
    with pytest.warns(UserWarning, match=r"std_range=\(0.02, 1.0\): log-densities are clamped"):
        make_model(learn_std="action", std_range=(0.02, 1.0)).learn(16)
