"""Validation against a CustomResourceDefinition, as strict as `kubectl apply --validate=strict`."""

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml


@cache
def validator(definition: Path, version: str) -> jsonschema.Draft202012Validator:
    """What checks custom resources of a version: unknown fields are errors, too."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte each
    versions = yaml.load(definition.read_text(), loader)["spec"]["versions"]
    (schema,) = [each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == version]
    return jsonschema.Draft202012Validator(_strict(schema, top=True))


def _strict(schema: dict[str, Any], *, top: bool = False) -> dict[str, Any]:
    """JSON Schema for what OpenAPI and Kubernetes' extensions to it mean.

    CEL rules (x-kubernetes-validations) aren't evaluated.
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
