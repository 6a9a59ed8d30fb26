"""`python -m hybrimoe_plugin` is the `hybrimoe` command."""

import sys

from hybrimoe_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
