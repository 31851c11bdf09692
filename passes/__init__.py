"""The passes, one public pass a file."""
