"""The vision transformer for pixels, and the augmentation of images."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_dppo.features import EXTRACTORS, VitExtractor
from sb3_dppo.features.extractors import shift_at_random

IMAGE = spaces.Box(0, 255, (3, 16, 16), np.uint8)
SMALL: dict[str, Any] = dict(width=16, spatial_dim=8)
SPACE = spaces.Dict({"cam.0": IMAGE, "cam.1": IMAGE, "q": spaces.Box(-1, 1, (2,))})


def observations(n: int = 4) -> dict[str, th.Tensor]:
    return {"cam.0": th.rand(n, 3, 16, 16), "cam.1": th.rand(n, 3, 16, 16), "q": th.rand(n, 2)}


def test_random_shift() -> None:
    images = th.arange(64.0).view(1, 1, 8, 8).repeat(300, 3, 1, 1)
    shifted = shift_at_random(images, 2)
    assert shifted.shape == images.shape
    assert len({tuple(image.flatten().tolist()) for image in shifted}) == 25
    assert any(th.equal(image, images[0]) for image in shifted)
    padded = th.nn.functional.pad(images[:1], (2, 2, 2, 2), mode="replicate")[0]
    windows = {tuple(padded[:, i : i + 8, j : j + 8].flatten().tolist()) for i in range(5) for j in range(5)}
    assert {tuple(image.flatten().tolist()) for image in shifted} == windows


def test_augmentation_is_a_step_of_its_own() -> None:
    extractor, base = VitExtractor(SPACE, random_shift=4, **SMALL), VitExtractor(SPACE, random_shift=4, **SMALL)
    base.load_state_dict(extractor.state_dict())
    obs = observations()
    # The same observations give the same features, in training, too.
    assert extractor.train().training and not base.eval().training
    th.testing.assert_close(extractor(obs), extractor(obs), rtol=0, atol=0)
    before = {key: value.clone() for key, value in obs.items()}
    augmented = extractor.augment(obs)
    assert augmented.keys() == obs.keys()
    assert all(th.equal(obs[key], before[key]) for key in obs)
    assert th.equal(augmented["q"], obs["q"])
    assert all(augmented[key].shape == obs[key].shape and not th.equal(augmented[key], obs[key]) for key in ("cam.0", "cam.1"))
    # Two networks see the same.
    th.testing.assert_close(extractor(augmented), base(augmented))
    assert not th.allclose(extractor(augmented), extractor(obs), atol=1e-4)


def test_augmentation_of_an_image_alone_and_of_nothing() -> None:
    image = th.rand(50, 3, 16, 16)
    shifted = VitExtractor(IMAGE, random_shift=1, **SMALL).augment(image)
    assert shifted.shape == image.shape and not th.equal(shifted, image)
    assert VitExtractor(IMAGE, **SMALL).augment(image) is image
    obs = observations()
    assert VitExtractor(SPACE, **SMALL).augment(obs) is obs


def test_it_sees_proprioception() -> None:
    extractor = VitExtractor(SPACE, **SMALL)
    obs = observations(2)
    assert extractor(obs).shape == (2, extractor.features_dim) == (2, 2 * 8 + 2)
    image_part = extractor(obs)[:, :16]
    assert not th.allclose(extractor(obs | dict(q=obs["q"] + 1))[:, :16], image_part)
    th.testing.assert_close(extractor(obs)[:, 16:], obs["q"])


def test_float_images() -> None:
    space = spaces.Dict(image=spaces.Box(0, 1, (3, 16, 16), np.float32), q=spaces.Box(-1, 1, (2,)))
    extractor = VitExtractor(space, normalized_image=True, **SMALL)
    assert extractor.image_keys == ["image"] and extractor.vector_keys == ["q"]
    with pytest.raises(ValueError, match="holds no image"):
        VitExtractor(space, **SMALL)


def test_it_refuses_what_it_cannot_cut() -> None:
    with pytest.raises(ValueError, match="patch_size=8"):
        VitExtractor(spaces.Box(0, 255, (3, 20, 20), np.uint8))
    with pytest.raises(ValueError, match="holds no image"):
        VitExtractor(spaces.Box(-1, 1, (3,)))


def test_names_for_yaml() -> None:
    assert EXTRACTORS["VitExtractor"] is VitExtractor
    assert all(name == cls.__name__ for name, cls in EXTRACTORS.items())
