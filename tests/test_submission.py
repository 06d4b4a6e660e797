"""Submissions: events are read from files, by whole lines; options of engines are refused where they do nothing."""

import json
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from commandline import TINY, call, documented
from stores import ERM, OTHER, PLACE, PROBE, SIZES, trained

from flatlab.errors import UserError
from flatlab.jobs import engine as engines
from flatlab.jobs import on_ray, slurm
from flatlab.jobs import plan as jobs_plan
from flatlab.jobs.plan import WorkPlan
from flatlab.jobs.submission import Submission, submissions
from flatlab.specs.engine import Engine
from flatlab.store import disk
from flatlab.store.runs import RunStore


def planned(store, *runs, measurements=()):
    todo = jobs_plan.missing(store, runs, measurements, sizes=SIZES)
    return WorkPlan(store=str(store.root), place=PLACE, jobs=tuple(todo))


@pytest.fixture
def submission(tmp_path):
    return Submission.create(planned(RunStore(tmp_path / "store"), ERM, OTHER))


def append(path: Path, text: str):
    with open(path, "a") as file:
        file.write(text)


def test_a_submission_is_no_run_and_is_read_back(submission, tmp_path):
    store = RunStore(tmp_path / "store")
    assert store.runs() == [] and store.faults() == []
    assert [each.plan for each in submissions(store)] == [submission.plan]
    assert submission.facts == {} and slurm.arrays(store) == []
    submission.started(engine="slurm", id="12", workers=2)
    assert slurm.array(store, "12").folder == submission.folder
    with pytest.raises(UserError, match="has no Slurm array 1; "):
        slurm.array(store, "1")


def test_half_a_line_is_left_for_the_next_look(submission):
    append(submission.events(0), '{"job": "a"}\nnoise\n{"job"')
    append(submission.events(1), '{"job": "c"}\n')
    assert [event["job"] for event in submission.news()] == ["a", "c"]
    assert list(submission.news()) == []
    append(submission.events(0), ': "b"}\n')
    assert [event["job"] for event in submission.news()] == ["b"]


def test_following_ends_with_the_jobs_or_with_the_workers(submission):
    first, second = (job.name for job in submission.plan.jobs)
    append(submission.events(0), json.dumps({"job": first, "finished": True}) + "\n")
    lives, heard = iter([True, True, False]), []

    def alive():
        append(submission.events(1), json.dumps({"job": "worker", "note": "n"}) + "\n")
        return next(lives)

    (error,) = submission.follow(submission.plan, alive, heard.append)
    assert error["job"] == second and "its workers ended before it" in error["error"]
    assert [event["job"] for event in heard] == [first, "worker", "worker", "worker"]
    append(submission.events(1), json.dumps({"job": second, "error": "bad data"}) + "\n")
    again = Submission(submission.folder)
    (error,) = again.follow(submission.plan, lambda: True, heard.append)  # all is settled: it does not wait
    assert error == {"job": second, "error": "bad data"}


def test_what_was_done_without_an_event_is_not_lost(tmp_path):
    plan = planned(RunStore(tmp_path), ERM)
    submission = Submission.create(plan)
    trained(tmp_path, ERM)
    assert submission.follow(plan, lambda: False, print) == []


def test_another_command_follows_under_its_own_names(submission):
    plan = submission.plan.replace(jobs=(submission.plan.jobs[1].replace(name="mine"),))
    append(
        submission.events(0),
        "".join(json.dumps({"job": j.name, "finished": True}) + "\n" for j in submission.plan.jobs),
    )
    heard = []
    assert submission.follow(plan, lambda: True, heard.append) == []
    assert heard == [{"job": "mine", "finished": True}]


def test_an_array_that_covers_the_plan_is_followed(submission, monkeypatch):
    submission.started(engine="slurm", id="12", workers=2)
    active = {"12"}
    monkeypatch.setattr(slurm, "is_active", lambda number: number in active)
    part = submission.plan.replace(jobs=submission.plan.jobs[:1])
    assert slurm._active(part).folder == submission.folder
    more = planned(RunStore(submission.plan.store), ERM, measurements=[(ERM, PROBE)])
    assert slurm._active(more) is None
    active.clear()
    assert slurm._active(part) is None


# --- what is refused


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--gpus 1", "--gpus does nothing with --executor local; leave it out, or write --executor slurm."),
        (
            "--ray-address auto",
            "--ray-address does nothing with --executor local; leave it out, or write --exec",
        ),
        ("--executor ray --partition a", "--partition does nothing with --executor ray; leave it out, or write --exec"),
        ("--executor slurm --workers 2", "--workers counts processes of this machine; write --max-workers 2."),
        ("--executor slurm --slurm-arg account", "slurm_arg"),
        ("--executor slurm --time 1", "--time must be an integer >= 3, got 1."),
        ("--executor sge", "sge"),
    ],
)
def test_options_of_engines(words, sentence, tmp_path, capsys):
    assert call("train", *TINY, *words.split(), "--store", tmp_path) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.strip().splitlines()) == 1


def test_options_become_an_engine(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(
        engines, "run", lambda plan, engine, on_event: found.append(engine) or [{"job": "x", "error": "e"}]
    )
    words = "--executor slurm --max-workers 3 --gpus 1 --cpus 2 --memory 8 --time 30 --partition p"
    more = "--slurm-arg account=a --slurm-arg qos=b=c"
    assert call("train", *TINY, *words.split(), *more.split(), "--store", tmp_path) == 2
    (made,) = found
    asked = {"gpus": 1, "cpus": 2, "memory": 8, "time": 30, "partition": "p", "slurm_arg": ("account=a", "qos=b=c")}
    assert made == Engine(executor="slurm", workers=1, **asked)  # one job


@pytest.mark.parametrize("executor", ["slurm", "ray"])
def test_what_is_not_installed_is_named(executor, tmp_path, monkeypatch):
    monkeypatch.setattr(f"flatlab.jobs.{ {'slurm': 'slurm', 'ray': 'on_ray'}[executor] }.find_spec", lambda _: None)
    plan = planned(RunStore(tmp_path), ERM)
    with pytest.raises(UserError, match=rf"--executor {executor} needs .*pip install 'flatlab\[{executor}\]'"):
        engines.run(plan, Engine(executor=executor), on_event=print)
    assert submissions(RunStore(tmp_path)) == []


def test_slurm_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "find_spec", lambda _: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="must run on a machine with Slurm's `sbatch`"):
        engines.run(planned(RunStore(tmp_path), ERM), Engine(executor="slurm"), on_event=print)


def test_arrays_are_listed_where_slurm_is(submission, tmp_path, monkeypatch, capsys):
    submission.started(engine="slurm", id="12", workers=2)
    store = submission.plan.store
    for words in (("list",), ("cancel", "12")):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert call("jobs", *words, "--store", store) == 2
        assert "is not in PATH" in capsys.readouterr().err
    for name, text in (("squeue", "echo '12|RUNNING|None'; echo '12|PENDING|Priority'"), ("scancel", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    assert call("jobs", "list", "--store", store, "--json") == 0
    (row,) = documented("jobs list", capsys.readouterr().out)
    assert row == {"array": "12", "workers": "RUNNING 1, PENDING (Priority) 1", "jobs": 2, "done": 0}
    append(submission.events(0), '{"job": "x", "error": "bad data"}\n')
    (submission.folder / "logs" / "12_0_0_log.err").touch()
    assert call("jobs", "logs", "12", "--store", store) == 0
    said = capsys.readouterr().out
    assert "x: bad data" in said and "12_0_0_log.err" in said
    assert call("jobs", "logs", "12", "--store", store, "--json") == 0
    assert documented("jobs logs", capsys.readouterr().out)["files"][0].endswith("12_0_0_log.err")
    assert call("jobs", "cancel", "12", "--store", store, "--json") == 0
    assert documented("jobs cancel", capsys.readouterr().out) == {"cancelled": "12"}


def test_a_disk_with_locks_of_one_node_is_refused(tmp_path, monkeypatch):
    table = tmp_path / "mountinfo"
    table.write_text("31 1 0:27 / / rw shared:1 - nfs server:/x rw,nolock\n")
    monkeypatch.setattr(disk, "MOUNTS", table)
    plan = planned(RunStore(tmp_path), ERM)
    with pytest.raises(UserError, match="got nfs with nolock"):
        engines.run(plan, Engine(executor="slurm"), on_event=print)
    submission = Submission.create(plan)
    slurm.Worker(str(submission.folder))(0)  # as on a node: nothing is started
    (event,) = submission.news()
    assert event["job"] == "worker" and "got nfs with nolock" in event["error"]


def test_a_node_without_the_store_is_named(tmp_path):
    with pytest.raises(UserError, match=f"Node {platform.node()} does not see .*: --store must name a folder"):
        on_ray.do(str(tmp_path / "gone"), 0, "")


def test_a_task_of_ray_does_its_own_job(tmp_path):
    plan = planned(RunStore(tmp_path), ERM, OTHER)
    submission = Submission.create(plan)
    run = RunStore(tmp_path).run(plan.jobs[1].runs[0])
    run.create()
    run.finish()  # nothing is left to do, so that torch is not needed
    on_ray.do(str(submission.folder), 1, plan.replace(jobs=plan.jobs[1:]).canonical())
    assert list(submission.news()) == [{"job": plan.jobs[1].name, "finished": True}]


@pytest.mark.parametrize(
    "address, sentence",
    [(None, "Ray did not start on this machine: timed out"), ("auto", r"--ray-address must be .* got auto: timed out")],
)
def test_a_cluster_that_does_not_start_is_one_sentence(address, sentence, tmp_path, monkeypatch):
    def init(**_):
        raise Exception("timed out")  # as Ray does

    monkeypatch.setattr(on_ray, "find_spec", lambda _: True)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    store = RunStore(tmp_path)
    with pytest.raises(UserError, match=sentence):
        engines.run(planned(store, ERM), Engine(executor="ray", ray_address=address), on_event=print)
    assert submissions(store) == []
