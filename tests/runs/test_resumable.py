"""What runs and files are made of, apart from the algorithm."""

import ast
from pathlib import Path
from typing import Any

import pytest

import sb3_dppo.runs
from sb3_dppo import DPPO, ranks
from sb3_dppo.runs.names import constructor_arguments
from tests.runs.shared_folders import make_model


class OwnDPPO(DPPO):
    """Hands on what it does not know."""

    def __init__(self, *args: Any, patience: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.patience = patience


def test_arguments_are_those_of_all_that_get_them() -> None:
    assert set(constructor_arguments(OwnDPPO)) == {*constructor_arguments(DPPO), "patience"}
    assert constructor_arguments(DPPO)["n_steps"] is constructor_arguments(OwnDPPO)["patience"] is int
    assert not {"self", "args", "kwargs", "support_multi_env"} & set(constructor_arguments(OwnDPPO))


def test_a_subclass_is_shared_with_its_arguments(tmp_path: Path) -> None:
    env = make_model().env
    OwnDPPO("DiffusionMlpPolicy", env, n_steps=8, patience=5, policy_kwargs=dict(horizon=2)).save_pretrained(tmp_path)
    loaded = OwnDPPO.from_pretrained(tmp_path)
    assert loaded.patience == 5 and loaded.n_steps == 8


def test_no_import_of_the_algorithm() -> None:
    files = list(Path(sb3_dppo.runs.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {"sb3_dppo", "sb3_dppo.dppo", "sb3_dppo.policies", "sb3_dppo.bc"} & set(names), file


def test_of_several_processes_the_first_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DPPO("DiffusionMlpPolicy", "Pendulum-v1", n_steps=16, batch_size=16)
    for rank, is_written in ((1, False), (0, True)):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        model.save(tmp_path / "model")
        assert (tmp_path / "model.zip").exists() == is_written
