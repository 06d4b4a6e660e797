"""Ensembles: runs that are not trained but put together from finished ones (QT-DoG, section 3.6 and Eq. 6).

An ensemble's directory is a run's: its checkpoint holds the members' weights, quantized ones as they were trained, so
that it is evaluated, measured and exported as any other. The members have splits of their own: the target's images are
new to all of them, but some of the source images that validate the ensemble were trained on by some member. Its
validation accuracy is therefore no fair one, nothing is selected by it, and there is no in-domain test.
"""

from dataclasses import replace

from flatlab import build, files, machine
from flatlab.errors import UserError
from flatlab.models import Ensemble
from flatlab.runs import RunStore, check_data
from flatlab.specs import Place, RunSpec
from flatlab.train.evaluate import Judge
from flatlab.train.trajectory import arrays


def join(spec: RunSpec, store: RunStore, place: Place) -> None:
    """Put an ensemble together from its members, each at the checkpoint that its own validation selects.

    Args:
        spec: of the ensemble.
        store: holds the members, finished, and receives the ensemble.
        place: data folder, device.

    Raises:
        UserError: where a member is not finished, or was trained on other data.
    """
    run = store.run(spec)
    check_data([run], place)
    if run.done:
        return
    domains = build.domains(spec, place)
    weights: files.Arrays = {}
    for index, member in enumerate(map(store.run, spec.members)):
        if not member.done:
            raise UserError(f"Run {member.spec.digest} is not finished: train it before it joins an ensemble.")
        member.check_data(domains.data.fingerprint)
        found, _ = files.load_arrays(member.checkpoint("selected"))
        weights |= {f"members.{index}.{name}": array for name, array in found.items()}
    network = build.finished(spec, domains.data, place)
    assert isinstance(network, Ensemble)
    build.load(network, weights)
    run.create()
    row = Judge(replace(domains, tested={}), build.device(place)).row(network.eval(), spec.steps)
    run.write_log([{**row, "looks": 1}])
    for name in ("selected", "last"):
        files.save_arrays(run.checkpoint(name), arrays(network.state_dict()), {"step": spec.steps})
    run.note(**place.model_dump(), data_fingerprint=domains.data.fingerprint, machine=machine.facts())
    run.finish()
