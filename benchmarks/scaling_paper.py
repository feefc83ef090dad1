"""What a run would do on many GPUs: arithmetic over the planner's rates. Nothing here is measured.

The planner tells what each stage allows. On top of that come here, for the ranks that train:

- a step of a gang lasts as long as that of its slowest rank: simulated, the mean of the largest of
  P lognormal times of mean 1 and spread `step_cv`;
- its collectives, taken to overlap with nothing: all-reduce of n bytes among P ranks lasts
      2 (P - 1)/P * n / B  +  2 ceil(log2 P) * hop,
  the bytes of a ring, over a node's link B (inside one node: over its own wires), and the hops of a
  tree, which is what is chosen for small tensors. Beside the gradient's there are SMALL ones;
- the padding of a pass's last step, by engine.data.order.

Each GPU and step has `batch` images, so that the batch grows with the GPUs: what that does to what
is learned is not told here.
"""

import math
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from engine.data.order import Blocks, Order
from engine.plan import Ceilings, Job, Plan, inline, plans, settings, stored, stream
from engine.rates import Rates

__all__ = ["PARAMETERS", "Assumed", "Estimate", "all_reduce_s", "estimate", "ring_bytes"]

Source = Literal["inline", "stream", "store"]

# Prompts of nine layers; linear, batch norm and linear of the projector.
PARAMETERS = 9 * 4 * 768 + (512 + 1) * 768 + 2 * 768 + (768 + 1) * 768
GRADIENT_BYTES = 4 * PARAMETERS  # fp32
# Collectives of a step beside the gradient's, of a few kB: the images of all ranks; three sums of
# the batch norm, and the gradients of two; whether to stop.
SMALL = 7
MOST_RANKS, STEPS = 4096, 256  # simulated
PERIOD_S = 2.0  # between reports of a student to the roster, and of a teacher to the driver


class Assumed(NamedTuple):
    """What no run has told."""

    batch: int = 64  # images of a GPU and step
    hop_s: float = 10e-6  # of a message between two GPUs, however small
    node_gb_s: float = 100.0  # between GPUs of one node
    step_cv: float = 0.02  # spread of a step's time, over its mean


class Estimate(NamedTuple):
    """Of one way to run. Rates are over all GPUs."""

    source: Source
    teachers: int
    students: int
    images_per_s: float
    efficiency: float  # of one GPU's images/s: inline's, of a store one that reads a store too
    bound: str
    steps: int  # of a pass
    reduced_bytes: float  # that a rank sends in a step
    reduced_s: float  # a step, in collectives
    step_s: float
    label_bytes_per_s: float  # on the wire: from teachers, or from a store
    read_bytes_per_s: float  # of shards, from storage; of a stream, by both sides
    object_store_bytes: float  # labels on their way, in the memory of all nodes
    label_calls_per_s: float  # of all students to all teachers: a block each
    roster_calls_per_s: float
    driver_calls_per_s: float
    pass_hours: float


def ring_bytes(ranks: int, size: float) -> float:
    """That each rank of a ring sends, to reduce `size` bytes and have all know the result."""
    return 2 * (ranks - 1) / ranks * size


def all_reduce_s(ranks: int, size: float, bytes_per_s: float, hop_s: float) -> float:
    """See above."""
    return ring_bytes(ranks, size) / bytes_per_s + 2 * math.ceil(math.log2(ranks)) * hop_s


def slowest(ranks: int, cv: float) -> float:
    """The mean of the slowest rank's step, over the mean step: simulated."""
    return float(_slowest(cv)[ranks - 1])


@cache
def _slowest(cv: float) -> np.ndarray:
    """By the number of ranks: [MOST_RANKS]."""
    sigma2 = math.log(1 + cv**2)
    draws = np.random.default_rng(1).lognormal(-sigma2 / 2, sigma2**0.5, (STEPS, MOST_RANKS))
    found = np.maximum.accumulate(draws, axis=1).mean(axis=0)
    return np.maximum(found / found[0], 1.0)


def estimate(rates: Rates, assumed: Assumed, source: Source, gpus: int, images: int) -> Estimate:
    """Of a run over `images` with labels of `source`. A stream has the planner's best split, and
    needs two GPUs. `rates` have to tell of the link and of an image's bytes."""
    assert gpus <= MOST_RANKS and rates.link_gbit_s and rates.image_bytes
    plan, ceilings = _way(rates, source, gpus)
    ranks, own = plan.students, "teacher and student" if source == "inline" else "student"
    batch = min(assumed.batch, math.ceil(images / ranks))
    steps = Order(Blocks(np.array([images]), 512), ranks, ranks * batch, 1, 0).steps
    alone_s = ranks * batch / ceilings.pop(own)
    reduced_s = _collectives_s(ranks, gpus > rates.gpus_per_node, rates.link_gbit_s, assumed)
    waits_s = alone_s * (slowest(ranks, assumed.step_cv) - 1)
    step_s = alone_s + waits_s + reduced_s
    # What a pass takes of each stage; all overlap, but for the parts of a step.
    pass_s = {stage: images / rate for stage, rate in ceilings.items()}
    parts = {own: alone_s, "the slowest rank": waits_s, "all-reduce": reduced_s}
    pass_s[_most(parts)] = steps * step_s
    bound = _most(pass_s)
    rate = images / pass_s[bound]
    one = rate
    if gpus > 1:
        alone: Source = "store" if source == "store" else "inline"
        one = estimate(rates, assumed, alone, 1, images).images_per_s
    streams = source == "stream"
    labels = 0.0 if source == "inline" else rate * rates.label_bytes
    told = settings(plan, Job(images=images), rates)
    block = int(told["corpus"]["block_samples"]) if streams else 0
    outstanding = int(told["targets"]["outstanding"]) if streams else 0
    return Estimate(
        source=source,
        teachers=plan.teachers,
        students=ranks,
        images_per_s=rate,
        efficiency=rate / gpus / one,
        bound=bound,
        steps=steps,
        reduced_bytes=ring_bytes(ranks, GRADIENT_BYTES),
        reduced_s=reduced_s,
        step_s=step_s,
        label_bytes_per_s=labels,
        read_bytes_per_s=rate * rates.image_bytes * (2 if streams else 1),
        object_store_bytes=ranks * outstanding * block * rates.label_bytes,
        label_calls_per_s=rate / block if streams else 0.0,
        roster_calls_per_s=(ranks + 2) / PERIOD_S if streams else 0.0,
        driver_calls_per_s=(plan.teachers + 2) / PERIOD_S if streams else 0.0,
        pass_hours=pass_s[bound] / 3600,
    )


def _collectives_s(ranks: int, several_nodes: bool, link_gbit_s: float, assumed: Assumed) -> float:
    """Of one step."""
    wire = link_gbit_s * 1e9 / 8 if several_nodes else assumed.node_gb_s * 1e9
    small_s = all_reduce_s(ranks, 0, wire, assumed.hop_s)
    return all_reduce_s(ranks, GRADIENT_BYTES, wire, assumed.hop_s) + SMALL * small_s


def _most(times: dict[str, float]) -> str:
    return max(times, key=times.__getitem__)


@cache
def _split(rates: Rates, gpus: int) -> dict[str, Plan]:
    ways = plans(rates, Job(images=1, passes=1), gpus)
    return {way.source: way for way in ways if not way.store}


def _way(rates: Rates, source: Source, gpus: int) -> tuple[Plan, Ceilings]:
    """The planner's split, and what each stage of it allows."""
    if source == "stream":
        plan = _split(rates, gpus)["stream"]
        return plan, stream(rates, plan.teachers, plan.students)
    plan = _split(rates, gpus)["inline"]
    if source == "inline":
        return plan, inline(rates, gpus)
    return plan, stored(rates, gpus, math.ceil(gpus / rates.gpus_per_node))
