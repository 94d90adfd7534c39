"""A Ray cluster: joining or starting one, and work that its actors share.

Source:
    Ray 2.60, https://docs.ray.io/en/latest/data/transforming-data.html (stateful transforms).
"""

import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from swifti2v.errors import ConfigError, SwiftI2VError
from swifti2v.units import format_bytes

LOCAL = "local"
"""Address that starts a cluster of this machine alone."""
STORE_BYTES = 100 * 2**20
"""Ray's object store of a cluster that is started here; no frames pass through it."""
INSTALL = "install it with: pip install 'swifti2v[ray]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The actors of a run."""

    address: str
    """Address of a Ray cluster, ``auto`` for the one of this machine, or ``LOCAL``."""
    cpus_per_actor: int | None = None
    """Cores of an actor on a cluster without GPUs; with None an actor has a GPU."""
    max_attempts: int = 4
    """Runs of a clip whose actors die, before it counts as failed."""
    host_bytes: int = 0
    """Host memory of an actor, which its node must have left; 0 asks for none."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the actors: a cluster that runs has an environment of its own."""

    @property
    def demands(self) -> dict[str, float]:
        """Resources of an actor by Ray's names."""
        place = {"CPU": float(self.cpus_per_actor)} if self.cpus_per_actor else {"GPU": 1.0}
        return {**place, "memory": float(self.host_bytes)} if self.host_bytes else place

    @property
    def resources(self) -> dict[str, Any]:
        """The same as options of Ray's actors."""
        return {
            "num_cpus": self.cpus_per_actor or 0,
            "num_gpus": int(not self.cpus_per_actor),
            **({"memory": self.host_bytes} if self.host_bytes else {}),
            **({"runtime_env": {"env_vars": dict(self.environment)}} if self.environment else {}),
        }

    @property
    def device(self) -> str | None:
        """Device of an actor; None is its GPU."""
        return "cpu" if self.cpus_per_actor else None


@contextmanager
def connect(cluster: Cluster) -> Iterator[None]:
    """Join a cluster, or start one.

    Raises:
        ConfigError: Ray is not installed, there is no such cluster, or an actor fits on no node.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise ConfigError(f"--ray needs Ray; {INSTALL}") from None
    with redirect_stdout(sys.stderr):  # Ray says there what died; ours is the result's alone
        _join(ray, cluster)
        try:
            if count_places(ray.nodes(), cluster.demands) == 0:
                raise ConfigError(
                    f"no node of the cluster has {_describe(cluster.demands)}; without GPUs give "
                    "--cpus-per-actor"
                )
            yield
        finally:
            ray.shutdown()  # which waits for its last messages


def _join(ray: Any, cluster: Cluster) -> None:
    started_here = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    where = started_here if cluster.address == LOCAL else {"address": cluster.address}
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"no Ray cluster at {cluster.address}: {error}") from None


def count_places(nodes: Sequence[Mapping[str, Any]], demands: Mapping[str, float]) -> int:
    """Number of actors that the living nodes have room for."""
    return sum(
        int(min(node["Resources"].get(name, 0.0) // amount for name, amount in demands.items()))
        for node in nodes
        if node["Alive"]
    )


def _describe(demands: Mapping[str, float]) -> str:
    return " and ".join(
        f"{format_bytes(amount)} of memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in demands.items()
    )


def make_with_actors(
    kind: Callable[..., Callable[[list[Any]], Any]],
    arguments: tuple[Any, ...],
    batches: Sequence[Sequence[Any]],
    cluster: Cluster,
) -> Iterator[Any]:
    """Share batches among actors of the cluster that ``connect`` joined (Ray Data).

    An actor that dies is replaced and its batch done again, so a batch done twice must do no harm.

    Args:
        kind: Called once in each actor; the result makes a batch's result of its items.
        arguments: Arguments of ``kind``.
        batches: Items that are done together; all can be pickled.
        cluster: The actors.

    Yields:
        Results in the order in which they come.

    Raises:
        ConfigError: Ray Data is not installed.
        SwiftI2VError: What an actor raised.
    """
    if not batches:
        return
    ray: Any = import_module("ray")
    try:
        data: Any = import_module("ray.data")
        arrow: Any = import_module("pyarrow")
    except ImportError as error:
        raise ConfigError(f"--ray needs Ray Data ({error.name}); {INSTALL}") from None
    data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    number = max(1, min(len(batches), count_places(ray.nodes(), cluster.demands)))
    rows = [{"items": pickle.dumps(list(batch))} for batch in batches]
    results = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Maker,
        batch_size=1,
        batch_format="pyarrow",
        compute=data.ActorPoolStrategy(min_size=1, max_size=number, initial_size=number),
        fn_constructor_args=(kind, arguments, str(Path.cwd()), arrow.table),
        **cluster.resources,
    )
    for row in results.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, SwiftI2VError):
            raise result
        yield result


class _Maker:
    """Makes the results of batches in an actor; its errors travel as results, so nothing hides them."""

    def __init__(
        self,
        kind: Callable[..., Callable[[list[Any]], Any]],
        arguments: tuple[Any, ...],
        folder: str,
        make_table: Callable[..., Any],
    ) -> None:
        os.chdir(folder)  # paths mean the same as in the process that asks
        self._make_table = make_table
        self._error: SwiftI2VError | None = None
        try:
            self._make = kind(*arguments)
        except SwiftI2VError as error:
            self._error = error

    def __call__(self, table: Any) -> Any:
        results = [self._result(items) for items in table.column("items").to_pylist()]
        return self._make_table({"result": [pickle.dumps(result) for result in results]})

    def _result(self, items: bytes) -> Any:
        if self._error is not None:
            return self._error
        try:
            return self._make(pickle.loads(items))
        except SwiftI2VError as error:
            return error


class RayExecutor(Executor):
    """Calls of a function as tasks of the cluster that ``connect`` joined, a core each."""

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **_: Any) -> Iterator[Any]:
        """See ``concurrent.futures.Executor.map``; a task that is lost with its node runs again."""
        ray: Any = import_module("ray")
        task, folder = ray.remote(num_cpus=1)(_call_in), str(Path.cwd())
        pending = [task.remote(folder, fn, *items) for items in zip(*iterables, strict=False)]
        return map(ray.get, pending)


def _call_in(folder: str, fn: Callable[..., Any], *arguments: Any) -> Any:
    os.chdir(folder)
    return fn(*arguments)
