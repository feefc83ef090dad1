"""Runs a distillation as a Ray job: ships the code, follows the log, gives the job's exit code."""

import re
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.config import RunConfig, Section, UserError, absolute, to_dict
from engine.parse import Flat, parse
from jobs.cli import PRESETS, run
from jobs.seeds import parse_seeds

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


@dataclass(frozen=True, kw_only=True)
class ServerConfig(Section):
    """Where jobs are sent."""

    address: str = ""
    """Jobs address, http://HOST:8265. Empty: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    allow_unauthenticated: bool = False
    """Submit even where the cluster asks for no token, so that anybody may run programs there."""


@dataclass(frozen=True, kw_only=True)
class JobConfig(ServerConfig):
    """Follows or stops a job that has been submitted."""

    follow: str = ""
    """Job to follow to its end; its exit code is returned."""
    stop: str = ""
    """Job to stop by SIGTERM, which drains its run, and to wait for."""


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(ServerConfig):
    """Runs a distillation as a Ray job. Takes what `promptkd distill` takes, but --students and
    --dry-run, and where to run it.

    The code and the config travel. Data and weights do not: their paths are made absolute here, and
    must mean the same on the cluster, where the run checks them before it starts.

    `promptkd submit --follow JOB` follows a job again, and `promptkd submit --stop JOB` stops it.
    """

    run: Flat[RunConfig]
    seeds: str = ""
    """Seeds like 1,2,3: a run for each, as of `promptkd distill`."""
    resume: bool = False
    """Go on from the newest checkpoint of the run folder, as of `promptkd distill`."""
    detach: bool = False
    """Print the job's name and return, instead of following it to its end."""
    environment: Literal["cluster", "locked"] = "cluster"
    """What the job runs in. cluster: --python, which is there; locked: Ray installs on every node
    what this project needs, in the versions of constraints.txt."""
    python: str = "python"
    """Interpreter on the cluster, in an environment that has this project's dependencies."""


def main(args: Sequence[str]) -> int:
    if {word.partition("=")[0] for word in args} & {"--follow", "--stop"}:
        return _manage(parse(JobConfig, args, prog="promptkd submit"))
    asked = parse(
        SubmitConfig, args, prog="promptkd submit", from_files=True, presets=PRESETS / "distill"
    )
    from engine.data.places import check_places
    from engine.jobs_server import jobs_address, require_authentication
    from engine.upload import CONFIG, pack, pinned

    locked = asked.environment == "locked"
    if locked and asked.python != "python":
        raise UserError("python: --environment locked brings an interpreter of its own")
    address = jobs_address(asked.address)
    config = absolute(asked.run)
    if asked.seeds:
        parse_seeds(asked.seeds)
    check_places(asked.run.corpus)  # while a pipe: is no path yet
    with tempfile.TemporaryDirectory() as folder:
        upload = pack(config, Path(folder))
        pins = pinned(CONSTRAINTS, _extras(config)) if locked else None
        require_authentication(address, asked.allow_unauthenticated)
        from engine.progress import say
        from engine.ray_jobs import RayJobs

        words = [asked.python, "-m", "jobs.distill", CONFIG]
        words += ["--seeds", asked.seeds] if asked.seeds else []
        words += ["--resume"] if asked.resume else []
        jobs = RayJobs(address, exactly=locked, open_=asked.allow_unauthenticated)
        job = _named(config.name)
        size = f"{upload.bytes / 1e6:.1f} MB in {upload.files} files"
        say(f"sending {size}: code of engine, kernels and jobs, and {CONFIG}")
        jobs.submit(job, Path(folder), words, pins)
    say(f"job {job} on {address}")
    if asked.detach:
        print(job)
        say(jobs.told(job))
        return 0
    return jobs.follow(job)


def _manage(asked: JobConfig) -> int:
    from engine.jobs_server import jobs_address, require_authentication

    for field, job in (("follow", asked.follow), ("stop", asked.stop)):
        if job and not re.fullmatch(r"[\w.-]+", job):
            raise UserError(f"{field}: {job!r} is no name of a job")
    if bool(asked.follow) == bool(asked.stop):
        raise UserError("follow, stop: name a job with one of them")
    address = jobs_address(asked.address)
    require_authentication(address, asked.allow_unauthenticated)
    from engine.ray_jobs import RayJobs

    if asked.follow:
        return RayJobs(address).follow(asked.follow)
    RayJobs(address).stop(asked.stop)
    return 0


def _named(run: str) -> str:
    """A name for a job, of which a cluster never has two."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", run)
    now = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return f"promptkd-{plain}-{now}-{secrets.token_hex(2)}"


def _extras(config: RunConfig) -> list[str]:
    """Of this project, for the stores that a config names."""
    text = str(to_dict(config))
    return [extra for extra, scheme in (("s3", "s3://"), ("gcs", "gs://")) if scheme in text]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "submit"))
