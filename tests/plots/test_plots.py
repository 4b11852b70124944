"""Pictures of runs: what is in them, and what is said where there is nothing to show."""

import shutil
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from matplotlib.figure import Figure
from stable_baselines3.common.logger import configure

from sb3_dppo import DPPO
from sb3_dppo.plots.__main__ import main
from sb3_dppo.plots.chains import iterates, observation_of, plot_chains
from sb3_dppo.plots.curves import Curve, bootstrap_interval, interquartile_means, plot_curves, read_curves, spread
from sb3_dppo.plots.updates import plot_updates, read_scalars


def lines(figure: Figure, panel: int) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[panel].get_lines()}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plots", *arguments])
    main()


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Two algorithms with two runs each, as RL Zoo leaves them."""
    for algo, offset in dict(dppo=100.0, ppo=0.0).items():
        for number in (1, 2):
            folder = tmp_path / algo / f"Some-Env-v0_{number}"
            folder.mkdir(parents=True)
            results = np.array([[0.0, 2.0], [10.0, 12.0]]) + offset + number
            np.savez(folder / "evaluations.npz", timesteps=[1000, 2000], results=results)
    return tmp_path


def test_curves(logs: Path) -> None:
    curves = read_curves([logs / "dppo", logs / "ppo" / "Some-Env-v0_1", logs / "ppo" / "Some-Env-v0_2"])
    assert {key: len(runs) for key, runs in curves.items()} == {("Some-Env-v0", "dppo"): 2, ("Some-Env-v0", "ppo"): 2}
    # A run that is named twice counts once; other runs of the same algorithm are others.
    assert len(read_curves([logs, logs / "dppo"])["Some-Env-v0", "dppo"]) == 2
    shutil.copytree(logs / "dppo", logs / "other" / "dppo")
    paths = {str((logs / "dppo").resolve()), str((logs / "other" / "dppo").resolve())}
    assert {label for _, label in read_curves([logs / "dppo", logs / "other"])} == paths
    figure = plot_curves(curves)
    drawn = lines(figure, 0)
    np.testing.assert_allclose(drawn["dppo (2 runs)"], [102.5, 112.5])
    np.testing.assert_allclose(drawn["ppo (2 runs)"], [2.5, 12.5])
    assert figure.axes[0].get_title() == "Some-Env-v0"


def test_runs_with_other_evaluations_are_interpolated_and_end_with_the_shortest() -> None:
    runs = [Curve(np.array([0, 10, 20]), np.array([0.0, 1.0, 2.0])), Curve(np.array([0, 16]), np.array([2.0, 3.6]))]
    timesteps, mean, std = spread(runs)
    np.testing.assert_allclose(timesteps, [0, 10])
    np.testing.assert_allclose(mean, [1.0, 2.0])
    np.testing.assert_allclose(std, np.sqrt([2.0, 2.0]))
    np.testing.assert_allclose(spread(runs[:1])[2], 0.0)


def test_runs_with_uuids(logs: Path) -> None:
    for number, folder in enumerate(sorted((logs / "dppo").iterdir())):
        folder.rename(folder.with_name(f"{folder.name}_0f8fad5b-d9cb-469f-a165-70867728950{number}"))
    assert {key: len(runs) for key, runs in read_curves([logs]).items()}["Some-Env-v0", "dppo"] == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 the beginning"])
def test_a_file_that_is_being_written(logs: Path, content: bytes) -> None:
    (logs / "ppo" / "Some-Env-v0_1" / "evaluations.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"Some-Env-v0_1/evaluations.npz is damaged, or is just being written"):
        read_curves([logs])


def test_interquartile_means(logs: Path) -> None:
    pytest.importorskip("rliable.metrics")
    mean, low, high = interquartile_means(read_curves([logs / "dppo"]))["Some-Env-v0", "dppo"]
    assert mean == pytest.approx(112.5) and low == pytest.approx(112) and high == pytest.approx(113)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its logs and its agent."""
    folder = tmp_path_factory.mktemp("run")
    kwargs = dict(horizon=2, denoising_steps=3, net_arch=[16])
    model = DPPO("DiffusionMlpPolicy", "Reacher-v5", n_steps=32, policy_kwargs=kwargs, seed=0)
    model.set_logger(configure(str(folder / "logs"), ["csv", "tensorboard"]))
    model.learn(96)
    model.save(folder / "agent")
    return folder


def test_updates_from_either_file(trained: Path, tmp_path: Path) -> None:
    table = read_scalars(trained / "logs")
    (tmp_path / "tb").mkdir()
    for file in (trained / "logs").glob("events*"):
        (tmp_path / "tb" / file.name).write_bytes(file.read_bytes())
    events = read_scalars(tmp_path)
    for name in ("denoising/clip_fraction_02", "train/explained_variance"):
        np.testing.assert_allclose(events[name][1], table[name][1], rtol=1e-5)
        assert len(events[name][0]) == len(table[name][0]) > 0
    figure = plot_updates(table)
    assert len(figure.axes) == 6
    drawn = lines(figure, 1)
    np.testing.assert_allclose(drawn["noisiest step"], table["denoising/clip_fraction_00"][1])
    np.testing.assert_allclose(drawn["last step"], table["denoising/clip_fraction_02"][1])


def test_chains(trained: Path) -> None:
    """They are the policy's, from its initial noise to its actions."""
    model = DPPO.load(trained / "agent", device="cpu")
    obs = observation_of(gym.make("Reacher-v5"), model, n_steps=3, seed=1)
    values = iterates(model, obs, n_chunks=5, seed=2)
    assert values.shape == (4, 5, 2)
    np.testing.assert_array_equal(values, iterates(model, obs, n_chunks=5, seed=2))
    assert not np.allclose(values[0], iterates(model, obs, n_chunks=5, seed=3)[0])
    assert np.abs(values[-1]).max() < np.abs(values[0]).max()  # an untrained policy acts around the centre
    # Of chains of different length, the last iterates that both have.
    figure = plot_chains({"one": values, "two": values[1:]}, (0, 1))
    for axes in figure.axes[:2]:
        points = axes.collections[0]
        offsets, colors = np.asarray(points.get_offsets()), np.asarray(points.get_array())
        np.testing.assert_allclose(offsets[:5], values[1])
        np.testing.assert_allclose(offsets[-5:], values[-1])
        assert points.get_clim() == (0, 2) and colors[0] == 0 and colors[-1] == 2


def test_commands(trained: Path, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(logs)
    command(monkeypatch, "curves", "dppo", "ppo")
    command(monkeypatch, "updates", str(trained / "logs"), "-o", "a/updates.svg")
    agent = str(trained / "agent")
    command(monkeypatch, "chains", agent, "--before", agent, "--env", "Reacher-v5", "--chunks", "10", "-o", "chains.png")
    assert all(Path(name).stat().st_size > 1000 for name in ("curves.png", "a/updates.svg", "chains.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["curves", "."], "no evaluations.npz in '.'"),
        (["updates", "."], "there is no run that was logged"),
        (["updates", ".", "-o", "a.txt"], "output='a.txt' must end in .png"),
        (["chains", "nothing.zip", "--env", "Reacher-v5"], "nothing.zip"),
        (["chains", "{agent}", "--env", "Reacher-v5", "--dims", "0", "2"], "must be two of the 2 dimensions"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command(monkeypatch, *(argument.format(agent=trained / "agent") for argument in arguments))
    assert message in capsys.readouterr().err


def test_the_bootstrap_draws_seeds_within_each_task() -> None:
    # Seeds of one task differ by 1 and tasks by 100: the mean's interval knows nothing of the latter.
    values = np.array([[0.0, 100.0], [1.0, 101.0]])
    np.testing.assert_array_equal(bootstrap_interval(np.mean, values), [50.0, 51.0])
    values = np.random.default_rng(1).normal(size=(100, 1))
    low, high = bootstrap_interval(np.mean, values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.1)
