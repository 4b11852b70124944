"""Flow matching: Euler steps against diffusers' own, what is learned from demonstrations, and fine-tuning."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from sb3_dppo import BC, DPPO, Demonstrations
from sb3_dppo.diffusion.flow import TIME_SCALE, FlowProcess

FLOW: dict[str, Any] = dict(prediction_type="flow", denoising_steps=4, horizon=2, net_arch=[32], clip_sample_range=None)


def make_model(policy: str = "DiffusionMlpPolicy", policy_kwargs: dict[str, Any] = FLOW, **kwargs: Any) -> DPPO:
    arguments: dict[str, Any] = dict(n_steps=32, batch_size=32, n_epochs=2, seed=0, device="cpu")
    return DPPO(policy, "Pendulum-v1", policy_kwargs=policy_kwargs, **arguments | kwargs)


@pytest.mark.parametrize("n_steps", [1, 2, 4, 20])
def test_a_chain_equals_a_loop_of_euler_steps(n_steps: int) -> None:
    model = make_model(inference_steps=n_steps, min_sampling_std=0.0)
    th.nn.init.normal_(model.policy.denoiser.mlp[-1].weight)
    obs, noise = th.randn(8, 3), model.policy.draw_noise(8)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIME_SCALE)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n_steps, n_steps).tolist())
    denoiser, sample = model.policy.denoiser, noise[0]
    condition = denoiser.encode(model.policy.extract_features(obs))
    for t in scheduler.timesteps:
        output = denoiser(sample, denoiser.embed_timesteps(t[None]).expand(8, -1), condition)
        sample = scheduler.step(output, t, sample).prev_sample
    for deterministic in (False, True):
        sampled = model.policy.sample_chain(obs, deterministic, noise)
        th.testing.assert_close(sampled.actions, sample, rtol=1e-4, atol=1e-4)


def test_log_probabilities_are_those_of_steps_with_the_floor_as_std() -> None:
    model = make_model(min_sampling_std=0.2, min_logprob_std=0.3, ft_denoising_steps=3)
    obs, noise = th.randn(8, 3), model.policy.draw_noise(8)
    sampled = model.policy.sample_chain(obs, noise=noise)
    denoiser, process = model.policy.denoiser, model.policy.process
    condition = denoiser.encode(model.policy.extract_features(obs))
    for index, sigma in enumerate((0.75, 0.5, 0.25)):
        before, after = sampled.chain[:, index], sampled.chain[:, index + 1]
        embedding = denoiser.embed_timesteps(th.full((8,), TIME_SCALE * sigma))
        mean = before - 0.25 * denoiser(before, embedding, condition)
        th.testing.assert_close(after, mean + 0.2 * noise[index + 2].clamp(-3, 3), rtol=1e-4, atol=1e-4)
        th.testing.assert_close(sampled.log_prob[:, index], Normal(mean, 0.3).log_prob(after), rtol=1e-3, atol=1e-3)
    assert process.inference_steps == 4
    th.testing.assert_close(model.policy.chain_log_prob(obs, sampled.chain), sampled.log_prob, rtol=1e-4, atol=1e-4)


def test_the_clean_chunk_that_a_step_predicts_can_be_clamped() -> None:
    process = FlowProcess(denoising_steps=2, clip_sample_range=0.5)
    sample, noise = th.full((1, 1, 1), 2.0), th.full((1, 1, 1), 1.5)
    # At σ = 1 the chunk would be 2 - (-1) = 3, and is 0.5: half the way there.
    assert process.transition(sample, th.full((1, 1, 1), -1.0), 0)[0].item() == pytest.approx(1.25)
    assert process.transition(noise, th.zeros(1, 1, 1), 1)[0].item() == pytest.approx(0.5)


def test_what_is_learned_is_the_velocity_of_straight_paths() -> None:
    process = FlowProcess()
    actions, noise, timesteps = th.randn(64, 2, 1), th.randn(64, 2, 1), process.draw_timesteps(64, th.device("cpu"))
    assert (timesteps >= 0).all() and (timesteps <= TIME_SCALE).all() and timesteps.std() > 0.2 * TIME_SCALE
    noisy, velocity = process.add_noise(actions, noise, timesteps), process.denoising_target(actions, noise, timesteps)
    share = timesteps[:, None, None] / TIME_SCALE
    th.testing.assert_close(noisy - share * velocity, actions, rtol=1e-4, atol=1e-5)
    th.testing.assert_close(noisy + (1 - share) * velocity, noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy,widths", [("DiffusionMlpPolicy", [64] * 3), ("DiffusionTransformerPolicy", [32])])
def test_two_modes_stay_two(policy: str, widths: list[int]) -> None:
    """Of demonstrations that go either way, four steps keep both, which a mean would not."""
    model = make_model(policy, dict(FLOW, net_arch=widths, clip_sample_range=1.0), n_steps=64)
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, (3000, 3)).astype(np.float32)
    side = np.repeat(rng.choice([-1.0, 1.0], 300), 10)[:, None]
    actions = (side + 0.05 * rng.normal(size=(3000, 1))).astype(np.float32)
    demonstrations = Demonstrations(observations, actions, np.full(300, 10))
    BC(model, demonstrations, batch_size=64, learning_rate=2e-3).train(20, progress_bar=False)
    chunks = model.policy.sample_chain(th.as_tensor(observations[:400]), deterministic=True).actions
    ends = model.policy.normalizer.unnormalize_actions(chunks)
    assert (np.abs(ends) > 0.5).mean() > 0.85 and 0.35 < (ends > 0).mean() < 0.65
    assert (np.sign(ends[:, 0]) == np.sign(ends[:, 1])).mean() > 0.95


def test_the_number_of_steps_is_free_when_loading(tmp_path: Path) -> None:
    model = make_model(ft_denoising_steps=2)
    model.pretrained_on_demonstrations = True
    model.learn(64)
    model.save(tmp_path / "flow")
    model.save_pretrained(tmp_path / "shared")
    for n_steps in (1, 3, 7):
        settings: dict[str, Any] = dict(inference_steps=n_steps, ft_denoising_steps=None)
        for loaded in (
            DPPO.load(tmp_path / "flow", env=model.env, **settings),
            DPPO.from_pretrained(tmp_path / "shared", env="Pendulum-v1", **settings),
        ):
            assert loaded.policy.sampler.inference_steps == n_steps
            loaded.learn(32)
    # The weights are the same whatever is run.
    loaded = DPPO.load(tmp_path / "flow")
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, loaded.policy.state_dict()[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        dict(policy="DiffusionUnetPolicy", policy_kwargs=dict(FLOW, net_arch=[16, 16])),
        dict(policy="DiffusionTransformerPolicy", policy_kwargs=dict(FLOW, net_arch=[16])),
        dict(ft_denoising_steps=2, ft_denoising_anneal=(1, 1)),
        dict(bc_coef=0.1, kl_coef=0.1),
        dict(act_steps=1),
    ],
)
def test_fine_tunes(settings: dict[str, Any]) -> None:
    model = make_model(**settings)
    model.pretrained_on_demonstrations = True
    before = [parameter.clone() for parameter in model.policy.denoiser.parameters()]
    model.learn(64)
    assert any(not th.equal(old, new) for old, new in zip(before, model.policy.denoiser.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(scheduler="ddim"), "scheduler='ddim' is of diffusion; prediction_type='flow' has its own"),
        (dict(inference_steps=0), "inference_steps=0 must be between 1 and 1000"),
        (dict(denoising_steps=0), "denoising_steps=0 must be between 1 and 1000"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowProcess(**arguments)
