"""The OpenAI-compatible server: ``bdh serve``."""
