"""Plan of the missing runs and measurements: jobs, with their requirements and costs.

Torch-free: a plan is made, and printed with its cost, before torch is loaded.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pydantic import Field

from flatlab.errors import UserError
from flatlab.specs.base import Spec
from flatlab.specs.measurement import MeasurementSpec, Sizes
from flatlab.specs.measurements import AnyMeasurement
from flatlab.specs.quantizers import OBCSpec
from flatlab.specs.rises import ReachSpec
from flatlab.specs.run import Place, RunSpec
from flatlab.store.entry import Entry
from flatlab.store.runs import RunStore

Event = dict[str, Any]  # of a worker: a job's name, and its progress, end or error
OnEvent = Callable[[Event], None]
BACKWARD = 3  # a training image costs about three forward passes: forward, and backward by weights and by inputs
LARGE = 0.5  # of the largest training: smaller ones do not determine the seconds of a pass
SHORT = 5.0  # seconds: in shorter trainings, what is done beside the passes may take most of the time
REFERENCE = {  # seconds for an image of 224 pixels (digits: 16) on one core of the reference machine, by model
    **{"digits-cnn": 3e-5, "cnn-10x2": 9e-6, "cnn-10x3": 1.4e-5, "cnn-16x2": 2.2e-5, "cnn-16x3": 3e-5},
    **{"cnn-16x4": 6e-3, "cnn-16x5": 6.5e-3, "cnn-32x4": 1.8e-2, "cnn-32x5": 3.6e-2, "cnn-64x4": 6.6e-2},
    "cnn-64x5": 9.7e-2,
    "sentences-transformer": 1e-2,  # 4.5e-4 for 48 word pieces, by the rule for pixels
    **{"digits-vit": 3.5e-5, "digits-clip": 3.5e-5, "digits-resnext": 7e-5, "digits-densenet": 1.1e-4},
    **{"resnext50_32x4d": 1e-1, "densenet121": 8e-2, "vit_b_16": 3e-1},
    **{"hf": 7e-1, "timm": 1e-1, "clip": 3e-1},  # MiniLM with 32 pieces (1.4e-2, as for pixels), DeiT-S, ViT-B/16
    "mobilenet_v2": 1.2e-2,
    "resnet18": 4e-2,
    "resnet50": 9e-2,
}


class Job(Spec):
    """Work of one process: a trajectory with its observers, an ensemble, or one run's measurements."""

    name: str
    runs: tuple[RunSpec, ...]
    measurements: tuple[AnyMeasurement, ...] = ()  # empty: train the runs
    forks: tuple[int, ...] = ()  # steps before which the trajectory's state is kept for others
    keep_every: int | None = Field(None, ge=1)  # steps between checkpoints that are kept along the trajectory
    needs: tuple[str, ...] = ()  # to be finished before: runs by digest, measurements by their path in the store
    passes: float  # cost, in images forwarded

    @property
    def kind(self) -> tuple[str, ...]:
        """What determines the seconds of a pass: training or measuring, network, method or metric."""
        verb = self.name.partition(" ")[0]
        what = sorted({measurement.metric for measurement in self.measurements}) or [self.name.partition(" on ")[0]]
        return (verb, self.runs[0].model, *what)

    def entries(self, store: RunStore) -> list[Entry]:
        """Return the directories that the job fills."""
        runs = [store.run(spec) for spec in self.runs]
        return (
            [runs[0].measurement(measurement) for measurement in self.measurements] if self.measurements else list(runs)
        )

    @property
    def fills(self) -> set[str]:
        """The runs and measurements that the job finishes, named as in `needs`."""
        if not self.measurements:
            return {spec.digest for spec in self.runs}
        return {_measurement(self.runs[0].digest, measurement) for measurement in self.measurements}

    def claims(self, store: RunStore) -> list[Entry]:
        """Return the directories that the job writes to; kept checkpoints are in that of the trajectory's own run."""
        entries = {entry.path: entry for entry in self.entries(store)}
        if self.forks or self.keep_every:
            lineage = store.run(self.runs[0]).lineage
            entries.setdefault(lineage.path, lineage)
        return list(entries.values())

    def done(self, store: RunStore) -> bool:
        """Whether nothing is left to do."""
        return all(entry.done for entry in self.entries(store))

    def ready(self, store: RunStore) -> bool:
        """Whether everything it needs is done."""
        return all(map(store.finished, self.needs))


class WorkPlan(Spec):
    """Jobs, the store that they fill, and the place where they run."""

    store: str
    place: Place
    jobs: tuple[Job, ...]


Wanted = Sequence[tuple[RunSpec, MeasurementSpec]]


def missing(store: RunStore, runs: Sequence[RunSpec], measurements: Wanted, *, sizes: Sizes) -> list[Job]:
    """Return the jobs for what the store lacks: trajectories, the longest first, derived runs, measurements.

    The pilots of measurements precede them.

    Args:
        store: its finished entries are not planned.
        runs: wanted runs; those of one trajectory become one job.
        measurements: wanted measurements, each with its run.
        sizes: images of each domain, for the costs.

    Raises:
        UserError: if an imported run is missing, which cannot be trained, or a reference run.
    """
    before = pilots(store, [*runs, *(run for run, _ in measurements)], measurements)
    lacking = _lacking(store, [*runs, *(run for run, _ in measurements)])
    if gone := next((spec for spec in lacking.values() if spec.source and not spec.members), None):
        raise UserError(
            f"Run {gone.digest} was imported, not trained here, and this store lacks it: import its file again"
            " (`flatlab import FILE`)."
        )
    training = _training(store, [spec for spec in lacking.values() if not spec.made_from], sizes)
    making = [_making(spec, lacking, sizes) for spec in lacking.values() if spec.made_from]
    measuring = [*_measuring(store, before, set(lacking), sizes), *_measuring(store, measurements, set(lacking), sizes)]
    return _with_distinct_names([*training, *making, *measuring])


def pilots(store: RunStore, runs: Sequence[RunSpec], measurements: Wanted) -> list[tuple[RunSpec, MeasurementSpec]]:
    """Return the measurements of reference runs that others require, each once.

    Args:
        store: contains the reference runs that are not among `runs`.
        runs: planned runs.
        measurements: wanted measurements, each with its run.

    Raises:
        UserError: if a reference run is in neither.
    """
    known = {spec.digest: spec for spec in runs}
    wanted = dict.fromkeys(pair for _, measurement in measurements for pair in measurement.pilots)
    return [(known.get(digest) or store.find(digest).spec, pilot) for digest, pilot in wanted]


def _measurement(digest: str, measurement: MeasurementSpec) -> str:
    return f"{digest}/measurements/{measurement.digest}"


def keeping(todo: Sequence[Job], store: RunStore, runs: Sequence[RunSpec], every: int) -> list[Job]:
    """Return the jobs such that trainings keep a checkpoint every `every` steps; this does not change the runs.

    Args:
        todo: as `missing` returns them.
        store: of the runs.
        runs: the wanted runs.
        every: steps.

    Raises:
        UserError: if a run is finished and lacks such checkpoints; states how to obtain them.
    """
    for run in map(store.run, runs):
        if run.done and not run.spec.made_from:
            run.kept_each(every)
    return [job if job.measurements else job.replace(keep_every=every) for job in todo]


def _with_distinct_names(jobs: Sequence[Job]) -> list[Job]:
    """Add the run's digest to names that several jobs have, such as those of runs that differ in their bits."""
    counts = Counter(job.name for job in jobs)
    return [job.replace(name=f"{job.name} ({job.runs[0].digest[:6]})") if counts[job.name] > 1 else job for job in jobs]


def _lacking(store: RunStore, wanted: Sequence[RunSpec]) -> dict[str, RunSpec]:
    """Return the runs that are not finished, by digest, and those that they are made from."""
    lacking = {spec.digest: spec for spec in wanted if not store.run(spec).done}
    deeper = [each for spec in lacking.values() for each in spec.made_from]
    return {**lacking, **_lacking(store, deeper)} if deeper else lacking


def _training(store: RunStore, lacking: Sequence[RunSpec], sizes: Sizes) -> list[Job]:
    groups: dict[str, list[RunSpec]] = {}
    for spec in lacking:
        groups.setdefault(spec.trajectory.digest, []).append(spec)
    # The first one keeps the state. It does not depend on the order of the runs, so that other commands can resume it.
    order = {"last": 0, "sma": 1, "swa": 2, "swad": 3, "bma": 4}
    leaders = {
        digest: sorted(group, key=lambda spec: (order[spec.average.kind], spec.digest))
        for digest, group in groups.items()
    }
    forks: dict[str, set[int]] = {}
    parents = {}
    for digest, group in leaders.items():
        parent = group[0].parent
        if parent and parent.digest in leaders and group[0].switch:  # a switch at step 0 shares nothing
            forks.setdefault(parent.digest, set()).add(group[0].switch)
            parents[digest] = leaders[parent.digest][0].digest
    jobs = [
        Job(
            name=f"train {'+'.join(spec.label for spec in group)} on {group[0].target}, seed {group[0].seed}",
            runs=tuple(group),
            forks=tuple(sorted(forks.get(digest, ()))),
            needs=(parents[digest],) if digest in parents else (),
            passes=training_passes(group[0], sizes, forked=digest in parents or _forks(store, group[0])),
        )
        for digest, group in leaders.items()
    ]
    return sorted(jobs, key=lambda job: (bool(job.needs), -len(job.forks), -job.passes))


def _forks(store: RunStore, spec: RunSpec) -> bool:
    """Return whether a finished training kept the state that a run forks from."""
    return bool(spec.parent and store.run(spec.parent).lineage.state(f"fork-{spec.switch}").exists())


def _making(spec: RunSpec, lacking: Mapping[str, RunSpec], sizes: Sizes) -> Job:
    """Return the job that makes a run from finished ones; images are forwarded for calibration and for the log."""
    images = spec.quantizer.images if isinstance(spec.quantizer, OBCSpec) and not spec.members else 0
    averaged = f", {spec.combine}" if spec.members else ""
    return Job(
        name=f"make {spec.label} on {spec.target}, seed {spec.seed}{averaged}",
        runs=(spec,),
        needs=tuple(each.digest for each in spec.made_from if each.digest in lacking),
        passes=images + max(1, len(spec.members)) * spec.holdout * sum(sizes.values()),
    )


def _measuring(store: RunStore, measurements: Wanted, trained: set[str], sizes: Sizes) -> list[Job]:
    by_run: dict[str, list[tuple[RunSpec, MeasurementSpec]]] = {}
    for run, measurement in measurements:
        if not store.run(run).measurement(measurement).done:
            by_run.setdefault(run.digest, []).append((run, measurement))
    jobs = []
    for digest, pairs in by_run.items():
        before = dict.fromkeys(_measurement(*pilot) for _, measurement in pairs for pilot in measurement.pilots)
        lacking = [name for name in before if not store.finished(name)]
        run, kind = pairs[0][0], "pilot" if isinstance(pairs[0][1], ReachSpec) else "measure"
        jobs.append(
            Job(
                name=f"{kind} {run.label} on {run.target}, seed {run.seed}",
                runs=(run,),
                measurements=tuple(dict.fromkeys(measurement for _, measurement in pairs)),
                needs=(*([digest] if digest in trained else []), *lacking),
                passes=sum(measurement.passes(sizes) for _, measurement in pairs),
            )
        )
    return jobs


def training_passes(spec: RunSpec, sizes: Sizes, *, forked: bool) -> float:
    """Return the number of images that a training forwards, `BACKWARD` for each training image."""
    steps = spec.steps + 1 - (spec.switch or 0 if forked else 0)
    batch = spec.batch_size * (len(sizes) - 1)
    target = sizes.get(spec.held_out, 0)  # evaluated as a whole
    evaluated = (spec.holdout + spec.test_share) * (sum(sizes.values()) - target) + spec.target_logged * target
    evaluated += (spec.stop is not None) * (1 - spec.holdout - spec.test_share) * (sum(sizes.values()) - target)
    evaluations = steps / spec.eval_every * evaluated
    return float(steps * batch * BACKWARD * (1 if spec.step.kind == "plain" else 2) + evaluations)


def seconds_per_pass(store: RunStore, kinds: Collection[tuple[str, int]]) -> dict[tuple[str, int], tuple[float, str]]:
    """Return the seconds of one image forward and where the number is from: this store, or the reference machine.

    The largest trainings of a network determine it, since tiny ones take their time for other work than passes. If even
    these are short, they are only an upper bound.

    Args:
        store: its finished runs are read once.
        kinds: names of networks, each with its image size.
    """
    trained: dict[tuple[str, int], list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for run in store.runs():
        kind, facts = (run.spec.model, run.spec.image_size), run.provenance if run.done else {}
        if kind in trained and facts.get("passes"):
            trained[kind].append((facts["passes"], sum(session["seconds"] for session in facts["sessions"])))
    return {kind: _pace(trained[kind], _reference(*kind)) for kind in kinds}


def _pace(trained: Sequence[tuple[float, float]], reference: tuple[float, str]) -> tuple[float, str]:
    """Return the seconds of a pass and their source, from the (passes, seconds) of trainings."""
    most = max((passes for passes, _ in trained), default=0.0)
    large = [each for each in trained if each[0] >= LARGE * most]
    passes, seconds = (sum(each) for each in zip(*large, strict=True)) if large else (0.0, 0.0)
    if not large or (seconds < SHORT * len(large) and seconds / passes > reference[0]):
        return reference
    return seconds / passes, "measured in this store"


def _reference(model: str, image_size: int) -> tuple[float, str]:
    share = (image_size / 224) ** 2 if image_size != 16 else 1.0
    return REFERENCE.get(model.partition(":")[0], 1e-2) * share, "a reference machine's; yours may differ severalfold"
