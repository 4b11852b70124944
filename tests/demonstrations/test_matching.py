"""Demonstrations beside the spaces of an env."""

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from sb3_dppo import BC, Demonstrations
from tests.demonstrations.files import (
    ACTIONS,
    IMAGES,
    LENGTHS,
    RGB,
    STATE,
    STATES,
    VIT,
    N,
    PictureEnv,
    image_space,
    make_image_model,
)


@pytest.mark.parametrize(
    ("space", "observations", "message"),
    [
        (RGB, dict(rgb=IMAGES, b=STATES), r"a Dict of \['b', 'rgb'\], but .* a single array: choose.*\['NAME'\]"),
        (dict(rgb=RGB), IMAGES, r"a single array, but .* a Dict of \['rgb'\], so that \['rgb'\] are missing"),
        (
            dict(rgb=RGB, state=STATE),
            dict(images=IMAGES, state=STATES),
            r"\['rgb'\] are missing: .* \{'rgb': NAME, 'state': NAME\}",
        ),
        (dict(rgb=image_space(24, 24, 3)), dict(rgb=IMAGES), r"\['rgb'\] of shape \(16, 16, 3\).*\(3, 24, 24\).*ResizeObs"),
        (dict(rgb=RGB), dict(rgb=IMAGES / 255), r"\['rgb'\] that are numbers \(float64\).* images \(uint8, 0 to 255\)"),
        (
            dict(rgb=spaces.Box(0, 1, (16, 16, 3))),
            dict(rgb=IMAGES),
            r"\['rgb'\] that are images \(uint8\).* numbers \(float32\)",
        ),
        (dict(state=spaces.Box(-9, 9, (3,))), dict(state=STATES), r"\['state'\] of shape \(2,\), but .* \(3,\), 1 frame"),
        (dict(kind=spaces.Discrete(3)), dict(kind=STATES), r"\['kind'\] of shape \(2,\), but .*Discrete\(3\)"),
        (dict(kind=spaces.Discrete(3)), dict(kind=STATES[:, :1]), r"\['kind'\] from -.* Discrete\(3\)"),
        (dict(kind=spaces.MultiBinary(2)), dict(kind=np.full((N, 2), 2.0)), r"from 2.0 to 2.0, .*MultiBinary\(2\)"),
    ],
)
def test_observations_of_another_env(space: Any, observations: Any, message: str) -> None:
    env = PictureEnv(spaces.Dict(space) if isinstance(space, dict) else space)
    kwargs = VIT if isinstance(space, spaces.Box) or space.get("rgb", STATE).dtype == np.uint8 else {}
    model = make_image_model(env, "DiffusionMultiInputPolicy" if isinstance(space, dict) else "DiffusionCnnPolicy", **kwargs)
    with pytest.raises(ValueError, match=message):
        BC(model, Demonstrations(observations, ACTIONS, LENGTHS))
