"""Where a teacher's answers come from: live, cached, ensembles, online, black boxes."""
