"""Conventions that every algorithm of Stable-Baselines3 keeps, in the same words for DPPO; beside PPO where that is easy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize
from torch import nn

from sb3_dppo import BC, DPPO, Demonstrations
from sb3_dppo.policies import DiffusionMlpPolicy
from tests.features.test_observations import VectorDictEnv
from tests.toy_envs import CountingEnv, WalkEnv

SMALL = dict(net_arch=dict(pi=[8], vf=[8]), denoising_steps=2)
N_ENVS, N_STEPS = 2, 8


def make_model(env: Any = None, policy: str = "DiffusionMlpPolicy", **kwargs: Any) -> DPPO:
    if env is None:
        env = make_vec_env("Pendulum-v1", N_ENVS, seed=0)
    arguments: dict[str, Any] = dict(n_steps=N_STEPS, batch_size=16, n_epochs=1, policy_kwargs=SMALL, seed=0, device="cpu")
    return DPPO(policy, env, **arguments | kwargs)


def make_ppo(env: VecEnv, **kwargs: Any) -> PPO:
    arguments: dict[str, Any] = dict(n_steps=N_STEPS, batch_size=16, n_epochs=1, seed=0, device="cpu")
    return PPO("MlpPolicy", env, **arguments | kwargs)


MAKERS = pytest.mark.parametrize("make", [make_ppo, make_model], ids=["PPO", "DPPO"])


# ---------------------------------------------------------------------- envs


class BareVecEnv(VecEnv):
    """What a VecEnv must have and no more: no attributes, no methods, no word on the last observation of an episode."""

    def __init__(self) -> None:
        space = gym.spaces.Box(-1, 1, (2,), np.float32)
        super().__init__(N_ENVS, space, space)

    def reset(self) -> np.ndarray:
        self.t = 0
        return np.zeros((N_ENVS, 2), np.float32)

    def step_async(self, actions: np.ndarray) -> None:
        self.t += 1

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs = np.full((N_ENVS, 2), 0.1 * (self.t % 3), np.float32)
        return obs, np.ones(N_ENVS, np.float32), np.full(N_ENVS, self.t % 3 == 0), [{} for _ in range(N_ENVS)]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":
            return [None] * N_ENVS
        raise NotImplementedError

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        return [False] * N_ENVS

    def close(self) -> None:
        pass


@MAKERS
def test_vec_env_with_nothing_extra(make: Callable[[Any], BaseAlgorithm], tmp_path: Path) -> None:
    model = make(BareVecEnv()).learn(3 * N_ENVS * N_STEPS)
    assert model.num_timesteps == 3 * N_ENVS * N_STEPS
    model.save(tmp_path / "model")


def test_vec_env_with_nothing_extra_is_cloned_for() -> None:
    model = make_model(BareVecEnv())
    demonstrations = Demonstrations(np.zeros((20, 2)), np.zeros((20, 2)), np.array([20]), env_id="Bare-v0")
    BC(model, demonstrations).train(1, progress_bar=False)


class ForeignWrapper(VecEnvWrapper):
    """As SuperSuit's: what it wraps is no VecEnv, but a vector env of another library."""

    def __init__(self, venv: Any) -> None:
        self.venv = venv
        VecEnv.__init__(self, N_ENVS, venv.single_observation_space, venv.single_action_space)

    def reset(self) -> Any:
        return self.venv.reset()[0]

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        obs, rewards, terminated, truncated, _ = self.venv.step(self.actions)
        return obs, rewards, terminated | truncated, [{} for _ in range(N_ENVS)]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return list(self.venv.get_attr(attr_name))  # type: ignore[arg-type]

    def seed(self, seed: int | None = None) -> list[int | None]:
        return [seed] * N_ENVS

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        return [False] * N_ENVS


@MAKERS
def test_wrappers_of_other_vector_envs(make: Callable[[Any], BaseAlgorithm]) -> None:
    make(ForeignWrapper(gym.make_vec("Pendulum-v1", N_ENVS))).learn(2 * N_ENVS * N_STEPS)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("env", [CountingEnv, WalkEnv])
def test_bounds_types_and_numbers_of_envs(env: type[gym.Env], n_envs: int) -> None:
    """Asymmetric float64 bounds among them: the env itself checks its actions."""
    check_env(env(), skip_render_check=True)
    model = make_model(make_vec_env(env, n_envs)).learn(2 * n_envs * N_STEPS)
    assert model.num_timesteps == 2 * n_envs * N_STEPS
    assert np.isfinite(evaluate_policy(model, env(), n_eval_episodes=2, warn=False)[0])


@MAKERS
def test_nothing_to_learn(make: Callable[[Any], BaseAlgorithm]) -> None:
    """What sets up a logger and the env."""
    assert make(make_vec_env("Pendulum-v1", N_ENVS)).learn(0).num_timesteps == 0


def test_weights_that_a_callback_writes_act_at_once() -> None:
    """As averages of weights do that take their place for an evaluation, unseen by autograd."""

    class Evaluate(BaseCallback):
        def _on_step(self) -> bool:
            before = [parameter.data.clone() for parameter in self.model.policy.parameters()]
            for parameter in self.model.policy.parameters():
                parameter.data.copy_(parameter.data + 0.02)
            actions.append(self.model.predict(obs, deterministic=True)[0])
            for parameter, value in zip(self.model.policy.parameters(), before, strict=True):
                parameter.data.copy_(value)
            return True

    actions: list[np.ndarray] = []
    obs = np.ones((1, 3), np.float32)
    model = make_model()
    for parameter in model.policy.parameters():
        parameter.data.add_(0.02)
    expected = model.predict(obs, deterministic=True)[0]
    for parameter in model.policy.parameters():
        parameter.data.sub_(0.02)
    model.learn(N_ENVS * N_STEPS, callback=Evaluate())
    np.testing.assert_allclose(actions, np.tile(expected, (N_STEPS, 1, 1)), atol=1e-5)


def test_identity_is_learned() -> None:
    """SB3's own test of learning, with the numbers that it has for PPO and A2C."""
    model = DPPO("DiffusionMlpPolicy", IdentityEnvBox(eps=0.5), learning_rate=1e-3, seed=0).learn(4000)
    reward, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20, warn=False)  # type: ignore[arg-type]
    assert reward > 90


def test_dict_observations() -> None:
    model = make_model(make_vec_env(VectorDictEnv, N_ENVS), "DiffusionMultiInputPolicy").learn(32)
    assert np.isfinite(evaluate_policy(model, VectorDictEnv(), n_eval_episodes=2, warn=False)[0])


def test_vec_normalize() -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", N_ENVS), norm_reward=False)
    model = make_model(env).learn(64)
    assert model.get_vec_normalize_env() is env and env.obs_rms.count > 60


def test_set_env() -> None:
    model = make_model().learn(16)
    model.set_env(make_vec_env("Pendulum-v1", N_ENVS))
    assert model.learn(16, reset_num_timesteps=False).num_timesteps == 32
    with pytest.raises(ValueError):
        model.set_env(DummyVecEnv([CountingEnv] * N_ENVS))


# ---------------------------------------------------------------------- callbacks and logs


class Spy(BaseCallback):
    """
    Keeps a copy of the locals of each env step.

    :param names: Which.
    """

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names, self.seen = names, list[dict[str, Any]]()

    def _on_step(self) -> bool:
        self.seen.append({name: self.locals[name] for name in self.names & set(self.locals)})
        return True


@MAKERS
def test_locals_of_a_callback(make: Callable[..., BaseAlgorithm]) -> None:
    env = make_vec_env("Pendulum-v1", N_ENVS)
    shapes: dict[str, tuple[int, ...]] = dict(
        values=(N_ENVS, 1),
        log_probs=(N_ENVS,),
        obs_tensor=(N_ENVS, 3),
        actions=(N_ENVS, 1),
        clipped_actions=(N_ENVS, 1),
        rewards=(N_ENVS,),
        dones=(N_ENVS,),
        new_obs=(N_ENVS, 3),
    )
    names = {*shapes, "infos", "env", "n_steps", "callback", "rollout_buffer", "n_rollout_steps"}
    spy = Spy(names)
    make(env).learn(N_ENVS * N_STEPS, callback=[spy])
    assert len(spy.seen) == N_STEPS
    for step in spy.seen:
        assert set(step) == names
        assert {name: tuple(step[name].shape) for name in shapes} == shapes
        assert len(step["infos"]) == N_ENVS and step["env"] is env
        assert (np.abs(step["clipped_actions"]) <= 2).all()
    for step, after in zip(spy.seen, spy.seen[1:], strict=False):
        np.testing.assert_allclose(after["obs_tensor"].numpy(), step["new_obs"])


def test_locals_between_plans() -> None:
    """In the middle of a chunk, values and log-probabilities are those of the decision under way."""
    spy = Spy({"values", "log_probs"})
    model = make_model(n_steps=12, batch_size=4, policy_kwargs=SMALL | dict(horizon=4))
    model.learn(N_ENVS * 12, callback=spy)
    values = th.stack([step["values"] for step in spy.seen])
    assert values.shape == (12, N_ENVS, 1)
    for i in range(0, 12, 4):
        assert th.equal(values[i], values[i + 3])
    assert not th.equal(values[0], values[4])


def test_callbacks_that_come_with_stable_baselines3(tmp_path: Path) -> None:
    evaluation = EvalCallback(
        make_vec_env("Pendulum-v1"), n_eval_episodes=1, eval_freq=8, best_model_save_path=str(tmp_path), verbose=0
    )
    make_model().learn(32, callback=[evaluation, CheckpointCallback(8, str(tmp_path))])
    assert evaluation.best_mean_reward > -np.inf
    assert (tmp_path / "best_model.zip").is_file() and (tmp_path / "rl_model_32_steps.zip").is_file()


def test_names_in_the_log() -> None:
    ours, ppos = (make(make_vec_env(CountingEnv, N_ENVS)) for make in (make_model, make_ppo))
    names = []
    for model in (ppos, ours):
        model.learn(32)
        names.append(set(model.logger.name_to_value))
    # The entropy and the std of PPO's Gaussian have no counterpart.
    assert "train/loss" in names[0] and names[0] - {"train/entropy_loss", "train/std"} <= names[1]


@MAKERS
def test_table_files_and_progress_bar(
    make: Callable[..., BaseAlgorithm], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(make_vec_env(CountingEnv, N_ENVS), verbose=1, tensorboard_log=str(tmp_path))
    model.learn(32, progress_bar=True, tb_log_name="run")
    out = capsys.readouterr().out
    assert all(word in out for word in ("Using cpu device", "rollout/", "time/", "train/", "fps", "total_timesteps", "loss"))
    assert list((tmp_path / "run_1").glob("events.out.tfevents.*"))


# ---------------------------------------------------------------------- prediction, seeds, parameters


def test_prediction() -> None:
    model = make_model()
    obs = model.observation_space.sample()
    action, _ = model.predict(obs, deterministic=True)
    assert action.shape == (1,) and model.action_space.contains(action)
    batch, _ = model.predict(np.stack([obs] * 3), deterministic=True)
    assert batch.shape == (3, 1)
    np.testing.assert_allclose(batch, np.stack([action] * 3), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], action)
    with pytest.raises(ValueError):
        model.predict(np.zeros(5, np.float32))


def test_same_seed_same_result() -> None:
    first, again, other = (make_model(seed=seed, env="Pendulum-v1").learn(16).policy.state_dict() for seed in (1, 1, 2))
    assert all(th.equal(first[name], again[name]) for name in first)
    assert not all(th.equal(first[name], other[name]) for name in first)


def test_learning_in_two_calls() -> None:
    model = make_model().learn(16)
    assert model.learn(16, reset_num_timesteps=False).num_timesteps == 32
    assert model.learn(16).num_timesteps == 16


def test_schedules_begin_anew_in_a_second_call() -> None:
    """In its first rollout, too, which is collected before anything says how far training is."""
    model = make_model(min_sampling_std="lin_0.3").learn(16)
    first = model.logger.name_to_value["train/std"]
    assert first == pytest.approx(0.3)
    model.learn(16)
    assert model.logger.name_to_value["train/std"] == first


def test_save_and_load(tmp_path: Path) -> None:
    model = make_model().learn(16)
    model.save(tmp_path / "model.zip")
    loaded = DPPO.load(tmp_path / "model.zip", env=model.env, print_system_info=True, device="cpu")
    obs = np.stack([model.observation_space.sample() for _ in range(5)])
    np.testing.assert_array_equal(
        *(m.predict(obs, deterministic=True)[0] for m in (model, loaded)), err_msg="predictions differ"
    )
    assert loaded.learn(16, reset_num_timesteps=False).num_timesteps == 32


def test_parameters() -> None:
    model, other = make_model().learn(16), make_model(seed=5)
    params = model.get_parameters()
    assert {"policy", "policy.optimizer"} <= set(params)
    other.set_parameters(params)
    for name, value in other.get_parameters()["policy"].items():
        assert th.equal(value, params["policy"][name]), name
    with pytest.raises(ValueError):
        other.set_parameters({"policy": params["policy"]})
    other.set_parameters({"policy": params["policy"]}, exact_match=False)


def test_policy_alone(tmp_path: Path) -> None:
    model = make_model().learn(16)
    model.policy.save(str(tmp_path / "policy"))
    policy = DiffusionMlpPolicy.load(str(tmp_path / "policy"), device="cpu")
    obs = model.observation_space.sample()
    np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


# ---------------------------------------------------------------------- settings that change


class Assign(BaseCallback):
    """
    Assigns attributes of the model once, at an event of the second rollout.

    :param event: Which event.
    :param values: The attributes.
    """

    def __init__(self, event: str, **values: Any) -> None:
        super().__init__()
        self.event, self.values, self.n = event, values, 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.n += 1
        self._assign("rollout_start")

    def _on_rollout_end(self) -> None:
        self._assign("rollout_end")

    def _assign(self, event: str) -> None:
        if self.n == 2 and event == self.event:
            for name, value in self.values.items():
                setattr(self.model, name, value)


def constant(value: float) -> Callable[[float], float]:
    return lambda _: value


def logged(name: str) -> str:
    """Where the log has a setting."""
    return "train/std" if name == "min_sampling_std" else f"train/{name}"


SETTINGS = pytest.mark.parametrize(
    "name", ["clip_range", "clip_range_vf", "learning_rate", "critic_learning_rate", "min_sampling_std"]
)


@pytest.mark.parametrize("form", [float, constant, FloatSchedule], ids=["number", "function", "FloatSchedule"])
@SETTINGS
def test_settings_assigned_before_learning(name: str, form: Callable[[float], Any]) -> None:
    model = make_model()
    setattr(model, name, form(0.0375))
    model.learn(16)
    assert model.logger.name_to_value[logged(name)] == pytest.approx(0.0375)


@pytest.mark.parametrize("event", ["rollout_start", "rollout_end"])
@SETTINGS
def test_settings_assigned_in_a_callback(name: str, event: str) -> None:
    model = make_model()
    model.learn(48, callback=Assign(event, **{name: 0.0375}))
    assert model.logger.name_to_value[logged(name)] == pytest.approx(0.0375)
    if name.endswith("learning_rate"):
        optimizer = model.policy.critic_optimizer if name.startswith("critic") else model.policy.optimizer
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0375)


def test_ppo_honours_the_same_assignment() -> None:
    model = make_ppo(make_vec_env("Pendulum-v1", N_ENVS))
    model.learn(48, callback=Assign("rollout_start", clip_range=FloatSchedule(0.0375)))
    assert model.logger.name_to_value["train/clip_range"] == pytest.approx(0.0375)


def test_assigned_min_sampling_std_is_that_of_the_samples() -> None:
    """With a floor far above all that the schedule gives, actions spread over their whole range."""
    model, spy = make_model(n_steps=32, min_sampling_std=1e-6), Spy({"actions"})
    model.learn(192, callback=[Assign("rollout_start", min_sampling_std=5.0), spy])
    before, after = (np.std([step["actions"] for step in steps]) for steps in (spy.seen[:32], spy.seen[64:]))
    assert before < 1 and after > 1.5


@pytest.mark.parametrize("event", ["rollout_start", "rollout_end"])
def test_assigned_ft_denoising_steps(event: str) -> None:
    model = make_model()
    model.learn(64, callback=Assign(event, ft_denoising_steps=1))
    assert model.logger.name_to_value["train/ft_denoising_steps"] == 1
    assert model.policy.base_denoiser is not model.policy.denoiser


def test_schedules_survive_a_file(tmp_path: Path) -> None:
    names = ("learning_rate", "critic_learning_rate", "clip_range", "clip_range_vf", "min_sampling_std")
    model = make_model(**{name: lambda progress: 0.1 + 0.2 * progress for name in names}).learn(16)
    assert isinstance(model.lr_schedule, FloatSchedule)
    model.save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model", env=model.env, device="cpu")
    assert isinstance(loaded.lr_schedule, FloatSchedule) and loaded.lr_schedule(0.5) == pytest.approx(0.2)
    assert all(getattr(loaded, name)(0.5) == pytest.approx(0.2) for name in names)
    loaded.learn(16)
    for name in ("clip_range", "clip_range_vf"):
        # The only update is made at the end of training.
        assert loaded.logger.name_to_value[f"train/{name}"] == pytest.approx(0.1)


# ---------------------------------------------------------------------- net_arch and optimisers


def widths(module: nn.Module) -> list[int]:
    return [layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize(
    "net_arch,pi,vf",
    [
        ([64, 64], [64, 64], [64, 64]),
        (dict(pi=[8, 4], vf=[16]), [8, 4], [16]),
        (dict(pi=[8, 8], vf=[16, 4]), [8, 8], [16, 4]),
        ([8], [8], [8]),
    ],
)
def test_net_arch(net_arch: Any, pi: list[int], vf: list[int]) -> None:
    model = make_model(policy_kwargs=dict(net_arch=net_arch, denoising_steps=2)).learn(16)
    assert widths(model.policy.critic) == [*vf, 1]
    assert widths(model.policy.denoiser)[-len(pi) - 1 :] == [*pi, 1]


def test_widths_that_can_be_residual_are() -> None:
    by_default, explicit, plain = (
        make_model(policy_kwargs=dict(net_arch=[8, 8, 8], **kwargs)).policy.state_dict()
        for kwargs in (dict(), dict(residual=True), dict(residual=False))
    )
    assert list(by_default) == list(explicit) != list(plain)


def test_net_arch_survives_a_file(tmp_path: Path) -> None:
    model = make_model(policy_kwargs=dict(net_arch=[8, 4], denoising_steps=2))
    model.save(tmp_path / "model")
    assert widths(DPPO.load(tmp_path / "model").policy.critic) == [8, 4, 1]
    model.policy.save(str(tmp_path / "policy"))
    assert widths(DiffusionMlpPolicy.load(str(tmp_path / "policy")).critic) == [8, 4, 1]


@pytest.mark.parametrize("options", [dict(foreach=True), dict(foreach=False), dict(fused=False), dict(eps=1e-5), dict()])
def test_optimizer_kwargs(options: dict[str, Any]) -> None:
    model = make_model(policy_kwargs=SMALL | dict(optimizer_kwargs=options)).learn(16)
    for optimizer in model.policy.optimizers:
        assert {name: optimizer.defaults[name] for name in options} == options
        assert optimizer.defaults["weight_decay"] == 0


def test_features_extractors_are_not_shared() -> None:
    model = make_model(policy_kwargs=SMALL | dict(share_features_extractor=False)).learn(16)
    assert model.policy.pi_features_extractor is not model.policy.vf_features_extractor


# ---------------------------------------------------------------------- advantages and order


PAIRS = ("decision_index", "denoising_index", "chain_prev", "chain_next", "old_log_prob")


@pytest.mark.parametrize("advantage", [-1.8011, -1.1, 0.3, -0.7123, 2.345])
def test_rounding_noise_is_no_advantage(advantage: float) -> None:
    """Pairs of one decision have one advantage: normalised, nothing is left of it."""
    model = make_model(make_vec_env("Pendulum-v1"), policy_kwargs=SMALL | dict(denoising_steps=10), gamma_denoising=1.0)
    model.learn(N_STEPS)
    samples = next(iter(model.rollout_buffer.get(80, "decisions")))
    pairs = samples.decision_index == samples.decision_index[0]
    assert pairs.sum() == 10
    samples = samples._replace(
        advantages=th.full_like(samples.advantages, advantage), **{name: getattr(samples, name)[pairs] for name in PAIRS}
    )
    _, metrics = model.loss(samples)
    assert abs(metrics["policy_gradient_loss"].item()) < 1e-3


def test_loss_does_not_depend_on_the_order_of_pairs() -> None:
    model = make_model(shuffle="decisions", learning_rate=0.0, policy_kwargs=SMALL | dict(denoising_steps=5))
    model.learn(N_ENVS * N_STEPS)
    samples = next(iter(model.rollout_buffer.get(40, "decisions")))
    order = th.randperm(len(samples.decision_index), generator=th.Generator().manual_seed(0))
    permuted = samples._replace(**{name: getattr(samples, name)[order] for name in PAIRS})
    loss, metrics = model.loss(samples)
    permuted_loss, permuted_metrics = model.loss(permuted)
    assert metrics["ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert permuted_metrics["ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert permuted_loss.item() == pytest.approx(loss.item(), rel=1e-4)
