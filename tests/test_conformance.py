"""Agreement with arrays that the reference implementation computed (recorded once; see tests/data/README.md)."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_dppo import import_reference_checkpoint
from sb3_dppo.buffers import DenoisingRolloutBufferSamples, mean_log_prob

DATA = Path(__file__).parent / "data"
# SB3_DPPO_COMPILE=1 runs the cases with compiled denoising, which takes minutes.
COMPILE = os.environ.get("SB3_DPPO_COMPILE") == "1"
CASES = ["ddpm_hopper", "ddim_full", "ddpm_x0"]


class Case:
    """A recorded policy with its settings, and the model that we make of it."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / f"{name}.npz") as archive:
            arrays = dict(archive)
        self.config = config = json.loads(str(arrays.pop("config")))
        self.arrays = {key: th.as_tensor(value) for key, value in arrays.items()}
        self.weights = {
            key.removeprefix("weights/"): value for key, value in self.arrays.items() if key.startswith("weights/")
        }
        policy_kwargs: dict[str, Any] = dict(
            denoising_steps=config["denoising_steps"],
            horizon=config["horizon_steps"],
            prediction_type="epsilon" if config["predict_epsilon"] else "sample",
            clip_sample_range=config["denoised_clip_value"],
            clip_noise_pred=config["eps_clip_value"],
            clip_final_action=config["final_action_clip_value"],
            activation_fn=getattr(nn, config["activation_type"]),
            critic_activation_fn=getattr(nn, config["critic_activation_type"]),
        )
        self.model = import_reference_checkpoint(
            self.weights,
            (
                spaces.Box(-np.inf, np.inf, (config["obs_dim"] * config["cond_steps"],)),
                spaces.Box(-1, 1, (config["action_dim"],)),
            ),
            policy_kwargs=policy_kwargs,
            scheduler="ddim" if config["use_ddim"] else "ddpm",
            inference_steps=config["ddim_steps"],
            eta=config["base_eta"] if config["use_ddim"] else 1.0,
            ft_denoising_steps=config["ft_denoising_steps"],
            min_sampling_std=config["min_sampling_denoising_std"],
            min_logprob_std=config["min_logprob_denoising_std"],
            noise_clip=config["randn_clip_value"],
            gamma_denoising=config["gamma_denoising"],
            clip_range=config["clip_ploss_coef"],
            clip_range_base=config["clip_ploss_coef_base"],
            clip_range_rate=config["clip_ploss_coef_rate"],
            clip_range_vf=config["clip_vloss_coef"],
            advantage_quantiles=(config["clip_advantage_lower_quantile"], config["clip_advantage_upper_quantile"]),
            normalize_advantage=config["norm_adv"],
            vf_coef=config["vf_coef"],
            act_steps=config["reward_horizon"],
            seed=0,
            device="cpu",
            compile=COMPILE,
        )
        self.policy = self.model.policy

    def __getitem__(self, key: str) -> th.Tensor:
        return self.arrays[key]

    @property
    def obs(self) -> th.Tensor:
        return self["obs"].flatten(1)

    def noise(self, prefix: str) -> th.Tensor:
        return th.cat([self[f"{prefix}/init_noise"][None], self[f"{prefix}/step_noise"]])

    def loss_samples(self, bc: bool = False) -> DenoisingRolloutBufferSamples:
        """The recorded minibatch: each row is its own decision, so that the critic's loss is over the same rows."""
        n = len(self["loss/in_obs"])
        n_executed = th.full((n,), self.config["reward_horizon"])
        return DenoisingRolloutBufferSamples(
            observations=self["loss/in_obs"].flatten(1),
            returns=self["loss/in_returns"],
            old_values=self["loss/in_old_value"],
            advantages=self["loss/in_advantages"],
            n_executed=n_executed,
            decision_index=th.arange(n),
            denoising_index=self["loss/in_denoising_index"],
            chain_prev=self["loss/in_chain_prev"],
            chain_next=self["loss/in_chain_next"],
            old_log_prob=mean_log_prob(self["loss/in_old_logprob"], n_executed),
            value_index=th.arange(n),
            bc_noise=self.noise("loss_bc") if bc else None,
        )


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def assert_close(ours: Any, reference: th.Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    th.testing.assert_close(th.as_tensor(ours).to(reference.dtype).reshape(reference.shape), reference, rtol=rtol, atol=atol)


def test_tables(case: Case) -> None:
    process = case.policy.process
    scheduler = process.scheduler
    th.testing.assert_close(scheduler.betas, case["tables/betas"], rtol=0, atol=0)
    assert_close(scheduler.alphas_cumprod, case["tables/alphas_cumprod"], atol=1e-9)
    c = process.coefficients(th.arange(process.inference_steps))
    assert (process.timesteps == case["pmv/t"]).all()
    if case.config["use_ddim"]:
        assert_close(c.sqrt_alpha, case["tables/ddim_alphas_sqrt"])
        assert_close(c.mean_from_x0**2, case["tables/ddim_alphas_prev"])
        assert_close(c.sqrt_one_minus_alpha, case["tables/ddim_sqrt_one_minus_alphas"])
    else:
        assert_close(c.sigma.flatten() ** 2, case["tables/ddpm_var"].flip(0), atol=1e-9)
        assert_close(c.mean_from_x0, case["tables/ddpm_mu_coef1"].flip(0))
        assert_close(c.mean_from_sample, case["tables/ddpm_mu_coef2"].flip(0))


def test_mean_and_std_at_every_step(case: Case) -> None:
    policy = case.policy
    first = policy.sampler.n_base_steps
    for prefix, base_everywhere in (("mean", False), ("mean_base", True)):
        for position in range(policy.sampler.inference_steps):
            denoiser = policy.base_denoiser if base_everywhere or position < first else policy.denoiser
            features = policy.extract_features(case.obs)
            embedding = denoiser.embed_timesteps(policy.process.timesteps[position])
            x = case["pmv/x"]
            with th.no_grad():
                output = denoiser(x, embedding, denoiser.encode(features))
                mean, sigma = policy.process.transition(x, output, position, policy.sampler.config.eta)
            if base_everywhere or position < first:
                assert_close(output, case["pmv/net_base"][position])
            else:
                assert_close(output, case["pmv/net_ft"][position])
            # DDIM computes the noise again from a clamped clean chunk and divides by small numbers.
            assert_close(mean, case[f"pmv/{prefix}"][position], atol=1e-4 if case.config["use_ddim"] else 1e-5)
            reference_std = (0.5 * case["pmv/logvar"][position, 0]).exp()
            assert_close(th.as_tensor(sigma).clamp(min=1e-10).expand_as(reference_std), reference_std, atol=1e-6)


@pytest.mark.parametrize("prefix", ["sample_train", "sample_det", "sample_base"])
def test_chains_replayed_from_recorded_noise(case: Case, prefix: str) -> None:
    deterministic, use_base = prefix == "sample_det", prefix == "sample_base"
    actions, chain, log_prob = case.policy.sample_chain(case.obs, deterministic, case.noise(prefix), use_base)
    assert_close(actions, case[f"{prefix}/action"])
    assert_close(chain, case[f"{prefix}/chain"])
    # Densities of the recorded chain: those of ours differ by (its rounding) × (distance to the mean) / variance.
    with th.no_grad():
        recorded = case.policy.chain_log_prob(case.obs, case[f"{prefix}/chain"])
    assert_close(recorded, case[f"{prefix}/logprob"], atol=1e-4)
    assert_close(log_prob, case[f"{prefix}/logprob_base" if use_base else f"{prefix}/logprob"], atol=1e-3)


def test_values(case: Case) -> None:
    with th.no_grad():
        assert_close(case.policy.predict_values(case.obs), case["critic_value"])


def test_loss(case: Case) -> None:
    loss, metrics = case.model.loss(case.loss_samples())
    # A mean of terms of size 1 that nearly cancel: the terms agree to 1e-6.
    assert_close(metrics["policy_gradient_loss"], case["loss/out_pg_loss"], atol=1e-6)
    assert_close(metrics["value_loss"], case["loss/out_v_loss"])
    assert_close(metrics["approx_kl"], case["loss/out_approx_kl"], atol=1e-7)
    assert_close(metrics["clip_fraction"], case["loss/out_clipfrac"])
    assert_close(metrics["ratio"], case["loss/out_ratio"])
    assert_close(metrics["eta"], case["loss/out_eta"])
    assert_close(loss, case["loss/out_total"])


def test_gradients(case: Case) -> None:
    policy = case.policy
    policy.zero_grad()
    case.model.loss(case.loss_samples())[0].backward()
    named = dict(policy.denoiser.named_parameters())
    time, mlp, critic = named["time_mlp.0.weight"], named["mlp.0.weight"], next(policy.critic.parameters())
    for parameter, name in (
        (mlp, "actor_ft.mlp_mean.layers.0.weight"),
        (time, "actor_ft.time_embedding.1.weight"),
        (critic, "critic.Q1.layers.0.weight"),
    ):
        reference = case[f"loss/grad/{name}"]
        assert_close(parameter.grad, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())
    norms = sorted(p.grad.norm().item() for p in [*policy.denoiser.parameters(), *policy.critic.parameters()])
    np.testing.assert_allclose(norms, sorted(case["loss/grad_norms"].tolist()), rtol=1e-4)
    assert all(p.grad is None for p in policy.base_denoiser.parameters())


def test_loss_variants(case: Case) -> None:
    model, samples = case.model, case.loss_samples()
    clip, normalize = model.clip_range_vf, model.normalize_advantage
    try:
        model.clip_range_vf = 0.2 if clip is None else None
        metrics = model.loss(samples)[1]
        assert_close(metrics["value_loss"], case["loss_vclip/v_loss"])
        model.clip_range_vf = clip
        model.normalize_advantage = not normalize
        metrics = model.loss(samples)[1]
        assert_close(metrics["policy_gradient_loss"], case["loss_normadv/pg_loss"], atol=1e-6)
    finally:
        model.clip_range_vf, model.normalize_advantage = clip, normalize


def test_bc_term(case: Case) -> None:
    model = case.model
    plain = model.loss(case.loss_samples())[0]
    model.bc_coef = 0.5
    try:
        loss, metrics = model.loss(case.loss_samples(bc=True))
    finally:
        model.bc_coef = 0.0
    assert_close(metrics["bc_loss"], case["loss_bc/bc_loss"])
    assert_close(loss - plain, 0.5 * case["loss_bc/bc_loss"], rtol=1e-4)


def test_pre_training_loss(case: Case) -> None:
    # The recorded loss is of the base weights.
    policy = import_base(case).policy
    loss = policy.bc_loss(case.obs, case["pretrain/x0"], case["pretrain/t"], case["pretrain/noise"])
    noisy = policy.process.scheduler.add_noise(case["pretrain/x0"], case["pretrain/noise"], case["pretrain/t"])
    assert_close(noisy, case["pretrain/x_noisy"])
    assert_close(loss, case["pretrain/loss"])
    loss.backward()
    reference = case["pretrain/grad/mlp_mean.layers.0.weight"]
    assert_close(policy.denoiser.mlp[0].weight.grad, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


def import_base(case: Case) -> Any:
    """The model of a pre-training checkpoint with the case's base weights."""
    network = {name.replace("actor.", "network."): value for name, value in case.weights.items() if name.startswith("actor.")}
    spoiled = {name: value + 1 for name, value in network.items()}
    space = (case.model.observation_space, case.model.action_space)
    keep = ("denoising_steps", "horizon", "prediction_type", "activation_fn")
    policy_kwargs = {name: case.model.policy_kwargs[name] for name in keep}
    return import_reference_checkpoint({"model": spoiled, "ema": network}, space, policy_kwargs=policy_kwargs, device="cpu")


def test_pre_training_checkpoint_fills_both_denoisers_with_the_ema(case: Case) -> None:
    policy = import_base(case).policy
    for ours, reference in ((policy.denoiser, case.policy.base_denoiser), (policy.base_denoiser, case.policy.base_denoiser)):
        for name, value in ours.state_dict().items():
            assert (value == reference.state_dict()[name]).all(), name


# ---------------------------------------------------------------------- settings that no recorded case has


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("clips", [(None, None, None), (1.0, None, None), (0.8, 0.5, 0.6)])
def test_ddim_step_with_other_eta_and_clamps(eta: float, clips: tuple[float | None, ...]) -> None:
    """One DDIM step, written out (the reference's order: clean chunk, its clamp, noise again, its clamp, mean)."""
    clip_x0, clip_noise, clip_final = clips
    case = Case("ddim_full")
    model = import_reference_checkpoint(
        case.weights,
        (case.model.observation_space, case.model.action_space),
        policy_kwargs=dict(
            denoising_steps=100, clip_sample_range=clip_x0, clip_noise_pred=clip_noise, clip_final_action=clip_final
        ),
        scheduler="ddim",
        inference_steps=5,
        eta=eta,
        min_sampling_std=0.05,
        device="cpu",
    )
    policy, noise = model.policy, case.noise("sample_train")
    x, chain, means, sigmas = noise[0], [noise[0]], [], []
    alphas = policy.process.scheduler.alphas_cumprod
    for position, t in enumerate(range(80, -1, -20)):
        alpha, alpha_prev = alphas[t], alphas[t - 20] if t >= 20 else th.ones(())
        embedding = policy.denoiser.embed_timesteps(th.tensor(t))
        with th.no_grad():
            prediction = policy.denoiser(x, embedding, policy.denoiser.encode(policy.extract_features(case.obs)))
        x0 = (x - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
        if clip_x0 is not None:
            x0 = x0.clamp(-clip_x0, clip_x0)
            prediction = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        if clip_noise is not None:
            prediction = prediction.clamp(-clip_noise, clip_noise)
        sigma = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()
        mean = alpha_prev.sqrt() * x0 + (1 - alpha_prev - sigma**2).clamp(min=0).sqrt() * prediction
        x = mean + sigma.clamp(min=0.05) * noise[position + 1].clamp(-3, 3)
        chain.append(x)
        means.append(mean)
        sigmas.append(sigma)
    if clip_final is not None:
        chain[-1] = chain[-1].clamp(-clip_final, clip_final)
    ours = policy.sample_chain(case.obs, noise=noise)
    assert_close(ours.chain, th.stack(chain, 1), rtol=1e-4, atol=1e-4)
    expected = [
        th.distributions.Normal(mean, sigma.clamp(min=0.1)).log_prob(following)
        for mean, sigma, following in zip(means, sigmas, chain[1:], strict=True)
    ]
    assert_close(ours.log_prob, th.stack(expected, 1), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------- what differs on purpose
