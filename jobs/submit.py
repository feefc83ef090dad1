"""Runs a distillation as a Ray job: ships the code, follows the log, gives the job's exit code."""

import asyncio
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config import RunConfig, Section, UserError, absolute, to_dict
from engine.parse import Flat, parse
from jobs.cli import PRESETS, run
from jobs.seeds import parse_seeds


@dataclass(frozen=True)
class SubmitConfig(Section):
    """Runs a distillation as a Ray job. Takes what `promptkd distill` takes, and where to run it.

    The code and the config travel. Data and weights do not: their paths are made absolute here, and
    must mean the same on the cluster, where the run checks them before it starts.
    """

    run: Flat[RunConfig]
    seeds: str = ""
    """Seeds like 1,2,3: a run for each, as of `promptkd distill`."""
    resume: bool = False
    """Go on from the newest checkpoint of the run folder, as of `promptkd distill`."""
    address: str = ""
    """Jobs address, http://HOST:8265. Empty: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    allow_unauthenticated: bool = False
    """Submit even where the cluster asks for no token, so that anybody may run programs there."""
    python: str = "python"
    """Interpreter on the cluster, in an environment that has this project's dependencies."""


def main(args: Sequence[str]) -> int:
    asked = parse(
        SubmitConfig, args, prog="promptkd submit", from_files=True, presets=PRESETS / "distill"
    )
    from engine.data.places import check_places
    from engine.jobs_server import require_authentication

    address = asked.address or os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    address = address if "://" in address else f"http://{address}"
    config = absolute(asked.run)
    if asked.seeds:
        parse_seeds(asked.seeds)
    check_places(asked.run.corpus)  # while a pipe: is no path yet
    require_authentication(address, asked.allow_unauthenticated)
    with tempfile.TemporaryDirectory() as upload:
        for package in ("engine", "kernels", "jobs"):
            source = Path(__file__).parent.parent / package
            ignored = shutil.ignore_patterns("__pycache__", "models")
            shutil.copytree(source, Path(upload) / package, ignore=ignored)
        (Path(upload) / "run.json").write_text(json.dumps(to_dict(config)))
        words = [asked.python, "-m", "jobs.distill", "run.json"]
        words += ["--seeds", asked.seeds] if asked.seeds else []
        entrypoint = shlex.join([*words, *(["--resume"] if asked.resume else [])])
        return asyncio.run(_follow(address, upload, entrypoint))


async def _follow(address: str, upload: str, entrypoint: str) -> int:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        # `ray job stop` sends SIGTERM: time to drain, before it kills.
        runtime_env = {"working_dir": upload, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"}}
        job = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
    except (ConnectionError, AuthenticationError, RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"address: no Ray cluster takes jobs at {address}: {why}. Set RAY_AUTH_MODE=token, and "
            "the cluster's token as RAY_AUTH_TOKEN, if it wants one"
        ) from None
    print(f"job {job} on {address}", file=sys.stderr)
    try:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)
    except asyncio.CancelledError:
        print(f"job {job} goes on; `ray job stop {job}` ends it", file=sys.stderr)
        raise
    info = client.get_job_info(job)
    print(f"job {job}: {info.status}", file=sys.stderr)
    if info.driver_exit_code is None:  # it never came to start
        print(info.message, file=sys.stderr)
        return 1
    return info.driver_exit_code


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "submit"))
