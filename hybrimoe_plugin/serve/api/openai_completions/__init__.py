"""Bodies and answers of OpenAI's chat completions and completions."""
