"""HTTP: one module for each endpoint, with `router(service)`."""
