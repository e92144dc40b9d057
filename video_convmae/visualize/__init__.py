"""Pictures: accuracy, reconstructions, features."""
