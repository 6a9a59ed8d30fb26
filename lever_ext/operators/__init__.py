"""The modules that rules name for targets on flash."""
