"""A shared model, and a copy of it to damage."""

from pathlib import Path

import pytest

from tests.runs.shared_folders import FILES, make_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharing") / "model"
    make_model().learn(16).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((saved / name).read_bytes())
    return folder
