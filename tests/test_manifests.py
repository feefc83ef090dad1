"""What runs the engine on Kubernetes and SLURM: manifests by their schemas, a script by running it,
and the commands in both by the real parsers."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kuberay import SPECS

from jobs import cli

JOBS = Path(cli.__file__).parent
SBATCH = JOBS / "slurm" / "promptkd.sbatch"
KUBERNETES = "1.33"


def documents(name: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all((JOBS / "kuberay" / name).read_text()) if one]


CLUSTER, JOB = documents("cluster.yaml"), documents("job.yaml")
(RAY_CLUSTER,) = (one["spec"] for one in CLUSTER if one["kind"] == "RayCluster")
(RAY_JOB,) = (one["spec"] for one in JOB)


def groups() -> Iterator[dict[str, Any]]:
    yield RAY_CLUSTER["headGroupSpec"]
    yield from RAY_CLUSTER["workerGroupSpecs"]


@pytest.mark.parametrize("one", [*CLUSTER, *JOB], ids=lambda one: one["kind"])
def test_a_manifest_has_the_fields_of_its_kind(one):
    kubernetes = pytest.importorskip("kubernetes_validate", reason="of the extra dev")
    if schema := SPECS.get(one["kind"]):
        assert one["apiVersion"] == "ray.io/v1"
        jsonschema.validate(one["spec"], schema)
        spelled_wrong = one["spec"] | {"workerGroupsSpecs": []}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spelled_wrong, schema)
    else:
        kubernetes.validate(one, KUBERNETES, strict=True)


def test_pods_are_as_kubernetes_takes_them():
    kubernetes = pytest.importorskip("kubernetes_validate", reason="of the extra dev")
    for group in groups():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        kubernetes.validate(pod, KUBERNETES, strict=True)
        wrong = json.loads(json.dumps(pod))
        wrong["template"]["spec"]["containers"][0]["volumeMount"] = []
        with pytest.raises(kubernetes.ValidationError):
            kubernetes.validate(wrong, KUBERNETES, strict=True)


def test_volumes_secrets_and_services_are_those_that_there_are():
    claims = {one["metadata"]["name"] for one in CLUSTER if "Claim" in one["kind"]}
    services = {one["metadata"]["name"] for one in CLUSTER if one["kind"] == "Service"}
    for group in groups():
        spec = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {
            mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]
        }
        assert mounts.keys() == volumes.keys() and mounts["shared"] == "/shared"
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] in claims
    redis, _, port = RAY_CLUSTER["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    assert redis in services and port == "6379"
    assert RAY_CLUSTER["authOptions"] == {"mode": "token"}
    text = (JOBS / "kuberay" / "cluster.yaml").read_text()
    assert "kind: Secret" not in text and "password:" not in text.replace("redisPassword:", "")
    (cluster,) = (one["metadata"]["name"] for one in CLUSTER if one["kind"] == "RayCluster")
    assert RAY_JOB["clusterSelector"] == {"ray.io/cluster": cluster}


def test_ray_is_the_pinned_one():
    (pinned,) = re.findall(
        r"^ray==(.+)$", (JOBS.parent / "constraints.txt").read_text(), re.MULTILINE
    )
    assert RAY_CLUSTER["rayVersion"] == pinned
    assert f"FROM rayproject/ray:{pinned}-py311\n" in (JOBS / "kuberay/Dockerfile").read_text()


def test_the_job_finds_its_groups_and_room_in_them():
    """Its command is parsed as it will be; the groups' resources as `ray start` parses them."""
    command, _, test = RAY_JOB["entrypoint"].partition(" $(")
    words = command.removeprefix("python -m jobs.distill ")
    config = resolved(words.replace("/shared/run.toml", str(JOBS / "configs" / "a100-4x8.toml")))
    folder = f"{config['runs_dir']}/{config['name']}"
    assert folder.startswith("/shared/") and test == f"test -e {folder} && echo --resume)"
    room = {}
    for group in RAY_CLUSTER["workerGroupSpecs"]:
        (quoted,) = shlex.split(group["rayStartParams"]["resources"])
        (resource,) = json.loads(quoted)
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        room[resource] = group["replicas"] * int(limits["nvidia.com/gpu"])
    assert room == {
        config["teacher"]["resource"]: config["teacher"]["actors"],
        config["student"]["resource"]: config["student"]["workers"],
    }
    assert int(yaml.safe_load(RAY_JOB["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])


def resolved(words: str) -> dict[str, Any]:
    """What `python -m jobs.distill WORDS` resolves its config to."""
    from engine.config import to_dict
    from jobs.distill import _parsed

    return to_dict(_parsed(shlex.split(words)).run)


# ------------------------------------------------------------------ SLURM

STUBS = {
    "scontrol": """
        if [[ $1 == show ]]; then echo node-7; else echo "scontrol $*" >> "$LOG"; fi""",
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        if [[ $1 == hostname ]]; then echo "10.0.0.7 fe80::1"; else exec "$@"; fi""",
    "ray": """
        echo "ray $*" >> "$LOG"
        while [[ $1 != -- ]]; do shift; done
        shift
        exec "$@" """,
    "python": """
        if [[ $1 == -c ]]; then exec "$PYTHON" "$@"; fi
        echo "python $*" >> "$LOG"
        echo "auth $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}" >> "$LOG"
        trap 'exit 143' TERM
        for _ in {1..600}; do [[ -e $END ]] && exit "$(cat "$END")"; sleep 0.05; done""",
}


class Slurm:
    """A folder in which the script runs with stand-ins for SLURM, Ray and the engine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.end = folder, folder / "log", folder / "end"
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "activate").write_text("")
        for name, text in STUBS.items():
            stub = folder / "bin" / name
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(f"#!/bin/bash\n{text}\n")
            stub.chmod(0o755)
        self.job = f"{os.getpid()}-{folder.name}"

    def start(self) -> subprocess.Popen[bytes]:
        env = os.environ | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "LOG": str(self.log),
            "END": str(self.end),
            "SLURM_JOB_ID": self.job,
            "SLURM_JOB_NODELIST": "node-[7-10]",
            "SLURM_JOB_NUM_NODES": "4",
            "SLURM_CPUS_PER_TASK": "64",
        }
        self.log.write_text("")
        words = ["bash", str(SBATCH), "run.toml", "mine"]
        return subprocess.Popen(words, cwd=self.folder, env=env, start_new_session=True)

    def told(self, what: str) -> str:
        """The line of the log that begins so, once it is there."""
        deadline = time.monotonic() + 30
        while True:
            for line in self.log.read_text().splitlines():
                if line.startswith(what):
                    return line
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)


@pytest.fixture
def slurm(tmp_path) -> Iterator[Slurm]:
    one = Slurm(tmp_path)
    yield one
    Path(f"/tmp/promptkd-{one.job}.pid").unlink(missing_ok=True)


def test_the_script_drains_on_sigterm_and_goes_on_when_it_is_queued_again(slurm):
    job = slurm.start()
    auth = slurm.told("auth ")
    command = slurm.told("python ")
    assert auth == "auth token 64" and "--resume" not in command
    job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: has it
    assert job.wait(30) == 143
    assert slurm.told("scontrol ") == f"scontrol requeue {slurm.job}"
    (slurm.folder / "runs" / "mine").mkdir(parents=True)
    slurm.end.write_text("0")
    job = slurm.start()
    assert job.wait(30) == 0 and slurm.told("python ").endswith(" --resume")
    assert "scontrol" not in slurm.log.read_text()
    slurm.end.write_text("1")
    job = slurm.start()
    assert job.wait(30) == 1 and "scontrol" not in slurm.log.read_text(), "failed: not again"


def test_the_commands_of_the_script_are_taken_by_ray_and_by_us(slurm):
    slurm.end.write_text("0")
    assert slurm.start().wait(30) == 0
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

    ray, _, command = slurm.told("ray ").partition(" -- ")
    words = shlex.split(ray)[2:]
    assert symmetric_run.make_context("_", list(words)).params["min_nodes"] == 4
    options = curate_and_validate_ray_start_args(words)
    told = start.make_context("start", ["--address", "10.0.0.7:6379", *options]).params
    assert told["num_gpus"] == 8 and told["num_cpus"] == 64 and told["temp_dir"]
    assert told["include_dashboard"] is None, "of a head alone, and given to every node"
    assert command.startswith("bash -c ")
    words = slurm.told("python ").removeprefix("python -m jobs.distill run.toml ")
    config = resolved(f"{JOBS / 'configs' / 'a100-4x8.toml'} {words}")
    assert config["name"] == "mine" and config["ray"]["address"] == "10.0.0.7:6379"


def test_the_script_asks_slurm_for_what_it_relies_on():
    text = SBATCH.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert asked["signal"] == "B:TERM@180" and asked["ntasks-per-node"] == "1"
    assert {"requeue", "exclusive"} <= asked.keys() and asked["open-mode"] == "append"
    assert f"--num-gpus {asked['gpus-per-node']} " in text


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = beside if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed: of the extra dev")
    done = subprocess.run([shellcheck, SBATCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
