"""The names, options, record fields and JSON layout that users rely on."""

import inspect
import json
from dataclasses import MISSING, fields

import pytest
from programs import abg, captured

import fusionpass
from fusionpass.options import Options
from fusionpass.report.records import Miss, Rewrite

PUBLIC = {"NothingRewritten", "Report", "Rewritten", "VerificationFailed", "__version__", "collect", "explain", "fuse"}
PUBLIC |= {"ops", "rewrite"}


def test_public_names():
    assert set(fusionpass.__all__) == PUBLIC
    assert all(hasattr(fusionpass, name) for name in PUBLIC)


SIGNATURES = {
    "fuse": ["target", "inner", "options"],
    "rewrite": ["graph", "example_inputs", "options"],
    "explain": ["model", "options"],
    "collect": [],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert list(inspect.signature(getattr(fusionpass, name)).parameters) == SIGNATURES[name]


def test_options():
    assert {f.name: f.default for f in fields(Options)} == {
        "inner": "eager",
        "rules": None,
        "numerics": "fp32",
        "profitable_only": True,
        "strict": False,
        "verify": False,
        "mode": None,
        "inductor": MISSING,
    }


def test_records_and_json():
    a, b, gate = abg()
    report = captured(lambda a, b, g: (a + g.sigmoid() * b) + 2 * b.sigmoid() * a, a, b, gate)
    wanted = {
        Rewrite: "rule stages nodes replacement module source shape dtype kernels_before kernels_after bytes_before "
        "bytes_after graph calls stopped against",
        Miss: "node rule code reason module source graph",
    }
    for record, names in wanted.items():
        assert set(names.split()) <= {f.name for f in fields(record)}
    data = json.loads(report.to_json())
    assert list(data) == ["fusionpass", "torch", "target", "graphs", "graph_breaks", "rewrites", "misses"]
    assert len(data["rewrites"]) == len(data["misses"]) == len(data["graphs"]) == 1
    assert data["rewrites"][0]["replacement"] == report.rewrites[0].replacement
    assert data["misses"][0]["code"] == "scaled"
    for text in (str(report), report.to_markdown(), report.to_html()):
        assert "scaled" in text and "gated_add" in text
