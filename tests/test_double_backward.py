"""Convolutions and clamps with cheap double backward passes: the values and all derivatives of torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

from flatlab.derivatives import double_backward
from flatlab.derivatives.double_backward import DoubleBackward
from flatlab.derivatives.operators import Hessian
from flatlab.derivatives.outer import GGN
from flatlab.landscape.landscape import Landscape
from flatlab.tensors.flat import split_like

GEOMETRIES = {
    "plain": ((2, 3, 7), (4, 3, 3), {}),
    "strided": ((2, 3, 7), (4, 3, 3), {"stride": 2, "padding": 1}),
    "dilated": ((2, 3, 7), (4, 3, 2), {"dilation": (2,), "padding": [1]}),
    "groups": ((2, 4, 6), (6, 2, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((2, 3, 6), (6, 1, 3), {"groups": 3, "padding": 2, "stride": 2}),
    "planes": ((2, 2, 5, 4), (3, 2, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    "solids": ((1, 2, 4, 4, 3), (2, 1, 2, 2, 2), {"groups": 2}),
}


def exact(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def ours(function):
    def call(*args):
        with DoubleBackward():
            return function(*args)

    return call


@pytest.fixture
def used(monkeypatch):
    """Names of the functions of this module that ran."""
    names = []
    for kind in (double_backward._Convolution, double_backward._Clamp):

        def noting(*args, own=kind.apply, name=kind.__name__):
            names.append(name)
            return own(*args)

        monkeypatch.setattr(kind, "apply", noting)
    return names


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions_have_the_derivatives_of_their_differences(name, bias, used):
    shape, kernel, how = GEOMETRIES[name]
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)]
    leaves = [exact(*shape), exact(*kernel)] + ([exact(kernel[0])] if bias else [])
    call = ours(lambda *tensors: conv(*tensors, **how))
    assert torch.equal(call(*leaves), conv(*leaves, **how)) and used
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("held", [0, 1])
def test_what_is_held_still_gets_no_derivative(held):
    leaves = [exact(2, 2, 5, grad=held != 0), exact(2, 1, 3, grad=held != 1)]
    call = ours(lambda *tensors: F.conv1d(*tensors, groups=2))
    assert torch.autograd.gradgradcheck(call, leaves)
    graph = torch.autograd.grad(call(*leaves).square().sum(), leaves[1 - held], create_graph=True)[0]
    native = torch.autograd.grad(F.conv1d(*leaves, groups=2).square().sum(), leaves[1 - held], create_graph=True)[0]
    assert torch.allclose(graph, native)
    assert graph.requires_grad


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layer", [F.relu6, F.hardtanh, lambda x, inplace: F.hardtanh(x, -0.3, 0.7, inplace)])
def test_clamps(layer, inplace, used):
    x = exact(400) if layer is not F.relu6 else (exact(400) * 4).detach().requires_grad_()
    ends = torch.tensor([0.0, 6.0, -1.0, 1.0, -0.3, 0.7, torch.inf, -torch.inf], dtype=torch.float64)
    x = torch.cat([x.detach(), ends]).requires_grad_()
    weights = [torch.randn_like(x) for _ in range(2)]

    def derivatives():
        y = layer(x * 1.0, inplace=inplace)
        slope = torch.autograd.grad((y**3).nan_to_num(posinf=0, neginf=0) @ weights[0], x, create_graph=True)[0]
        return y, slope, torch.autograd.grad(slope @ weights[1], x)[0]

    for mine, torchs in zip(ours(derivatives)(), derivatives(), strict=True):
        assert torch.equal(mine, torchs)
    assert used == ["_Clamp"]


def test_a_clamped_value_may_be_written_to():
    x = exact(20)

    def total():
        y = F.relu6(x * 1.0)
        y += 1
        return (y**2).sum()

    assert torch.equal(torch.autograd.grad(ours(total)(), x)[0], torch.autograd.grad(total(), x)[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.conv2d(x, w, padding="same"),
        lambda x, w: F.conv2d(x[0], w),
        lambda x, w: vmap(lambda one: F.relu6(F.conv2d(one[None], w)))(x),
        lambda x, w: F.relu6(x[:, :1], inplace=True),
        lambda x, w: F.conv2d(x.detach(), w.detach()),
    ],
    ids=["same", "one image", "vmap", "view", "no derivative"],
)
def test_other_calls_are_left_to_torch(call, used):
    tensors = [exact(3, 2, 5, 5), exact(2, 2, 3, 3)]
    assert torch.equal(ours(call)(*(t * 1.0 for t in tensors)), call(*(t * 1.0 for t in tensors)))
    assert used == []


def test_autocast_is_kept(used):
    x, w = torch.randn(1, 2, 5, 5, requires_grad=True), torch.randn(2, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16), DoubleBackward():
        assert F.conv2d(x, w).dtype == torch.bfloat16
    assert used == []


class Mobile(nn.Module):
    """An inverted residual: expansion, depthwise, projection, each with BatchNorm; checkpointed if asked."""

    def __init__(self, again=False):
        super().__init__()
        self.again = again
        self.body = nn.Sequential(
            nn.Conv2d(2, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU6(inplace=True),
            nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU6(inplace=True),
            nn.Conv2d(6, 2, 1, bias=False),
            nn.BatchNorm2d(2),
        )
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        y = checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x)
        return self.head((x + y).mean((2, 3)))


def dense(model, x, y):
    """The Hessian (P, P) by torch's own double backward passes."""
    point = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(vector):
        state = dict(zip(dict(model.named_parameters()), split_like(vector, list(model.parameters())), strict=True))
        return F.cross_entropy(functional_call(model, state, x), y)

    return torch.autograd.functional.hessian(loss, point)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("size", [8, 4], ids=["one batch", "two batches"])
def test_products_are_those_of_the_dense_matrix(again, size, used):
    torch.manual_seed(0)
    model, (x, y) = Mobile().double().eval(), (exact(8, 2, 5, 5, grad=False), torch.arange(8) % 3)
    for layer in model.body[2::3]:
        layer.inplace = False
    matrix = dense(model, x, y)
    for layer in model.body[2::3]:
        layer.inplace = True
    model.again = again
    batches = list(zip(x.split(size), y.split(size), strict=True))
    # Checked, a checkpointed model in float64 is refused: its block is computed again with its own weights.
    landscape = Landscape(model, batches, F.cross_entropy, check=not again)
    vector = torch.randn(landscape.num_params, dtype=torch.float64)
    assert torch.allclose(Hessian(landscape, method="reverse") @ vector, matrix @ vector, rtol=1e-9, atol=1e-12)
    assert {"_Convolution", "_Clamp"} <= set(used)
    if not again:  # torch's checkpoint has no forward mode
        ggn = [GGN(landscape, method=method) @ vector for method in ("reverse", "forward")]
        assert torch.allclose(*ggn, rtol=1e-9, atol=1e-12)
