"""Several processes that train one model: who they are, how they share the model, and how its tensors are stored."""
