"""Rules: parse, validate, dry-run, inject, restore. Knows nothing of experts.

`rules` reads files without torch; `match`, `inject` and `explain` work on a model.
"""
