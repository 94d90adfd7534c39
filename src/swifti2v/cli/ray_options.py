"""Options of commands that may run on a Ray cluster."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from swifti2v.cli.models_dir import models_environment
from swifti2v.errors import ConfigError

if TYPE_CHECKING:
    from swifti2v.cluster import Cluster


@dataclass(frozen=True, kw_only=True, slots=True)
class RayOptions:
    """Options that name a cluster."""

    ray: Annotated[
        str | None,
        typer.Option(
            metavar="local|auto|ADDRESS",
            help="Ray cluster to work on; local starts one on this machine.",
        ),
    ] = None
    cpus_per_actor: Annotated[
        int | None,
        typer.Option(min=1, help="Cores of an actor on a cluster without GPUs (default a GPU)."),
    ] = None


def find_cluster(options: RayOptions, shard: str, device: str | None = None) -> "Cluster | None":
    """The cluster that the options name; None without one.

    Raises:
        ConfigError: Other options say something else.
    """
    if options.ray is None:
        if options.cpus_per_actor is not None:
            raise ConfigError("--cpus-per-actor is for --ray; leave it out, or name a cluster")
        return None
    if shard != "1/1":
        raise ConfigError(f"--ray shares all of the work; leave out --shard {shard}")
    if device is not None:
        raise ConfigError(
            f"--ray gives an actor a GPU, or --cpus-per-actor cores; leave out --device {device}"
        )
    from swifti2v.cluster import Cluster

    return Cluster(
        address=options.ray,
        cpus_per_actor=options.cpus_per_actor,
        environment=models_environment(),
    )
