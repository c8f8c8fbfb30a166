"""The device side: listens, gates on voice, recognises, publishes."""
