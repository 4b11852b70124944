"""Threads, precision, compilation and slices of minibatches: what is faster must compute the same."""

import copy
import gc
import logging
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_dppo import DPPO
from sb3_dppo.diffusion.acceleration import MAX_GRAPHS, Compiled, CudaGraphs, precision_context, threads_for

SAMPLERS = [dict(), dict(scheduler="ddim", inference_steps=2, ft_denoising_steps=2)]


def make_model(**kwargs) -> DPPO:
    arguments = dict(
        n_steps=16,
        batch_size=32,
        ft_denoising_steps=2,
        policy_kwargs=dict(horizon=4, denoising_steps=4, net_arch=dict(pi=[32] * 3, vf=[32] * 3)),
        seed=0,
        device="cpu",
    )
    return DPPO("DiffusionMlpPolicy", "Pendulum-v1", **(arguments | kwargs))


def test_compiled_denoising_equals_denoising() -> None:
    eager, compiled = make_model(), make_model(compile=True)
    for batch_size in (1, 3, 5):
        obs, noise = th.randn(batch_size, 3), eager.policy.draw_noise(batch_size)
        expected, actual = (model.policy.sample_chain(obs, noise=noise) for model in (eager, compiled))
        for left, right in zip(expected, actual, strict=True):
            th.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    assert not compiled.policy.sampler.compiled_denoise.failed
    # New weights reach what was compiled.
    before = compiled.policy.sample_chain(obs, noise=noise).actions
    compiled.learn(32)
    eager.policy.load_state_dict(compiled.policy.state_dict())
    expected_actions = eager.policy.sample_chain(obs, noise=noise).actions
    actual_actions = compiled.policy.sample_chain(obs, noise=noise).actions
    th.testing.assert_close(actual_actions, expected_actions, rtol=1e-5, atol=1e-5)
    assert not th.allclose(before, actual_actions, atol=1e-4)


def test_without_a_compiler_denoising_runs_as_it_is(tmp_path) -> None:
    code = (
        "import sys, torch as th; from sb3_dppo import DPPO\n"
        "kwargs = dict(n_steps=16, batch_size=32, seed=0, device='cpu')\n"
        "noise, obs = th.randn(3, 2, 1, 1), th.randn(2, 3)\n"
        "models = [DPPO('DiffusionMlpPolicy', 'Pendulum-v1', compile=c, **kwargs) for c in (True, False)]\n"
        "chains = [model.policy.sample_chain(obs, noise=noise) for model in models]\n"
        "assert all(th.equal(*pair) for pair in zip(*chains))\n"
        "assert models[0].policy.sampler.compiled_denoise.failed\n"
        "models[0].learn(32)\n"
    )
    env = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_policies_share_no_compiled_code() -> None:
    # PyTorch compiles a code object for at most eight different sets of shapes and modules, and then no more.
    code = [make_model().policy.sampler.compiled_denoise._own_code().__code__ for _ in range(2)]
    assert code[0] is not code[1]
    assert code[0].co_name != code[1].co_name
    assert code[0].co_code == code[1].co_code


def test_errors_of_a_compiled_function_are_its_own() -> None:
    class Failing:
        def fail(self, x: th.Tensor) -> th.Tensor:
            raise KeyError("mine")

    compiled = Compiled(Failing().fail)
    with pytest.raises(KeyError, match="mine"):
        compiled(th.device("cpu"), th.zeros(1))
    assert not compiled.failed


def test_graphs_fall_back_where_there_is_no_gpu(caplog: pytest.LogCaptureFixture) -> None:
    if th.cuda.is_available():
        pytest.skip("has a GPU")
    graphs = CudaGraphs(lambda x, factor: factor * x)
    with caplog.at_level(logging.INFO, "sb3_dppo.diffusion.acceleration"):
        th.testing.assert_close(graphs([th.ones(2)], 3.0), th.full((2,), 3.0))
    assert graphs.failed
    assert "Not recorded as a CUDA graph" in caplog.text


class FakeGraphs(CudaGraphs):
    """Records as a GPU does: the kernels and the addresses, and no Python."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.n_recorded = 0

    def _record(self, tensors: Sequence[th.Tensor | None], *settings: Any) -> Any:
        self.n_recorded += 1
        inputs = [None if tensor is None else tensor.clone() for tensor in tensors]
        outputs, function = self.function(*inputs, *settings), self.function

        class Graph:
            def replay(self) -> None:
                outputs.copy_(function(*inputs, *settings))

        return Graph(), inputs, outputs


def test_there_are_few_graphs_and_they_are_those_that_are_used_most() -> None:
    graphs = FakeGraphs(lambda x: 2 * x)
    for round_ in range(20):
        for size in (100, *range(1, 2 * MAX_GRAPHS), 100):
            x = th.randn(size)
            th.testing.assert_close(graphs([x]), 2 * x)
        assert len(graphs._graphs) == MAX_GRAPHS, round_
    # No graph is recorded for one that pushes it out again, and the most frequent one stays.
    assert graphs.n_recorded == MAX_GRAPHS
    # A size that comes into use gets one.
    for _ in range(30):
        graphs([th.randn(77)])
    assert graphs.n_recorded == MAX_GRAPHS + 1 and len(graphs._graphs) == MAX_GRAPHS
    assert any(key[0][0] == (77,) for key in graphs._graphs) and any(key[0][0] == (100,) for key in graphs._graphs)
    graphs.clear()
    assert not graphs._graphs and not graphs._calls


def test_graphs_differ_by_settings_shapes_and_types() -> None:
    @dataclass(frozen=True)
    class Config:
        factor: float

    graphs = FakeGraphs(lambda x, config: config.factor * x)
    for factor, dtype in ((2.0, th.float32), (3.0, th.float32), (2.0, th.float64), (2.0, th.float32)):
        x = th.randn(3, dtype=dtype)
        result = graphs([x], Config(factor))
        assert result.dtype == dtype
        th.testing.assert_close(result, factor * x)
    assert graphs.n_recorded == 3


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.compiled = Compiled(self.run)
        self.graphs = FakeGraphs(self.run)

    def run(self, x: th.Tensor) -> th.Tensor:
        return self.linear(x).relu()


def test_what_was_compiled_or_recorded_keeps_no_policy_alive() -> None:
    module = Small()
    x = th.randn(2, 4)
    with th.no_grad():
        th.testing.assert_close(module.compiled(x.device, x), module.run(x))
        th.testing.assert_close(module.graphs([x]), module.run(x))
    assert not module.compiled.failed
    references = [weakref.ref(module), weakref.ref(module.linear.weight)]
    del module
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_graphs_equal_eager_denoising(sampler: dict) -> None:
    graphed, eager = make_model(device="cuda", **sampler), make_model(device="cuda", compile=False, **sampler)
    for batch_size in (1, 3, 1, 3):
        for deterministic in (False, True):
            obs, noise = th.randn(batch_size, 3, device="cuda"), eager.policy.draw_noise(batch_size)
            pairs = zip(*(m.policy.sample_chain(obs, deterministic, noise) for m in (graphed, eager)), strict=True)
            for left, right in pairs:
                th.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    assert not graphed.policy.sampler.denoise_graphs.failed
    graphed.learn(32)
    eager.policy.load_state_dict(graphed.policy.state_dict())
    th.testing.assert_close(
        graphed.policy.sample_chain(obs, noise=noise).actions, eager.policy.sample_chain(obs, noise=noise).actions
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
@pytest.mark.parametrize("compile", [True, "auto"])
def test_copies_run_their_own_networks(copied, compile: bool | str) -> None:
    policy = make_model(compile=compile).policy
    obs, noise = th.randn(2, 3), policy.draw_noise(2)
    before = policy.sample_chain(obs, noise=noise).actions
    copy_of_policy = copied(policy)
    with th.no_grad():
        for parameter in copy_of_policy.denoiser.parameters():
            parameter.zero_()
    th.testing.assert_close(policy.sample_chain(obs, noise=noise).actions, before)
    assert not th.allclose(copy_of_policy.sample_chain(obs, noise=noise).actions, before)


def test_chains_can_be_used_where_gradients_are_computed() -> None:
    policy = make_model().policy
    obs = th.randn(2, 3)
    policy.chain_log_prob(obs, policy.sample_chain(obs).chain).sum().backward()
    assert policy.denoiser.mlp[0].weight.grad is not None


def test_small_batches_on_one_thread() -> None:
    th.set_num_threads(2)
    with threads_for(40):
        assert th.get_num_threads() == 1
    with threads_for(1000):
        assert th.get_num_threads() == 2
    with pytest.raises(KeyError), threads_for(1):
        raise KeyError
    assert th.get_num_threads() == 2


def test_bfloat16_changes_log_probabilities_little() -> None:
    exact, rounded = make_model(), make_model(precision="bfloat16")
    obs = th.randn(200, 3)
    chain = exact.policy.sample_chain(obs).chain
    expected, actual = (model.policy.chain_log_prob(obs, chain) for model in (exact, rounded))
    assert actual.dtype == th.float32
    difference = (actual - expected).abs()
    assert 0 < difference.mean() < 0.02
    sampled = rounded.policy.sample_chain(obs)
    assert all(tensor.dtype == th.float32 for tensor in sampled)
    # The log-probabilities of sampling and of the update agree, so that ratios begin at 1.
    th.testing.assert_close(rounded.policy.chain_log_prob(obs, sampled.chain), sampled.log_prob, rtol=0, atol=0.2)
    assert rounded.policy.predict_values(obs).dtype == th.float32
    rounded.learn(64)
    assert all(parameter.dtype == th.float32 for parameter in rounded.policy.parameters())


def test_tf32_is_left_as_it_was() -> None:
    before = th.backends.cuda.matmul.allow_tf32
    with precision_context(th.device("cuda"), "tf32"):
        assert th.backends.cuda.matmul.allow_tf32
    assert th.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(compile="yes"), "compile='yes' is unknown"),
        (dict(precision="float16"), "precision='float16' is unknown"),
        (dict(n_accumulate=0), "n_accumulate=0 must be at least 1"),
    ],
)
def test_bad_settings(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


def test_settings_can_be_changed_on_loading(tmp_path) -> None:
    make_model(compile=True).save(tmp_path / "model")
    loaded = DPPO.load(tmp_path / "model", compile=False, precision="bfloat16", n_accumulate=2)
    assert loaded.policy.sampler.config.precision == "bfloat16"
    assert loaded.policy.sampler.config.compile is False
    assert loaded.n_accumulate == 2


def test_memory_of_a_rollout_is_linear_in_decisions() -> None:
    def tensor_bytes(n_steps: int) -> int:
        model = make_model(n_steps=n_steps)
        callback = model._setup_learn(n_steps)[1]
        model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)
        del callback
        gc.collect()
        tensors = [value for value in vars(model.rollout_buffer).values() if isinstance(value, th.Tensor)]
        assert sum(tensor.nbytes == model.rollout_buffer.chains.nbytes for tensor in tensors) == 1  # stored once
        return sum(tensor.nbytes for tensor in tensors)

    small, double, large = (tensor_bytes(n) for n in (400, 800, 1600))
    assert large - double == 2 * (double - small)
    np.testing.assert_allclose(large / small, 4, rtol=0.01)
