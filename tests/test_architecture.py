"""The plan of the house, held against the code: who may import whom, how long things are, and what works without torch.

A row says what the modules of a room may import besides their own room; `flatlab` itself holds the version alone.
Whoever changes a row changes the design: say why in the commit.
"""

import ast
import graphlib
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from flatlab.runs import RunStore
from flatlab.specs import RunSpec

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    # nothing inside, but for the one exception
    "errors": "",
    "jsontext": "",
    "machine": "",
    "params": "errors",
    "plots": "",
    "resources": "",
    "seeds": "",
    "surfaceplots": "",
    "selection": "",
    "record": "errors",
    "arguments": "errors",
    "corrections": "errors",
    # what is asked for, without torch
    "quantspecs": "record",
    "specs": "record quantspecs errors",
    "probing": "record",
    "risespecs": "probing record",
    "surveyspecs": "probing",
    "probespecs": "surveyspecs risespecs probing specs errors",
    "settings": "specs errors",
    "methods": "settings specs quantspecs risespecs errors",
    "files": "errors jsontext",
    "entries": "specs files errors",
    "runs": "entries probespecs specs files errors jsontext",
    "radii": "runs probespecs metrics.results errors",
    "metrics.blur": "",
    "tables": "runs probespecs specs selection files metrics.rounds metrics.results errors",
    "areas": "",
    "verdicts": "corrections tables",
    "jobs": "entries errors runs probespecs specs quantspecs",
    "executors": "jobs",
    "reproduce": "tables valleys executors jobs runs settings specs plots files machine data.catalog errors",
    "surroundings": "surfaceplots plots runs probespecs metrics.barrier metrics.grids metrics.results files errors",
    "orders": "tables",
    "papertable": "orders tables plots runs methods settings specs resources",
    "flatness": "tables plots runs settings specs probespecs files metrics.sentences metrics.results metrics.rounds "
    "errors",
    "stability": "tables plots selection runs specs files errors",
    "valleys": "runs",
    "replays": "plots selection tables runs valleys files",
    "spectra": "plots runs probespecs specs files metrics.blur metrics.results errors",
    "saliency": "tables plots methods metrics.maps metrics.results probespecs runs settings specs files errors",
    "noisefigure": "uniformity tables methods settings probespecs runs specs resources seeds",
    "uniformity": "tables plots runs probespecs specs files metrics.results errors",
    "rounding": "tables plots runs probespecs specs files metrics.results errors",
    "tensorboard": "runs errors",
    "work": "jobs runs specs errors measure train",  # the last two inside functions: workers alone load torch
    # things that take arguments, not specs
    "data": "seeds errors",
    "data.trees": "errors",
    "data.catalog": "data.trees errors",
    "foreign": "errors",
    "models": "foreign seeds errors",
    "quant": "errors",
    "nests": "arguments errors",
    "memory": "nests",
    "blocks": "arguments nests errors",
    "losses": "nests errors",
    "probes": "nests errors",
    "points": "blocks",
    "derivatives": "errors",
    "landscape": "blocks derivatives losses memory nests params probes seeds errors points",
    "metrics": "arguments blocks corrections derivatives losses nests landscape params probes seeds errors points "
    "surfaceplots",  # the last inside plot() alone
    "golden": "landscape seeds",
    "selftest": "golden metrics",
    # from specs to things, to runs, to measurements: `train` and `measure` meet on disk
    "build": "specs quantspecs data models quant files errors",
    "train": "build exported foreign memory runs data models quant selection settings specs quantspecs files machine "
    "seeds errors",
    "checkpoints": "build runs data landscape models nests quant probespecs specs seeds files errors",
    "exported": "build foreign models quant record files errors",
    "export": "build checkpoints models quant runs specs quantspecs files errors",
    "latent": "checkpoints models quant runs specs errors",
    "shelf": "runs files metrics.results metrics.sampling",
    "measures": "build checkpoints export latent radii shelf runs data landscape metrics models params quant.attach "
    "seeds probespecs specs files errors",
    "measure": "build runs probespecs specs machine errors",  # and, by name, the module of a metric in measures/
    # the paper
    "analyses": "areas verdicts noisefigure rounding papertable orders surroundings surfaceplots saliency stability "
    "spectra probespecs specs settings methods tables plots runs resources",
}
OPEN = ("api", "cli", "upkeep", "options", "words", "mistakes", "display", "doctor", "errands", "hessian", "noise")
OPEN += ("surveys", "handover", "__main__", "__init__")
TORCH_FREE = [
    "specs",
    "probespecs",
    "settings",
    "methods",
    "runs",
    "jobs",
    "tables",
    "plots",
    "orders",
    "papertable",
    "reproduce",
    "options",
    "cli",
]


def files_of(*folders):
    return {path: _name(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))}


def _name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = files_of("flatlab", "analyses")


def imports_of(path):
    """Return the modules that a file imports, at its top and inside functions; ours by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES.values())
            found |= whole
            if len(whole) < len(node.names):
                found.add(node.module)
    return found


IMPORTS = {name: imports_of(path) for path, name in MODULES.items()}
OURS = {
    name: {each for each in found if each.split(".")[0] in ("flatlab", "analyses")} for name, found in IMPORTS.items()
}


def room(name):
    """Return a module's row: the longest that its name begins with."""
    parts = name.removeprefix("flatlab.").split(".")
    rows = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((row for row in rows if row in MAY_IMPORT), rows[-1])


@pytest.mark.parametrize("name", [name for name in IMPORTS if name != "flatlab" and room(name) not in OPEN])
def test_imports_keep_to_the_plan(name):
    mine = room(name)
    assert mine in MAY_IMPORT, f"{name} has no row in the table"
    allowed = {*MAY_IMPORT[mine].split(), mine}
    outside = {
        each
        for each in OURS[name] - {"flatlab"}
        if not any(f"{each.removeprefix('flatlab.')}.".startswith(f"{row}.") for row in allowed)
    }
    assert not outside, f"{name} may not import {', '.join(sorted(outside))}"


def test_each_row_is_of_a_room_that_there_is():
    assert set(MAY_IMPORT) == {room(name) for name in IMPORTS} - {*OPEN, "flatlab"}


def test_nothing_inside_imports_the_doorways():
    importers = {name for name, found in OURS.items() if found & {"flatlab.api", "flatlab.cli"}}
    assert importers <= {"flatlab.__main__"}
    words = {f"flatlab.{each}" for each in OPEN if each not in ("api", "cli", "__main__", "__init__")}
    assert {name for name, found in OURS.items() if found & words} <= words | {"flatlab.cli"}


def test_there_are_no_cycles():
    graph = {name: {each for each in found if each in IMPORTS} - {name} for name, found in OURS.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_analyses_and_tables_do_not_name_torch():
    torch_free = [name for name in IMPORTS if name.startswith("analyses")]
    torch_free += [
        f"flatlab.{name}"
        for name in [
            *TORCH_FREE,
            "flatness",
            "executors",
            "spectra",
            "uniformity",
            "noisefigure",
            "rounding",
            "words",
            "mistakes",
        ]
    ]
    assert not {name for name in torch_free if any(re.match(r"torch\b|torchvision\b", i) for i in IMPORTS[name])}


def test_no_room_is_a_lumber_room():
    words = {part for name in MODULES.values() for part in name.split(".")}
    assert not words & {"utils", "util", "helpers", "misc", "common"}


def functions():
    for path, name in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno
                yield f"{name}.{node.name}", node.end_lineno - node.lineno + 1


def test_functions_and_files_are_short():
    lengths = dict(functions())
    assert not {name: length for name, length in lengths.items() if length > 50}
    assert statistics.median(lengths.values()) <= 10
    lines = {name: len(path.read_text().splitlines()) for path, name in MODULES.items()}
    assert not {name: count for name, count in lines.items() if count > 300}


# --- without torch -----------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
REDRAW = """
import itertools, pathlib
import matplotlib
matplotlib.use("Agg")
import pandas as pd
from analyses import fig3
from flatlab import plots
columns = ["panel", "normalisation", "method", "radius", "seed", "over"]
seeds = [(0, "directions"), (1, "directions"), ("all", "seeds")]
cells = itertools.product(fig3.TITLES, fig3.AXES, fig3.ORDER, (0.0, 0.5, 2.0), seeds)
frame = pd.DataFrame([(*cell, *seed) for *cell, seed in cells], columns=columns).assign(held_out="all")
frame = frame.assign(value=frame["radius"], low=frame["radius"] - 0.1, high=frame["radius"] + 0.1)
frame = frame.assign(rise=frame["radius"], base_loss=0.1, chance=2.3)
print(*plots.save(fig3.draw(frame, "by hand"), pathlib.Path(sys.argv[1]) / "fig3"))
"""


def without_torch(code, *arguments):
    command = [sys.executable, "-c", WITHOUT_TORCH + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plans_and_tables_work_without_torch(tmp_path):
    modules = "\n".join(f"import flatlab.{name}" for name in TORCH_FREE)
    without_torch(f"{modules}\nimport analyses.fig3\nassert 'torch' not in sys.modules")
    spec = RunSpec(dataset="digits", held_out="rot0", image_size=16, model="digits-cnn", steps=1, eval_every=1, lr=1.0)
    RunStore(tmp_path).run(spec).create()
    line = "from flatlab.cli import main; main(sys.argv[1:])"
    assert spec.digest[:8] in without_torch(line, "runs", "list", "--store", tmp_path)
    plan = without_torch(line, "reproduce", "fig3", "--dry-run", "--setting", "smoke", "--store", tmp_path)
    assert re.search(r"^\d+ jobs, [\d,]+ image passes, about ", plan, re.MULTILINE)


def test_a_figure_is_redrawn_without_torch(tmp_path):
    written = without_torch(REDRAW, tmp_path).split()
    assert [Path(path).name for path in written] == ["fig3.pdf", "fig3.png"]
    assert all(Path(path).stat().st_size > 5000 for path in written)
