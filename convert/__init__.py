"""The workstation side: turns a Whisper checkpoint into a bundle and scores it."""
