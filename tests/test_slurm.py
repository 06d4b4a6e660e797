"""Workers on a real Slurm: the bytes of a local run, also where nodes, workers and the command are killed."""

import json
from importlib.util import find_spec

import pytest
from clusters import LONG, MANY, alone, check_figure_3, contents, flatlab, planned, sessions, start, step_of
from slurm_engine import answer, settled, slurm, until
from stores import ERM, PROBES, RUNS

from flatlab.jobs.engine import run
from flatlab.jobs.submission import submissions
from flatlab.specs.engine import Engine
from flatlab.store.runs import RunStore

lacking = pytest.mark.skipif(find_spec("submitit") is None, reason="The extra `slurm` is not installed.")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900), lacking]
TWO = Engine(executor="slurm", workers=2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture
def store(tmp_path, engine):
    settled()
    return RunStore(tmp_path / "store")


def number_of(store):
    (one,) = submissions(store)
    return one.facts["id"]


def node_of(number):
    return answer("squeue", "-h", "-r", "-o", "%N", "-t", "running", "-j", number).split()[0]


def check_cut_once(store, run, folder):
    """Check that a training was cut off once, did each step once, and has the bytes of an undisturbed one."""
    first, second = sessions(store, run)
    assert first[0] == 0 and first[1] == second[0] > 1 and second[1] == run.steps + 1
    assert contents(store) == contents(alone(folder / "alone", [run]))


def test_two_nodes_make_the_bytes_of_one_process(store, tmp_path):
    events = []
    plan = planned(store, RUNS, PROBES)
    assert run(plan, TWO, on_event=events.append) == []
    assert {event["job"] for event in events if event.get("finished")} == {job.name for job in plan.jobs}
    assert contents(store) == contents(alone(tmp_path / "alone", RUNS, PROBES))
    assert store.faults() == []


def test_the_command_is_killed_and_called_again(store, tmp_path):
    plan = planned(store, [LONG])
    with start(plan, tmp_path / "plan", TWO) as process:
        assert "is submitted" in process.stdout.readline()
        until(lambda: step_of(store, LONG))
        process.kill()
    notes = []
    assert run(planned(store, [LONG]), TWO, on_event=notes.append) == []
    assert "is under way" in notes[0]["note"] and number_of(store) in notes[0]["note"]
    assert sessions(store, LONG) == [(0, 301)]


def test_a_worker_out_of_time_saves_its_state_and_goes_on(store, tmp_path):
    plan = planned(store, [LONG])
    with start(plan, tmp_path / "plan", TWO.replace(workers=1)) as process:
        until(lambda: step_of(store, LONG))
        answer("scancel", "--signal=USR2", number_of(store))
        process.stdout.read()
        assert process.wait() == 0
    check_cut_once(store, LONG, tmp_path)


def test_a_worker_is_preempted_by_a_partition_of_higher_priority(store, tmp_path):
    run = LONG.replace(steps=600)
    with start(planned(store, [run]), tmp_path / "plan", TWO.replace(workers=1, partition="low")) as process:
        until(lambda: step_of(store, run))
        number = number_of(store)
        batch = ("sbatch", "--parsable", "--partition=high", f"--nodelist={node_of(number)}", "--output=/dev/null")
        urgent = answer(*batch, "--wrap=true").strip()
        process.stdout.read()
        assert process.wait() == 0
    assert "Restarts=1 " in answer("scontrol", "show", "job", number)
    assert "JobState=COMPLETED" in answer("scontrol", "show", "job", urgent)
    check_cut_once(store, run, tmp_path)


def test_a_node_is_killed_in_the_middle_of_training_and_of_measuring(engine, store, tmp_path):
    plan = planned(store, [LONG], [(LONG, MANY)])
    with start(plan, tmp_path / "plan", TWO.replace(workers=1)) as process:
        for middle in (
            lambda: step_of(store, LONG) > 51,
            lambda: any(store.run(LONG).measurement(MANY).path.glob("unit-*.safetensors")),
        ):
            until(middle)
            node = node_of(number_of(store))
            engine.kill_node(node)
            until(lambda node=node: answer("sinfo", "-h", "-n", node, "-p", "low", "-o", "%T").startswith("down"))
            engine.start_node(node)
        process.stdout.read()
        assert process.wait() == 0
    first, second = sessions(store, LONG)
    assert first[0] == 0 and first[1] == second[0] and second[1] == 301  # from the last state on disk
    assert contents(store) == contents(alone(tmp_path / "alone", [LONG], [(LONG, MANY)]))


def test_figure_3_by_two_nodes(store, tmp_path):
    check_figure_3(store, tmp_path, "--executor", "slurm", "--max-workers", 2)
    listed = flatlab("jobs", "list", "--store", store.root, "--json")
    (row,) = json.loads(listed.stdout)
    assert row["array"] == number_of(store) and row["done"] == row["jobs"]


def test_an_array_is_cancelled(store, tmp_path):
    endless = ERM.replace(steps=10**7, eval_every=10**7)
    with start(planned(store, [endless]), tmp_path / "plan", TWO.replace(workers=1)) as process:
        while "share" not in process.stdout.readline():
            pass
        said = flatlab("jobs", "cancel", number_of(store), "--store", store.root)
        assert said.returncode == 0 and "is cancelled" in said.stdout
        process.stdout.read()
        assert process.wait() == 1
    assert sessions(store, endless)[0][1] == step_of(store, endless) > 0
    refused = flatlab("jobs", "cancel", 1_000_000, "--store", store.root)
    assert refused.returncode == 2 and "has no Slurm array 1000000" in refused.stderr


def test_what_sbatch_refuses_is_a_sentence(store):
    with pytest.raises(ValueError, match=r"sbatch refused the workers: .*partition"):
        run(planned(store, [ERM]), TWO.replace(partition="none"), on_event=print)
    assert submissions(store) == []
