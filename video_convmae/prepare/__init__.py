"""What is done to files once, before training: lists, checking, packing."""
