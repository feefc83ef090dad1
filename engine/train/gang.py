"""The student workers as a Ray Train job: placement, restarts, and a worker in each process."""

from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from engine.progress import hand_over
from engine.telemetry import Recorder
from engine.train.worker import Task, work

__all__ = ["run_gang"]


def run_gang(task: Task) -> dict[str, Any]:
    """Runs the student workers to their end, and gives what rank 0 has to tell.

    Raises ray.train.WorkerGroupError once workers have failed more often than allowed.
    """
    config = task.config
    trainer = TorchTrainer(
        _work,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if config.device == "cuda" else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.student.workers,
            use_gpu=config.device == "cuda",
            resources_per_worker={"CPU": config.student.cpus, "GPU": config.student.gpus},
        ),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=str(config.folder),
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
        ),
    )
    try:
        return trainer.fit().return_value
    except SystemExit:  # what Ray Train makes of Ctrl-C
        raise KeyboardInterrupt from None


def _work(told: dict[str, Task]) -> dict[str, Any]:
    task = told["task"]
    recorder = Recorder(task.config.folder)
    hand_over(lambda text: recorder.record("notice", text=text))
    return work(task, get_device())
