"""Shards, their order, and the stream of crops. The only station that knows webdataset."""
