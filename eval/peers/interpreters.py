"""Other Python interpreters: peers live in environments of their own."""

from __future__ import annotations

import subprocess


def can_import(python: str, package: str) -> bool:
    """Whether an interpreter runs and has a package."""
    command = [python, "-c", f"import {package}"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0
