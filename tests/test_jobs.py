"""Jobs: what is missing, which work belongs together, what it needs and costs."""

import pytest
from stores import ERM, GROUP, OTHER, PLACE, PROBE, PROBES, QT, RUNS, SIZES, spec

from flatlab.errors import UserError
from flatlab.jobs import plan as jobs_plan
from flatlab.jobs.plan import WorkPlan
from flatlab.jobs.worker import _in_order
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.rises import ByRise
from flatlab.store.runs import RunStore


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "store")


def _todo(store):
    return jobs_plan.missing(store, RUNS, PROBES, sizes=SIZES)


def test_missing_groups_by_trajectory(store):
    trainings = {job.runs[0]: job for job in _todo(store) if not job.measurements}
    train, other, fork, freeze = (trainings.pop(run) for run in (ERM, OTHER, QT, spec("freeze")))
    measures = [job for job in _todo(store) if job.measurements]
    assert not trainings
    assert set(train.runs) == set(GROUP)
    assert train.runs[0] == ERM  # the leader is the trajectory's own run
    assert (train.forks, train.needs) == ((6,), ())
    assert fork.needs == freeze.needs == (ERM.digest,)
    assert (other.runs, other.forks, other.needs) == ((OTHER,), (), ())
    assert [(job.runs, job.needs) for job in measures] == [((ERM,), (ERM.digest,)), ((QT,), (QT.digest,))]
    assert [len(job.measurements) for job in measures] == [2, 1]


def test_the_longest_comes_first_and_what_others_need(store):
    todo = _todo(store)
    needed = [todo.index(job) for job in todo if job.forks]
    assert needed == [0]
    assert [bool(job.measurements) for job in todo] == sorted(bool(job.measurements) for job in todo)


def test_one_measurement_of_each_kind_is_tried_first_and_the_rest_keeps_its_order(store):
    todo = _todo(store)
    tried = _in_order(todo)
    measures = [job for job in todo if job.measurements]
    early = list({job.kind: job for job in reversed(measures)}.values())
    assert set(tried[: len(early)]) == set(early) and len(early) >= 1
    assert tried[len(early) :] == [job for job in todo if job not in early]


def test_all_pilots_are_tried_before_the_trainings(store):
    measured = SphereSpec(radii=ByRise(rises=(0.1,), references=(ERM.digest, OTHER.digest)))
    todo = jobs_plan.missing(store, RUNS, [(run, measured) for run in (ERM, OTHER, QT)], sizes=SIZES)
    tried = [job.kind[0] for job in _in_order(todo)]
    assert tried.count("pilot") == 2 and set(tried[:3]) == {"pilot", "measure"} and tried[3] == "train"


def test_the_leader_does_not_depend_on_the_order(store):
    for asked in (RUNS, RUNS[::-1]):
        groups = [job.runs for job in jobs_plan.missing(store, asked, [], sizes=SIZES) if len(job.runs) > 1]
        assert [[run.average.kind for run in group] for group in groups] == [["last", "sma", "swa", "swad"]]


def test_nothing_is_missing_when_all_is_done(store):
    assert jobs_plan.missing(store, [], [], sizes=SIZES) == []
    for job in _todo(store):
        for entry in job.entries(store):
            entry.create()
            entry.finish()
    assert _todo(store) == []


def test_what_is_done_already_is_left_out_and_not_waited_for(store):
    store.run(ERM).create()
    store.run(ERM).finish()
    todo = {job.runs: job for job in _todo(store)}
    assert (tuple(GROUP[i] for i in (3, 1, 2)) in todo, (ERM,) in todo) == (True, True)
    assert todo[(ERM,)].measurements
    assert todo[(ERM,)].needs == ()


def test_probes_bring_their_runs(store):
    train, measurement = jobs_plan.missing(store, [], [(ERM, PROBE)], sizes=SIZES)
    assert train.runs == (ERM,)
    assert measurement.needs == (ERM.digest,)


def test_forks_are_written_under_a_claim(store):
    train, fork = jobs_plan.missing(store, [spec("SWA"), QT], [], sizes=SIZES)
    assert (train.runs, train.forks, fork.needs) == ((spec("SWA"),), (6,), (spec("SWA").digest,))
    assert [entry.spec for entry in train.claims(store)] == [spec("SWA"), ERM]
    assert [entry.spec for entry in fork.claims(store)] == [QT]


def test_a_child_without_its_parent_trains_alone(store):
    (job,) = jobs_plan.missing(store, [QT], [], sizes=SIZES)
    assert (job.needs, job.forks) == ((), ())
    assert jobs_plan.missing(store, [ERM, QT.replace(switch=0)], [], sizes=SIZES)[1].needs == ()  # nothing to share


def test_a_state_that_was_kept_costs_nothing_again(store):
    (whole,) = jobs_plan.missing(store, [QT], [], sizes=SIZES)
    kept = store.run(ERM).state(f"fork-{QT.switch}")
    kept.parent.mkdir(parents=True)
    kept.touch()
    (rest,) = jobs_plan.missing(store, [QT], [], sizes=SIZES)
    assert rest.passes == jobs_plan.training_passes(QT, SIZES, forked=True) < whole.passes


def test_costs(store):
    assert all(job.passes > 0 for job in _todo(store))
    alone, forked = (jobs_plan.training_passes(QT, SIZES, forked=forked) for forked in (False, True))
    before = jobs_plan.training_passes(ERM.replace(steps=QT.switch - 1), SIZES, forked=False)
    assert forked + before == pytest.approx(alone)
    (_, pair), (_, one), (_, two) = [
        jobs_plan.missing(store, [], [(ERM, measurement) for measurement in measurements], sizes=SIZES)
        for measurements in ([PROBE, PROBE.replace(seed=1)], [PROBE], [PROBE.replace(seed=1)])
    ]
    assert pair.passes == one.passes + two.passes == 2 * 4 * 8 * 25


def test_seconds_are_measured_where_something_ran(store):
    own, other = ("digits-cnn", 16), ("resnet50", 224)
    reference = "a reference machine's; yours may differ severalfold"
    assert jobs_plan.seconds_per_pass(store, [own, other]) == {own: (3e-5, reference), other: (9e-2, reference)}
    for seed in (0, 1):
        run = store.run(spec(seed=seed))
        run.create()
        run.note(passes=1000.0, sessions=[{"seconds": 10.0}, {"seconds": 20.0}])
        run.finish()
    measured = {own: (0.03, "measured in this store"), other: (9e-2, reference)}
    assert jobs_plan.seconds_per_pass(store, [own, other]) == measured


@pytest.mark.parametrize(
    ("larger", "expected"),
    [([], 3e-5), ([(5e5, 20.0)], 4e-5), ([(5e5, 20.0), (4e5, 16.0)], 4e-5), ([(1e5, 1.0)], 1e-5)],
)
def test_tiny_jobs_do_not_tell_the_seconds_of_a_pass(store, larger, expected):
    tiny = [(5207.4, 0.7)] * 3
    for seed, (passes, seconds) in enumerate([*tiny, *larger]):
        run = store.run(spec(seed=seed))
        run.create()
        run.note(passes=passes, sessions=[{"seconds": seconds}])
        run.finish()
    ((found, source),) = jobs_plan.seconds_per_pass(store, [("digits-cnn", 16)]).values()
    assert found == pytest.approx(expected) and (source == "measured in this store") == bool(larger)


def test_a_plan_is_read_back_as_it_was_written(store):
    plan = WorkPlan(store=str(store.root), place=PLACE, jobs=tuple(_todo(store)))
    assert WorkPlan.parse(plan.canonical()) == plan


def test_an_imported_run_that_is_gone_is_not_trained(tmp_path):
    with pytest.raises(UserError, match="imported, not trained here"):
        jobs_plan.missing(RunStore(tmp_path), [ERM.replace(source="sha256:0")], [], sizes=SIZES)
