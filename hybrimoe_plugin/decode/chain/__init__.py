"""Decode layers whose experts are all cached without the host in between; see `chain`."""
