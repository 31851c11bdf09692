"""What the default contract makes of models that no recipe knows: `pqk strangers`."""
