"""``sailyard doctor --cluster``: may Jobs be launched, and did any stay behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sailyard.cli.finding import Finding
from sailyard.cluster import ClusterSettings
from sailyard.runs import stage_result

if TYPE_CHECKING:
    from sailyard.cluster_api import StageJobInfo
    from sailyard.yard import Yard

WAY_OUT = "check KUBECONFIG, SAILYARD_CLUSTER_CONTEXT and that the API server can be reached"


def examine_cluster(yard: Yard, remove: bool) -> Iterator[Finding]:
    """What there is to say about the cluster.

    Args:
        yard: Whose stages have finished is asked here.
        remove: Delete leftovers: Jobs that have ended, or whose stage has a finished result.
    """
    try:
        import kubernetes  # noqa: F401
    except ImportError:
        text = "the kubernetes client is missing"
        yield Finding("cluster", "problem", text, "pip install 'sailyard[airflow]'")
        return
    try:
        yield from _examine(yard, ClusterSettings(), remove)
    except Exception as error:  # a check that breaks is a finding, not the end
        text = yard.redact(" ".join(str(error).split()) or type(error).__name__)
        yield Finding("cluster", "problem", text, WAY_OUT)


def _examine(yard: Yard, cluster: ClusterSettings, remove: bool) -> Iterator[Finding]:
    from kubernetes import client

    from sailyard.cluster_api import connect, delete_object, missing_rights, stage_jobs

    for name in ("image", "env_secret"):
        if not getattr(cluster, name):
            variable = f"SAILYARD_CLUSTER_{name.upper()}"
            yield Finding("cluster", "note", f"{variable} is not set", f"set {variable} to launch")
    api = connect(cluster)
    place = f"namespace {cluster.namespace} of {api.configuration.host}"
    missing = list(missing_rights(api, cluster))
    for right in missing:
        group = right.group or "core"
        text = f"may not {right.verb} {right.resource} ({group}) in {place}: {right.why}"
        yield Finding("cluster rights", "problem", text, "bind the Role of the Helm chart")
    if not missing:
        yield Finding("cluster rights", "ok", f"all that launching takes, in {place}")
    jobs = stage_jobs(api, cluster)
    yield Finding("cluster jobs", "ok", f"{len(jobs)} in {place}")
    objects = client.CustomObjectsApi(api)
    for job in jobs:
        leftover = job.ended or (job.state != "going" and _is_finished(yard, job))
        if leftover and remove:
            delete_object(objects, cluster.namespace, job.kind, job.name, job.uid)
            yield Finding("cluster job", "ok", f"{_describe(job)}; deleted")
        elif leftover:
            way_out = "sailyard doctor --cluster --remove-leftovers"
            yield Finding("cluster job", "note", f"{_describe(job)}; left over", way_out)
        else:
            yield Finding("cluster job", "ok", _describe(job))


def _is_finished(yard: Yard, job: StageJobInfo) -> bool:
    result = stage_result(job.run, job.stage, yard)
    return result is not None and result.finished


def _describe(job: StageJobInfo) -> str:
    return f"{job.name}: {job.stage} of run {job.run}, {job.state}, {job.age_s / 3600:.1f} h old"
