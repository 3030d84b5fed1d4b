"""The chart: what it renders, for every example, is valid, safe, and exactly what is meant."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from sailyard.cluster import (
    JOBSET_RIGHTS,
    QUEUE_RIGHTS,
    RAYJOB_RIGHTS,
    RIGHTS,
    ClusterSettings,
    Right,
)
from sailyard.settings import Settings
from serving import rollout
from serving.settings import ServingSettings
from tests.tools import tool

CHART = Path(__file__).parents[2] / "helm" / "sailyard"
GOLDEN = Path(__file__).parent / "golden"
UPDATE = bool(os.environ.get("SAILYARD_UPDATE_GOLDEN"))
EXAMPLES = sorted(path.stem for path in (CHART / "examples").glob("*.yaml"))
VERSIONS = ("1.31", "1.33", "1.35", "1.37")

Manifest = dict[str, Any]

pytestmark = pytest.mark.slow


def helm(*arguments: str) -> str:
    return subprocess.run(
        [str(tool("helm")), *arguments], check=True, capture_output=True, text=True, timeout=300
    ).stdout


@cache
def rendered(example: str = "", *flags: str) -> tuple[Manifest, ...]:
    values = ["--values", str(CHART / "examples" / f"{example}.yaml")] if example else []
    text = helm("template", "yard", str(CHART), "--namespace", "vlm", *values, *flags)
    return tuple(m for m in yaml.safe_load_all(text) if m)


def refused(*flags: str) -> str:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        helm("template", "yard", str(CHART), *flags)
    return str(caught.value.stderr)


def of_kind(manifests: tuple[Manifest, ...], kind: str) -> dict[str, Manifest]:
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] == kind}


def pods(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    """Name and pod spec of everything that runs pods."""
    for manifest in manifests:
        name = f"{manifest['kind']} {manifest['metadata']['name']}"
        if manifest["kind"] == "Pod":
            yield name, manifest["spec"]
        elif manifest["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield name, manifest["spec"]["template"]["spec"]


def containers(spec: Manifest) -> list[Manifest]:
    return [*spec.get("initContainers", []), *spec["containers"]]


@pytest.mark.parametrize("example", ["", *EXAMPLES])
def test_lint(example: str) -> None:
    values = ["--values", str(CHART / "examples" / f"{example}.yaml")] if example else []
    helm("lint", "--strict", str(CHART), *values)


@pytest.mark.parametrize(
    ("example", "version"),
    # The chart by itself for each Kubernetes, the examples for the newest.
    [*(("", version) for version in VERSIONS), *((name, VERSIONS[-1]) for name in EXAMPLES)],
)
def test_strictly_valid(example: str, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for manifest in rendered(example):
        if manifest["kind"] != "ServiceMonitor":  # the Prometheus operator's, not Kubernetes' own
            validator.validate(manifest, version, strict=True)


@pytest.mark.parametrize("example", ["laptop", "external"])
def test_as_the_golden_file_has_it(example: str) -> None:
    manifests = [dict(manifest) for manifest in rendered(example)]
    for manifest in manifests:
        if manifest["kind"] == "Secret":
            manifest["data"] = dict.fromkeys(manifest["data"], "(made once)")
    text = yaml.safe_dump_all(manifests, sort_keys=False, width=120)
    path = GOLDEN / f"{example}.yaml"
    if UPDATE:
        path.write_text(text)
    assert text == path.read_text(), "if this is meant: SAILYARD_UPDATE_GOLDEN=1 pytest tests/helm"


# --- what pods may do ----------------------------------------------------------------------------


@pytest.mark.parametrize("example", ["", *EXAMPLES])
def test_no_pod_runs_as_root_mounts_its_host_or_writes_to_its_image(example: str) -> None:
    for name, spec in pods(rendered(example)):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not any("hostPath" in volume for volume in spec.get("volumes", [])), name
        for container in containers(spec):
            held = container["securityContext"]
            assert held == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, f"{name}, {container['name']}"
            assert "memory" in container["resources"]["limits"], f"{name}, {container['name']}"
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])


def test_whoever_runs_for_long_says_how_it_is() -> None:
    for name, spec in pods(rendered()):
        if name.startswith(("Deployment", "StatefulSet")):
            for container in spec["containers"]:
                assert "livenessProbe" in container, name
                # What nobody sends requests to needs no readiness.
                assert "readinessProbe" in container or name.split("-", 2)[-1] in (
                    "dag-processor",
                    "triggerer",
                    "rollout",
                ), name


def granted(role: Manifest) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_every_right_is_one_that_code_names_and_uses() -> None:
    """Who uses each: tests/operators for the launcher's, tests/serving for the rollout's."""
    manifests = rendered()
    assert not of_kind(manifests, "ClusterRole")
    roles = of_kind(manifests, "Role")
    expected: dict[str, tuple[Right, ...]] = {
        "yard-sailyard-launcher": RIGHTS,
        "yard-sailyard-rollout": rollout.RIGHTS,
    }
    assert {name: granted(role) for name, role in roles.items()} == {
        name: {right[:3] for right in rights} for name, rights in expected.items()
    }
    all_asked = "launcher.jobSet=true,launcher.rayWorkers=4,launcher.queue=research"
    most = of_kind(rendered("", "--set", all_asked), "Role")["yard-sailyard-launcher"]
    assert granted(most) == {
        right[:3] for right in (*RIGHTS, *JOBSET_RIGHTS, *RAYJOB_RIGHTS, *QUEUE_RIGHTS)
    }
    (on_deployments,) = [
        rule for rule in roles["yard-sailyard-rollout"]["rules"] if rule["apiGroups"] == ["apps"]
    ]
    assert on_deployments["resourceNames"] == ["yard-sailyard-endpoint"]


def test_only_who_has_rights_has_a_token() -> None:
    bound = {
        subject["name"]
        for binding in of_kind(rendered(), "RoleBinding").values()
        for subject in binding["subjects"]
    }
    for account in of_kind(rendered(), "ServiceAccount").values():
        assert account["automountServiceAccountToken"] is False
    for name, spec in pods(rendered()):
        assert spec["automountServiceAccountToken"] is (spec.get("serviceAccountName") in bound), (
            name
        )


def test_every_pod_is_behind_a_network_policy() -> None:
    selectors = [
        policy["spec"]["podSelector"]["matchLabels"]
        for policy in of_kind(rendered(), "NetworkPolicy").values()
    ]
    for manifest in rendered():
        if manifest["kind"] in ("Deployment", "StatefulSet", "Job"):
            labels = manifest["spec"]["template"]["metadata"]["labels"]
            assert any(wanted.items() <= labels.items() for wanted in selectors), manifest


# --- what pods are told --------------------------------------------------------------------------


def variables(example: str, suffix: str) -> dict[str, str]:
    data: dict[str, str] = of_kind(rendered(example), "ConfigMap")[f"yard-sailyard-{suffix}"][
        "data"
    ]
    return data


def test_the_launchers_variables_are_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    told = variables("multi-node-kueue", "launcher")
    fields = {f"SAILYARD_CLUSTER_{name.upper()}" for name in ClusterSettings.model_fields}
    assert fields - set(told) == {"SAILYARD_CLUSTER_CONTEXT"}, "the pod's own account is used"
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    settings = ClusterSettings()
    assert (settings.namespace, settings.nodes, settings.queue) == ("vlm", 8, "research")
    assert settings.node_selector == {"gpu": "h100"}
    assert settings.pull_secrets == ["registry"]
    assert settings.tolerations[0]["key"] == "nvidia.com/gpu"
    assert settings.deadline_seconds == 604800, "large numbers are not written as 6.048e+05"


def test_the_yards_variables_are_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables("external", "yard").items():
        if name != "SAILYARD_BOARD_URL":
            assert name.removeprefix("SAILYARD_").lower() in Settings.model_fields
            monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.s3_endpoint == "s3.eu-central-1.amazonaws.com"
    assert settings.s3_secure


def test_the_endpoints_variables_are_its_settings() -> None:
    deployments = of_kind(rendered("", "--set-string", "serving.env.MAX_BATCH=4"), "Deployment")
    (endpoint,) = deployments["yard-sailyard-endpoint"]["spec"]["template"]["spec"]["containers"]
    names = {v["name"].removeprefix("SAILYARD_SERVE_").lower() for v in endpoint["env"]}
    assert names == {"alias", "dtype", "max_batch"}
    assert names <= set(ServingSettings.model_fields)
    assert endpoint["name"] == rollout.CONTAINER
    assert endpoint["ports"][0]["containerPort"] == rollout.PORT
    (moves,) = deployments["yard-sailyard-rollout"]["spec"]["template"]["spec"]["containers"]
    told = {v["name"]: v["value"] for v in moves["env"]}
    known = {f"SAILYARD_ROLLOUT_{name.upper()}" for name in rollout.RolloutSettings.model_fields}
    assert {name for name in told if "ROLLOUT" in name} == known


@pytest.mark.airflow
def test_airflows_variables_are_options_that_it_has() -> None:
    from airflow.configuration import conf

    told = variables("", "airflow")
    secret = of_kind(rendered(), "Secret")["yard-sailyard-airflow"]["data"]
    for name in [*told, *secret]:
        _, section, option = name.lower().split("__", 2)
        known = {key.lower() for key in conf.configuration_description[section]["options"]}
        simple = option.startswith("simple_auth_manager_")  # described by the manager itself
        assert option in known or simple, name


# --- secrets -------------------------------------------------------------------------------------


def test_secrets_are_made_and_fit_each_other() -> None:
    from cryptography.fernet import Fernet

    secrets = {
        name.removeprefix("yard-sailyard-"): {
            key: base64.b64decode(value).decode() for key, value in secret["data"].items()
        }
        for name, secret in of_kind(rendered(), "Secret").items()
    }
    password = secrets["postgresql"]["password"]
    assert (
        f":{password}@yard-sailyard-postgresql:5432/sailyard"
        in (secrets["yard"]["SAILYARD_DATABASE_URL"])
    )
    airflow = secrets["airflow"]
    assert airflow["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"].endswith(
        f":{password}@yard-sailyard-postgresql:5432/airflow"
    )
    Fernet(airflow["AIRFLOW__CORE__FERNET_KEY"])
    assert len(json.loads(secrets["airflow-login"]["passwords.json"])["admin"]) >= 24
    assert len({airflow[key] for key in airflow if "SECRET" in key or "FERNET" in key}) == 3
    for secret in of_kind(rendered(), "Secret").values():
        assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_given_secrets_are_used_and_none_is_made() -> None:
    manifests = rendered("external")
    assert not of_kind(manifests, "Secret")
    used = set(re.findall(r"sailyard-[a-z-]+-(?:keys|key|login)", json.dumps(manifests)))
    assert used == {
        "sailyard-yard-keys",
        "sailyard-airflow-keys",
        "sailyard-airflow-login",
        "sailyard-endpoint-key",
    }


# --- wrong values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("launcher.gpuPerNode=4", "gpuPerNode"),
        ("launcher.memory=lots", "/launcher/memory"),
        ("launcher.nodes=0", "/launcher/nodes"),
        ("serving.dtype=fp8", "/serving/dtype"),
        ("images.slim.digest=latest", "/images/slim/digest"),
        ("store.url=file:///data", "/store/url"),
        ("store.endpoint=https://s3.example", "/store/endpoint"),
        ("airflow.executor=CeleryExecutor", "executor"),
        ("postgresql.enabled=false", "existingSecrets.yard"),
        ("minio.enabled=false", "store.endpoint"),
    ],
)
def test_wrong_values_are_refused_by_name(flag: str, named: str) -> None:
    assert named in refused("--set", flag)


def test_airflow_without_its_database_is_refused_by_name() -> None:
    assert "existingSecrets.airflow" in refused(
        "--set", "postgresql.enabled=false", "--set", "existingSecrets.yard=keys"
    )


def test_no_value_is_dead() -> None:
    """Each value is read by a template."""
    templates = "".join(path.read_text() for path in CHART.rglob("templates/**/*.*"))

    def leaves(values: Manifest, path: str = "") -> Iterator[str]:
        for key, value in values.items():
            if isinstance(value, dict) and value and key != "resources":
                yield from leaves(value, f"{path}.{key}")
            else:
                yield f"{path}.{key}"

    for leaf in leaves(yaml.safe_load((CHART / "values.yaml").read_text())):
        name = leaf.rsplit(".", 1)[1]
        assert re.search(rf"\.{name}\b", templates), leaf


# --- examples ------------------------------------------------------------------------------------


def test_behind_an_air_gap_every_image_comes_from_inside() -> None:
    for name, spec in pods(rendered("air-gapped")):
        for container in containers(spec):
            assert container["image"].startswith("registry.inside.example/"), name
    assert variables("air-gapped", "launcher")["SAILYARD_CLUSTER_IMAGE"].startswith("registry.in")


def test_an_airflow_of_ones_own_gets_the_rights_and_no_pods() -> None:
    manifests = rendered("own-airflow")
    text = json.dumps([m for m in manifests if m["kind"] != "NetworkPolicy"])
    assert "api-server" not in text.replace("SAILYARD", "")
    (binding,) = [b for name, b in of_kind(manifests, "RoleBinding").items() if "launcher" in name]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "airflow-worker", "namespace": "airflow"}
    ]


def test_an_upgrade_leaves_the_served_version_and_the_autoscalers_count_alone() -> None:
    """Both belong to others: the chart must not say anything about them."""
    deployment = of_kind(rendered("multi-node-kueue"), "Deployment")["yard-sailyard-endpoint"]
    assert "replicas" not in deployment["spec"]
    assert rollout.VERSION_VARIABLE not in json.dumps(deployment)
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
