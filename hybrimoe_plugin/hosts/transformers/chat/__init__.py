"""What a conversation needs of the host: its template, and a KV cache that is kept."""
