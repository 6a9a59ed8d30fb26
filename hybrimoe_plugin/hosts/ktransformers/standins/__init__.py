"""What takes the place of modules that were not compiled or installed: the same names, on kt-kernel
and torch.
"""
