"""What Anthropic's endpoints say, in this server's words and back."""
