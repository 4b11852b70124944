"""The denoisers: a prepared chain computes what single calls do, also when layers are not plain or are watched."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch as th
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sb3_dppo.diffusion.denoisers import Denoiser, MlpDenoiser, TransformerDenoiser, UnetDenoiser, is_plain, make_mlp

DA, TP, FEATURES, K = 2, 4, 5, 6
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "residual": dict(net_arch=[16] * 3),
    "layer_norm": dict(net_arch=[16] * 3, layer_norm=True, activation_fn=nn.Mish),
    "encoder": dict(net_arch=[16] * 3, obs_encoder_arch=[8, 6]),
    "plain": dict(net_arch=[16, 12], residual=False),
    "film": dict(net_arch=[16] * 3, film=True),
    "film_plain": dict(net_arch=[16, 12], residual=False, layer_norm=True, film=True),
}


def make_denoiser(name: str = "residual") -> Denoiser:
    th.manual_seed(0)
    if name == "unet":
        return UnetDenoiser(DA, TP, FEATURES, [8, 16])
    if name == "transformer":
        return TransformerDenoiser(DA, TP, FEATURES, K, [16, 16])
    denoiser = MlpDenoiser(DA, TP, FEATURES, K, **ARCHITECTURES[name])
    if denoiser.film is not None:
        nn.init.normal_(denoiser.film.weight, std=0.3)
    return denoiser


def run_chain(denoiser: Denoiser) -> tuple[th.Tensor, th.Tensor]:
    """What a prepared chain predicts, and what single calls predict in its place."""
    generator = th.Generator().manual_seed(1)
    features, timesteps = th.randn(7, FEATURES, generator=generator), th.arange(K).flip(0)
    samples = th.randn(K, 7, TP, DA, generator=generator)
    with th.no_grad():
        chain = denoiser.for_chain(features, denoiser.prepare(timesteps))
        chained = th.stack([predict(sample) for predict, sample in zip(chain, samples, strict=True)])
        # As in the update: one call, with timesteps mixed in the batch.
        embeddings = denoiser.embed_timesteps(timesteps).repeat_interleave(7, dim=0)
        called = denoiser(samples.flatten(0, 1), embeddings, denoiser.encode(features).repeat(K, 1)).view_as(samples)
    return chained, called


class Lora(nn.Linear):
    """A linear layer with an adapter, as its subclass."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return super().forward(x) + self.up(self.down(x))


class Wrapped(nn.Module):
    """A linear layer with an adapter around it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = Lora(layer)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.layer(x)


class Bend(nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x + x.sin()


def double_forward(layer: nn.Module) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: th.sin(3 * forward(x))  # type: ignore[method-assign]
    return layer


def hooked(layer: nn.Module, register: str, hook: Callable[..., Any]) -> nn.Module:
    getattr(layer, register)(hook)
    return layer


def parametrized(layer: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Bend())
    return layer


CHANGES: dict[str, Callable[[Any], nn.Module]] = {
    "lora": Lora,
    "wrapped": Wrapped,
    "spectral_norm": parametrizations.spectral_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "parametrization": parametrized,
    "forward_hook": lambda layer: hooked(layer, "register_forward_hook", lambda module, inputs, output: th.sin(3 * output)),
    "forward_pre_hook": lambda layer: hooked(layer, "register_forward_pre_hook", lambda module, inputs: 2 * inputs[0]),
    "own_forward": double_forward,
    "no_bias": lambda layer: nn.Linear(layer.in_features, layer.out_features, bias=False),
}


@pytest.mark.parametrize("name", [*ARCHITECTURES, "unet", "transformer"])
def test_a_chain_predicts_what_single_calls_do(name: str) -> None:
    chained, called = run_chain(make_denoiser(name))
    # Convolutions are computed in another way for another batch, on some machines with errors of 4e-5.
    th.testing.assert_close(chained, called, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [*ARCHITECTURES, "unet", "transformer"])
def test_layers_that_are_not_plain_run_as_they_are(name: str, change: str) -> None:
    untouched = run_chain(make_denoiser(name))[1]
    reference = make_denoiser(name)
    layers = [path for path, layer in reference.named_modules() if type(layer) is nn.Linear]
    if isinstance(reference, TransformerDenoiser):  # PyTorch's attention reads its own layers' weights.
        layers = [path for path in layers if not path.startswith("transformer")]
    for path in layers:
        denoiser = deepcopy(reference)
        layer = denoiser.get_submodule(path)
        denoiser.set_submodule(path, CHANGES[change](layer))
        denoiser.eval()  # Spectral norms are estimated anew at each call in training.
        chained, called = run_chain(denoiser)
        effect, difference = ((called - other).abs().max() for other in (untouched, chained))
        assert effect > 1e-3 and difference < 0.02 * effect, (path, effect, difference)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "unet", "transformer"])
def test_hooks_of_whole_networks_are_called(name: str) -> None:
    for path in ("", "time_mlp", "obs_encoder"):
        denoiser, n_calls = make_denoiser(name), []
        denoiser.get_submodule(path).register_forward_hook(lambda *args, n=n_calls: n.append(1) or 2 * args[-1] + 1)
        chained, called = run_chain(denoiser)
        th.testing.assert_close(chained, called, rtol=1e-4, atol=1e-5)
        assert len(n_calls) == (K + 1 if path == "" else 2)


def test_hooks_inside_a_block_are_called() -> None:
    denoiser = make_denoiser("layer_norm")
    for path in ("mlp.1", "mlp.1.norm1", "mlp.1.activation2", "mlp.1.linear2"):
        hooked_denoiser = deepcopy(denoiser)
        hooked(hooked_denoiser.get_submodule(path), "register_forward_hook", lambda module, inputs, output: 2 * output)
        chained, called = run_chain(hooked_denoiser)
        th.testing.assert_close(chained, called, rtol=1e-4, atol=1e-5, msg=path)
        assert not th.allclose(chained, run_chain(denoiser)[0], atol=1e-4)


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Mish])
@pytest.mark.parametrize("residual", [True, False])
def test_hooks_see_what_layers_computed(activation_fn: type[nn.Module], residual: bool) -> None:
    mlp = make_mlp(FEATURES, 1, [16] * 3, activation_fn, residual=residual)
    seen: list[tuple[nn.Linear, th.Tensor, th.Tensor]] = []
    for layer in mlp.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, inputs, output: seen.append((layer, inputs[0], output)))
    mlp(th.randn(20, FEATURES))
    assert len(seen) == 4
    for layer, inputs, output in seen:
        th.testing.assert_close(nn.functional.linear(inputs, layer.weight, layer.bias), output)


def test_a_subclass_runs_its_own_forward() -> None:
    class Shifted(MlpDenoiser):
        def forward(self, sample: th.Tensor, time_embedding: th.Tensor, condition: th.Tensor) -> th.Tensor:
            return super().forward(sample, time_embedding, condition) + 1

    th.manual_seed(0)
    chained, called = run_chain(Shifted(DA, TP, FEATURES, K, [16] * 3))
    th.testing.assert_close(chained, called, rtol=1e-4, atol=1e-5)
    assert not th.allclose(called, run_chain(make_denoiser())[1], atol=0.1)


def test_what_is_plain() -> None:
    assert all(is_plain(make_denoiser(name)) for name in ARCHITECTURES)
    handle = (denoiser := make_denoiser()).mlp[-1].register_forward_hook(lambda *args: None)
    assert not is_plain(denoiser)
    handle.remove()
    assert is_plain(denoiser)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_flow_through_a_chain(name: str) -> None:
    denoiser = make_denoiser(name)
    features = th.randn(3, FEATURES, requires_grad=True)
    chain = denoiser.for_chain(features, denoiser.prepare(th.arange(K)))
    sum(predict(th.randn(3, TP, DA)).sum() for predict in chain).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in [features, *denoiser.parameters()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MlpDenoiser(DA, TP, FEATURES, K, [16, 16]), r"net_arch=\[16, 16\].*odd number of equal widths"),
        (lambda: MlpDenoiser(DA, TP, FEATURES, K, [16], time_dim=5), "time_dim=5 must be even"),
        (lambda: MlpDenoiser(DA, TP, FEATURES, K, [16], film=True), r"net_arch=\[16\] has no residual block"),
        (lambda: UnetDenoiser(DA, 5, FEATURES, [8, 16]), "horizon=5 can't be halved 1 times"),
        (lambda: UnetDenoiser(DA, TP, FEATURES, [9, 16]), "must be multiples of 8"),
        (lambda: TransformerDenoiser(DA, TP, FEATURES, K, [16, 32]), "layers have one width"),
    ],
)
def test_bad_architectures(make: Callable[[], Denoiser], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
