"""Commands around the classic `ktransformers.local_chat`."""
