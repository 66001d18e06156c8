"""The form of `adapter.json`, format 1, and reading JSON from strangers: bounded in bytes, depth and shape."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

from jsonschema import Draft202012Validator

from ..errors import BadAdapter

FORMAT = 1
MAX_JSON_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000
MAX_SITES = 2048

_NAME = {"type": "string", "pattern": r"^[A-Za-z0-9_][A-Za-z0-9_ ./+:-]{0,199}$"}
_CLASS = {"type": "string", "minLength": 1, "maxLength": 200}
_SHA = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_NUMBER_3 = {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 4}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = required | (optional or {})
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_PICTURE = _object(
    {"size": {"type": "integer", "minimum": 1, "maximum": 16384}, "mean": _NUMBER_3, "std": _NUMBER_3},
    {"crop": {"const": True}, "fit": {"const": "pad"}},
)
_SIDES = {"type": "array", "minItems": 3, "maxItems": 3}
_VOLUME = _object(
    {
        "dims": {"const": 3},
        "patch": _SIDES | {"items": {"type": "integer", "minimum": 1, "maximum": 1024}},
        "mean": _NUMBER_3,
        "std": _NUMBER_3,
        "intensity": {
            "type": "array",
            "prefixItems": [{"enum": ["window", "percentiles", "zscore"]}, {"type": "number"}, {"type": "number"}],
            "minItems": 3,
            "maxItems": 3,
        },
        "axcodes": {"type": "string", "pattern": "^[LRPAIS]{3}$"},
        "spacing": {
            "anyOf": [{"type": "null"}, _SIDES | {"items": {"type": "number", "minimum": 1e-3, "maximum": 1e3}}]
        },
        "overlap": {"type": "number", "minimum": 0, "maximum": 0.95},
        "largest": {"type": "boolean"},
    }
)

SCHEMA: dict[str, Any] = _object(
    {
        "format": {"const": FORMAT},
        "kind": {"const": "adapter"},
        "backbone": _object(
            {
                "family": _NAME,
                "id": {"type": "string", "minLength": 1, "maxLength": 300},
                "fingerprint": _SHA,
                "random": {"type": "boolean"},
                "commit": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[0-9a-f]{7,64}$"}]},
            }
        ),
        "task": _object(
            {
                "kind": {"enum": ["segment", "classify"]},
                "classes": {"type": "array", "items": _CLASS, "minItems": 1, "maxItems": 1000},
                "values": {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 1, "maximum": 1000},
                    "maxItems": 1000,
                },
            }
        ),
        "preprocessing": {"if": {"required": ["dims"]}, "then": _VOLUME, "else": _PICTURE},
        "parts": {
            "type": "array",
            "minItems": 1,
            "maxItems": 64,
            "items": _object(
                {
                    "name": {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]{0,63}$"},
                    "kind": {"type": "string", "pattern": "^[a-z][a-z0-9_]{0,63}$"},
                    "config": {"type": "object", "maxProperties": 64},
                    "sites": {
                        "type": "object",
                        "maxProperties": 10000,
                        "additionalProperties": {
                            "type": "array",
                            "items": {"type": "integer", "minimum": 1, "maximum": 1 << 20},
                            "minItems": 2,
                            "maxItems": 2,
                        },
                    },
                }
            ),
        },
        "dtype": {"enum": ["float16", "bfloat16", "float32"]},
        "tensors": _object({"sha256": _SHA, "bytes": {"type": "integer", "minimum": 1, "maximum": 1 << 34}}),
        "provenance": {"type": "object", "maxProperties": 64},
        "evaluation": {"type": "array", "maxItems": 256, "items": {"type": "object", "maxProperties": 32}},
        "probe": {
            "anyOf": [
                {"type": "null"},
                _object(
                    {
                        "seed": {"type": "integer", "minimum": 0},
                        "size": {"type": "integer", "minimum": 1, "maximum": 16384},
                        "expected": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 1024},
                        "tolerance": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                    }
                ),
            ]
        },
        "sha256": _SHA,
    }
)

_VALIDATOR = Draft202012Validator(SCHEMA)


def parse_json(data: bytes, what: str) -> Any:
    """Parse untrusted JSON. Raises BadAdapter for anything but UTF-8 JSON of at most 1 MiB, 20,000 values and 32 levels, without NaN."""
    if len(data) > MAX_JSON_BYTES:
        raise BadAdapter(
            f"{what} is {len(data):,} bytes; at most {MAX_JSON_BYTES:,} are read. It is not an adapter's description"
        )
    if _depth(data) > MAX_DEPTH:
        raise BadAdapter(f"{what} is nested deeper than {MAX_DEPTH} levels and is refused")
    if data.count(b",") > MAX_VALUES:
        raise BadAdapter(
            f"{what} holds more than {MAX_VALUES:,} values and is refused; it is not an adapter's description"
        )
    try:
        return json.loads(data.decode(), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as broken:
        raise BadAdapter(f"{what} is not valid JSON ({broken}); fetch the adapter again") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON allows")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _depth(data: bytes) -> int:
    """The deepest nesting of brackets outside strings."""
    deepest = level = 0
    # Possessive, and a string may end with the data: linear in its length, whatever a stranger writes.
    for token in re.finditer(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', data, re.DOTALL):
        first = token.group()[0]
        if first in b"[{":
            level += 1
            deepest = max(deepest, level)
        elif first in b"]}":
            level -= 1
    return deepest


def canonical(record: dict[str, Any]) -> str:
    """sha256, in hex, of the record's canonical JSON form without its own `sha256` entry."""
    body = {k: v for k, v in record.items() if k != "sha256"}
    return hashlib.sha256(
        json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
    ).hexdigest()


def validate(record: Any, what: str) -> dict[str, Any]:
    """Check a parsed record against format 1 and its own hash. Raises BadAdapter naming the first entry that is wrong."""
    if isinstance(record, dict) and record.get("kind") == "network":
        raise BadAdapter(
            f"{what} describes a whole network, not an adapter; load it as a backbone by @PATH, evaluate and predict read it as it is"
        )
    if isinstance(record, dict) and isinstance(record.get("format"), int) and record["format"] != FORMAT:
        raise BadAdapter(
            f"{what} is of format {record['format']}, this medgraft reads format {FORMAT}; {'upgrade medgraft' if record['format'] > FORMAT else 'save it again with its own version'}"
        )
    error = next(_VALIDATOR.iter_errors(record), None)  # lazily: a stranger may have made a million errors
    if error is not None:
        where = "/".join(map(str, error.path)) or "the top level"
        raise BadAdapter(f"{what} does not follow format {FORMAT}: at {where}: {error.message[:200]}")
    sites = sum(len(part["sites"]) for part in record["parts"])
    if sites > MAX_SITES:
        raise BadAdapter(f"{what} names {sites:,} sites; adapters of at most {MAX_SITES:,} are read")
    if canonical(record) != record["sha256"]:
        raise BadAdapter(
            f"{what} was changed after it was written (its own sha256 does not match); fetch the adapter again"
        )
    return record
