"""What several kernels share: launches, argument checks, epilogues, tile configurations."""
