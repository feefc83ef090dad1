"""What grows with blocks, ranks, teachers and recorded files, measured on this machine."""

import hashlib
import multiprocessing
import pickle
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from manifests import manifest_row
from meters import micros, resident_bytes
from rows import Bench
from scaling_paper import PARAMETERS, ring_bytes

from engine.data.order import Blocks, Order, Share
from engine.labels.choice import Choice
from engine.labels.roster import Roster

__all__ = ["all_reduce", "choice", "corpus", "indexes", "order", "require_whole", "store"]

BLOCK = 512
SHARD = 50 * BLOCK  # samples


def corpus(bench: Bench, folder: Path, shards: int, rounds: int) -> float:
    """Opens a manifest of made-up shards that lie afar; gives the bytes of memory a shard."""
    from engine.data.corpus import Corpus  # pyarrow, which a GPU box may not have
    from engine.data.manifest import MANIFEST, write_manifest

    folder.mkdir()
    write_manifest(folder, (manifest_row(number, SHARD) for number in range(shards)))
    seconds, before = [], resident_bytes()
    for turn in range(rounds):
        started = time.perf_counter()
        opened = Corpus.open(str(folder), BLOCK)
        seconds.append(time.perf_counter() - started)
        if turn == 0:
            grown = resident_bytes() - before
    blocks = len(opened.blocks)
    case, config = f"corpus, {shards} shards", {"shards": shards, "blocks": blocks}
    per_million = [1e6 / blocks * s for s in seconds]
    bench.add(case, "ours", "open_per_1e6_blocks", "s", per_million, config)
    bench.add(case, "ours", "memory_per_block", "B", [grown / blocks], config)
    size = (folder / MANIFEST).stat().st_size
    bench.add(case, "ours", "manifest_per_shard", "B", [size / shards], config)
    return grown / shards


def indexes(bench: Bench, folder: Path, shards: int, samples: int) -> None:
    """Reads the index of shard after shard, as one does whose blocks lie all over a corpus: more
    than it keeps. A local index is mapped."""
    import pyarrow as pa

    from engine.data.corpus import Corpus
    from engine.data.manifest import SAMPLES, Facts, ShardIndex, write_manifest

    folder.mkdir()
    random, rows = np.random.default_rng(0), []
    for number in range(shards):
        url = f"https://shards.example.org/{number:06d}.tar"
        columns: dict[str, Any] = {
            "key": [f"{number:06d}-{place:06d}" for place in range(samples)],
            "offset": np.arange(samples) * 100_000,
            "bytes": np.full(samples, 99_000),
            "digest": random.integers(2**63, size=samples, dtype=np.uint64),
            "width": np.full(samples, 500, np.int32),
            "height": np.full(samples, 375, np.int32),
            "format": np.zeros(samples, np.int8),
            "orientation": np.ones(samples, np.int8),
            "plain": np.ones(samples, bool),
            "label": np.full(samples, -1),
            "reason": pa.nulls(samples, pa.string()),
        }
        one = ShardIndex(Facts(url, "tar", 10**9, "tag"), pa.table(columns, SAMPLES))
        (folder / f"{number:06d}.arrow").write_bytes(one.bytes())
        rows.append(one.row(url, f"{number:06d}.arrow"))
    write_manifest(folder, rows)
    opened = Corpus.open(str(folder), BLOCK)
    times = [micros(partial(opened.labels, shard)) for shard in range(shards)]
    config = {"shards": shards, "samples": samples}
    bench.add(f"index, {samples} samples", "ours", "load_per_block", "us", times, config)


def order(bench: Bench, shards: int, ranks: int, steps: int) -> None:
    """Plans steps all over a pass of some ranks, 64 images each, and checks them."""
    blocks = Blocks(np.full(shards, SHARD), BLOCK)

    def planned_anew() -> Order:
        made = Order(blocks, max(ranks, 64), 64 * max(ranks, 64), 4 * BLOCK, seed=1)
        made.share(0, 0, 0, ranks)  # has the sums over shards made
        return made

    first_us = micros(planned_anew)
    tracemalloc.start()
    planned = planned_anew()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    anywhere = np.random.default_rng(0).integers(planned.steps, size=steps).tolist()
    case = f"order, {ranks} ranks"
    config = {"blocks": len(blocks), "lanes": planned.lanes, "batch": planned.batch}
    share = [micros(partial(planned.share, 0, step, 0, ranks)) for step in anywhere]
    coming = [micros(partial(planned.coming, 0, step, 0, ranks)) for step in anywhere]
    window = planned.window_samples * planned.lanes // planned.batch  # its first step brings blocks
    entering = [step // window * window for step in anywhere]
    entered = [micros(partial(planned.coming, 0, step, 0, ranks, True)) for step in entering]
    bench.add(case, "ours", "first_step", "us", [first_us], config)
    bench.add(case, "ours", "memory_per_block", "B", [held / len(blocks)], config)
    bench.add(case, "ours", "share_per_rank_step", "us", share, config)
    bench.add(case, "ours", "coming_per_rank_step", "us", coming, config)
    bench.add(case, "ours", "window_per_rank", "us", entered, config)
    for step in anywhere[:3]:
        require_whole(planned, 0, step, ranks)


def require_whole(planned: Order, pass_: int, step: int, ranks: int) -> int:
    """Checks that the shares of a step have each of its samples once; gives how many they are."""
    shares = [planned.share(pass_, step, rank, ranks) for rank in range(ranks)]
    found = [sample for share in shares for sample in _samples(share)]
    whole = _samples(planned.share(pass_, step))
    assert len(set(found)) == len(found), "two ranks train the same sample"
    assert set(found) == set(whole), "the ranks' shares are not the step's"
    return len(found)


def _samples(share: Share) -> list[tuple[int, int]]:
    """Block and place of each."""
    told = share.blocks[share.valid].tolist(), share.offsets[share.valid].tolist()
    return list(zip(*told, strict=True))


def choice(bench: Bench, teachers: int, labels: int) -> None:
    """What a student worker does to choose a teacher for a block, and what the roster sends it."""
    names = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(teachers)]
    case, config = f"choice, {teachers} teachers", {"teachers": teachers}
    for shared in (False, True):
        told = Choice[str]("student/0", str, shared)
        for name in names:
            told.answered(name, 0.1, 0)
        told.of(-1, names, {}, 1)
        times = [micros(partial(told.of, block, names, {}, 1)) for block in range(labels)]
        metric = "shared_choice_per_block" if shared else "choice_per_block"
        bench.add(case, "ours", metric, "us", times, config)
    roster = Roster()
    roster.set((names,), "", ())
    first = roster.report("student/0", {}, "")
    later = roster.report("student/0", {}, first.version)
    assert later.teachers is None
    bench.add(case, "ours", "roster_reply", "B", [len(pickle.dumps(tuple(later)))], config)


def store(bench: Bench, folder: Path, entries: int, lookups: int) -> None:
    """Records blocks, small ones, and looks for some that are there and some that are not."""
    from engine.labels.labelling import Labelling
    from engine.labels.store import Store
    from engine.labels.targets import BlockView, SoftTargets

    labelling = Labelling(
        ("t",), ("fp16",), ("w",), (1.0,), "mean", "features", "fp16", (224,), 0, 0.08, 1, "turbo",
        "corpus", BLOCK, ("class",),
    )  # fmt: skip
    recorded = Store(str(folder)).recorded(labelling)
    values, valid = np.ones((4, 8), np.float16), np.ones(4, bool)
    told = SoftTargets("features", values, None, valid, recorded.fingerprint)
    wanted = [BlockView("shards", block, 0) for block in range(entries)]
    put = [micros(partial(recorded.put, one, told)) for one in wanted[: entries - 1]]
    blocks = np.random.default_rng(0).integers(entries - 1, size=lookups).tolist()
    hit = [micros(partial(recorded.get, wanted[block], 4)) for block in blocks]
    assert recorded.read == lookups
    # In a folder of up to a thousand others, and in none.
    beside = [micros(partial(recorded.get, wanted[-1], 4)) for _ in range(lookups // 10)]
    nowhere = [micros(partial(recorded.get, BlockView("shards", block, 1), 4)) for block in blocks]
    started = time.perf_counter()
    assert recorded.missing(0, Blocks(np.full(entries, 4), 4)) == 1
    listed_s = time.perf_counter() - started
    case, config = f"store, {entries} blocks", {"entries": entries, "samples": 4, "disk": "local"}
    for metric, times in (
        ("put", put),
        ("hit", hit),
        ("miss_beside_others", beside),
        ("miss", nowhere),
    ):
        bench.add(case, "ours", f"{metric}_per_block", "us", times, config)
    bench.add(case, "ours", "list_per_1e6_blocks", "s", [1e6 / entries * listed_s], config)


def all_reduce(bench: Bench, processes: Sequence[int], rounds: int) -> dict[int, float]:
    """Gloo among processes of this machine, which share its memory and cores: it checks the shape
    of the formula, not its rates. Here all ranks' bytes, P times those of a ring, go through one
    memory. Gives seconds by processes."""
    context = multiprocessing.get_context("forkserver")  # which imports torch once
    context.set_forkserver_preload(["torch.distributed"])
    found = {}
    for ranks in processes:
        with tempfile.TemporaryDirectory() as folder:
            queue = context.SimpleQueue()
            told = [(rank, ranks, f"{folder}/group", rounds, queue) for rank in range(ranks)]
            children = [context.Process(target=_reduce, args=args) for args in told]
            for child in children:
                child.start()
            times = queue.get()
            for child in children:
                child.join()
                assert child.exitcode == 0
        all_bytes = ranks * ring_bytes(ranks, 4 * PARAMETERS)
        config = {"parameters": PARAMETERS, "dtype": "fp32", "one_machine": True}
        case = f"all-reduce, {ranks} processes"
        bench.add(case, "gloo", "seconds", "s", times, config)
        if ranks > 1:
            rates = [all_bytes / seconds for seconds in times]
            bench.add(case, "gloo", "ring_bytes_per_second", "B/s", rates, config)
        found[ranks] = float(np.median(times))
    return found


def _reduce(rank: int, ranks: int, group: str, rounds: int, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=ranks)
    gradient, times = torch.ones(PARAMETERS), []
    for turn in range(rounds + 2):
        gradient.fill_(1.0)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(gradient)
        if turn >= 2:  # warm
            times.append(time.perf_counter() - started)
    assert bool((gradient == ranks).all())
    if rank == 0:
        queue.put(times)
    dist.barrier()
    dist.destroy_process_group()
