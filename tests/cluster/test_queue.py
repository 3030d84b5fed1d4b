"""Stages that Kueue admits, as Jobs and as JobSets: for a cluster that has both controllers.

Kueue: one ClusterQueue with room for one training stage, shut at first. JobSet: stages on several
nodes, disturbed. Uses the release that the rest of the suite leaves installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from operators.airflow_client import AirflowClient
from sailyard.cluster import JOBSET, RUN_LABEL, STAGE_LABEL
from tests.cluster.cluster import DAG, JSON, Cluster, wait_for
from tests.cluster.test_cluster import FROM, NODES, OVERRIDES, RECIPE, found

QUEUE = "sailyard-test"
JOBSETS = f"{JOBSET.plural}.{JOBSET.group}"
# Whatever a stage's pod asks for has to be covered, or Kueue never admits it.
QUOTA = {"cpu": "8", "memory": "64Gi", "ephemeral-storage": "200Gi", "nvidia.com/gpu": str(NODES)}


def kueue(kind: str, spec: JSON, **metadata: str) -> JSON:
    made = {"name": QUEUE, **metadata}
    return {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": made, "spec": spec}


@pytest.fixture
def shut_queue(cluster: Cluster) -> Iterator[str]:
    """A queue that admits nothing yet, and a release that sends its stages there as JobSets."""
    served = cluster.kubectl("api-versions")
    for group in ("kueue.x-k8s.io", JOBSET.group):
        if group not in served:
            pytest.skip(f"the cluster does not serve {group}: install its controller first")
    quota = [{"name": name, "nominalQuota": value} for name, value in QUOTA.items()]
    queue = {
        "namespaceSelector": {},
        "stopPolicy": "Hold",
        "resourceGroups": [
            {"coveredResources": list(QUOTA), "flavors": [{"name": QUEUE, "resources": quota}]}
        ],
    }
    objects = [
        kueue("ResourceFlavor", {}),
        kueue("ClusterQueue", queue),
        kueue("LocalQueue", {"clusterQueue": QUEUE}, namespace=cluster.namespace),
    ]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    cluster.kubectl("apply", "-f", "-", stdin=text)
    cluster.install("upgrade", "--set", f"launcher.queue={QUEUE}", "--set", "launcher.jobSet=true")
    yield QUEUE
    for kind in ("localqueue", "clusterqueue", "resourceflavor"):
        cluster.kubectl("delete", kind, QUEUE, "--wait=false")


def objects(cluster: Cluster, run: str) -> list[JSON]:
    """The Jobs and JobSets of a run's stages; a JobSet's own Jobs carry no run."""
    return [
        item for kind in ("jobs", JOBSETS) for item in cluster.get(kind, "-l", f"{RUN_LABEL}={run}")
    ]


def test_stages_wait_for_their_queue_and_end_with_the_same_weights(
    cluster: Cluster, shut_queue: str
) -> None:
    """Nothing runs while the queue is shut; then two JobSets lose a pod each."""

    def during(client: AirflowClient, dag_run: str) -> None:
        run = wait_for("the run", lambda: client.returned(DAG, dag_run, "create_run"))
        first = wait_for("its first stage", lambda: objects(cluster, run))
        assert all(item["spec"]["suspend"] for item in first)
        wait_for("the task to say so", lambda: told(client, dag_run), 120, pause=5)
        open_it = json.dumps({"spec": {"stopPolicy": "None"}})
        cluster.kubectl("patch", "clusterqueue", QUEUE, "--type=merge", "-p", open_it)
        pod = cluster.running_pod("pretraining.multitask")
        cluster.kubectl("delete", "pod", pod, "--grace-period=0", "--force")
        cluster.evict(cluster.running_pod("post_training.base_sft_2"))

    def told(client: AirflowClient, dag_run: str) -> bool:
        waiting = [t for t in client.task_instances(DAG, dag_run) if t["state"] == "deferred"]
        logs = [client.task_log(DAG, dag_run, t["task_id"], t["try_number"]) for t in waiting]
        return any(f"in Kueue's queue {QUEUE}, not admitted yet" in log for log in logs)

    run = cluster.run(RECIPE, OVERRIDES, during=during, start_from=FROM, force=True)
    made = objects(cluster, run)
    kinds = {item["metadata"]["annotations"][STAGE_LABEL]: item["kind"] for item in made}
    assert kinds["pretraining.multitask"] == (JOBSET.name if NODES > 1 else "Job")
    assert kinds["evaluation.suite"] == "Job"
    admitted = {
        owner["uid"]
        for workload in cluster.get("workloads.kueue.x-k8s.io")
        if any(c["type"] == "Admitted" for c in workload["status"]["conditions"])
        for owner in workload["metadata"]["ownerReferences"]
    }
    assert {item["metadata"]["uid"] for item in made} <= admitted
    again = cluster.outputs(run)
    weights = [stage for stage in again if "checkpoint" in again[stage]]
    assert len(weights) > 10
    undisturbed = found.get("outputs", again)  # of the rest of the suite; none if this runs alone
    assert [stage for stage in weights if again[stage] != undisturbed[stage]] == []
