"""The folder that `install` puts on the path of pip's build process: see `sitecustomize`."""
