"""What OpenAI's Responses say, in this server's words and back."""
