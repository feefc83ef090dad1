"""The Ray cluster of a run: started or joined, and what a config comes to on it."""

import dataclasses
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.exceptions
import torch

from engine.clip.towers import half_precision, trained_precision
from engine.config import (
    RunConfig,
    RunFailed,
    StudentConfig,
    TeacherConfig,
    UserError,
    share_of,
)
from engine.progress import say
from kernels.kl import chosen

__all__ = ["resolve", "session", "start", "threads_of", "wait_for_room", "wanted"]

_LISTENS_S = 10.0  # for a cluster to take a connection
# Ray's usage reports and state exports serve no run, and slow its start.
_QUIET_RAY = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


@contextmanager
def session(address: str, cpus: float = 0) -> Iterator[bool]:
    """start(), and the end of a cluster that is ours; tells whether it is."""
    ours = start(address, cpus)
    try:
        yield ours
    finally:
        if ours:
            ray.shutdown()


def start(address: str, cpus: float = 0) -> bool:
    """Joins the cluster at `address` or RAY_ADDRESS, or starts a local one of at least `cpus` CPUs.
    True if it is for us to shut down. Raises UserError where no cluster answers at the address, and
    RunFailed where Ray does not start."""
    for name, value in _QUIET_RAY.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS", "")
    if not address:
        say("starting Ray on this machine")
        _ask_for_a_token()
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
                include_dashboard=False,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level="ERROR",
            )
        except Exception as error:  # Ray raises bare ones, as where its processes take 30 s
            why = str(error).strip().rstrip(".") or type(error).__name__
            raise RunFailed(
                f"Ray did not start on this machine: {why}. On a busy one it may do so later; "
                "`promptkd doctor` looks for other causes"
            ) from error
        _hide_token()
        return True
    say(f"joining the Ray cluster at {address}")
    _require_listener(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise UserError(
            f"ray.address: no Ray cluster answers at {address} ({error}). If it is up, its token "
            "may be another: set RAY_AUTH_MODE and RAY_AUTH_TOKEN as on its head"
        ) from None
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        say(
            f"warning: the Ray cluster at {address} asks for no token: whoever reaches it can run "
            "programs there; start its head and nodes with RAY_AUTH_MODE=token"
        )
    return True


def _require_listener(address: str) -> None:
    """Raises UserError where nobody listens at HOST:PORT, for which Ray waits without end."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal():  # auto
        return
    try:
        socket.create_connection((host, int(port)), _LISTENS_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"ray.address: no Ray cluster answers at {address}: {error}") from None


def _ask_for_a_token() -> None:
    """A cluster that ray.init() starts asks for a token, which Ray makes if need be, unless
    RAY_AUTH_MODE says otherwise (Ray documentation, "Token authentication"; since 2.59)."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        del os.environ["RAY_AUTH_MODE"]
        say(f"RAY_AUTH_MODE={mode} is not followed: a cluster started here asks for a token")


def _hide_token() -> None:
    """Ray writes a token that it has made so that every user of the machine may read it."""
    file = Path.home() / ".ray" / "auth_token"
    if file.exists() and file.stat().st_uid == os.geteuid() and file.stat().st_mode & 0o077:
        file.chmod(0o600)


def resolve(config: RunConfig) -> RunConfig:
    """Replaces every "auto" by what the cluster has, and says what was chosen."""
    have = ray.cluster_resources()
    gpus = have.get("GPU", 0)
    device = config.device if config.device != "auto" else ("cuda" if gpus else "cpu")
    if device == "cuda" and config.corpus.isolate:
        raise UserError("corpus.isolate: a child process decodes on the CPU alone; device is cuda")
    if device == "cuda" and not gpus:
        raise UserError("device: cuda is asked for, but the Ray cluster has no GPU")
    teacher, student = config.teacher, config.student
    if device == "cpu" and (teacher.gpus or student.gpus):
        raise UserError("device: cpu, but teacher.gpus or student.gpus asks for GPUs")
    if student.gpus is not None and 0 < student.gpus < 1 < student.workers:
        raise UserError("student.gpus: several workers cannot share one GPU, since NCCL refuses it")
    try:
        kernels = chosen(config.train.kernels, torch.device(device))
    except RuntimeError as error:
        raise UserError(f"train.kernels: {error}") from error
    whole = 1.0 if device == "cuda" else 0.0
    teacher_gpus = whole if teacher.gpus is None else teacher.gpus
    student_gpus = whole if student.gpus is None else student.gpus
    precision = trained_precision(student.precision, device)
    resolved = dataclasses.replace(
        config,
        device=device,
        teacher=dataclasses.replace(
            teacher,
            precision=half_precision(teacher.precision, torch.device(device)),
            gpus=teacher_gpus,
            threads=teacher.threads or threads_of(teacher_gpus, have),
        ),
        student=dataclasses.replace(
            student,
            precision=precision,
            gpus=student_gpus,
            threads=student.threads or threads_of(student_gpus, have),
        ),
    )
    say(
        f"device {device}; teacher in {resolved.teacher.precision} with "
        f"{resolved.teacher.threads} CPU threads, student tower in {precision} with "
        f"{resolved.student.threads}; losses by {kernels}"
    )
    return resolved


def threads_of(gpus: float, have: Mapping[str, float]) -> int:
    """CPU threads of a process with so many of a cluster's GPUs: their share of its CPUs."""
    if not gpus or not have.get("GPU"):
        return 1
    return max(1, int(gpus * have.get("CPU", 0) / have["GPU"]))


def wait_for_room(config: RunConfig, students: Sequence[StudentConfig], streams: bool) -> None:
    """Waits until the cluster is large enough for the teachers of a resolved config, which are
    actors if it `streams`, and for its students, saying what it lacks.

    Raises UserError after `ray.start_timeout_s`, or at once where the cluster is of this machine
    and cannot grow. Ray Train itself would wait without a word.
    """
    grows = bool(config.ray.address or os.environ.get("RAY_ADDRESS"))
    deadline = time.monotonic() + config.ray.start_timeout_s
    needed = wanted(config, students, streams)
    while True:
        have = ray.cluster_resources()
        lacks = {kind: n for kind, n in needed.items() if n > have.get(kind, 0)}
        if not lacks:
            return
        text = ", ".join(f"{n:g} {kind}, has {have.get(kind, 0):g}" for kind, n in lacks.items())
        if not grows or time.monotonic() > deadline:
            raise UserError(
                f"student.workers, teacher.actors: the cluster is too small: the run wants {text}. "
                "Ask for less: one GPU does with targets.source=inline, or with half a GPU each"
            )
        say(f"waiting for the cluster to grow: the run wants {text}")
        time.sleep(5)


def wanted(config: RunConfig, students: Sequence[StudentConfig], streams: bool) -> dict[str, float]:
    """Ray resources of the teachers, if they are actors, and of the students."""
    actors = max(config.teacher.actors, 1) if streams else 0
    sides: list[tuple[TeacherConfig | StudentConfig, int]] = [(config.teacher, actors)]
    sides += [(one, one.workers) for one in students]
    needed = {"CPU": 0.0, "GPU": 0.0}
    for side, number in sides:
        takes = {"CPU": side.cpus, "GPU": side.gpus or 0.0, **share_of(side.resource)}
        for kind, amount in takes.items():
            needed[kind] = needed.get(kind, 0.0) + number * amount
    return needed
