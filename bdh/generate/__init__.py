"""Text generation: the engine, its sampling and caches, snapshots, and chat. Each token takes constant time."""
