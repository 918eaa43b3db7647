"""What every run stands on: the cluster, handles of workers, waits with deadlines, ranks, the training engine."""
