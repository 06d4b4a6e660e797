"""Workers: jobs are shared by any number of processes, and what goes wrong is said in a sentence."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from stores import ERM, OTHER, PLACE, PROBE, PROBES, QT, RUNS, SIZES, child, content, forkserver, trained

from flatlab import files
from flatlab.data.batches import TrainingStream
from flatlab.errors import UserError
from flatlab.jobs import local
from flatlab.jobs import plan as jobs_plan
from flatlab.jobs import worker as jobs_worker
from flatlab.jobs.plan import Job, WorkPlan
from flatlab.measure.runner import measure
from flatlab.store.runs import RunStore


@pytest.fixture(scope="module", autouse=True)
def server():
    forkserver()


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "store")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The store that one undisturbed worker makes."""
    store = RunStore(tmp_path_factory.mktemp("whole"))
    assert _errors(_work(store)) == {}
    return store


def _todo(store):
    return jobs_plan.missing(store, RUNS, PROBES, sizes=SIZES)


def _work(store, todo=None):
    events = []
    jobs_worker.work(_todo(store) if todo is None else todo, store, PLACE, emit=events.append)
    return events


def _errors(events):
    return {event["job"]: event["error"] for event in events if "error" in event}


def _contents(store):
    return {entry.path.name: content(entry) for run in store.runs() for entry in (run, *run.measurements())}


# --- many workers


def _worker(root, tally, barrier):
    do = jobs_worker._do

    def counted(job, *rest):
        with open(tally, "a") as file:
            file.write(f"{job.name}\n")
        do(job, *rest)

    jobs_worker._do = counted
    store = RunStore(root)
    barrier.wait()
    assert _errors(_work(store)) == {}


@pytest.mark.slow
def test_two_workers_share_the_jobs(store, whole, tmp_path):
    barrier = multiprocessing.get_context("forkserver").Barrier(2)
    todo = _todo(store)
    workers = [child(_worker, store.root, tmp_path / "tally", barrier) for _ in range(2)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    tally = (tmp_path / "tally").read_text().splitlines()
    assert set(tally) == {job.name for job in todo}
    assert sorted(name for name in tally if name.startswith("train")) == sorted(
        j.name for j in todo if not j.measurements
    )
    assert _contents(store) == _contents(whole)


def _hold(root, held):
    with RunStore(root).run(ERM).claim():
        held.set()
        signal.pause()


@pytest.mark.slow
def test_a_killed_worker_lets_go(store):
    held = multiprocessing.get_context("forkserver").Event()
    holder = child(_hold, store.root, held)
    assert held.wait(30)
    with store.claim([store.run(QT), store.run(ERM)]) as free:
        assert not free
    with store.run(QT).claim() as free:
        assert free  # one that is held lets the others go
    holder.kill()
    holder.join(30)
    with store.run(ERM).claim() as free:
        assert free


COMMAND = """
import sys
from flatlab.jobs.local import run_locally
from flatlab.errors import UserError
from flatlab.jobs.plan import WorkPlan
run_locally(WorkPlan.parse(open(sys.argv[1]).read()), workers=1, on_event=lambda event: print(event, flush=True))
"""


def _endless(store, path):
    """Write a plan that nobody sees the end of; return its run."""
    endless = ERM.replace(steps=10**7, eval_every=10**7)
    todo = jobs_plan.missing(store, [endless], [], sizes=SIZES)
    path.write_text(WorkPlan(store=str(store.root), place=PLACE, jobs=tuple(todo)).canonical())
    return endless


def test_a_worker_ends_when_its_input_is_closed(store, tmp_path):
    _endless(store, tmp_path / "plan")
    command = [sys.executable, "-m", "flatlab.jobs.worker", str(tmp_path / "plan"), "--end-with-input"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdin.close()
        while process.stdout.readline():  # it is read to its end: no broken pipe ends the worker
            pass
        assert process.wait(30) == 1


@pytest.mark.slow
def test_a_worker_needs_no_terminal_and_ends_on_a_term_signal_with_its_state_saved(store, tmp_path):
    endless = _endless(store, tmp_path / "plan")
    command = [sys.executable, "-m", "flatlab.jobs.worker", str(tmp_path / "plan")]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() and process.stdout.readline()  # it goes on: two events
        process.terminate()
        process.stdout.read()
        assert process.wait(60) == 143
    run = store.run(endless)
    assert files.load_arrays(run.state("resume"))[1]["next_step"] > 1
    (session,) = run.provenance["sessions"]
    assert session["to_step"] == files.load_arrays(run.state("resume"))[1]["next_step"]
    with run.claim() as free:
        assert free


@pytest.mark.slow
def test_a_worker_without_a_terminal_finishes_its_plan(store, tmp_path):
    short = ERM.replace(steps=1, eval_every=1)
    todo = jobs_plan.missing(store, [short], [], sizes=SIZES)
    (tmp_path / "plan").write_text(WorkPlan(store=str(store.root), place=PLACE, jobs=tuple(todo)).canonical())
    command = [sys.executable, "-m", "flatlab.jobs.worker", str(tmp_path / "plan")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0 and '"finished": true' in done.stdout
    assert store.run(short).done


LOSING = """#!/bin/sh
if mkdir "{folder}/first" 2> /dev/null; then kill -9 $$; fi
while [ ! -d "{folder}/first" ]; do sleep 0.1; done
echo '{{"job": "{job}", "finished": {finished}}}'
"""


@pytest.mark.parametrize("finished", ["true", "false"])
def test_a_lost_worker_is_no_error_where_others_finished_its_jobs(store, tmp_path, monkeypatch, finished):
    todo = jobs_plan.missing(store, [ERM], [], sizes=SIZES)
    script = tmp_path / "python"
    script.write_text(LOSING.format(folder=tmp_path, job=todo[0].name, finished=finished))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    heard = []
    plan = WorkPlan(store=str(store.root), place=PLACE, jobs=tuple(todo))
    errors = local.run_locally(plan, workers=2, on_event=heard.append)
    notes = [event["note"] for event in heard if "note" in event]
    if finished == "true":
        assert errors == [] and len(notes) == 1 and "A worker was lost: it was killed" in notes[0]
    else:
        assert len(errors) == 1 and "it was killed" in errors[0]["error"] and notes == []


def test_workers_end_with_the_command_that_started_them(store, tmp_path):
    endless = _endless(store, tmp_path / "plan")
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "plan")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()  # the worker has begun
        with store.run(endless).claim() as free:
            assert not free
        process.kill()
    with FileLock(store.run(endless).path / ".lock").acquire(timeout=30):
        assert not store.run(endless).done


@pytest.mark.slow
def test_local_workers(store, whole):
    heard = []
    plan = WorkPlan(store=str(store.root), place=PLACE, jobs=tuple(_todo(store)))
    assert local.run_locally(plan, workers=2, on_event=heard.append) == []
    assert {event["job"] for event in heard if event.get("finished")} == {job.name for job in plan.jobs}
    assert _contents(store) == _contents(whole)


def test_a_killed_worker_is_reported_and_its_output_is_not_read_as_events(store, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho noise\necho 3\necho '{\"job\"'\necho last words >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    heard = []
    plan = WorkPlan(store=str(store.root), place=PLACE, jobs=())
    errors = local.run_locally(plan, workers=2, on_event=heard.append)
    assert [error["error"] for error in errors] == ["it ended with status 3: last words"] * 2
    assert heard == []


# --- what goes wrong


def _spoil(monkeypatch, at, which=0):
    """Make the batch of a step not a number, for one seed."""
    batch = TrainingStream.batch

    def spoilt(stream, step):
        made = batch(stream, step)
        return made._replace(inputs=made.inputs * float("nan")) if (step, stream._seed) == (at, which) else made

    monkeypatch.setattr(TrainingStream, "batch", spoilt)


def test_a_loss_that_is_not_finite(store, whole, monkeypatch):
    with monkeypatch.context() as patch:
        _spoil(patch, at=6 + 1)
        todo = _todo(store)
        errors = _errors(_work(store, todo))
    first = next(job for job in todo if job.runs[0] == ERM and not job.measurements)
    assert errors.pop(first.name) == (
        f"The training loss of run {ERM.digest} is not finite at step 7; lower --lr. "
        "The checkpoints before it are kept."
    )
    assert set(errors.values()) == {"not tried: a run or measurement that it needs failed, or was removed."}
    assert set(errors) == {job.name for job in todo if job.runs[0] != OTHER} - {first.name}
    assert store.run(OTHER).done
    assert not any(store.run(run).done for run in RUNS if run != OTHER)
    run = store.run(ERM)
    assert files.load_arrays(run.state("resume"))[1]["next_step"] == 5
    assert files.load_arrays(run.checkpoint("selected"))[1]["step"] in (0, 4)
    assert store.faults() == []
    assert _errors(_work(store)) == {}
    assert _contents(store) == _contents(whole)


def test_a_rate_far_too_high(store):
    wild = ERM.replace(lr=1e30)
    (error,) = _errors(_work(store, jobs_plan.missing(store, [wild], [], sizes=SIZES))).values()
    assert error == (
        f"The validation loss of run {wild.digest} is not finite at step 0; lower --lr. "
        "The checkpoints before it are kept."
    )
    assert not store.run(wild).state("resume").exists()


def test_what_was_removed_is_not_waited_for(store):
    measuring = [job for job in _todo(store) if job.measurements]
    assert set(_errors(_work(store, measuring)).values()) == {
        "not tried: a run or measurement that it needs failed, or was removed."
    }


def test_jobs_that_wait_are_looked_at_without_their_specs(store, monkeypatch):
    todo = _todo(store)
    worker = jobs_worker._Worker(todo, store, PLACE, print, None)
    monkeypatch.setattr(Job, "fills", None)  # thousands of jobs may wait for one
    with store.claim([entry for job in todo if not job.measurements for entry in job.claims(store)]) as held:
        assert held and not worker.settles_one()
    assert {*worker.pending} == {*todo}


def test_a_run_removed_before_it_is_measured(tmp_path):
    store = trained(tmp_path, ERM)
    todo = jobs_plan.missing(store, [], [(ERM, PROBE)], sizes=SIZES)
    store.remove(store.run(ERM))
    (error,) = _errors(_work(store, todo)).values()
    assert error == f"Run {ERM.digest} is not finished, or was removed; repeat the command that started it first."
    assert store.runs() == []
    assert store.faults() == []


def test_a_full_disk(store, whole, monkeypatch):
    sync, calls = os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        errors = _errors(_work(store))
    assert any(
        error.startswith(f"No space left on device: {store.root}") and error.endswith("what is finished is kept.")
        for error in errors.values()
    )
    assert not any("bug" in error for error in errors.values())
    assert store.faults() == []
    assert not list(store.root.rglob("*.tmp"))
    assert _errors(_work(store)) == {}
    assert _contents(store) == _contents(whole)


def test_a_store_that_cannot_be_written(store, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    errors = _errors(_work(store))
    assert errors[_todo(store)[0].name].startswith(f"Read-only file system: {store.root}")
    assert all(error.endswith(("what is finished is kept.", "was removed.")) for error in errors.values())


def test_a_finished_measurement_needs_no_writing(whole, monkeypatch):
    monkeypatch.setattr(files, "write_bytes", None)
    measure(whole.run(ERM), PROBE, PLACE)
    assert _work(whole) == []


def test_a_bug_is_called_one_and_the_other_jobs_go_on(store, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("flatlab.measure.runner.measure", broken)
    events = _work(store)
    assert set(_errors(events).values()) == {"ZeroDivisionError: oh (a bug in flatlab)"}
    assert all("in broken" in event["trace"] for event in events if "error" in event)
    assert all(store.run(run).done for run in RUNS)


def test_what_failed_for_one_worker_is_not_tried_by_another(store, tmp_path, monkeypatch):
    tried = []

    def broken(job, *_):
        tried.append(job.name)
        raise UserError("these data are bad")

    monkeypatch.setattr(jobs_worker, "_do", broken)
    todo = jobs_plan.missing(store, [ERM], [], sizes=SIZES)
    for _ in range(2):
        events = []
        jobs_worker.work(todo, store, PLACE, emit=events.append, failures=tmp_path)
        assert _errors(events) == {todo[0].name: "these data are bad"}
    assert tried == [todo[0].name]
    monkeypatch.undo()
    (tmp_path / "again").mkdir()
    jobs_worker.work(todo, store, PLACE, emit=events.append, failures=tmp_path / "again")  # another command
    assert store.run(ERM).done


def test_a_worker_takes_no_modules_from_the_folder_it_is_started_in(tmp_path, monkeypatch):
    (tmp_path / "flatlab").mkdir()
    (tmp_path / "flatlab" / "__init__.py").write_text("raise RuntimeError('another flatlab')")
    (tmp_path / "torch.py").write_text("raise RuntimeError('another torch')")
    monkeypatch.chdir(tmp_path)
    command = [part for part in local.worker_command("plan.json") if part.startswith("-")][0]
    code = "import flatlab, torch; print(flatlab.__file__)"
    done = subprocess.run(
        [sys.executable, command, "-c", code],
        env=local.worker_environment(1),
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).parents[1] == Path(local.HERE)
