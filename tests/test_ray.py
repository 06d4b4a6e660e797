"""Jobs as tasks of a real Ray cluster of three nodes: the bytes of a local run, also where a node is killed."""

import os
from importlib.util import find_spec

import pytest
from clusters import LONG, alone, check_figure_3, contents, planned, sessions, start, step_of
from slurm_engine import free_ports, until
from stores import PROBES, RUNS

from flatlab.jobs import on_ray
from flatlab.jobs.engine import run
from flatlab.jobs.submission import submissions
from flatlab.specs.engine import Engine
from flatlab.store.runs import RunStore

lacking = pytest.mark.skipif(find_spec("ray") is None, reason="The extra `ray` is not installed.")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900), lacking]


def ports():
    """Return ports for a node's agents: without them a node waits seconds for these, too few on a busy machine."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    return dict(zip(names, free_ports(len(names)), strict=True))


@pytest.fixture(scope="module")
def cluster():
    os.environ |= on_ray.SETTINGS
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **ports()})
    for _ in range(3):
        made.add_node(num_cpus=1, **ports())
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture
def engine(cluster):
    return Engine(executor="ray", ray_address=cluster.address)


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "store")


def test_three_nodes_make_the_bytes_of_one_process(engine, store, tmp_path):
    events = []
    plan = planned(store, RUNS, PROBES)
    assert run(plan, engine, on_event=events.append) == []
    assert {event["job"] for event in events if event.get("finished")} == {job.name for job in plan.jobs}
    assert contents(store) == contents(alone(tmp_path / "alone", RUNS, PROBES))
    assert store.faults() == [] and submissions(store) == []


def test_the_command_is_killed_and_called_again(engine, store, tmp_path):
    with start(planned(store, [LONG]), tmp_path / "plan", engine) as process:
        until(lambda: step_of(store, LONG) > 1)
        process.kill()
    assert run(planned(store, [LONG]), engine, on_event=print) == []
    first, second = sessions(store, LONG)
    assert first[0] == 0 and first[1] == second[0] and second[1] == 301  # from the last state on disk
    assert contents(store) == contents(alone(tmp_path / "alone", [LONG]))


def test_a_node_is_killed_in_the_middle_of_training(cluster, engine, store, tmp_path):
    with start(planned(store, [LONG]), tmp_path / "plan", engine) as process:
        until(lambda: step_of(store, LONG) > 1)
        for node in [*cluster.worker_nodes]:  # wherever the task is
            cluster.remove_node(node, allow_graceful=False)
        for _ in range(3):
            cluster.add_node(num_cpus=1, **ports())
        process.stdout.read()
        assert process.wait() == 0
    assert sum(to - start for start, to in sessions(store, LONG)) == 301
    assert contents(store) == contents(alone(tmp_path / "alone", [LONG]))


def test_figure_3_on_a_cluster_of_its_own(store, tmp_path):
    check_figure_3(store, tmp_path, "--executor", "ray", "--max-workers", 2)
