"""One folder per engine: `build` lowers a graph, `session` runs it."""
