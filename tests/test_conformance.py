"""Agreement with arrays that the reference implementation computed (recorded once; see tests/data/README.md)."""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_dppo import import_reference_checkpoint
from sb3_dppo.buffers import DenoisingRolloutBuffer, DenoisingRolloutBufferSamples, RewardScaler, mean_log_prob

DATA = Path(__file__).parent / "data"
# SB3_DPPO_COMPILE=1 runs the cases with compiled denoising, which takes minutes.
COMPILE = True if os.environ.get("SB3_DPPO_COMPILE") == "1" else "auto"
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


def fill_buffer(rewards: np.ndarray, values: np.ndarray, gamma: float, gae_lambda: float) -> DenoisingRolloutBuffer:
    """Decisions of one env step each: ``rewards`` and ``values`` have shape (T, n)."""
    n_steps, n_envs = rewards.shape
    buffer = DenoisingRolloutBuffer(
        n_steps, spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,)), 1, 1, 1, "cpu", gae_lambda, gamma, n_envs
    )
    for t in range(n_steps):
        envs = np.arange(n_envs)
        chain = th.zeros(n_envs, 2, 1, 1)
        buffer.add(envs, th.zeros(n_envs, 1), chain, chain[:, 1:], th.as_tensor(values[t])[:, None])
        buffer.add_rewards(rewards[t])
    return buffer


def test_gae_agrees_where_no_episode_is_truncated_and_bootstraps_where_one_is() -> None:
    with np.load(DATA / "gae_plain.npz") as archive:
        data = dict(archive)
    config = json.loads(str(data["config"])) if "config" in data else dict(gamma=0.97, gae_lambda=0.9)
    rewards, values, last = data["rewards_used"], data["values"], data["last_values"]
    terminated, truncated = data["terminated"], data["truncated"]
    n_steps, n_envs = rewards.shape
    terminal_value = 0.37

    buffer = DenoisingRolloutBuffer(
        n_steps,
        spaces.Box(-1, 1, (1,)),
        spaces.Box(-1, 1, (1,)),
        1,
        1,
        1,
        "cpu",
        config["gae_lambda"],
        config["gamma"],
        n_envs,
    )
    for t in range(n_steps):
        chain = th.zeros(n_envs, 2, 1, 1)
        buffer.add(np.arange(n_envs), th.zeros(n_envs, 1), chain, chain[:, 1:], th.as_tensor(values[t])[:, None])
        buffer.add_rewards(rewards[t])
        ended = np.flatnonzero(terminated[t] | truncated[t])
        buffer.end_episodes(ended, np.where(terminated[t, ended], 0.0, terminal_value))
    buffer.compute_returns_and_advantage(th.as_tensor(last)[:, None])
    ours = buffer.advantages.numpy().reshape(n_steps, n_envs)

    # The definition: never across an end, and the value of the last observation where an episode was cut.
    expected, following = np.zeros((n_steps, n_envs)), np.zeros(n_envs)
    for t in reversed(range(n_steps)):
        end = terminated[t] | truncated[t]
        next_value = last if t == n_steps - 1 else values[t + 1]
        next_value = np.where(terminated[t], 0.0, np.where(truncated[t], terminal_value, next_value))
        delta = rewards[t] + config["gamma"] * next_value - values[t]
        following = expected[t] = delta + config["gamma"] * config["gae_lambda"] * np.where(end, 0.0, following)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    # The same as the reference after each env's last truncated step, and different at and before one.
    cut = truncated & ~terminated
    assert cut.any()
    for env in range(n_envs):
        cuts = np.flatnonzero(cut[:, env])
        after = cuts[-1] + 1 if len(cuts) else 0
        np.testing.assert_allclose(ours[after:, env], data["agent_advantages"][after:, env], rtol=1e-5, atol=1e-6)
        for t in cuts:
            assert abs(ours[t, env] - data["agent_advantages"][t, env]) > 1e-3


def test_short_decisions_are_discounted_by_their_length() -> None:
    """Two of four actions executed: γ^(2/4), where the reference discounts each decision by γ."""
    gamma, gae_lambda = 0.9, 0.8
    box = spaces.Box(-1, 1, (1,))
    buffer = DenoisingRolloutBuffer(8, box, box, 4, 4, 1, "cpu", gae_lambda, gamma, n_envs=1)
    chain, env = th.zeros(1, 2, 4, 1), np.array([0])
    values, rewards = [0.5, -0.2, 0.3], [[1.0, 1.0], [2.0, 0.5], [0.1, 0.2, 0.3, 0.4]]
    for decision in range(3):
        buffer.add(env, th.zeros(1, 1), chain, chain[:, 1:], th.tensor([[values[decision]]]))
        for reward in rewards[decision]:
            buffer.add_rewards(np.array([reward]))
        if decision == 0:  # the episode is truncated in the middle of the window: the next decision is cut
            buffer.end_episodes(env, np.array([0.7]))
    buffer.compute_returns_and_advantage(th.tensor([[0.9]]))
    last = 1.0 + gamma * 0.9 - 0.3
    middle = 2.5 + gamma**0.5 * 0.3 + 0.2 + gamma**0.5 * gae_lambda * last
    first = 2.0 + gamma**0.5 * 0.7 - 0.5
    np.testing.assert_allclose(buffer.advantages.numpy(), [first, middle, last], rtol=1e-5)
    np.testing.assert_allclose(buffer.returns.numpy(), np.add([first, middle, last], values), rtol=1e-5)


def test_reward_scaling_differs_in_discount_and_counts() -> None:
    with np.load(DATA / "reward_scaler.npz") as archive:
        data = dict(archive)
    scaler, running, seen = RewardScaler(3), np.zeros(3), []
    for call in range(2):
        reward, first = data[f"shared/call{call}/reward"].T, data[f"shared/call{call}/first"].T
        buffer = fill_buffer(reward, np.zeros_like(reward), gamma=0.99, gae_lambda=0.95)
        for t in range(len(reward)):
            if t + 1 < len(reward):
                buffer.episode_end[3 * t : 3 * t + 3] = first[t + 1] > 0
        scaler.returns = np.where(first[0] > 0, 0.0, scaler.returns)
        buffer.scale_rewards(scaler)
        for t in range(len(reward)):
            running = 0.99 * np.where(first[t] > 0, 0.0, running) + reward[t]
            seen.append(running)
        # Our variance divides by the true count: the reference's by count - 1, from a count of 1e-4.
        np.testing.assert_allclose(scaler.statistics.var, np.var(seen), rtol=1e-4)
        np.testing.assert_allclose(data[f"shared/call{call}/running_return"], running, rtol=1e-6)
        scaled = buffer.rewards[: reward.size].reshape(reward.shape)
        np.testing.assert_allclose(scaled, np.clip(reward / np.sqrt(np.var(seen) + 1e-8), -10, 10), rtol=1e-4)
        ratio = data[f"shared/call{call}/scaled"].T / scaled
        unclipped = np.abs(scaled) < 10
        assert np.ptp(ratio[unclipped]) < 1e-4 * abs(ratio[unclipped]).max()  # the same up to one factor ...
        assert abs(ratio[unclipped].mean() - 1) > 1e-3  # ... which the wrong count makes differ from 1

    # γ is the algorithm's, where the reference's is always 0.99.
    reward = np.random.default_rng(0).normal(1, 1, (50, 3))
    buffer, scaler = fill_buffer(reward, np.zeros_like(reward), gamma=0.5, gae_lambda=0.95), RewardScaler(3)
    buffer.scale_rewards(scaler)
    running, seen = np.zeros(3), []
    for t in range(50):
        running = 0.5 * running + reward[t]
        seen.append(running)
    np.testing.assert_allclose(scaler.statistics.var, np.var(seen), rtol=1e-4)
