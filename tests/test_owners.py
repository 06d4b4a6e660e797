"""Each file of a store names its owner: an intact file of another run, measurement or role is refused in a sentence."""

import itertools
import json
import shutil
import subprocess
import sys

import pytest
from stores import GROUP, PLACE, PROBE, copied, refuses, spec, trained

from flatlab import environment, files
from flatlab.loading import checkpoint
from flatlab.measure.runner import measure
from flatlab.report import tables
from flatlab.train.derived import join
from flatlab.train.loop import train

RUN, OTHER = GROUP[0], GROUP[3]
SECOND = PROBE.replace(seed=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of two runs with kept checkpoints, both measured alike, and one of them once more."""
    store = trained(tmp_path_factory.mktemp("made"), RUN, OTHER, forks={6})
    for run, measurement in ((RUN, PROBE), (RUN, SECOND), (OTHER, PROBE)):
        measure(store.run(run), measurement, PLACE)
    return store


@pytest.fixture
def store(made, tmp_path):
    return copied(made, tmp_path / "store")


def _swap(one, other):
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _relative(store, path):
    return path.relative_to(store.root).as_posix()


def test_results_of_two_runs(store):
    mine, theirs = (store.run(run).measurement(PROBE).result for run in (RUN, OTHER))
    _swap(mine, theirs)
    wanted = [("a", run, PROBE) for run in (RUN, OTHER)]
    words = ("belongs to another run or measurement", _relative(store, theirs), _relative(store, mine))
    refuses(lambda: tables.flatness(store, wanted), mine, *words, "Restore the right file")
    faults = store.faults()
    assert [str(path) in fault for path, fault in zip(sorted([mine, theirs]), faults, strict=True)] == [True, True]


def test_results_of_two_measurements_of_a_run(store):
    mine, theirs = (store.run(RUN).measurement(measurement).result for measurement in (PROBE, SECOND))
    _swap(mine, theirs)
    refuses(lambda: store.run(RUN).result(PROBE), mine, _relative(store, theirs))


def test_files_that_were_written_again_after_the_end(store):
    run, place = store.run(RUN), store.run(RUN).checkpoint("selected")
    result = run.measurement(PROBE).result
    for path, read in (
        (place, lambda: checkpoint.network(run, "selected", PLACE)),
        (result, lambda: run.result(PROBE)),
    ):
        read()
        arrays, facts = files.load_arrays(path)
        files.save_arrays(path, {name: 3 * each for name, each in arrays.items()}, facts)  # intact, and of this owner
        refuses(read, path, "its hash is not the recorded one")


@pytest.mark.parametrize("other", [(OTHER, "selected"), (RUN, "last")], ids=["another run's", "another role's"])
def test_checkpoints(store, other):
    mine, theirs = store.run(RUN).checkpoint("selected"), store.run(other[0]).checkpoint(other[1])
    _swap(mine, theirs)
    words = (mine, "belongs to another run", _relative(store, theirs), _relative(store, mine))
    refuses(lambda: checkpoint.network(store.run(RUN), "selected", PLACE), *words)
    refuses(lambda: measure(store.run(RUN), PROBE.replace(seed=2), PLACE), *words)


def test_units(store):
    mine, theirs = (sorted(store.run(run).measurement(PROBE).path.glob("unit-*"))[0] for run in (RUN, OTHER))
    assert mine.name == theirs.name
    (mine.parent / "done").unlink()
    shutil.copy(theirs, mine)
    refuses(lambda: measure(store.run(RUN), PROBE, PLACE), mine, _relative(store, theirs))


def test_states(store):
    child = spec("QT-DoG", seed=1)
    trained(store.root / "x", child.parent, forks={6})
    other = store.run(child.parent)
    other.create()
    shutil.copy(store.run(RUN).state("fork-6"), other.state("fork-6"))
    refuses(lambda: train([child], store, PLACE), other.state("fork-6"), RUN.digest, child.parent.digest)


@pytest.mark.parametrize("name", ["log.jsonl", "done", "provenance.json"])
def test_texts(store, name):
    mine, theirs = (store.run(run).path / name for run in (RUN, OTHER))
    _swap(mine, theirs)
    read = {"log.jsonl": store.run(RUN).rows, "done": store.run(RUN).hashes}
    refuses(read.get(name, lambda: store.run(RUN).provenance), mine, *([] if name == "log.jsonl" else [OTHER.digest]))
    assert any(str(mine) in fault for fault in store.faults())


def test_a_log_that_goes_on_is_checked_too(store):
    mine, theirs = (store.run(run).path / "log.jsonl" for run in (RUN, OTHER))
    (mine.parent / "done").unlink()
    shutil.copy(theirs, mine)
    refuses(store.run(RUN).rows, mine, OTHER.digest)
    mine.write_text(mine.read_text().replace('"step": 4', '"step": 5'))
    refuses(store.run(RUN).rows, mine, "is damaged")


def test_a_folder_under_another_name(store):
    for run in (RUN, OTHER):
        store.run(run).path.rename(store.root / f"{run.digest}-old")
    (store.root / f"{OTHER.digest}-old").rename(store.run(RUN).path)
    refuses(store.run(RUN).rows, "done", OTHER.digest, RUN.digest)
    refuses(lambda: checkpoint.network(store.run(RUN), "last", PLACE), OTHER.digest, RUN.digest)


def test_a_store_can_be_moved(made, tmp_path):
    folder = tmp_path / ("0" * 16) / "runs"
    folder.parent.mkdir()
    assert copied(made, folder).faults() == []


def test_owners_are_all_different(made):
    paths = [path for path in made.root.rglob("*") if path.is_file() and path.name not in ("spec.json", ".lock")]
    owners = [files.owner_of(path) for path in paths if path.suffix != ".lock"]
    assert all(owners) and len(set(owners)) == len(owners)
    for one, other in itertools.islice(itertools.permutations(made.root.rglob("*.safetensors"), 2), 40):
        assert files.owner_of(one) != files.owner_of(other)


# --- the machine


def test_the_machine_is_recorded(made):
    facts = made.run(RUN).provenance["machine"]
    assert {"processor", "instructions", "cpu_capability", "torch", "commit"} <= facts.keys()
    assert facts["processor"] not in ("", environment.platform.machine()) or not files.Path("/proc/cpuinfo").exists()
    assert made.run(RUN).measurement(PROBE).provenance["machine"] == facts
    code = "import json, sys; from flatlab import environment; print(json.dumps(environment.facts()))"
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bare = json.loads(done.stdout)
    assert bare == {name: value for name, value in facts.items() if name != "cpu_capability"}


def test_only_tracked_files_of_the_package_change_the_commit(tmp_path, monkeypatch):
    def git(*words):
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", "-C", tmp_path, *author, *words], capture_output=True, text=True, check=True)

    for name in ("flatlab/__init__.py", "analyses/fig3.py", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    commit = git("rev-parse", "HEAD").stdout.strip()
    monkeypatch.setattr(environment.flatlab, "__file__", str(tmp_path / "flatlab" / "__init__.py"))
    (tmp_path / "README.md").write_text("changed")
    (tmp_path / "flatlab" / "new.py").write_text("untracked")
    (tmp_path / "figures").mkdir()
    assert environment.commit() == commit
    for name in ("flatlab/__init__.py", "analyses/fig3.py"):
        (tmp_path / name).write_text("changed")
        assert environment.commit() == f"{commit}+changes"
        (tmp_path / name).write_text("")


def test_a_member_that_was_written_again_makes_no_ensemble(store):
    path = store.run(RUN).checkpoint("selected")
    arrays, facts = files.load_arrays(path)
    files.save_arrays(path, {name: 3 * each for name, each in arrays.items()}, facts)
    both = RUN.replace(members=(RUN, RUN))
    refuses(lambda: join(both, store, PLACE), path, "its hash is not the recorded one")


def test_files_in_the_folder_of_the_trajectory_are_read(made):
    run = made.run(OTHER)  # an average of RUN's iterates
    assert run.lineage.path != run.path
    assert run.arrays(run.lineage.checkpoint("selected"))[0]
