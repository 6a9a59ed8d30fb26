"""Classic kTransformers 0.2.x as host: the adapter, the patch set, the installation without a
compiler.

`release` and `install` need nothing but Python; `patches` must run before anything imports
`ktransformers`; `operators` and `blocks` are what rules name and import `ktransformers` themselves.
"""
