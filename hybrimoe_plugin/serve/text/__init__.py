"""Text on its way to tokens and back: prompts, answers, their reasoning and tool calls."""
