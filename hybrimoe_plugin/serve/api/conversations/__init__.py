"""What endpoints for conversations have in common, besides OpenAI's chat completions."""
