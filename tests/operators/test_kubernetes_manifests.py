"""The objects of a stage: exactly what is wanted, and valid for every Kubernetes we name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from operators.launchers import StageJob
from operators.launchers.jobset_manifest import PODS, jobset_manifest
from operators.launchers.manifests import (
    Size,
    check_reachable,
    job_manifest,
    object_name,
    service_manifest,
    stage_size,
)
from operators.launchers.rayjob_manifest import RAY_VERSION, rayjob_manifest, rayjob_name
from sailyard.cluster import ClusterSettings
from sailyard.pipeline import build_pipeline
from sailyard.recipe import load_recipe
from sailyard.settings import Settings

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = ("1.30", "1.33", "1.35", "1.37")

YARD = Settings(
    store="s3://yard/here",
    s3_endpoint="s3.example:9000",
    s3_access_key="ACCESSKEY",
    s3_secret_key="SECRETKEY",
    database_url="postgresql+psycopg://yard:PASSWORD@db/yard",
)
STAGE = build_pipeline(load_recipe("2b")).stage("alignment.warmup")
JOB = StageJob("alignment.warmup", "20261123-1405-2b-ab12")
IMAGE = "registry.example/sailyard-train@sha256:" + "a" * 64

PLAIN = ClusterSettings(image=IMAGE, env_secret="yard-keys")
FULL = ClusterSettings(
    image=IMAGE,
    namespace="vlm",
    pull_secrets=["registry"],
    env_secret="yard-keys",
    service_account="stages",
    nodes=2,
    gpus_per_node=4,
    cache_claim="models",
    node_selector={"gpu": "h100"},
    tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    priority_class="batch",
    queue="research",
    jobset=True,
    ray_workers=3,
)
SPREAD = StageJob("curation.caption2", JOB.run_id)


def objects(name: str) -> list[dict[str, Any]]:
    if name == "cpu":
        return [job_manifest(JOB, Size(1, 0), PLAIN, YARD)]
    if name == "one-gpu":
        return [job_manifest(JOB, Size(1, 1), PLAIN, YARD)]
    if name == "jobset":
        return [jobset_manifest(JOB, Size(2, 4, 4), FULL, YARD)]
    if name == "rayjob":
        return [rayjob_manifest(SPREAD, Size(1, 1), FULL, YARD)]
    return [job_manifest(JOB, Size(2, 4, 4), FULL, YARD), service_manifest(JOB, FULL, "the-uid")]


NAMES = ("cpu", "one-gpu", "multi-node", "jobset", "rayjob")


@pytest.mark.parametrize("name", NAMES)
def test_as_the_golden_file_has_them(name: str) -> None:
    """SAILYARD_UPDATE_GOLDEN is read before the fixtures clear the environment: see below."""
    text = yaml.safe_dump_all(objects(name), sort_keys=False)
    path = GOLDEN / f"{name}.yaml"
    if UPDATE:
        path.write_text(text)
    assert text == path.read_text(), "if this is meant: SAILYARD_UPDATE_GOLDEN=1 pytest ..."


UPDATE = bool(os.environ.get("SAILYARD_UPDATE_GOLDEN"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_strictly_valid(name: str, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for manifest in objects(name):
        for known in as_kubernetes_knows(manifest):
            validator.validate(known, version, strict=True)


def as_kubernetes_knows(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a JobSet its Job, of a RayJob its pods: whatever stands on fields of Kubernetes' own."""
    spec = manifest["spec"]
    if manifest["kind"] == "JobSet":
        job = spec["replicatedJobs"][0]["template"]
        return [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **job}]
    if manifest["kind"] == "RayJob":
        return [
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": pod}
            for pod in ray_pods(manifest)
        ]
    return [manifest]


def ray_pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Templates of the pods that submit, of the head and of the workers."""
    ray = manifest["spec"]["rayClusterSpec"]
    groups = [ray["headGroupSpec"], *ray["workerGroupSpecs"]]
    return [manifest["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]


def test_keys_are_named_and_never_written_down() -> None:
    text = yaml.safe_dump_all([m for name in NAMES for m in objects(name)])
    assert "yard-keys" in text
    for secret in ("ACCESSKEY", "SECRETKEY", "PASSWORD"):
        assert secret not in text


def test_names_are_stable_distinct_and_short_enough_for_pods() -> None:
    assert object_name(JOB) == object_name(StageJob(JOB.stage, JOB.run_id, force=True))
    others = [StageJob("alignment.world_knowledge", JOB.run_id), StageJob(JOB.stage, "run-2")]
    assert len({object_name(job) for job in (JOB, *others)}) == 3
    long = object_name(StageJob("post_training." + "very_long_" * 20, JOB.run_id))
    # name-index-suffix, for the highest index that the settings allow; a JobSet's are longer
    assert len(f"{long}-4095-abcde") <= 63
    assert len(f"{long}-{PODS}-0-4095-abcde") <= 63
    ray = rayjob_name(StageJob("post_training." + "very_long_" * 20, JOB.run_id))
    assert len(ray) <= 47, "KubeRay refuses longer names"
    assert ray != long, "KubeRay makes a Job of the RayJob's name"


@pytest.mark.parametrize(
    ("gpus", "distributed", "nodes", "expected"),
    [
        (0, True, 4, Size(1, 0, 1)),
        (1, True, 4, Size(1, 1, 1)),
        (8, True, 4, Size(1, 8, 8)),
        (16, True, 4, Size(2, 8, 8)),
        (64, True, 4, Size(4, 8, 8)),
        (64, False, 4, Size(1, 8, 1)),
    ],
)
def test_size(gpus: int, distributed: bool, nodes: int, expected: Size) -> None:
    stage = replace(STAGE, gpus=gpus, distributed=distributed)
    assert stage_size(stage, ClusterSettings(nodes=nodes)) == expected


def test_ranks_of_one_node_are_the_commands_own_and_of_several_torchruns() -> None:
    one = job_manifest(JOB, Size(1, 8, 8), PLAIN, YARD)["spec"]["template"]["spec"]["containers"][0]
    assert one["command"][0] == "python"
    assert {"name": "SAILYARD_RANKS", "value": "8"} in one["env"]
    two = job_manifest(JOB, Size(2, 8, 8), FULL, YARD)["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "SAILYARD_RANKS", "value": "1"} in two["env"]
    # As torchrun itself reads it: --run is the stage's, not short for --run-path.
    from torch.distributed.run import parse_args

    arguments = parse_args(two["command"][1:])
    assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "8")
    assert arguments.training_script == "sailyard"
    assert arguments.training_script_args == ["stage", "run", JOB.stage, "--run", JOB.run_id]


def test_pods_are_as_many_as_completions() -> None:
    """apache/airflow 64867: parallelism above completions never ends."""
    for name in NAMES[:3]:
        spec = objects(name)[0]["spec"]
        assert spec["parallelism"] == spec["completions"]


def test_the_pods_of_a_jobset_meet_at_its_first() -> None:
    spec = objects("jobset")[0]["spec"]
    name = object_name(JOB)
    job = spec["replicatedJobs"][0]["template"]["spec"]
    command = job["template"]["spec"]["containers"][0]["command"]
    # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>
    assert f"--rdzv-endpoint={name}-{PODS}-0-0.{name}:29400" in command
    assert spec["network"]["subdomain"] == name
    assert spec["network"]["publishNotReadyAddresses"] is True


def test_a_jobset_starts_anew_as_a_whole_and_disruptions_are_free() -> None:
    spec = objects("jobset")[0]["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    disrupted, overdue = spec["failurePolicy"]["rules"]
    assert job["podFailurePolicy"]["rules"][0]["action"] == "FailJob"
    assert disrupted["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert disrupted["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert (overdue["onJobFailureReasons"], overdue["action"]) == (
        ["DeadlineExceeded"],
        "FailJobSet",
    )
    assert spec["failurePolicy"]["maxRestarts"] == FULL.max_failures


def test_a_rayjob_works_on_its_workers_and_keeps_keys_from_the_pod_that_submits() -> None:
    manifest = objects("rayjob")[0]
    submitter, head, worker = (pod["spec"]["containers"][0] for pod in ray_pods(manifest))
    assert "envFrom" not in submitter
    assert manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    environment = {pair["name"]: pair["value"] for pair in head["env"]}
    assert environment["SAILYARD_RAY_ADDRESS"] == "auto"
    assert environment["SAILYARD_RAY_WORKERS"] == "3"
    assert manifest["spec"]["entrypoint"] == (
        f"python -m sailyard stage run {SPREAD.stage} --run {SPREAD.run_id}"
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_pod_is_root_or_holds_a_token(name: str) -> None:
    for manifest in objects(name):
        for known in as_kubernetes_knows(manifest):
            pod = (known.get("template") or known["spec"].get("template", {})).get("spec")
            if pod is None:  # a Service
                continue
            assert pod["automountServiceAccountToken"] is False
            assert pod["securityContext"]["runAsNonRoot"] is True
            for container in pod["containers"]:
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", NAMES)
def test_deadline_time_to_live_and_queue_are_on_the_object(name: str) -> None:
    manifest = objects(name)[0]
    spec = manifest["spec"]
    child = spec["replicatedJobs"][0]["template"]["spec"] if name == "jobset" else spec
    assert child["activeDeadlineSeconds"] == 7 * 24 * 3600
    assert spec["ttlSecondsAfterFinished"] == 24 * 3600
    queued = name not in ("cpu", "one-gpu")
    assert spec["suspend"] is queued
    assert ("kueue.x-k8s.io/queue-name" in manifest["metadata"]["labels"]) is queued


def test_the_version_of_ray_is_the_images() -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    assert f"ray=={RAY_VERSION}" in pins


def test_what_cannot_work_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="SAILYARD_CLUSTER_IMAGE"):
        job_manifest(JOB, Size(1, 0), ClusterSettings(), YARD)
    with pytest.raises(ValueError, match="SAILYARD_CLUSTER_ENV_SECRET"):
        job_manifest(JOB, Size(1, 0), ClusterSettings(image=IMAGE), YARD)
    with pytest.raises(ValueError, match="SAILYARD_STORE=s3://"):
        check_reachable(Settings())
    with pytest.raises(ValueError, match="PostgreSQL"):
        check_reachable(Settings(store="s3://yard"))
    check_reachable(YARD)
    with pytest.raises(ValidationError, match="memory"):
        ClusterSettings(memory="lots")


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAILYARD_CLUSTER_NODE_SELECTOR", '{"gpu": "h100"}')
    monkeypatch.setenv("SAILYARD_CLUSTER_QUEUE", "research")
    assert ClusterSettings().node_selector == {"gpu": "h100"}
    queued = ClusterSettings(image=IMAGE, env_secret="keys")
    assert job_manifest(JOB, Size(1, 0), queued, YARD)["spec"]["suspend"] is True
