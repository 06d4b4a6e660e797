"""Specs, settings and methods: what has a name, what is refused, and the paper's constants."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from flatlab import arguments
from flatlab.errors import UserError
from flatlab.specs import rises
from flatlab.specs.generalisation import GeneralisationSpec
from flatlab.specs.measurements import (
    KINDS,
    ConnectionSpec,
    GradCAMSpec,
    LatencySpec,
    QuantizationNoiseSpec,
    RoundingSpec,
    ScaleAuditSpec,
    SizeSpec,
    SpectrumSpec,
    SphereSpec,
    SurfaceSpec,
    TraceCheckSpec,
)
from flatlab.specs.methods import METHODS, Method, compose, method, replicates, vary
from flatlab.specs.quantizers import INQSpec, NoiseSpec, OBCSpec, QuantSpec, RTNSpec
from flatlab.specs.rises import ReachSpec
from flatlab.specs.run import AverageSpec, MixSpec, Place, RunSpec, StepSpec, StopSpec
from flatlab.specs.settings import PAPER, QUICK, SETTINGS, SMOKE, setting

FIELDS = {"dataset": "digits", "held_out": "rot0", "image_size": 16, "model": "digits-cnn", "steps": 10}
FIELDS |= {"eval_every": 5, "lr": 0.001}
RUN = RunSpec(**FIELDS)
PROBE = SphereSpec(radii=(0.0, 1.0))


# --- identity ----------------------------------------------------------------------------------------------------


def test_digests_stay_what_they_were():
    """A change here renames runs and measurements in every store: it must be deliberate, and said in the CHANGELOG."""
    whole = RUN.replace(step=StepSpec(kind="sam"), average=AverageSpec(kind="swad"), quantizer=QuantSpec(), switch=4)
    # Renewed for `augment`, `precision` and SWAD's `rule` of runs, and for the engine's fields of measurements.
    assert [spec.digest for spec in (RUN, whole, PROBE)] == ["7f6e9dfe05725dcb", "baee3fb207c26b3e", "6c43c1ac4a4deb8b"]


MEASUREMENTS = {
    "6c43c1ac4a4deb8b": PROBE,
    "cadcb715334ce12d": ReachSpec(rises=(0.1,)),
    "4b50dbdbda44ffdd": SpectrumSpec(),
    "2c348a848702e834": SurfaceSpec(),
    "135c76240f05939a": ConnectionSpec(to="0" * 16),
    "8e3b1f917928dc92": TraceCheckSpec(),
    "c72ba3fc568cf558": ScaleAuditSpec(),
    "868f9639bd27aaf0": GradCAMSpec(),
    "3bee72b46e3f6525": QuantizationNoiseSpec(),
    "b5aa8c195898affd": RoundingSpec(),
    "1ce3adf553f86252": SizeSpec(),
    "91ba2ceb11923a4b": LatencySpec(),
    "831ef62a924c231c": GeneralisationSpec(),
}


def test_digests_of_every_kind_of_measurement_stay_what_they_were():
    assert [spec.digest for spec in MEASUREMENTS.values()] == list(MEASUREMENTS)
    assert sorted(spec.metric for spec in MEASUREMENTS.values()) == sorted(KINDS)


def test_canonical_json_is_sorted_bare_and_complete():
    text = RUN.canonical()
    fields = json.loads(text)
    assert text == json.dumps(fields, sort_keys=True, separators=(",", ":"))
    # Defaults are written out: they may change later. Fields added since are written where they differ.
    assert fields.keys() == RunSpec.model_fields.keys() - set(RunSpec.later)
    noisy = RUN.replace(noise=NoiseSpec(bits=7), switch=4)
    assert json.loads(noisy.canonical())["noise"]["bits"] == 7 and RunSpec.parse(noisy.canonical()) == noisy
    logged = RUN.replace(quantizer=QuantSpec(log_scale=True), switch=4)
    assert json.loads(logged.canonical())["quantizer"]["log_scale"] and RunSpec.parse(logged.canonical()) == logged
    late = RUN.replace(mixing=MixSpec(), members=(RUN, RUN.replace(seed=1, objective="coral", coral_weight=0.5)))
    assert RunSpec.parse(late.canonical()) == late and "coral_weight" not in json.loads(late.canonical())
    assert json.loads(late.canonical())["members"][1]["coral_weight"] == 0.5
    assert RunSpec(**dict(reversed(FIELDS.items()))).canonical() == text
    assert RunSpec.parse(text) == RUN and RunSpec.parse(text).digest == RUN.digest
    assert SphereSpec.parse(PROBE.canonical()) == PROBE
    assert SphereSpec(radii=(0, 1)).digest == PROBE.digest  # numbers, not spellings


def test_each_field_of_a_run_is_part_of_its_name():
    other = {"dataset": "PACS", "held_out": "rot15", "image_size": 8, "model": "resnet18", "weights": "imagenet"}
    other |= {"freeze_batchnorm": True, "step": StepSpec(rho=0.1), "average": AverageSpec(every=2), "steps": 11}
    other |= {"eval_every": 2, "batch_size": 8, "lr": 0.1, "weight_decay": 0.1, "seed": 1, "trial_seed": 1}
    other |= {"augment": "domainbed", "precision": "bf16", "holdout": 0.3, "test_share": 0.2, "source": "sha256:0"}
    other |= {"objective": "coral", "coral_weight": 0.5, "mixing": MixSpec(), "members": (RUN,)}
    other |= {"combine": "probabilities", "target_logged": False, "stop": StopSpec(loss=0.1)}
    other |= {"optimizer": "adamw", "momentum": 0.5, "schedule": "cosine", "warmup": 2, "clip_norm": 1.0}
    other |= {"class_percentile": 10.0, "margin": 0.5, "decayed": "weights", "corruption": "fog:1"}
    names = {RUN.replace(**{field: value}).digest for field, value in other.items()}
    names |= {RUN.replace(frozen=True, switch=4).digest, RUN.replace(quantizer=QuantSpec(), switch=4).digest}
    kinds = (INQSpec(every=2), RTNSpec(), OBCSpec(), OBCSpec(images=9))
    names |= {RUN.replace(quantizer=q, switch=None if q.kind in ("rtn", "obc") else 2).digest for q in kinds}
    names |= {RUN.replace(noise=noise, switch=4).digest for noise in (NoiseSpec(bits=7), NoiseSpec(amplitude=0.1))}
    changed = {"signed": False, "log_scale": True, "activations": "signed", "scale_lr": 0.0, "bits": 3}
    changed |= {"embeddings": True, "skip_first": True, "head": True}
    names |= {RUN.replace(quantizer=QuantSpec(**{f: v}), switch=4).digest for f, v in changed.items()}
    assert len(names | {RUN.digest}) == len(other) + 3 + len(kinds) + 2 + len(changed)
    assert set(RunSpec.model_fields) - set(other) == {"quantizer", "frozen", "switch", "noise"}


def test_normalisations_are_those_of_the_arguments():
    assert rises.Normalisation == arguments.Normalisation


def test_a_later_field_is_left_out_at_its_default_and_read_back_as_such():
    assert "test_share" not in json.loads(RUN.canonical())
    later = RUN.replace(test_share=0.2)
    assert json.loads(later.canonical())["test_share"] == 0.2
    assert RunSpec.parse(RUN.canonical()) == RUN and RunSpec.parse(later.canonical()) == later


def test_a_place_takes_paths():
    place = Place(data_dir=Path("data"), cache=Path("cache"), model_dir="model", weights_file=None)
    assert (place.data_dir, place.cache, place.model_dir) == ("data", "cache", "model")
    assert Place.parse(place.canonical()) == place == place.replace(cache=Path("cache"))
    with pytest.raises(UserError, match="^Place: data_dir must be a valid string, got 3"):
        Place.make(data_dir=3)


def test_the_place_is_no_part_of_a_name():
    assert not set(Place.model_fields) & (set(RunSpec.model_fields) | set(SphereSpec.model_fields))


def test_a_trajectory_is_all_but_the_average_and_a_parent_all_before_the_switch():
    run = RUN.replace(quantizer=QuantSpec(), switch=4, average=AverageSpec(kind="sma"), step=StepSpec(kind="sam"))
    assert run.trajectory == run.replace(average=AverageSpec())
    assert run.trajectory.trajectory == run.trajectory and run.trajectory.digest != run.digest
    assert run.parent == RUN.replace(step=StepSpec(kind="sam"))
    assert RUN.parent is None and RUN.trajectory == RUN
    parity = {"release-parity", "freeze", "QT-DoG", "INQ", "OBC", "RTN", "noise", "noise-kept"}
    at = {"held_out": "rot0", "seed": 0, "trial_seed": 0}
    assert {compose(METHODS[name], SMOKE, **at).parent for name in parity} == {compose(METHODS["ERM"], SMOKE, **at)}


# --- strictness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bits": 7}, r"^RunSpec has no field 'bits'; its fields are optimizer, .*, dataset, held_out, .*, combine\.$"),
        ({"steps": "10"}, r"^RunSpec: steps must be a valid integer, got '10'\.$"),
        ({"steps": 10.0}, r"^RunSpec: steps must be a valid integer, got 10\.0\.$"),
        ({"steps": 0}, r"^RunSpec: steps must be at least 1, got 0\.$"),
        ({"lr": 0.0}, r"^RunSpec: lr must be greater than 0\.0, got 0\.0\.$"),
        ({"lr": float("nan")}, r"^RunSpec: lr must be a finite number, got nan\.$"),
        ({"objective": "irm"}, r"^RunSpec: objective must be 'erm', 'coral' or 'mms', got 'irm'\.$"),
        ({"switch": 4}, r"^A quantizer, noise or freezing in training needs a switch step, and only they have one\.$"),
        (
            {"frozen": True},
            r"^A quantizer, noise or freezing in training needs a switch step, and only they have one\.$",
        ),
        (
            {"members": (RUN.replace(held_out="rot15"),)},
            r"^An ensemble and its members must have the same data set, .*, got .*rot0.*rot15",
        ),
        (
            {"frozen": True, "switch": 11},
            r"^The switch must be at a step <= 10 \(--steps\), got 11: choose a smaller --quantize-at",
        ),
    ],
)
def test_what_does_not_do_is_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        RunSpec.make(**{**FIELDS, **changes})
    with pytest.raises(UserError, match=sentence):
        RUN.replace(**changes)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: INQSpec.make(every=2, fractions=(0.5, 0.9)),
            r"^INQ's fractions must increase to 1, .*, got \(0\.5, 0\.9\)\.$",
        ),
        (lambda: INQSpec.make(every=2, fractions=(0.0, 1.0)), r"^INQ's fractions must be > 0, got \(0\.0,"),
        (
            lambda: INQSpec.make(every=2, bits=9, grid="power-of-two"),
            r"^A grid of powers of two must have 2 to 8 bits, got 9",
        ),
        (lambda: OBCSpec.make(bits=1), r"^OBCSpec: bits must be at least 2, got 1\.$"),
        (
            NoiseSpec.make,
            r"^Noise needs either an amplitude, or the bits of the rounding whose norm it has; give one\.$",
        ),
        (lambda: NoiseSpec.make(amplitude=0.1, bits=7), r"^Noise needs either an amplitude, or the bits"),
        (
            lambda: RUN.replace(quantizer=OBCSpec(), switch=4),
            r"^A quantizer, noise or freezing in training needs a switch step",
        ),
        (
            lambda: RUN.replace(quantizer=QuantSpec(), noise=NoiseSpec(bits=7), switch=4),
            r"^Noise replaces a quantizer",
        ),
        (
            lambda: RUN.replace(quantizer=INQSpec(every=3), switch=4),
            r"^The last stage of INQ must be at a step <= 10 \(--steps\), got 13: choose a smaller --quantize-at",
        ),
    ],
)
def test_quantizers_and_noise_that_do_not_do(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


def test_a_derived_run_is_made_from_the_run_without_its_quantizer():
    frozen = RUN.replace(frozen=True, switch=4, average=AverageSpec(kind="sma"))
    for quantizer in (RTNSpec(), OBCSpec()):
        assert RUN.replace(quantizer=quantizer).parent == RUN
        derived = frozen.replace(quantizer=quantizer)
        assert derived.derived and derived.parent == frozen and not frozen.derived
    inq = RUN.replace(quantizer=INQSpec(every=2), switch=4)
    assert (inq.settled, inq.switch, inq.derived, inq.parent) == (10, 4, False, RUN)


@pytest.mark.parametrize(("bits", "bound"), [(1, "at least 2"), (17, "at most 16")])
def test_bits_are_2_to_16(bits, bound):
    with pytest.raises(UserError, match=rf"^QuantSpec: bits must be {bound}, got {bits}\.$"):
        QuantSpec.make(bits=bits)


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match=r"^RunSpec: the field 'lr' is missing\.$"):
        RunSpec.make(**{name: value for name, value in FIELDS.items() if name != "lr"})


def test_specs_are_frozen_and_compare_by_value():
    with pytest.raises(ValidationError, match="frozen"):
        RUN.steps = 3
    assert {RUN, RunSpec(**FIELDS)} == {RUN}


def test_a_stored_spec_is_read_strictly():
    with pytest.raises(UserError, match="^RunSpec has no field 'betas'"):
        RunSpec.parse(json.dumps({**json.loads(RUN.canonical()), "betas": 0.9}))
    with pytest.raises(UserError, match="JSON"):
        RunSpec.parse("{")


# --- settings and methods ----------------------------------------------------------------------------------------


def paper(name):
    return compose(METHODS[name], PAPER, held_out="sketch", seed=0, trial_seed=2)


def test_the_papers_constants():
    """QT-DoG App. B, SWAD's config.yaml, EoA's SMA; SWA's start is flatlab's choice (methods.md 4.2)."""
    erm = paper("ERM")
    shown = {"lr": 5e-5, "steps": 5000, "batch_size": 32, "eval_every": 300, "weight_decay": 0.0, "holdout": 0.2}
    shown |= {"image_size": 224, "model": "resnet50", "weights": "imagenet", "freeze_batchnorm": True, "switch": None}
    shown |= {"augment": "domainbed", "precision": "fp32"}
    assert erm.model_dump(include=set(shown)) == shown
    assert (erm.step, erm.average, erm.quantizer, erm.frozen) == (StepSpec(), AverageSpec(), None, False)
    assert (PAPER.seeds, PAPER.num_samples, PAPER.radii) == (3, 100, tuple(range(0, 61, 5)))
    assert PAPER.domains == ("art_painting", "cartoon", "photo", "sketch")
    lsq = {"kind": "lsq", "bits": 7, "granularity": "channel", "grad_scale": "shared", "scale_lr": 1e-5}
    assert paper("QT-DoG") == erm.replace(quantizer=QuantSpec(**lsq), switch=2000)
    assert paper("SAM") == erm.replace(step=StepSpec(kind="sam", rho=0.05))
    swad = {"kind": "swad", "every": 100, "converge": 3, "tolerance": 6, "ratio": 0.3, "rule": "paper"}
    assert paper("SWAD") == erm.replace(average=AverageSpec(**swad, refresh_batches=500))
    assert paper("SMA") == erm.replace(average=AverageSpec(kind="sma", start=100))
    assert paper("SWA") == erm.replace(average=AverageSpec(kind="swa", start=3000, every=100))
    assert paper("freeze") == erm.replace(frozen=True, switch=2000)
    assert paper("release-parity") == paper("QT-DoG").replace(frozen=True)


def test_methods_are_compositions_of_independent_parts():
    assert len({compose(parts, QUICK, held_out="rot0", seed=0, trial_seed=0) for parts in METHODS.values()}) == len(
        METHODS
    )
    both = compose(Method(step="sam", quantizer="lsq", average="swad"), PAPER, held_out="sketch", seed=0, trial_seed=2)
    alone = paper("QT-DoG").replace(step=paper("SAM").step, average=paper("SWAD").average)
    assert both == alone and both.label == "sam-lsq-swad"
    labels = {name: paper(name).label for name in ("ERM", "SMA", "QT-DoG", "release-parity", "freeze")}
    assert list(labels.values()) == ["erm", "sma", "lsq", "lsq-frozen", "frozen"]
    labels = [paper(name).label for name in ("CORAL", "CORAL+QT-DoG", "MixStyle+QT-DoG", "ERM-ensemble", "EoA", "EoQ")]
    assert labels == ["coral", "coral-lsq", "mixstyle-lsq", "6 x erm", "6 x sma", "5 x lsq"]
    assert paper("ERM").replace(source="sha256:0").label == "imported"


def test_methods_go_by_their_names():
    assert method("qt_dog") == ("QT-DoG", METHODS["QT-DoG"])
    with pytest.raises(UserError, match=r"^Unknown method 'swat'; did you mean SWA.*\? Known: ERM, SAM, "):
        method("swat")
    assert vary(METHODS["SAM"], {"average": "SWAD"}).average == "swad"
    with pytest.raises(UserError, match=r"^Unknown step 'sagn'.*: plain, sam, sagm, saq, gaqat, fqat\."):
        vary(METHODS["ERM"], {"step": "sagn"})


def test_replicates_move_both_seeds_for_each_target():
    runs = replicates(METHODS["SAM"], QUICK.replace(seeds=2, seed=5, trial_seed=7, held_out=("rot0", "rot45")))
    assert [(run.held_out, run.seed, run.trial_seed) for run in runs] == [
        ("rot0", 5, 7),
        ("rot0", 6, 8),
        ("rot45", 5, 7),
        ("rot45", 6, 8),
    ]


def test_an_ensemble_has_members_of_consecutive_seeds_and_there_is_one_for_each_target():
    assert [method(name)[1].members for name in ("erm-ensemble", "eoa", "eoq")] == [6, 6, 5]  # the paper's Table 1
    chosen = QUICK.replace(seeds=3, seed=4, trial_seed=2, held_out=("rot0", "rot45"))
    runs = replicates(METHODS["EoQ"], chosen)
    assert [run.held_out for run in runs] == ["rot0", "rot45"]
    alone = replicates(METHODS["QT-DoG"], chosen.replace(seeds=5))
    assert [member for run in runs for member in run.members] == alone
    assert (runs[0].seed, runs[0].trial_seed, runs[0].combine, runs[0].parent) == (4, 2, "logits", None)
    assert vary(METHODS["EoQ"], {"combine": "probabilities"}).combine == "probabilities"


def test_settings_change_by_name_and_scale_with_their_steps():
    assert setting("Quick", steps=1000, lr=None) == QUICK.replace(steps=1000)
    assert (QUICK.replace(steps=1000).switch_step, QUICK.replace(steps=1000).swa_start) == (400, 600)
    assert QUICK.replace(switch=7).switch_step == 7
    with pytest.raises(UserError, match=r"^Unknown setting 'paepr'; did you mean paper\? Known: "):
        setting("paepr")
    with pytest.raises(UserError, match=r"^Setting: bits must be at most 16, got 17"):
        setting("smoke", bits=17)


@pytest.mark.parametrize("chosen", SETTINGS.values(), ids=SETTINGS)
def test_every_method_composes_in_every_setting(chosen):
    for parts in METHODS.values():
        for run in replicates(parts, chosen):
            assert run.held_out in chosen.domains
            assert parts.average == run.average.kind and parts.step == run.step.kind
            assert (run.quantizer.kind if run.quantizer else "none") == parts.quantizer and run.frozen == parts.frozen
            begun = 0 if parts.quantizer == "lsq-both" else chosen.switch_step
            assert run.switch == (begun if parts.switched else None)
            assert (run.settled or 0) <= run.steps


@pytest.mark.parametrize("fields", [{"images": 5}, {"params": "head.*"}, {"space": "latent"}, {"split": "out"}])
def test_what_no_measurement_of_the_weights_alone_would_heed_is_refused(fields):
    with pytest.raises(UserError, match=" must be .*, got "):
        QuantizationNoiseSpec.make(**fields)
    assert QuantizationNoiseSpec().digest == "3bee72b46e3f6525"  # renamed with its metric; pinned above, too
    if "space" in fields:
        with pytest.raises(UserError, match=" must be .*, got "):
            RoundingSpec.make(**fields)
