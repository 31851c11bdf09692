"""What a person sees of pqk: the command line, its progress bars and its tables."""
