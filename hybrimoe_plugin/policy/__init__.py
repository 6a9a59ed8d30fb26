"""Pure policies: what to compute where, what to keep, what to prefetch.

Integers and floats only: no torch, no devices, no files, no models. `controller` connects them,
`schedule`, `cache` and `prefetch` hold the policies that can be chosen by name.
"""
