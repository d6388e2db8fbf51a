"""What demo and end-to-end tests do on a cluster of the user's own: images, claims, and where the data lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from demo import claims, delivery
from demo.images import IMAGES, Built, with_built_images
from demo.kube import ROOT
from demo.report import DemoError
from demo.storage import CLAIMS, Folder, InPod

HUB = {"TRIREME_REGISTRY": "registry.example/team/"}
THERE = {"TRIREME_IMAGES": "preloaded"}


@pytest.mark.parametrize(
    ("kind", "environment", "expected"),
    [
        ("builtin", {}, ("import", "localhost/trireme", "Never")),
        ("kind", {**HUB, **THERE}, ("import", "localhost/trireme", "Never")),
        ("existing", HUB, ("push", "registry.example/team", "IfNotPresent")),
        ("existing", THERE, ("preloaded", "localhost/trireme", "Never")),
        ("existing", {**HUB, **THERE}, ("preloaded", "registry.example/team", "IfNotPresent")),
    ],
)
def test_how_images_come_to_the_nodes(kind: str, environment: dict[str, str], expected: tuple[str, str, str]) -> None:
    chosen = delivery.choose(kind, environment)
    assert (chosen.how, chosen.prefix, chosen.pull_policy) == expected


def test_a_cluster_of_ones_own_without_a_word_about_images_is_told_both_settings() -> None:
    with pytest.raises(DemoError) as caught:
        delivery.choose("existing", {})
    assert "TRIREME_REGISTRY=" in str(caught.value)
    assert "TRIREME_IMAGES=preloaded" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "environment",
    [{"TRIREME_IMAGES": "yes"}, {"TRIREME_REGISTRY": "https://registry.example"}, {"TRIREME_REGISTRY": "a b"}],
)
def test_a_setting_that_makes_no_sense_is_refused(environment: dict[str, str]) -> None:
    (name,) = environment
    with pytest.raises(DemoError, match=name):
        delivery.choose("existing", environment)


def test_manifests_name_the_images_of_the_registry_and_let_them_be_pulled() -> None:
    folder = ROOT / "manifests" / "overlays" / "local"
    built = [Built(image, "k1", "registry.example/team") for image in IMAGES]
    rendered = with_built_images((folder / "deployment.yaml").read_text(), built, "IfNotPresent")
    (container,) = yaml.safe_load(rendered)["spec"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert container["image"] == "registry.example/team/operator:k1"
    assert container["imagePullPolicy"] == env["TRIREME_IMAGE_PULL_POLICY"] == "IfNotPresent"
    assert env["TRIREME_TRAINER_IMAGE"] == "registry.example/team/trainer:k1"
    assert env["TRIREME_AGENT_IMAGE"] == "registry.example/team/agent:k1"


def a_class(name: str, **marks: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "annotations": marks}}


def test_the_storage_class_is_the_default_or_the_one_asked_for() -> None:
    plain = a_class("slow")
    default = {"metadata": {"name": "fast", "annotations": {claims.DEFAULT_MARKS[0]: "true"}}}
    assert claims.storage_class([plain, default], "") == ""
    assert claims.storage_class([plain, default], "slow") == "slow"
    with pytest.raises(DemoError, match=r"TRIREME_STORAGE_CLASS=other.*fast, slow"):
        claims.storage_class([plain, default], "other")
    with pytest.raises(DemoError, match=r"no default storage class.*TRIREME_STORAGE_CLASS.*slow"):
        claims.storage_class([plain], "")
    with pytest.raises(DemoError, match="none at all"):
        claims.storage_class([], "")
    assert "storageClassName" not in claims.claim("corpus", claims.MANY, "", "1Gi")["spec"]
    assert claims.claim("corpus", claims.ONCE, "slow", "1Gi")["spec"]["storageClassName"] == "slow"


def test_a_refused_volume_is_told_from_one_that_takes_time() -> None:
    pending = {"metadata": {"uid": "u1"}, "status": {"phase": "Pending"}}
    bound = {"metadata": {"uid": "u2"}, "status": {"phase": "Bound"}}
    failed = {"reason": "ProvisioningFailed", "message": "only ReadWriteOnce", "involvedObject": {"uid": "u1"}}
    waits = {"reason": "WaitForFirstConsumer", "message": "waits", "involvedObject": {"uid": "u1"}}
    of_another = {**failed, "involvedObject": {"uid": "u2"}}
    assert claims.refusal({}, [pending, bound], [waits, failed]) == "only ReadWriteOnce"
    assert claims.refusal({}, [pending, bound], [waits, of_another]) == ""
    no_volume = "0/3 nodes are available: 3 node(s) didn't find available persistent volumes to bind."
    condition = {"type": "PodScheduled", "status": "False", "message": no_volume}
    assert claims.refusal({"status": {"conditions": [condition]}}, [pending], []) == no_volume
    condition["message"] = "pod has unbound immediate PersistentVolumeClaims"
    assert claims.refusal({"status": {"conditions": [condition]}}, [pending], []) == ""


def test_an_image_that_no_node_has_is_named() -> None:
    waiting = {"reason": "ErrImageNeverPull", "message": "Container image x:1 is not present"}
    pod = {"status": {"containerStatuses": [{"state": {"waiting": waiting}}]}}
    assert "x:1" in claims.image_trouble(pod)
    assert claims.image_trouble({"status": {"containerStatuses": [{"state": {"running": {}}}]}}) == ""


def test_the_helper_mounts_every_claim_where_training_pods_do_and_is_restricted() -> None:
    spec = claims.helper("trainer:1", "Never")["spec"]
    (container,) = spec["containers"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {f"/mnt/pvc/{name}" for name in CLAIMS}
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not container["securityContext"]["allowPrivilegeEscalation"]


class Local:
    """Stands in for kubectl: what would run in the pod runs here, with the claims in a folder of this machine."""

    namespace = "n"

    def __init__(self, folder: Path, failures: int = 0) -> None:
        self.folder, self.failures = folder, failures

    def exec(self, pod: str, *command: str, source: Any = None, timeout: float = 60) -> str:
        import subprocess

        if self.failures:
            self.failures -= 1
            if source is not None:
                source.read()
            raise DemoError("connection reset")
        words = [word.replace("/mnt/pvc", str(self.folder)) for word in command]
        done = subprocess.run(words, stdin=source, capture_output=True, text=True, check=True)
        return done.stdout


@pytest.fixture(params=["folder", "pod", "pod behind a bad connection"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder | InPod:
    for name in CLAIMS:
        (tmp_path / "claims" / name).mkdir(parents=True)
    if request.param == "folder":
        return Folder({name: tmp_path / "claims" / name for name in CLAIMS})
    monkeypatch.setattr("demo.storage.time.sleep", lambda seconds: None)
    bad = request.param != "pod"
    return InPod(Local(tmp_path / "claims", failures=2 if bad else 0), "helper")  # type: ignore[arg-type]


def test_storage_gives_back_what_was_put(storage: Folder | InPod, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "bytes").write_bytes(bytes(range(256)) * 500)
    (source / "manifest.json").write_text('{"a": "Größe"}')
    (source / "manifest.json").chmod(0o600)
    storage.put(source, "corpus/debian")
    assert storage.text("corpus/debian/manifest.json") == '{"a": "Größe"}'
    placed = tmp_path / "claims" / "corpus" / "debian"
    assert (placed / "inner" / "bytes").read_bytes() == bytes(range(256)) * 500
    assert (placed / "manifest.json").stat().st_mode & 0o777 == 0o644

    (source / "inner" / "bytes").unlink()
    storage.put(source, "corpus/debian")
    assert not (placed / "inner" / "bytes").exists(), "putting replaces, it does not mix"
    assert not placed.with_name("debian.new").exists()

    assert storage.text("checkpoints/job/metrics.jsonl") == ""
    storage.remove("checkpoints/job")
    storage.remove("corpus/debian")
    assert storage.text("corpus/debian/manifest.json") == ""
    assert not placed.exists()
    assert "checkpoints verify" in storage.verify("checkpoints/job")


def test_a_connection_that_stays_bad_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.storage.time.sleep", lambda seconds: None)
    with pytest.raises(DemoError, match="connection reset"):
        InPod(Local(tmp_path, failures=9), "helper").text("corpus/x")  # type: ignore[arg-type]
