"""Ray clusters of several nodes on this machine, in short-named folders."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import psutil

NODE_BYTES = 100 * 2**20


@contextmanager
def cluster(*cpus: int) -> Iterator[Any]:
    """A cluster with a head without cores and a node for each number of them."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster_utils: Any = import_module("ray.cluster_utils")
    options = {"object_store_memory": NODE_BYTES, "include_dashboard": False}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 0})
    try:
        for number in cpus:
            made.add_node(num_cpus=number, object_store_memory=NODE_BYTES)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


def find_actors() -> list[psutil.Process]:
    """Processes of actors that make clips."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ray::ClipActor" in " ".join(process.info["cmdline"] or [])
    ]


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)
