"""croissant.json: MLCommons' description of a dataset, version 1.0, from which mlcroissant loads its records.

`pack` writes it beside the tars, whoever takes images out of them writes it anew, and `publish` adds licence and date.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.types as types

from curate.store.files import json_bytes

CROISSANT = "croissant.json"

_CR = (
    "citeAs column equivalentProperty extract field fileProperty fileObject fileSet format includes isLiveDataset "
    "jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate separator source "
    "subField transform"
)
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{name: f"cr:{name}" for name in _CR.split()},
}
"""The context that the format's specification gives, so that readers need none of it from the web."""


def croissant(
    name: str,
    files: Mapping[str, Mapping[str, Any]],
    schema: pa.Schema,
    *,
    description: str,
    columns: Mapping[str, Mapping[str, Any]],
    license: str | None = None,
    published: str | None = None,
    image_kinds: Sequence[str] = (),
) -> dict[str, Any]:
    """The description of a dataset of parquet files and, where there are, tars beside them.

    files: name -> sha256 and bytes of each file, of which tars and parquet files are described; schema: of the parquet
    files; columns: what is recorded of those that annotators made; license: an SPDX name or a URL; published:
    YYYY-MM-DD; image_kinds: extensions of images in the tars.
    """
    meanings = {c: str(made.get("meaning") or c) for c, made in columns.items()}
    tables = sorted(f for f in files if f.endswith(".parquet"))
    tars = sorted(f for f in files if f.endswith(".tar"))
    distribution = [_file(f, files[f], "application/x-parquet") for f in tables]
    distribution += [_file(f, files[f], "application/x-tar") for f in tars]
    whole: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": description,
        **({"license": license} if license else {}),
        **({"datePublished": published} if published else {}),
        "distribution": distribution,
        "recordSet": [_rows("tables", schema, meanings)],
    }
    distribution.append(_file_set("tables", [], _beside(tables), "application/x-parquet"))
    for kind in image_kinds:
        distribution.append(_file_set(f"images-{kind}", tars, f"*.{kind}", _MIME.get(kind, f"image/{kind}")))
        whole["recordSet"].append(_samples(kind, "caption" in schema.names))
    return whole


def packed_croissant(
    facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]], schema: pa.Schema, kinds: Sequence[str]
) -> bytes:
    """croissant.json of packed shards. facts: of their manifest; the rest as of `croissant`."""
    rows = sum(facts["funnel"].values())
    description = f"{facts['count']:,} images from the web, chosen by rules from a list of {rows:,} rows."
    described = croissant(
        facts["name"], files, schema, description=description, columns=facts["columns"], image_kinds=kinds
    )
    return json_bytes(described)


_MIME = {"jpg": "image/jpeg"}


def _file(name: str, facts: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{facts['bytes']} B",
        "encodingFormat": kind,
        "sha256": facts["sha256"],
    }


def _beside(files: Sequence[str]) -> str:
    """The pattern of files that lie in one folder, below that of croissant.json or in it."""
    folder, _, name = files[0].rpartition("/")
    return f"{folder}/*.{name.rpartition('.')[2]}" if folder else f"*.{name.rpartition('.')[2]}"


def _file_set(name: str, inside: Sequence[str], pattern: str, kind: str) -> dict[str, Any]:
    """Files within archives, or beside croissant.json where `inside` is empty."""
    contained = [{"@id": file} for file in inside]
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        **({"containedIn": contained if len(contained) > 1 else contained[0]} if contained else {}),
        "encodingFormat": kind,
        "includes": pattern,
    }


def _rows(source: str, schema: pa.Schema, meanings: Mapping[str, str]) -> dict[str, Any]:
    """The record set `rows` of all tables as one: a record per row."""
    name = "rows"
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"{name}/{f.name}",
            "name": f"{name}/{f.name}",
            "description": meanings.get(f.name, f.name),
            "dataType": _data_type(f.type),
            "source": {"fileSet": {"@id": source}, "extract": {"column": f.name}},
        }
        for f in schema
        if not types.is_nested(f.type)
    ]
    key = {"key": {"@id": f"{name}/key"}} if "key" in schema.names else {}
    return {"@type": "cr:RecordSet", "@id": name, "name": name, **key, "field": fields}


def _samples(kind: str, captions: bool) -> dict[str, Any]:
    """The record set `samples-KIND`: an image, its key, and its caption where there are some."""
    name, source = f"samples-{kind}", {"fileSet": {"@id": f"images-{kind}"}}
    key = {
        "@type": "cr:Field",
        "@id": f"{name}/key",
        "name": f"{name}/key",
        "description": "its key, which is that of its row",
        "dataType": "sc:Text",
        "source": {
            **source,
            "extract": {"fileProperty": "filename"},
            "transform": {"regex": r"^(?:.*/)?([0-9]+)(?:\.[a-z0-9]+)?$"},
        },
        **({"references": {"field": {"@id": "rows/key"}}} if captions else {}),
    }
    image = {
        "@type": "cr:Field",
        "@id": f"{name}/image",
        "name": f"{name}/image",
        "description": "the image as it is stored",
        "dataType": "sc:ImageObject",
        "source": {**source, "extract": {"fileProperty": "content"}},
    }
    caption = {
        "@type": "cr:Field",
        "@id": f"{name}/caption",
        "name": f"{name}/caption",
        "description": "its caption, as the list has it",
        "dataType": "sc:Text",
        "source": {"field": {"@id": "rows/caption"}},
    }
    fields = [key, image, *([caption] if captions else [])]
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "field": fields}


def _data_type(kind: pa.DataType) -> str:
    if types.is_boolean(kind):
        return "sc:Boolean"
    if types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if types.is_floating(kind) else "sc:Text"
