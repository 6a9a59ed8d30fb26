"""`python -m eval.gpu_check`: everything about one GPU, stage by stage.

`plan` lists the stages, `stages` holds one module for each, `child` runs one in its own process.
"""
