"""Everything about particular networks, each beside the recipe that was measured."""
