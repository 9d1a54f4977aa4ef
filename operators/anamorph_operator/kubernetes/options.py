"""What the operator is started with: one file, which the chart writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from anamorph.errors import SetupError
from anamorph_operator.kubernetes.build.materialization import Materializer
from anamorph_operator.kubernetes.build.ray_group import Compute
from anamorph_operator.kubernetes.resources.serving_cluster import Storage

Section = TypeVar("Section")


class Options(BaseModel):
    """All that is not in a resource.

    Args:
        namespace: the operator's own, of its Lease.
        jobs_namespace: of materialisation jobs.
        compute_namespace: of serving clusters.
        keysvc: URL of the key service.
        keysvc_token_file: the operator's projected token with the key service's audience.
        audience: of the tokens that the key service takes; the jobs get one too.
        ca_file: certificate that signs the key service's and Serve's; the machine's authorities if absent.
        ray_tokens: folder that holds each cluster's ``tokenSecret``, mounted under its name.
        allow_base: where bases may come from: ``s3://bucket/prefix``, ``hf://org/``, a folder.
        interval_s: seconds between two looks where nothing happens.
        parallel_jobs: materialisations at a time, for each serving cluster.
        otlp_endpoint: collector of the engines and of the operator.
        port: of ``/livez`` and ``/metrics``.
        compute: fields of ``Compute`` but its namespace.
        materializer: fields of ``Materializer`` but those that stand above, and the storage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespace: str
    jobs_namespace: str
    compute_namespace: str
    keysvc: str
    keysvc_token_file: Path
    audience: str = "anamorph-keysvc"
    ca_file: Path | None = None
    ray_tokens: Path
    allow_base: tuple[str, ...] = ()
    interval_s: float = Field(default=2, gt=0)
    parallel_jobs: int = Field(default=1, ge=1)
    otlp_endpoint: str | None = None
    port: int = Field(default=8080, ge=1, le=65535)
    compute: dict[str, Any] = {}
    materializer: dict[str, Any] = {}


@dataclass(frozen=True)
class Site:
    """The options with their sections as the builders take them."""

    options: Options
    compute: Compute

    def materializer(self, storage: Storage) -> Materializer:
        """For the jobs of a cluster with this storage.

        Raises:
            SetupError: the section ``materializer`` is malformed.
        """
        options = self.options
        ours = {
            "namespace": options.jobs_namespace,
            "keysvc": options.keysvc,
            "audience": options.audience,
            "allow_base": options.allow_base,
            "storage": storage,
        }
        return _section(Materializer, "materializer", options.materializer, ours)


def read_options(file: Path) -> Site:
    """Read the file, YAML or JSON.

    Raises:
        SetupError: it cannot be read; the message names the fields that are wrong.
    """
    try:
        options = Options.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SetupError(f"cannot read {file}: {type(error).__name__}") from None
    except ValidationError as error:
        raise SetupError(f"{file}: {_wrong(error)}") from None
    compute = _section(Compute, "compute", options.compute, {"namespace": options.compute_namespace})
    site = Site(options, compute)
    site.materializer(Storage(uri="/any"))
    return site


def _section(kind: type[Section], name: str, given: Mapping[str, Any], ours: Mapping[str, Any]) -> Section:
    known = {field.name for field in fields(kind)} - ours.keys()  # type: ignore[arg-type]
    unknown = given.keys() - known
    if unknown:
        raise SetupError(
            f"{name}: there is no {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}"
        )
    try:
        return TypeAdapter(kind).validate_python({**given, **ours})
    except ValidationError as error:
        raise SetupError(f"{name}: {_wrong(error)}") from None


def _wrong(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
