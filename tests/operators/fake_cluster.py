"""The part of a Kubernetes API server that launching touches, on a real socket.

It keeps objects, answers 404, 409 and 410 as the real one does, streams watches and logs, asks for
rights, and can be told to misbehave. There is no kubelet and no controller: a test plays those
through ``FakeCluster``'s methods, and writes what they write.
"""

from __future__ import annotations

import copy
import json
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

JSON = dict[str, Any]

_PATH = re.compile(
    r"^(?:/api/v1|/apis/(?P<group>[a-z0-9.-]+)/(?P<version>v[0-9a-z]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<kind>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<part>log))?$"
)
_DISCOVERY = re.compile(r"^/apis/(?P<group>[a-z0-9.-]+)/(?P<version>v[0-9a-z]+)$")

BUILT_IN = {"batch/v1": ["jobs"], "authorization.k8s.io/v1": ["selfsubjectaccessreviews"]}
ADD_ONS = {
    "jobset.x-k8s.io/v1alpha2": ["jobsets"],
    "ray.io/v1": ["rayclusters", "rayjobs"],
    "kueue.x-k8s.io/v1beta2": ["workloads"],
}
STAGE_OBJECTS = ("jobs", "jobsets", "rayjobs")


class FakeCluster:
    """Objects and how the server behaves.

    Attributes:
        used: (group, resource, verb) of every request.
        requests: "METHOD path?query" of every request.
        denied: Rights that the client lacks; answered with 403.
        faults: Taken one by one by the next requests: an HTTP status, (status, headers), "reset".
        apis: Version of each API group that is installed -> its resources.
        skew: The server's clock is so far ahead of ours.
        slow_deletion: A deleted Job stays until ``collect``, as under foreground deletion.
        watch_speed: Seconds of a watch's time-out that pass in one real second.
        watched_s: Virtual seconds spent in watches.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.objects: dict[tuple[str, str], JSON] = {}
        self.events: list[tuple[int, str, str, JSON]] = []
        self.oldest_event = 0
        self.revision = 100
        self.logs: dict[str, list[tuple[datetime, str]]] = {}
        self.closed_logs: set[str] = set()
        self.used: set[tuple[str, str, str]] = set()
        self.requests: list[str] = []
        self.denied: set[tuple[str, str, str]] = set()
        self.faults: list[Any] = []
        self.log_cuts: list[int] = []
        self.apis = BUILT_IN | ADD_ONS
        self.skew = timedelta()
        self.slow_deletion = False
        self.watch_speed = 1.0
        self.watched_s = 0.0

    # --- what the API does -----------------------------------------------------------------------

    def now(self) -> datetime:
        return datetime.now(UTC) + self.skew

    def write(self, kind: str, body: JSON, event: str) -> JSON:
        """Store an object as it is and tell the watchers."""
        with self.changed:
            self.revision += 1
            body["metadata"]["resourceVersion"] = str(self.revision)
            key = (kind, body["metadata"]["name"])
            if event == "DELETED":
                self.objects.pop(key, None)
            else:
                self.objects[key] = body
            self.events.append((self.revision, kind, event, copy.deepcopy(body)))
            self.changed.notify_all()
        return body

    def create(self, kind: str, namespace: str, body: JSON) -> JSON:
        body = copy.deepcopy(body)
        body["metadata"] |= {
            "namespace": namespace,
            "uid": str(uuid.uuid4()),
            "creationTimestamp": self.now().strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        body.setdefault("status", {})
        return self.write(kind, body, "ADDED")

    def delete(self, kind: str, body: JSON, options: JSON) -> None:
        if kind in STAGE_OBJECTS and self.slow_deletion:
            body["metadata"]["deletionTimestamp"] = self.now().strftime("%Y-%m-%dT%H:%M:%SZ")
            self.write(kind, body, "MODIFIED")
            return
        self._remove(kind, body)

    def _remove(self, kind: str, body: JSON) -> None:
        self.write(kind, body, "DELETED")
        self.closed_logs.add(body["metadata"]["name"])
        uid = body["metadata"]["uid"]
        for (other, _), found in list(self.objects.items()):
            if uid in {o["uid"] for o in found["metadata"].get("ownerReferences", [])}:
                self._remove(other, found)

    # --- what kubelet, controllers and people do --------------------------------------------------

    @staticmethod
    def kind(handle: str) -> str:
        """A launcher's handle ends with the kind unless it is a Job."""
        return (handle.split("/")[2:] or ["jobs"])[0]

    def job(self, handle: str) -> JSON:
        return self.objects[self.kind(handle), handle.split("/")[0]]

    def has(self, kind: str, name: str) -> bool:
        return (kind, name.split("/")[0]) in self.objects

    def collect(self, handle: str) -> None:
        """The garbage collector has finished a foreground deletion."""
        self._remove(self.kind(handle), self.job(handle))

    def suspend(self, handle: str, suspended: bool) -> None:
        body = copy.deepcopy(self.job(handle))
        body["spec"]["suspend"] = suspended
        self.write(self.kind(handle), body, "MODIFIED")

    def set_status(self, handle: str, **status: Any) -> None:
        body = copy.deepcopy(self.job(handle))
        body["status"] = status
        self.write(self.kind(handle), body, "MODIFIED")

    def end(self, handle: str, kind: str, reason: str, message: str = "", **status: Any) -> None:
        """As the Job controller ends a Job: first that it will, then that it has."""
        early = {"Complete": "SuccessCriteriaMet", "Failed": "FailureTarget"}[kind]
        conditions = [
            {"type": name, "status": "True", "reason": reason, "message": message}
            for name in (early, kind)
        ]
        self.set_status(handle, conditions=conditions[:1], **status)
        self.set_status(handle, conditions=conditions, **status)

    def add_pod(
        self, handle: str, index: int, suffix: str, phase: str = "Running", **status: Any
    ) -> str:
        job = self.job(handle)
        name = f"{job['metadata']['name']}-{index}-{suffix}"
        template, labels = _pod_of(self.kind(handle), job, index)
        owner = {
            "apiVersion": job["apiVersion"],
            "kind": job["kind"],
            "name": job["metadata"]["name"],
            "uid": job["metadata"]["uid"],
        }
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": {**template["metadata"]["labels"], **labels},
                "ownerReferences": [owner],
            },
            "spec": template["spec"],
            "status": {"phase": phase, **status},
        }
        self.create("pods", job["metadata"]["namespace"], body)
        self.logs[name] = []
        return name

    def set_pod(self, pod: str, phase: str, **status: Any) -> None:
        body = copy.deepcopy(self.objects["pods", pod])
        body["status"] = {"phase": phase, **status}
        self.write("pods", body, "MODIFIED")

    def say(self, pod: str, *lines: str) -> None:
        with self.changed:
            self.logs[pod] += [(self.now(), line) for line in lines]
            self.changed.notify_all()

    def close_log(self, pod: str) -> None:
        """The container has ended."""
        with self.changed:
            self.closed_logs.add(pod)
            self.changed.notify_all()

    def lose_pod(self, pod: str) -> None:
        """The autoscaler took the node, and the pod with it."""
        self.write("pods", self.objects["pods", pod], "DELETED")
        self.close_log(pod)

    def forget_events(self) -> None:
        """etcd was compacted: watches that begin before now are 410 Gone."""
        with self.changed:
            self.revision += 1
            self.oldest_event = self.revision


def _pod_of(kind: str, body: JSON, index: int) -> tuple[JSON, JSON]:
    """Template of a pod, and the labels that controllers add. Of a RayJob, 0 is the pod that
    submits, 1 the head, all others are workers; the Ray cluster between is left out."""
    spec, name = body["spec"], body["metadata"]["name"]
    if kind == "rayjobs":
        if index == 0:
            return spec["submitterPodTemplate"], {"batch.kubernetes.io/job-name": name}
        ray = spec["rayClusterSpec"]
        group = ray["headGroupSpec"] if index == 1 else ray["workerGroupSpecs"][0]
        return group["template"], {"ray.io/cluster": f"{name}-x1y2z"}
    labels = {"batch.kubernetes.io/job-completion-index": str(index)}
    if kind == "jobs":
        return spec["template"], labels | {"batch.kubernetes.io/job-name": name}
    child = spec["replicatedJobs"][0]
    labels["batch.kubernetes.io/job-name"] = f"{name}-{child['name']}-0"
    labels["jobset.sigs.k8s.io/jobset-name"] = name
    return child["template"]["spec"]["template"], labels


@contextmanager
def serve(cluster: FakeCluster, folder: Path) -> Iterator[Path]:
    """Serve the cluster while the block runs; yields a kubeconfig for it."""

    class Handler(_Handler):
        pass

    Handler.cluster = cluster
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [
            {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        ],
        "users": [{"name": "u", "user": {"token": "secret-token"}}],
        "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    try:
        yield path
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: FakeCluster

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        cluster = self.cluster
        cluster.requests.append(f"{self.command} {self.path}")
        if self._misbehave():
            return None
        if (asked := _DISCOVERY.match(parts.path)) is not None:
            return self._discover("/".join(asked.groups()))
        found = _PATH.match(parts.path)
        if found is None or self.headers.get("Authorization") != "Bearer secret-token":
            return self._status(404 if found is None else 401, "what?")
        group, kind, name = found["group"] or "", found["kind"], found["name"]
        if group and kind not in cluster.apis.get(f"{group}/{found['version']}", []):
            return self._status(404, "the server could not find the requested resource")
        if kind == "selfsubjectaccessreviews":
            return self._review(body)
        watched = query.get("watch") in ("true", "True")
        verb = {"POST": "create", "DELETE": "delete"}.get(self.command) or (
            "get" if name else "watch" if watched else "list"
        )
        resource = f"{kind}/log" if found["part"] else kind
        cluster.used.add((group, resource, verb))
        if (group, resource, verb) in cluster.denied:
            return self._status(403, f"may not {verb} {resource}")
        if verb == "create":
            return self._create(kind, found["namespace"], body)
        if verb == "list":
            return self._list(kind, query)
        if verb == "watch":
            return self._watch(kind, query)
        known = cluster.objects.get((kind, name))
        if known is None:
            return self._status(404, f'{kind} "{name}" not found')
        if found["part"]:
            return self._log(name, query)
        if verb == "get":
            return self._json(200, known)
        wanted = (body.get("preconditions") or {}).get("uid")
        if wanted not in (None, known["metadata"]["uid"]):
            return self._status(409, "the UID in the precondition is another's")
        cluster.delete(kind, known, body)
        return self._status(200, "deleted")

    def _discover(self, version: str) -> None:
        known = self.cluster.apis.get(version)
        if known is None:
            return self._status(404, "the server could not find the requested resource")
        resources = [
            {"name": name, "singularName": "", "namespaced": True, "kind": "?", "verbs": []}
            for name in known
        ]
        return self._json(
            200, {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        )

    def _misbehave(self) -> bool:
        if not self.cluster.faults:
            return False
        fault = self.cluster.faults.pop(0)
        if fault == "reset":
            self._reset()
            return True
        status, headers = fault if isinstance(fault, tuple) else (fault, {})
        self._status(status, "as told", headers)
        return True

    def _reset(self) -> None:
        """Close so that the client sees a connection reset, not an orderly end."""
        option = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        self.connection.close()
        self.close_connection = True

    def _create(self, kind: str, namespace: str, body: JSON) -> None:
        with self.cluster.changed:  # or two at once both find the name free
            taken = (kind, body["metadata"]["name"]) in self.cluster.objects
            made = {} if taken else self.cluster.create(kind, namespace, body)
        if taken:
            return self._status(409, "already exists")
        return self._json(201, made)

    def _review(self, body: JSON) -> None:
        wants = body["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (wants["resource"], wants.get("subresource"))))
        right = (wants.get("group", ""), resource, wants["verb"])
        body["status"] = {"allowed": right not in self.cluster.denied}
        self._json(201, body)

    def _list(self, kind: str, query: dict[str, str]) -> None:
        with self.cluster.changed:
            items = [b for (k, _), b in self.cluster.objects.items() if k == kind]
            revision = str(self.cluster.revision)
        items = [b for b in items if _selected(b, query)]
        self._json(200, {"kind": "List", "metadata": {"resourceVersion": revision}, "items": items})

    def _watch(self, kind: str, query: dict[str, str]) -> None:
        cluster, seen = self.cluster, int(query.get("resourceVersion", 0))
        self._begin_stream()
        if seen < cluster.oldest_event:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
            self._line({"type": "ERROR", "object": gone})
            return self._end_stream()
        begun, limit = time.monotonic(), float(query.get("timeoutSeconds", 1800))
        while True:
            with cluster.changed:
                news = [e for e in cluster.events if e[0] > seen and e[1] == kind]
                passed = (time.monotonic() - begun) * cluster.watch_speed
                if not news and passed < limit:
                    cluster.changed.wait(min(0.05, (limit - passed) / cluster.watch_speed))
                    continue
            for revision, _, event, body in news:
                seen = revision
                if _selected(body, query):
                    self._line({"type": event, "object": body})
            if not news:
                cluster.watched_s += passed
                return self._end_stream()

    def _log(self, pod: str, query: dict[str, str]) -> None:
        cluster = self.cluster
        self._begin_stream()
        begin = datetime.min.replace(tzinfo=UTC)
        if "sinceSeconds" in query:
            begin = cluster.now() - timedelta(seconds=int(query["sinceSeconds"]))
        sent, cut = 0, cluster.log_cuts.pop(0) if cluster.log_cuts else None
        while True:
            with cluster.changed:
                lines = cluster.logs[pod][sent:]
                closed = pod in cluster.closed_logs
                if not lines and not closed:
                    cluster.changed.wait(0.05)
                    continue
            for stamp, text in lines:
                if cut is not None and sent >= cut:
                    return self._reset()
                sent += 1
                if stamp >= begin:
                    self._chunk(f"{stamp:%Y-%m-%dT%H:%M:%S.%f}Z {text}\n".encode())
            if not lines:
                return self._end_stream()

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _line(self, value: JSON) -> None:
        self._chunk(json.dumps(value).encode() + b"\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def _status(self, code: int, message: str, headers: dict[str, str] | None = None) -> None:
        word = "Success" if code < 400 else "Failure"
        body = {"kind": "Status", "status": word, "code": code, "message": message}
        self._json(code, body, headers)

    def _json(self, code: int, body: JSON, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _selected(body: JSON, query: dict[str, str]) -> bool:
    field = query.get("fieldSelector", "")
    if field and field != f"metadata.name={body['metadata']['name']}":
        return False
    labels = body["metadata"].get("labels", {})
    for part in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = part.partition("=")
        if key not in labels or (value and labels[key] != value):
            return False
    return True
