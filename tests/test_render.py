"""Reports made by hand, rendered as table, Markdown, HTML and one-line summary."""

import pytest

from fusionpass.report import Report, render, wording
from fusionpass.report.records import GraphBreak, GraphRecord, Miss, Rewrite


def rewrite(layer=0, *, module="model.layers.{}.mlp", calls=1, graph=0, size=64, **changes):
    tail = f"_{layer}" if layer else ""
    fields = {
        "rule": "gated_add",
        "stages": ["gate_projection", "gated_add"],
        "nodes": [f"linear_{8 * layer + 3}", f"sigmoid{tail}", f"mul{tail}", f"add{tail}"],
        "replacement": f"gate_projected_add{tail}",
        "module": module.format(layer),
        "source": "modeling_qwen3_next.py:866",
        "shape": [16, size],
        "dtype": "bfloat16",
        "kernels_before": 4,
        "kernels_after": 1,
        "bytes_before": 4000,
        "bytes_after": 1000,
        "graph": graph,
        "calls": calls,
    }
    return Rewrite(**{**fields, **changes})


def miss(layer=0, *, code="multi-use", reason=None, **changes):
    fields = {
        "node": f"add_{layer}",
        "rule": "gated_add",
        "code": code,
        "reason": reason or f"the product mul_{layer} has 2 users",
        "module": f"model.layers.{layer}.mlp",
        "source": "other.py:88",
        "graph": 0,
        "calls": 1,
    }
    return Miss(**{**fields, **changes})


def report(rewrites=(), misses=(), graph_breaks=(), graphs=1, compiled=True):
    records = [GraphRecord(index, 100, 0, 0, calls=1, compiled=compiled) for index in range(graphs)]
    return Report("demo", list(rewrites), list(misses), records, list(graph_breaks))


FULL = report([rewrite(layer) for layer in range(48)])

RANGES = {
    "one": (["a.3.b"], ["a.3.b"]),
    "two": (["a.0.b", "a.1.b"], ["a.{0,1}.b"]),
    "all layers": ([f"model.layers.{n}.mlp" for n in range(48)], ["model.layers.{0..47}.mlp"]),
    "every fourth": ([f"l.{n}" for n in range(3, 48, 4)], ["l.{3..47..4}"]),
    "gaps": ([f"l.{n}" for n in (0, 1, 2, 5, 9, 10, 11)], ["l.{0..2,5,9..11}"]),
    "unordered, twice": (["l.2", "l.0", "l.1", "l.1"], ["l.{0..2}"]),
    "two numbers": (["s.0.l.0", "s.0.l.1", "s.1.l.0"], ["s.0.l.{0,1}", "s.1.l.0"]),
    "first number": (["s.0.l.7", "s.1.l.7"], ["s.{0,1}.l.7"]),
    "other names": (["enc.0", "dec.0", "dec.1"], ["enc.0", "dec.{0,1}"]),
    "no number": (["mlp", "-"], ["mlp", "-"]),
    "none": ([], []),
}


@pytest.mark.parametrize("paths, expected", RANGES.values(), ids=RANGES)
def test_ranges(paths, expected):
    assert wording.ranges(paths) == expected


def test_48_like_layers_are_one_line_that_names_every_module():
    text = render.table(FULL)
    lines = [line for line in text.splitlines() if "modeling_qwen3_next.py:866" in line]
    assert len(lines) == 1
    assert lines[0].split()[:2] == ["modeling_qwen3_next.py:866", "48"]  # location first
    assert "model.layers.{0..47}.mlp" in lines[0]
    assert "linear*, sigmoid*, mul*" in text
    assert text.splitlines()[-1] == (
        "48 rewritten (48 with gate_projection), 0 near misses, 1 graph, 0 graph breaks; "
        "kernels 192 -> 48 against eager, bytes 192 kB -> 48 kB per call"
    )


def test_few_sites_keep_their_exact_names():
    text = render.table(report([rewrite(0), rewrite(1)]))
    for exact in ("linear_3,", "linear_11,", "model.layers.0.mlp", "model.layers.1.mlp"):
        assert exact in text
    assert "*" not in text


def test_unlike_sites_are_not_folded():
    sites = [rewrite(n, size=64 if n < 4 else 128) for n in range(8)]
    text = render.table(report(sites))
    assert "model.layers.{0..3}.mlp" in text and "model.layers.{4..7}.mlp" in text


def test_table_fits_a_terminal_and_is_ascii():
    long = report(
        [rewrite(n, source="modeling_qwen3_omni_moe.py:2900", stages=["finalize", "gated_add"]) for n in range(20)],
        [miss(n, reason="w " * 100) for n in range(3)],
        [GraphBreak("Dynamic shape operator " * 10, "modeling_qwen2_moe.py:293")],
    )
    rows = render.table(long).splitlines()
    assert max(len(row) for row in rows if not row.startswith("    w ") and "rewritten (" not in row) <= 120
    assert render.table(long).isascii()


def test_every_format_names_every_site():
    for text in (render.markdown(FULL), render.html(FULL)):
        for layer in range(48):
            assert f"model.layers.{layer}.mlp" in text
            assert f"linear_{8 * layer + 3}," in text


def test_sites_that_run_more_often_than_they_were_captured():
    shared = report([rewrite(calls=12)])
    assert "1 site captured, runs 12 times" in render.summary(shared)
    assert "kernels 48 -> 12 against eager, bytes 48 kB -> 12 kB over 12 runs" in render.summary(shared)
    header = [line.split() for line in render.table(shared).splitlines() if line.startswith("source")]
    assert header == [["source", "sites", "runs", "rewrote", "module", "rule"]]


def test_a_graph_given_to_rewrite_counts_once():
    given = report([rewrite(calls=0)], compiled=False)
    assert "captured" not in render.summary(given)
    assert "kernels 4 -> 1" in render.summary(given)


def test_unknown_bytes_are_said_to_be_unknown():
    unknown = report([rewrite(), rewrite(1, bytes_before=None, bytes_after=None)])
    assert "kernels 8 -> 2 against eager, bytes unknown" in render.summary(unknown)
    assert "? -> ?" in render.markdown(unknown)


def test_misses_are_grouped_by_code_with_the_sentence():
    text = render.table(report([], [*(miss(n) for n in range(6)), miss(9, code="cast-between", reason="cast to_1")]))
    assert "[gated_add / multi-use] 6 sites" in text
    assert "the product mul* has 2 users" in text
    assert "model.layers.{0..5}.mlp" in text
    assert "[gated_add / cast-between] 1 site\n    cast to_1\n" in text
    assert text.index("multi-use") < text.index("cast-between")  # most frequent first


def test_few_misses_keep_their_exact_sentences():
    text = render.table(report([], [miss(1), miss(2)]))
    assert "mul_1 has" in text and "mul_2 has" in text


def test_stages_that_did_not_join_are_told_once_per_code():
    stop = {"stage": "gate_projection", "code": "gate-used-elsewhere", "reason": "linear_3 has 2 users"}
    sites = [rewrite(n, stages=["gated_add"], stopped=[stop]) for n in range(5)]
    assert "[gate_projection / gate-used-elsewhere] 5 sites: linear_3 has 2 users" in render.table(report(sites))


def test_graph_breaks_are_grouped_by_reason():
    breaks = [GraphBreak("aten.nonzero\nhas a size that depends on data", "experts.py:293")] * 7
    text = render.table(report([rewrite()], [], breaks, graphs=2))
    assert "experts.py:293:  7 x  aten.nonzero has a size that depends on data" in text
    assert "2 graphs, 7 graph breaks" in text


ZERO = {
    "no candidate": (report(), "0 rewritten in 1 graph: no sigmoid feeds a product that feeds an add"),
    "no graph": (report(graphs=0), "0 rewritten: no graph was compiled with fusionpass"),
    "misses": (
        report([], [miss(1), miss(2)]),
        "0 rewritten in 1 graph, 2 near misses: 2 x multi-use (the product mul_1 has 2 users)",
    ),
}


@pytest.mark.parametrize("empty, sentence", ZERO.values(), ids=ZERO)
def test_zero_is_said_plainly(empty, sentence):
    for text in (render.summary(empty), render.table(empty), render.html(empty), render.markdown(empty)):
        assert sentence in text


def test_html_escapes_every_text():
    nasty = "<script>&\"'"
    text = render.html(
        Report(
            nasty,
            [rewrite(module=nasty, source=nasty, nodes=[nasty], replacement=nasty)],
            [miss(reason=nasty, module=nasty)],
            [GraphRecord(0, 1, 1, 1)],
            [GraphBreak(nasty, nasty)],
        )
    )
    assert "<script>" not in text
    assert "&lt;script&gt;&amp;" in text


def test_markdown_cells_cannot_end_their_column():
    text = render.markdown(report([], [miss(reason="a | b <i> *c*\nd")]))
    assert "a \\| b &lt;i> \\*c\\* d" in text


def test_markdown_tables_have_one_width():
    rows = [line for line in render.markdown(FULL).splitlines() if line.startswith("|")]
    assert len(rows) == 50
    assert {row.count("|") for row in rows} == {rows[0].count("|")}


@pytest.mark.parametrize(
    "count, text",
    [(None, "?"), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (1_570_000, "1.57 MB")],
)
def test_bytes(count, text):
    assert render._bytes(count) == text


def test_report_methods_use_these():
    assert str(FULL) == render.table(FULL)
    assert FULL.to_markdown() == render.markdown(FULL)
    assert FULL.to_html() == render.html(FULL)
