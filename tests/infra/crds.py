"""Validation against CustomResourceDefinitions, as strict as `kubectl apply --validate=strict`."""

from functools import cache
from typing import Any

import jsonschema
import pytest
import yaml

from tests.infra.manifests import ROOT

KUBERAY_CRDS = ROOT.parent / "shared/kuberay"


@cache
def definition(kind: str) -> dict[str, Any]:
    """KubeRay's definition of a kind in API version v1."""
    path = KUBERAY_CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's definitions are not at {KUBERAY_CRDS}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte each
    versions = yaml.load(path.read_text(), loader)["spec"]["versions"]
    (found,) = [version for version in versions if version["name"] == "v1"]
    return found


@cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    """A validator for custom resources of a kind; unknown fields are errors."""
    schema = definition(kind)["schema"]["openAPIV3Schema"]
    return jsonschema.Draft202012Validator(_strict(schema, top=True))


def _strict(schema: dict[str, Any], *, top: bool = False) -> dict[str, Any]:
    """Translate OpenAPI with Kubernetes' extensions to JSON Schema.

    CEL rules (x-kubernetes-validations) are not evaluated.
    """
    strict = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        strict["type"] = ["integer", "string"]
    if "properties" in schema:
        strict["properties"] = {name: _strict(each) for name, each in schema["properties"].items()}
        if top:
            strict["properties"]["metadata"] = {"type": "object"}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict):
            strict[keyword] = _strict(schema[keyword])
    return strict
