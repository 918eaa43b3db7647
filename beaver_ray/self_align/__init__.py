"""Self-alignment from principles: questions a model asks itself, answers shaped by rules of its own choice."""
