"""The cluster suite: ``make test-cluster``, with any KUBECONFIG.

Images must be where the cluster finds them: SAILYARD_TEST_VALUES names a values file with theirs
(by default the chart's examples/laptop.yaml: images loaded into the node by hand).
SAILYARD_TEST_RECIPE=tiny runs the whole small recipe in place of micro, SAILYARD_TEST_NODES=1
trains on one node in place of two, SAILYARD_TEST_KEEP=1 leaves everything there for a look.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import CHART, Cluster
from tests.tools import tool

WANTED = os.environ.get("SAILYARD_TEST_CLUSTER") == "1"
VALUES = Path(os.environ.get("SAILYARD_TEST_VALUES", CHART / "examples" / "laptop.yaml"))
NAMESPACE = os.environ.get("SAILYARD_TEST_NAMESPACE", "sailyard-test")
KEEP = os.environ.get("SAILYARD_TEST_KEEP") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "" if WANTED else "the cluster suite is run by: make test-cluster"
    if WANTED:
        asked = subprocess.run(
            [str(tool("kubectl")), "version", "--request-timeout=20s"], capture_output=True
        )
        reason = "no cluster answers; set KUBECONFIG" if asked.returncode else ""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(0))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The chart, installed into a namespace that admits restricted pods only."""
    found = Cluster(NAMESPACE, VALUES)
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": NAMESPACE,
            "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
        },
    }
    found.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    found.install("upgrade", "--install")
    yield found
    if not KEEP:
        found.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
