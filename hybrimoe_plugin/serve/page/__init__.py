"""The page: chat, and beside it the engine live. Static files, no build step."""
