"""What a finished student is worth beside its teacher: accuracy, latency, parity, controls, diagnostics."""
