"""Curvature side by side with other tools, in one run: a product, the top 10 eigenvalues, the trace, a point, memory.

    python benchmarks/curvature.py digits
    python benchmarks/curvature.py mobilenet --shared ../shared/data --samples 128 --batch 32

Problems: digits and mobilenet as in `subjects.py`; resnet20, a network of that shape on the digits at 32 x 32. What a
part prints is kept under `--work`, and the part is not run again where it is; `results/curvature.md` holds all parts
so far. Repetitions are interleaved; times are medians, in passes over the same images. Peers run as their users have
them, on row-major tensors, ours on channels-last ones. Counts of products do not depend on the machine; times do.
"""

import argparse
import contextlib
import copy
import importlib
import resource
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse.linalg
import subjects
import torch
import torch.nn.functional as F
from networks import resnet20
from torch import nn

from flatlab import Hessian, Landscape, build_network, hessian_spectrum, hessian_trace, seeds
from flatlab.data import digits

HERE = Path(__file__).parent
PARTS = ("product", "eigenvalues", "trace", "point", "memory")


@dataclass
class Problem:
    network: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    batch: int

    @property
    def batches(self):
        return list(zip(self.x.split(self.batch), self.y.split(self.batch), strict=True))

    def one(self):
        return Landscape(self.network, [(self.x, self.y)], F.cross_entropy)

    def many(self):
        return Landscape(self.network, self.batches, F.cross_entropy)

    def rows(self):
        """The same network and images in row-major memory."""
        network = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)
        return Problem(network, self.x.contiguous(), self.y, self.batch)


# ---------------------------------------------------------------------------------------------------------- problems


def trained(network, images, labels, steps):
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    rng = seeds.generator("benchmarks", "curvature")
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
    return network.eval()


def rotations(size):
    data = digits.load()
    images = torch.cat([domain.images for domain in data.domains[:3]]).float().div(255).sub(digits.MEAN) / digits.STD
    labels = torch.cat([domain.labels for domain in data.domains[:3]])
    images = images if size == images.shape[-1] else F.interpolate(images, size=size, mode="bilinear")
    return images.to(memory_format=torch.channels_last), labels


def of_subject(name):
    """Return a problem from a trained network of `subjects.py`, about as many images of each seen domain."""

    def make(given):
        subject = subjects.digits(given.work) if name == "digits" else subjects.mobilenet(given.work, given.shared)
        if subject is None:
            raise SystemExit(f"MobileNetV2's weights are not below {given.shared}: give --shared.")
        network, strata = subject.load(given.samples)
        x, y = (torch.cat(parts) for parts in zip(*strata.values(), strict=True))
        return Problem(network, x.contiguous(memory_format=torch.channels_last), y, given.batch)

    return make


def on_resnet20(given):
    torch.manual_seed(0)
    images, labels = rotations(32)
    network = trained(resnet20(1, 10).to(memory_format=torch.channels_last), images, labels, given.steps)
    return Problem(network, images[: given.samples], labels[: given.samples], given.batch)


PROBLEMS = {"digits": of_subject("digits"), "resnet20": on_resnet20, "mobilenet": of_subject("mobilenet")}


# ------------------------------------------------------------------------------------------------------------- parts


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


def pyhessian_of(problem, *, loader):
    import pyhessian

    data = {"dataloader": problem.batches} if loader else {"data": (problem.x, problem.y)}
    return pyhessian.hessian(problem.network, nn.CrossEntropyLoss(), cuda=False, **data)


def eigenthings_product(problem, vector):
    """hessian-eigenthings' way: over a loader, gradients with a graph, flattened, and their product differentiated."""
    parameters, result = list(problem.network.parameters()), torch.zeros_like(vector)
    for x, y in problem.batches:
        loss = F.cross_entropy(problem.network(x), y)
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        inner = torch.cat([g.reshape(-1) for g in grads]) @ vector
        result += torch.cat([g.reshape(-1) for g in torch.autograd.grad(inner, parameters)]) * (len(x) / len(problem.x))
    return result


def product(problem, given):
    import curvlinops

    one, many, theirs = problem.one(), problem.many(), problem.rows()
    v = torch.randn(one.num_params, generator=seeds.generator("v"))
    kept, fresh, ahead = Hessian(one), Hessian(many, method="reverse"), Hessian(many, method="forward")
    plain, chosen = Hessian(many, fold=False, method="reverse"), Hessian(many)
    loaded, single, views = pyhessian_of(theirs, loader=True), pyhessian_of(theirs, loader=False), one.split(v)
    hv = importlib.import_module("pyhessian.utils").hessian_vector_product
    arguments = (theirs.network, nn.CrossEntropyLoss(), list(theirs.network.parameters()), theirs.batches)
    linear = curvlinops.HessianLinearOperator(*arguments, check_deterministic=False)
    calls = {
        "forward pass": many.evaluate,
        "flatlab, graph kept": lambda: kept @ v,
        "flatlab, fresh, double backward": lambda: fresh @ v,
        "flatlab, fresh, forward over reverse": lambda: ahead @ v,
        "flatlab, fresh, double backward, BatchNorm unfolded": lambda: plain @ v,
        "PyHessian, one batch, graph kept": lambda: hv(single.gradsH, single.params, views),
        "PyHessian, loader": lambda: loaded.dataloader_hv_product(views),
        "hessian-eigenthings' way": lambda: eigenthings_product(theirs, v),
        "curvlinops": lambda: linear @ v,
    }
    seconds = interleaved(calls, given.repeats)
    for name, each in seconds.items():
        print(f"  {name:52} {1e3 * each:9.1f} ms {each / seconds['forward pass']:6.2f} passes")
    print(f"  by itself: {chosen.method} ({chosen.reason}); {kept.folding}")
    for name, other in (("curvlinops", linear @ v), ("eigenthings", eigenthings_product(theirs, v))):
        print(f"  difference to {name}: {((kept @ v - other).norm() / other.norm()).item():.1e}")


@contextlib.contextmanager
def counted():
    """Count PyHessian's products."""
    importlib.import_module("pyhessian")
    module = sys.modules["pyhessian.hessian"]  # the package hides it behind a class of that name
    count, true = [0], module.hessian_vector_product
    module.hessian_vector_product = lambda *args: count.__setitem__(0, count[0] + 1) or true(*args)
    try:
        yield count
    finally:
        module.hessian_vector_product = true


def eigenvalues(problem, given):
    landscape, theirs = problem.one(), problem.rows()
    exact = hessian_spectrum(landscape, k=10, tol=1e-6).eigenvalues

    def line(name, values, count, seconds):
        error = np.abs(np.sort(values)[::-1] / exact - 1).max()
        print(f"  {name:52} {count:6.0f} products {seconds:7.1f} s   largest error {error:.1e}")

    v0 = np.random.default_rng(0).normal(size=landscape.num_params)
    for tol in (1e-2, 1e-3):
        for seed in range(given.seeds):
            found = hessian_spectrum(landscape, k=10, tol=tol, seed=seed)
            line(f"flatlab, tol={tol}, seed {seed}", found.eigenvalues, found.cost.hvps, found.cost.seconds)
        operator, start = Hessian(landscape), time.perf_counter()
        values = scipy.sparse.linalg.eigsh(operator.to_scipy(), k=10, which="LA", tol=tol, v0=v0)[0]
        line(f"SciPy eigsh on our operator, tol={tol}", values, operator.products, time.perf_counter() - start)
    torch.manual_seed(0)
    with counted() as count:
        start = time.perf_counter()
        values = pyhessian_of(theirs, loader=False).eigenvalues(top_n=10)[0]
        line("PyHessian, defaults, one batch", np.array(values), count[0], time.perf_counter() - start)


def trace(problem, given):
    operator = Hessian(problem.one())
    reference = hessian_trace(operator, rel_error=0.003, budget=given.reference, deflate=60, seed=1234)
    low, high = reference.interval()
    print(f"  reference: {reference.trace.value:.3f} ({low[0]:.3f} to {high[0]:.3f}), {reference.cost.hvps} products")
    for name, deflate in (("flatlab, 20 deflated", None), ("flatlab, 40 deflated", 40), ("Hutchinson", 0)):
        found = [hessian_trace(operator, seed=seed, deflate=deflate, budget=1100) for seed in range(given.seeds)]
        off = np.std([f.trace.value for f in found]) / reference.trace.value
        cost = np.mean([f.cost.hvps for f in found])
        print(f"  {name:26} {cost:6.0f} products; captured {found[0].captured:5.1%}; spread {off:.1%}")
    torch.manual_seed(0)
    with counted() as count:
        value = np.mean(pyhessian_of(problem.rows(), loader=False).trace())
    off = value / reference.trace.value - 1
    print(f"  {'PyHessian, defaults':26} {count[0]:6.0f} products; off by {off:+.1%}")
    try:
        pyhessian_of(problem.rows(), loader=False).density(iter=3)
    except Exception as error:
        print(f"  PyHessian's density() fails on this torch: {type(error).__name__}: {str(error).splitlines()[0][:90]}")


def point(problem, given):
    """One point of a surface; loss-landscapes' way: the whole data as one batch, parameters moved one by one."""
    many, theirs = problem.many(), problem.rows()
    step = torch.randn(many.num_params, generator=seeds.generator("step")) * 1e-4
    views = many.split(step)

    def moved():
        with torch.no_grad():
            for parameter, view in zip(theirs.network.parameters(), views, strict=True):
                parameter.data.add_(view)
            return F.cross_entropy(theirs.network(theirs.x), theirs.y).item()

    with many.moving() as at:
        calls = {"forward pass": lambda: at(step, 0.0), "flatlab": lambda: at(step), "loss-landscapes' way": moved}
        seconds = interleaved(calls, 3 * given.repeats)
    for name, each in seconds.items():
        print(f"  {name:52} {1e3 * each:9.1f} ms {each / seconds['forward pass']:6.2f} passes")


def memory(problem, given):
    """Peak memory of the top 10 of ResNet-50 above a product, in vectors; of two small images: vectors matter here."""
    network = build_network("resnet50", num_classes=65).eval()
    landscape = Landscape(network, [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))], F.cross_entropy, check=False)
    operator = Hessian(landscape)
    v = torch.randn(landscape.num_params)
    for _ in range(3):
        operator @ v
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = hessian_spectrum(operator, k=10, tol=1e-2, budget=given.products, vectors=True)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * landscape.num_params)
    print(f"  {landscape.num_params:,} parameters: {peak:.1f} vectors above a product, the eigenvectors included")
    print(f"  {found.cost.hvps} products in {found.cost.seconds:.0f} s, {found.converged_each.sum()} of 10 converged")


# ------------------------------------------------------------------------------------------------------------- running


class Both:
    """Standard output and a file."""

    def __init__(self, file):
        self.file, self.screen = file, sys.stdout

    def write(self, text):
        self.screen.write(text)
        self.file.write(text)

    def flush(self):
        self.screen.flush()


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--shared", type=Path, default=subjects.SHARED, help="folder of PACS and the weights")
    for name, value in {
        "samples": 512,
        "batch": 128,
        "steps": 400,
        "repeats": 5,
        "seeds": 5,
        "products": 40,
        "reference": 3000,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def main():
    given = arguments()
    kept = given.work / "curvature"
    kept.mkdir(parents=True, exist_ok=True)
    todo = [part for part in given.parts if not (kept / f"{given.problem}-{part}.txt").exists()]
    problem = PROBLEMS[given.problem](given) if set(todo) - {"memory"} else None
    warnings.simplefilter("ignore")  # PyHessian differentiates with create_graph
    for part in todo:
        path = kept / f"{given.problem}-{part}.txt"
        with open(path.with_suffix(".part"), "w") as file, contextlib.redirect_stdout(Both(file)):
            images = f"{len(problem.x)} images, batches of {given.batch}" if problem else "2 images"
            print(f"{given.problem}, {part}: {images}, {torch.get_num_threads()} threads")
            globals()[part](problem, given)
        path.with_suffix(".part").rename(path)
    given.results.mkdir(parents=True, exist_ok=True)
    told = "\n".join(path.read_text() for path in sorted(kept.glob("*.txt")))
    (given.results / "curvature.md").write_text(f"# Curvature, side by side\n\n```\n{told}```\n")


if __name__ == "__main__":
    main()
