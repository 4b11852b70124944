"""What is logged about updates."""

import numpy as np
import pytest
import torch as th

from tests.test_losses import rolled_out


def test_denoising_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Statistics of each step are those of its own pairs, for files only, and add up to those of all."""
    model = rolled_out(batch_size=1000, verbose=1, ft_denoising_steps=3, min_sampling_std=0.05, kl_coef=0.0)
    with th.no_grad():
        for parameter in model.policy.denoiser.parameters():
            parameter += 0.1 * th.randn_like(parameter)  # away from where all ratios are 1
    samples = next(model.rollout_buffer.get(None))
    _, metrics = model.loss(samples)
    kl, clipped, std, n_pairs = metrics["by_denoising_step"]
    assert n_pairs.tolist() == [len(samples.denoising_index) / 3] * 3
    assert (kl.sum() / n_pairs.sum()).item() == pytest.approx(metrics["approx_kl"].item(), rel=1e-4)
    assert (clipped.sum() / n_pairs.sum()).item() == pytest.approx(metrics["clip_fraction"].item(), rel=1e-4)
    sigmas = model.policy.process.sigmas()[1:].clamp(min=0.05)
    np.testing.assert_allclose(std / n_pairs, sigmas, rtol=1e-4)
    for index in range(3):
        of_step = samples.denoising_index == index
        part = samples._replace(
            **{
                name: getattr(samples, name)[of_step]
                for name in ("decision_index", "denoising_index", "chain_prev", "chain_next", "old_log_prob")
            }
        )
        assert model.loss(part)[1]["approx_kl"].item() == pytest.approx((kl[index] / n_pairs[index]).item(), rel=1e-4)

    model.train()
    logged = model.logger.name_to_value
    np.testing.assert_allclose([logged[f"denoising/std_{index:02d}"] for index in (1, 2, 3)], sigmas, rtol=1e-4)
    assert logged["train/advantage_std"] == pytest.approx(float(model.rollout_buffer.advantages.std(correction=0)), rel=1e-4)
    model.logger.dump()
    assert "denoising/" not in capsys.readouterr().out


def test_a_critic_that_warms_up_has_no_denoising_steps() -> None:
    names = rolled_out(critic_warmup=5).logger.name_to_value
    assert not [name for name in names if name.startswith("denoising/")]
    assert "train/critic_grad_norm" in names and "train/actor_grad_norm" not in names


def test_a_std_of_the_state_is_not_known_while_the_critic_warms_up() -> None:
    names = rolled_out(critic_warmup=5, learn_std="state", min_sampling_std=0.1).logger.name_to_value
    assert "train/std" not in names and "train/value_loss" in names


def test_a_step_has_one_name_however_many_are_fine_tuned() -> None:
    model = rolled_out(ft_denoising_steps=3, ft_denoising_anneal=(1, 1))
    first = {name for name in model.logger.name_to_value if name.startswith("denoising/std")}
    model.logger.name_to_value.clear()
    model.learn(32)
    second = {name for name in model.logger.name_to_value if name.startswith("denoising/std")}
    assert first == {f"denoising/std_{step:02d}" for step in (1, 2, 3)}
    assert second == {f"denoising/std_{step:02d}" for step in (2, 3)}
