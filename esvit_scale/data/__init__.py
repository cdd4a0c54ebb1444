"""Shards of images, the order of their samples, and the stream of crops; the only package that imports webdataset."""
