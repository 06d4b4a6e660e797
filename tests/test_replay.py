"""Checkpoints along a training, and averages replayed on them: against the runs that trained with those averages."""

from functools import partial

import numpy as np
import pytest
from commandline import call, documented, only_run
from stores import (
    ERM,
    GROUP,
    LAST,
    PLACE,
    QT,
    SIZES,
    SWITCH,
    content,
    forkserver,
    refuses,
    run_child,
    spec,
    trained,
    watch,
)

from flatlab import files
from flatlab.jobs import plan as jobs_plan
from flatlab.specs.run import AverageSpec
from flatlab.store.runs import RunStore
from flatlab.train.loop import train
from flatlab.train.replay import replay

AVERAGES = ("SWA", "SMA", "SWAD")


def keeping(root, specs, every, **more):
    store = RunStore(root)
    train(specs, store, PLACE, keep_every=every, **more)
    return store


def of(trajectory):
    """The runs that average a trajectory, by method."""
    return {name: trajectory.replace(average=spec(name).average) for name in AVERAGES}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """ERM with each iterate kept, beside the runs that averaged it while it was trained."""
    return keeping(tmp_path_factory.mktemp("kept"), GROUP, 1)


TRAJECTORIES = {
    "ERM": ERM,
    "QT-DoG": QT,
    "INQ": spec("INQ"),
    "SAM, statistics frozen": spec("SAM", freeze_batchnorm=True),
}


@pytest.mark.parametrize("trajectory", TRAJECTORIES.values(), ids=TRAJECTORIES)
def test_with_each_iterate_kept_an_average_is_that_of_its_own_training_to_the_byte(trajectory, tmp_path, store):
    wanted = of(trajectory)
    actual = store if trajectory == ERM else trained(tmp_path / "actual", *wanted.values())
    kept = store if trajectory == ERM else keeping(tmp_path / "kept", [trajectory], 1)
    found = replay(kept.run(trajectory), {name: run.average for name, run in wanted.items()}, PLACE)
    assert found.every == 1
    for name, run in wanted.items():
        theirs, facts = files.load_arrays(actual.run(run).checkpoint("selected"))
        ours = found.averages[name]
        assert ours.weights.keys() == theirs.keys() and ours.row["step"] == facts["step"]
        for key, value in ours.weights.items():
            assert value.contiguous().numpy().tobytes() == theirs[key].tobytes(), (name, key)
        row = next(row for row in actual.run(run).rows() if row["step"] == facts["step"])
        assert {field: row[field] for field in ours.row} == ours.row
        if name == "SWAD":
            assert ours.valley.items() <= row["valley"].items()


def test_any_run_of_the_trajectory_shows_what_was_kept(store):
    for run in GROUP:
        assert list(store.run(run).kept()) == list(range(LAST + 1))
    ours = replay(store.run(GROUP[2]), {"SWA": GROUP[1].average}, PLACE).averages["SWA"]
    theirs, _ = files.load_arrays(store.run(GROUP[1]).checkpoint("selected"))
    assert all(np.array_equal(value.numpy(), theirs[key]) for key, value in ours.weights.items())


@pytest.mark.slow
def test_of_each_third_checkpoint_the_mean_is_that_of_these(tmp_path, store):
    kept = keeping(tmp_path, [ERM], 3).run(ERM)
    assert list(kept.kept()) == [0, 3, 6, 9, 12]
    rules = {"SWA": AverageSpec(kind="swa", start=4, every=2), "rare": AverageSpec(kind="swa", start=1, every=5)}
    rules |= {"SMA": AverageSpec(kind="sma", start=6), "SWAD": spec("SWAD").average.replace(every=4)}
    found = replay(kept, rules, PLACE)
    told = {name: (each.first, each.last, each.every) for name, each in found.averages.items()}
    assert found.every == 3 and told["SWA"] == (6, 12, 3) and told["rare"] == (3, 12, 6)
    assert list(found.losses) == [0, 6, 12]  # each four steps become each six
    iterates = {step: files.load_arrays(path)[0] for step, path in store.run(ERM).kept().items()}
    for name, steps in {"SWA": (6, 9, 12), "rare": (3, 9)}.items():
        mean = np.mean([iterates[step]["head.weight"] for step in steps], axis=0)
        np.testing.assert_allclose(found.averages[name].weights["head.weight"].numpy(), mean, rtol=1e-5, atol=1e-7)


def test_keeping_changes_no_byte_and_counts_in_none(tmp_path, store):
    plain = trained(tmp_path, *GROUP)
    for run in GROUP:
        assert content(plain.run(run)) == content(store.run(run)) and not plain.run(run).kept()
    assert not store.faults()


def test_only_what_the_averages_see_is_kept(tmp_path):
    forked = keeping(tmp_path, [ERM], 4, forks={SWITCH})
    train([QT], forked, PLACE, keep_every=4)
    assert list(forked.run(QT).kept()) == [8, 12] and list(forked.run(ERM).kept()) == [0, 4, 8, 12]


def _keep(root, tally, *death):
    watch(tally, *death)
    train(GROUP[1:], RunStore(root), PLACE, keep_every=2)


@pytest.mark.slow
def test_kept_checkpoints_are_whole_after_kills_at_any_point(tmp_path, store):
    """ERM itself is not trained: what is kept lies in its folder all the same."""
    forkserver()
    root, tally = tmp_path / "killed", tmp_path / "tally"
    start = partial(run_child, _keep, root, tally)
    for death in [("step", 4), ("sync", 13), ("rename", 17), ("sync", 22), ("step", 3)]:
        assert start(*death) == -9
        for step, path in RunStore(root).run(ERM).kept().items():
            assert path.read_bytes() == store.run(ERM).kept()[step].read_bytes()
    assert start() == 0
    killed = RunStore(root)
    assert list(killed.run(ERM).kept()) == list(range(0, LAST + 1, 2))
    for step, path in killed.run(ERM).kept().items():
        assert path.read_bytes() == store.run(ERM).kept()[step].read_bytes()
    for run in GROUP[1:]:
        assert content(killed.run(run)) == content(store.run(run))


def test_what_was_not_kept_is_a_sentence(tmp_path, store):
    plain = trained(tmp_path, ERM)
    told = (f"flatlab runs rm {ERM.digest[:8]}", "train it again with --keep-every N", "the same bytes")
    refuses(lambda: replay(plain.run(ERM), {}, PLACE), *told)
    todo = jobs_plan.missing(plain, [ERM, QT], [], sizes=SIZES)
    refuses(
        lambda: jobs_plan.keeping(todo, plain, [ERM], 5), ERM.digest, "no checkpoint every 5 steps", "--keep-every 5;"
    )
    assert [job.keep_every for job in jobs_plan.keeping(todo, plain, [QT], 5)] == [5]
    assert jobs_plan.keeping([], store, [ERM], 5) == []  # they are there
    refuses(lambda: replay(plain.run(QT), {}, PLACE), "is not finished")
    derived, joint = spec("RTN"), ERM.replace(members=(ERM, QT))
    for run in (derived, joint):
        refuses(lambda run=run: replay(plain.run(run), {}, PLACE), "was not trained and has no iterates")
    gone = keeping(tmp_path / "gone", [ERM], 4).run(ERM)
    gone.kept()[8].unlink()
    refuses(lambda: replay(gone, {}, PLACE), *told)


@pytest.mark.slow
def test_the_command_says_what_each_average_is_of_and_draws_it(tmp_path, capsys):
    words = ("--store", tmp_path / "runs", "--json")
    tiny = ("--setting", "smoke", "--held-out", "rot0", "--seeds", "1", "--steps", "24")
    assert call("train", *tiny, "--keep-every", "2", *words) == 0
    digest = only_run(tmp_path / "runs")
    capsys.readouterr()
    assert call("replay", digest[:8], "--setting", "smoke", "--out", tmp_path / "out", *words) == 0
    answer = capsys.readouterr()
    rows = {row["average"]: row for row in documented("replay", answer.out)}
    assert list(rows) == ["as trained", *AVERAGES]
    assert rows["SWA"]["steps"] == "14 to 24, each 2"
    own = RunStore(tmp_path / "runs").find(digest).rows()
    best = max(own, key=lambda row: row["validation"])
    assert rows["as trained"]["steps"] == f"at {best['step']}"
    assert rows["as trained"]["validation"] == pytest.approx(best["validation"], rel=1e-14)  # JSON has 15 digits
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"replay.csv", "replay.pdf", "replay.png"}
    assert call("replay", digest[:8], "--setting", "smoke", "--out", tmp_path / "out", *words[:2]) == 0
    said = capsys.readouterr()
    assert "checkpoints that were kept, each 2 steps" in " ".join((said.out + said.err).split())
    assert call("train", *tiny, "--keep-every", "5", *words) == 2
    assert "kept no checkpoint every 5 steps" in capsys.readouterr().err
    assert call("train", *tiny, "--keep-every", "0", *words) == 2
