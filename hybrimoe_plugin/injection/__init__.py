"""Rules: parse, validate, dry run, inject and restore. Nothing here is specific to experts.

`rules` reads files without torch; `match`, `inject` and `explain` work on a model.
"""
