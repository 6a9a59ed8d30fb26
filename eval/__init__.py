"""One module or package for each question: `python -m eval.<question>`; others hold helpers."""
