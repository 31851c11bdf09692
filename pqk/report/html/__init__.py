"""The report as one HTML file: `report.html`, for people who read no JSON and have no server."""
