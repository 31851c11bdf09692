"""Which of several recipes is better: variants on several seeds, run under one budget and compared in pairs."""
