"""Every class path that was ever public still leads to its class, in rules and in code."""

from __future__ import annotations

import importlib

import pytest
from torch import nn

from hybrimoe_plugin.injection.classes import import_class
from hybrimoe_plugin.injection.rules import Rule

PUBLIC = (
    "hybrimoe_plugin.operators.attention.LeanAttention",
    "hybrimoe_plugin.operators.dense.DenseOperator",
    "hybrimoe_plugin.operators.device_linear.DeviceLinear",
    "hybrimoe_plugin.operators.embedding.LeanEmbedding",
    "hybrimoe_plugin.operators.experts.HybriMoEExperts",
    "hybrimoe_plugin.operators.graphs.GraphedLayer",
    "hybrimoe_plugin.operators.linear.LeanLinear",
    "hybrimoe_plugin.operators.linear.StoredLinear",
    "hybrimoe_plugin.operators.mla.LeanMLA",
    "hybrimoe_plugin.operators.mlp.LeanMLP",
    "hybrimoe_plugin.operators.norm.LeanRMSNorm",
    "lever_ext.operators.decoder.FlashDecoderLayer",
    "lever_ext.operators.experts.FlashExperts",
)
"""Paths of operators in releases so far; none is ever taken off this list."""

CLASSIC = (
    "hybrimoe_plugin.hosts.ktransformers.operators.HybriMoEExperts",
    "hybrimoe_plugin.hosts.ktransformers.blocks.MixtralSparseMoeBlock",
)
"""The same for the classic host, whose packages are needed to import them."""


@pytest.mark.parametrize("path", PUBLIC)
def test_old_paths_lead_to_their_classes(path: str) -> None:
    rule = Rule("made.yaml", 1, 1, "x", None, path)
    found = import_class(rule, path, "replace")
    home, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(home), name) is found
    assert issubclass(found, nn.Module)


@pytest.mark.parametrize("path", CLASSIC)
def test_classic_paths_are_where_they_were(path: str) -> None:
    pytest.importorskip("ktransformers")
    home, _, name = path.rpartition(".")
    assert hasattr(importlib.import_module(home), name)


def test_other_names_are_refused() -> None:
    with pytest.raises(ImportError, match="GraphLayer"):
        from hybrimoe_plugin.operators.graphs import GraphLayer  # noqa: F401
