"""The student workers as a Ray Train job: placement, restarts, and a worker in each process."""

import itertools
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import durable, lease
from engine.config import RunFailed, UserError, share_of
from engine.imports import uncollected
from engine.progress import hand_over, say
from engine.telemetry import Recorder

with uncollected():
    import psutil
    import ray
    import ray.exceptions
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer, get_device
    from ray.train.torch.config import _TorchBackend

    from engine.train.stops import Stop, hear_sigterm

if TYPE_CHECKING:
    from engine.train.worker import Task  # Ray Train's controller can do without the models

__all__ = ["allow_silence", "run_gang"]

_REFUSAL = "refused.txt"  # of a run folder: the UserError of a worker
_PART_S = "2"  # for a process group to be taken down: one of whose workers hangs never is


class _Backend(_TorchBackend):
    """Ray Train's, in its controller, of workers on hosts of several networks."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", _PART_S)
        worker_group.execute(_use_rays_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class _Torch(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def _use_rays_interface() -> None:
    """Gloo listens where this host's name leads to, which often is 127.0.0.1 or 127.0.1.1, where
    no other host reaches it. Ray's own address is one that they reach."""
    address = ray.util.get_node_ip_address()
    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def allow_silence(timeout_s: float) -> None:
    """How long the workers of all gangs may fail to answer Ray; before the first run_gang()."""
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout_s)


def run_gang(task: "Task") -> dict[str, Any]:
    """Runs the student workers to their end, and gives what rank 0 has to tell.

    A worker that does not answer Ray for as long as allow_silence() says has failed: it is stopped,
    or hangs. One that answers has `student.timeout_s` beyond `targets.timeout_s` to join the others
    in a collective. Ray Train restarts all where one has failed; here they are started again where
    they could not form a group. What the user can mend no restart will: workers that are started
    again after a UserError leave at once.

    Not in a main thread, where Ray Train would hear Ctrl-C, and stop at once.

    Raises UserError or RunFailed once they have failed more often than allowed, or where Ray Train
    itself has: a controller that dies leaves its placement group behind, and nobody can name it.
    """
    config = task.config
    story, refusal = config.folder / "failure.txt", config.folder / _REFUSAL
    refusal.unlink(missing_ok=True)
    for times in itertools.count(1):
        try:
            told = _trainer(task).fit().return_value
            if "refused" in told:
                refusal.unlink(missing_ok=True)
                raise UserError(told["refused"])
            return told
        except ray.train.ControllerError as failure:
            if 0 <= config.train.max_failures < times:
                raise _plain(failure, story) from failure
            say(f"warning: Ray Train failed: {_last(failure)}; starting the workers again")
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as failure:
            raise _plain(failure, story) from failure
    raise AssertionError


def _trainer(task: "Task") -> TorchTrainer:
    config = task.config
    return TorchTrainer(
        _work,
        train_loop_config={"task": [ray.put(task)]},  # in a list, Ray Train leaves it alone
        torch_config=_Torch(
            backend="nccl" if config.device == "cuda" else "gloo",
            timeout_s=math.ceil(config.targets.timeout_s + config.student.timeout_s),
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.student.workers,
            use_gpu=config.device == "cuda",
            resources_per_worker={
                "CPU": config.student.cpus,
                "GPU": config.student.gpus,
                **share_of(config.student.resource),
            },
        ),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=str(config.folder),
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
        ),
    )


def _plain(failure: Exception, story: Path) -> Exception:
    """The worker's own error, without Ray Train's wrapping; its tracebacks go to file `story`."""
    try:
        story.write_text(f"{failure}\n")
    except OSError as full:
        say(f"warning: {story} cannot be written: {full}")
    if not isinstance(failure, ray.train.WorkerGroupError):
        why = f"{_last(failure)} ({story} tells how)"
        return RunFailed(f"Ray Train failed: {why}; --resume goes on from the newest checkpoint")
    rank, error = min(failure.worker_failures.items(), key=lambda item: _blame(*item))
    if isinstance(error, UserError):
        return error
    why = f"{type(error).__name__}: {error}"
    return RunFailed(f"student worker {rank} failed: {why} ({story} tells where)")


def _last(failure: Exception) -> str:
    """The last line of a long story, and the first sentence of that."""
    return str(failure).strip().rpartition("\n")[2].partition(". ")[0]


def _blame(rank: int, error: BaseException) -> tuple[bool, bool, int]:
    """Sorts the cause first: when a worker fails, the others' collectives fail with it."""
    follows = "Connection closed" in str(error) or "NCCL" in str(error)
    return not isinstance(error, UserError), follows, rank


def _work(told: dict[str, list[ray.ObjectRef]]) -> dict[str, Any]:
    with uncollected():
        from engine.train.worker import work

        task: Task = ray.get(told["task"][0])
    recorder = Recorder(task.config.folder / "metrics.jsonl")
    hand_over(lambda text: recorder.record("notice", text=text))
    # Here is a thread beside the actor's main one, and only that one may set a signal's handler.
    ray.get(ray.get_runtime_context().current_actor.execute.remote(hear_sigterm))
    with suppress(OSError):  # training looks again
        if task.owner and lease.state(task.config.folder, task.owner) == "lost":
            return {"stopped": int(Stop.LOST), "step": 0}  # restarted after its driver has gone
    refusal = task.config.folder / _REFUSAL
    if refusal.exists():
        return {"refused": refusal.read_text()}
    try:
        return work(task, get_device())
    except UserError as error:
        with suppress(OSError):  # where another worker writes the same, or the disk is full
            durable.replace(refusal, str(error).encode())
        raise
