"""Who writes the answers that a student of texts trains on: the data, its teacher, itself, or both in turn."""
