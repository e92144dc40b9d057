"""Preparation of files, done once before training: lists, checking, packing."""
