"""Personal quality, retained general knowledge, routing statistics."""
