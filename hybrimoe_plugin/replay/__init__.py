"""Routing traces, machine profile files, and the simulator that drives the policies over both.

The policies are those that the engine runs. No torch.
"""
