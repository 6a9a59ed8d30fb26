"""One model on several GPUs or machines: replicas of the server behind one address, by Ray Serve.

    client -> Ray's proxy -> ingress -> replica     each arrow may cross machines

A replica is a whole server in one process. The ingress has no model: it finds out which
conversation a request belongs to, and hands the request to the replica that has its prefix.
Only `deployments` and `launch` need Ray.
"""
