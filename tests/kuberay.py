"""The fields of KubeRay's own objects that our manifests may use, as a JSON schema.

Facts of its API reference, ray.io/v1 of KubeRay 1.7 (docs/reference/api.md). What is a Kubernetes
object inside of them is checked by Kubernetes' own schemas.
"""

STRING, BOOLEAN = {"type": "string"}, {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
STRINGS = {"type": "object", "additionalProperties": STRING}
KUBERNETES = {"type": "object"}  # a pod template, a service, a source of a variable


def _record(required: tuple[str, ...] = (), **fields: object) -> dict[str, object]:
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


_CREDENTIAL = _record(value=STRING, valueFrom=KUBERNETES)
_GROUP = {
    "template": KUBERNETES,
    "rayStartParams": STRINGS,
    "resources": STRINGS,
    "labels": STRINGS,
}
CLUSTER = _record(
    ("headGroupSpec",),
    rayVersion=STRING,
    suspend=BOOLEAN,
    managedBy={"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
    enableInTreeAutoscaling=BOOLEAN,
    headServiceAnnotations=STRINGS,
    authOptions=_record(
        mode={"enum": ["disabled", "token"]}, secretName=STRING, enableK8sTokenAuth=BOOLEAN
    ),
    gcsFaultToleranceOptions=_record(
        redisAddress=STRING,
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=STRING,
        backend={"enum": ["redis", "rocksdb"]},
    ),
    headGroupSpec=_record(
        ("template",),
        **_GROUP,
        headService=KUBERNETES,
        enableIngress=BOOLEAN,
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
    ),
    workerGroupSpecs={
        "type": "array",
        "items": _record(
            ("groupName", "minReplicas", "maxReplicas", "template"),
            **_GROUP,
            groupName=STRING,
            suspend=BOOLEAN,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts={"type": "integer", "minimum": 1},
            idleTimeoutSeconds=COUNT,
            priority={"type": "integer"},
            scaleStrategy=_record(workersToDelete={"type": "array", "items": STRING}),
        ),
    },
)
JOB = _record(
    ("entrypoint",),
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    metadata=STRINGS,
    clusterSelector=STRINGS,
    rayClusterSpec=CLUSTER,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=KUBERNETES,
    submitterConfig=_record(backoffLimit=COUNT),
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=COUNT,
    suspend=BOOLEAN,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=STRING,
    managedBy=STRING,
)
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB}
