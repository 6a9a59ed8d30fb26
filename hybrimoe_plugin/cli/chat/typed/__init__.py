"""A conversation that somebody types: commands, the editor, saved conversations."""
