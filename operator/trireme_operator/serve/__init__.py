"""What others are told: agents by the coordinator, Prometheus and the kubelet by metrics and health."""
