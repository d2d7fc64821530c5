"""Manifests against the schemas of Kubernetes and of KubeRay's operator, and what no schema knows of."""

import copy
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

INFRA = Path(__file__).parents[2] / "infra"
FOLDER = INFRA / "kubernetes"
# Of Kubernetes; `strict` refuses unknown fields, as kubectl does.
VERSION = "1.35"
KUBERAY = jsonschema.Draft202012Validator(yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text()))


def documents(file: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / file).read_text()))


def manifest(file: str) -> dict:
    [found] = documents(file)
    return found


def cluster_specs() -> dict[str, dict]:
    return {
        "RayCluster": manifest("raycluster.yaml")["spec"],
        "RayJob": manifest("job/rayjob.yaml")["spec"]["rayClusterSpec"],
    }


def templates(spec: dict) -> dict[str, dict]:
    groups = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"], **groups}


def check_pod(template: dict) -> None:
    # The schema of a pod's template, by the object that is made of nothing else.
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "one"}, "template": template},
        VERSION,
        strict=True,
    )


@pytest.mark.parametrize("file", ["raycluster.yaml", "job/rayjob.yaml"])
def test_the_operator_takes_the_manifest(file):
    content = manifest(file)
    KUBERAY.validate(content)
    for part in ("name", "labels"):
        assert content["metadata"][part]


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kubernetes_takes_every_pod(kind):
    for template in templates(cluster_specs()[kind]).values():
        check_pod(template)
    check_pod(manifest("job/rayjob.yaml")["spec"]["submitterPodTemplate"])


def test_kubernetes_takes_the_base():
    kinds = []
    for content in documents("base.yaml"):
        kubernetes_validate.validate(content, VERSION, strict=True)
        kinds.append(content["kind"])
    assert kinds == ["ConfigMap", "ServiceAccount", "NetworkPolicy"]


def test_the_schemas_refuse_what_is_wrong():
    content = manifest("raycluster.yaml")
    for path, value in [
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "8"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "autoscaler"), {}),
        (("spec", "authOptions", "mode"), "password"),
    ]:
        wrong = copy.deepcopy(content)
        place = wrong
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            KUBERAY.validate(wrong)
    template = copy.deepcopy(content["spec"]["headGroupSpec"]["template"])
    template["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(template)


def test_a_job_brings_the_same_cluster():
    specs = cluster_specs()
    assert specs["RayJob"] == specs["RayCluster"]


def test_a_job_goes_away_and_tries_again():
    spec = manifest("job/rayjob.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] > 0


@pytest.mark.parametrize("name", ["head", "cpu", "gpu"])
def test_a_pod_has_room_for_the_object_store(name):
    spec = cluster_specs()["RayCluster"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    group = spec["headGroupSpec"] if name == "head" else groups[name]
    pod = group["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    memory = size_bytes(container["resources"]["limits"]["memory"])
    [shared] = [size_bytes(one["emptyDir"]["sizeLimit"]) for one in pod["volumes"] if one["name"] == "shared-memory"]
    store = int(group["rayStartParams"]["object-store-memory"])
    # Ray's own overhead; and at least half of the pod's memory for the processes.
    assert store * 1.05 < shared
    assert shared < memory / 2
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]


def size_bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti)", text).groups()
    return int(number) * 1024 ** ("KiMiGiTi".index(unit) // 2 + 1)


def test_gpus_are_kept_for_those_who_ask():
    [gpu] = [group for group in cluster_specs()["RayCluster"]["workerGroupSpecs"] if group["groupName"] == "gpu"]
    pod = gpu["template"]["spec"]
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert gpu["minReplicas"] == 0


def test_secrets_are_named_and_not_told():
    for kind, spec in cluster_specs().items():
        assert spec["authOptions"] == {"mode": "token", "secretName": "meteor-ray"}, kind
        for template in templates(spec).values():
            [container] = template["spec"]["containers"]
            assert {"secretRef": {"name": "meteor-object-store", "optional": True}} in container["envFrom"]
            assert "env" not in container
    [settings] = [one["data"] for one in documents("base.yaml") if one["kind"] == "ConfigMap"]
    assert not [name for name in settings if re.search("SECRET|PASSWORD|TOKEN|ACCESS_KEY", name)]


def test_images_are_pinned_by_digest():
    pinned = {image["name"]: image["digest"] for image in manifest("kustomization.yaml")["images"]}
    used = {
        container["image"]
        for template in templates(cluster_specs()["RayCluster"]).values()
        for container in template["spec"]["containers"]
    }
    assert used == set(pinned)
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in pinned.values())
