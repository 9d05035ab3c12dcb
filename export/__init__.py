"""From a model file to a model package: source → spec and tensors → graph, packed weights and manifest."""
