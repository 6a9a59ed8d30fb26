"""One module per question: `python -m eval.<question>`."""
