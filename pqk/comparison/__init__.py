"""Which of several recipes is better: cells of variants and seeds, run under one budget and compared in pairs."""
