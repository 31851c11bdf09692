"""The compile that searches: students that may keep a contract, judged on validation data."""
