"""A real multi-node Kubernetes on one Debian machine; standard library only, Python >= 3.9."""
