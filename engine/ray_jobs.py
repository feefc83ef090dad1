"""Jobs of a Ray cluster: sent to it, followed to their end, stopped."""

import asyncio
import contextlib
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from engine.config import RunFailed, UserError
from engine.progress import say

__all__ = ["RayJobs"]

_DRAIN_S = 30  # between SIGTERM and SIGKILL of a job that is stopped
_BUILD_S = 3600  # for the packages of a locked environment to be installed
_POLL_S = 1.0
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '([^']+)'")


class RayJobs:
    """The jobs of the cluster at `address`, a url as engine.jobs_server checks it.

    Raises UserError where it does not answer, does not let us in, or runs another Ray: of another
    minor version, or where `exactly` of another at all. `open_`: it lets everybody in, which the
    user accepts.
    """

    def __init__(self, address: str, exactly: bool = False, open_: bool = False) -> None:
        self._address, self._open = address, open_
        # Ray would take this variable, or RAY_ADDRESS, before the address it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        with self._translated():
            self._client = JobSubmissionClient(address)
        there, here = str(self._client._server_ray_version), ray.__version__
        if _series(there) != _series(here) or (exactly and there != here):
            raise UserError(
                f"address: the cluster at {address} runs Ray {there}, and this is Ray {here}: "
                f"install ray=={there} here, or {here} there"
            )

    def submit(
        self, job: str, folder: Path, words: Sequence[str], pins: Sequence[str] | None
    ) -> None:
        """Sends what lies in `folder` and runs the words of a command there, as job `job`. With
        `pins` Ray first installs these packages on every node, in an environment of their own."""
        runtime_env: dict[str, Any] = {
            "working_dir": str(folder),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_DRAIN_S)},
        }
        if pins is not None:
            # Without options uv would keep nothing for the next environment.
            runtime_env["uv"] = {"packages": list(pins), "uv_pip_install_options": []}
            runtime_env["config"] = {"setup_timeout_seconds": _BUILD_S}
        with self._translated():
            self._client.submit_job(
                entrypoint=shlex.join(words), submission_id=job, runtime_env=runtime_env
            )

    def follow(self, job: str) -> int:
        """Prints what a job prints until it ends, and gives its exit code; 143 where it was
        stopped. Raises UserError where it could not start, RunFailed where the cluster is lost."""
        self._info(job, "follow")
        try:
            asyncio.run(self._print_log(job))
            while not (info := self._info(job, "follow")).status.is_terminal():
                time.sleep(_POLL_S)  # its log broke off before
        except KeyboardInterrupt:
            say(f"job {job} goes on. {self.told(job)}")
            raise
        except UserError as lost:
            raise RunFailed(
                f"job {job} is out of sight, and may go on: {lost}\n{self.told(job)}"
            ) from None
        say(f"job {job}: {info.status.value}")
        return _exit_code(info)

    def stop(self, job: str) -> None:
        """Sends SIGTERM to a job, and waits until it has drained and ended, or says that it has
        ended already."""
        info = self._info(job, "stop")
        if info.status.is_terminal():
            say(f"job {job} has ended already: {info.status.value}")
            return
        with self._translated():
            self._client.stop_job(job)
        say(f"job {job} is asked to stop: its workers finish their step and commit it")
        deadline = time.monotonic() + 2 * _DRAIN_S
        while not (info := self._info(job, "stop")).status.is_terminal():
            if time.monotonic() > deadline:
                raise RunFailed(f"job {job} is still {info.status.value}. {self.told(job)}")
            time.sleep(_POLL_S)
        say(f"job {job}: {info.status.value}. `promptkd submit FILE --resume` goes on with its run")

    def told(self, job: str) -> str:
        """How to follow and to stop a job, as a user types it."""
        here = f"--address {self._address}" + " --allow-unauthenticated" * self._open
        return (
            f"To follow it: promptkd submit --follow {job} {here}\n"
            f"To stop it: promptkd submit --stop {job} {here}"
        )

    async def _print_log(self, job: str) -> None:
        try:
            async for lines in self._client.tail_job_logs(job):
                print(lines, end="", flush=True)
        except (aiohttp.ClientError, RuntimeError) as error:
            say(f"the log of job {job} broke off ({error}); waiting for the job to end")

    def _info(self, job: str, field: str) -> Any:
        with self._translated():
            try:
                return self._client.get_job_info(job)
            except RuntimeError as error:
                if "status code 404" not in str(error):
                    raise
                raise UserError(
                    f"{field}: there is no job {job} at {self._address}; "
                    f"`ray job list --address {self._address}` lists those that there are"
                ) from None

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """What Ray's client raises, as a UserError."""
        try:
            yield
        except UserError:
            raise
        except AuthenticationError as error:
            mode = os.environ.get("RAY_AUTH_MODE", "").lower()
            token = "another token, as RAY_AUTH_TOKEN or in ~/.ray/auth_token"
            wants = token if mode == "token" else "RAY_AUTH_MODE=token, and its token"
            raise UserError(
                f"address: the Ray cluster at {self._address} lets nobody in without its token "
                f"({_first(error)}). Set {wants}"
            ) from None
        except OSError as error:
            raise UserError(
                f"address: no Ray cluster takes jobs at {self._address}: {_first(error)}"
            ) from None
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"address: what answers at {self._address} does not do it: {_first(error)}"
            ) from None


def _exit_code(info: Any) -> int:
    """Of a job that has ended. Raises UserError where its command could not run."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return 143
    code, message = info.driver_exit_code, info.message or ""
    python = (info.entrypoint.split() or ["?"])[0]
    mend = "--python names one that has what this project needs; --environment locked builds one"
    if info.error_type == "RUNTIME_ENV_SETUP_FAILURE":
        raise UserError(f"environment: Ray could not build it on the cluster: {message.strip()}")
    if code is None:
        raise RunFailed(f"the job ended without an exit code: {_first(message)}")
    if code in (126, 127):  # of a shell that finds no such command, or may not run it
        raise UserError(f"python: the cluster has no interpreter {python}; {mend}")
    if code == 1 and (missing := _NO_MODULE.search(message)):
        raise UserError(f"python: {python} on the cluster has no module {missing[1]}; {mend}")
    return code


def _series(version: str) -> list[str]:
    return version.split(".")[:2]


def _first(told: object) -> str:
    """The first line of a long text, or of a traceback the last."""
    lines = str(told).strip().splitlines() or [type(told).__name__]
    return lines[-1 if "Traceback" in lines[0] else 0].rstrip(".")
