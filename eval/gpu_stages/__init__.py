"""The stages of `eval.gpu_check`, one module each; `plan` lists them, `child` runs one in a process
of its own.
"""
