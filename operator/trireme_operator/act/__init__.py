"""What is done: the one module that writes to Kubernetes, the requests it makes, and events."""
