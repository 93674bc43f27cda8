"""The MoE models of transformers: docs/models.md and the README's table say what becomes of them, and it is so."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import moe_models
from moe_models import BEGIN, END, EXPERTS, PAGE, README

VERSION = moe_models.transformers.__version__
# One of each kind: dense layers first, sandwich norms, latent attention, groups of experts, sinks, factors, other routers.
GROUPED = ["afmoe", "cohere2_moe", "dots1", "ernie4_5_moe", "flex_olmo", "gemma4", "glm4_moe", "granitemoe", "inkling"]
GROUPED += ["lfm2_moe", "minimax_m2", "mixtral", "phimoe", "jamba"]
BATCHED = ["deepseek_v3", "gpt_oss", "phimoe", "qwen3_moe", "olmoe"]
MODELS = [(model_type, EXPERTS[0]) for model_type in GROUPED] + [(model_type, EXPERTS[1]) for model_type in BATCHED]


@pytest.mark.parametrize(("model_type", "experts"), MODELS, ids=map("-".join, MODELS))
def test_as_the_page_says(model_type, experts):
    text = PAGE.read_text()
    rows = moe_models.rows_of(text)
    written = rows.get(f"{model_type}, `{experts}`", rows.get(model_type))
    if model_type not in moe_models.model_types():
        pytest.skip(
            f"transformers {moe_models.transformers.__version__} has no model type {model_type} with this interface"
        )
    found = moe_models.row(model_type, experts)
    assert found.exact and found.sites >= found.sparse
    if f"transformers {VERSION} " in text:
        assert found.cells == written
    else:  # names of nodes may differ from version to version
        assert found.cells[1] == written[1]


def test_the_page_and_the_readme():
    """The page has a row for every type and claims nothing of models that did not run; the README's table is made of it."""
    text, readme = PAGE.read_text(), README.read_text()
    rows = moe_models.rows_of(text)
    types = {name.partition(",")[0] for name in rows}
    if f"transformers {VERSION} " in text:
        assert types == set(moe_models.model_types())
    assert not [name for name, cells in rows.items() if cells[0] == "0 of 0" and "does not run" not in cells[2]]
    assert readme.partition(BEGIN)[2].partition(END)[0].strip() == moe_models.summary(text)
