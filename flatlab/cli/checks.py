"""Checks before any work begins: of paths, devices, weights, and patterns that match nothing."""

import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatlab.cli.options import DEVICES, FOLDERS, flag
from flatlab.data import catalog
from flatlab.errors import UserError, choose
from flatlab.models import saved

SUFFIXES = {"packed": ".safetensors", "onnx": ".onnx"}  # of exported files, by format

if TYPE_CHECKING:
    from flatlab.jobs.plan import Job
    from flatlab.specs.measurement import MeasurementSpec
    from flatlab.specs.run import Place
    from flatlab.store.runs import Run


SHOWN = 5  # parameters in a message
QUANTIZED = r"\.parametrizations\.(\w+)\.original"
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def paths(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options with `~` expanded in paths; refuse files in place of folders.

    Args:
        given: values by the names of options.

    Raises:
        UserError: if a folder is a file, or is below one.
    """
    found = {name: Path(os.path.expanduser(value)) for name, value in given.items() if isinstance(value, Path)}
    for name in found.keys() & set(FOLDERS):
        _check_folder(name, found[name])
    return {**given, **found}


def _check_folder(name: str, path: Path) -> None:
    """Refuse a path that is a file, or is below one."""
    there = next((each for each in (path, *path.parents) if each.exists()), path)
    if there.exists() and not there.is_dir():
        raise UserError(f"{flag(name)} must be a folder, got {path}: {there} is a file.")


def device(written: str) -> str:
    """Return a device's name; only cuda has several, by number."""
    kind, colon, number = written.partition(":")
    kind = choose("device", kind, DEVICES)
    if colon and not (kind == "cuda" and number.isdecimal()):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {written}.")
    return kind + colon + number


def weights(written: str) -> str:
    """Return the setting's name for `--weights`: for a file its hash."""
    if written in ("none", "imagenet"):
        return written
    from flatlab.files import file_hash

    return f"sha256:{file_hash(weights_file(written))}"


def weights_file(written: str) -> Path:
    """Return the file that `--weights FILE|DIR` names."""
    path = Path(written).expanduser()
    if path.is_dir():
        return saved.weights_in(path)
    if not path.is_file():
        raise UserError(
            f"--weights {written}: no such file; must be none, imagenet, a .safetensors or .pth file, or a folder in "
            "which transformers saved one."
        )
    return path


def space(found: "Sequence[Run]", wanted: str) -> None:
    """Refuse latent weights, and codes, of runs that have none."""
    if wanted == "latent":
        kinds = {run.spec.quantizer.kind if run.spec.quantizer else "none": run for run in found}
        if settled := next((kinds[kind] for kind in kinds if kind not in ("none", "lsq")), None):
            raise UserError(
                f"--space latent needs weights that LSQ quantizes, and {settled.name} has fixed codes; use baked."
            )
        if "lsq" not in kinds:
            raise UserError("--space latent does nothing for runs that are not quantized; leave it out.")
    if wanted == "codes" and (plain := next((run for run in found if run.spec.quantizer is None), None)):
        raise UserError(f"--space codes needs weights on a grid, and {plain.name} is not quantized; leave it out.")


def parameters(found: "Iterable[Run]", measurements: "Iterable[MeasurementSpec]") -> None:
    """Refuse patterns that no parameter of a run matches."""
    for pattern, checkpoint in {(measurement.params, measurement.checkpoint) for measurement in measurements}:
        for run in found if pattern is not None else ():
            _some_match(pattern or "", list(_weights(run, checkpoint)), "trainable parameter")


def corruptions(found: "Iterable[Run]", measurements: "Iterable[MeasurementSpec]") -> None:
    """Refuse corruptions that images of the runs' size do not have, or whose package is missing."""
    for text in {measurement.corruption for measurement in measurements} - {None}:
        for run in found:
            if run.spec.corruption:
                raise UserError(
                    f"The held-out images of {run.name} are corrupted already, by {run.spec.corruption}; leave "
                    f"--corruption {text} out, or name a run without corruption."
                )
            corruption(str(text), run.spec.dataset, run.spec.image_size)


def corruption(text: str, dataset: str, size: int) -> None:
    """Refuse a corruption that images of a size do not have, whose package is missing, or of sentences."""
    from flatlab.data.corruptions import Corruption

    if catalog.is_text(dataset):
        raise UserError(f"Corruptions change images, and {dataset} has sentences; leave --corruption {text} out.")
    Corruption.of(text, size)


def layers(found: "Iterable[Run]", pattern: str | None, checkpoint: str) -> None:
    """Refuse a pattern that no layer of a run matches."""
    for run in found if pattern is not None else ():
        names = [name.rpartition(".")[0] for name, axes in _weights(run, checkpoint).items() if axes > 1]
        _some_match(pattern or "", names, "layer")


def _weights(run: "Run", checkpoint: str) -> dict[str, int]:
    """Return the names of a checkpoint's parameters, without those of quantizers, with their numbers of axes."""
    arrays, _ = run.arrays(run.checkpoint(checkpoint))
    plain = {re.sub(QUANTIZED, r".\1", name): array.ndim for name, array in sorted(arrays.items())}
    return {
        name: axes for name, axes in plain.items() if not name.endswith(BUFFERS) and ".parametrizations." not in name
    }


def _some_match(pattern: str, names: list[str], what: str) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        shown = ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
        raise UserError(f"No {what} matches {pattern!r}; available: {shown}.")


def start(todo: "Sequence[Job]", place: "Place") -> None:
    """Refuse initial weights that do not fit the model; torchvision's are downloaded here, once."""
    starts = {
        (run.model, run.weights, run.image_size)
        for job in todo
        if not job.measurements
        for run in job.runs
        if run.weights != "none"
    }
    for model, weights, size in sorted(starts):
        from flatlab.loading.network import config_of
        from flatlab.models.networks import build_network

        if weights == "imagenet" or place.weights_file:
            given = weights if weights == "imagenet" else str(place.weights_file)
            config = config_of(model, place)
            build_network(
                model, num_classes=2, in_channels=size if model.startswith("hf:") else 3, weights=given, config=config
            )


def domains(groups: "Iterable[str]", place: "Place", dataset: str) -> None:
    """Refuse unknown domains; "source" and "target" are always known."""
    names = [name.strip() for each in groups if each not in ("source", "target") for name in each.split(",")]
    if names:
        known = catalog.domain_names(dataset, Path(place.data_dir) if place.data_dir else None)
        for name in names:
            choose("domain", name, known)


def file_format(file: Path | None, kind: str | None) -> str:
    """Return the format of an exported file: as given, else that of its suffix, else packed; refuse a contradiction."""
    by_suffix = next((each for each, suffix in SUFFIXES.items() if file and file.suffix.lower() == suffix), None)
    if kind is None:
        return by_suffix or "packed"
    kind = choose("format", kind, SUFFIXES)
    if by_suffix not in (None, kind):
        raise UserError(
            f"--format {kind} writes a {SUFFIXES[kind]} file, but --file is {file}: leave --format out, or write a name"
            f" that ends in {SUFFIXES[kind]}."
        )
    return kind


def target(path: Path) -> None:
    """Refuse a path to write to that is a folder, or whose folder does not exist."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is in {path.parent}, which is not a folder"
        raise UserError(f"--file must name a file in an existing folder, got {path}, which {what}.")
