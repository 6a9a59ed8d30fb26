"""Drawings of `hybrimoe explain`, written as SVG without a library."""
