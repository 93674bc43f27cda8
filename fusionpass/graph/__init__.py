"""Reading a graph: what a node means, what it writes, what the tracer recorded of its value. Nothing here knows a rule."""
