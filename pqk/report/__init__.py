"""What a report holds and how it is printed; every number in it is computed elsewhere."""
