"""The plan of the house, held against the code: who may import whom, how long things are, and what works without torch.

A row says what a package may import besides itself and the ground. Whoever changes a row changes the design: say why
in the commit.
"""

import ast
import graphlib
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from flatlab.specs.run import RunSpec
from flatlab.store.runs import RunStore

ROOT = Path(__file__).resolve().parents[1]
GROUND = "errors arguments seeds files saving environment plots resources"
MAY_IMPORT = {
    # the ground, which all may import
    "errors seeds environment resources": "",
    "arguments files": "errors",
    "saving": "errors files",
    "plots": "errors arguments files",
    # what is asked for, where it lies, what comes out: without torch; and things that take arguments, not specs
    "specs results data models quant tensors": "",
    "store": "specs data.fingerprints",
    "derivatives": "tensors",
    "landscape": "tensors derivatives",
    "metrics": "landscape derivatives tensors results",
    # from specs to things, to runs, to measurements: `train` and `measure` meet in the store
    "watch": "landscape metrics",
    "loading": "specs store data models quant tensors",
    "train": "loading store specs data models quant tensors",
    "measure": "deploy loading store specs data quant landscape derivatives metrics results tensors",
    "deploy": "loading store specs models quant results",
    "jobs": "specs store",
    "jobs.worker": "jobs specs store train measure",  # the last two inside functions: workers alone load torch
    # how it is shown
    "report": "specs store results",
    "analysis": "specs store",
    "figure_files": "analysis report",
    "reproduce": "analysis figure_files jobs report specs store data.catalog",
    "analyses": "analysis specs store report results",
}
MAY_IMPORT = {room: allowed for rooms, allowed in MAY_IMPORT.items() for room in rooms.split()}
BY_NAME = {  # may import a module of ours whose name is computed: results, results, measurements, analyses
    "flatlab.store.runs",
    "flatlab.saving",
    "flatlab.measure.runner",
    "flatlab.reproduce",
}
ORDER = {  # inside metrics: a package imports those before it, the modules beside them all three
    "metrics.units": "",
    "metrics.flatness": "metrics.units",
    "metrics.curvature": "metrics.units",
    "metrics.surfaces": "metrics.units metrics.flatness metrics.curvature",
}
DOORS = ("api", "cli", "__main__")  # may import everything, and nothing imports them
TORCH_FREE = (
    "specs",
    "store",
    "results",
    "report",
    "plots",
    "analysis",
    "figure_files",
    "reproduce",
    "jobs.plan",
    "jobs.local",
    "jobs.slurm",
    "jobs.on_ray",
    "cli",
    "analyses",
)
LONGEST = {"function": 50, "file": 400, "package": 14, "beside": 12}


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
    name: {each for each in found if each.split(".")[0] in ("flatlab", "analyses")} - {"flatlab"}
    for name, found in IMPORTS.items()
}


def short(name):
    return name.removeprefix("flatlab.")


def within(name, row):
    """Whether a module lies in a room, or is it."""
    return f"{short(name)}.".startswith(f"{row}.")


def row_of(name, rows):
    """Return the longest row that a module lies in."""
    return max((row for row in rows if within(name, row)), key=len, default=None)


def is_door(name):
    return any(within(name, door) for door in DOORS)


RULED = [name for name in OURS if name != "flatlab" and not is_door(name)]


@pytest.mark.parametrize("name", RULED)
def test_imports_keep_to_the_plan(name):
    row = row_of(name, MAY_IMPORT)
    assert row, f"{name} has no row in the table"
    ground = [] if row in GROUND.split() else GROUND.split()
    allowed = [row.split(".")[0], *ground, *MAY_IMPORT[row].split()]
    outside = {each for each in OURS[name] if not any(within(each, one) for one in allowed)}
    assert not outside, f"{name} may not import {', '.join(sorted(outside))}"


@pytest.mark.parametrize("row", MAY_IMPORT)
def test_no_entry_of_the_table_is_idle(row):
    mine = [name for name in RULED if row_of(name, MAY_IMPORT) == row]
    assert mine, f"no module lies in {row}"
    used = {each for name in mine for each in OURS[name]}
    idle = [one for one in MAY_IMPORT[row].split() if not any(within(each, one) for each in used)]
    assert not idle, f"{row} does not import {', '.join(idle)}"


def test_modules_imported_by_name_are_listed():
    computed = re.compile(r'import_module\((?!"[a-z])')  # not of a package that is written out
    calling = {name for path, name in MODULES.items() if computed.search(path.read_text())}
    assert calling - {"flatlab"} == BY_NAME


def test_metrics_keep_their_order():
    for name in (name for name in RULED if row_of(name, ORDER)):
        row = row_of(name, ORDER)
        allowed = [row, *ORDER[row].split()]
        inside = {each for each in OURS[name] if within(each, "metrics")}
        assert all(any(within(each, one) for one in allowed) for each in inside), f"{name}: {sorted(inside)}"


def test_workers_alone_load_training_and_measuring():
    others = [name for name in RULED if within(name, "jobs") and name != "flatlab.jobs.worker"]
    assert not {each for name in others for each in OURS[name] if within(each, "train") or within(each, "measure")}


def test_no_package_imports_the_api_or_the_command_line():
    importers = {name for name, found in OURS.items() if any(is_door(each) for each in found)}
    assert all(is_door(name) for name in importers), sorted(importers)


def test_there_are_no_cycles():
    graph = {name: {each for each in found if each in IMPORTS} - {name} for name, found in OURS.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_no_module_is_a_lumber_room():
    words = {part for name in MODULES.values() for part in name.split(".")}
    assert not words & {"utils", "util", "helpers", "misc", "common"}


def functions():
    for path, name in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno
                yield f"{name}.{node.name}", node.end_lineno - node.lineno + 1


def test_functions_files_and_packages_are_small():
    lengths = dict(functions())
    assert not {name: length for name, length in lengths.items() if length > LONGEST["function"]}
    assert statistics.median(lengths.values()) <= 10
    lines = {name: len(path.read_text().splitlines()) for path, name in MODULES.items()}
    assert not {name: count for name, count in lines.items() if count > LONGEST["file"]}
    folders = [folder for folder in (ROOT / "flatlab").rglob("*") if folder.is_dir()]
    modules = {folder: [path for path in folder.glob("*.py") if path.stem != "__init__"] for folder in folders}
    assert not {name: len(paths) for name, paths in modules.items() if len(paths) > LONGEST["package"]}
    beside = [path for path in (ROOT / "flatlab").glob("*.py") if not path.stem.startswith("__")]
    assert len(beside) <= LONGEST["beside"]


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
cells = itertools.product(fig3.PRINTED, fig3.AXES, fig3.ORDER, (0.0, 0.5, 2.0), seeds)
frame = pd.DataFrame([(*cell, *seed) for *cell, seed in cells], columns=columns).assign(held_out="all")
frame = frame.assign(value=frame["radius"], low=frame["radius"] - 0.1, high=frame["radius"] + 0.1)
frame = frame.assign(rise=frame["radius"], base_loss=0.1, chance=2.3)
print(*plots.save(fig3.draw(frame, "by hand"), pathlib.Path(sys.argv[1]) / "fig3"))
"""


def without_torch(code, *arguments):
    command = [sys.executable, "-c", WITHOUT_TORCH + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plans_and_tables_work_without_torch(tmp_path):
    free = [name for name in MODULES.values() if any(within(name, room) for room in TORCH_FREE)]
    modules = "\n".join(f"import {name}" for name in free)
    without_torch(f"{modules}\nassert 'torch' not in sys.modules")
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
