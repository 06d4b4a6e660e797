"""Curvature of the digits CNN, side by side in one run: a product, the top 10 eigenvalues, the trace.

    python benchmarks/curvature.py [--samples 512] [--repeats 5]

The network is trained first (400 steps of Adam on three of the four rotations). Counts of products do not depend on
the machine; seconds do, and a shared machine is noisy: read ratios, from interleaved repetitions.
"""

import argparse
import importlib
import statistics
import sys
import time
import warnings

import numpy as np
import scipy.sparse.linalg
import torch
import torch.nn.functional as F

from flatlab import Hessian, Landscape, build_network, hessian_spectrum, hessian_trace, seeds
from flatlab.data import digits


def trained(steps=400):
    data = digits.load()
    images = torch.cat([domain.images for domain in data.domains[:3]]).float().div(255).sub(digits.MEAN) / digits.STD
    labels = torch.cat([domain.labels for domain in data.domains[:3]])
    torch.manual_seed(0)
    network = build_network("digits-cnn", num_classes=10, in_channels=1)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    rng = seeds.generator("benchmarks", "curvature")
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
    return network.eval(), images, labels


def interleaved(calls, repeats):
    """Median seconds of each call; one round first to warm up."""
    times = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def oracle(network, x, y, loader=None):
    import pyhessian

    data = {"dataloader": loader} if loader else {"data": (x, y)}
    return pyhessian.hessian(network, torch.nn.CrossEntropyLoss(), cuda=False, **data)


def products(network, x, y, repeats):
    batches = list(zip(x.split(128), y.split(128), strict=True))
    many, one = (Landscape(network, data, F.cross_entropy) for data in (batches, [(x, y)]))
    v = torch.randn(one.num_params, generator=seeds.generator("v"))
    block = torch.randn(one.num_params, 4, generator=seeds.generator("block"))
    kept, fresh, ahead = Hessian(one), Hessian(many, method="reverse"), Hessian(many, method="forward")
    peer = oracle(network, x, y, batches)
    views = one.split(v)
    calls = {
        "forward pass": one.evaluate,
        "flatlab, one batch, graph kept": lambda: kept @ v,
        "flatlab, batches of 128, double backward": lambda: fresh @ v,
        "flatlab, batches of 128, forward over reverse": lambda: ahead @ v,
        "flatlab, batches of 128, block of 4, each": lambda: fresh @ block,
        "PyHessian, loader": lambda: peer.dataloader_hv_product(views),
    }
    seconds = interleaved(calls, repeats)
    seconds["flatlab, batches of 128, block of 4, each"] /= 4
    unit = seconds["forward pass"]
    for name, each in seconds.items():
        print(f"  {name:48} {1e3 * each:9.1f} ms {each / unit:6.2f} passes")
    chosen = Hessian(many)
    print(f"  auto on batches of 128: {chosen.method} ({chosen.reason})")


def eigenvalues(network, x, y):
    landscape = Landscape(network, [(x, y)], F.cross_entropy)
    exact = hessian_spectrum(landscape, k=10, tol=1e-6).eigenvalues

    def line(name, values, count, seconds):
        error = np.abs(np.sort(values)[::-1] / exact - 1).max()
        print(f"  {name:48} {count:6.0f} products {seconds:7.1f} s   largest error {error:.1e}")

    for tol in (1e-2, 1e-3):
        for seed in range(3):
            found = hessian_spectrum(landscape, k=10, tol=tol, seed=seed)
            line(f"flatlab, tol={tol}, seed {seed}", found.eigenvalues, found.cost.hvps, found.cost.seconds)
        operator, start = Hessian(landscape), time.perf_counter()
        v0 = np.random.default_rng(0).normal(size=landscape.num_params)
        values = scipy.sparse.linalg.eigsh(operator.to_scipy(), k=10, which="LA", tol=tol, v0=v0)[0]
        line(f"SciPy eigsh on our operator, tol={tol}", values, operator.products, time.perf_counter() - start)
    importlib.import_module("pyhessian")
    module = sys.modules["pyhessian.hessian"]  # the package hides it behind a class of that name
    count, true = [0], module.hessian_vector_product
    module.hessian_vector_product = lambda *args: count.__setitem__(0, count[0] + 1) or true(*args)
    torch.manual_seed(0)
    start = time.perf_counter()
    values = oracle(network, x, y).eigenvalues(top_n=10)[0]
    line("PyHessian, defaults, one batch", np.array(values), count[0], time.perf_counter() - start)
    module.hessian_vector_product = true
    network.zero_grad()


def trace(network, x, y, seeds_):
    landscape = Landscape(network, [(x, y)], F.cross_entropy)
    operator = Hessian(landscape)
    reference = hessian_trace(operator, rel_error=0.003, budget=3000, deflate=60, seed=1234)
    low, high = reference.interval()
    print(f"  reference: {reference.trace.value:.3f} ({low[0]:.3f} to {high[0]:.3f}), {reference.cost.hvps} products")
    for name, deflate in (("flatlab, 20 deflated", None), ("flatlab, 40 deflated", 40), ("Hutchinson", 0)):
        found = [hessian_trace(operator, seed=seed, deflate=deflate, budget=1100) for seed in range(seeds_)]
        off = np.std([f.trace.value for f in found]) / reference.trace.value
        cost = np.mean([f.cost.hvps for f in found])
        print(f"  {name:26} {cost:6.0f} products; captured {found[0].captured:5.1%}; spread {off:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # PyHessian differentiates with create_graph
    model, inputs, targets = trained()
    inputs, targets = inputs[: given.samples], targets[: given.samples]
    print(f"digits CNN, {sum(p.numel() for p in model.parameters())} parameters, {len(inputs)} images")
    print("one product:")
    products(model, inputs, targets, given.repeats)
    print("top 10 eigenvalues:")
    eigenvalues(model, inputs, targets)
    print("trace to 2 % (standard error):")
    trace(model, inputs, targets, given.seeds)
