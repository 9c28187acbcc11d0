"""What an artifact, or a checkpoint, holds and does."""
