"""The pod template of a TrainingJob: an allow-list, because the operator is stronger than whoever writes the job.

A field that is not here cannot be asked for: no host paths, host namespaces, privileges, foreign service accounts or
node names (threats T1–T7 in docs/security.md). What is here is passed to the pod as it stands.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from trireme_api.protocol import RESERVED_ENV, RESERVED_ENV_PREFIXES
from trireme_api.schema import PositiveInt, Spec

Quantity = str | int | float


class EnvSelector(Spec):
    name: str = Field(max_length=253)
    key: str = Field(max_length=253)
    optional: bool = False


class FieldSelector(Spec):
    field_path: str = Field(max_length=253)


class EnvSource(Spec):
    secret_key_ref: EnvSelector | None = None
    config_map_key_ref: EnvSelector | None = None
    field_ref: FieldSelector | None = None


class EnvVariable(Spec):
    name: str = Field(min_length=1, max_length=253, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    value: str | None = Field(default=None, max_length=32768)
    value_from: EnvSource | None = None

    @model_validator(mode="after")
    def _not_reserved(self) -> EnvVariable:
        if self.name in RESERVED_ENV or self.name.startswith(RESERVED_ENV_PREFIXES):
            raise ValueError(f"{self.name} is set by Trireme for each rank; remove it")
        return self


class Resources(Spec):
    requests: dict[str, Quantity] = Field(default_factory=dict, max_length=32)
    limits: dict[str, Quantity] = Field(default_factory=dict, max_length=32)


class ClaimVolume(Spec):
    claim_name: str = Field(min_length=1, max_length=253)
    read_only: bool = False


class EmptyDirVolume(Spec):
    medium: Literal["", "Memory"] = ""
    size_limit: Quantity | None = None


class KeyToPath(Spec):
    key: str
    path: str
    mode: int | None = None


class ConfigMapVolume(Spec):
    name: str = Field(min_length=1, max_length=253)
    items: list[KeyToPath] = Field(default_factory=list, max_length=64)
    default_mode: int | None = None
    optional: bool = False


class SecretVolume(Spec):
    secret_name: str = Field(min_length=1, max_length=253)
    items: list[KeyToPath] = Field(default_factory=list, max_length=64)
    default_mode: int | None = None
    optional: bool = False


class Volume(Spec):
    name: str = Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    persistent_volume_claim: ClaimVolume | None = None
    empty_dir: EmptyDirVolume | None = None
    config_map: ConfigMapVolume | None = None
    secret: SecretVolume | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Volume:
        sources = (self.persistent_volume_claim, self.empty_dir, self.config_map, self.secret)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("give exactly one of persistentVolumeClaim, emptyDir, configMap, secret")
        if self.name.startswith("trireme"):
            raise ValueError("names beginning with 'trireme' are taken; choose another")
        return self


class VolumeMount(Spec):
    name: str = Field(min_length=1, max_length=63)
    mount_path: str = Field(min_length=1, max_length=1024, pattern=r"^/")
    sub_path: str | None = Field(default=None, max_length=1024)
    read_only: bool = False

    @model_validator(mode="after")
    def _inside(self) -> VolumeMount:
        if self.sub_path is not None and (self.sub_path.startswith("/") or ".." in self.sub_path.split("/")):
            raise ValueError("subPath must be a relative path without '..'")
        return self


class Toleration(Spec):
    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None

    @model_validator(mode="after")
    def _not_everything(self) -> Toleration:
        if not self.key:
            raise ValueError("needs a key: tolerating every taint would place ranks on nodes that are being emptied")
        return self


class LocalReference(Spec):
    name: str = Field(min_length=1, max_length=253)


class PodTemplate(Spec):
    image: str | None = Field(default=None, max_length=1024)
    """Left out with a recipe: the operator's trainer image."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    image_pull_secrets: list[LocalReference] = Field(default_factory=list, max_length=16)
    command: list[str] = Field(default_factory=list, max_length=256)
    """Your own script, as an argument list; each rank runs it with the `torchrun` environment. Not with a recipe."""
    args: list[str] = Field(default_factory=list, max_length=256)
    working_dir: str | None = Field(default=None, max_length=1024)
    env: list[EnvVariable] = Field(default_factory=list, max_length=256)
    resources: Resources = Resources()
    volumes: list[Volume] = Field(default_factory=list, max_length=32)
    volume_mounts: list[VolumeMount] = Field(default_factory=list, max_length=64)
    shared_memory: Quantity | None = None
    """Size of /dev/shm (memory-backed); NCCL and data loaders want some."""
    node_selector: dict[str, str] = Field(default_factory=dict, max_length=32)
    tolerations: list[Toleration] = Field(default_factory=list, max_length=32)
    runtime_class_name: str | None = Field(default=None, max_length=253)
    run_as_user: PositiveInt | None = None
    """Default 65532; root is refused."""
    fs_group: PositiveInt | None = None
    labels: dict[str, str] = Field(default_factory=dict, max_length=32)
    annotations: dict[str, str] = Field(default_factory=dict, max_length=32)
    termination_grace_period_seconds: int = Field(default=60, ge=5, le=3600)
    """Ranks save and stop within this time when the pod is asked to leave."""

    @model_validator(mode="after")
    def _consistent(self) -> PodTemplate:
        for what, names in (("env", [e.name for e in self.env]), ("volumes", [v.name for v in self.volumes])):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{what} names {twice[0]!r} twice; keep one")
        known = {v.name for v in self.volumes}
        for mount in self.volume_mounts:
            if mount.name not in known:
                raise ValueError(f"volumeMounts names the volume {mount.name!r}, which is not in volumes")
        for what, keys in (("labels", self.labels), ("annotations", self.annotations)):
            for key in keys:
                domain = key.split("/")[0] if "/" in key else ""
                if domain.endswith(("kubernetes.io", "k8s.io", "trireme.dev")):
                    raise ValueError(f"{what} may not set {key!r}: the domain belongs to Kubernetes or to Trireme")
        return self


def as_plain(value: Any) -> Any:
    """The Kubernetes form of a template piece: camelCase, nothing that was left out."""
    return value.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)
