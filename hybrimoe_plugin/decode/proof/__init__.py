"""What a decoder layer's own code does with its parts, found by running it on stand-ins."""
