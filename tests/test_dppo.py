"""The algorithm: accounting of env steps and decisions, the update, and what users get wrong."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_dppo import DPPO
from sb3_dppo.buffers import DenoisingRolloutBufferSamples
from sb3_dppo.diffusion.process import gaussian_log_prob
from tests.toy_envs import CountingEnv, NanEnv

SMALL = dict(net_arch=dict(pi=[16], vf=[16]), denoising_steps=4, horizon=4)


def make_model(env: Any = "Pendulum-v1", **kwargs: Any) -> DPPO:
    arguments: dict[str, Any] = dict(n_steps=16, batch_size=32, n_epochs=2, policy_kwargs=SMALL, seed=0, device="cpu")
    return DPPO("DiffusionMlpPolicy", env, **{**arguments, **kwargs})


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(act_steps=1),
        dict(act_steps=2, ft_denoising_steps=2),
        dict(scheduler="ddim", inference_steps=2, eta=0.5),
        dict(policy_kwargs=dict(SMALL, prediction_type="sample")),
        dict(policy_kwargs=dict(SMALL, prediction_type="v_prediction")),
        dict(policy_kwargs=dict(SMALL, residual=False, net_arch=dict(pi=[16, 8], vf=[8, 4]), layer_norm=True)),
        dict(shuffle="decisions"),
        dict(bc_coef=0.1, ft_denoising_steps=2),
        dict(max_grad_norm=0.5, clip_range_vf=0.2, advantage_quantiles=(0.05, 0.95)),
        dict(clip_range_base=0.01, gamma_denoising=0.9, critic_warmup=1),
        dict(min_sampling_std="lin_0.3", critic_learning_rate="lin_1e-3", learning_rate="1e-4"),
        dict(scale_rewards=False, normalize_advantage=False),
    ],
)
def test_learns_with_every_setting(kwargs: dict[str, Any]) -> None:
    model = make_model(make_vec_env("Pendulum-v1", 3), **kwargs)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(100)
    assert model.num_timesteps == 144
    after = model.policy.state_dict()
    learned = ("denoiser.", "critic.", "normalizer.obs_", *([] if "min_sampling_std" in kwargs else ["log_std"]))
    for name in after:
        changed = not th.equal(before[name], after[name])
        assert after[name].isfinite().all(), name
        assert changed == name.startswith(learned), name


def test_unet_learns() -> None:
    kwargs = dict(net_arch=dict(pi=[8, 16], vf=[16]), denoising_steps=4, horizon=4)
    model = DPPO("DiffusionUnetPolicy", "Pendulum-v1", n_steps=16, batch_size=32, n_epochs=2, policy_kwargs=kwargs)
    before = [p.clone() for p in model.policy.denoiser.parameters()]
    model.learn(32)
    assert any(not th.equal(a, b) for a, b in zip(before, model.policy.denoiser.parameters(), strict=True))


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("wrapper", [lambda env: env, VecNormalize, lambda env: VecFrameStack(env, 3)])
def test_vec_envs(vec_env_cls: type[DummyVecEnv], wrapper: Callable[[Any], Any]) -> None:
    env = wrapper(make_vec_env("Pendulum-v1", 2, vec_env_cls=vec_env_cls))
    model = make_model(env, scale_rewards=not isinstance(env, VecNormalize))
    model.learn(64)
    assert model.rollout_buffer.observations.shape[1:] == env.observation_space.shape
    env.close()


@pytest.mark.parametrize("act_steps", [1, 2, 4])
@pytest.mark.parametrize("truncate", [False, True])
def test_decisions_of_a_rollout(act_steps: int, truncate: bool) -> None:
    """Episodes of 7 and 5 steps in windows of ``act_steps``: what each decision saw, lasted and earned."""
    lengths = (7, 5)
    env = DummyVecEnv([lambda n=n: CountingEnv(n, truncate) for n in lengths])  # type: ignore[misc]
    model = make_model(env, act_steps=act_steps, scale_rewards=False)
    _, callback = model._setup_learn(1000)
    with th.no_grad():
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)  # type: ignore[arg-type]
    assert model.num_timesteps == 32
    buffer = model.rollout_buffer
    executed = [np.array(e.actions) for e in env.envs]  # type: ignore[attr-defined]
    for env_index, length in enumerate(lengths):
        # The obvious account: walk through the env steps.
        expected, t, decision = [], 0, None
        for step in range(16):
            if decision is None or step % act_steps == 0:
                decision = dict(obs=t, n=0, reward=0.0, end=False, first=step)
                expected.append(decision)
            t += 1
            decision["n"] += 1
            decision["reward"] += t
            if t == length:
                decision["end"], t = True, 0
                decision = None
        rows = np.flatnonzero(buffer.env_index[: buffer.size()] == env_index)
        assert len(rows) == len(expected)
        for row, decision in zip(rows, expected, strict=True):
            assert buffer.observations[row, 0] == decision["obs"]
            assert buffer.n_executed[row] == decision["n"]
            assert buffer.rewards[row] == decision["reward"]
            assert buffer.episode_end[row] == decision["end"]
            # The env was given the first actions of the chunk, scaled to its bounds.
            chunk = model.policy.normalizer.unnormalize_actions(buffer.chains[row : row + 1, -1])[0]
            played = executed[env_index][decision["first"] : decision["first"] + decision["n"]]
            np.testing.assert_allclose(chunk[: decision["n"]], played, rtol=1e-5, atol=1e-6)
            bootstrap = 0.0
            if decision["end"] and truncate:
                with th.no_grad():
                    bootstrap = model.policy.predict_values(th.tensor([[length, length, 0.1]])).item()
            assert buffer.bootstrap_values[row] == pytest.approx(bootstrap, rel=1e-5)
    assert buffer.n_executed[: buffer.size()].sum() == 32


def test_storage_grows_with_many_resets() -> None:
    model = make_model(make_vec_env(lambda: CountingEnv(1), 3), act_steps=4)
    model.learn(48)
    assert model.rollout_buffer.size() == 48
    assert (model.rollout_buffer.n_executed[:48] == 1).all()


def test_minibatches_cover_every_pair_and_decision_once() -> None:
    for shuffle in ("pairs", "decisions"):
        model = make_model(make_vec_env("Pendulum-v1", 3), ft_denoising_steps=3, batch_size=10, shuffle=shuffle)
        model.learn(48)
        buffer = model.rollout_buffer
        n_pairs = 3 * buffer.size()
        batches = list(buffer.get(10, shuffle))
        pairs = th.cat([3 * b.decision_index + b.denoising_index for b in batches])
        assert sorted(pairs.tolist()) == list(range(n_pairs))
        assert sorted(th.cat([b.value_index for b in batches]).tolist()) == list(range(buffer.size()))
        sizes = [len(b.decision_index) for b in batches]
        assert max(sizes) - min(sizes) <= (1 if shuffle == "pairs" else 3)
        for b in batches:
            assert (b.chain_prev == buffer.chains[b.decision_index, b.denoising_index]).all()
            assert (b.chain_next == buffer.chains[b.decision_index, b.denoising_index + 1]).all()
            if shuffle == "decisions":
                assert (b.denoising_index.view(-1, 3) == th.arange(3)).all()


def test_loss_is_the_same_for_both_orders_and_starts_at_ratio_one() -> None:
    model = make_model(make_vec_env("Pendulum-v1", 2), n_epochs=1, learning_rate=0.0, ft_denoising_steps=2)
    model.learn(32)
    samples = next(model.rollout_buffer.get(None, "decisions"))
    loss, metrics = model.loss(samples)
    model.shuffle = "decisions"
    th.testing.assert_close(model.loss(samples)[0], loss)
    th.testing.assert_close(metrics["ratio"], th.tensor(1.0), rtol=1e-4, atol=1e-4)
    assert metrics["approx_kl"] < 1e-6 and metrics["clip_fraction"] == 0
    assert set(metrics) == {
        "policy_gradient_loss",
        "value_loss",
        "approx_kl",
        "clip_fraction",
        "ratio",
        "bc_loss",
        "base_kl",
        "eta",
        "by_denoising_step",
    }


def test_log_probs_are_averaged_over_executed_actions_only() -> None:
    model = make_model(make_vec_env("Pendulum-v1", 1), learning_rate=0.0, normalize_observations=False)
    model.learn(16)
    samples = next(model.rollout_buffer.get(None))
    n_executed = th.ones_like(samples.n_executed)
    spoiled = samples.chain_next.clone()
    spoiled[:, 1:] += 5.0  # actions that were not executed
    policy, index = model.policy, samples.denoising_index
    mean = policy.sampler.step_mean(
        policy.denoiser, samples.observations[samples.decision_index], samples.chain_prev, index, 1.0
    )
    log_prob = gaussian_log_prob(samples.chain_next, mean, policy.sampler.step_std(samples.observations, index, 1.0))
    old = log_prob.detach().clamp(-5, 2)[:, 0].mean(-1)
    loss_a = model.loss(samples._replace(n_executed=n_executed, old_log_prob=old))
    loss_b = model.loss(samples._replace(n_executed=n_executed, old_log_prob=old, chain_next=spoiled))
    th.testing.assert_close(loss_a[0], loss_b[0])
    th.testing.assert_close(loss_a[1]["ratio"], th.tensor(1.0))


def test_one_pair_is_not_normalised_and_one_step_has_a_clip_range() -> None:
    model = make_model(make_vec_env("Pendulum-v1", 1), ft_denoising_steps=1, clip_range_base=0.01, clip_range=0.2)
    model.learn(16)
    samples: DenoisingRolloutBufferSamples = next(model.rollout_buffer.get(1))
    assert len(samples.decision_index) == 1
    loss, metrics = model.loss(samples)
    assert loss.isfinite() and all(value.isfinite().all() for value in metrics.values())
    assert model._loss_settings().clip_ranges.tolist() == pytest.approx([0.2])


def test_more_minibatches_than_decisions() -> None:
    model = make_model(batch_size=1, normalize_advantage=False).learn(16)
    assert model._n_updates == 2 * 16
    assert all(value.isfinite().all() for value in model.policy.state_dict().values())
    assert all(np.isfinite(value) for name, value in model.logger.name_to_value.items() if name.startswith("train/"))


def test_target_kl_stops_before_the_step() -> None:
    stopped = make_model(target_kl=1e-12, learning_rate=1e-2).learn(16)
    # After the first step the policy has changed, and the second is not made.
    assert stopped._n_updates == 1


def test_critic_warmup_trains_the_critic_only() -> None:
    model = make_model(critic_warmup=2)
    actor = [p.clone() for p in model.policy.denoiser.parameters()]
    critic = [p.clone() for p in model.policy.critic.parameters()]
    model.learn(32)
    assert all(th.equal(a, b) for a, b in zip(actor, model.policy.denoiser.parameters(), strict=True))
    assert any(not th.equal(a, b) for a, b in zip(critic, model.policy.critic.parameters(), strict=True))
    model.learn(16, reset_num_timesteps=False)
    assert any(not th.equal(a, b) for a, b in zip(actor, model.policy.denoiser.parameters(), strict=True))


def test_schedules_follow_progress() -> None:
    model = make_model(min_sampling_std="lin_0.4", learning_rate=lambda p: 1e-3 * p, clip_range=lambda p: 0.1 * p)
    model.learn(32)
    # The second rollout is made when half is left, its update when nothing is.
    assert model.policy.sampler.config.min_sampling_std == pytest.approx(0.2)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_callbacks_and_early_stop(tmp_path: Path) -> None:
    steps: list[int] = []

    class Record(BaseCallback):
        def _on_step(self) -> bool:
            steps.append(self.num_timesteps)
            assert len(self.locals["rewards"]) == len(self.locals["infos"]) == 2
            return True

    env = make_vec_env(lambda: CountingEnv(5), 2)
    evaluation = EvalCallback(make_vec_env(lambda: CountingEnv(5), 1), eval_freq=10, log_path=str(tmp_path), verbose=0)
    checkpoints = CheckpointCallback(10, str(tmp_path))
    model = make_model(env).learn(60, callback=[Record(), evaluation, checkpoints], progress_bar=True)
    assert steps == list(range(2, 66, 2))
    assert evaluation.last_mean_reward == 15
    assert (tmp_path / "rl_model_20_steps.zip").is_file()
    assert len(model.ep_info_buffer) == 12  # type: ignore[arg-type]
    model = make_model(env).learn(10_000, callback=StopTrainingOnMaxEpisodes(3))
    assert model.num_timesteps < 100
    # It stopped where an episode ended, and goes on where the envs are.
    model.learn(2, reset_num_timesteps=False)
    assert (model.rollout_buffer.observations[:2, 0] == 0).all()


def test_tensorboard_and_logger_names(tmp_path: Path) -> None:
    model = make_model(tensorboard_log=str(tmp_path))
    model.learn(32)
    assert (tmp_path / "DPPO_1").is_dir()
    names = set(model.logger.name_to_value)
    expected = {
        "loss",
        "policy_gradient_loss",
        "value_loss",
        "approx_kl",
        "clip_fraction",
        "explained_variance",
        "learning_rate",
        "advantage_std",
        "actor_grad_norm",
        "critic_grad_norm",
    }
    assert {f"train/{name}" for name in expected} <= names
    assert "denoising/clip_fraction_00" in names
    # What is not computed is not logged.
    assert not {"train/base_kl", "train/bc_loss"} & names
    model.kl_coef = 0.1
    assert "train/base_kl" in model.learn(32).logger.name_to_value


def test_evaluation_does_not_change_training() -> None:
    def run(freq: int) -> dict[str, th.Tensor]:
        callback = EvalCallback(make_vec_env("Pendulum-v1", 1, seed=9), eval_freq=freq, verbose=0, n_eval_episodes=1)
        return make_model(make_vec_env("Pendulum-v1", 2, seed=0)).learn(64, callback=callback).policy.state_dict()

    often, never = run(5), run(10_000)
    assert all(th.equal(often[name], never[name]) for name in often)


def test_vec_normalize_warnings() -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 1))
    with pytest.warns(UserWarning, match="scaled twice"):
        make_model(env).learn(16)
    env = VecNormalize(make_vec_env("Pendulum-v1", 1), norm_reward=False)
    model = make_model(env)
    model.policy.normalizer.set_ranges(np.zeros(3), np.ones(3), np.zeros(1), np.ones(1))
    with pytest.warns(UserWarning, match=r"VecNormalize\(norm_obs=False\)"):
        model.learn(16)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(n_steps=10), "n_steps=10 must be a multiple of act_steps=4.*use 8"),
        (dict(n_steps=2), "n_steps=2 must be a multiple of act_steps=4.*use 4"),
        (dict(act_steps=5), "act_steps=5 must be between 1 and horizon=4"),
        (dict(ft_denoising_steps=5), "ft_denoising_steps=5"),
        (dict(scheduler="ddim", inference_steps=3), "inference_steps=3 must divide"),
        (dict(shuffle="rows"), "shuffle='rows'"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(n_epochs=0), "n_epochs=0"),
        (dict(gamma_denoising=0.0), "gamma_denoising=0.0"),
        (dict(noise_clip=None), "noise_clip=None"),
        (dict(critic_learning_rate=None), "critic_learning_rate=None is not a schedule"),
        (dict(policy_kwargs=dict(act_steps=2)), r"policy_kwargs\['act_steps'\].*argument of DPPO"),
        (dict(policy_kwargs=dict(net_arch=dict(actor=[16]))), r"net_arch=.*must be a list of widths"),
        (dict(policy_kwargs=dict(time_dim=3)), "time_dim=3 must be even"),
        (dict(advantage_quantiles=(0.9, 0.1)), "advantage_quantiles"),
        (dict(critic_learning_rate="linear"), "critic_learning_rate='linear' is not a schedule"),
        (dict(min_sampling_std="lin_x"), "min_sampling_std='lin_x' is not a schedule"),
    ],
)
def test_errors(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


def test_large_batch_warns_and_means_one() -> None:
    with pytest.warns(UserWarning, match="batch_size=1000 is more than the 16 pairs.*one minibatch"):
        model = make_model(batch_size=1000).learn(16)
    assert len(list(model.rollout_buffer.get(1000))) == 1


def test_untrained_base_denoiser_warns() -> None:
    with pytest.warns(UserWarning, match="ft_denoising_steps=2: the first 2 denoising steps.*never trained"):
        make_model(ft_denoising_steps=2).learn(16)


@pytest.mark.parametrize("name", ["kl_coef", "bc_coef"])
def test_regularising_towards_random_weights_warns(name: str) -> None:
    model = make_model(batch_size=16, **{name: 0.1})
    with pytest.warns(UserWarning, match=f"{name}=0.1 holds the policy to its base policy, which was never trained"):
        model.learn(16)
    model.pretrained_on_demonstrations = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.learn(16)


def test_weight_decay_stays_off() -> None:
    model = make_model(policy_kwargs=dict(SMALL, optimizer_kwargs=dict(betas=(0.9, 0.99))))
    assert model.policy.optimizer.param_groups[0]["weight_decay"] == 0


def test_other_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="not a diffusion policy"):
        DPPO(PPO.policy_aliases["MlpPolicy"], "Pendulum-v1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MlpPolicy"):
        DPPO("MlpPolicy", "Pendulum-v1")


def test_nan_stops_with_env_and_step_and_leaves_checkpoints(tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: CountingEnv(100), lambda: NanEnv(20)])
    model = make_model(env)
    checkpoints = CheckpointCallback(4, str(tmp_path))
    with pytest.raises(ValueError, match=r"observation of env 1 is NaN or infinite after env step 20"):
        model.learn(1000, callback=checkpoints)
    saved = sorted(tmp_path.glob("*.zip"))
    assert saved
    for path in saved:
        assert all(value.isfinite().all() for value in DPPO.load(path).policy.state_dict().values())


def test_wrappers_of_gymnasium() -> None:
    env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-1), np.float32(1))
    make_model(gym.wrappers.FlattenObservation(env)).learn(16)


def test_kl_to_the_base_policy_in_closed_form() -> None:
    model = make_model(kl_coef=0.5, ft_denoising_steps=2, learning_rate=1e-2)
    model.pretrained_on_demonstrations = True
    model.learn(16)
    samples = next(model.rollout_buffer.get(None))
    loss, metrics = model.loss(samples)
    policy, index = model.policy, samples.denoising_index
    obs = samples.observations[samples.decision_index]
    means = [
        policy.sampler.step_mean(denoiser, obs, samples.chain_prev, index, 1.0)
        for denoiser in (policy.denoiser, policy.base_denoiser)
    ]
    std = policy.sampler.step_std(obs, index, 1.0).expand_as(means[0])
    ours, base = (th.distributions.Normal(mean, std) for mean in means)
    expected = th.distributions.kl_divergence(ours, base)
    executed = th.arange(policy.horizon) < samples.n_executed[samples.decision_index][:, None]
    expected = ((expected.mean(-1) * executed).sum(-1) / executed.sum(-1)).mean()
    assert expected > 0
    th.testing.assert_close(metrics["base_kl"], expected.detach(), rtol=1e-4, atol=1e-8)
    model.kl_coef = 0.0
    th.testing.assert_close(loss - model.loss(samples)[0], 0.5 * expected, rtol=1e-3, atol=1e-7)


def test_a_large_kl_coef_keeps_the_policy_near_its_base() -> None:
    def distance(kl_coef: float) -> float:
        model = make_model(kl_coef=kl_coef, learning_rate=3e-3, n_epochs=10)
        model.learn(64)
        obs, noise = th.randn(50, 3), model.policy.draw_noise(50)
        ours = model.policy.sample_chain(obs, noise=noise).actions
        base = model.policy.sample_chain(obs, noise=noise, use_base=True).actions
        return float((ours - base).abs().mean())

    assert distance(100.0) < 0.5 * distance(0.0)


def test_annealing_the_number_of_fine_tuned_steps(tmp_path: Path) -> None:
    model = make_model(ft_denoising_anneal=(2, 1), learning_rate=1e-2)
    steps: list[int] = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            steps.append(self.model.policy.sampler.ft_denoising_steps)

    K = model.policy.sampler.ft_denoising_steps
    model.learn(16 * 5, callback=Watch())
    assert steps == [K, K, K - 1, K - 1, K - 2]
    assert model.rollout_buffer.chains.shape[1] == K - 2 + 1
    # The base is what had been learned when the last step was given up, and learning went on.
    pairs = list(zip(model.policy.denoiser.parameters(), model.policy.base_denoiser.parameters(), strict=True))
    assert any(not th.equal(left, right) for left, right in pairs)
    before = [parameter.clone() for parameter in model.policy.denoiser.parameters()]
    model.learn(16, reset_num_timesteps=False)
    assert any(not th.equal(*pair) for pair in zip(before, model.policy.denoiser.parameters(), strict=True))
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model", env=model.get_env())
    assert loaded.policy.sampler.ft_denoising_steps == model.policy.sampler.ft_denoising_steps
    loaded.learn(16 * 20, reset_num_timesteps=False)
    assert loaded.policy.sampler.ft_denoising_steps == 1


def test_annealing_does_not_change_what_the_policy_does() -> None:
    model = make_model(learning_rate=1e-2)
    model.learn(32)
    obs, noise = th.randn(5, 3), model.policy.draw_noise(5)
    before = model.policy.sample_chain(obs, noise=noise).actions
    model._anneal(1)
    th.testing.assert_close(model.policy.sample_chain(obs, noise=noise).actions, before, rtol=1e-5, atol=1e-5)


def test_learning_rates_cool_down_at_the_end_of_each_run(tmp_path: Path) -> None:
    def rates_of(model: DPPO, total_timesteps: int, **kwargs: Any) -> list[float]:
        rates: list[float] = []

        class Note(BaseCallback):
            def _on_step(self) -> bool:
                if self.num_timesteps == 8 * 16 + 5:
                    self.model.save(tmp_path / "ninth_rollout")
                return True

            def _on_rollout_start(self) -> None:
                rates.append(self.model.policy.optimizer.param_groups[0]["lr"])  # of the update before

        model.learn(total_timesteps, callback=Note(), **kwargs)
        return [*rates[1:], model.policy.optimizer.param_groups[0]["lr"]]

    def fresh() -> DPPO:
        return make_model(make_vec_env("Pendulum-v1"), learning_rate=0.01, n_steps=16, n_epochs=1)

    model = fresh()
    whole = rates_of(model, 160)
    np.testing.assert_allclose(whole, [0.01] * 7 + [0.009, 0.006, 0.003], rtol=1e-6)
    # A policy that learns little more can't follow statistics that change.
    assert model.policy.normalizer.obs_count == 7 * 16 / model.policy.sampler.act_steps
    # Another call is another run, as long as it is itself.
    np.testing.assert_allclose(rates_of(model, 48, reset_num_timesteps=False), [0.01] * 3, rtol=1e-6)
    np.testing.assert_allclose(rates_of(fresh(), 16), [0.01], rtol=1e-6)
    # One that was interrupted goes on.
    loaded = DPPO.load(tmp_path / "ninth_rollout", env=make_vec_env("Pendulum-v1"))
    rates = rates_of(loaded, 160 - loaded.num_timesteps, reset_num_timesteps=False)
    assert rates == whole[8:]


@pytest.mark.parametrize(
    "lr_decay,expected",
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 2 / 3, 1 / 3]), ("cosine", [0.5, 1, 0.75, 0.25])],
)
def test_learning_rates_warm_up_and_decay(lr_decay: str, expected: list[float]) -> None:
    model = make_model(lr_decay=lr_decay, lr_warmup=0.25, learning_rate=0.1, critic_learning_rate=0.2)
    factors = []
    for done in (0.125, 0.25, 0.5, 0.75):
        model._current_progress_remaining = 1 - done
        factors.append([rate / base for rate, base in zip(model._learning_rates().values(), (0.1, 0.2, 1e-3), strict=True)])
    np.testing.assert_allclose(factors, np.transpose([expected] * 3), atol=1e-6)
    model.learn(16)  # 16 of 16 steps: the end
    rates = [group["lr"] for o in (model.policy.optimizer, model.policy.critic_optimizer) for group in o.param_groups]
    np.testing.assert_allclose(rates, [0.1, 0.2] if lr_decay == "constant" else [0, 0], atol=1e-9)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(lr_decay="cos"), "lr_decay='cos' is unknown"),
        (dict(lr_warmup=1.0), "lr_warmup=1.0 must be"),
        (dict(ft_denoising_anneal=(0, 1)), "ft_denoising_anneal=.0, 1. must be two positive"),
        (dict(shuffle="rows"), "shuffle='rows' is unknown"),
    ],
)
def test_bad_schedules_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)
