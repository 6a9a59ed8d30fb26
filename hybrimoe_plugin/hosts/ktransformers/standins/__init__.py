"""Stand-ins for modules that were not compiled or installed, built on kt-kernel and torch."""
