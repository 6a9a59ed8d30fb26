"""Entry point of `python -m eval.gpu_check`."""

import sys

from eval.gpu_check.question import exit_status, main

if __name__ == "__main__":
    sys.exit(exit_status(main()))
