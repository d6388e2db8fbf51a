"""What training tells: heartbeats to the agent, Prometheus, the step log, the ledger of time, throughput."""
