"""Classic kTransformers 0.2.x as host: adapter, patch set, and installation without a compiler.

`release` and `install` need nothing but Python; `patches` must run before anything imports
`ktransformers`; `operators` and `blocks` are what rules name and import `ktransformers` themselves.
"""
