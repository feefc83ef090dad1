"""Which checks there are for a run, and in which order."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from engine.config import CorpusConfig, RunConfig
from engine.doctor import cluster, inputs, libraries, machine
from engine.doctor.apart import Check, Finding

__all__ = ["checks", "examine"]

_ANEW = "run make, or pip install the project anew"
_INPUTS = (  # findings of a run's own
    *("corpus.shards", "corpus.evaluation", "classes.names", "classes.vectors"),
    *("teacher", "teacher.prompts", "student", "models"),
)
_CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def checks(config: RunConfig, file: str, resume: bool = False) -> Iterator[Check]:
    """Of the machine, and of what a config names; `file` holds that config."""
    yield Check("Python", machine.python)
    yield Check("packages", machine.packages, {"constraints": str(_CONSTRAINTS)})
    yield Check("kernels", machine.kernels)
    yield Check("torch", libraries.torch_, {"device": config.device}, mend=_ANEW)
    yield Check("Triton", libraries.triton_, {"asked": config.train.kernels}, 180, _ANEW)
    for device in ("cpu", "cuda") if libraries.has_gpu() else ("cpu",):
        name = "DALI (cpu)" if device == "cpu" else "DALI (mixed)"
        yield Check(name, libraries.decoding, {"device": device}, mend=_ANEW)
    yield Check("DeepSpeed", libraries.deepspeed_, timeout_s=120, mend=_ANEW)
    logs = "look at /tmp/ray/session_latest/logs"
    yield Check("Ray", cluster.ray_, {"address": config.ray.address}, 90, logs)
    yield Check("NVML", libraries.gpus)
    yield Check("open files", machine.open_files)
    yield Check("shared memory", machine.shared_memory)
    yield Check("disk", machine.disks, {"folders": _folders(config)}, mend="is it a file server?")
    if url := _web(config.corpus):
        told = {"url": url, "hosts": list(config.corpus.hosts)}
        yield Check("clock", machine.clock, told, 30)
    elif not (config.ray.address or os.environ.get("RAY_ADDRESS")):
        yield Check("clock", machine.clock, {"url": "", "hosts": []})
    yield from _named(config, file, resume)


def _named(config: RunConfig, file: str, resume: bool) -> Iterator[Check]:
    """Of the shards and models that a config names."""
    corpus = config.corpus
    for field in ("shards", "evaluation"):
        if where := getattr(corpus, field):
            told = {
                "field": f"corpus.{field}",
                "where": where,
                "block_samples": corpus.block_samples,
                "hosts": list(corpus.hosts),
                "timeout_s": corpus.timeout_s,
            }
            mend = f"is corpus.{field} reachable from this machine?"
            yield Check(f"corpus.{field}", inputs.corpus, told, 90, mend)
    if inputs.named_models(config):
        yield Check("models", inputs.models, {"file": file}, 120)
        yield Check("run", inputs.fit, {"file": file, "resume": resume}, 120, needs=_INPUTS)


def _folders(config: RunConfig) -> dict[str, str]:
    """Folders of this machine that a run writes to, by their fields."""
    named = {
        "runs_dir": config.runs_dir,
        "targets.store": config.targets.store,
        "corpus.cache": config.corpus.cache,
        "train.checkpoint_copy": config.train.checkpoint_copy,
        "TMPDIR": tempfile.gettempdir(),  # Ray's, too
    }
    return {field: place for field, place in named.items() if place and "://" not in place}


def _web(config: CorpusConfig) -> str:
    """The beginning of the first url of a web server among the shards; empty without one."""
    urls = [part for where in (config.shards, config.evaluation) for part in where.split("::")]
    return next((url for url in urls if url.startswith(("http://", "https://"))), "")


def examine(checks: Iterable[Check], announce: Callable[[str], None]) -> Iterator[Finding]:
    """Runs checks one by one; `announce` is told of each, before."""
    failed = set()
    for check in checks:
        if spoiled := [name for name in check.needs if name in failed]:
            yield Finding(check.name, "skip", f"not checked: first mend {', '.join(spoiled)}")
            continue
        announce(check.name)
        for finding in check.run():
            if finding.state == "fail":
                failed.add(finding.name)
            yield finding
