"""Small models with data and a loss: one table, which each metric runs through, in one batch and in uneven ones."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlab import seeds
from flatlab.landscape.landscape import Landscape
from flatlab.metrics import closed_forms
from flatlab.metrics.flatness import sphere
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.metrics.flatness.sampler import Sampler
from flatlab.metrics.flatness.sphere import sphere_flatness

CUTS = {"one": [24], "uneven": [5, 1, 11, 7]}
"""Batch sizes; both cut the same 24 samples."""


@dataclass(frozen=True)
class Case:
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def batches(self, sizes=None):
        return list(zip(self.inputs.split(sizes or [24]), self.targets.split(sizes or [24]), strict=True))

    def landscape(self, sizes=None, **kwargs):
        return Landscape(self.model, self.batches(sizes), self.loss, **kwargs)

    def functional(self):
        """The loss as a pure function of a flat vector, by torch.func: shares no code with the landscape."""
        named = dict(self.model.named_parameters())

        def loss(vector):
            pieces = vector.split([p.numel() for p in named.values()])
            state = {n: piece.reshape(p.shape) for (n, p), piece in zip(named.items(), pieces, strict=True)}
            return self.loss(torch.func.functional_call(self.model, state, self.inputs), self.targets)

        return loss

    def dense_hessian(self, point):
        return torch.func.jacrev(torch.func.grad(self.functional()))(point)

    def double(self):
        return Case(self.model.double(), self.inputs.double(), self.targets, self.loss)


class Tied(nn.Module):
    """Two layers that share one matrix."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class ViTBlock(nn.Module):
    """Patches of an image, one block of self-attention, and the mean over the tokens."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.position = nn.Parameter(0.1 * torch.ones(1, 4, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(self.patches(x).flatten(2).mT + self.position).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)


def conv_bn():
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2)]
    return nn.Sequential(*layers, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)), (1, 8, 8)


def conv_bn_channels_last():
    model, shape = conv_bn()
    return model.to(memory_format=torch.channels_last), shape


MODELS = {
    "mlp": mlp,
    "conv_bn": conv_bn,
    "conv_bn_channels_last": conv_bn_channels_last,
    "tied": lambda: (Tied(), (6,)),
    "vit": lambda: (ViTBlock(), (1, 8, 8)),
}


def make(name):
    """Build a case, always the same one."""
    model, shape = MODELS[name]()
    rng = seeds.generator("cases", name)
    with torch.no_grad():
        for name_, p in model.named_parameters():
            centre = 1.0 if p.ndim == 1 and name_.endswith("weight") else 0.0  # normalisation layers stay near one
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
            p.copy_(centre + scale * torch.randn(p.shape, generator=rng))
        for buffer_name, b in model.named_buffers():
            if b.is_floating_point():  # running statistics that are not those of a fresh network
                b.copy_(torch.rand(b.shape, generator=rng) + (0.5 if buffer_name.endswith("var") else 0.0))
    inputs = torch.randn(24, *shape, generator=rng)
    return Case(model.eval(), inputs, torch.randint(0, 3, (24,), generator=rng))


class Quadratic(closed_forms.Quadratic):
    """The quadratic of the self-test, as a landscape."""

    def landscape(self, **kwargs):
        data = [(torch.zeros(2, dtype=self.w.dtype), torch.zeros(2))]
        return Landscape(self.eval(), data, lambda outputs, targets: outputs, **kwargs)


def at_a_minimum():
    """A smooth network that fits its targets exactly: no slope, and a Hessian without negative eigenvalues."""
    case = make("conv_bn").double()
    case.model[2] = case.model[5] = nn.Tanh().eval()  # autograd does not see the curvature in the kinks of a ReLU
    with torch.no_grad():
        case.model[0].weight[2].zero_()
        return replace(case, targets=case.model(case.inputs), loss=F.mse_loss)


def walked(landscape, radii, rays, *, seed=0, normalisation="none"):
    """Rises (K, R, S) of the crossed design, one evaluation after the other: shares no code with the sampler."""
    drawn = [draw_direction(landscape, seed, k, normalisation=normalisation) for k in rays]
    here = landscape.evaluate().losses
    ends = [[landscape.evaluate(landscape.point + r * ray).losses - here for r in radii] for ray in drawn]
    return np.array(ends)


def stratified(num_samples=6, seed=0):
    """Flatness of a network on three strata of unequal sizes."""
    case = make("mlp")
    batches = case.batches([3, 9, 12])
    landscape = Landscape(case.model, {"a": batches[:1], "b": batches[1:2], "c": batches[2:]}, case.loss)
    return sphere_flatness(landscape, [0.5, 1.0], num_samples=num_samples, seed=seed)


def softmax(samples=96, *, model=None, cut=(40, 1, 55)):
    """Softmax regression (or a network) on three classes of noisy images."""
    rng = seeds.generator("softmax")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model or nn.Linear(6, 3)
    model = model.double().eval()
    inputs = torch.randn(samples, 6, generator=rng, dtype=torch.float64)
    targets = torch.randint(0, 3, (samples,), generator=rng)
    return Landscape(model, list(zip(inputs.split(cut), targets.split(cut), strict=True)), F.cross_entropy)


def network():
    """A small network on the same images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return softmax(model=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))


def in_blocks(landscape, radii, block_size, *, errors=(0.02, 1e-4), budget=None, seed=0):
    """Flatness by antithetic pairs on blocks of this size, without a pilot."""
    sampler = Sampler([landscape], seed, "none")
    return sphere.sample(sampler, radii, None, errors, budget, block_size=block_size)[0]


def by_pyhessian(case, what, **options):
    """What PyHessian finds of a case in one batch: `trace` or `eigenvalues`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyhessian

        oracle = pyhessian.hessian(case.model, case.loss, data=(case.inputs, case.targets), cuda=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # it draws from the global generator
            found = getattr(oracle, what)(**options)
    case.model.zero_grad()
    return found
