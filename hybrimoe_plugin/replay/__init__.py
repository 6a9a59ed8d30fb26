"""Routing traces, machine profiles and the simulator that drives the engine's own policies over
both. No torch.
"""
