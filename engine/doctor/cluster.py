"""Whether Ray answers: the cluster of a run, or one that starts on this machine."""

import os
import socket
import time
from collections.abc import Iterator

from engine.config import UserError
from engine.doctor.apart import Finding
from engine.doctor.machine import skew

__all__ = ["ray_"]

_KNOCK_S = 5.0
_NODES = 32  # whose clocks are read


def ray_(address: str) -> Iterator[Finding]:
    """Runs a task there; of a cluster that was there before, compares its nodes' clocks."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    if address:
        _knock(address)
    import ray

    from engine import cluster

    started = time.perf_counter()
    with cluster.session(address) as ours:
        _now([node["NodeID"] for node in ray.nodes() if node["Alive"]][:1])
        took_s = time.perf_counter() - started
        if ours:
            found = f"{ray.__version__} starts on this machine, with a token, in {took_s:.0f} s"
            yield Finding("Ray", "ok", found)
            return
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        have = ray.cluster_resources()
        found = (
            f"{ray.__version__} answers at {address}: {len(nodes)} nodes, {have.get('CPU', 0):g} "
            f"CPUs, {have.get('GPU', 0):g} GPUs"
        )
        if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
            yield Finding("Ray", "ok", f"{found}, with a token")
        else:
            mend = "start its head and nodes with RAY_AUTH_MODE=token"
            yield Finding("Ray", "warn", f"{found}; it asks nobody for a token", mend)
        yield skew(max(_now(nodes[:_NODES]), key=abs), "the cluster's")


def _knock(address: str) -> None:
    """Ray itself waits for a minute or more where nothing listens. Raises UserError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_S).close()
    except OSError as error:
        raise UserError(
            f"ray.address: nothing answers at {address} ({error.strerror or error}); start it by "
            "`ray start --head`, or leave ray.address and RAY_ADDRESS empty for one of this machine"
        ) from None


def _now(nodes: list[str]) -> list[float]:
    """How many seconds the clock of each node is ahead of ours: halfway between asking and hearing,
    by the answer that took least of two."""

    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def now() -> float:
        return time.time()

    ahead = []
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        ask = ray.remote(num_cpus=0, scheduling_strategy=there)(now)
        told = []
        for _ in range(2):  # the first one starts a process
            asked = time.time()
            theirs = ray.get(ask.remote())
            heard = time.time()
            told.append((heard - asked, theirs - (asked + heard) / 2))
        ahead.append(min(told)[1])
    return ahead
