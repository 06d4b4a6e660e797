"""The doorway: every public name is there, lazily, and none hides behind a module of the same name."""

import inspect
import subprocess
import sys
from importlib.util import find_spec

import pytest

import flatlab
from flatlab import api


def test_every_public_name_is_reached_from_the_package():
    assert len(set(api.__all__)) == len(api.__all__)
    for name in api.__all__:
        assert getattr(flatlab, name) is getattr(api, name)
        assert find_spec(f"flatlab.{name}") is None, f"flatlab.{name} would be the module once that is imported"
    assert set(dir(flatlab)) == {"__version__", *api.__all__}


def test_a_name_that_is_none_lists_those_there_are():
    with pytest.raises(AttributeError, match=r"flatlab has no 'flatnes'; public names: .*sphere_flatness"):
        _ = flatlab.flatnes


def test_importing_the_package_loads_nothing_heavy():
    line = "import sys, flatlab; print({'torch', 'numpy', 'pandas'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


def test_a_landscape_loads_neither_tables_nor_pictures_nor_networks():
    heavy = "pandas matplotlib seaborn sklearn torchvision rich cv2 plotly scipy.stats scipy.ndimage scipy.interpolate"
    line = f"import sys, flatlab; flatlab.Landscape; print(set({heavy.split()}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "set()"


RECEIVING = [
    (name, argument.name)
    for name in api.__all__
    if inspect.isfunction(getattr(api, name))
    for argument in inspect.signature(getattr(api, name)).parameters.values()
    if "Landscape" in str(argument.annotation)
]


@pytest.mark.parametrize(("name", "argument"), RECEIVING)
def test_a_function_of_landscapes_refuses_all_else_in_a_sentence(name, argument):
    import cases

    case = cases.softmax()
    words = {each: case for _, each in [pair for pair in RECEIVING if pair[0] == name] if each != argument}
    model = case.model
    with pytest.raises(flatlab.UserError, match=rf"^{name}: {argument} must be a Landscape.*, got .*: build Landscape"):
        getattr(flatlab, name)(**words, **{argument: model})
    with pytest.raises(flatlab.UserError, match=rf"^{name}: {argument} must be a Landscape.*, got list\.$"):
        getattr(flatlab, name)(**words, **{argument: []})


def test_functions_of_landscapes_are_found():
    assert len(RECEIVING) > 20 and ("compare_flatness", "b") in RECEIVING
