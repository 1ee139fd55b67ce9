"""Products by oneDNN: the same numbers and gradients as torch's, and taken where they are meant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from tutelage.core.products import add_product_, product, product_
from tutelage.models.llama_cpu import products
from tutelage.models.llama_cpu.patch import use_fast_layers
from tutelage.models.llama_cpu.products import Linear, add_linear, linear
from tutelage.models.load import load_model

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
SIZES = [(1, 1, 1), (7, 5, 3), (64, 4100, 9), (300, 96, 130), (33, 2049, 64)]
"""m, n and k; some n and m are no multiple of a piece."""


@pytest.fixture(params=["onednn", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every product by one library, however small and whatever this processor is."""
    is_onednn = request.param == "onednn"
    if is_onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "_is_onednn_faster", lambda: is_onednn)
    monkeypatch.setattr(products, "LEAST_MULTIPLICATIONS", 0)
    return str(request.param)


def pair(m: int, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_products_are_those_of_float64(
    library: str, m: int, n: int, k: int, is_transposed: bool
) -> None:
    a, b = pair(m, n, k)
    if is_transposed:  # the same numbers, as the objective's gradients lay them out
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    expected = a.double() @ b.double().t()
    assert distance(product(a, b), expected) < 1e-6
    out = torch.full((m, n), torch.nan)
    product_(out, a, b)
    assert distance(out, expected) < 1e-6
    before = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    out = before.clone()
    add_product_(out, a, b)
    assert distance(out, before.double() + expected) < 1e-6
    assert distance(add_linear(before, a, b), before.double() + expected) < 1e-6


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 2, 3)])
def test_a_linear_layer_has_torchs_gradients(
    library: str, shape: tuple[int, ...], needs: tuple[bool, bool], has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 10, generator=generator, requires_grad=needs[0])
    weight = torch.randn(4, 10, generator=generator, requires_grad=needs[1])
    bias = torch.randn(4, generator=generator, requires_grad=True) if has_bias else None
    inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    y, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(y, expected)
    for found, wanted in zip(
        torch.autograd.grad(y.sin().sum(), inputs),
        torch.autograd.grad(expected.sin().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["every other", "one for all", "a column"])
def test_a_bias_may_lie_anywhere(library: str, kind: str) -> None:
    x, weight = pair(64, 128, 256)
    numbers = torch.randn(256, 3, generator=torch.Generator().manual_seed(2))
    bias = {
        "every other": numbers[:, 0].contiguous()[::2],
        "one for all": numbers[:1, 0].expand(128),
        "a column": numbers[:128, 1],
    }[kind]
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert distance(linear(x, weight, bias), expected) < 1e-6
    leaf = weight.clone().requires_grad_()
    assert distance(linear(x, leaf, bias).detach(), expected) < 1e-6


def test_sizes_that_do_not_fit_are_told_by_torch(library: str) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.ones(7, 4), torch.ones(6, 5))


def test_a_linear_layer_has_second_derivatives(library: str) -> None:
    x, weight = (t.requires_grad_() for t in pair(5, 4, 3))

    def second(y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), weight)[0]

    torch.testing.assert_close(second(linear(x, weight)), second(F.linear(x, weight)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("has_gradients", [False, True])
def test_a_linear_layer_has_forward_derivatives(library: str, has_gradients: bool) -> None:
    x, weight = pair(5, 4, 3)
    weight.requires_grad_(has_gradients)
    tangent = torch.ones_like(x)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, tangent), weight)).tangent
    torch.testing.assert_close(y, F.linear(tangent, weight))
    found = torch.func.jvp(lambda x: linear(x, weight), (x,), (tangent,))[1]
    torch.testing.assert_close(found, F.linear(tangent, weight))


@pytest.mark.parametrize("write", [product_, add_product_])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((6, 4), torch.float32), ((1, 6, 4), torch.float32), ((6, 1), torch.float64)],
)
def test_an_out_of_another_shape_or_dtype_is_refused(
    library: str,
    write: Callable[[Tensor, Tensor, Tensor], None],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    out = torch.ones(shape, dtype=dtype)
    with pytest.raises(ValueError, match=r"but the product is \[6, 1\] of torch.float32"):
        write(out, *pair(6, 1, 3))
    assert bool((out == 1).all())


@needs_onednn
def test_what_is_for_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small, wide = pair(64, 128, 256), pair(8, 128, 256), pair(64, 128, 256)
    monkeypatch.setattr(products, "_is_onednn_faster", lambda: True)
    assert products._suits(*large)
    assert not products._suits(*small)
    assert not products._suits(*(t.double() for t in wide))
    assert not products._suits(*(t.bfloat16() for t in wide))
    assert not products._suits(*(t.to("meta") for t in wide))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not products._suits(*large)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    monkeypatch.setattr(products, "_is_onednn_faster", lambda: False)
    assert not products._suits(*large)


def test_autocast_is_heeded(library: str) -> None:
    a, b = pair(64, 128, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(a, b).dtype == torch.bfloat16


@needs_onednn
@pytest.mark.parametrize("maker", ["AuthenticAMD", "GenuineIntel", None])
def test_the_processor_decides(maker: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, **_: object) -> str:
        if maker is None:
            raise FileNotFoundError(path)
        return f"vendor_id : {maker}"

    monkeypatch.setattr(Path, "read_text", read)
    for capability in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        found = products._is_onednn_faster.__wrapped__()
        assert found == (maker == "AuthenticAMD" and capability == "AVX512")


@needs_onednn
def test_a_loaded_model_multiplies_by_onednn(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, plain = [], products._onednn
    monkeypatch.setattr(products, "_is_onednn_faster", lambda: True)
    monkeypatch.setattr(products, "LEAST_MULTIPLICATIONS", 0)
    monkeypatch.setattr(products, "_onednn", lambda *x: (calls.append(1), plain(*x))[1])
    model = load_model(str(tiny_models / "student"))
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    num_linear = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert len(calls) == num_linear > 0


def test_shared_layers_stay_shared_and_hooks_stay() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3)})
    model["b"] = model["a"]
    seen: list[int] = []
    model["a"].register_forward_hook(lambda *_: seen.append(1))
    use_fast_layers(model)
    assert model["a"] is model["b"]
    assert type(model["b"]) is Linear
    model["b"](torch.ones(1, 3))
    assert seen == [1]


def test_layers_are_replaced_under_their_names_on_the_same_weights(library: str) -> None:
    class Own(nn.Linear):
        """Not for us: it may do something else."""

    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(5, 6, bias=False), Own(6, 7))
    model = nn.Sequential(inner, nn.Tanh(), nn.Linear(7, 3)).eval()
    before, x = copy.deepcopy(model), torch.randn(4, 5)
    weights = dict(model.named_parameters())
    use_fast_layers(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert (kinds["0.0"], kinds["0.1"], kinds["2"]) == (Linear, Own, Linear)
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys()
    assert all(after[name] is weights[name] for name in weights)
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(x), before(x))
