"""A submitted plan: a folder of the store with the plan, and the events and logs of its workers.

<store>/.jobs/<time>-<token>/plan.json  engine.json  events-<worker>.jsonl  failed-<job>.json  logs/
"""

import json
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from flatlab import files
from flatlab.jobs.plan import Event, Job, OnEvent, WorkPlan
from flatlab.store.runs import RunStore

FOLDER = ".jobs"
IDLE_SECONDS = 0.1  # between the first two readings of the events


class Submission:
    """A submitted plan."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, int] = {}  # bytes of each file of events that were passed on

    @classmethod
    def create(cls, plan: WorkPlan) -> Self:
        """Write a plan to a new folder of its store."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        made = cls(Path(plan.store) / FOLDER / name)
        (made.folder / "logs").mkdir(parents=True)
        files.write_bytes(made.folder / "plan.json", plan.canonical().encode())
        return made

    @property
    def plan(self) -> WorkPlan:
        """The plan."""
        return WorkPlan.parse((self.folder / "plan.json").read_text())

    @property
    def facts(self) -> dict[str, Any]:
        """The engine's name, its identifier of the submission and the number of workers; empty before the start."""
        path = self.folder / "engine.json"
        return files.read_json(path) if path.exists() else {}

    def started(self, **facts: Any) -> None:
        """Record the engine's facts about the submission."""
        files.write_json(self.folder / "engine.json", facts)

    def events(self, worker: int) -> Path:
        """Return the file to which a worker appends its events, one JSON object a line."""
        return self.folder / f"events-{worker}.jsonl"

    def news(self) -> Iterator[Event]:
        """Yield the events written since the last call; an incomplete line is left for the next one."""
        for path in sorted(self.folder.glob("events-*.jsonl")):
            with open(path, "rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            whole = text.rpartition(b"\n")[0]
            self._read[path] = self._read.get(path, 0) + len(whole) + bool(whole)
            for line in whole.splitlines():
                if line.startswith(b"{") and line.endswith(b"}"):  # other lines are a library's, or cut off by a kill
                    yield json.loads(line)

    def follow(self, plan: WorkPlan, alive: Callable[[], bool], on_event: OnEvent) -> list[Event]:
        """Pass on the events of the workers until all jobs are settled, or no worker is left; return the errors.

        Args:
            plan: the awaited jobs; they may be fewer than those submitted, and have other names.
            alive: whether a worker is running or pending.
            on_event: called with the events of these jobs, and with the workers' notes.
        """
        names = _names(self.plan.jobs, plan.jobs)
        waiting, failed = {job.name: job for job in plan.jobs}, dict[str, Event]()
        running, pauses = True, files.pauses(IDLE_SECONDS)
        while running and waiting:
            running = alive()  # before reading, so that a worker's last events are read
            for event in self.news():
                pauses = files.pauses(IDLE_SECONDS)
                named = {**event, "job": names.get(event["job"], event["job"])}
                if event.get("finished") or "error" in event:
                    waiting.pop(named["job"], None)
                if "error" in event:
                    failed.setdefault(named["job"], named)
                if event["job"] in names or "note" in event:
                    on_event(named)
            if running and waiting:
                time.sleep(next(pauses))
        sentence = f"its workers ended before it; their output is in {self.folder}."
        lost = [name for name, job in waiting.items() if not job.done(RunStore(plan.store))]
        return [*failed.values(), *({"job": name, "error": sentence} for name in lost)]


def _names(theirs: tuple[Job, ...], ours: tuple[Job, ...]) -> dict[str, str]:
    """Return our name of each of their jobs that does one of ours."""
    made_by = {name: job.name for job in theirs for name in job.fills}
    return {made_by[name]: job.name for job in ours for name in job.fills if name in made_by}


def submissions(store: RunStore) -> list[Submission]:
    """Return the submissions of a store, the oldest first."""
    return [Submission(path.parent) for path in sorted((store.root / FOLDER).glob("*/plan.json"))]
