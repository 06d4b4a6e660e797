"""The time left is within a factor of 1.5 after the first fifth of the work, whatever the mix of jobs."""

import heapq

import pytest

from flatlab.jobs.plan import Job
from flatlab.jobs.timeleft import TimeLeft
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.run import RunSpec

SPEC = RunSpec(dataset="digits", held_out="rot0", image_size=16, model="digits-cnn", steps=1, eval_every=1, lr=1.0)
PROBE = SphereSpec(radii=(1.0,))


def job(name, passes, *, measures=False):
    return Job(name=name, runs=(SPEC,), measurements=(PROBE,) if measures else (), passes=passes)


def mix(kinds):
    """Return jobs and the seconds that each takes: (name, how many, passes, seconds of a pass)."""
    found = {}
    for name, count, passes, pace in kinds:
        for index in range(count):
            made = job(f"{name} on rot{index}, seed 0", passes * (1 + 0.1 * (index % 3)), measures="measure" in name)
            found[made] = made.passes * pace
    return found


MIXES = {
    "one kind": [("train erm", 10, 100, 0.1)],
    "slow methods last": [("train erm", 6, 100, 0.1), ("train sam", 6, 200, 0.12), ("train lsq", 6, 100, 0.2)],
    "measuring is cheaper": [("train erm", 8, 100, 0.2), ("measure erm", 12, 300, 0.05)],
    "mixed order": [("measure erm", 5, 50, 0.5), ("train erm", 5, 300, 0.1), ("measure lsq", 10, 50, 0.5)],
}


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("name", MIXES)
def test_within_a_factor_once_each_kind_was_seen(name, workers):
    """Simulated workers take the jobs in order, interleaved, so that each kind is met in the first fifth."""
    seconds = mix(MIXES[name])
    kinds = {}
    for each in seconds:
        kinds.setdefault(each.name.partition(" on ")[0], []).append(each)
    queue = [each for row in zip_all(*kinds.values()) for each in row]
    now = 0.0
    clock = TimeLeft(list(seconds), workers=workers, now=lambda: now)
    told, busy = [], []

    def begin():
        if queue:
            each = queue.pop(0)
            clock.on_event(each.name, 0.0, over=False)
            heapq.heappush(busy, (now + seconds[each], now, each.name))

    for _ in range(workers):
        begin()
    while busy:
        end, begun, name_ = heapq.heappop(busy)
        now = end
        for stop, start, other in busy:
            clock.on_event(other, (now - start) / (stop - start), over=False)
        clock.on_event(name_, 1.0, over=True)
        begin()
        told.append((now, clock.left()))
    assert told[-1][1] == 0 and clock.done() == pytest.approx(1)
    for moment, left in told:
        if 0.2 * now <= moment <= 0.9 * now:  # of the last tenth, the longest job decides
            assert (now - moment) / 1.5 <= left <= (now - moment) * 1.5, (moment / now, left, now - moment)


def zip_all(*rows):
    return [[row[i] for row in rows if i < len(row)] for i in range(max(map(len, rows)))]


def test_nothing_is_said_before_anything_is_timed():
    clock = TimeLeft([job("train erm on rot0, seed 0", 10)], workers=1)
    assert clock.left() is None
    clock.on_event("train erm on rot0, seed 0", 0.0, over=False)
    assert clock.left() is None


def test_what_a_resumed_job_had_done_is_not_counted_as_fast():
    now = 0.0
    names = [f"train erm on rot{index}, seed 0" for index in range(2)]
    clock = TimeLeft([job(name, 100) for name in names], workers=1, now=lambda: now)
    clock.on_event(names[0], 0.9, over=False)
    now = 1.0
    clock.on_event(names[0], 1.0, over=True)
    assert clock.left() == pytest.approx(10)


def test_a_machine_that_has_become_slower_is_noticed():
    now, jobs = 0.0, [job(f"train erm on rot{index}, seed 0", 100) for index in range(40)]
    clock = TimeLeft(jobs, workers=1, now=lambda: now)
    for index, each in enumerate(jobs[:30]):
        clock.on_event(each.name, 0.0, over=False)
        now += 0.01
        clock.on_event(each.name, 0.01, over=False)
        now += 1.0 if index < 20 else 3.0
        clock.on_event(each.name, 1.0, over=True)
    assert clock.left() == pytest.approx(10 * 3.0, rel=0.1)
