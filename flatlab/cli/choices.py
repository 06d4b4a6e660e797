"""The chosen options of a command, as a setting, a store and a place."""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic.fields import FieldInfo

from flatlab.cli import checks
from flatlab.cli.errors import reported
from flatlab.cli.options import (
    CLUSTERS,
    MODELS,
    NAMED,
    OF_SETTING,
    SIDES,
    WORDS,
    Options,
    channels,
    field_option,
    flag,
    shared_option,
)
from flatlab.data import catalog
from flatlab.errors import UserError, choose, printable
from flatlab.models import saved

if TYPE_CHECKING:  # imported where they are used, so that `--help` does not load numpy
    import pandas as pd

    from flatlab.specs.engine import Engine
    from flatlab.specs.run import Place
    from flatlab.specs.settings import Setting
    from flatlab.store.runs import Run, RunStore

LAYOUT = {"folder": "DOMAIN/CLASS/IMAGE", "folder-text": "DOMAIN.tsv"}
CLUSTER_WORKERS = 16  # if --max-workers is not given
SHORT = 8  # digits of a digest on a screen
Asked = Mapping[str, tuple[str, FieldInfo]]


@dataclass(frozen=True, kw_only=True)
class Choices(Options):
    """The options of a command; those that it does not have are at their defaults."""

    taken: frozenset[str] = frozenset()  # by the command
    written: frozenset[str] = frozenset()  # on the command line, the command's own options included

    def without(self, name: str) -> "Choices":
        """Return the choices with an option at its default, as if it had not been given."""
        usual: dict[str, Any] = {name: WORDS[name].default, "written": self.written - {name}}
        return replace(self, **usual)

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Refuse options that were given and have no effect.

        Args:
            names: of the options.
            why: such as "with --axes line".

        Raises:
            UserError: for the first of them.
        """
        for name in names:
            if name in self.written:
                raise UserError(f"{flag(name)} does nothing {why}; leave it out.")

    def named(self, words: Sequence[str]) -> "list[Run]":
        """Return the runs with these names, among those that `--held-out` and `--seed` select."""
        from flatlab.cli.errors import say
        from flatlab.cli.parse import named

        return named(self.runs(), words, held_out=self.held_out, seed=self.seed, note=lambda each: say(each, mark=""))

    def found(self, words: Sequence[str]) -> "list[Run]":
        """Return the runs with these names; refuse unfinished ones."""
        found = self.named(words)
        for run in found:
            run.require_done()
        return found

    def runs(self) -> "RunStore":
        """Return the store."""
        from flatlab.store.runs import RunStore

        return RunStore(self.store or "runs")

    def folder(self) -> Path | None:
        """Return the data folder: `--data-dir`, or PATH of `folder:PATH`."""
        return self._own() if self.data_dir is None else self.data_dir

    def _own(self) -> Path | None:
        """Return PATH of `folder:PATH`; None for a data set known by name."""
        kind, _, path = str(self.dataset).partition(":")
        if (kind := kind.strip().lower()) not in LAYOUT:
            return None
        if self.data_dir is not None:
            raise UserError(
                f"--data-dir does nothing with --dataset {kind}:PATH, which names the folder; leave it out."
            )
        if not path.strip():
            raise UserError(f"--dataset {kind}:PATH must name a folder with {LAYOUT[kind]}, got no path.")
        return Path(path.strip()).expanduser()

    def name(self) -> str:
        """Return the data set's name; for a folder its last part, since its location is not part of a run."""
        own = self._own()
        if own is None:
            return catalog.canonical(self.dataset or self._chosen().dataset)
        folder, kind = self.folder(), str(self.dataset).partition(":")[0].strip().lower()
        if folder is None or not folder.is_dir():
            raise UserError(f"--dataset {kind}:PATH must name a folder with {LAYOUT[kind]}, got {folder}.")
        return catalog.canonical(f"{kind}:{own.resolve().name}")

    def _chosen(self) -> "Setting":
        from flatlab.specs.settings import setting

        return setting(self.setting)

    def make_setting(self) -> "Setting":
        """Return the setting with all changes; of several data sets, the first one's with the others."""
        if self.datasets is None:
            return self._setting()
        names = [name.strip() for name in self.datasets.split(",")]
        if self.dataset:
            raise UserError("Give --dataset or --datasets, not both.")
        if len({catalog.canonical(name) for name in names}) < len(names):
            raise UserError(f"--datasets must name each data set once, got {self.datasets}.")
        first, *others = (replace(self, dataset=name)._setting() for name in names)
        return first.replace(others=tuple(others))

    def _setting(self) -> "Setting":
        from flatlab.specs.settings import for_data, setting

        dataset, folder = self.name(), self.folder()
        self._check_model(dataset)
        if self.corruption:
            checks.corruption(self.corruption, dataset, self.image_size or for_data(self._chosen(), dataset).image_size)
        known = catalog.facts(dataset)
        several = "," in (self.datasets or "")  # --data-dir then applies to those that have a folder
        if known is None or known.folder or (folder is not None and not several):  # for embedded data `locate` raises
            catalog.locate(dataset, folder)
        start = self._start()
        weights = checks.weights(start) if start else None
        if self.epochs and self.steps:
            raise UserError(f"--epochs {self.epochs} sets the number of steps; leave --steps {self.steps} out.")
        changes = {field: getattr(self, option) for option, field in OF_SETTING.items()}
        return setting(
            for_data(self._chosen(), dataset, model=self._model(), weights=weights),
            **changes,
            model=self._model(),
            domains=catalog.domain_names(dataset, folder),
            sizes=tuple(catalog.sizes(dataset, folder).values()) if self.epochs else None,
            named=bool(known and known.held_out) or None,
            held_out=catalog.held_out(dataset, folder, self.held_out),
            signed=False if self.unsigned else None,
            target_logged=False if self.no_target else None,
            leave_out=tuple(name.strip() for name in self.leave_out.split(",")) if self.leave_out else None,
            rows=str(self.rows) if self.rows else None,
        )

    def _model(self) -> str | None:
        if not self.model or not saved.is_saved(self.model):
            return _known(self.model) if self.model else None
        return saved.named(self.model)

    def _start(self) -> str | None:
        """Return `--weights`; if not given, PATH for `hf:PATH`, which has weights of its own."""
        own = self.model and saved.is_saved(self.model)
        return self.weights or (str(saved.path_of(str(self.model))) if own else None)

    def _check_model(self, dataset: str) -> None:
        """Refuse networks that do not suit the data, and image sizes other than 16 for digits."""
        model = self._model()
        if model and (channels(model) == 0) != catalog.is_text(dataset):
            kind, fits = "images", "digits-cnn"
            if catalog.is_text(dataset):
                kind, fits = "sentences", "sentences-transformer or hf:PATH"
            raise UserError(
                f"{dataset} has {kind}, which {model} does not take; use --model {fits} or another --dataset."
            )
        self.check_side(model, self.image_size or (16 if dataset == "digits" else 224))
        if dataset != "digits":
            return
        if model and channels(model):
            raise UserError(
                f"{model} takes images of {channels(model)} channels, and digits have 1; "
                "use --model digits-cnn or another --dataset."
            )
        if self.image_size not in (None, 16):
            raise UserError(f"digits are 16 x 16 pixels; leave --image-size {self.image_size} out.")

    @staticmethod
    def check_side(model: str | None, size: int) -> None:
        """Refuse a size of images that a network does not take."""
        side = SIDES.get(model or "", size)
        if size != side:
            raise UserError(f"{model} takes images of {side} pixels, got {size}: write --image-size {side}.")

    def place(self) -> "Place":
        """Return the machine facts."""
        from flatlab.specs.run import Place

        folder = self.folder()
        start, model_dir = self._start(), self.model_dir
        if self.model and saved.is_saved(self.model):
            model_dir = saved.path_of(self.model)
        place = Place(
            data_dir=str(folder.resolve()) if folder else None,
            model_dir=str(model_dir.resolve()) if model_dir else None,
            weights_file=None if start in (None, "none", "imagenet") else str(checks.weights_file(start).resolve()),
            cache=str(self.cache.resolve()) if self.cache else None,
            device=checks.device(self.device),
        )
        if self.executor == "local" and place.device.partition(":")[0] not in ("auto", "cpu"):
            from flatlab.loading import data as loading_data

            loading_data.device(place)  # refuses a missing device before the work; loads torch
        return place

    def engine(self, jobs: int) -> "Engine":
        """Return the engine on which the workers of a number of jobs are started.

        Raises:
            UserError: for an option that the executor does not have.
        """
        from flatlab.environment import cores
        from flatlab.specs.engine import Engine

        for name in sorted(self.written & CLUSTERS.keys()):
            if self.executor not in CLUSTERS[name]:
                raise UserError(
                    f"{flag(name)} does nothing with --executor {self.executor}; leave it out, or write "
                    f"--executor {CLUSTERS[name][0]}."
                )
        if self.executor == "local":
            usual = 1 if _accelerated(self.device) else cores()
            return Engine(workers=max(1, min(jobs, self.workers or usual)))
        if self.workers:
            raise UserError(f"--workers counts processes of this machine; write --max-workers {self.workers}.")
        asked = {name: getattr(self, name) for name in CLUSTERS if name in Engine.model_fields}
        given = {name: value for name, value in asked.items() if value not in (None, [])}
        if "slurm_arg" in given:
            given["slurm_arg"] = tuple(given["slurm_arg"])
        return Engine.make(
            executor=self.executor, workers=max(1, min(jobs, self.max_workers or CLUSTER_WORKERS)), **given
        )

    def answer(self, table: "pd.DataFrame", title: str, formats: dict[str, str] | None = None) -> None:
        """Print a frame: as a table, or with --json as JSON."""
        from flatlab.cli import display

        if self.json:
            typer.echo(table.to_json(orient="records", double_precision=15))
            return
        if "run" in table and display.out.is_terminal:  # a pipe gets all digits
            table = table.assign(run=table["run"].str[:SHORT])
        display.frame(table, title, formats=formats)

    def answer_facts(self, facts: Any, sentence: str) -> None:
        """Print a sentence, or with --json its facts as JSON."""
        from flatlab.files import strict_json

        typer.echo(strict_json(facts) if self.json else "\n".join(map(printable, sentence.split("\n"))))


def _known(written: str) -> str:
    """Return a network's name in its canonical spelling; timm knows its own names."""
    kind, _, name = written.partition(":")
    if kind.strip().lower() == "timm" and name.strip():
        return f"timm:{name.strip()}"
    return choose("model", written, [*MODELS, "timm:NAME", "hf:PATH", "clip:PATH"])


def _accelerated(device: str) -> bool:
    """Return whether an accelerator is used, without loading torch."""
    if device != "auto":
        return not device.startswith("cpu")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return Path("/proc/driver/nvidia/version").exists() and not hidden


def takes(
    *words: str, asks: Asked | None = None, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options.

    The command receives the shared ones as one `Choices`, fields of a spec as the mapping `fields`, and its own
    parameters by name.

    Args:
        words: names of `Options`.
        asks: options that set fields of a spec (`options.asked`).
        defaults: defaults that differ from the usual ones.
    """
    fields = {name: field for name, (field, _) in (asks or {}).items()}
    options = {name: field_option(name, info) for name, (_, info) in (asks or {}).items()}
    selecting = set(NAMED) <= {*words} and "dataset" not in words
    options |= {word: shared_option(word, selecting=selecting) for word in words}

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        def run(context: typer.Context, **given: Any) -> None:
            with reported(debug=given["debug"]):
                given |= {name: option.rule.checked(name, given[name]) for name, option in options.items()}
                given = checks.paths(given)
                written = frozenset(name for name in given if _is_written(context, name))
                chosen = Choices(**{word: given.pop(word) for word in words}, taken=frozenset(words), written=written)
                asked = {field: given.pop(name) for name, field in fields.items()}
                command(chosen, **given, **({"fields": asked} if asked else {}))

        only = inspect.Parameter.KEYWORD_ONLY
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [inspect.Parameter("context", only, annotation=typer.Context)]
        parameters += [each.replace(kind=only) for each in own if each.name != "fields"]
        for name, option in options.items():
            default = defaults.get(name, option.default)
            parameters.append(inspect.Parameter(name, only, annotation=option.annotation, default=default))
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return wrap


def _is_written(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
