"""Runs by the name of their method: which they are, and what is said where that is not one."""

import re

import pytest

from flatlab.cli.choices import Choices
from flatlab.cli.parse import means, named
from flatlab.errors import UserError
from flatlab.specs.methods import METHODS, compose, name_of
from flatlab.specs.settings import SMOKE
from flatlab.store.runs import RunStore


def spec_of(name, held_out="rot0", seed=0):
    return compose(METHODS[name], SMOKE, held_out=held_out, seed=seed, trial_seed=seed)


@pytest.fixture
def store(tmp_path):
    """A store of finished runs, as far as a look at their specs goes."""
    found = RunStore(tmp_path)
    for name in ("ERM", "QT-DoG"):
        for held_out in ("rot0", "rot45"):
            for seed in (0, 1):
                run = found.run(spec_of(name, held_out, seed))
                run.create()
                (run.path / "done").write_text("{}")
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_method_s_name_means_its_runs_alone(name):
    assert [other for other in METHODS if means(name, spec_of(other))] == [name]
    assert means(name.upper(), spec_of(name))


@pytest.mark.parametrize("name", [name for name, parts in METHODS.items() if not parts.members])
def test_a_run_is_named_by_its_method(name):
    spec = spec_of(name)
    assert name_of(spec) == name
    assert name_of(spec.replace(members=(spec, spec.replace(seed=1)))) == f"2 x {spec.label}"


def test_a_composition_s_name_means_it():
    spec = compose(METHODS["SAM"], SMOKE, held_out="rot0", seed=0, trial_seed=0)
    both = spec.replace(average=spec_of("SWAD").average)
    assert means("SAM-SWAD", both) and not means("SAM", both) and not means("sam-swad", spec)


def test_names_narrowed_down(store):
    found = named(store, ["ERM", "qt-dog"], held_out="rot45", seed=1)
    assert [run.spec for run in found] == [spec_of("ERM", "rot45", 1), spec_of("QT-DoG", "rot45", 1)]
    assert named(store, ["ERM"], held_out="3", seed=1)[0].path == found[0].path
    assert [run.spec for run in named(store, ["ERM"], held_out="rot45")] == [spec_of("ERM", "rot45", 0)]
    digest = spec_of("ERM").digest
    assert [run.spec.digest for run in named(store, [digest[:10]])] == [digest]


def test_other_seeds_of_a_name_are_told(store, capsys):
    notes = []
    (run,) = named(store, ["ERM"], held_out="rot45", note=notes.append)
    (note,) = notes
    assert note == (
        f"ERM is run {run.spec.digest[:8]} (rot45, seed 0); there are others of that name (seed 1): select with --seed."
    )
    named(store, ["ERM"], held_out="rot45", seed=1, note=notes.append)
    named(store, [run.spec.digest], note=notes.append)
    assert len(notes) == 1
    assert Choices(store=store.root, held_out="rot45").found(["QT-DoG"])[0].spec.seed == 0
    assert "QT-DoG is run" in capsys.readouterr().err


def test_what_is_not_one_run_is_refused(store):
    with pytest.raises(UserError, match=r"ERM names 2 runs .*rot0, seed 0.*with --held-out or by its digest") as told:
        named(store, ["ERM"])
    assert len(re.findall(r"[0-9a-f]{8} \(", str(told.value))) == 2
    with pytest.raises(UserError, match=r"No run of SAM"):
        named(store, ["SAM"])
    with pytest.raises(UserError, match=r"'QT-DGo'; did you mean QT-DoG"):
        named(store, ["QT-DGo"])
    with pytest.raises(UserError, match=r"--held-out and --seed .* digests"):
        named(store, [spec_of("ERM").digest], seed=1)


def test_runs_of_one_name_are_told_with_what_sets_them_apart(store):
    for steps in (3, 5):
        other = compose(METHODS["SAM"], SMOKE.replace(steps=steps), held_out="rot0", seed=0, trial_seed=0)
        store.run(other).create()
        (store.run(other).path / "done").write_text("{}")
    with pytest.raises(UserError, match=r"SAM names 2 runs .*\(rot0, seed 0, .*steps 3.*steps 5.*one by its digest"):
        named(store, ["SAM"])


def test_a_run_that_only_keeps_things_for_others_is_none(store):
    run = store.run(spec_of("ERM", "rot15"))
    run.create()
    (run.path / "kept").mkdir()
    (run.path / "kept" / "step-0.safetensors").write_text("")
    assert run.lends
    with pytest.raises(UserError, match="No run of ERM"):
        named(store, ["ERM"], held_out="rot15")


def test_a_misspelt_option_fails():
    assert Choices(dry_run=True).dry_run and not Choices().dry_run
    with pytest.raises(AttributeError, match="dryrun"):
        Choices().dryrun  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(TypeError, match="dryrun"):
        Choices(dryrun=True)  # type: ignore[call-arg]
