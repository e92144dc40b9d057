"""Lists, clips and batches: from a list file to what a training step consumes."""
