"""One release on a real cluster, from its installation to its removal. The order matters."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from typing import Any

import pytest

from operators.airflow_client import AirflowClient
from sailyard.cluster import RUN_LABEL
from tests.cluster.cluster import DAG, NAME, RELEASE, Cluster, wait_for

RECIPE = os.environ.get("SAILYARD_TEST_RECIPE", "micro")
NODES = int(os.environ.get("SAILYARD_TEST_NODES", "2"))  # of a training stage, a device each
OVERRIDES = [f"devices.training={NODES}", "devices.inference=1"]
FROM = "pretraining.basic"
ALIAS = "production"

# What one test leaves for the next.
found: dict[str, Any] = {}


def test_every_object_is_taken_by_the_api_server_as_it_is(cluster: Cluster) -> None:
    """kubectl's strict dry run refuses a misspelt field, which Helm's lets pass."""
    manifests = cluster.helm("get", "manifest", RELEASE)
    cluster.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=manifests)


def test_helm_test(cluster: Cluster) -> None:
    assert "Phase:" in cluster.helm("test", RELEASE)


def test_an_upgrade_keeps_every_secret(cluster: Cluster) -> None:
    def secrets() -> dict[str, Any]:
        return {
            secret["metadata"]["name"]: secret["data"]
            for secret in cluster.get("secrets")
            if secret["metadata"]["name"].startswith(NAME)
        }

    before = secrets()
    assert len(before) == 5
    cluster.install("upgrade")
    assert secrets() == before


def test_the_pipeline_runs_as_jobs(cluster: Cluster) -> None:
    begun = time.monotonic()
    run = cluster.run(RECIPE, OVERRIDES)
    found["run"], found["outputs"] = run, cluster.outputs(run)
    print(f"\n{len(found['outputs'])} stages in {time.monotonic() - begun:.0f} s")
    jobs = cluster.jobs()
    assert set(jobs) == set(found["outputs"])
    sizes = {stage: job["spec"]["completions"] for stage, job in jobs.items()}
    assert sizes["pretraining.multitask"] == NODES
    assert sizes["curation.vqa"] == 1
    for stage in ("pretraining.multitask", "evaluation.suite"):
        (container,) = jobs[stage]["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1", stage


def test_jobs_begin_soon_after_their_pods_and_follow_each_other(cluster: Cluster) -> None:
    """The issue's bars, as figures: they depend on the machine, so they are told, not asserted."""
    jobs, steps = cluster.jobs(found["run"]), cluster.first_steps(found["run"])
    waits = []
    for stage, at in steps.items():
        pods = cluster.stage_pods(stage, found["run"])
        states = [p["status"]["containerStatuses"][0]["state"]["terminated"] for p in pods]
        began = max(_time(state["startedAt"]) for state in states)
        waits.append((round((_time(at) - began).total_seconds(), 1), stage))
    print(f"\nseconds from pod running to first step: {sorted(waits)}")
    ended = {stage: _time(job["status"]["completionTime"]) for stage, job in jobs.items()}
    made = sorted((_time(job["metadata"]["creationTimestamp"]), s) for s, job in jobs.items())
    upstream = cluster.python(
        "import json; from sailyard.runs import load_run; "
        f"p = load_run({found['run']!r}).pipeline; "
        "print(json.dumps({s.name: list(p.upstream(s.name)) for s in p.stages}))"
    )
    gaps = [
        (round((at - max(ended[u] for u in upstream[stage])).total_seconds(), 1), stage)
        for at, stage in made
        if upstream[stage] and set(upstream[stage]) <= set(ended)
    ]
    print(f"seconds from the last Job's end to the next Job: {sorted(gaps)}")
    assert waits
    assert min(gap for gap, _ in gaps) >= 0, "no stage begins before what it needs"


def test_a_disturbed_run_ends_with_the_same_weights(cluster: Cluster) -> None:
    """Pods killed and evicted, scheduler and triggerer restarted, the release upgraded."""

    def disturb(client: AirflowClient, dag_run: str) -> None:
        pod = cluster.running_pod("pretraining.multitask")
        cluster.kubectl("delete", "pod", pod, "--grace-period=0", "--force")
        pod = cluster.running_pod("post_training.base_sft_2")
        cluster.evict(pod)
        cluster.running_pod("post_training.base_sft_3")
        cluster.kubectl("delete", "pod", f"{NAME}-scheduler-0", f"{NAME}-triggerer-0")
        cluster.running_pod("post_training.longcot_sft")
        cluster.install("upgrade", "--set", "airflow.parallelism=5")

    run = cluster.run(RECIPE, OVERRIDES, during=disturb, start_from=FROM, force=True)
    again = cluster.outputs(run)
    assert set(again) == set(found["outputs"])
    # A stage's answers and timings may differ in files that are no weights.
    weights = [stage for stage in again if "checkpoint" in again[stage]]
    assert len(weights) > 10
    different = [s for s in weights if again[s] != found["outputs"][s]]
    assert not different
    assert found["run"] != run


def test_a_cancelled_run_leaves_nothing_running(cluster: Cluster) -> None:
    with cluster.airflow() as client:
        asked = {"recipe": RECIPE, "overrides": OVERRIDES, "launcher": "kubernetes"}
        dag_run = client.trigger(DAG, {**asked, "start_from": FROM, "force": True})
        run = wait_for("the run", lambda: client.returned(DAG, dag_run, "create_run"))
        wait_for("its Job", lambda: cluster.jobs(run))
        cluster.running_pod("pretraining.basic")
        client.fail_run(DAG, dag_run)
    wait_for("the Job's end", lambda: not cluster.jobs(run), 180)
    wait_for("its pods' end", lambda: not cluster.get("pods", "-l", f"{RUN_LABEL}={run}"), 180)


def test_ended_jobs_are_removed_when_asked(cluster: Cluster) -> None:
    cluster.inside("sailyard", "doctor", "--cluster", "--remove-leftovers", seconds=300)
    wait_for("no Job of a stage", lambda: not cluster.jobs(), 180)
    ours = ("-l", "app.kubernetes.io/managed-by=sailyard")
    wait_for("no Service of a stage", lambda: not cluster.get("services", *ours), 60)


# --- promotion -----------------------------------------------------------------------------------


def served(cluster: Cluster) -> str:
    """Digest that the endpoint's template names, once all of its pods are ready and new."""
    (deployment,) = cluster.get("deployment", f"{NAME}-endpoint")
    status, spec = deployment["status"], deployment["spec"]
    ready = status.get("readyReplicas", 0) == status.get("updatedReplicas", 0) == spec["replicas"]
    done = ready and status.get("replicas") == spec["replicas"]
    env = {v["name"]: v.get("value") for v in spec["template"]["spec"]["containers"][0]["env"]}
    return (env.get("SAILYARD_SERVE_VERSION") or "") if done else ""


CLIENT = """
import json, os, sys, time, urllib.request
url = "http://%s-endpoint:8000/v1/chat/completions"
turn = {"role": "user", "content": "What is 2 + 3?"}
body = json.dumps({"model": "production", "messages": [turn], "max_tokens": 4}).encode()
key = "Bearer " + os.environ["SAILYARD_SERVE_API_KEY"]
while True:
    try:
        request = urllib.request.Request(url, body, {"Authorization": key})
        print("ok", json.load(urllib.request.urlopen(request, timeout=60))["model"], flush=True)
    except Exception as error:
        print("lost", repr(error), flush=True)
    time.sleep(0.05)
"""


@pytest.fixture
def talking(cluster: Cluster) -> Any:
    """A client inside that asks all the time; yields what reads its lines so far."""
    (template,) = cluster.get("deployment", f"{NAME}-rollout")
    spec = template["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "talking"},
        "spec": {
            "securityContext": spec["securityContext"],
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "client",
                    "image": container["image"],
                    "imagePullPolicy": container["imagePullPolicy"],
                    "securityContext": container["securityContext"],
                    "command": ["python", "-c", CLIENT % NAME],
                    "envFrom": [{"secretRef": {"name": f"{NAME}-endpoint"}}],
                }
            ],
        },
    }
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    cluster.kubectl("wait", "--for=condition=Ready", "pod/talking", "--timeout=60s")
    yield lambda: cluster.kubectl("logs", "talking").split("\n")
    cluster.kubectl("delete", "pod", "talking")


def sailyard(cluster: Cluster, *arguments: str) -> str:
    return cluster.inside("sailyard", *arguments)


def register(cluster: Cluster, digest: str, run: str) -> str:
    ref: str = cluster.python(
        "import json; from sailyard.yard import Yard; "
        f"print(json.dumps(Yard().registry.register({RECIPE!r}, {digest!r}, run_id={run!r}).ref))"
    )
    return ref


def test_the_runs_version_is_served(cluster: Cluster) -> None:
    first = found["outputs"]["post_training.mixed_rl"]["checkpoint"]
    wait_for("the promoted version", lambda: served(cluster) == first, 300)


def test_promoting_and_rolling_back_drop_no_request(cluster: Cluster, talking: Any) -> None:
    first = found["outputs"]["post_training.mixed_rl"]["checkpoint"]
    other = found["outputs"]["post_training.soup"]["checkpoint"]
    found["other"] = register(cluster, other, found["run"])
    wait_for("an answer", lambda: any(line.startswith("ok") for line in talking()), 60)
    sailyard(cluster, "promote", found["other"], "--reason", "cluster suite")
    wait_for("the other version", lambda: served(cluster) == other, 300)
    sailyard(cluster, "rollback", "--reason", "cluster suite")
    wait_for("the first again", lambda: served(cluster) == first, 300)
    lines = [line for line in talking() if line]
    lost = [line for line in lines if not line.startswith("ok")]
    print(f"\n{len(lines)} requests over two rollouts, {len(lost)} lost")
    assert not lost, lost[:5]
    assert len({line.split()[1] for line in lines}) == 2


def test_a_version_that_cannot_serve_is_taken_back(cluster: Cluster, talking: Any) -> None:
    first = found["outputs"]["post_training.mixed_rl"]["checkpoint"]
    # An artifact that exists and is no checkpoint.
    broken = register(cluster, found["outputs"]["curation.heldout"]["heldout"], "")
    sailyard(cluster, "promote", broken, "--reason", "cluster suite")

    def taken_back() -> bool:
        moves = cluster.python(
            "import json; from sailyard.yard import Yard; "
            "print(json.dumps([(m.action, m.actor, m.reason) for m in "
            "Yard().registry.promotions()[:1]]))"
        )
        return bool(moves[0][:2] == ["rollback", "rollout"])

    wait_for("the rollout to take it back", taken_back, 600, pause=5)
    wait_for("the first again", lambda: served(cluster) == first, 120)
    lost = [line for line in talking() if line.startswith("lost")]
    assert not lost, lost[:5]


def test_uninstalling_keeps_the_data(cluster: Cluster) -> None:
    before = {claim["metadata"]["name"] for claim in cluster.get("pvc")}
    cluster.helm("uninstall", RELEASE, "--wait")
    assert {claim["metadata"]["name"] for claim in cluster.get("pvc")} == before
    kept = {secret["metadata"]["name"] for secret in cluster.get("secrets")}
    assert {f"{NAME}-yard", f"{NAME}-airflow", f"{NAME}-postgresql"} <= kept
    # What is left is the pod of `helm test`, which has ended.
    running = ("-l", "app.kubernetes.io/name=sailyard", "--field-selector=status.phase=Running")
    wait_for("no running pod", lambda: not cluster.get("pods", *running))
    cluster.install("install")
    current = cluster.python(
        "import json; from sailyard.yard import Yard; "
        f"print(json.dumps(Yard().registry.current({ALIAS!r}).checkpoint))"
    )
    assert current == found["outputs"]["post_training.mixed_rl"]["checkpoint"]


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
