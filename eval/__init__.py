"""One module or package for each question: `python -m eval.<question>`; others hold helpers."""

import hybrimoe_plugin  # noqa: F401 (before torch, which reads its setting for OpenMP)
