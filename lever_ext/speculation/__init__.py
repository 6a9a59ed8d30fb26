"""One answer by speculation: draft, verify, accept, learn, until generation ends."""
