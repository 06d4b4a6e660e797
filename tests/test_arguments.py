"""Numbers that do not do: one sentence each, over the public functions that take some."""

import cases
import numpy as np
import pytest
import torch
from stores import refuses

import flatlab
from flatlab.arguments import distances, finite, whole
from flatlab.errors import count_of

LANDSCAPE = cases.make("mlp").landscape()
PAIR = flatlab.compare_flatness(LANDSCAPE, LANDSCAPE, [0.5], num_samples=2)
SEEN = flatlab.ClassMaps(np.ones((1, 2, 2)), (0,), "by hand", (2, 2))
NO_COUNTS = (0, -1, 2.0, "a", float("nan"), True, [3])
NO_ERRORS = (-0.1, "a", float("nan"), float("inf"), True, [])
NO_RADII = (-1.0, [0.5, -1.0], ["a"], "a", [], [[1.0]], float("nan"), [np.inf], None, [1j], True)


def call(name, *given):
    return lambda **more: getattr(flatlab, name)(LANDSCAPE, *given, **more)


COUNTS = {
    "batch_size": [lambda **more: cases.make("mlp").landscape(**more)],
    "block_size": [LANDSCAPE.blocks, call("average_sharpness", [0.5]), call("worst_sharpness", [0.5])],
    "num_samples": [
        call("sphere_flatness", [0.5]),
        call("average_sharpness", [0.5]),
        call("compare_flatness", LANDSCAPE, [0.5]),
        call("typical_rise", {"own": torch.ones(LANDSCAPE.num_params)}),
    ],
    "steps": [call("worst_rise", [0.5]), call("worst_sharpness", [0.5])],
    "restarts": [call("worst_rise", [0.5]), call("worst_sharpness", [0.5])],
    "grid": [call("connect", LANDSCAPE)],
    "num_shares": [lambda **more: flatlab.ablation(torch.nn.Flatten().eval(), torch.ones(1, 1, 2, 2), SEEN, **more)],
}
ERRORS = [call("sphere_flatness", [0.5]), call("compare_flatness", LANDSCAPE, [0.5]), call("average_sharpness", [0.5])]
RADII = ["sphere_flatness", "average_sharpness", "worst_sharpness", "worst_rise", "trace_check"]


@pytest.mark.parametrize(
    ("act", "name"),
    [pytest.param(act, name, id=f"{name}-{index}") for name, acts in COUNTS.items() for index, act in enumerate(acts)],
)
def test_a_count_is_an_integer(act, name):
    for value in NO_COUNTS:
        refuses(lambda value=value: act(**{name: value}), f"{name} must be an integer >= ", f"got {value!r}")


@pytest.mark.parametrize("act", ERRORS)
@pytest.mark.parametrize("name", ["rel_error", "abs_error", "budget"])
def test_an_error_and_a_budget_are_numbers(act, name):
    for value in NO_ERRORS:
        if (name, value) != ("budget", float("inf")):  # no budget
            refuses(lambda value=value: act(**{name: value}), f"{name} must be a finite number", f"got {value!r}")
    refuses(lambda: act(rel_error=0.0, abs_error=0.0), "must not both be 0")


@pytest.mark.parametrize("name", RADII)
def test_radii_are_numbers(name):
    for value in NO_RADII:
        if name == "trace_check":
            if value is not None:  # its own radii
                refuses(lambda value=value: flatlab.trace_check(LANDSCAPE, radii=value, rel_error=0.9), "radii must be")
        else:
            refuses(lambda value=value: getattr(flatlab, name)(LANDSCAPE, value), "radii must be")


@pytest.mark.parametrize("name", ["line", "plane"])
def test_a_grid_is_a_count_or_places(name):
    for value in (1, 0, 5.0, "a", ["a", "b"], [], [0.0, np.nan]):
        refuses(lambda value=value: getattr(flatlab, name)(LANDSCAPE, grid=value), "grid")


def test_a_level_is_a_probability():
    for value in (0, 1, -0.5, 95, "a", float("nan"), True):
        for ask in (PAIR.verdict, PAIR.interval, PAIR.ratio):
            refuses(lambda ask=ask, value=value: ask(level=value), "strictly between 0 and 1")


def test_what_does_is_taken():
    assert whole("n", np.int64(3)) == whole("n", torch.tensor(3)) == 3 and whole("n", 0, least=0) == 0
    assert finite("x", np.float32(0.5)) == 0.5 and finite("x", -1) == -1.0
    assert distances("r", 2).tolist() == [2.0] and distances("r", torch.tensor([0, 1])).tolist() == [0.0, 1.0]
    refuses(lambda: finite("x", 0.0, above=0.0), "x must be a finite number > 0, got 0.0")
    refuses(lambda: distances("r", [0.0], above=0.0), "r must be one or more finite numbers > 0")


@pytest.mark.parametrize(("number", "text"), [(0, "0 jobs"), (1, "1 job"), (2, "2 jobs"), (1200, "1,200 jobs")])
def test_one_is_singular(number, text):
    assert count_of(number, "job") == text
