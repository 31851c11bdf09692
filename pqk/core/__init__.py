"""What flows through a compile, and its surroundings: the program, the pipeline, graphs, costs, the run."""
