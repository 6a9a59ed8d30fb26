"""One module per stage; `eval.gpu_check.plan` lists them."""
