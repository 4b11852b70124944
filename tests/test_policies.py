"""Policies: spaces, sampling, acting in chunks, saving."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn

from sb3_dppo import BC, DPPO, Demonstrations, DiffusionMlpPolicy, DiffusionTransformerPolicy, DiffusionUnetPolicy
from sb3_dppo.chunks import noise_of_observations
from sb3_dppo.policies import DiffusionActorCriticPolicy
from tests.toy_envs import CountingEnv

SMALL = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=4, horizon=4)
BOX = spaces.Box(-1, 1, (5,))
MODES = dict(net_arch=dict(pi=[64, 64, 64]), horizon=1, denoising_steps=20, prediction_type="epsilon")


def make_policy(cls: type[DiffusionActorCriticPolicy] = DiffusionMlpPolicy, **kwargs: Any) -> DiffusionActorCriticPolicy:
    th.manual_seed(0)
    arguments = {**SMALL, **kwargs}
    if cls is DiffusionUnetPolicy:
        arguments["net_arch"] = dict(pi=[8, 16], vf=[16])
    return cls(kwargs.pop("observation_space", BOX), spaces.Box(-1, 1, (2,)), lambda _: 1e-3, **arguments)


@pytest.mark.parametrize("cls", [DiffusionMlpPolicy, DiffusionUnetPolicy])
@pytest.mark.parametrize("scheduler,inference_steps", [("ddpm", None), ("ddim", 2), ("ddim", 4)])
@pytest.mark.parametrize("ft_denoising_steps", [1, 2])
@pytest.mark.parametrize("deterministic", [False, True])
def test_sampled_log_probs_are_those_of_the_chain(
    cls: type[DiffusionActorCriticPolicy],
    scheduler: str,
    inference_steps: int | None,
    ft_denoising_steps: int,
    deterministic: bool,
) -> None:
    policy = make_policy(
        cls, scheduler=scheduler, inference_steps=inference_steps, ft_denoising_steps=ft_denoising_steps, eta=0.6
    )
    # The base denoiser must be the other one.
    policy.base_denoiser.load_state_dict({k: v + 0.1 for k, v in policy.base_denoiser.state_dict().items()})
    obs = th.randn(6, 5)
    sampled = policy.sample_chain(obs, deterministic)
    assert sampled.actions.shape == (6, 4, 2)
    assert sampled.chain.shape == (6, ft_denoising_steps + 1, 4, 2)
    assert sampled.log_prob.shape == (6, ft_denoising_steps, 4, 2)
    assert (sampled.chain[:, -1] == sampled.actions).all()
    with th.no_grad():
        th.testing.assert_close(policy.chain_log_prob(obs, sampled.chain), sampled.log_prob, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_film(residual: bool, layer_norm: bool) -> None:
    kwargs: dict[str, Any] = dict(residual=residual, layer_norm=layer_norm, obs_encoder_arch=[8, 6])
    kwargs |= dict(net_arch=dict(pi=[16] * 3, vf=[16]), prediction_type="epsilon")
    plain, film = make_policy(**kwargs), make_policy(film=True, **kwargs)
    film.load_state_dict(plain.state_dict(), strict=False)
    obs, noise = th.randn(5, 5), plain.draw_noise(5)
    # It begins as the identity.
    before = film.sample_chain(obs, noise=noise)
    th.testing.assert_close(before.chain, plain.sample_chain(obs, noise=noise).chain)
    for parameter in (film.denoiser.film.weight, film.denoiser.film.bias):
        th.nn.init.normal_(parameter, std=0.3)
    sampled = film.sample_chain(obs, noise=noise)
    assert not th.allclose(sampled.chain, before.chain, atol=1e-2)
    th.testing.assert_close(film.chain_log_prob(obs, sampled.chain), sampled.log_prob, rtol=1e-3, atol=1e-3)
    film.chain_log_prob(obs, sampled.chain).sum().backward()
    assert (film.denoiser.film.weight.grad != 0).any()


def test_noise_is_the_only_randomness_and_only_step_noise_is_clipped() -> None:
    policy = make_policy(noise_clip=0.5, ft_denoising_steps=4)
    obs, noise = th.randn(3, 5), 2 * th.randn(5, 3, 4, 2)
    first, second = policy.sample_chain(obs, noise=noise), policy.sample_chain(obs, noise=noise)
    assert (first.chain == second.chain).all()
    assert (first.chain[:, 0] == noise[0]).all()
    clipped = noise.clone()
    clipped[1:] = clipped[1:].clamp(-0.5, 0.5)
    assert (policy.sample_chain(obs, noise=clipped).chain == first.chain).all()


def test_gradients_reach_the_denoiser_only() -> None:
    policy = make_policy(ft_denoising_steps=2)
    obs = th.randn(3, 5)
    policy.chain_log_prob(obs, policy.sample_chain(obs).chain).sum().backward()
    assert all(p.grad is not None for p in policy.denoiser.parameters())
    assert all(p.grad is None for p in [*policy.base_denoiser.parameters(), *policy.critic.parameters()])


def test_forward_and_what_has_no_meaning() -> None:
    policy = make_policy()
    actions, values, log_prob = policy(th.randn(3, 5))
    assert actions.shape == (3, 4, 2) and values.shape == (3, 1) and log_prob.shape == (3, 4, 4, 2)
    with pytest.raises(NotImplementedError, match="chain_log_prob"):
        policy.evaluate_actions(th.randn(3, 5), actions)
    with pytest.raises(NotImplementedError, match="sample_chain"):
        policy.get_distribution(th.randn(3, 5))
    with pytest.raises(ValueError, match="ft_denoising_steps=4"):
        policy.chain_log_prob(th.randn(3, 5), th.randn(3, 3, 4, 2))


def test_normalisation() -> None:
    policy = make_policy()
    obs = th.randn(4, 5)
    assert (policy.extract_features(obs) == obs).all()
    assert not policy.normalizer.has_ranges
    low, high = np.array([0.0, -1, 2, 5, 1000]), np.array([1.0, 3, 2, 9, 1001])
    policy.normalizer.set_ranges(low, high, np.array([-0.5, 0.2]), np.array([0.5, 0.2]))
    assert policy.normalizer.has_ranges
    obs = th.as_tensor(np.stack([low, high, (low + high) / 2, low + 7])).float()
    expected = 2 * ((obs - obs[0]) / (obs[1] - obs[0] + 1e-6) - 0.5)
    expected[:, 2] = 0  # no range
    th.testing.assert_close(policy.extract_features(obs), expected, rtol=1e-4, atol=1e-4)
    actions = th.tensor([[-0.5, 0.2], [0.5, 0.2], [0.25, 0.2]])
    normalised = policy.normalizer.normalize_actions(actions)
    th.testing.assert_close(normalised, th.tensor([[-1.0, 0], [1, 0], [0.5, 0]]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(policy.normalizer.unnormalize_actions(normalised[:, None])[:, 0], actions, atol=1e-5)


@pytest.mark.parametrize("deterministic_noise", ["observation", "zero", "random"])
def test_deterministic_noise(deterministic_noise: str) -> None:
    policy = make_policy(deterministic_noise=deterministic_noise)
    obs = np.array([[0.0] * 5, [-0.0] * 5, [1e-3] * 5], dtype=np.float32)
    plans = [policy.predict(obs, deterministic=True)[0] for _ in range(2)]
    assert (plans[0] == plans[1]).all() == (deterministic_noise != "random")
    assert not (policy.predict(obs)[0] == policy.predict(obs)[0]).all()
    if deterministic_noise == "observation":
        # One observation alone gives what it gives in a batch, in any float type, and another policy object agrees.
        again = make_policy(deterministic_noise=deterministic_noise)
        np.testing.assert_allclose(again.predict(obs[2].astype(np.float64), deterministic=True)[0], plans[0][2], rtol=1e-5)
        np.testing.assert_array_equal(plans[0][0], plans[0][1])
        noise = noise_of_observations(th.randn(500, 5), (5, 500, 4, 2))
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
        assert abs(np.corrcoef(noise[:, :, 0, 0])).max() < 1.001
        assert abs(np.corrcoef(noise[0, :, 0, 0], noise[1, :, 0, 0])[0, 1]) < 0.2


def test_deterministic_noise_keeps_modes_apart() -> None:
    """Two equally good actions, -0.8 and 0.8: each observation gets one of them, not their mean."""
    model = DPPO(
        "DiffusionMlpPolicy",
        CountingEnv(n_actions=1),
        policy_kwargs=MODES,
        seed=0,
    )
    rng = np.random.default_rng(0)
    actions = 0.8 * rng.choice([-1.0, 1.0], (1000, 1))
    BC(model, Demonstrations(rng.normal(size=(1000, 3)), actions, np.array([1000])), learning_rate=3e-3).train(60, False)
    chosen = model.predict(rng.normal(size=(200, 3)), deterministic=True)[0]
    assert (np.abs(np.abs(chosen) - 0.8) < 0.2).mean() > 0.8
    assert 0.2 < (chosen > 0).mean() < 0.8


def count_plans(policy: DiffusionActorCriticPolicy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    plans: list[int] = []
    plan = policy.plan

    def counting(obs: th.Tensor, deterministic: bool = False) -> np.ndarray:
        plans.append(len(obs))
        return plan(obs, deterministic)

    monkeypatch.setattr(policy, "plan", counting)
    return plans


def test_predict_executes_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(act_steps=3)
    plans = count_plans(policy, monkeypatch)
    obs, state = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32), None
    actions = []
    for step in range(7):
        action, state = policy.predict(obs, state, np.array([step == 0, step in (0, 4)]))
        assert action.shape == (2, 2)
        actions.append(action)
    # Both at 0; both at 3; the second alone at 4, where its episode begins; the first alone at 6.
    assert plans == [2, 2, 1, 1]
    chunks, n_executed = state  # type: ignore[misc]
    assert chunks.shape == (2, 3, 2) and n_executed.tolist() == [1, 3]
    assert (chunks[1] == np.stack(actions)[4:7, 1]).all()


def test_predict_without_state_plans_every_time_and_for_one_env(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    plans = count_plans(policy, monkeypatch)
    for _ in range(3):
        action, _ = policy.predict(np.zeros(5))
        assert action.shape == (2,)
    assert plans == [1, 1, 1]
    with pytest.raises(ValueError, match="state is of 1 envs, but observation of 2"):
        policy.predict(np.zeros((2, 5)), policy.predict(np.zeros(5))[1])
    with pytest.raises(ValueError, match="tuple"):
        policy.predict((np.zeros(5), {}))  # type: ignore[arg-type]


def test_evaluate_policy_executes_chunks_as_an_explicit_loop_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DPPO("DiffusionMlpPolicy", "Hopper-v5", act_steps=4, policy_kwargs=SMALL, seed=0)
    plans = count_plans(model.policy, monkeypatch)
    env = gym.make("Hopper-v5")
    env.reset(seed=3)
    with pytest.warns(UserWarning, match="Monitor"):
        returns, lengths = evaluate_policy(model, env, 5, return_episode_rewards=True)
    assert len(plans) == sum(-(-length // 4) for length in lengths)  # type: ignore[union-attr]

    env = gym.make("Hopper-v5")
    env.reset(seed=3)
    expected = []
    obs, _ = env.reset()
    for _ in range(5):
        done, total = False, 0.0
        while not done:
            chunk = model.policy.plan(th.as_tensor(obs)[None], deterministic=True)[0]
            for action in chunk[:4]:
                obs, reward, terminated, truncated, _ = env.step(action)
                total += float(reward)
                done = terminated or truncated
                if done:
                    break
        expected.append(total)
        obs, _ = env.reset()
    np.testing.assert_allclose(np.mean(returns), np.mean(expected), rtol=1e-6)


def test_predict_does_not_disturb_training_draws() -> None:
    policy = make_policy()
    th.manual_seed(1)
    expected = th.rand(3)
    th.manual_seed(1)
    policy.predict(np.zeros(5))
    assert (th.rand(3) == expected).all()
    policy.seed(5)
    first = policy.predict(np.zeros(5))[0]
    policy.seed(5)
    assert (policy.predict(np.zeros(5))[0] == first).all()


@pytest.mark.parametrize("cls", [DiffusionMlpPolicy, DiffusionUnetPolicy])
def test_policy_save_and_load_keeps_the_sampler(cls: type[DiffusionActorCriticPolicy], tmp_path: Path) -> None:
    policy = make_policy(
        cls,
        act_steps=2,
        scheduler="ddim",
        inference_steps=2,
        eta=0.5,
        ft_denoising_steps=1,
        min_sampling_std=0.2,
        noise_clip=2.0,
    )
    policy.normalizer.set_ranges(np.zeros(5), np.ones(5), np.zeros(2), np.ones(2))
    policy.save(str(tmp_path / "policy.pt"))
    loaded = cls.load(str(tmp_path / "policy.pt"), device="cpu")
    assert loaded.sampler.config == policy.sampler.config
    assert loaded.process.is_ddim
    obs, noise = th.randn(3, 5), policy.draw_noise(3)
    assert (loaded.sample_chain(obs, noise=noise).chain == policy.sample_chain(obs, noise=noise).chain).all()
    assert (loaded.predict_values(obs) == policy.predict_values(obs)).all()


def test_a_scheduled_floor_is_saved_with_the_policy(tmp_path: Path) -> None:
    model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=32, batch_size=32, min_sampling_std="lin_0.3", device="cpu")
    model.learn(128)
    floor = model.policy.sampler.config.min_sampling_std
    assert floor == pytest.approx(0.075)
    model.policy.save(str(tmp_path / "policy.pt"))
    assert DiffusionMlpPolicy.load(str(tmp_path / "policy.pt")).sampler.config.min_sampling_std == floor


@pytest.mark.parametrize("shape", [(5, 3, 4, 1), (5, 1, 4, 2), (4, 3, 4, 2), (5, 3, 2)])
def test_noise_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"noise has the shape .* but must have \(5, 3, 4, 2\)"):
        make_policy().sample_chain(th.randn(3, 5), noise=th.randn(shape))


def test_extractors_may_keep_tensors() -> None:
    class Caching(nn.Module):
        """Keeps features, and its parameters as others."""

        features_dim = 5

        def __init__(self, observation_space: spaces.Space) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5)
            self.register_buffer("last", th.zeros(5))

        def forward(self, obs: th.Tensor) -> th.Tensor:
            features = self.linear(obs) + self.last
            self.last = features.detach()[-1].clone()
            return features

    policy = make_policy(features_extractor_class=Caching)
    obs = th.randn(3, 5)
    chain = policy.sample_chain(obs).chain
    policy.chain_log_prob(obs, chain).sum().backward()
    policy.update_base_denoiser()
    policy.sample_chain(obs)
    policy.update_base_denoiser()


@pytest.mark.parametrize(
    "net_arch,widths",
    [
        ([32, 32], (32, 32)),
        (dict(pi=[8, 4], vf=[16]), (8, 16)),
        (dict(vf=[16, 16]), (64, 16)),
        (None, (64, 64)),
    ],
)
def test_widths_in_the_plainest_form(net_arch: Any, widths: tuple[int, int]) -> None:
    policy = DiffusionMlpPolicy(BOX, spaces.Box(-1, 1, (2,)), lambda _: 1e-3, net_arch=net_arch)
    first: Any = (policy.denoiser.mlp[0], policy.critic[0])  # type: ignore[index]
    assert tuple(layer.out_features for layer in first) == widths


@pytest.mark.parametrize(
    "kwargs,activations,is_small",
    [
        (dict(), (nn.Tanh, nn.Tanh), True),
        (dict(prediction_type="epsilon"), (nn.ReLU, nn.Mish), False),
        (dict(activation_fn=nn.ELU, ortho_init=False), (nn.ELU, nn.Tanh), False),
        (dict(activation_fn="leaky_relu", critic_activation_fn="silu"), (nn.LeakyReLU, nn.SiLU), True),
        (dict(prediction_type="epsilon", critic_activation_fn=nn.ELU, ortho_init=True), (nn.ReLU, nn.ELU), True),
    ],
)
def test_a_policy_that_predicts_actions_begins_as_that_of_ppo(
    kwargs: dict[str, Any], activations: tuple[type[nn.Module], type[nn.Module]], is_small: bool
) -> None:
    policy = make_policy(**kwargs)
    mlps: Any = (policy.denoiser.mlp, policy.critic)
    assert tuple(type(mlp[1]) for mlp in mlps) == activations
    # Of an orthogonal layer of more inputs than outputs, the rows are.
    weights = mlps[0][-1].weight
    assert th.allclose(weights @ weights.T, 1e-4 * th.eye(8), atol=1e-8) == is_small
    assert (policy.base_denoiser.mlp[-1].weight == weights).all()


@pytest.mark.parametrize(
    "kwargs,clip",
    [
        (dict(), None),
        (dict(prediction_type="mean", denoising_steps=1), None),
        (dict(prediction_type="epsilon"), 1.0),
        (dict(prediction_type="flow"), 1.0),
        (dict(prediction_type="epsilon", clip_sample_range=None), None),
        (dict(clip_sample_range=0.5), 0.5),
    ],
)
def test_what_predicts_actions_can_be_pulled_back_from_beyond_the_bounds(kwargs: dict[str, Any], clip: float | None) -> None:
    policy = make_policy(**kwargs)
    assert policy.process.clip_sample_range == clip
    if kwargs:
        return
    bias = policy.denoiser.mlp[-1].bias
    with th.no_grad():
        bias += 5.0
    obs = th.zeros(1, 5)
    policy.chain_log_prob(obs, policy.sample_chain(obs).chain - 10.0).mean().backward()
    assert (bias.grad < 0).all()
    assert (np.abs(policy.predict(np.zeros(5), deterministic=True)[0]) == 1).all()


@pytest.mark.parametrize("horizon,n_actions", [(1, 1), (4, 3), (8, 1), (16, 6)])
def test_horizons_and_action_sizes(horizon: int, n_actions: int) -> None:
    for cls in (DiffusionMlpPolicy, DiffusionUnetPolicy):
        if cls is DiffusionUnetPolicy and horizon == 1:
            continue
        model = DPPO(cls, CountingEnv(n_actions=n_actions), policy_kwargs=dict(horizon=horizon, denoising_steps=3))
        action, _ = model.predict(np.zeros(3))
        assert action.shape == (n_actions,)
        assert model.action_space.contains(action)


def test_features_extractor_and_encoder_have_frozen_copies() -> None:
    class Halve(nn.Module):
        features_dim = 3

        def __init__(self, observation_space: spaces.Space) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, obs: th.Tensor) -> th.Tensor:
            return self.linear(obs)

    policy = make_policy(features_extractor_class=Halve, obs_encoder_arch=[8, 4])
    extractors = [policy.pi_features_extractor, policy.vf_features_extractor, policy.base_features_extractor]
    assert len({id(extractor.linear.weight) for extractor in extractors}) == 3
    trained = {id(p) for optimizer in (policy.optimizer, policy.critic_optimizer) for p in optimizer.param_groups[0]["params"]}
    assert id(policy.base_features_extractor.linear.weight) not in trained
    assert id(policy.pi_features_extractor.linear.weight) in trained
    assert policy.sample_chain(th.randn(2, 5)).actions.shape == (2, 4, 2)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(act_steps=5), "act_steps=5 must be between 1 and horizon=4"),
        (dict(act_steps=0), "act_steps=0 must be between 1 and horizon=4"),
        (dict(ft_denoising_steps=5), "ft_denoising_steps=5 must be between 1 and the 4 steps"),
        (dict(ft_denoising_steps=3, scheduler="ddim", inference_steps=2), "ft_denoising_steps=3 must be between 1 and the 2"),
        (dict(ft_denoising_steps=0), "ft_denoising_steps=0"),
        (dict(scheduler="ddim", inference_steps=3), "inference_steps=3 must divide"),
        (dict(eta=1.5), "eta=1.5"),
        (dict(min_logprob_std=0.0), "min_logprob_std=0.0 must be a positive number"),
        (dict(min_sampling_std=-0.1), "min_sampling_std=-0.1 must be a number and not negative"),
        (dict(deterministic_noise="none"), "deterministic_noise='none'"),
        (dict(horizon=0), "horizon=0"),
        (dict(net_arch=dict(pi=[16, 16]), residual=True), r"net_arch=\[16, 16\].*odd number of equal widths.*residual=False"),
        (dict(net_arch=dict(pi=[16, 8, 16]), residual=True), r"odd number of equal widths"),
        (dict(film=True, residual=True), r"net_arch=\[16\] has no residual block that film=True could modulate"),
        (dict(features_extractor_class="Vit"), "features_extractor_class='Vit' is unknown"),
        (dict(activation_fn="swish"), "activation_fn='swish' is unknown.*relu.*torch.nn.ReLU"),
        (dict(clip_sample_range="none"), r"clip_sample_range='none' must be a positive number, or one of \[None, 'auto'\]"),
        (dict(clip_sample_range=0.0), "clip_sample_range=0.0 must be a positive number"),
        (dict(use_sde=True), "use_sde"),
        (dict(clip_final_action=-1.0), "clip_final_action=-1.0 must be a positive number"),
        (dict(clip_final_action="auto"), "clip_final_action='auto' must be a positive number"),
        (dict(clip_noise_pred=-1), "clip_noise_pred=-1 must be a positive number"),
        (dict(denoising_steps=2.0), "denoising_steps=2.0 must be at least 1, a whole number"),
        (dict(denoising_steps="2"), "denoising_steps='2' must be at least 1, a whole number"),
        (dict(first_action=1.0), "first_action=1.0 must be at least 0, a whole number"),
        (dict(first_action=4), "first_action=4 must be below horizon=4"),
        (dict(time_dim="16"), "time_dim='16' must be at least 1, a whole number"),
        (dict(net_arch=dict(pi=64)), r"net_arch\['pi'\]=64 must be a list of widths"),
        (dict(net_arch=dict(pi=["64"])), r"net_arch\['pi'\]=\['64'\] must be a list of widths"),
        (dict(net_arch=[0]), r"net_arch\['pi'\]=\[0\] must be a list of widths"),
        (dict(obs_encoder_arch=16), "obs_encoder_arch=16 must be a list of widths"),
        (dict(optimizer_class="AdamW"), "optimizer_class='AdamW' must be a class of torch.optim"),
        (dict(log_std_init="0"), "log_std_init='0' must be a number"),
    ],
)
def test_errors(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(**kwargs)


def test_numbers_of_numpy_are_numbers() -> None:
    assert make_policy(horizon=np.int64(4)).sample_chain(th.zeros(1, 5)).actions.shape[1] == 4


def test_unet_errors() -> None:
    with pytest.raises(ValueError, match="time_dim=32 is a setting of DiffusionMlpPolicy"):
        make_policy(DiffusionUnetPolicy, time_dim=32)
    with pytest.raises(ValueError, match=r"net_arch\['pi'\]=\[\] must have a width for each level"):
        make_policy(DiffusionTransformerPolicy, net_arch=dict(pi=[]))
    with pytest.raises(ValueError, match=r"obs_encoder_arch=\[16\] must be an odd number of equal widths, then the last"):
        make_policy(DiffusionUnetPolicy, net="film", net_arch=dict(pi=[16, 32]), obs_encoder_arch=[16])
    with pytest.raises(ValueError, match="horizon=1 can't be halved 1 times"):
        make_policy(DiffusionUnetPolicy, horizon=1)
    with pytest.raises(ValueError, match="film=True is a setting of DiffusionMlpPolicy"):
        make_policy(DiffusionUnetPolicy, film=True)
    with pytest.raises(ValueError, match="obs_encoder_arch"):
        make_policy(DiffusionUnetPolicy, obs_encoder_arch=[8])
    with pytest.raises(ValueError, match="multiples of 8"):
        DiffusionUnetPolicy(BOX, spaces.Box(-1, 1, (2,)), lambda _: 1e-3, net_arch=dict(pi=[12, 24]))


@pytest.mark.parametrize(
    "observation_space,action_space,message",
    [
        (BOX, spaces.Discrete(3), "Discrete.*continuous actions.*PPO"),
        (BOX, spaces.Box(-np.inf, np.inf, (2,)), "infinite bounds.*RescaleAction"),
        (BOX, spaces.Box(-3e38, 3e38, (2,)), "infinite bounds"),
        (BOX, spaces.Box(-3, 3, (2,), np.int32), "floating-point"),
        (spaces.Discrete(4, start=1), spaces.Box(-1, 1, (2,)), "start at 0"),
        (spaces.Dict(a=BOX), spaces.Box(-1, 1, (2,)), "FlattenObservation"),
        (spaces.Box(0, 255, (36, 36, 3), np.uint8), spaces.Box(-1, 1, (2,)), "DiffusionCnnPolicy"),
    ],
)
def test_space_errors(observation_space: spaces.Space, action_space: spaces.Space, message: str) -> None:
    env = CountingEnv()
    env.observation_space, env.action_space = observation_space, action_space  # type: ignore[assignment]
    with pytest.raises(ValueError, match=message):
        DPPO("DiffusionMlpPolicy", env)


def test_discrete_observations() -> None:
    model = DPPO("DiffusionMlpPolicy", make_vec_env(DiscreteObsEnv, 2), n_steps=8, batch_size=16, policy_kwargs=SMALL)
    model.learn(16)
    assert model.predict(np.array([1, 2]))[0].shape == (2, 2)


class DiscreteObsEnv(CountingEnv):
    """Observes a number."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Discrete(10)  # type: ignore[assignment]

    def _obs(self) -> Any:
        return self.t
