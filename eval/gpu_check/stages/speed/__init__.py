"""Stages on what bounds speed: the host, instructions, arithmetic, the hop between cards."""
