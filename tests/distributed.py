"""Runs a test's function in several processes that share a gloo group."""

import importlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_apart(fn: Callable[..., None], *args: Any) -> None:
    """Runs a function of a test module in a process of its own, which fails if that does."""
    told = (fn.__module__.rsplit(".", 1)[-1], fn.__name__, args)
    mp.spawn(_apart, told, 1)


def _apart(_: int, module: str, name: str, args: tuple[Any, ...]) -> None:
    getattr(importlib.import_module(module), name)(*args)


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300
) -> list[Any]:
    """What `fn(rank, world_size, *args)`, a function of a test module, returned on each rank.

    Raises what a child raised, with its traceback; fails after `timeout_s`. Arguments and results
    are made of tensors and plain containers.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The child imports the test module by its stem: pytest's own name for it is no module's.
        told = (fn.__module__.rsplit(".", 1)[-1], fn.__name__, world_size, folder)
        torch.save(args, Path(folder) / "args.pt")  # as arguments, tensors would be shared
        context = mp.spawn(_child, told, world_size, join=False)
        deadline = time.monotonic() + timeout_s
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                pytest.fail(f"{fn.__name__} still ran after {timeout_s:.0f} s")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]


def _child(rank: int, module: str, name: str, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Read by DeepSpeed, and set by every launcher of ours.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    fn = getattr(importlib.import_module(module), name)
    args = torch.load(Path(folder) / "args.pt")
    torch.save(fn(rank, world_size, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()
