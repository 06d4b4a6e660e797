"""Where workers are started, and what each of them gets; part of no digest."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from flatlab.specs.base import Spec


def _key_and_value(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z][\w-]*=.+", text):
        raise ValueError("must be KEY=VALUE, such as account=vision")
    return text


SlurmArgument = Annotated[str, AfterValidator(_key_and_value)]


class Engine(Spec):
    """Where workers are started, and what each of them gets."""

    executor: Literal["local", "slurm", "ray"] = Field(
        "local", description="Where the workers are started: on this machine, as a Slurm array, or as tasks of Ray."
    )
    workers: int = Field(1, ge=1, le=10_000)
    gpus: int = Field(0, ge=0, le=64, description="GPUs of each worker.")
    cpus: int = Field(1, ge=1, le=1024, description="Cores, and threads, of each worker.")
    memory: int | None = Field(None, ge=1, le=65536, description="Memory of each worker in GB.")
    time: int = Field(60, ge=3, le=525600, description="Minutes after which Slurm requeues a worker.")
    partition: str | None = Field(None, description="Slurm's partition.")
    slurm_arg: tuple[SlurmArgument, ...] = Field((), description="Another option of sbatch; may be repeated.")
    ray_address: str | None = Field(None, description="Address of a Ray cluster; without it one is started here.")
