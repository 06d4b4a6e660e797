"""What the curvature benchmark measures of one problem: each part returns rows, goals with what came, and notes."""

import resource
import statistics
import time

import numpy as np
import peers
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from networks import LAYOUTS

from flatlab import Hessian, Landscape, build_network, hessian_spectrum, hessian_trace, seeds

SIZES = (32, 64, 128, 256, 512)


def goal(words, bound, measured, *, least=False):
    """Return a goal, at most the bound or at least it, beside what was measured."""
    holds = bool(measured >= bound if least else measured <= bound)
    return {"goal": words, "bound": bound, "least": least, "measured": float(measured), "holds": holds}


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


def timed(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def in_passes(seconds, unit):
    return [{"what": n, "milliseconds": 1e3 * s, "passes": s / seconds[unit]} for n, s in seconds.items()]


# ---------------------------------------------------------------------------------------------------------- products


def product(problem, given):
    """One product with a vector; each tool in both layouts of memory, the faster counts."""
    v = torch.randn(problem.landscape.num_params, generator=seeds.generator("benchmarks", "v"))
    calls, ours = {}, {}
    for layout in LAYOUTS:
        laid = problem.laid(layout)
        whole = laid.cut(len(laid.x))
        kept, chosen = Hessian(whole.landscape, method="reverse"), Hessian(laid.landscape)
        ours[layout] = f"{layout}: {chosen.method} ({chosen.reason}); {chosen.folding}"
        each = {
            "forward pass": laid.forward,
            "flatlab, fresh": lambda op=chosen: op @ v,
            "flatlab, graph kept": lambda op=kept: op @ v,
            "PyHessian, loader": peers.pyhessian_product(laid, v, loader=True),
            "hessian-eigenthings": peers.eigenthings_product(laid, v),
            "curvlinops": peers.curvlinops_product(laid, v),
            "PyHessian, graph kept": peers.pyhessian_product(whole.laid(layout), v, loader=False),
        }
        calls |= {(name, layout): call for name, call in each.items()}
    seconds = interleaved(calls, given.repeats)
    best = {name: min(seconds[name, layout] for layout in LAYOUTS) for name, _ in calls}
    exact = Hessian(problem.double().landscape, fold=False) @ v.double()
    off = {name: _off(calls[name, "row-major"]().double(), exact) for name in best if "pass" not in name}
    fresh, kept = best["flatlab, fresh"], best["flatlab, graph kept"]
    unit = best["forward pass"]
    ratio = "one product, fresh: time of {} over ours"
    goals = [
        goal("one product, fresh: forward passes", 10.0, fresh / unit),
        goal("one product, graph kept: forward passes", 8.0, kept / unit),
        goal(ratio.format("PyHessian's loader path"), 1.3, best["PyHessian, loader"] / fresh, least=True),
        goal(ratio.format("hessian-eigenthings"), 1.3, best["hessian-eigenthings"] / fresh, least=True),
        goal(ratio.format("curvlinops"), 1.5, best["curvlinops"] / fresh, least=True),
    ]
    rows = [{**row, "difference": off.get(row["what"])} for row in in_passes(best, "forward pass")]
    layouts = {f"{name}, {layout}": 1e3 * each for (name, layout), each in seconds.items()}
    return {"rows": rows, "goals": goals, "notes": list(ours.values()), "milliseconds": layouts}


def _off(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------------- eigenvalues


def eigenvalues(problem, given):
    """The top 10, on few images as one batch, as PyHessian's own examples are."""
    problem = problem.first(given.few).cut(given.few)
    landscape, row_major = problem.landscape, problem.laid("row-major")
    exact = hessian_spectrum(landscape, k=10, tol=1e-4, budget=150).eigenvalues
    rows = []

    def add(what, values, count, seconds):
        error = float(np.abs(np.sort(values)[::-1] / exact - 1).max())
        rows.append({"what": what, "products": count, "seconds": seconds, "largest error": error})

    for seed in range(given.seeds):
        found, seconds = timed(lambda seed=seed: hessian_spectrum(landscape, k=10, tol=1e-2, seed=seed))
        add("flatlab", found.eigenvalues, found.cost.hvps, seconds)
        operator, start = Hessian(landscape), np.random.default_rng(seed).normal(size=landscape.num_params)
        search = {"k": 10, "which": "LA", "tol": 1e-2, "v0": start}
        found, seconds = timed(lambda op=operator, s=search: scipy.sparse.linalg.eigsh(op.to_scipy(), **s)[0])
        add("SciPy eigsh", found, operator.products, seconds)
    torch.manual_seed(0)
    with peers.pyhessian_products() as count:
        values, seconds = timed(lambda: peers.pyhessian_of(row_major, loader=False).eigenvalues(top_n=10)[0])
        add("PyHessian", np.array(values), count[0], seconds)
    table = [_middle(rows, what) for what in ("flatlab", "SciPy eigsh", "PyHessian")]
    ours, scipys, pyhessians = table
    words = "top 10 to 1 %: "
    goals = [
        goal(f"{words}largest error", 0.01, max(row["largest error"] for row in rows if row["what"] == "flatlab")),
        goal(f"{words}products of PyHessian over ours", 5, pyhessians["products"] / ours["products"], least=True),
        goal(f"{words}time of PyHessian over ours", 6, pyhessians["seconds"] / ours["seconds"], least=True),
        goal(f"{words}our products over SciPy's", 1.1, ours["products"] / scipys["products"]),
    ]
    return {"rows": table, "goals": goals, "each": rows, "notes": [f"{given.few} images; PyHessian by its defaults"]}


def _middle(rows, what):
    own = [row for row in rows if row["what"] == what]
    keys = ("products", "seconds")
    return {"what": what, **{k: statistics.median(r[k] for r in own) for k in keys}} | {
        "largest error": max(row["largest error"] for row in own)
    }


LEADING = (1, 2, 5, 10, 50)


def defaults(problem, given):
    """The top k for several k, each tool at its own defaults; those that miss 1e-3 do not count."""
    problem = problem.first(given.few).cut(given.few)
    landscape, row_major = problem.landscape, problem.laid("row-major")
    leading = [k for k in LEADING if k <= given.most]
    exact = hessian_spectrum(landscape, k=leading[-1], tol=1e-6, budget=60 * leading[-1]).eigenvalues
    rows, goals = [], []
    for k in leading:
        each = {"flatlab": [], "SciPy eigsh": [], "PyHessian": [], "hessian-eigenthings": []}
        for seed in range(given.seeds):
            for what, search in peers.searches(landscape, row_major, k, seed).items():
                (values, products), seconds = timed(search)
                error = float(np.abs(np.sort(values)[::-1] / exact[:k] - 1).max())
                each[what].append({"what": what, "products": products, "seconds": seconds, "largest error": error})
        table = [{"k": str(k), **_middle(found, what)} for what, found in each.items()]
        ours, *others = table
        equal = [row for row in others if row["largest error"] <= 1e-3]
        fastest = min((row["seconds"] for row in equal), default=float("inf"))
        goals.append(
            goal(
                f"top {k}, all by their defaults: time of the fastest other that is accurate, over ours",
                1.0,
                fastest / ours["seconds"],
                least=True,
            )
        )
        rows += table
    notes = [
        f"{given.few} images; accurate: a largest error up to 1e-3, the tolerance by default of flatlab and PyHessian",
        "hessian-eigenthings stops after 2 k products",
    ]
    return {"rows": rows, "goals": goals, "notes": notes}


# ------------------------------------------------------------------------------------------------------------- trace


def trace(problem, given):
    """The trace to a standard error of 2 %; Hutchinson's need from the spread of its probes."""
    problem = problem.first(given.few).cut(given.few)
    operator = Hessian(problem.landscape)
    reference = hessian_trace(
        operator, rel_error=0.002, budget=given.reference, deflate=min(60, given.reference // 3), seed=1234
    )
    true, error = reference.trace.value, reference.trace.stderr
    found = [hessian_trace(operator, rel_error=0.02, seed=seed) for seed in range(given.seeds)]
    probes = hessian_trace(operator, rel_error=0.0, deflate=0, budget=given.probes, seed=4321).vectors[:, 0]
    need = (probes.std(ddof=1) / true / 0.02) ** 2
    again = np.random.default_rng(0).choice(probes, size=(1000, len(probes))).std(axis=1, ddof=1)
    low, high = np.quantile((again / true / 0.02) ** 2, [0.05, 0.95])
    cost = float(np.mean([each.cost.hvps for each in found]))
    off = float(np.sqrt(np.mean([(each.trace.value / true - 1) ** 2 for each in found])))
    torch.manual_seed(0)
    with peers.pyhessian_products() as count:
        theirs = np.mean(peers.pyhessian_of(problem.laid("row-major"), loader=False).trace()) / true - 1
    rows = [
        {"what": "flatlab", "products": cost, "error": off},
        {"what": "Hutchinson, from its spread", "products": float(need), "error": 0.02},
        {"what": "PyHessian, by its defaults", "products": count[0], "error": float(abs(theirs))},
    ]
    notes = [
        f"{given.few} images; reference {true:.4g} ± {error:.2g} by {reference.cost.hvps} products;"
        f" the 20 deflated hold {found[0].captured:.0%}; Hutchinson's need, 90 %: {low:.0f} to {high:.0f} products",
        _density(problem),
    ]
    words = "trace to 2 %: products of Hutchinson over ours"
    return {"rows": rows, "goals": [goal(words, 3, need / cost, least=True)], "notes": notes}


def _density(problem):
    try:
        peers.pyhessian_of(problem.laid("row-major"), loader=False).density(iter=3)
    except Exception as error:
        return f"PyHessian's density() fails on this torch: {type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return "PyHessian's density() runs on this torch"


# ------------------------------------------------------------------------------------------------------------ points


def point(problem, given, *, bound=1.3, words="at its best"):
    """A point of a surface: both in their faster layout, ours at the batch size at which a bare pass is fastest."""
    laid = {layout: problem.laid(layout) for layout in LAYOUTS}
    sizes = {(layout, n): each.cut(n) for layout, each in laid.items() for n in SIZES if n <= len(each.x)}
    bare = interleaved({key: each.forward for key, each in sizes.items()}, 3)
    key = min(bare, key=bare.get)
    ours, planes = sizes[key].landscape, laid if bound < 2 else {"row-major": laid["row-major"]}
    step = torch.randn(ours.num_params, generator=seeds.generator("benchmarks", "step")) * 1e-4
    with ours.moving() as at:
        calls = {"forward pass": sizes[key].forward, "flatlab": lambda: at(step)}
        for layout, each in planes.items():
            calls |= {(layout, steps): peers.losslandscapes_plane(each, steps) for steps in (2, 4)}
        seconds = interleaved(calls, given.repeats)
    # The difference of two planes: what they prepare once is not counted.
    theirs = min((seconds[layout, 4] - seconds[layout, 2]) / 12 for layout in planes)
    best = {"forward pass": seconds["forward pass"], "flatlab": seconds["flatlab"], "loss-landscapes": theirs}
    goals = [
        goal(
            f"a point of a surface: time of loss-landscapes, {words}, over ours",
            bound,
            theirs / best["flatlab"],
            least=True,
        )
    ]
    if bound < 2:
        goals.insert(0, goal("a point of a surface: forward passes", 1.05, best["flatlab"] / best["forward pass"]))
    notes = [f"fastest bare pass: {key[0]}, batches of {key[1]}; loss-landscapes: {len(problem.x)} images as one batch"]
    return {"rows": in_passes(best, "forward pass"), "goals": goals, "notes": notes}


def users(problem, given):
    """The same as its users run it: row-major, with the C library's own allocator (both sides)."""
    return point(problem, given, bound=2.5, words="as users run it")


# ------------------------------------------------------------------------------------------------------------ memory


def memory(_, given):
    """Peak memory of the top 10 of ResNet-50 above a product, in vectors; of two small images: vectors matter here."""
    network = build_network("resnet50", num_classes=65).eval()
    landscape = Landscape(network, [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))], F.cross_entropy, check=False)
    operator = Hessian(landscape)
    v = torch.randn(landscape.num_params)
    for _ in range(3):
        operator @ v  # model, graph of the one batch and a product's own vectors are there from now on
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = hessian_spectrum(operator, k=10, tol=1e-2, budget=given.products, vectors=True)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * landscape.num_params)
    row = {"what": f"flatlab, {landscape.num_params:,} parameters", "vectors": peak, "products": found.cost.hvps}
    goals = [goal("top 10 of 25 million parameters: vectors above model and batch", 30, peak)]
    return {
        "rows": [row],
        "goals": goals,
        "notes": ["a vector is as large as the network; the eigenvectors are included"],
    }


PARTS = {
    "product": product,
    "eigenvalues": eigenvalues,
    "defaults": defaults,
    "trace": trace,
    "point": point,
    "users": users,
    "memory": memory,
}
