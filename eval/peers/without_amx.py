"""Run a program that may not use AMX.

python -m eval.peers.without_amx PROGRAM [ARGUMENT ...]
"""

from __future__ import annotations

import os
import sys

from eval.peers.child import withhold_amx

if __name__ == "__main__":
    withhold_amx()
    os.execvp(sys.argv[1], sys.argv[1:])
